/* SPDX-License-Identifier: Apache-2.0 */
/*
 * inject_remote.c - borrow the main thread of another process for a few system calls.
 *
 * Threads, Errors, Ownership, Units, Source: see inject_internal.h.
 *
 * The thread is stopped between two of its instructions or inside a call that it waits in. The
 * stop makes that call return early with an ERESTART code, which the kernel turns into a repetition on the
 * way back to user space. We come back another way, so we turn it ourselves, in the registers that
 * detach restores.
 */
#include "inject_internal.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>

/* After sys/ptrace.h, whose enum it would turn into numbers. */
#include <linux/ptrace.h>

#include <godwit/sys.h>

/* include/linux/errno.h: what the kernel keeps to itself. */
#define ERESTARTSYS	      512
#define ERESTARTNOINTR	      513
#define ERESTARTNOHAND	      514
#define ERESTART_RESTARTBLOCK 516

#define SYSCALL_INSTRUCTION_LEN 2
#define VDSO_LEN_MAX		65536
#define CODE_SEGMENT_64		0x33U
#define STOP_COUNT_MAX		64 /* stops that are not ours, before we give up */
#define STOP_NS_MAX		UINT64_C(5000000000)
#define POLL_NS			50000L
#define SYSCALL_STOP_SIGNAL	(SIGTRAP | 0x80)

#ifdef __x86_64__

/* Until `deadline_ns`, 0 = as long as it takes: then it is in a call of ours, and comes back. */
static int wait_stopped(pid_t pid, uint64_t deadline_ns, int *ret_status)
{
	for (;;) {
		const pid_t got =
			gw_sys_waitpid(pid, ret_status, __WALL | (deadline_ns ? WNOHANG : 0));

		if (got == -ECHILD || got == -ESRCH)
			return -ESRCH;
		/* EINTR; nothing else is possible, and a stop not waited for is a target left behind. */
		if (got < 0)
			continue;
		if (got == pid)
			return WIFSTOPPED(*ret_status) ? 0 : -ESRCH;
		if (gw_sys_now_ns() > deadline_ns)
			return -ETIMEDOUT;
		(void)nanosleep(&(struct timespec){.tv_nsec = POLL_NS}, NULL);
	}
}

/* Seize and interrupt; a signal that was on its way is delivered first. */
static int stop_thread(pid_t pid)
{
	/* A thread that waits for a page of another userfaultfd, say, cannot be stopped. */
	const uint64_t deadline_ns = gw_sys_now_ns() + STOP_NS_MAX;
	long err = gw_sys_ptrace(PTRACE_SEIZE, pid, NULL, (void *)PTRACE_O_TRACESYSGOOD);
	int status = 0;

	if (err < 0)
		return (int)err;
	err = gw_sys_ptrace(PTRACE_INTERRUPT, pid, NULL, NULL);
	for (int i = 0; err == 0 && i < STOP_COUNT_MAX; i++) {
		err = wait_stopped(pid, deadline_ns, &status);
		if (err < 0)
			break;
		if (status >> 16 == PTRACE_EVENT_STOP)
			return 0;
		err = gw_sys_ptrace(PTRACE_CONT, pid, NULL, (void *)(long)WSTOPSIG(status));
	}
	/* A thread that runs cannot be detached; our exit lets it go. */
	return err < 0 ? (int)err : -EBUSY;
}

/* What the kernel would have done to an interrupted call. */
static void owe_restart(struct user_regs_struct *regs)
{
	if ((long)regs->orig_rax < 0)
		return;
	switch (-(long)regs->rax) {
	case ERESTARTSYS:
	case ERESTARTNOINTR:
	case ERESTARTNOHAND:
		regs->rax = regs->orig_rax;
		regs->rip -= SYSCALL_INSTRUCTION_LEN;
		break;
	case ERESTART_RESTARTBLOCK:
		regs->rax = SYS_restart_syscall;
		regs->rip -= SYSCALL_INSTRUCTION_LEN;
		break;
	default:
		break;
	}
	regs->orig_rax = (unsigned long)-1;
}

static int find_syscall(struct gw_remote *remote)
{
	static const unsigned char instruction[SYSCALL_INSTRUCTION_LEN] = {0x0f, 0x05};
	unsigned char code[VDSO_LEN_MAX];
	uint64_t start = 0;
	uint64_t end = 0;
	const int err = gw_inject_find_vdso(remote->pid, &start, &end);

	if (err < 0)
		return err;
	const size_t len = end - start < sizeof(code) ? (size_t)(end - start) : sizeof(code);
	const struct iovec local = {.iov_base = code, .iov_len = len};
	const struct iovec there = {.iov_base = (void *)(uintptr_t)start, .iov_len = len};
	const ssize_t got = gw_sys_process_vm_readv(remote->pid, &local, &there);

	if (got < 0)
		return (int)got;
	const unsigned char *const found =
		memmem(code, (size_t)got, instruction, sizeof(instruction));

	if (!found)
		return -ENOSYS;
	remote->syscall_address = start + (uint64_t)(found - code);
	return 0;
}

/* Run to the next entry into, or exit from, a system call: the two alternate. */
static long run_to_edge(struct gw_remote *remote)
{
	int status = 0;

	for (int stops_left = STOP_COUNT_MAX; stops_left > 0; stops_left--) {
		long err = gw_sys_ptrace(PTRACE_SYSCALL, remote->pid, NULL, NULL);

		if (err == 0)
			err = wait_stopped(remote->pid, 0, &status);
		if (err < 0)
			return err;
		if (WSTOPSIG(status) == SYSCALL_STOP_SIGNAL) {
			remote->in_call = !remote->in_call;
			return 0;
		}
	}
	return -EBUSY;
}

/* Into a call with these registers, and out of it again. */
static long run_call(struct gw_remote *remote, struct user_regs_struct *regs)
{
	long err = gw_sys_ptrace(PTRACE_SETREGS, remote->pid, NULL, regs);

	/* One that got stuck at its entry: with no number in orig_rax it is skipped. */
	if (err == 0 && remote->in_call)
		err = run_to_edge(remote);
	for (int edge = 0; err == 0 && edge < 2; edge++)
		err = run_to_edge(remote);
	if (err < 0)
		return err;
	/* Twice: the call was made, and what it gave must not be lost. */
	err = gw_sys_ptrace(PTRACE_GETREGS, remote->pid, NULL, regs);
	return err < 0 ? gw_sys_ptrace(PTRACE_GETREGS, remote->pid, NULL, regs) : err;
}

long gw_remote_call(struct gw_remote *remote, long number, const uint64_t arguments[6])
{
	struct user_regs_struct regs = remote->saved;
	const int injected = GW_INJECTED(GW_SYS_REMOTE);

	if (injected < 0)
		return injected;
	regs.rip = remote->syscall_address;
	regs.rax = (unsigned long)number;
	regs.orig_rax = (unsigned long)-1;
	regs.rdi = arguments[0];
	regs.rsi = arguments[1];
	regs.rdx = arguments[2];
	regs.r10 = arguments[3];
	regs.r8 = arguments[4];
	regs.r9 = arguments[5];
	const long err = run_call(remote, &regs);

	return err < 0 ? err : (long)regs.rax;
}

static int make_scratch(struct gw_remote *remote)
{
	const long address =
		gw_remote_call(remote, SYS_mmap,
			       (const uint64_t[6]){0, GW_REMOTE_SCRATCH_LEN, PROT_READ | PROT_WRITE,
						   MAP_PRIVATE | MAP_ANONYMOUS, (uint64_t)-1, 0});

	if (address < 0 && address > -4096)
		return (int)address;
	remote->scratch = (uint64_t)address;
	return 0;
}

/* Tried again once: a call that a test has failed must not leave the thread with our registers. */
static void insist(int request, pid_t pid, void *address, void *data)
{
	if (gw_sys_ptrace(request, pid, address, data) < 0)
		(void)gw_sys_ptrace(request, pid, address, data);
}

int gw_remote_attach(pid_t pid, struct gw_remote *ret_remote)
{
	struct gw_remote remote = {.pid = pid};
	const uint64_t all = ~UINT64_C(0);
	long err = stop_thread(pid);

	if (err < 0)
		return (int)err;
	err = gw_sys_ptrace(PTRACE_GETREGS, pid, NULL, &remote.saved);
	if (err == 0)
		err = gw_sys_ptrace(PTRACE_GETSIGMASK, pid, (void *)sizeof(all),
				    &remote.saved_mask);
	if (err == 0 && remote.saved.cs != CODE_SEGMENT_64)
		err = -ENOSYS;
	if (err < 0) {
		insist(PTRACE_DETACH, pid, NULL, NULL);
		return (int)err;
	}
	owe_restart(&remote.saved);
	/* A handler that ran now would run on registers of ours. */
	err = gw_sys_ptrace(PTRACE_SETSIGMASK, pid, (void *)sizeof(all), (void *)&all);
	if (err == 0)
		err = find_syscall(&remote);
	if (err == 0)
		err = make_scratch(&remote);
	if (err < 0) {
		gw_remote_detach(&remote);
		return (int)err;
	}
	*ret_remote = remote;
	return 0;
}

void gw_remote_detach(struct gw_remote *remote)
{
	const uint64_t scratch[6] = {remote->scratch, GW_REMOTE_SCRATCH_LEN};

	if (remote->scratch && gw_remote_call(remote, SYS_munmap, scratch) < 0)
		(void)gw_remote_call(remote, SYS_munmap, scratch);
	insist(PTRACE_SETREGS, remote->pid, NULL, &remote->saved);
	insist(PTRACE_SETSIGMASK, remote->pid, (void *)sizeof(remote->saved_mask),
	       &remote->saved_mask);
	insist(PTRACE_DETACH, remote->pid, NULL, NULL);
}

#else /* another machine: nothing can be injected */

int gw_remote_attach(pid_t pid, struct gw_remote *ret_remote)
{
	(void)pid;
	(void)ret_remote;
	return -ENOSYS;
}

void gw_remote_detach(struct gw_remote *remote)
{
	(void)remote;
}

long gw_remote_call(struct gw_remote *remote, long number, const uint64_t arguments[6])
{
	(void)remote;
	(void)number;
	(void)arguments;
	return -ENOSYS;
}

#endif

int gw_remote_put(struct gw_remote *remote, const void *bytes, size_t len)
{
	const struct iovec local = {.iov_base = (void *)(uintptr_t)bytes, .iov_len = len};
	const struct iovec there = {.iov_base = (void *)(uintptr_t)remote->scratch, .iov_len = len};
	const ssize_t put = gw_sys_process_vm_writev(remote->pid, &local, &there);

	if (put < 0)
		return (int)put;
	return (size_t)put == len ? 0 : -EFAULT;
}

long gw_remote_ioctl(struct gw_remote *remote, int fd, unsigned long request, void *argument,
		     size_t len)
{
	const struct iovec local = {.iov_base = argument, .iov_len = len};
	const struct iovec there = {.iov_base = (void *)(uintptr_t)remote->scratch, .iov_len = len};
	long err = gw_remote_put(remote, argument, len);

	if (err == 0)
		err = gw_remote_call(remote, SYS_ioctl,
				     (const uint64_t[6]){(uint64_t)fd, request, remote->scratch});
	if (err < 0)
		return err;
	const ssize_t got = gw_sys_process_vm_readv(remote->pid, &local, &there);

	if (got < 0)
		return got;
	return (size_t)got == len ? err : -EFAULT;
}
