/* SPDX-License-Identifier: Apache-2.0 */
/*
 * inject.c - a userfaultfd inside the VMM, one reference there, one here.
 *
 * Threads, Errors, Ownership, Units, Source: see inject.h.
 *
 * A child process does the tracing. The VMM is often a child of ours, and somebody in this process may be
 * waiting for its end in waitpid(2): that wait would be given the stops of a tracee of ours, whichever of
 * our threads traces it. The child also makes our death harmless:
 *
 *   agent                      child                          target
 *   fork, wait        -->      stop, inject               --> userfaultfd, API, REGISTER
 *                              pidfd_getfd
 *   receive           <--      report, with the fd
 *   commit            -->      let it go                  --> runs on, keeps its fd
 *                     <--      report: how long it stood
 *
 * Without the commit, for whatever reason, the child closes the fd in the target, which forgets
 * the ranges: the target is as it was. Only the loss of the last report leaves a doubt: then the
 * target may be armed, and we say that it failed.
 */
#include "inject_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <godwit/sys.h>
#include <godwit/uffd.h>

#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

static const char device_path[] = "/dev/userfaultfd";

struct report {
	int32_t err;
	struct gw_inject_result result;
};

/* --- in the child: the target is stopped --------------------------------------------------- */

/* Tried once more: a call that a test has failed must not leave an fd in the target. */
static void remote_close(struct gw_remote *remote, long fd)
{
	const uint64_t arguments[6] = {(uint64_t)fd};

	if (gw_remote_call(remote, SYS_close, arguments) < 0)
		(void)gw_remote_call(remote, SYS_close, arguments);
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

		remote_close(remote, fd);
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

static int send_report(int socket, const struct report *report, int fd)
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
	const ssize_t sent = gw_sys_sendmsg(socket, &message, MSG_NOSIGNAL);

	return sent < 0 ? (int)sent : 0;
}

/* Report with the fd, and wait for the word to go on. */
static int hand_over(int pidfd, int socket, const struct report *report)
{
	char commit = 0;
	ssize_t got = 0;
	const int fd = gw_sys_pidfd_getfd(pidfd, report->result.remote_fd, 0);

	if (fd < 0)
		return fd;
	const int err = send_report(socket, report, fd);

	(void)gw_sys_close(fd);
	if (err < 0)
		return err;
	do
		got = gw_sys_recv(socket, &commit, sizeof(commit), 0);
	while (got == -EINTR);
	return got == 1 ? 0 : got < 0 ? (int)got : -ECONNRESET;
}

/* The child's whole life. What fails leaves nothing behind in the target. */
static void inject(pid_t pid, int pidfd, uint64_t features, uint64_t register_mode, int socket,
		   struct report *report)
{
	struct gw_remote remote;
	const uint64_t before_ns = gw_sys_now_ns();
	long err = gw_remote_attach(pid, &remote);

	if (err == 0) {
		const long uffd = remote_open_uffd(&remote);

		err = uffd < 0 ? uffd
			       : remote_arm(&remote, (int)uffd, features, register_mode,
					    &report->result);
		report->result.remote_fd = (int32_t)uffd;
		if (err == 0)
			err = hand_over(pidfd, socket, report);
		/* The last reference: the kernel forgets the ranges with it. Nobody has run on them. */
		if (err < 0 && uffd >= 0)
			remote_close(&remote, uffd);
		gw_remote_detach(&remote);
	}
	report->err = (int32_t)err;
	report->result.stopped_ns = gw_sys_now_ns() - before_ns;
	if (send_report(socket, report, -1) < 0)
		(void)send_report(socket, report, -1);
}

/* --- in the caller -------------------------------------------------------------------------- */

/* A report of the child and, if it comes with one, the fd; else *ret_fd is -1. An end is -EPIPE. */
static int receive_report(int socket, int flags, struct report *ret_report, int *ret_fd)
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

	*ret_fd = -1;
	do
		got = gw_sys_recvmsg(socket, &message, flags | MSG_CMSG_CLOEXEC);
	while (got == -EINTR);
	if (got < 0)
		return (int)got;
	/* First the fd, so that the caller has it to close, whatever it came with. */
	const struct cmsghdr *const header = CMSG_FIRSTHDR(&message);

	if (header && header->cmsg_type == SCM_RIGHTS)
		memcpy(ret_fd, CMSG_DATA(header), sizeof(*ret_fd));
	return got == (ssize_t)sizeof(*ret_report) ? 0 : -EPIPE;
}

static int converse(int socket, struct gw_inject_result *ret_result)
{
	struct report report = {0};
	struct report last = {0};
	int fd = -1;
	int none = -1;
	int flags = 0;
	int err = receive_report(socket, 0, &report, &fd);

	if (err == 0)
		err = report.err;
	if (err == 0 && fd < 0)
		err = -EPIPE;
	GW_HOOK("inject.received");
	if (err == 0) {
		const ssize_t sent = gw_sys_send(socket, "c", 1, MSG_NOSIGNAL);

		/* Nobody takes it: the child has undone everything and gone, and said why before. */
		if (sent == -EPIPE)
			flags = MSG_DONTWAIT;
		else if (sent < 0)
			err = (int)sent;
	}
	/* The last word is the child's: it may have undone everything all the same. */
	if (err == 0) {
		err = receive_report(socket, flags, &last, &none);
		if (err < 0 && err != -EPIPE)
			err = receive_report(socket, flags, &last, &none);
		err = err == 0 ? last.err : err == -EAGAIN ? -EPIPE : err;
	}
	if (err < 0) {
		if (fd >= 0)
			(void)gw_sys_close(fd);
		return err;
	}
	*ret_result = last.result;
	ret_result->uffd = fd;
	return 0;
}

/* Start the child; it never returns here. */
static pid_t start_child(pid_t pid, int pidfd, uint64_t features, uint64_t register_mode,
			 const int sockets[2], struct report *report)
{
	sigset_t all;
	sigset_t before;

	/* A handler of the agent's, run in its copy, would write to the agent's pipes. */
	sigfillset(&all);
	(void)pthread_sigmask(SIG_SETMASK, &all, &before);
	/* Not fork(): that runs the handlers of every library in the process, and gRPC's, called
	 * while its threads are busy, killed the child once in seven. */
	const pid_t child = _Fork();
	const int err = errno;

	if (child == 0) {
		/* Of a process with threads only this one is here: no allocation, no stdio locks. The
		 * agent's end is closed, so that its death reads as the end. */
		(void)close(sockets[0]);
		inject(pid, pidfd, features, register_mode, sockets[1], report);
		_exit(0);
	}
	(void)pthread_sigmask(SIG_SETMASK, &before, NULL);
	return child < 0 ? -err : child;
}

/* Until it is gone: only then is the target as it will be. */
static void reap(pid_t child)
{
	pid_t got;

	do
		got = gw_sys_waitpid(child, NULL, 0);
	while (got < 0 && got != -ECHILD);
}

static int run_child(pid_t pid, int pidfd, uint64_t features, uint64_t register_mode,
		     struct report *report, struct gw_inject_result *ret_result)
{
	int sockets[2];
	int err = gw_sys_socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sockets);

	if (err < 0)
		return err;
	const pid_t child = start_child(pid, pidfd, features, register_mode, sockets, report);

	(void)gw_sys_close(sockets[1]);
	err = child < 0 ? child : converse(sockets[0], ret_result);
	/* Before the wait: it may be waiting for a commit that does not come. */
	(void)gw_sys_close(sockets[0]);
	if (child > 0)
		reap(child);
	return err;
}

int gw_inject_uffd(int32_t pid, int32_t ram_fd, uint64_t features, uint64_t register_mode,
		   struct gw_inject_result *ret_result)
{
	struct report report = {0};
	/* First, so that the pid cannot come to mean another process under us. */
	const int pidfd = gw_sys_pidfd_open(pid, 0);
	int err = pidfd < 0 ? pidfd : gw_inject_find_ranges(pid, ram_fd, &report.result);

	if (err == 0)
		err = run_child(pid, pidfd, features, register_mode, &report, ret_result);
	if (pidfd >= 0)
		(void)gw_sys_close(pidfd);
	return err;
}

static int take_fd(pid_t pid, int remote_fd)
{
	const int pidfd = gw_sys_pidfd_open(pid, 0);

	if (pidfd < 0)
		return pidfd;
	const int fd = gw_sys_pidfd_getfd(pidfd, remote_fd, 0);

	(void)gw_sys_close(pidfd);
	return fd;
}

/* What the handshake granted, as fdinfo says it: "API: aa:FEATURES:IOCTLS". 0 if it does not. */
static uint64_t features_of(int uffd)
{
	char path[64];
	char text[512];
	unsigned int api = 0;
	unsigned int features = 0;

	(void)snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", uffd);
	const int fd = gw_sys_open(path, O_RDONLY | O_CLOEXEC, 0);

	if (fd < 0)
		return 0;
	const ssize_t len = gw_sys_read(fd, text, sizeof(text) - 1);

	(void)gw_sys_close(fd);
	if (len <= 0)
		return 0;
	text[len] = '\0';
	const char *const line = strstr(text, "API:");

	/* NOLINTNEXTLINE(bugprone-unchecked-string-to-number-conversion): the kernel wrote it. */
	if (!line || sscanf(line, "API: %x:%x", &api, &features) != 2)
		return 0;
	return features & 0x7fffffffU; /* bit 31 is the kernel's own */
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
	const int is_uffd = gw_uffd_is_uffd(result.uffd);

	if (is_uffd != 1) {
		(void)gw_sys_close(result.uffd);
		return is_uffd < 0 ? is_uffd : -EBADF;
	}
	result.features = features_of(result.uffd);
	*ret_result = result;
	return 0;
}
