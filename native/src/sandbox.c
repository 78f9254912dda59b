/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sandbox.c - system call filters. The lists are in sandbox_list.h.
 *
 * Threads, Errors, Ownership, Units, Source: see sandbox.h. The program: Documentation/userspace-api/
 * seccomp_filter.rst; bpf(4) of BSD for the opcodes.
 *
 * The kernel works out once which calls are let through whatever their arguments are, and asks the program for
 * the others only (5.11 on): the page path pays for ioctl alone, which is therefore looked at first.
 */
#include <godwit/sandbox.h>

#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/sched.h>
#include <linux/seccomp.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <godwit/sys.h>

#include "sandbox_list.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define SANITIZED 1
#endif
#endif
#ifndef SANITIZED
#define SANITIZED 0
#endif

#if defined(__x86_64__)
#define NATIVE_ARCH AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define NATIVE_ARCH AUDIT_ARCH_AARCH64
#else
#define NATIVE_ARCH 0
#endif

#define INSTRUCTION_COUNT_MAX 512
#define COUNT_OF(array)	      (sizeof(array) / sizeof((array)[0]))

/* Requests of userfaultfd begin with it: linux/userfaultfd.h. */
#define UFFDIO_TYPE 0xAAU

struct program {
	struct sock_filter code[INSTRUCTION_COUNT_MAX];
	unsigned short len;
	bool overflow;
	uint32_t refusing; /* the flag of the answer that is not "yes": an errno, or the log */
};

static void emit(struct program *program, uint16_t code, uint8_t jump_true, uint8_t jump_false,
		 uint32_t value)
{
	if (program->len == INSTRUCTION_COUNT_MAX) {
		program->overflow = true;
		return;
	}
	program->code[program->len++] =
		(struct sock_filter){.code = code, .jt = jump_true, .jf = jump_false, .k = value};
}

static void load(struct program *program, size_t offset)
{
	emit(program, BPF_LD | BPF_W | BPF_ABS, 0, 0, (uint32_t)offset);
}

/* The low half: no argument that is looked at is wider. Little endian, as both architectures are. */
static void load_argument(struct program *program, unsigned int number)
{
	load(program, offsetof(struct seccomp_data, args) + number * sizeof(uint64_t));
}

static void answer(struct program *program, uint32_t value)
{
	emit(program, BPF_RET | BPF_K, 0, 0, value);
}

static void allow(struct program *program)
{
	answer(program, SECCOMP_RET_ALLOW);
}

static void refuse(struct program *program, unsigned int error)
{
	answer(program,
	       program->refusing == SECCOMP_RET_LOG ? SECCOMP_RET_LOG : SECCOMP_RET_ERRNO | error);
}

/* The accumulator equals `value`: the next instruction; else the one after it. */
static void if_equal(struct program *program, uint32_t value)
{
	emit(program, BPF_JMP | BPF_JEQ | BPF_K, 0, 1, value);
}

static void allow_each(struct program *program, const unsigned int *calls, size_t count)
{
	for (size_t i = 0; i < count; i++) {
		if_equal(program, calls[i]);
		allow(program);
	}
}

static void refuse_each(struct program *program, const unsigned int *calls, size_t count)
{
	for (size_t i = 0; i < count; i++) {
		if_equal(program, calls[i]);
		refuse(program, EPERM);
	}
}

/* A call whose argument decides. Between begin and end come checks; what they let pass is refused. */
static unsigned short begin_call(struct program *program, uint32_t call, unsigned int argument)
{
	const unsigned short at = program->len;

	emit(program, BPF_JMP | BPF_JEQ | BPF_K, 0, 0, call);
	load_argument(program, argument);
	return at;
}

static void end_call(struct program *program, unsigned short at, unsigned int error)
{
	refuse(program, error);
	if (!program->overflow)
		program->code[at].jf = (uint8_t)(program->len - at - 1);
}

static void allow_values(struct program *program, uint32_t call, unsigned int argument,
			 const uint32_t *values, size_t count, unsigned int error)
{
	const unsigned short at = begin_call(program, call, argument);

	for (size_t i = 0; i < count; i++) {
		if_equal(program, values[i]);
		allow(program);
	}
	end_call(program, at, error);
}

/* Of all bits in `mask`, exactly those in `value` are set. */
static void allow_masked(struct program *program, uint32_t call, unsigned int argument,
			 uint32_t mask, uint32_t value, unsigned int error)
{
	const unsigned short at = begin_call(program, call, argument);

	emit(program, BPF_ALU | BPF_AND | BPF_K, 0, 0, mask);
	if_equal(program, value);
	allow(program);
	end_call(program, at, error);
}

static void only_this_architecture(struct program *program)
{
	load(program, offsetof(struct seccomp_data, arch));
	emit(program, BPF_JMP | BPF_JEQ | BPF_K, 1, 0, NATIVE_ARCH);
	refuse(program, ENOSYS);
	load(program, offsetof(struct seccomp_data, nr));
#ifdef __x86_64__
	/* x32: the same table by another door. */
	emit(program, BPF_JMP | BPF_JGE | BPF_K, 0, 1, 0x40000000U);
	refuse(program, ENOSYS);
#endif
}

static void common_calls(struct program *program)
{
	static const uint32_t families[] = {AF_INET, AF_INET6, AF_UNIX};
	static const uint32_t names[] = {PR_SET_NAME, PR_GET_NAME};
	const uint32_t self = (uint32_t)getpid();

	allow_each(program, allowed_everywhere, COUNT_OF(allowed_everywhere));
	allow_values(program, SYS_socket, 0, families, COUNT_OF(families), EAFNOSUPPORT);
	allow_values(program, SYS_prctl, 0, names, COUNT_OF(names), EINVAL);
	/* abort() and pthread_kill(), no other process. */
	allow_values(program, SYS_tgkill, 0, &self, 1, EPERM);
}

static void page_thread(struct program *program)
{
	allow_masked(program, SYS_ioctl, 1, 0xFF00U, UFFDIO_TYPE << 8, EPERM);
	allow_each(program, allowed_page_thread, COUNT_OF(allowed_page_thread));
	common_calls(program);
}

static void page_server(struct program *program)
{
	static const uint32_t requests[] = {TCGETS,  TIOCGWINSZ, FIONREAD,
					    FIONBIO, FIOCLEX,	 FIONCLEX};
	static const uint32_t no_limit[] = {0};

	allow_values(program, SYS_ioctl, 1, requests, COUNT_OF(requests), ENOTTY);
	common_calls(program);
	allow_each(program, allowed_page_server, COUNT_OF(allowed_page_server));
	/* A thread, not a process. clone3 keeps its flags where no filter can look: it is ENOSYS. */
	allow_masked(program, SYS_clone, 0, CLONE_THREAD, CLONE_THREAD, EPERM);
	/* Limits can be asked for, not set. */
	allow_values(program, SYS_prlimit64, 2, no_limit, COUNT_OF(no_limit), EPERM);
}

int gw_sandbox_enter(uint32_t kind, uint32_t mode)
{
	struct program program = {.refusing = mode == GW_SANDBOX_LOG ? SECCOMP_RET_LOG
								     : SECCOMP_RET_ERRNO};
	unsigned int flags = SECCOMP_FILTER_FLAG_LOG;

	if (mode == GW_SANDBOX_OFF)
		return 0;
	if (mode > GW_SANDBOX_ENFORCE ||
	    (kind != GW_SANDBOX_PAGE_SERVER && kind != GW_SANDBOX_PAGE_THREAD))
		return -EINVAL;
	if (SANITIZED || NATIVE_ARCH == 0)
		return -ENOSYS;
	only_this_architecture(&program);
	if (kind == GW_SANDBOX_PAGE_SERVER) {
		page_server(&program);
		flags |= SECCOMP_FILTER_FLAG_TSYNC;
	} else {
		page_thread(&program);
	}
	refuse_each(&program, refused, COUNT_OF(refused));
	refuse(&program, ENOSYS);
	if (program.overflow)
		return -E2BIG;
	int err = gw_sys_prctl(PR_SET_NO_NEW_PRIVS, 1);

	if (err < 0)
		return err;
	struct sock_fprog wanted = {.len = program.len, .filter = program.code};

	/*
	 * SPEC_ALLOW: without it kernels before 5.16 switch a speculation off for the thread, which costs
	 * more than the filter. What is filtered here is our own code, not a guest's.
	 */
	err = gw_sys_seccomp(SECCOMP_SET_MODE_FILTER, flags | SECCOMP_FILTER_FLAG_SPEC_ALLOW,
			     &wanted);
	/* TSYNC says with a thread's number that it has a filter that this one would not follow. */
	return err > 0 ? -EBUSY : err;
}
