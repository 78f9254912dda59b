/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sweep.h - each system call of the C core, failed in turn with each errno that it can give.
 *
 * Threads    One; what is swept may have threads of its own.
 * Errors     As check.h. What is armed is said before it is judged: the last line printed failed.
 * Ownership  Nothing is kept.
 * Units      none.
 * Source     The ERRORS section of each call's man page, and what the kernel's own source adds.
 *
 * A scenario declares the calls that it makes. It is run once to count them; then each is failed as
 * its first, second, ... with each of its errnos. A call that is made and not declared, and one that is
 * declared and was never failed with each errno, fails the test: so the table that
 * test_sweep_table.c prints (docs/design/system-calls.md) is what was done.
 */
#ifndef GODWIT_TESTS_SWEEP_H
#define GODWIT_TESTS_SWEEP_H

#include "check.h"

#include <dirent.h>
#include <errno.h>
#include <stdint.h>

#include <godwit/sys.h>

/* Not an errno: the transfer is cut to a byte. */
#define SWEEP_SHORT 0x10000

#define SWEEP_ERROR_COUNT_MAX 12

/*
 * Left out: EBADF, EFAULT and the like, which only a bug of ours could bring; ENXIO of lseek and EFAULT of
 * UFFDIO_CONTINUE, which are their answers for "no data"; ESRCH of ptrace and ECHILD of
 * waitpid, after which nobody would repair a target that lives on.
 */
static const int sweep_errors[GW_SYS_CALL_COUNT][SWEEP_ERROR_COUNT_MAX] = {
	[GW_SYS_READ] = {EINTR, EAGAIN, EIO, ENOMEM},
	[GW_SYS_WRITE] = {EINTR, EAGAIN, EIO},
	[GW_SYS_PREAD] = {EINTR, EIO, ENOMEM, SWEEP_SHORT},
	[GW_SYS_PWRITE] = {EINTR, ENOSPC, ENOMEM, EIO, SWEEP_SHORT},
	[GW_SYS_RECV] = {EINTR, EAGAIN, ECONNRESET, ETIMEDOUT, ENOMEM, SWEEP_SHORT},
	[GW_SYS_SEND] = {EINTR, EPIPE, ENOMEM, ENOBUFS},
	[GW_SYS_RECVMSG] = {EINTR, EAGAIN, ECONNRESET, ETIMEDOUT, ENOMEM, SWEEP_SHORT},
	[GW_SYS_SENDMSG] = {EINTR, EAGAIN, EPIPE, ECONNRESET, ENOMEM, ENOBUFS, SWEEP_SHORT},
	[GW_SYS_EPOLL_CREATE] = {EMFILE, ENFILE, ENOMEM},
	[GW_SYS_EPOLL_CTL] = {ENOMEM, ENOSPC},
	[GW_SYS_EPOLL_WAIT] = {EINTR},
	[GW_SYS_POLL] = {EINTR, ENOMEM},
	[GW_SYS_EVENTFD] = {EMFILE, ENFILE, ENOMEM},
	[GW_SYS_SOCKET] = {EMFILE, ENFILE, ENOBUFS, ENOMEM},
	[GW_SYS_SOCKETPAIR] = {EMFILE, ENFILE, ENOMEM},
	[GW_SYS_CONNECT] = {EINTR, EAGAIN, ECONNREFUSED, ENETUNREACH, EHOSTUNREACH, ETIMEDOUT,
			    EADDRNOTAVAIL, EPERM},
	[GW_SYS_ACCEPT] = {EINTR, EAGAIN, ECONNABORTED, EMFILE, ENFILE, ENOBUFS, ENOMEM, EPERM,
			   EPROTO},
	[GW_SYS_BIND] = {EADDRINUSE, EADDRNOTAVAIL, EACCES, ENOMEM},
	[GW_SYS_LISTEN] = {EADDRINUSE},
	[GW_SYS_SETSOCKOPT] = {EINVAL, ENOPROTOOPT, ENOMEM},
	[GW_SYS_GETSOCKNAME] = {ENOBUFS},
	[GW_SYS_GETSOCKOPT] = {EINVAL, ENOMEM},
	[GW_SYS_OPEN] = {EMFILE, ENFILE, ENOMEM, EACCES, EINTR},
	[GW_SYS_CLOSE] = {EINTR, EIO},
	[GW_SYS_DUP] = {EMFILE},
	[GW_SYS_FCNTL] = {EINVAL, EPERM},
	[GW_SYS_FSTAT] = {ENOMEM, EOVERFLOW},
	[GW_SYS_FTRUNCATE] = {EINTR, EFBIG, EIO},
	[GW_SYS_FALLOCATE] = {ENOSPC, EINTR, EIO, EOPNOTSUPP},
	[GW_SYS_LSEEK] = {EIO, ENOMEM},
	[GW_SYS_RENAME] = {EACCES, EIO, ENOMEM, ENOSPC},
	[GW_SYS_UNLINK] = {EACCES, EIO, ENOMEM},
	[GW_SYS_READLINK] = {EACCES, EIO, ENOMEM},
	[GW_SYS_MEMFD_CREATE] = {EMFILE, ENFILE, ENOMEM},
	[GW_SYS_MMAP] = {ENOMEM, EAGAIN, ENFILE},
	[GW_SYS_MUNMAP] = {ENOMEM},
	[GW_SYS_MADVISE] = {ENOMEM, EAGAIN, EINVAL},
	[GW_SYS_MPROTECT] = {ENOMEM, EACCES},
	[GW_SYS_FUTEX] = {EINTR, EAGAIN},
	[GW_SYS_IOCTL] = {EAGAIN, EEXIST, EINVAL, ENOENT, ENOMEM, ENOSPC, ESRCH, EBUSY, EPERM},
	[GW_SYS_PRCTL] = {EINVAL},
	[GW_SYS_SECCOMP] = {EINVAL, ENOSYS, ENOMEM, EACCES},
	[GW_SYS_USERFAULTFD] = {EMFILE, ENFILE, ENOMEM, EPERM, ENOSYS},
	[GW_SYS_PIDFD_OPEN] = {EMFILE, ENFILE, ENOMEM, ESRCH},
	[GW_SYS_PIDFD_GETFD] = {EMFILE, EPERM, ESRCH},
	[GW_SYS_PTRACE] = {EPERM, EIO, EBUSY},
	[GW_SYS_WAITPID] = {EINTR},
	[GW_SYS_PROCESS_VM_READV] = {ENOMEM, EPERM, ESRCH},
	[GW_SYS_PROCESS_VM_WRITEV] = {ENOMEM, EPERM, ESRCH},
	[GW_SYS_REMOTE] = {ENOMEM, EMFILE, EPERM},
};

/* Who sweeps what. `calls` ends with GW_SYS_ANY. */
struct sweep_scenario {
	const char *name;
	const char *test;    /* native/tests/...: function */
	bool messages_whole; /* SOCK_SEQPACKET, which cuts nothing: no SWEEP_SHORT */
	enum gw_sys_call calls[32];
};

enum sweep_id {
	SWEEP_PAGE_MAP,
	SWEEP_UFFD,
	SWEEP_PROBE,
	SWEEP_ARRIVAL_CREATE,
	SWEEP_ARRIVAL_ADOPT,
	SWEEP_SERVE_CREATE,
	SWEEP_INJECT,
	SWEEP_TAKE,
	SWEEP_EXITS,
	SWEEP_ARRIVAL_COPY,
	SWEEP_ARRIVAL_CONTINUE,
	SWEEP_SCENARIO_COUNT,
};

#define SWEEP_ARRIVAL_CALLS                                                                       \
	GW_SYS_READ, GW_SYS_WRITE, GW_SYS_PREAD, GW_SYS_RECV, GW_SYS_SENDMSG, GW_SYS_EPOLL_CTL,   \
		GW_SYS_EPOLL_WAIT, GW_SYS_POLL, GW_SYS_EVENTFD, GW_SYS_SOCKET, GW_SYS_CONNECT,    \
		GW_SYS_ACCEPT, GW_SYS_SETSOCKOPT, GW_SYS_GETSOCKOPT, GW_SYS_RECVMSG, GW_SYS_MMAP, \
		GW_SYS_MADVISE, GW_SYS_IOCTL

static const struct sweep_scenario sweep_scenarios[SWEEP_SCENARIO_COUNT] = {
	[SWEEP_PAGE_MAP] = {"page map: make, adopt, remove",
			    "test_sweep_calls.c: page_map",
			    false,
			    {GW_SYS_OPEN, GW_SYS_FALLOCATE, GW_SYS_FSTAT, GW_SYS_MMAP,
			     GW_SYS_MUNMAP, GW_SYS_CLOSE, GW_SYS_RENAME, GW_SYS_UNLINK}},
	[SWEEP_UFFD] = {"userfaultfd: make, register, take off",
			"test_sweep_calls.c: userfaultfd",
			false,
			{GW_SYS_OPEN, GW_SYS_IOCTL, GW_SYS_CLOSE, GW_SYS_READLINK}},
	[SWEEP_PROBE] = {"userfaultfd: what can be used",
			 "test_sweep_calls.c: probe",
			 false,
			 {GW_SYS_OPEN, GW_SYS_IOCTL, GW_SYS_CLOSE, GW_SYS_MEMFD_CREATE,
			  GW_SYS_FTRUNCATE, GW_SYS_MMAP, GW_SYS_MUNMAP}},
	[SWEEP_ARRIVAL_CREATE] = {"arrival: create, destroy",
				  "test_sweep_calls.c: arrival_create",
				  false,
				  {GW_SYS_READLINK, GW_SYS_DUP, GW_SYS_FCNTL, GW_SYS_EVENTFD,
				   GW_SYS_OPEN, GW_SYS_FALLOCATE, GW_SYS_FSTAT, GW_SYS_MMAP,
				   GW_SYS_MUNMAP, GW_SYS_CLOSE, GW_SYS_RENAME, GW_SYS_LSEEK,
				   GW_SYS_EPOLL_CREATE, GW_SYS_EPOLL_CTL}},
	[SWEEP_ARRIVAL_ADOPT] = {"arrival: adopt",
				 "test_sweep_calls.c: arrival_adopt",
				 false,
				 {GW_SYS_READLINK, GW_SYS_DUP, GW_SYS_FCNTL, GW_SYS_EVENTFD,
				  GW_SYS_OPEN, GW_SYS_FSTAT, GW_SYS_MMAP, GW_SYS_MUNMAP,
				  GW_SYS_CLOSE, GW_SYS_LSEEK, GW_SYS_FALLOCATE, GW_SYS_IOCTL,
				  GW_SYS_EPOLL_CREATE, GW_SYS_EPOLL_CTL}},
	[SWEEP_SERVE_CREATE] = {"page server: create, images in and out, start, destroy",
				"test_sweep_calls.c: page_server",
				false,
				{GW_SYS_SOCKET, GW_SYS_SETSOCKOPT, GW_SYS_BIND, GW_SYS_LISTEN,
				 GW_SYS_GETSOCKNAME, GW_SYS_EVENTFD, GW_SYS_EPOLL_CREATE,
				 GW_SYS_EPOLL_CTL, GW_SYS_OPEN, GW_SYS_FSTAT, GW_SYS_CLOSE}},
	[SWEEP_INJECT] = {"injection into a VMM",
			  "test_sweep_inject.c: injection",
			  true,
			  {GW_SYS_OPEN, GW_SYS_FSTAT, GW_SYS_READ, GW_SYS_CLOSE, GW_SYS_SOCKETPAIR,
			   GW_SYS_SEND, GW_SYS_RECV, GW_SYS_SENDMSG, GW_SYS_RECVMSG,
			   GW_SYS_PIDFD_OPEN, GW_SYS_PIDFD_GETFD, GW_SYS_PTRACE, GW_SYS_WAITPID,
			   GW_SYS_PROCESS_VM_READV, GW_SYS_PROCESS_VM_WRITEV, GW_SYS_REMOTE}},
	[SWEEP_TAKE] = {"a userfaultfd taken again",
			"test_sweep_inject.c: taking",
			false,
			{GW_SYS_OPEN, GW_SYS_FSTAT, GW_SYS_READ, GW_SYS_CLOSE, GW_SYS_READLINK,
			 GW_SYS_PIDFD_OPEN, GW_SYS_PIDFD_GETFD}},
	[SWEEP_EXITS] = {"exit channel: attach",
			 "test_sweep_calls.c: exits",
			 false,
			 {GW_SYS_FCNTL, GW_SYS_FSTAT, GW_SYS_MMAP, GW_SYS_MUNMAP, GW_SYS_FUTEX}},
	[SWEEP_ARRIVAL_COPY] = {"a guest arrives from a page server, by COPY",
				"test_sweep_arrival.c: by_copy",
				false,
				{SWEEP_ARRIVAL_CALLS}},
	[SWEEP_ARRIVAL_CONTINUE] = {"a guest arrives from a page server, by CONTINUE",
				    "test_sweep_arrival.c: by_continue",
				    false,
				    {GW_SYS_PWRITE, GW_SYS_LSEEK, GW_SYS_IOCTL}},
};

/* Calls that are failed elsewhere, by tests from before, or that the core does not make. */
struct sweep_elsewhere {
	enum gw_sys_call call;
	const char *why;
};

static const struct sweep_elsewhere sweep_elsewhere[] = {
	{GW_SYS_USERFAULTFD, "`test_vmm_create.c`: the substitute of /dev/userfaultfd"},
	{GW_SYS_MPROTECT, "`test_vmm_threads.c`, `test_vmm_create.c`, `test_vmm_handoff.c`"},
	{GW_SYS_PRCTL, "`test_sandbox.c`"},
	{GW_SYS_SECCOMP, "`test_sandbox.c`"},
	{GW_SYS_READV, "not called"},
	{GW_SYS_WRITEV, "not called"},
	{GW_SYS_SHUTDOWN, "not called"},
	{GW_SYS_FSTATFS, "not called"},
	{GW_SYS_FSYNC, "not called"},
};

static inline const char *sweep_error_name(int err)
{
	return err == SWEEP_SHORT ? "short" : strerrorname_np(err);
}

static inline void sweep_arm(enum gw_sys_call call, uint64_t nth, int err)
{
	if (err == SWEEP_SHORT)
		gw_sys_short_nth(call, nth, 1);
	else
		gw_sys_fail_nth(call, nth, err);
}

static inline int sweep_entry_count(const char *directory)
{
	DIR *const dir = opendir(directory);
	int count = 0;

	CHECK(dir);
	while (readdir(dir))
		count++;
	CHECK_EQ(closedir(dir), 0);
	return count;
}

static inline int sweep_fd_count(void)
{
	return sweep_entry_count("/proc/self/fd");
}

static inline int sweep_thread_count(void)
{
	return sweep_entry_count("/proc/self/task");
}

/* A thread that was joined is listed a moment longer. */
static inline void sweep_check_threads(int thread_count)
{
	const uint64_t deadline_ns = gw_sys_now_ns() + UINT64_C(60000000000);

	while (sweep_thread_count() != thread_count)
		CHECK(gw_sys_now_ns() < deadline_ns);
}

struct sweep {
	const struct sweep_scenario *scenario;
	uint64_t call_counts[GW_SYS_CALL_COUNT]; /* of a run in which nothing fails */
	uint32_t failed_counts[GW_SYS_CALL_COUNT][SWEEP_ERROR_COUNT_MAX];
	uint32_t failed_count;
};

static inline bool sweep_applies(const struct sweep_scenario *scenario, int err)
{
	return err != SWEEP_SHORT || !scenario->messages_whole;
}

static inline bool sweep_declares(const struct sweep *sweep, enum gw_sys_call call)
{
	for (const enum gw_sys_call *declared = sweep->scenario->calls; *declared; declared++)
		if (*declared == call)
			return true;
	return false;
}

/* Between the two, what is swept is run once with nothing armed. */
static inline void sweep_count_begin(struct sweep *sweep, enum sweep_id id)
{
	memset(sweep, 0, sizeof(*sweep));
	sweep->scenario = &sweep_scenarios[id];
	for (enum gw_sys_call call = 1; call < GW_SYS_CALL_COUNT; call++)
		sweep->call_counts[call] = gw_sys_count(call);
}

static inline void sweep_count_end(struct sweep *sweep)
{
	for (enum gw_sys_call call = 1; call < GW_SYS_CALL_COUNT; call++)
		sweep->call_counts[call] = gw_sys_count(call) - sweep->call_counts[call];
}

/* Every call made is declared; teardown aside, which `ignored` (ended by GW_SYS_ANY) may name. */
static inline void sweep_check_declared(const struct sweep *sweep, const enum gw_sys_call *ignored)
{
	for (enum gw_sys_call call = 1; call < GW_SYS_CALL_COUNT; call++) {
		bool known = sweep->call_counts[call] == 0 || sweep_declares(sweep, call);

		for (const enum gw_sys_call *other = ignored; other && *other; other++)
			known = known || *other == call;
		if (!known)
			fprintf(stderr, "%s calls %s and does not declare it\n",
				sweep->scenario->name, gw_sys_name(call));
		CHECK(known);
	}
}

static inline void sweep_say(enum gw_sys_call call, uint64_t nth, int err)
{
	if (getenv("SWEEP_VERBOSE"))
		fprintf(stderr, "    %s %lu %s\n", gw_sys_name(call), nth, sweep_error_name(err));
}

/* Each declared call was failed with each of its errnos. */
static inline void sweep_check_whole(const struct sweep *sweep)
{
	for (const enum gw_sys_call *call = sweep->scenario->calls; *call; call++) {
		for (size_t e = 0; sweep_errors[*call][e]; e++) {
			if (!sweep_applies(sweep->scenario, sweep_errors[*call][e]))
				continue;
			if (sweep->failed_counts[*call][e] == 0)
				fprintf(stderr, "%s: %s was never failed with %s\n",
					sweep->scenario->name, gw_sys_name(*call),
					sweep_error_name(sweep_errors[*call][e]));
			CHECK(sweep->failed_counts[*call][e] > 0);
		}
	}
	fprintf(stderr, "    %u failures\n", sweep->failed_count);
}

/*
 * A scenario that makes the same calls each time. `act` does it all and takes it away again; 0 or -errno,
 * -1000 if what it finds is wrong. `may_be` (or NULL) says which results an errno may bring besides
 * itself and 0.
 */
static inline void sweep_all(enum sweep_id id, int (*act)(void *user), void *user,
			     bool (*may_be)(enum gw_sys_call call, int err, int result))
{
	struct sweep sweep;

	CHECK_EQ(act(user), 0); /* what libraries make once is made */
	sweep_count_begin(&sweep, id);
	CHECK_EQ(act(user), 0);
	sweep_count_end(&sweep);
	sweep_check_declared(&sweep, NULL);
	const int fd_count = sweep_fd_count();
	const int thread_count = sweep_thread_count();

	for (enum gw_sys_call call = 1; call < GW_SYS_CALL_COUNT; call++) {
		for (size_t e = 0; sweep.call_counts[call] && sweep_errors[call][e]; e++) {
			const int err = sweep_errors[call][e];

			for (uint64_t nth = 1; nth <= sweep.call_counts[call]; nth++) {
				sweep_say(call, nth, err);
				sweep_arm(call, nth, err);
				const int result = act(user);
				const bool failed = gw_sys_failed();

				gw_sys_fail_none();
				if (result != 0 && result != -err &&
				    !(may_be && may_be(call, err, result))) {
					fprintf(stderr, "%s: %s %lu %s gives %d\n",
						sweep.scenario->name, gw_sys_name(call), nth,
						sweep_error_name(err), result);
					CHECK(!"a result that is not the call's");
				}
				/* An earlier failure may take a later call away. */
				sweep.failed_counts[call][e] += failed;
				sweep.failed_count += failed;
				CHECK_EQ(sweep_fd_count(), fd_count);
				sweep_check_threads(thread_count);
				/* What failed once leaves nothing in the way. */
				CHECK_EQ(act(user), 0);
			}
		}
	}
	sweep_check_whole(&sweep);
}

#endif
