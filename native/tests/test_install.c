/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_install.c - each page exactly once, on real faulting memory, by both methods; and that no
 * failing call ever leaves a page that is not the source's, or one that nobody answers for.
 */
#include "guest.h"

#include <sched.h>

#include <godwit/install.h>

#define PAGE_COUNT 64

static const uint64_t modes[] = {
	[GW_INSTALL_COPY] = UFFDIO_REGISTER_MODE_MISSING,
	[GW_INSTALL_CONTINUE] = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR,
};

/* A guest, its map, its installer. */
struct bench {
	struct guest guest;
	struct gw_page_map *map;
	struct gw_install install;
	struct gw_install_again again;
	unsigned int again_count;
};

static uint32_t method = GW_INSTALL_COPY;
static uint8_t patterns[PAGE_COUNT * 4096];

/* Reads all events; REMOVE is passed on as the engine does. */
static int drain(void *user)
{
	struct bench *const bench = user;
	struct uffd_msg event;

	bench->again_count++;
	while (gw_uffd_read(bench->guest.uffd, &event, 1) == 1) {
		if (event.event != UFFD_EVENT_REMOVE)
			continue;
		const uint64_t start = event.arg.remove.start - (uintptr_t)bench->guest.memory;
		const uint64_t end = event.arg.remove.end - (uintptr_t)bench->guest.memory;

		CHECK(gw_install_removed(&bench->install, start / PAGE, (end - start) / PAGE) >= 0);
	}
	sched_yield();
	return 0;
}

static struct bench *bench_create(void)
{
	struct bench *const bench = calloc(1, sizeof(*bench));
	const uint64_t features = GW_UFFD_FEATURE_EVENT_REMOVE | GW_UFFD_FEATURE_MINOR_SHMEM;

	char path[64];

	CHECK(bench);
	bench->guest = guest_create(PAGE_COUNT, features, modes[method]);
	(void)snprintf(path, sizeof(path), "/dev/shm/gw-test-install-%d", (int)getpid());
	const struct gw_page_map_identity identity = {
		.epoch = 1,
		.page_count = PAGE_COUNT,
		.page_size = PAGE,
		.install_method = method,
		.image_id = "vm",
	};
	/* Two regions, contiguous in the image, the second registered at the same stretch. */
	const struct gw_arrival_region regions[] = {
		{.offset = 0, .host_addr = guest_address(&bench->guest, 0), .len = 40 * PAGE},
		{.offset = 40 * PAGE,
		 .host_addr = guest_address(&bench->guest, 40),
		 .len = 24 * PAGE},
	};

	CHECK_EQ(gw_page_map_create(path, &identity, &bench->map), 0);
	CHECK_EQ(gw_page_map_unlink(path), 0); /* mapped it lives on, and no test can leave it */
	CHECK_EQ(gw_install_init(&bench->install, &bench->guest.uffd, 1, bench->guest.ram_fd, PAGE,
				 method, bench->map, regions, 2),
		 0);
	CHECK_EQ(gw_install_check_empty(&bench->install), 0);
	bench->again = (struct gw_install_again){.on_again = drain, .user = bench};
	return bench;
}

static void bench_destroy(struct bench *bench)
{
	gw_install_fini(&bench->install);
	gw_page_map_destroy(bench->map);
	guest_destroy(&bench->guest);
	free(bench);
}

static void request(struct bench *bench, uint64_t first, uint64_t count, uint8_t state)
{
	CHECK_EQ(gw_page_map_move_run(bench->map, first, count, GW_PAGE_ABSENT, state), count);
}

static int install(struct bench *bench, uint64_t first, uint64_t count)
{
	return gw_install_run(&bench->install, first, count, patterns + first * PAGE,
			      &bench->again);
}

static uint64_t counter(const struct bench *bench, enum gw_page_counter which)
{
	return gw_page_map_counter(bench->map, which);
}

static uint64_t absent_count(const struct bench *bench)
{
	return gw_bitmap_absent_count(gw_page_map_bitmap_const(bench->map));
}

/* Zeros that nobody asked for settle what has no content yet, and nothing else. */
static void zeros_beyond_a_want_settle_what_is_absent(void)
{
	struct bench *const bench = bench_create();
	struct toucher toucher;

	request(bench, 5, 1, GW_PAGE_REQUESTED_DEMAND);
	toucher_start(&toucher, &bench->guest, 5);
	CHECK_EQ(guest_next_fault(&bench->guest), 5);
	request(bench, 10, 10, GW_PAGE_REQUESTED_BULK);
	CHECK_EQ(install(bench, 12, 2), GW_INSTALL_DONE);
	CHECK(gw_page_map_move(bench->map, 30, GW_PAGE_ABSENT, GW_PAGE_REMOVED));
	request(bench, 31, 1, GW_PAGE_REQUESTED_BULK);
	CHECK(gw_page_map_move(bench->map, 31, GW_PAGE_REQUESTED_BULK, GW_PAGE_INSTALLING));
	/* 60 to 63 are left out. */
	CHECK_EQ(gw_install_zeros_beyond(&bench->install, 0, 60, &bench->again), GW_INSTALL_DONE);
	CHECK_EQ(toucher_join(&toucher), 0);
	for (uint64_t page = 0; page < PAGE_COUNT; page++) {
		uint8_t want = page < 60 ? GW_PAGE_ZERO : GW_PAGE_ABSENT;

		if (page == 5 || page == 12 || page == 13)
			want = GW_PAGE_PRESENT;
		else if (page == 30)
			want = GW_PAGE_REMOVED;
		else if (page == 31)
			want = GW_PAGE_INSTALLING;
		CHECK_EQ(gw_page_map_get(bench->map, page), want);
		/* 30 was moved by hand: its bit is nobody's here. */
		if (page != 30)
			CHECK_EQ(gw_bitmap_is_absent(gw_page_map_bitmap(bench->map), page),
				 want == GW_PAGE_ABSENT || want == GW_PAGE_INSTALLING);
		CHECK_EQ(guest_cache_has(&bench->guest, page), want == GW_PAGE_PRESENT);
	}
	CHECK(guest_has_pattern(bench->guest.memory, 12));
	CHECK_EQ(counter(bench, GW_COUNT_ZERO_PAGE), 60 - 4);
	CHECK_EQ(counter(bench, GW_COUNT_DUPLICATE_PAGE), 0);
	/* Again: nothing is left to settle. */
	CHECK_EQ(gw_install_zeros_beyond(&bench->install, 0, 60, &bench->again), GW_INSTALL_DONE);
	CHECK_EQ(counter(bench, GW_COUNT_ZERO_PAGE), 60 - 4);
	bench_destroy(bench);
}

static void requested_pages_are_installed_and_all_others_left_alone(void)
{
	struct bench *const bench = bench_create();

	request(bench, 10, 30, GW_PAGE_REQUESTED_BULK);
	CHECK(gw_page_map_move(bench->map, 20, GW_PAGE_REQUESTED_BULK, GW_PAGE_REQUESTED_DEMAND));
	/* 8 and 9, 40 to 43 were not asked for; 40 starts the second region. */
	CHECK_EQ(install(bench, 8, 36), GW_INSTALL_DONE);
	for (uint64_t page = 0; page < PAGE_COUNT; page++) {
		const bool want = page >= 10 && page < 40;

		CHECK_EQ(gw_page_map_get(bench->map, page),
			 want ? GW_PAGE_PRESENT : GW_PAGE_ABSENT);
		CHECK_EQ(guest_cache_has(&bench->guest, page), want);
		CHECK_EQ(gw_bitmap_is_absent(gw_page_map_bitmap(bench->map), page), !want);
		if (want)
			CHECK(guest_has_pattern(bench->guest.memory, page));
	}
	CHECK_EQ(absent_count(bench), PAGE_COUNT - 30);
	CHECK_EQ(counter(bench, GW_COUNT_BULK_PAGE), 29);
	CHECK_EQ(counter(bench, GW_COUNT_DEMAND_PAGE), 1);
	CHECK_EQ(counter(bench, GW_COUNT_DUPLICATE_PAGE), 6);
	/* Once more, with other content: the guest's own stores would be undone. */
	bench->guest.memory[12 * PAGE] ^= 0xff;
	CHECK_EQ(gw_install_run(&bench->install, 10, 30, patterns, &bench->again), GW_INSTALL_DONE);
	CHECK(!guest_has_pattern(bench->guest.memory, 12));
	bench->guest.memory[12 * PAGE] ^= 0xff;
	CHECK(guest_has_pattern(bench->guest.memory, 12));
	request(bench, 38 + 2, 24, GW_PAGE_REQUESTED_BULK);
	CHECK_EQ(install(bench, 40, 24), GW_INSTALL_DONE);
	CHECK(guest_has_pattern(bench->guest.memory, 63));
	CHECK_EQ(counter(bench, GW_COUNT_VIOLATION), 0);
	bench_destroy(bench);
}

static void two_waiters_one_install(void)
{
	struct bench *const bench = bench_create();
	struct toucher touchers[2];

	toucher_start(&touchers[0], &bench->guest, 41);
	toucher_start(&touchers[1], &bench->guest, 41);
	CHECK_EQ(guest_next_fault(&bench->guest), 41);
	CHECK_EQ(guest_next_fault(&bench->guest), 41);
	request(bench, 41, 1, GW_PAGE_REQUESTED_DEMAND);
	CHECK_EQ(install(bench, 41, 1), GW_INSTALL_DONE);
	CHECK_EQ(toucher_join(&touchers[0]), first_word(41));
	CHECK_EQ(toucher_join(&touchers[1]), first_word(41));
	CHECK_EQ(counter(bench, GW_COUNT_DEMAND_PAGE), 1);
	bench_destroy(bench);
}

/* I4: what was touched behind our back reads zero; it must never be published as the guest's. */
static void a_page_touched_before_us_is_a_violation(void)
{
	struct bench *const bench = bench_create();

	CHECK_EQ(gw_sys_pwrite(bench->guest.ram_fd, "x", 1, 12 * (off_t)PAGE), 1);
	CHECK_EQ(gw_install_check_empty(&bench->install), -ENOTEMPTY);
	request(bench, 10, 6, GW_PAGE_REQUESTED_BULK);
	CHECK_EQ(install(bench, 10, 6), GW_INSTALL_VIOLATED);
	CHECK_EQ(counter(bench, GW_COUNT_VIOLATION), 1);
	CHECK(gw_page_map_is_violated(bench->map));
	for (uint64_t page = 12; page < 16; page++) {
		CHECK_EQ(gw_page_map_get(bench->map, page), GW_PAGE_ABSENT);
		CHECK(gw_bitmap_is_absent(gw_page_map_bitmap(bench->map), page));
	}
	/* Held: nothing is installed any more, zeros neither. */
	request(bench, 20, 1, GW_PAGE_REQUESTED_DEMAND);
	CHECK_EQ(install(bench, 20, 1), GW_INSTALL_VIOLATED);
	CHECK_EQ(gw_install_zero_run(&bench->install, 20, 1, &bench->again), GW_INSTALL_VIOLATED);
	CHECK_EQ(gw_install_fault(&bench->install, 10, false, &bench->again), GW_INSTALL_VIOLATED);
	CHECK(!guest_cache_has(&bench->guest, 20));
	bench_destroy(bench);
}

static void prepared_room_is_not_empty(void)
{
	struct bench *const bench = bench_create();

	/* SEEK_DATA does not see it; a copy onto it would be refused. */
	CHECK_EQ(gw_sys_fallocate(bench->guest.ram_fd, 0, 0, (off_t)PAGE), 0);
	CHECK_EQ(gw_install_check_empty(&bench->install), -ENOTEMPTY);
	bench_destroy(bench);
}

static void zeros_stay_holes_until_somebody_looks(void)
{
	struct bench *const bench = bench_create();
	struct toucher toucher;

	toucher_start(&toucher, &bench->guest, 5);
	CHECK_EQ(guest_next_fault(&bench->guest), 5);
	request(bench, 0, 20, GW_PAGE_REQUESTED_BULK);
	CHECK(gw_page_map_move(bench->map, 5, GW_PAGE_REQUESTED_BULK, GW_PAGE_REQUESTED_DEMAND));
	CHECK_EQ(gw_install_zero_run(&bench->install, 0, 24, &bench->again), GW_INSTALL_DONE);
	CHECK_EQ(toucher_join(&toucher), 0);
	for (uint64_t page = 0; page < 20; page++) {
		CHECK_EQ(gw_page_map_get(bench->map, page),
			 page == 5 ? GW_PAGE_PRESENT : GW_PAGE_ZERO);
		CHECK_EQ(guest_cache_has(&bench->guest, page), page == 5);
	}
	CHECK_EQ(counter(bench, GW_COUNT_ZERO_PAGE), 20);
	CHECK_EQ(counter(bench, GW_COUNT_DUPLICATE_PAGE), 4);
	CHECK_EQ(absent_count(bench), PAGE_COUNT - 20);
	/* A fault on one of them: its page, without a fetch. */
	toucher_start(&toucher, &bench->guest, 7);
	CHECK_EQ(guest_next_fault(&bench->guest), 7);
	CHECK_EQ(gw_install_fault(&bench->install, 7, false, &bench->again), GW_INSTALL_DONE);
	CHECK_EQ(toucher_join(&toucher), 0);
	CHECK_EQ(gw_page_map_get(bench->map, 7), GW_PAGE_PRESENT);
	/* Content that comes late for a zero page is not installed over it. */
	CHECK_EQ(install(bench, 7, 2), GW_INSTALL_DONE);
	CHECK_EQ(bench->guest.memory[7 * PAGE], 0);
	bench_destroy(bench);
}

static void a_late_fault_on_a_present_page_is_only_woken(void)
{
	struct bench *const bench = bench_create();

	request(bench, 3, 1, GW_PAGE_REQUESTED_DEMAND);
	CHECK_EQ(install(bench, 3, 1), GW_INSTALL_DONE);
	bench->guest.memory[3 * PAGE] ^= 1;
	CHECK_EQ(gw_install_fault(&bench->install, 3, false, &bench->again), GW_INSTALL_DONE);
	CHECK_EQ(gw_install_fault(&bench->install, 3, true, &bench->again), GW_INSTALL_DONE);
	bench->guest.memory[3 * PAGE] ^= 1;
	CHECK(guest_has_pattern(bench->guest.memory, 3));
	bench_destroy(bench);
}

struct advice {
	const struct guest *guest;
	uint64_t first;
	uint64_t count;
	int advice;
};

static void *advise(void *argument)
{
	const struct advice *const advice = argument;

	CHECK_EQ(madvise(advice->guest->memory + advice->first * PAGE, advice->count * PAGE,
			 advice->advice),
		 0);
	return NULL;
}

/* madvise in a thread of its own, as it waits for its event to be read; then read it. */
static void advise_and_drain(struct bench *bench, uint64_t first, uint64_t count, int advice)
{
	struct advice argument = {&bench->guest, first, count, advice};
	struct pollfd poll_fd = {.fd = bench->guest.uffd, .events = POLLIN};
	pthread_t thread;

	CHECK_EQ(pthread_create(&thread, NULL, advise, &argument), 0);
	CHECK_EQ(poll(&poll_fd, 1, TIMEOUT_MS), 1);
	CHECK_EQ(drain(bench), 0);
	CHECK_EQ(pthread_join(thread, NULL), 0);
}

static void what_the_guest_gives_back_reads_zero_and_is_never_fetched(void)
{
	struct bench *const bench = bench_create();
	struct toucher toucher;

	request(bench, 0, 4, GW_PAGE_REQUESTED_BULK);
	CHECK_EQ(install(bench, 0, 4), GW_INSTALL_DONE);
	request(bench, 6, 1, GW_PAGE_REQUESTED_BULK);
	/* PRESENT 0..3, ABSENT 4 and 5, REQUESTED 6. */
	advise_and_drain(bench, 0, 7, MADV_REMOVE);
	for (uint64_t page = 4; page < 7; page++)
		CHECK_EQ(gw_page_map_get(bench->map, page), GW_PAGE_REMOVED);
	/* The event comes before the act: the present ones are surely seen at a second look only. */
	CHECK(gw_install_removed(&bench->install, 0, 7) <= 4);
	CHECK_EQ(counter(bench, GW_COUNT_REMOVED_PAGE), 7);
	CHECK_EQ(absent_count(bench), PAGE_COUNT - 7);
	CHECK_EQ(install(bench, 0, 7), GW_INSTALL_DONE);
	CHECK(!guest_cache_has(&bench->guest, 6));
	for (uint64_t page = 0; page < 7; page++) {
		toucher_start(&toucher, &bench->guest, page);
		CHECK_EQ(guest_next_fault(&bench->guest), page);
		CHECK_EQ(gw_install_fault(&bench->install, page, false, &bench->again),
			 GW_INSTALL_DONE);
		CHECK_EQ(toucher_join(&toucher), 0);
		CHECK_EQ(gw_page_map_get(bench->map, page), GW_PAGE_REMOVED);
	}
	bench_destroy(bench);
}

/* MADV_DONTNEED of shared memory says REMOVE and loses nothing; so must we. */
static void a_hint_that_loses_nothing_changes_nothing(void)
{
	struct bench *const bench = bench_create();
	struct toucher toucher;

	request(bench, 0, 2, GW_PAGE_REQUESTED_BULK);
	CHECK_EQ(install(bench, 0, 2), GW_INSTALL_DONE);
	advise_and_drain(bench, 0, 2, MADV_DONTNEED);
	CHECK_EQ(gw_install_removed(&bench->install, 0, 2), 0);
	CHECK_EQ(gw_page_map_get(bench->map, 0), GW_PAGE_PRESENT);
	CHECK_EQ(counter(bench, GW_COUNT_REMOVED_PAGE), 0);
	if (method == GW_INSTALL_CONTINUE) {
		/* The mapping is dropped, so that there is a minor fault: the same page again. */
		toucher_start(&toucher, &bench->guest, 0);
		const struct uffd_msg event = guest_next_event(&bench->guest);

		CHECK(event.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_MINOR);
		CHECK_EQ(gw_install_fault(&bench->install, 0, true, &bench->again),
			 GW_INSTALL_DONE);
		CHECK_EQ(toucher_join(&toucher), first_word(0));
		/* 1 was mapped no more either. */
		CHECK_EQ(gw_install_fault(&bench->install, 1, true, &bench->again),
			 GW_INSTALL_DONE);
	}
	CHECK(guest_has_pattern(bench->guest.memory, 0));
	CHECK(guest_has_pattern(bench->guest.memory, 1));
	bench_destroy(bench);
}

/* A present page punched behind everybody's back, without an event: its fault reads zero. */
static void a_present_page_that_is_gone_reads_zero(void)
{
	struct bench *const bench = bench_create();
	struct toucher toucher;

	request(bench, 2, 1, GW_PAGE_REQUESTED_BULK);
	CHECK_EQ(install(bench, 2, 1), GW_INSTALL_DONE);
	CHECK_EQ(gw_sys_fallocate(bench->guest.ram_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
				  2 * (off_t)PAGE, (off_t)PAGE),
		 0);
	toucher_start(&toucher, &bench->guest, 2);
	CHECK_EQ(guest_next_fault(&bench->guest), 2);
	CHECK_EQ(gw_install_fault(&bench->install, 2, false, &bench->again), GW_INSTALL_DONE);
	CHECK_EQ(toucher_join(&toucher), 0);
	bench_destroy(bench);
}

static void *install_one(void *argument)
{
	struct bench *const bench = argument;

	CHECK_EQ(install(bench, 9, 1), GW_INSTALL_DONE);
	return NULL;
}

/* The install is parked after its claim; the guest gives the page back; the install must not land. */
static void remove_while_an_install_is_held_back(void)
{
	struct bench *const bench = bench_create();
	struct advice argument = {&bench->guest, 9, 1, MADV_REMOVE};
	struct pollfd poll_fd = {.fd = bench->guest.uffd, .events = POLLIN};
	pthread_t installer;
	pthread_t remover;

	request(bench, 9, 1, GW_PAGE_REQUESTED_BULK);
	gw_hook_hold("install.claimed");
	CHECK_EQ(pthread_create(&installer, NULL, install_one, bench), 0);
	CHECK(gw_hook_wait("install.claimed", 1, TIMEOUT_MS));
	CHECK_EQ(gw_page_map_get(bench->map, 9), GW_PAGE_INSTALLING);
	CHECK_EQ(pthread_create(&remover, NULL, advise, &argument), 0);
	CHECK_EQ(poll(&poll_fd, 1, TIMEOUT_MS), 1);
	/* The event waits: the ioctl says EAGAIN, on_again reads it, and the page is another's. */
	gw_hook_release("install.claimed");
	CHECK_EQ(pthread_join(installer, NULL), 0);
	CHECK_EQ(pthread_join(remover, NULL), 0);
	if (method == GW_INSTALL_COPY) {
		CHECK(bench->again_count > 0);
		CHECK_EQ(gw_page_map_get(bench->map, 9), GW_PAGE_REMOVED);
		CHECK_EQ(counter(bench, GW_COUNT_BULK_PAGE), 0);
	}
	/* By CONTINUE the content was filled before the event was read: it is there, then removed. */
	CHECK(!guest_cache_has(&bench->guest, 9));
	bench_destroy(bench);
}

/* As above, but the event is read between claim and ioctl: CONTINUE's fill must be taken back. */
static void remove_between_claim_and_ioctl(void)
{
	struct bench *const bench = bench_create();
	struct toucher toucher;
	pthread_t installer;

	request(bench, 9, 1, GW_PAGE_REQUESTED_BULK);
	gw_hook_hold("install.claimed");
	CHECK_EQ(pthread_create(&installer, NULL, install_one, bench), 0);
	CHECK(gw_hook_wait("install.claimed", 1, TIMEOUT_MS));
	advise_and_drain(bench, 9, 1, MADV_REMOVE);
	CHECK_EQ(gw_page_map_get(bench->map, 9), GW_PAGE_REMOVED);
	gw_hook_release("install.claimed");
	CHECK_EQ(pthread_join(installer, NULL), 0);
	CHECK_EQ(gw_page_map_get(bench->map, 9), GW_PAGE_REMOVED);
	CHECK_EQ(counter(bench, GW_COUNT_BULK_PAGE), 0);
	/* A page that is no longer ours is not copied to: the state is looked at before each ioctl. */
	CHECK(!guest_cache_has(&bench->guest, 9));
	toucher_start(&toucher, &bench->guest, 9);
	CHECK_EQ(guest_next_fault(&bench->guest), 9);
	CHECK_EQ(gw_install_fault(&bench->install, 9, false, &bench->again), GW_INSTALL_DONE);
	CHECK_EQ(toucher_join(&toucher), 0);
	bench_destroy(bench);
}

/* A second answer for a page that is being installed: dropped, whatever it says. */
static void a_second_answer_while_the_first_is_installed(void)
{
	struct bench *const bench = bench_create();
	static const uint8_t other[4096] = {1, 2, 3};
	pthread_t installer;

	request(bench, 9, 1, GW_PAGE_REQUESTED_DEMAND);
	gw_hook_hold("install.claimed");
	CHECK_EQ(pthread_create(&installer, NULL, install_one, bench), 0);
	CHECK(gw_hook_wait("install.claimed", 1, TIMEOUT_MS));
	CHECK_EQ(gw_install_run(&bench->install, 9, 1, other, &bench->again), GW_INSTALL_DONE);
	CHECK_EQ(gw_install_zero_run(&bench->install, 9, 1, &bench->again), GW_INSTALL_DONE);
	CHECK(!guest_cache_has(&bench->guest, 9));
	gw_hook_release("install.claimed");
	CHECK_EQ(pthread_join(installer, NULL), 0);
	CHECK(guest_has_pattern(bench->guest.memory, 9));
	CHECK_EQ(counter(bench, GW_COUNT_DUPLICATE_PAGE), 2);
	bench_destroy(bench);
}

static void *settle_zeros(void *argument)
{
	struct bench *const bench = argument;

	CHECK_EQ(gw_install_zeros_beyond(&bench->install, 0, 60, &bench->again), GW_INSTALL_DONE);
	return NULL;
}

/* ZERO and not yet published: a fault in between is answered all the same, and counted once. */
static void a_fault_on_zeros_that_are_not_published_yet(void)
{
	struct bench *const bench = bench_create();
	struct toucher toucher;
	pthread_t settler;

	gw_hook_hold("install.zeros");
	CHECK_EQ(pthread_create(&settler, NULL, settle_zeros, bench), 0);
	CHECK(gw_hook_wait("install.zeros", 1, TIMEOUT_MS));
	CHECK_EQ(gw_page_map_get(bench->map, 7), GW_PAGE_ZERO);
	CHECK(gw_bitmap_is_absent(gw_page_map_bitmap(bench->map), 7));
	toucher_start(&toucher, &bench->guest, 7);
	CHECK_EQ(guest_next_fault(&bench->guest), 7);
	CHECK_EQ(gw_install_fault(&bench->install, 7, false, &bench->again), GW_INSTALL_DONE);
	CHECK_EQ(toucher_join(&toucher), 0);
	CHECK(!gw_bitmap_is_absent(gw_page_map_bitmap(bench->map), 7));
	bench->guest.memory[7 * PAGE] = 7;
	gw_hook_release("install.zeros");
	CHECK_EQ(pthread_join(settler, NULL), 0);
	CHECK_EQ(bench->guest.memory[7 * PAGE], 7);
	CHECK_EQ(gw_page_map_get(bench->map, 7), GW_PAGE_PRESENT);
	CHECK_EQ(gw_page_map_get(bench->map, 8), GW_PAGE_ZERO);
	CHECK_EQ(absent_count(bench), PAGE_COUNT - 60);
	CHECK_EQ(counter(bench, GW_COUNT_ZERO_PAGE), 60);
	bench_destroy(bench);
}

static int stop(void *user)
{
	(void)user;
	return -ECANCELED;
}

static void a_stopped_install_leaves_nothing_half_done(void)
{
	struct bench *const bench = bench_create();

	bench->again.on_again = stop;
	request(bench, 0, 8, GW_PAGE_REQUESTED_BULK);
	gw_sys_fail_nth(GW_SYS_IOCTL, 1, EAGAIN);
	CHECK_EQ(install(bench, 0, 8), GW_INSTALL_STOPPED);
	for (uint64_t page = 0; page < 8; page++)
		CHECK_EQ(gw_page_map_get(bench->map, page),
			 method == GW_INSTALL_COPY ? GW_PAGE_ABSENT : GW_PAGE_FILLED);
	bench_destroy(bench);
}

/*
 * Each call of an install fails once, with each errno that could come: afterwards a page is PRESENT
 * with the source's bytes, or nobody has seen it and the map says so.
 */
static void whatever_fails_no_page_is_wrong(void)
{
	static const int errors[] = {EAGAIN, EINTR, ENOSPC, ENOMEM, ESRCH, EIO, EINVAL, EFAULT};

	for (size_t i = 0; i < sizeof(errors) / sizeof(errors[0]); i++) {
		for (uint64_t nth = 1;; nth++) {
			struct bench *const bench = bench_create();

			request(bench, 30, 16, GW_PAGE_REQUESTED_BULK);
			CHECK(gw_page_map_move(bench->map, 35, GW_PAGE_REQUESTED_BULK,
					       GW_PAGE_REQUESTED_DEMAND));
			gw_sys_fail_nth(GW_SYS_ANY, nth, errors[i]);
			(void)install(bench, 30, 16);
			const bool failed = gw_sys_failed();

			gw_sys_fail_none();
			for (uint64_t page = 30; page < 46; page++) {
				const uint8_t state = gw_page_map_get(bench->map, page);
				const bool there = guest_cache_has(&bench->guest, page);

				CHECK(state != GW_PAGE_INSTALLING);
				/* REMOVED: a CONTINUE that says EFAULT, and here it lied. */
				if (state != GW_PAGE_REMOVED)
					CHECK_EQ(there, state == GW_PAGE_PRESENT ||
								state == GW_PAGE_FILLED);
				CHECK_EQ(gw_bitmap_is_absent(gw_page_map_bitmap(bench->map), page),
					 state != GW_PAGE_PRESENT && state != GW_PAGE_REMOVED);
				/* Bytes, looked at through a mapping that cannot fault. */
				uint8_t bytes[PAGE];

				CHECK_EQ(gw_sys_pread(bench->guest.ram_fd, bytes, PAGE,
						      (off_t)(page * PAGE)),
					 (ssize_t)PAGE);
				if (there)
					CHECK_EQ(memcmp(bytes, patterns + page * PAGE, PAGE), 0);
			}
			bench_destroy(bench);
			if (!failed)
				break;
		}
	}
}

static void nonsense_is_refused(void)
{
	struct bench *const bench = bench_create();
	struct gw_install wrong;
	const int no_uffd = 0;
	struct gw_arrival_region regions[2] = {
		{.offset = 0, .host_addr = 0x10000, .len = 32 * PAGE},
		{.offset = 32 * PAGE, .host_addr = 0x900000, .len = 32 * PAGE},
	};
	uint64_t page = 0;

	CHECK_EQ(gw_install_init(&wrong, &no_uffd, 1, 0, PAGE, method, bench->map, regions, 2), 0);
	CHECK(gw_install_page_of(&wrong, 0x900000 + 5 * PAGE + 77, &page));
	CHECK_EQ(page, 37);
	CHECK(gw_install_page_of(&wrong, 0x10000, &page));
	CHECK_EQ(page, 0);
	CHECK(!gw_install_page_of(&wrong, 0x10000 + 32 * PAGE, &page));
	CHECK(!gw_install_page_of(&wrong, 0xffff, &page));
	CHECK_EQ(gw_install_init(&wrong, &no_uffd, 1, 0, PAGE, method, bench->map, regions, 1),
		 -EINVAL);
	CHECK_EQ(gw_install_init(&wrong, &no_uffd, 1, 0, 8192, method, bench->map, regions, 2),
		 -EINVAL);
	CHECK_EQ(gw_install_init(&wrong, &no_uffd, 1, 0, PAGE, 4, bench->map, regions, 2), -EINVAL);
	regions[1].offset = 33 * PAGE;
	CHECK_EQ(gw_install_init(&wrong, &no_uffd, 1, 0, PAGE, method, bench->map, regions, 2),
		 -EINVAL);
	regions[1].offset = 32 * PAGE;
	regions[1].host_addr += 8;
	CHECK_EQ(gw_install_init(&wrong, &no_uffd, 1, 0, PAGE, method, bench->map, regions, 2),
		 -EINVAL);
	CHECK_EQ(gw_install_run(&bench->install, PAGE_COUNT, 1, patterns, &bench->again), -EINVAL);
	bench_destroy(bench);
}

int main(void)
{
	uint64_t features = 0;

	guest_need_uffd();
	CHECK_EQ(gw_uffd_probe(&features), 0);
	for (uint64_t page = 0; page < PAGE_COUNT; page++)
		guest_pattern(page, patterns + page * PAGE);
	for (method = GW_INSTALL_COPY; method <= GW_INSTALL_CONTINUE; method++) {
		if (method == GW_INSTALL_CONTINUE && !(features & GW_UFFD_FEATURE_MINOR_SHMEM)) {
			check_need(false, "minor-shmem", "a kernel of 5.14 or later");
			continue;
		}
		fprintf(stderr, "%s\n", method == GW_INSTALL_COPY ? "copy" : "continue");
		RUN_FORKED(zeros_beyond_a_want_settle_what_is_absent);
		RUN_FORKED(requested_pages_are_installed_and_all_others_left_alone);
		RUN_FORKED(two_waiters_one_install);
		RUN_FORKED(a_page_touched_before_us_is_a_violation);
		RUN_FORKED(prepared_room_is_not_empty);
		RUN_FORKED(zeros_stay_holes_until_somebody_looks);
		RUN_FORKED(a_late_fault_on_a_present_page_is_only_woken);
		RUN_FORKED(what_the_guest_gives_back_reads_zero_and_is_never_fetched);
		RUN_FORKED(a_hint_that_loses_nothing_changes_nothing);
		RUN_FORKED(a_present_page_that_is_gone_reads_zero);
		RUN_FORKED(remove_while_an_install_is_held_back);
		RUN_FORKED(remove_between_claim_and_ioctl);
		RUN_FORKED(a_second_answer_while_the_first_is_installed);
		RUN_FORKED(a_fault_on_zeros_that_are_not_published_yet);
		RUN_FORKED(a_stopped_install_leaves_nothing_half_done);
		RUN_FORKED(whatever_fails_no_page_is_wrong);
		RUN_FORKED(nonsense_is_refused);
	}
	return EXIT_SUCCESS;
}
