/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_uffd.c - every answer of the kernel that the installer relies on, asked of the kernel. A
 * kernel that answers otherwise must fail here and not under a guest.
 */
#include "guest.h"

#include <sched.h>

static uint8_t content[8 * 4096];

static int copy(const struct guest *guest, uint64_t page, uint64_t count, uint64_t *ret_done)
{
	return gw_uffd_copy(guest->uffd, guest_address(guest, page), content, count * PAGE,
			    ret_done);
}

static void what_is_registered_can_be_copied_to_once(void)
{
	struct guest guest = guest_create(16, 0, UFFDIO_REGISTER_MODE_MISSING);
	uint64_t done = 99;

	CHECK_EQ(copy(&guest, 0, 4, &done), GW_UFFD_DONE);
	CHECK_EQ(done, 4 * PAGE);
	CHECK_EQ(guest.memory[3 * PAGE], content[3 * PAGE]);
	/* Present at the first page: EEXIST; later in the batch: EAGAIN and how far it got. */
	CHECK_EQ(copy(&guest, 3, 2, &done), GW_UFFD_EXISTS);
	CHECK_EQ(done, 0);
	CHECK_EQ(copy(&guest, 6, 1, &done), GW_UFFD_DONE);
	CHECK_EQ(copy(&guest, 4, 4, &done), GW_UFFD_AGAIN);
	CHECK_EQ(done, 2 * PAGE);
	CHECK_EQ(copy(&guest, 6, 2, &done), GW_UFFD_EXISTS);
	CHECK_EQ(done, 0);
	/* The source may be unaligned, the destination may not. */
	CHECK_EQ(gw_uffd_copy(guest.uffd, guest_address(&guest, 8), content + 100, PAGE, &done),
		 GW_UFFD_DONE);
	CHECK_EQ(guest.memory[8 * PAGE], content[100]);
	CHECK_EQ(gw_uffd_copy(guest.uffd, guest_address(&guest, 9) + 8, content, PAGE, &done),
		 -EINVAL);
	guest_destroy(&guest);
}

static void what_is_not_registered_says_so(void)
{
	struct guest guest = guest_create(4, 0, 0);
	uint64_t done = 99;

	CHECK_EQ(copy(&guest, 0, 1, &done), GW_UFFD_NOT_REGISTERED);
	CHECK_EQ(done, 0);
	guest_destroy(&guest);
}

/* The trap of the whole design: EEXIST is also what a page says that was touched before REGISTER. */
static void touched_before_register_says_exists_and_reads_zero(void)
{
	struct guest guest = guest_create(4, 0, 0);
	uint64_t done = 0;

	CHECK_EQ(*(volatile uint8_t *)(guest.memory + PAGE), 0);
	CHECK_EQ(gw_uffd_register(guest.uffd, guest_address(&guest, 0), 4 * PAGE,
				  UFFDIO_REGISTER_MODE_MISSING, NULL),
		 0);
	CHECK_EQ(copy(&guest, 1, 1, &done), GW_UFFD_EXISTS);
	CHECK_EQ(*(volatile uint8_t *)(guest.memory + PAGE), 0);
	guest_destroy(&guest);
}

static void exists_wakes_nobody(void)
{
	struct guest guest = guest_create(4, 0, UFFDIO_REGISTER_MODE_MISSING);
	struct toucher toucher;
	struct pollfd none = {.fd = -1};
	uint64_t done = 0;

	toucher_start(&toucher, &guest, 2);
	CHECK_EQ(guest_next_fault(&guest), 2);
	CHECK_EQ(copy(&guest, 2, 1, &done), GW_UFFD_DONE); /* DONTWAKE */
	CHECK_EQ(copy(&guest, 2, 1, &done), GW_UFFD_EXISTS);
	/* Absence of a wake can only be watched for a while; a false pass is possible, a false
	 * failure is not. */
	(void)poll(&none, 1, 50);
	CHECK(!atomic_load(&toucher.done));
	CHECK_EQ(gw_uffd_wake(guest.uffd, guest_address(&guest, 2), PAGE), 0);
	(void)toucher_join(&toucher);
	guest_destroy(&guest);
}

static void two_threads_are_two_events_and_one_install(void)
{
	struct guest guest =
		guest_create(4, GW_UFFD_FEATURE_THREAD_ID, UFFDIO_REGISTER_MODE_MISSING);
	struct toucher touchers[2];
	struct uffd_msg events[2];
	uint64_t done = 0;

	toucher_start(&touchers[0], &guest, 1);
	toucher_start(&touchers[1], &guest, 1);
	for (int i = 0; i < 2; i++)
		events[i] = guest_next_event(&guest);
	CHECK(events[0].arg.pagefault.feat.ptid != events[1].arg.pagefault.feat.ptid);
	CHECK_EQ(copy(&guest, 1, 1, &done), GW_UFFD_DONE);
	CHECK_EQ(gw_uffd_wake(guest.uffd, guest_address(&guest, 1), PAGE), 0);
	for (int i = 0; i < 2; i++)
		CHECK_EQ((uint8_t)toucher_join(&touchers[i]), content[0]);
	guest_destroy(&guest);
}

/* Blocked on an event that nobody has read: the fd is readable, reading is ours to do or not. */
static void wait_readable(const struct guest *guest)
{
	struct pollfd poll_fd = {.fd = guest->uffd, .events = POLLIN};

	CHECK_EQ(poll(&poll_fd, 1, TIMEOUT_MS), 1);
}

static void resolved_before_it_is_read_the_event_vanishes(void)
{
	struct guest guest = guest_create(4, 0, UFFDIO_REGISTER_MODE_MISSING);
	struct toucher toucher;
	struct uffd_msg event;
	uint64_t done = 0;

	toucher_start(&toucher, &guest, 3);
	wait_readable(&guest);
	CHECK_EQ(copy(&guest, 3, 1, &done), GW_UFFD_DONE);
	CHECK_EQ(gw_uffd_wake(guest.uffd, guest_address(&guest, 3), PAGE), 0);
	(void)toucher_join(&toucher);
	CHECK_EQ(gw_uffd_read(guest.uffd, &event, 1), 0);
	guest_destroy(&guest);
}

static void wake_of_an_absent_page_faults_again(void)
{
	struct guest guest = guest_create(4, 0, UFFDIO_REGISTER_MODE_MISSING);
	struct toucher toucher;
	uint64_t done = 0;

	toucher_start(&toucher, &guest, 1);
	CHECK_EQ(guest_next_fault(&guest), 1);
	CHECK_EQ(gw_uffd_wake(guest.uffd, guest_address(&guest, 0), 4 * PAGE), 0);
	CHECK_EQ(guest_next_fault(&guest), 1);
	CHECK_EQ(copy(&guest, 1, 1, &done), GW_UFFD_DONE);
	CHECK_EQ(gw_uffd_wake(guest.uffd, guest_address(&guest, 0), 4 * PAGE), 0);
	CHECK_EQ((uint8_t)toucher_join(&toucher), content[0]);
	guest_destroy(&guest);
}

static void *dontneed(void *argument)
{
	const struct guest *const guest = argument;

	CHECK_EQ(madvise(guest->memory, 2 * PAGE, MADV_DONTNEED), 0);
	return NULL;
}

static void *give_back(void *argument)
{
	const struct guest *const guest = argument;

	CHECK_EQ(madvise(guest->memory, 2 * PAGE, MADV_REMOVE), 0);
	return NULL;
}

static void while_an_event_waits_every_install_is_held_back(void)
{
	struct guest guest =
		guest_create(8, GW_UFFD_FEATURE_EVENT_REMOVE, UFFDIO_REGISTER_MODE_MISSING);
	pthread_t thread;
	uint64_t done = 99;

	CHECK_EQ(copy(&guest, 0, 1, &done), GW_UFFD_DONE);
	CHECK_EQ(pthread_create(&thread, NULL, give_back, &guest), 0);
	wait_readable(&guest);
	CHECK_EQ(copy(&guest, 4, 2, &done), GW_UFFD_AGAIN);
	CHECK_EQ(done, 0);
	CHECK_EQ(gw_uffd_zeropage(guest.uffd, guest_address(&guest, 4), PAGE, &done),
		 GW_UFFD_AGAIN);
	CHECK_EQ(gw_uffd_wake(guest.uffd, guest_address(&guest, 4), PAGE), 0);
	/* The page is still there: the event comes before the act. */
	CHECK(guest_cache_has(&guest, 0));
	CHECK_EQ(guest_next_event(&guest).event, UFFD_EVENT_REMOVE);
	CHECK_EQ(pthread_join(thread, NULL), 0);
	CHECK(!guest_cache_has(&guest, 0));
	CHECK_EQ(copy(&guest, 4, 2, &done), GW_UFFD_DONE);
	guest_destroy(&guest);
}

static void dontneed_of_shared_memory_loses_nothing_and_says_remove(void)
{
	struct guest guest =
		guest_create(8, GW_UFFD_FEATURE_EVENT_REMOVE, UFFDIO_REGISTER_MODE_MISSING);
	pthread_t thread;
	uint64_t done = 0;

	CHECK_EQ(copy(&guest, 0, 2, &done), GW_UFFD_DONE);
	CHECK_EQ(pthread_create(&thread, NULL, dontneed, &guest), 0);
	CHECK_EQ(guest_next_event(&guest).event, UFFD_EVENT_REMOVE);
	CHECK_EQ(pthread_join(thread, NULL), 0);
	CHECK(guest_cache_has(&guest, 0));
	CHECK_EQ(guest.memory[PAGE], content[PAGE]);
	guest_destroy(&guest);
}

static void a_punched_hole_loses_the_page_and_says_nothing(void)
{
	struct guest guest =
		guest_create(8, GW_UFFD_FEATURE_EVENT_REMOVE, UFFDIO_REGISTER_MODE_MISSING);
	struct uffd_msg event;
	uint64_t done = 0;

	CHECK_EQ(copy(&guest, 0, 2, &done), GW_UFFD_DONE);
	CHECK_EQ(gw_sys_fallocate(guest.ram_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0,
				  2 * (off_t)PAGE),
		 0);
	CHECK_EQ(gw_uffd_read(guest.uffd, &event, 1), 0);
	CHECK(!guest_cache_has(&guest, 0));
	guest_destroy(&guest);
}

static void zeropage_answers_like_copy(void)
{
	struct guest guest = guest_create(8, 0, UFFDIO_REGISTER_MODE_MISSING);
	uint64_t done = 0;

	CHECK_EQ(copy(&guest, 1, 1, &done), GW_UFFD_DONE);
	CHECK_EQ(gw_uffd_zeropage(guest.uffd, guest_address(&guest, 1), PAGE, &done),
		 GW_UFFD_EXISTS);
	CHECK_EQ(guest.memory[PAGE], content[0]);
	CHECK_EQ(gw_uffd_zeropage(guest.uffd, guest_address(&guest, 2), PAGE, &done), GW_UFFD_DONE);
	CHECK_EQ(done, PAGE);
	/* On shared memory it allocates: why known zeros are left as holes. */
	CHECK(guest_cache_has(&guest, 2));
	CHECK_EQ(guest.memory[2 * PAGE], 0);
	guest_destroy(&guest);
}

static void continue_maps_what_the_page_cache_has(void)
{
	struct guest guest =
		guest_create(8, GW_UFFD_FEATURE_MINOR_SHMEM,
			     UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR);
	struct toucher toucher;
	uint64_t done = 99;

	CHECK_EQ(gw_uffd_continue(guest.uffd, guest_address(&guest, 1), PAGE, &done),
		 GW_UFFD_NO_PAGE);
	CHECK_EQ(done, 0);
	CHECK_EQ(gw_sys_pwrite(guest.ram_fd, content, PAGE, (off_t)PAGE), (ssize_t)PAGE);
	toucher_start(&toucher, &guest, 1);
	const struct uffd_msg event = guest_next_event(&guest);

	CHECK(event.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_MINOR);
	CHECK_EQ(gw_uffd_continue(guest.uffd, guest_address(&guest, 1), PAGE, &done), GW_UFFD_DONE);
	CHECK_EQ(gw_uffd_wake(guest.uffd, guest_address(&guest, 1), PAGE), 0);
	CHECK_EQ((uint8_t)toucher_join(&toucher), content[0]);
	CHECK_EQ(gw_uffd_continue(guest.uffd, guest_address(&guest, 1), PAGE, &done),
		 GW_UFFD_EXISTS);
	/* A copy onto a page that the cache has and nobody has mapped is refused as well. */
	CHECK_EQ(gw_sys_pwrite(guest.ram_fd, content, PAGE, 2 * (off_t)PAGE), (ssize_t)PAGE);
	CHECK_EQ(copy(&guest, 2, 1, &done), GW_UFFD_EXISTS);
	guest_destroy(&guest);
}

/* Its process killed: what we hold of it says ESRCH, except WAKE, which does not mind. */
static void a_dead_process_is_gone(void)
{
	int pair[2];
	uint64_t message[2]; /* fd, address */
	int status = 0;
	uint64_t done = 0;

	CHECK_EQ(gw_sys_socketpair(AF_UNIX, SOCK_STREAM, 0, pair), 0);
	const pid_t pid = fork();

	CHECK(pid >= 0);
	if (pid == 0) {
		const struct guest guest = guest_create(4, 0, UFFDIO_REGISTER_MODE_MISSING);

		message[0] = (uint64_t)guest.uffd;
		message[1] = guest_address(&guest, 0);
		CHECK_EQ(write(pair[1], message, sizeof(message)), sizeof(message));
		for (;;)
			pause();
	}
	CHECK_EQ(read(pair[0], message, sizeof(message)), sizeof(message));
	const int pidfd = gw_sys_pidfd_open(pid, 0);
	const int uffd = gw_sys_pidfd_getfd(pidfd, (int)message[0], 0);

	CHECK(uffd >= 0);
	CHECK_EQ(gw_uffd_is_uffd(uffd), 1);
	CHECK_EQ(gw_uffd_is_uffd(pair[0]), 0);
	CHECK(gw_uffd_is_uffd(12345) < 0);
	CHECK_EQ(gw_uffd_copy(uffd, message[1], content, PAGE, &done), GW_UFFD_DONE);
	CHECK_EQ(kill(pid, SIGKILL), 0);
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	CHECK_EQ(gw_uffd_copy(uffd, message[1] + PAGE, content, PAGE, &done), GW_UFFD_GONE);
	CHECK_EQ(gw_uffd_zeropage(uffd, message[1] + PAGE, PAGE, &done), GW_UFFD_GONE);
	CHECK_EQ(gw_uffd_continue(uffd, message[1] + PAGE, PAGE, &done), GW_UFFD_GONE);
	CHECK_EQ(gw_uffd_unregister(uffd, message[1], 4 * PAGE), -ENOMEM);
	CHECK_EQ(gw_uffd_wake(uffd, message[1], PAGE), 0);
}

/*
 * The negative control of I4: with the last reference gone the kernel hands out zeros, without
 * an error anywhere. It is why the VMM keeps one.
 */
static void the_last_reference_closed_hands_out_zeros(void)
{
	struct guest guest = guest_create(4, 0, UFFDIO_REGISTER_MODE_MISSING);
	struct toucher toucher;

	toucher_start(&toucher, &guest, 1);
	CHECK_EQ(guest_next_fault(&guest), 1);
	CHECK_EQ(close(guest.uffd), 0);
	CHECK_EQ(toucher_join(&toucher), 0);
}

static void another_reference_keeps_waiters_blocked(void)
{
	struct guest guest = guest_create(4, 0, UFFDIO_REGISTER_MODE_MISSING);
	const int kept = gw_sys_dup(guest.uffd);
	struct toucher toucher;
	struct pollfd none = {.fd = -1};
	uint64_t done = 0;

	CHECK(kept >= 0);
	toucher_start(&toucher, &guest, 1);
	CHECK_EQ(guest_next_fault(&guest), 1);
	CHECK_EQ(close(guest.uffd), 0);
	(void)poll(&none, 1, 50);
	CHECK(!atomic_load(&toucher.done));
	guest.uffd = kept;
	CHECK_EQ(copy(&guest, 1, 1, &done), GW_UFFD_DONE);
	CHECK_EQ(gw_uffd_wake(guest.uffd, guest_address(&guest, 1), PAGE), 0);
	CHECK_EQ((uint8_t)toucher_join(&toucher), content[0]);
	guest_destroy(&guest);
}

/* --- the end of a registration ---------------------------------------------------------------- */

#define WALK_PAGE_COUNT 64

struct walker {
	const struct guest *guest;
	_Atomic uint32_t turn;
	_Atomic uint32_t done_turn;
	_Atomic bool stop;
};

/* Touches every page, once a turn. */
static void *walker_main(void *argument)
{
	struct walker *const walker = argument;

	for (uint32_t turn = 1;; turn++) {
		while (atomic_load(&walker->turn) < turn)
			if (atomic_load(&walker->stop))
				return NULL;
		for (uint64_t page = 0; page < WALK_PAGE_COUNT; page++)
			(void)*(volatile uint8_t *)(walker->guest->memory + page * PAGE);
		atomic_store(&walker->done_turn, turn);
	}
}

/* Answers faults as an engine does the holes of a whole guest. */
static void *answerer_main(void *argument)
{
	struct walker *const walker = argument;

	while (!atomic_load(&walker->stop)) {
		struct uffd_msg event;
		uint64_t done = 0;

		if (gw_uffd_read(walker->guest->uffd, &event, 1) != 1)
			continue;
		const uint64_t address = event.arg.pagefault.address & ~(uint64_t)(PAGE - 1);

		if (gw_uffd_zeropage(walker->guest->uffd, address, PAGE, &done) == GW_UFFD_DONE)
			(void)gw_uffd_wake(walker->guest->uffd, address, PAGE);
	}
	return NULL;
}

/*
 * UNREGISTER wakes who waits, and then takes the registration off: who faults between the two would
 * sleep for ever. Three rounds in a hundred, observed on 6.18.
 */
static void who_faults_meanwhile_is_not_left_asleep(void)
{
	struct guest guest = guest_create(WALK_PAGE_COUNT, 0, 0);
	struct walker walker = {.guest = &guest};
	pthread_t threads[2];

	CHECK_EQ(pthread_create(&threads[0], NULL, walker_main, &walker), 0);
	CHECK_EQ(pthread_create(&threads[1], NULL, answerer_main, &walker), 0);
	for (uint32_t turn = 1; turn <= 100; turn++) {
		const uint64_t deadline_ns = gw_sys_now_ns() + UINT64_C(1000000) * TIMEOUT_MS;
		const uint32_t spin_count = turn * 7919 % 20000;

		CHECK_EQ(madvise(guest.memory, WALK_PAGE_COUNT * PAGE, MADV_REMOVE), 0);
		CHECK_EQ(gw_uffd_register(guest.uffd, guest_address(&guest, 0),
					  WALK_PAGE_COUNT * PAGE, UFFDIO_REGISTER_MODE_MISSING,
					  NULL),
			 0);
		atomic_store(&walker.turn, turn);
		for (volatile uint32_t i = 0; i < spin_count; i++)
			;
		CHECK_EQ(gw_uffd_unregister(guest.uffd, guest_address(&guest, 0),
					    WALK_PAGE_COUNT * PAGE),
			 0);
		while (atomic_load(&walker.done_turn) != turn) {
			CHECK(gw_sys_now_ns() < deadline_ns);
			sched_yield();
		}
	}
	atomic_store(&walker.stop, true);
	CHECK_EQ(pthread_join(threads[0], NULL), 0);
	CHECK_EQ(pthread_join(threads[1], NULL), 0);
	guest_destroy(&guest);
}

static void an_unknown_feature_is_refused(void)
{
	uint64_t granted = 0;
	const int uffd = gw_uffd_open(0, &granted);

	CHECK(uffd >= 0);
	CHECK(granted & GW_UFFD_FEATURE_MISSING_SHMEM);
	CHECK_EQ(gw_sys_close(uffd), 0);
	CHECK_EQ(gw_uffd_open(UINT64_C(1) << 50, &granted), -EINVAL);
}

static void the_probe_finds_what_can_be_used(void)
{
	uint64_t features = 0;

	CHECK_EQ(gw_uffd_probe(&features), 0);
	CHECK(features & GW_UFFD_FEATURE_MISSING_SHMEM);
	CHECK_EQ(features & ~UINT64_C(0x1ffff), 0);
	CHECK_EQ(strcmp(gw_uffd_feature_name(GW_UFFD_FEATURE_MISSING_SHMEM), "missing-shmem"), 0);
	CHECK_EQ(strcmp(gw_uffd_feature_name(GW_UFFD_FEATURE_MOVE), "move"), 0);
	CHECK(!gw_uffd_feature_name(0));
	CHECK(!gw_uffd_feature_name(3));
	CHECK(!gw_uffd_feature_name(UINT64_C(1) << 40));
}

/* Each answer that a full or odd machine could give, by injection: none may be taken for another. */
static void every_errno_has_its_outcome(void)
{
	static const struct {
		int err;
		int copy;
		int cont;
	} rows[] = {
		{EAGAIN, GW_UFFD_AGAIN, GW_UFFD_AGAIN},
		{EEXIST, GW_UFFD_EXISTS, GW_UFFD_EXISTS},
		{ESRCH, GW_UFFD_GONE, GW_UFFD_GONE},
		{ENOENT, GW_UFFD_NOT_REGISTERED, GW_UFFD_NOT_REGISTERED},
		{ENOSPC, GW_UFFD_NO_SPACE, GW_UFFD_NO_SPACE},
		{ENOMEM, GW_UFFD_NO_SPACE, GW_UFFD_NO_SPACE},
		{EFAULT, -EFAULT, GW_UFFD_NO_PAGE},
		{EINVAL, -EINVAL, -EINVAL},
		{EBADF, -EBADF, -EBADF},
	};
	struct guest guest = guest_create(4, 0, UFFDIO_REGISTER_MODE_MISSING);

	for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
		uint64_t done = 99;

		gw_sys_fail_nth(GW_SYS_IOCTL, 1, rows[i].err);
		CHECK_EQ(copy(&guest, 0, 1, &done), rows[i].copy);
		CHECK_EQ(done, 0);
		gw_sys_fail_nth(GW_SYS_IOCTL, 1, rows[i].err);
		CHECK_EQ(gw_uffd_zeropage(guest.uffd, guest_address(&guest, 0), PAGE, &done),
			 rows[i].copy);
		gw_sys_fail_nth(GW_SYS_IOCTL, 1, rows[i].err);
		CHECK_EQ(gw_uffd_continue(guest.uffd, guest_address(&guest, 0), PAGE, &done),
			 rows[i].cont);
	}
	gw_sys_fail_nth(GW_SYS_READ, 1, EINTR);
	struct uffd_msg event;

	CHECK_EQ(gw_uffd_read(guest.uffd, &event, 1), 0);
	gw_sys_fail_nth(GW_SYS_READ, 1, EIO);
	CHECK_EQ(gw_uffd_read(guest.uffd, &event, 1), -EIO);
	guest_destroy(&guest);
}

int main(void)
{
	guest_need_uffd();
	for (size_t i = 0; i < sizeof(content); i++)
		content[i] = (uint8_t)(i / PAGE + 17 + i % 61);
	RUN_FORKED(what_is_registered_can_be_copied_to_once);
	RUN_FORKED(what_is_not_registered_says_so);
	RUN_FORKED(touched_before_register_says_exists_and_reads_zero);
	RUN_FORKED(exists_wakes_nobody);
	RUN_FORKED(two_threads_are_two_events_and_one_install);
	RUN_FORKED(resolved_before_it_is_read_the_event_vanishes);
	RUN_FORKED(wake_of_an_absent_page_faults_again);
	RUN_FORKED(while_an_event_waits_every_install_is_held_back);
	RUN_FORKED(dontneed_of_shared_memory_loses_nothing_and_says_remove);
	RUN_FORKED(a_punched_hole_loses_the_page_and_says_nothing);
	RUN_FORKED(zeropage_answers_like_copy);
	RUN_FORKED(continue_maps_what_the_page_cache_has);
	RUN_FORKED(a_dead_process_is_gone);
	RUN_FORKED(the_last_reference_closed_hands_out_zeros);
	RUN_FORKED(another_reference_keeps_waiters_blocked);
	RUN_FORKED(who_faults_meanwhile_is_not_left_asleep);
	RUN_FORKED(an_unknown_feature_is_refused);
	RUN_FORKED(the_probe_finds_what_can_be_used);
	RUN_FORKED(every_errno_has_its_outcome);
	return EXIT_SUCCESS;
}
