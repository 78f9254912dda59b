/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_inject.c - a stand-in for a VMM is made to create a userfaultfd, goes on with what its
 * threads were doing, and is as it was where a step fails.
 *
 * Threads: the target is a process with two threads, the main one inside a system call.
 * Errors: a failed check ends the process.
 * Ownership: each target is killed by the test that started it.
 * Units: pages.
 * Source: inject.h.
 */
#include "target.h"

#include <fcntl.h>

#include <godwit/inject.h>

#define FEATURES   (GW_UFFD_FEATURE_MISSING_SHMEM | GW_UFFD_FEATURE_EVENT_REMOVE)
#define CALL_COUNT 7 /* that an injection makes in the target: mmap ... munmap */

/* The other thread touches page 3; its fault is answered through `uffd`. */
static void check_served(const struct target *target, int uffd, uint64_t host_addr)
{
	struct guest guest = {.uffd = uffd};
	uint8_t content[PAGE];
	uint64_t value = 0;
	uint64_t done = 0;

	CHECK_EQ(write(target->touch_fd, "t", 1), 1);
	const struct uffd_msg event = guest_next_event(&guest);

	CHECK_EQ(event.event, UFFD_EVENT_PAGEFAULT);
	CHECK_EQ(event.arg.pagefault.address & ~(PAGE - 1), host_addr + 3 * PAGE);
	guest_pattern(3, content);
	CHECK_EQ(gw_uffd_copy(uffd, host_addr + 3 * PAGE, content, PAGE, &done), GW_UFFD_DONE);
	CHECK_EQ(gw_uffd_wake(uffd, host_addr + 3 * PAGE, PAGE), 0);
	CHECK_EQ(read(target->value_fd, &value, sizeof(value)), sizeof(value));
	CHECK(value == first_word(3));
}

static void check_back(const struct target *target, enum wait_kind kind)
{
	const uint64_t one = 1;

	if (kind == WAIT_READ)
		CHECK_EQ(write(target->wake_fd, &one, sizeof(one)), sizeof(one));
	else if (kind == WAIT_SPIN)
		target->shared[2] = 1;
	while (*(volatile uint8_t *)&target->shared[1] == 0)
		sched_yield();
}

static void inject_while(enum wait_kind kind)
{
	const struct target target = target_start(kind);
	const int map_count_before = map_count(target.pid);
	struct gw_inject_result result = {0};

	CHECK_EQ(gw_inject_uffd(target.pid, target.ram_fd, FEATURES, UFFDIO_REGISTER_MODE_MISSING,
				&result),
		 0);
	CHECK_EQ(result.range_count, 1);
	CHECK_EQ(result.ranges[0].len, TARGET_PAGE_COUNT * PAGE);
	CHECK_EQ(result.ranges[0].file_offset, 0);
	CHECK_EQ(result.features, FEATURES);
	CHECK(result.stopped_ns > 0);
	CHECK(fcntl(result.uffd, F_GETFD) & FD_CLOEXEC);
	CHECK(fcntl(result.uffd, F_GETFL) & O_NONBLOCK);
	CHECK_EQ(map_count(target.pid), map_count_before);
	check_back(&target, kind);
	check_served(&target, result.uffd, result.ranges[0].host_addr);
	gw_sys_close(result.uffd);
	target_stop(&target);
}

static void while_the_main_thread_reads(void)
{
	inject_while(WAIT_READ);
}

/* nanosleep goes on by restart_syscall, and must not fail with EINTR. */
static void while_the_main_thread_sleeps(void)
{
	inject_while(WAIT_SLEEP);
}

static void while_the_main_thread_computes(void)
{
	inject_while(WAIT_SPIN);
}

/* Our reference is closed: the target's own keeps its threads blocked, and can be taken again. */
static void taken_again_after_our_death(void)
{
	const struct target target = target_start(WAIT_READ);
	struct gw_inject_result first = {0};
	struct gw_inject_result again = {0};
	struct pollfd value = {.fd = target.value_fd, .events = POLLIN};

	CHECK_EQ(gw_inject_uffd(target.pid, target.ram_fd, FEATURES, UFFDIO_REGISTER_MODE_MISSING,
				&first),
		 0);
	gw_sys_close(first.uffd);
	CHECK_EQ(write(target.touch_fd, "t", 1), 1);
	CHECK_EQ(gw_inject_take(target.pid, first.remote_fd, target.ram_fd, &again), 0);
	CHECK_EQ(again.ranges[0].host_addr, first.ranges[0].host_addr);
	CHECK_EQ(again.features, FEATURES);
	struct guest guest = {.uffd = again.uffd};
	const struct uffd_msg event = guest_next_event(&guest);

	CHECK_EQ(event.event, UFFD_EVENT_PAGEFAULT);
	CHECK_EQ(poll(&value, 1, 0), 0); /* blocked: it has read nothing, least of all zeros */
	target_stop(&target);
	gw_sys_close(again.uffd);
}

static void take_refuses_what_is_no_userfaultfd(void)
{
	const struct target target = target_start(WAIT_READ);
	struct gw_inject_result result = {.uffd = -7};

	CHECK_EQ(gw_inject_take(target.pid, target.wake_fd, target.ram_fd, &result), -EBADF);
	CHECK_EQ(gw_inject_take(target.pid, 999, target.ram_fd, &result), -EBADF);
	CHECK_EQ(result.uffd, -7);
	target_stop(&target);
}

static void refusals(void)
{
	const struct target target = target_start(WAIT_READ);
	const int other_fd = gw_sys_memfd_create("other", MFD_CLOEXEC);
	struct gw_inject_result result = {.uffd = -7};

	CHECK_EQ(gw_inject_uffd(target.pid, other_fd, FEATURES, UFFDIO_REGISTER_MODE_MISSING,
				&result),
		 -ENXIO);
	CHECK_EQ(gw_inject_uffd(target.pid, target.ram_fd, UINT64_C(1) << 40,
				UFFDIO_REGISTER_MODE_MISSING, &result),
		 -EINVAL);
	target_stop(&target);
	CHECK_EQ(gw_inject_uffd(target.pid, target.ram_fd, FEATURES, UFFDIO_REGISTER_MODE_MISSING,
				&result),
		 -ESRCH);
	CHECK_EQ(result.uffd, -7);
	gw_sys_close(other_fd);
}

/*
 * Each call in the target fails once: it keeps no fd, and its threads go on. Two of them have
 * another way (the device cannot be opened, the scratch page cannot be given back): it is armed.
 */
static void a_failed_step_leaves_the_target_as_it_was(void)
{
	int refused_count = 0;

	for (uint64_t nth = 1; nth <= CALL_COUNT; nth++) {
		const struct target target = target_start(WAIT_READ);
		const int fd_count_before = fd_count(target.pid);
		struct gw_inject_result result = {0};

		gw_sys_fail_nth(GW_SYS_REMOTE, nth, ENOMEM);
		const int err = gw_inject_uffd(target.pid, target.ram_fd, FEATURES,
					       UFFDIO_REGISTER_MODE_MISSING, &result);

		gw_sys_fail_none();
		if (err < 0) {
			CHECK_EQ(err, -ENOMEM);
			CHECK_EQ(fd_count(target.pid), fd_count_before);
			refused_count++;
		} else {
			check_served(&target, result.uffd, result.ranges[0].host_addr);
			gw_sys_close(result.uffd);
		}
		check_back(&target, WAIT_READ);
		target_stop(&target);
	}
	/* mmap, UFFDIO_API and UFFDIO_REGISTER have no other way. */
	CHECK_EQ(refused_count, 3);
}

/* Each call that we or the child make fails once, in one target: it never notices. */
static void whichever_call_fails_the_target_is_as_it_was(void)
{
	const struct target target = target_start(WAIT_READ);
	const int map_count_before = map_count(target.pid);
	int refused_count = 0;

	for (uint64_t nth = 1; nth < 130; nth++) {
		const int fd_count_before = fd_count(target.pid);
		struct gw_inject_result result = {.uffd = -7};

		gw_sys_fail_nth(GW_SYS_ANY, nth, EIO);
		const int err = gw_inject_uffd(target.pid, target.ram_fd, FEATURES,
					       UFFDIO_REGISTER_MODE_MISSING, &result);

		gw_sys_fail_none();
		if (err < 0) {
			CHECK_EQ(err, -EIO);
			CHECK_EQ(result.uffd, -7);
			check_untouched(&target, fd_count_before, map_count_before);
			refused_count++;
			continue;
		}
		/* Armed: disarm it, so that it can be armed again; its own fd stays. */
		check_untouched(&target, fd_count_before + 1, map_count_before);
		CHECK_EQ(gw_uffd_unregister(result.uffd, result.ranges[0].host_addr,
					    result.ranges[0].len),
			 0);
		CHECK_EQ(gw_sys_close(result.uffd), 0);
	}
	fprintf(stderr, "    %d refused\n", refused_count);
	CHECK(refused_count > 20);
	check_back(&target, WAIT_READ);
	target_stop(&target);
}

static void die(void *argument)
{
	(void)argument;
	_exit(137);
}

/* The agent dies with the fd in its hand: the child undoes what nobody will answer for. */
static void an_agent_killed_before_the_commit_leaves_nothing(void)
{
	const struct target target = target_start(WAIT_READ);
	const int fd_count_before = fd_count(target.pid);
	const int map_count_before = map_count(target.pid);
	unsigned long blocked = 1;
	int tracer = 1;
	int status = 0;
	const pid_t agent = fork();

	CHECK(agent >= 0);
	if (agent == 0) {
		struct gw_inject_result result = {0};

		gw_hook_call("inject.received", die, NULL);
		(void)gw_inject_uffd(target.pid, target.ram_fd, FEATURES,
				     UFFDIO_REGISTER_MODE_MISSING, &result);
		_exit(0);
	}
	CHECK_EQ(waitpid(agent, &status, 0), agent);
	CHECK_EQ(WEXITSTATUS(status), 137);
	/* Its child is an orphan now, and done when nobody traces the target any more. */
	while (tracer != 0)
		status_lines(target.pid, &blocked, &tracer);
	check_untouched(&target, fd_count_before, map_count_before);
	check_back(&target, WAIT_READ);
	target_stop(&target);
}

static void wait_for_a_child(void *argument)
{
	siginfo_t info;

	(void)argument;
	CHECK_EQ(waitid(P_ALL, 0, &info, WEXITED | WNOWAIT), 0);
}

/* The child fails and is gone before it is told to go on: what it said last is the reason. */
static void the_reason_of_a_child_that_is_gone_is_heard(void)
{
	const struct target target = target_start(WAIT_READ);
	const int fd_count_before = fd_count(target.pid);
	struct gw_inject_result result = {.uffd = -7};

	gw_hook_call("inject.received", wait_for_a_child, NULL);
	gw_sys_fail_nth(GW_SYS_RECV, 1, EIO);
	CHECK_EQ(gw_inject_uffd(target.pid, target.ram_fd, FEATURES, UFFDIO_REGISTER_MODE_MISSING,
				&result),
		 -EIO);
	gw_sys_fail_none();
	CHECK_EQ(result.uffd, -7);
	CHECK_EQ(fd_count(target.pid), fd_count_before);
	check_back(&target, WAIT_READ);
	target_stop(&target);
}

static _Atomic int signal_count;

static void count_signal(int number)
{
	(void)number;
	atomic_fetch_add(&signal_count, 1);
}

static void *send_signals(void *argument)
{
	const struct target *const target = argument;

	for (int i = 0; i < 3000; i++) {
		CHECK_EQ(kill(target->pid, SIGUSR1), 0);
		sched_yield();
	}
	return NULL;
}

/* Signals rain on the target meanwhile: no handler runs on registers of ours. */
static void signals_are_delivered_afterwards(void)
{
	const struct sigaction action = {.sa_handler = count_signal, .sa_flags = SA_RESTART};
	pthread_t thread;

	CHECK_EQ(sigaction(SIGUSR1, &action, NULL), 0); /* the target inherits it */
	const struct target target = target_start(WAIT_READ);

	CHECK_EQ(pthread_create(&thread, NULL, send_signals, (void *)(uintptr_t)&target), 0);
	for (int i = 0; i < 20; i++) {
		struct gw_inject_result result = {0};

		CHECK_EQ(gw_inject_uffd(target.pid, target.ram_fd, FEATURES,
					UFFDIO_REGISTER_MODE_MISSING, &result),
			 0);
		CHECK_EQ(gw_uffd_unregister(result.uffd, result.ranges[0].host_addr,
					    result.ranges[0].len),
			 0);
		CHECK_EQ(gw_sys_close(result.uffd), 0);
	}
	CHECK_EQ(pthread_join(thread, NULL), 0);
	check_back(&target, WAIT_READ);
	target_stop(&target);
}

/* Two mappings apart from each other are two ranges; a read-only and a private one are none. */
static void only_shared_writable_mappings_count(void)
{
	const int fd = gw_sys_memfd_create("ram", MFD_CLOEXEC);
	struct gw_inject_result result = {0};
	uint8_t *const room = mmap(NULL, 64 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	static const struct {
		size_t at;
		int prot;
		int flags;
		off_t offset;
	} rows[] = {
		{0, PROT_READ | PROT_WRITE, MAP_SHARED, 0},
		{8, PROT_READ | PROT_WRITE, MAP_SHARED, 32768}, /* its continuation */
		{24, PROT_READ | PROT_WRITE, MAP_SHARED, 65536},
		{40, PROT_READ, MAP_SHARED, 0},
		{56, PROT_READ | PROT_WRITE, MAP_PRIVATE, 0},
	};

	CHECK(room != MAP_FAILED);
	CHECK_EQ(gw_sys_ftruncate(fd, 32 * (off_t)PAGE), 0);
	for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++)
		CHECK(mmap(room + rows[i].at * PAGE, 8 * PAGE, rows[i].prot,
			   rows[i].flags | MAP_FIXED, fd, rows[i].offset) != MAP_FAILED);
	/* The target is a copy of us, and has the same mappings. */
	const struct target target = target_start(WAIT_READ);

	CHECK_EQ(gw_inject_uffd(target.pid, fd, FEATURES, UFFDIO_REGISTER_MODE_MISSING, &result),
		 0);
	CHECK_EQ(result.range_count, 2);
	CHECK_EQ(result.ranges[0].host_addr, (uintptr_t)room);
	CHECK_EQ(result.ranges[0].len, 16 * PAGE);
	CHECK_EQ(result.ranges[0].file_offset, 0);
	CHECK_EQ(result.ranges[1].host_addr, (uintptr_t)room + 24 * PAGE);
	CHECK_EQ(result.ranges[1].len, 8 * PAGE);
	CHECK_EQ(result.ranges[1].file_offset, 16 * PAGE);
	CHECK_EQ(gw_sys_close(result.uffd), 0);
	target_stop(&target);
}

int main(void)
{
#ifdef __SANITIZE_THREAD__
	/*
	 * The injector's child is made by _Fork(), which TSan does not see: a lock that its background
	 * thread holds just then stays locked in the child, which died of it once in some runs. The
	 * child has one thread, so that TSan has nothing to find there.
	 */
	fprintf(stderr, "skipped: TSan cannot follow _Fork()\n");
	return CHECK_SKIPPED;
#endif
	guest_need_uffd();
	RUN_FORKED(while_the_main_thread_reads);
	RUN_FORKED(while_the_main_thread_sleeps);
	RUN_FORKED(while_the_main_thread_computes);
	RUN_FORKED(taken_again_after_our_death);
	RUN_FORKED(take_refuses_what_is_no_userfaultfd);
	RUN_FORKED(refusals);
	RUN_FORKED(a_failed_step_leaves_the_target_as_it_was);
	RUN_FORKED(whichever_call_fails_the_target_is_as_it_was);
	RUN_FORKED(an_agent_killed_before_the_commit_leaves_nothing);
	RUN_FORKED(the_reason_of_a_child_that_is_gone_is_heard);
	RUN_FORKED(signals_are_delivered_afterwards);
	RUN_FORKED(only_shared_writable_mappings_count);
	return 0;
}
