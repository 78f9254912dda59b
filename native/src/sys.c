/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sys.c - the system calls. The test side is in sys_hooks.c.
 *
 * Threads, Errors, Ownership, Units, Source: see sys.h.
 */
#include <godwit/sys.h>

#include <errno.h>
#include <linux/futex.h>
#include <stdio.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef SYS_userfaultfd
#define SYS_userfaultfd 323
#endif

#ifdef GW_TEST_HOOKS
#define FAIL_IF_TOLD(call)                                   \
	do {                                                 \
		const int injected_ = gw_sys_injected(call); \
		if (injected_)                               \
			return injected_;                    \
	} while (0)
#define SHORTENED(len) gw_sys_shortened(len)
#else
#define FAIL_IF_TOLD(call) ((void)0)
#define SHORTENED(len)	   (len)
#endif

/* -1 and errno to -errno, in the width of the call. */
#define RETURN_OF(call, type, expression)                            \
	do {                                                         \
		FAIL_IF_TOLD(call);                                  \
		const type result_ = (expression);                   \
		return result_ == (type)-1 ? (type)-errno : result_; \
	} while (0)

ssize_t gw_sys_read(int fd, void *ret_buffer, size_t len)
{
	RETURN_OF(GW_SYS_READ, ssize_t, read(fd, ret_buffer, len));
}

ssize_t gw_sys_write(int fd, const void *buffer, size_t len)
{
	RETURN_OF(GW_SYS_WRITE, ssize_t, write(fd, buffer, len));
}

ssize_t gw_sys_readv(int fd, const struct iovec *iov, int iov_count)
{
	RETURN_OF(GW_SYS_READV, ssize_t, readv(fd, iov, iov_count));
}

ssize_t gw_sys_writev(int fd, const struct iovec *iov, int iov_count)
{
	RETURN_OF(GW_SYS_WRITEV, ssize_t, writev(fd, iov, iov_count));
}

ssize_t gw_sys_pread(int fd, void *ret_buffer, size_t len, off_t offset)
{
	RETURN_OF(GW_SYS_PREAD, ssize_t, pread(fd, ret_buffer, SHORTENED(len), offset));
}

ssize_t gw_sys_pwrite(int fd, const void *buffer, size_t len, off_t offset)
{
	RETURN_OF(GW_SYS_PWRITE, ssize_t, pwrite(fd, buffer, SHORTENED(len), offset));
}

ssize_t gw_sys_recv(int fd, void *ret_buffer, size_t len, int flags)
{
	RETURN_OF(GW_SYS_RECV, ssize_t, recv(fd, ret_buffer, SHORTENED(len), flags));
}

ssize_t gw_sys_send(int fd, const void *buffer, size_t len, int flags)
{
	RETURN_OF(GW_SYS_SEND, ssize_t, send(fd, buffer, len, flags));
}

#ifdef GW_TEST_HOOKS
/* The first bytes of the first piece, if a test says so; true then. */
static bool shorten(const struct msghdr *message, struct msghdr *ret_cut, struct iovec *ret_first)
{
	const size_t len_max = gw_sys_shortened(SIZE_MAX);

	if (len_max == SIZE_MAX || message->msg_iovlen == 0)
		return false;
	*ret_first = message->msg_iov[0];
	ret_first->iov_len = ret_first->iov_len < len_max ? ret_first->iov_len : len_max;
	*ret_cut = *message;
	ret_cut->msg_iov = ret_first;
	ret_cut->msg_iovlen = 1;
	return true;
}

static ssize_t send_shortened(int fd, const struct msghdr *message, int flags)
{
	struct iovec first;
	struct msghdr cut;

	return sendmsg(fd, shorten(message, &cut, &first) ? &cut : message, flags);
}

static ssize_t receive_shortened(int fd, struct msghdr *message, int flags)
{
	struct iovec first;
	struct msghdr cut;

	return recvmsg(fd, shorten(message, &cut, &first) ? &cut : message, flags);
}
#else
#define send_shortened	  sendmsg
#define receive_shortened recvmsg
#endif

ssize_t gw_sys_recvmsg(int fd, struct msghdr *message, int flags)
{
	RETURN_OF(GW_SYS_RECVMSG, ssize_t, receive_shortened(fd, message, flags));
}

ssize_t gw_sys_sendmsg(int fd, const struct msghdr *message, int flags)
{
	RETURN_OF(GW_SYS_SENDMSG, ssize_t, send_shortened(fd, message, flags));
}

int gw_sys_epoll_create(void)
{
	RETURN_OF(GW_SYS_EPOLL_CREATE, int, epoll_create1(EPOLL_CLOEXEC));
}

int gw_sys_epoll_ctl(int epoll_fd, int op, int fd, struct epoll_event *event)
{
	RETURN_OF(GW_SYS_EPOLL_CTL, int, epoll_ctl(epoll_fd, op, fd, event));
}

int gw_sys_epoll_wait(int epoll_fd, struct epoll_event *ret_events, int count_max, int timeout_ms)
{
	RETURN_OF(GW_SYS_EPOLL_WAIT, int, epoll_wait(epoll_fd, ret_events, count_max, timeout_ms));
}

int gw_sys_poll(struct pollfd *fds, nfds_t fd_count, int timeout_ms)
{
	RETURN_OF(GW_SYS_POLL, int, poll(fds, fd_count, timeout_ms));
}

int gw_sys_eventfd(unsigned int initial, int flags)
{
	RETURN_OF(GW_SYS_EVENTFD, int, eventfd(initial, flags));
}

int gw_sys_socket(int domain, int type, int protocol)
{
	RETURN_OF(GW_SYS_SOCKET, int, socket(domain, type, protocol));
}

int gw_sys_socketpair(int domain, int type, int protocol, int ret_fds[2])
{
	RETURN_OF(GW_SYS_SOCKETPAIR, int, socketpair(domain, type, protocol, ret_fds));
}

int gw_sys_connect(int fd, const struct sockaddr *address, socklen_t len)
{
	RETURN_OF(GW_SYS_CONNECT, int, connect(fd, address, len));
}

int gw_sys_accept4(int fd, struct sockaddr *ret_address, socklen_t *len, int flags)
{
	RETURN_OF(GW_SYS_ACCEPT, int, accept4(fd, ret_address, len, flags));
}

int gw_sys_bind(int fd, const struct sockaddr *address, socklen_t len)
{
	RETURN_OF(GW_SYS_BIND, int, bind(fd, address, len));
}

int gw_sys_listen(int fd, int backlog)
{
	RETURN_OF(GW_SYS_LISTEN, int, listen(fd, backlog));
}

int gw_sys_shutdown(int fd, int how)
{
	RETURN_OF(GW_SYS_SHUTDOWN, int, shutdown(fd, how));
}

int gw_sys_setsockopt(int fd, int level, int name, const void *value, socklen_t len)
{
	RETURN_OF(GW_SYS_SETSOCKOPT, int, setsockopt(fd, level, name, value, len));
}

int gw_sys_getsockopt(int fd, int level, int name, void *ret_value, socklen_t *len)
{
	RETURN_OF(GW_SYS_GETSOCKOPT, int, getsockopt(fd, level, name, ret_value, len));
}

int gw_sys_getsockname(int fd, struct sockaddr *ret_address, socklen_t *len)
{
	RETURN_OF(GW_SYS_GETSOCKNAME, int, getsockname(fd, ret_address, len));
}

int gw_sys_open(const char *path, int flags, mode_t mode)
{
	RETURN_OF(GW_SYS_OPEN, int, open(path, flags, mode));
}

int gw_sys_openat(int dir_fd, const char *path, int flags, mode_t mode)
{
	RETURN_OF(GW_SYS_OPEN, int, openat(dir_fd, path, flags, mode));
}

int gw_sys_close(int fd)
{
	/* The fd is gone whatever close says: closing again could hit somebody else's. */
	const int result = close(fd) == 0 || errno == EINTR ? 0 : -errno;

	FAIL_IF_TOLD(GW_SYS_CLOSE);
	return result;
}

int gw_sys_dup(int fd)
{
	RETURN_OF(GW_SYS_DUP, int, fcntl(fd, F_DUPFD_CLOEXEC, 0));
}

int gw_sys_fcntl(int fd, int command, long argument)
{
	RETURN_OF(GW_SYS_FCNTL, int, fcntl(fd, command, argument));
}

int gw_sys_fstat(int fd, struct stat *ret_stat)
{
	RETURN_OF(GW_SYS_FSTAT, int, fstat(fd, ret_stat));
}

int gw_sys_fstatfs(int fd, struct statfs *ret_statfs)
{
	RETURN_OF(GW_SYS_FSTATFS, int, fstatfs(fd, ret_statfs));
}

int gw_sys_ftruncate(int fd, off_t len)
{
	RETURN_OF(GW_SYS_FTRUNCATE, int, ftruncate(fd, len));
}

int gw_sys_fallocate(int fd, int mode, off_t offset, off_t len)
{
	RETURN_OF(GW_SYS_FALLOCATE, int, fallocate(fd, mode, offset, len));
}

int gw_sys_fsync(int fd)
{
	RETURN_OF(GW_SYS_FSYNC, int, fsync(fd));
}

off_t gw_sys_lseek(int fd, off_t offset, int whence)
{
	RETURN_OF(GW_SYS_LSEEK, off_t, lseek(fd, offset, whence));
}

int gw_sys_rename(const char *from, const char *to)
{
	RETURN_OF(GW_SYS_RENAME, int, rename(from, to));
}

int gw_sys_unlink(const char *path)
{
	RETURN_OF(GW_SYS_UNLINK, int, unlink(path));
}

ssize_t gw_sys_readlink(const char *path, char *ret_target, size_t len)
{
	RETURN_OF(GW_SYS_READLINK, ssize_t, readlink(path, ret_target, len));
}

int gw_sys_memfd_create(const char *name, unsigned int flags)
{
	RETURN_OF(GW_SYS_MEMFD_CREATE, int, memfd_create(name, flags));
}

int gw_sys_mmap(void *hint, size_t len, int prot, int flags, int fd, off_t offset,
		void **ret_address)
{
	FAIL_IF_TOLD(GW_SYS_MMAP);
	void *const address = mmap(hint, len, prot, flags, fd, offset);

	if (address == MAP_FAILED)
		return -errno;
	*ret_address = address;
	return 0;
}

int gw_sys_munmap(void *address, size_t len)
{
	RETURN_OF(GW_SYS_MUNMAP, int, munmap(address, len));
}

int gw_sys_madvise(void *address, size_t len, int advice)
{
	RETURN_OF(GW_SYS_MADVISE, int, madvise(address, len, advice));
}

int gw_sys_mprotect(void *address, size_t len, int prot)
{
	RETURN_OF(GW_SYS_MPROTECT, int, mprotect(address, len, prot));
}

int gw_sys_futex_wait(const _Atomic uint32_t *word, uint32_t expected, uint64_t timeout_ns)
{
	const struct timespec timeout = {
		.tv_sec = (time_t)(timeout_ns / 1000000000U),
		.tv_nsec = (long)(timeout_ns % 1000000000U),
	};

	RETURN_OF(GW_SYS_FUTEX, int,
		  (int)syscall(SYS_futex, word, FUTEX_WAIT, expected,
			       timeout_ns > 0 ? &timeout : NULL, NULL, 0));
}

int gw_sys_futex_wake(const _Atomic uint32_t *word, int count_max)
{
	RETURN_OF(GW_SYS_FUTEX, int,
		  (int)syscall(SYS_futex, word, FUTEX_WAKE, count_max, NULL, NULL, 0));
}

int gw_sys_ioctl(int fd, unsigned long request, void *argument)
{
#ifdef GW_TEST_HOOKS
	int answer;

	FAIL_IF_TOLD(GW_SYS_IOCTL);
	if (gw_sys_ioctl_answered(fd, request, argument, &answer))
		return answer;
	const int result = ioctl(fd, request, argument);

	return result == -1 ? -errno : result;
#else
	RETURN_OF(GW_SYS_IOCTL, int, ioctl(fd, request, argument));
#endif
}

int gw_sys_userfaultfd(int flags)
{
	RETURN_OF(GW_SYS_USERFAULTFD, int, (int)syscall(SYS_userfaultfd, flags));
}

int gw_sys_pidfd_open(pid_t pid, unsigned int flags)
{
	RETURN_OF(GW_SYS_PIDFD_OPEN, int, (int)syscall(SYS_pidfd_open, pid, flags));
}

int gw_sys_pidfd_getfd(int pidfd, int target_fd, unsigned int flags)
{
	RETURN_OF(GW_SYS_PIDFD_GETFD, int, (int)syscall(SYS_pidfd_getfd, pidfd, target_fd, flags));
}

long gw_sys_ptrace(int request, pid_t pid, void *address, void *data)
{
	FAIL_IF_TOLD(GW_SYS_PTRACE);
	/* -1 can be a value for the PEEK requests, which nobody here uses. */
	const long result = ptrace((enum __ptrace_request)request, pid, address, data);

	return result == -1 ? -errno : result;
}

pid_t gw_sys_waitpid(pid_t pid, int *ret_status, int options)
{
	RETURN_OF(GW_SYS_WAITPID, pid_t, waitpid(pid, ret_status, options));
}

ssize_t gw_sys_process_vm_readv(pid_t pid, const struct iovec *local, const struct iovec *remote)
{
	RETURN_OF(GW_SYS_PROCESS_VM_READV, ssize_t, process_vm_readv(pid, local, 1, remote, 1, 0));
}

ssize_t gw_sys_process_vm_writev(pid_t pid, const struct iovec *local, const struct iovec *remote)
{
	RETURN_OF(GW_SYS_PROCESS_VM_WRITEV, ssize_t,
		  process_vm_writev(pid, local, 1, remote, 1, 0));
}

int gw_sys_prctl(int option, unsigned long argument)
{
	RETURN_OF(GW_SYS_PRCTL, int, prctl(option, argument, 0UL, 0UL, 0UL));
}

int gw_sys_seccomp(unsigned int operation, unsigned int flags, void *argument)
{
	RETURN_OF(GW_SYS_SECCOMP, int, (int)syscall(SYS_seccomp, operation, flags, argument));
}

uint64_t gw_sys_now_ns(void)
{
	struct timespec now = {0};

	/* Fails only for a clock that does not exist. */
	(void)clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000U + (uint64_t)now.tv_nsec;
}

uint64_t gw_sys_wall_s(void)
{
	struct timespec now = {0};

	(void)clock_gettime(CLOCK_REALTIME, &now);
	return now.tv_sec > 0 ? (uint64_t)now.tv_sec : 0;
}
