/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sys.h - every system call of the C core, and the points at which a test can
 * fail one or park a thread.
 *
 * Threads    All of it may be called from any thread.
 * Errors     What the call returns, or -errno; errno itself is never looked at by
 *            callers. EINTR is passed on: only the caller knows what it waits for.
 *            gw_sys_close alone reports success on EINTR, as the fd is gone.
 * Ownership  Fds are created O_CLOEXEC by the caller's flags; nothing is kept.
 * Units      Nanoseconds of CLOCK_MONOTONIC.
 * Source     The man pages, section 2.
 *
 * Without GW_TEST_HOOKS each wrapper is the call and a sign, and GW_HOOK is
 * nothing. Rejected: LD_PRELOAD, which cannot see static calls inside libraries
 * apart from ours, and cannot count ours alone.
 */
#ifndef GW_SYS_H
#define GW_SYS_H

#include <fcntl.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>

/* One name a call; a test says which it fails. REMOTE is a call injected into another process. */
#define GW_SYS_CALLS(X)      \
	X(READ)              \
	X(WRITE)             \
	X(READV)             \
	X(WRITEV)            \
	X(PREAD)             \
	X(PWRITE)            \
	X(RECV)              \
	X(SEND)              \
	X(RECVMSG)           \
	X(SENDMSG)           \
	X(EPOLL_CREATE)      \
	X(EPOLL_CTL)         \
	X(EPOLL_WAIT)        \
	X(POLL)              \
	X(EVENTFD)           \
	X(SOCKET)            \
	X(SOCKETPAIR)        \
	X(CONNECT)           \
	X(ACCEPT)            \
	X(BIND)              \
	X(LISTEN)            \
	X(SHUTDOWN)          \
	X(SETSOCKOPT)        \
	X(GETSOCKOPT)        \
	X(GETSOCKNAME)       \
	X(OPEN)              \
	X(CLOSE)             \
	X(DUP)               \
	X(FCNTL)             \
	X(FSTAT)             \
	X(FSTATFS)           \
	X(FTRUNCATE)         \
	X(FALLOCATE)         \
	X(FSYNC)             \
	X(LSEEK)             \
	X(RENAME)            \
	X(UNLINK)            \
	X(READLINK)          \
	X(MEMFD_CREATE)      \
	X(MMAP)              \
	X(MUNMAP)            \
	X(MADVISE)           \
	X(MPROTECT)          \
	X(FUTEX)             \
	X(IOCTL)             \
	X(USERFAULTFD)       \
	X(PIDFD_OPEN)        \
	X(PIDFD_GETFD)       \
	X(PTRACE)            \
	X(WAITPID)           \
	X(PROCESS_VM_READV)  \
	X(PROCESS_VM_WRITEV) \
	X(PRCTL)             \
	X(SECCOMP)           \
	X(REMOTE)

enum gw_sys_call {
	GW_SYS_ANY = 0,
#define GW_SYS_ENUM(name) GW_SYS_##name,
	GW_SYS_CALLS(GW_SYS_ENUM)
#undef GW_SYS_ENUM
		GW_SYS_CALL_COUNT,
};

struct statfs;

/* Transfer. */
ssize_t gw_sys_read(int fd, void *ret_buffer, size_t len);
ssize_t gw_sys_write(int fd, const void *buffer, size_t len);
ssize_t gw_sys_readv(int fd, const struct iovec *iov, int iov_count);
ssize_t gw_sys_writev(int fd, const struct iovec *iov, int iov_count);
ssize_t gw_sys_pread(int fd, void *ret_buffer, size_t len, off_t offset);
ssize_t gw_sys_pwrite(int fd, const void *buffer, size_t len, off_t offset);

/* Sockets and waiting. */
ssize_t gw_sys_recv(int fd, void *ret_buffer, size_t len, int flags);
ssize_t gw_sys_send(int fd, const void *buffer, size_t len, int flags);
ssize_t gw_sys_recvmsg(int fd, struct msghdr *message, int flags);
ssize_t gw_sys_sendmsg(int fd, const struct msghdr *message, int flags);
int gw_sys_epoll_create(void); /* EPOLL_CLOEXEC */
int gw_sys_epoll_ctl(int epoll_fd, int op, int fd, struct epoll_event *event);
int gw_sys_epoll_wait(int epoll_fd, struct epoll_event *ret_events, int count_max, int timeout_ms);
int gw_sys_poll(struct pollfd *fds, nfds_t fd_count, int timeout_ms);
int gw_sys_eventfd(unsigned int initial, int flags);
int gw_sys_socket(int domain, int type, int protocol);
int gw_sys_socketpair(int domain, int type, int protocol, int ret_fds[2]);
int gw_sys_connect(int fd, const struct sockaddr *address, socklen_t len);
int gw_sys_accept4(int fd, struct sockaddr *ret_address, socklen_t *len, int flags);
int gw_sys_bind(int fd, const struct sockaddr *address, socklen_t len);
int gw_sys_listen(int fd, int backlog);
int gw_sys_shutdown(int fd, int how);
int gw_sys_setsockopt(int fd, int level, int name, const void *value, socklen_t len);
int gw_sys_getsockopt(int fd, int level, int name, void *ret_value, socklen_t *len);
int gw_sys_getsockname(int fd, struct sockaddr *ret_address, socklen_t *len);

/* Files. */
int gw_sys_open(const char *path, int flags, mode_t mode);
int gw_sys_openat(int dir_fd, const char *path, int flags, mode_t mode);
int gw_sys_close(int fd);
int gw_sys_dup(int fd); /* F_DUPFD_CLOEXEC */
int gw_sys_fcntl(int fd, int command, long argument);
int gw_sys_fstat(int fd, struct stat *ret_stat);
int gw_sys_fstatfs(int fd, struct statfs *ret_statfs);
int gw_sys_ftruncate(int fd, off_t len);
int gw_sys_fallocate(int fd, int mode, off_t offset, off_t len);
int gw_sys_fsync(int fd);
off_t gw_sys_lseek(int fd, off_t offset, int whence);
int gw_sys_rename(const char *from, const char *to);
int gw_sys_unlink(const char *path);
ssize_t gw_sys_readlink(const char *path, char *ret_target, size_t len);
int gw_sys_memfd_create(const char *name, unsigned int flags);

/* Memory. mmap gives the address through ret_address, so that it can return -errno. */
int gw_sys_mmap(void *hint, size_t len, int prot, int flags, int fd, off_t offset,
		void **ret_address);
int gw_sys_munmap(void *address, size_t len);
int gw_sys_madvise(void *address, size_t len, int advice);
int gw_sys_mprotect(void *address, size_t len, int prot);

/*
 * Sleep while *word is `expected`, on memory that processes share; timeout_ns = 0: without end. 0;
 * -EAGAIN it is not `expected`; -EINTR; -ETIMEDOUT. wake: how many were woken.
 */
int gw_sys_futex_wait(const _Atomic uint32_t *word, uint32_t expected, uint64_t timeout_ns);
int gw_sys_futex_wake(const _Atomic uint32_t *word, int count_max);

/* The kernel's special fds, and other processes. */
int gw_sys_ioctl(int fd, unsigned long request, void *argument);
int gw_sys_userfaultfd(int flags);
int gw_sys_pidfd_open(pid_t pid, unsigned int flags);
int gw_sys_pidfd_getfd(int pidfd, int target_fd, unsigned int flags);
long gw_sys_ptrace(int request, pid_t pid, void *address, void *data);
pid_t gw_sys_waitpid(pid_t pid, int *ret_status, int options);
ssize_t gw_sys_process_vm_readv(pid_t pid, const struct iovec *local, const struct iovec *remote);
ssize_t gw_sys_process_vm_writev(pid_t pid, const struct iovec *local, const struct iovec *remote);

/* The calling thread's own. */
int gw_sys_prctl(int option, unsigned long argument);
int gw_sys_seccomp(unsigned int operation, unsigned int flags, void *argument);

/* CLOCK_MONOTONIC in ns. Cannot fail, and is not failed by tests. */
uint64_t gw_sys_now_ns(void);
/* What people call the time, seconds since 1970: it may be set, and jump. 0 if it is before. */
uint64_t gw_sys_wall_s(void);

/* --- for tests ------------------------------------------------------------------------------- */

#ifdef GW_TEST_HOOKS

/*
 * From now on the nth call (1 = the next) of `call`, or of any if GW_SYS_ANY,
 * does not reach the kernel and returns -err; one failure, then none until armed
 * again. A failed close closes all the same: Linux leaves no fd behind either.
 */
void gw_sys_fail_nth(enum gw_sys_call call, uint64_t nth, int err);
/* The same, and every later call of it too, until gw_sys_fail_none. */
void gw_sys_fail_from(enum gw_sys_call call, uint64_t nth, int err);
void gw_sys_fail_none(void);
/* The nth call of `call` (PREAD, PWRITE, RECV, RECVMSG, SENDMSG) transfers len_max bytes at most; it counts as failed. */
void gw_sys_short_nth(enum gw_sys_call call, uint64_t nth, size_t len_max);
/* What is armed and what is counted is one thing in this process and those it forks from now on. */
void gw_sys_share_with_children(void);
/* True once the armed failure has happened. */
bool gw_sys_failed(void);
/* Calls since the process started, and of all since then. */
uint64_t gw_sys_count(enum gw_sys_call call);
/* "READ", ... for messages. */
const char *gw_sys_name(enum gw_sys_call call);
/* For code that makes a call by other means: -errno to give instead, else 0. */
int gw_sys_injected(enum gw_sys_call call);
/* How long a transfer may be that gw_sys_injected let through, in this thread: `len`, or what is armed. */
size_t gw_sys_shortened(size_t len);

/*
 * A kernel that this machine has not: `answer` is asked at each ioctl that is not failed, in the thread
 * that makes it. True = *ret_result is what the call returns; false = it goes to the kernel. NULL
 * stops it; no other thread may be in an ioctl then.
 */
typedef bool (*gw_sys_ioctl_answer)(void *user, int fd, unsigned long request, void *argument,
				    int *ret_result);
void gw_sys_answer_ioctl(gw_sys_ioctl_answer answer, void *user);
/* What gw_sys_ioctl asks. */
bool gw_sys_ioctl_answered(int fd, unsigned long request, void *argument, int *ret_result);

#define GW_HOOK_POINT_COUNT_MAX 32
#define GW_HOOK_POINT_LEN_MAX	48

/* Park every thread that reaches `point`, from now on until gw_hook_release. */
void gw_hook_hold(const char *point);
/* Block until `count` threads are parked at `point`; false after timeout_ms. */
bool gw_hook_wait(const char *point, unsigned int count, int timeout_ms);
/* Let those parked go, and hold no more. */
void gw_hook_release(const char *point);
/* Call `act` in each thread that reaches `point`; NULL stops it. */
void gw_hook_call(const char *point, void (*act)(void *), void *argument);
/* How often `point` was reached since it was held or given a call. */
unsigned int gw_hook_reach_count(const char *point);
/* What GW_HOOK calls. */
void gw_hook_reach(const char *point);

/* A point names where a race is decided, as part.where: "install.claimed". */
#define GW_HOOK(point)	  gw_hook_reach(point)
#define GW_INJECTED(call) gw_sys_injected(call)

#else

#define GW_HOOK(point)	  ((void)0)
#define GW_INJECTED(call) 0

#endif

#endif /* GW_SYS_H */
