/* SPDX-License-Identifier: Apache-2.0 */
/*
 * inject.c - a userfaultfd inside the VMM, one reference there, one here.
 *
 * Threads, Errors, Ownership, Units, Source: see inject.h.
 *
 * A child process does the tracing. The VMM is often a child of ours, and somebody in this process may be
 * waiting for its end in waitpid(2): that wait would be given the stops of a tracee of ours, whichever of
 * our threads traces it. The child also makes our death harmless: it finishes, or its own
 * end lets the target go.
 */
#include "inject_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <godwit/sys.h>

#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

static const char device_path[] = "/dev/userfaultfd";
static const char uffd_link[] = "anon_inode:[userfaultfd]";

struct report {
	int32_t err;
	struct gw_inject_result result;
};

/* --- in the child: the target is stopped --------------------------------------------------- */

static long remote_close(struct gw_remote *remote, long fd)
{
	return gw_remote_call(remote, SYS_close, (const uint64_t[6]){(uint64_t)fd});
}

/* The device first: it needs no capability in the target, only permission on the file. */
static long remote_open_uffd(struct gw_remote *remote)
{
	const uint64_t flags = O_CLOEXEC | O_NONBLOCK;
	long fd = gw_remote_put(remote, device_path, sizeof(device_path));

	if (fd == 0)
		fd = gw_remote_call(remote, SYS_openat,
				    (const uint64_t[6]){(uint64_t)AT_FDCWD, remote->scratch,
							O_RDWR | O_CLOEXEC});
	if (fd >= 0) {
		const long uffd = gw_remote_call(
			remote, SYS_ioctl,
			(const uint64_t[6]){(uint64_t)fd, (uint64_t)USERFAULTFD_IOC_NEW, flags});

		(void)remote_close(remote, fd);
		if (uffd >= 0)
			return uffd;
	}
	return gw_remote_call(remote, SYS_userfaultfd, (const uint64_t[6]){flags});
}

static long remote_arm(struct gw_remote *remote, int uffd, uint64_t features,
		       uint64_t register_mode, struct gw_inject_result *result)
{
	struct uffdio_api api = {.api = UFFD_API, .features = features};
	long err = gw_remote_ioctl(remote, uffd, UFFDIO_API, &api, sizeof(api));

	for (uint32_t i = 0; err >= 0 && i < result->range_count; i++) {
		struct uffdio_register range = {
			.range = {.start = result->ranges[i].host_addr,
				  .len = result->ranges[i].len},
			.mode = register_mode,
		};

		err = gw_remote_ioctl(remote, uffd, UFFDIO_REGISTER, &range, sizeof(range));
	}
	result->features = api.features & features;
	return err < 0 ? err : 0;
}

static int take_fd(pid_t pid, int remote_fd)
{
	const int pidfd = gw_sys_pidfd_open(pid, 0);

	if (pidfd < 0)
		return pidfd;
	const int fd = gw_sys_pidfd_getfd(pidfd, remote_fd, 0);

	gw_sys_close(pidfd);
	return fd;
}

/* Returns our reference, or -errno with nothing left behind in the target. */
static int inject(pid_t pid, int ram_fd, uint64_t features, uint64_t register_mode,
		  struct gw_inject_result *result)
{
	struct gw_remote remote;
	const uint64_t before_ns = gw_sys_now_ns();
	long err = gw_inject_find_ranges(pid, ram_fd, result);
	int fd = -1;

	if (err == 0)
		err = gw_remote_attach(pid, &remote);
	if (err < 0)
		return (int)err;
	const long uffd = remote_open_uffd(&remote);

	err = uffd < 0 ? uffd : remote_arm(&remote, (int)uffd, features, register_mode, result);
	if (err == 0) {
		fd = take_fd(pid, (int)uffd);
		err = fd;
	}
	/* The last reference: the kernel forgets the ranges with it. Nobody has run on them yet. */
	if (err < 0 && uffd >= 0 && remote_close(&remote, uffd) < 0)
		(void)remote_close(&remote, uffd);
	gw_remote_detach(&remote);
	result->remote_fd = (int32_t)uffd;
	result->stopped_ns = gw_sys_now_ns() - before_ns;
	return err < 0 ? (int)err : fd;
}

static void send_report(int socket, const struct report *report, int fd)
{
	struct iovec iov = {.iov_base = (void *)(uintptr_t)report, .iov_len = sizeof(*report)};
	union {
		struct cmsghdr header;
		char space[CMSG_SPACE(sizeof(int))];
	} control = {0};
	struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1};

	if (fd >= 0) {
		message.msg_control = &control;
		message.msg_controllen = sizeof(control);
		control.header.cmsg_level = SOL_SOCKET;
		control.header.cmsg_type = SCM_RIGHTS;
		control.header.cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(&control.header), &fd, sizeof(fd));
	}
	(void)gw_sys_sendmsg(socket, &message, MSG_NOSIGNAL);
}

/* --- in the caller -------------------------------------------------------------------------- */

/* The child's report and, with it, the fd. An end without a report is -EPIPE. */
static int receive_report(int socket, struct report *ret_report)
{
	struct iovec iov = {.iov_base = ret_report, .iov_len = sizeof(*ret_report)};
	union {
		struct cmsghdr header;
		char space[CMSG_SPACE(sizeof(int))];
	} control = {0};
	struct msghdr message = {.msg_iov = &iov,
				 .msg_iovlen = 1,
				 .msg_control = &control,
				 .msg_controllen = sizeof(control)};
	ssize_t got = 0;

	do
		got = gw_sys_recvmsg(socket, &message, MSG_CMSG_CLOEXEC);
	while (got == -EINTR);
	if (got != (ssize_t)sizeof(*ret_report))
		return got < 0 ? (int)got : -EPIPE;
	if (ret_report->err < 0)
		return ret_report->err;
	const struct cmsghdr *const header = CMSG_FIRSTHDR(&message);

	if (!header || header->cmsg_type != SCM_RIGHTS)
		return -EPIPE;
	memcpy(&ret_report->result.uffd, CMSG_DATA(header), sizeof(int));
	return 0;
}

int gw_inject_uffd(int32_t pid, int32_t ram_fd, uint64_t features, uint64_t register_mode,
		   struct gw_inject_result *ret_result)
{
	struct report report = {0};
	int sockets[2];
	int err = gw_sys_socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sockets);

	if (err < 0)
		return err;
	/* Not fork(): that runs the handlers of every library in the process, and gRPC's, called
	 * while its threads are busy, killed the child once in seven. */
	const pid_t child = _Fork();

	if (child == 0) {
		/* Of a process with threads only this one is here: no allocation, no stdio locks. */
		const int fd = inject(pid, ram_fd, features, register_mode, &report.result);

		report.err = fd < 0 ? fd : 0;
		send_report(sockets[1], &report, fd);
		_exit(0);
	}
	gw_sys_close(sockets[1]);
	err = child < 0 ? -errno : receive_report(sockets[0], &report);
	gw_sys_close(sockets[0]);
	if (child > 0)
		while (gw_sys_waitpid(child, NULL, 0) == -EINTR)
			continue;
	if (err == 0)
		*ret_result = report.result;
	return err;
}

static bool is_uffd(int fd)
{
	char path[64];
	char target[sizeof(uffd_link)];

	(void)snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	const ssize_t len = gw_sys_readlink(path, target, sizeof(target));

	return len == (ssize_t)sizeof(uffd_link) - 1 &&
	       memcmp(target, uffd_link, sizeof(uffd_link) - 1) == 0;
}

int gw_inject_take(int32_t pid, int32_t remote_fd, int32_t ram_fd,
		   struct gw_inject_result *ret_result)
{
	struct gw_inject_result result = {.remote_fd = remote_fd};
	const int err = gw_inject_find_ranges(pid, ram_fd, &result);

	if (err < 0)
		return err;
	result.uffd = take_fd(pid, remote_fd);
	if (result.uffd < 0)
		return result.uffd;
	if (!is_uffd(result.uffd)) {
		gw_sys_close(result.uffd);
		return -EBADF;
	}
	*ret_result = result;
	return 0;
}
