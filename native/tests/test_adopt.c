/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_adopt.c - an agent dies, another reads its map and the page cache together.
 *
 * The guest is this process; the agent that dies is a child: userfaultfd ioctls act on the memory of
 * who created the fd, whoever calls them, which is how a real agent works on a VMM's.
 */
#include "guest.h"

#include <godwit/install.h>

#include "page_map_internal.h"

#define PAGE_COUNT 16

static uint32_t method = GW_INSTALL_COPY;
static uint8_t patterns[PAGE_COUNT * 4096];
static char path[64];

struct bench {
	struct guest guest;
	struct gw_page_map *map;
	struct gw_install install;
	struct gw_install_again again;
};

static int drain(void *user)
{
	const struct guest *const guest = user;
	struct uffd_msg event;

	while (gw_uffd_read(guest->uffd, &event, 1) == 1)
		;
	return 0;
}

static struct gw_page_map_identity identity_now(void)
{
	return (struct gw_page_map_identity){
		.epoch = 1,
		.page_count = PAGE_COUNT,
		.page_size = PAGE,
		.install_method = method,
		.image_id = "vm",
	};
}

static struct guest guest_of_method(void)
{
	return guest_create(PAGE_COUNT, GW_UFFD_FEATURE_EVENT_REMOVE | GW_UFFD_FEATURE_MINOR_SHMEM,
			    method == GW_INSTALL_COPY
				    ? UFFDIO_REGISTER_MODE_MISSING
				    : UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR);
}

static void bench_open(struct bench *bench, const struct guest *guest, bool adopt)
{
	const struct gw_page_map_identity identity = identity_now();
	const struct gw_arrival_region region = {
		.host_addr = guest_address(guest, 0),
		.len = PAGE_COUNT * PAGE,
	};

	bench->guest = *guest;
	bench->again = (struct gw_install_again){.on_again = drain, .user = &bench->guest};
	if (adopt)
		CHECK_EQ(gw_page_map_adopt(path, &identity, &bench->map), 0);
	else
		CHECK_EQ(gw_page_map_create(path, &identity, &bench->map), 0);
	CHECK_EQ(gw_install_init(&bench->install, &bench->guest.uffd, 1, guest->ram_fd, PAGE,
				 method, bench->map, &region, 1),
		 0);
}

static void bench_close(struct bench *bench)
{
	gw_install_fini(&bench->install);
	gw_page_map_destroy(bench->map);
}

static void die(void *argument)
{
	(void)argument;
	_exit(137);
}

/* In a child: ask for pages 4 to 7, install them, and die at `point`. */
static void agent_that_dies_at(const struct guest *guest, const char *point)
{
	int status = 0;
	const pid_t pid = fork();

	CHECK(pid >= 0);
	if (pid == 0) {
		struct bench bench;

		bench_open(&bench, guest, false);
		gw_hook_call(point, die, NULL);
		CHECK_EQ(gw_page_map_move_run(bench.map, 4, 4, GW_PAGE_ABSENT,
					      GW_PAGE_REQUESTED_BULK),
			 4);
		CHECK_EQ(gw_page_map_move_run(bench.map, 8, 1, GW_PAGE_ABSENT,
					      GW_PAGE_REQUESTED_DEMAND),
			 1);
		(void)gw_install_run(&bench.install, 4, 4, patterns + 4 * PAGE, &bench.again);
		_exit(0);
	}
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	CHECK(WIFEXITED(status));
	CHECK_EQ(WEXITSTATUS(status), 137);
}

static void adoption_after_a_kill_at(const char *point)
{
	struct guest guest = guest_of_method();
	struct bench bench;
	struct toucher toucher;

	fprintf(stderr, "    %s\n", point);
	agent_that_dies_at(&guest, point);
	/* A waiter whose event the dead one had read: it is told by waking everybody. */
	toucher_start(&toucher, &guest, 10);
	CHECK_EQ(guest_next_fault(&guest), 10);

	bench_open(&bench, &guest, true);
	CHECK_EQ(gw_install_adopt(&bench.install, &bench.again), 0);
	CHECK_EQ(gw_install_adopt(&bench.install, &bench.again), 0); /* and again */
	CHECK_EQ(gw_page_map_counter(bench.map, GW_COUNT_VIOLATION), 0);
	CHECK_EQ(gw_install_wake_all(&bench.install), 0);
	CHECK_EQ(guest_next_fault(&guest), 10);
	for (uint64_t page = 0; page < PAGE_COUNT; page++) {
		const uint8_t state = gw_page_map_get(bench.map, page);

		CHECK(state == GW_PAGE_ABSENT || state == GW_PAGE_PRESENT);
		CHECK_EQ(guest_cache_has(&guest, page), state == GW_PAGE_PRESENT);
		CHECK_EQ(gw_bitmap_is_absent(gw_page_map_bitmap(bench.map), page),
			 state == GW_PAGE_ABSENT);
		if (state == GW_PAGE_PRESENT)
			CHECK(page >= 4 && page < 8);
		/* Asked for again, installed: nothing is installed twice, nothing is left out. */
		if (state == GW_PAGE_ABSENT)
			CHECK(gw_page_map_move(bench.map, page, GW_PAGE_ABSENT,
					       GW_PAGE_REQUESTED_DEMAND));
	}
	CHECK_EQ(gw_install_run(&bench.install, 0, PAGE_COUNT, patterns, &bench.again),
		 GW_INSTALL_DONE);
	CHECK_EQ(toucher_join(&toucher), first_word(10));
	CHECK_EQ(gw_bitmap_absent_count(gw_page_map_bitmap(bench.map)), 0);
	CHECK_EQ(gw_page_map_counter(bench.map, GW_COUNT_VIOLATION), 0);
	for (uint64_t page = 0; page < PAGE_COUNT; page++)
		CHECK(guest_has_pattern(guest.memory, page));
	bench_close(&bench);
	CHECK_EQ(gw_page_map_unlink(path), 0);
	guest_destroy(&guest);
}

static void adoption_after_a_kill_at_each_step(void)
{
	adoption_after_a_kill_at("install.claimed");
	adoption_after_a_kill_at("install.copied");
	if (method == GW_INSTALL_CONTINUE)
		adoption_after_a_kill_at("install.filled");
	adoption_after_a_kill_at("install.present");
	adoption_after_a_kill_at("install.published");
}

/* Killed before it has its name: there is nothing to adopt, and a new one can be made. */
static void a_map_killed_before_it_is_whole_is_none(void)
{
	const struct gw_page_map_identity identity = identity_now();
	struct gw_page_map *map = NULL;
	int status = 0;
	const pid_t pid = fork();

	CHECK(pid >= 0);
	if (pid == 0) {
		gw_hook_call("page_map.filled", die, NULL);
		(void)gw_page_map_create(path, &identity, &map);
		_exit(0);
	}
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	CHECK_EQ(WEXITSTATUS(status), 137);
	CHECK_EQ(gw_page_map_adopt(path, &identity, &map), -ENOENT);
	CHECK_EQ(gw_page_map_create(path, &identity, &map), 0);
	gw_page_map_destroy(map);
	CHECK_EQ(gw_page_map_unlink(path), 0);
}

/* The table of install.h, row by row: state, what the page cache has, what comes of it. */
static void the_table(void)
{
	enum { HOLE, DATA };
	static const struct {
		uint8_t state;
		int cache;
		uint8_t want_copy; /* 0: violation */
		uint8_t want_continue;
	} rows[] = {
		{GW_PAGE_ABSENT, HOLE, GW_PAGE_ABSENT, GW_PAGE_ABSENT},
		{GW_PAGE_ABSENT, DATA, 0, 0},
		{GW_PAGE_REQUESTED_BULK, HOLE, GW_PAGE_ABSENT, GW_PAGE_ABSENT},
		{GW_PAGE_REQUESTED_BULK, DATA, 0, 0},
		{GW_PAGE_REQUESTED_DEMAND, HOLE, GW_PAGE_ABSENT, GW_PAGE_ABSENT},
		{GW_PAGE_REQUESTED_DEMAND, DATA, 0, 0},
		{GW_PAGE_INSTALLING, HOLE, GW_PAGE_ABSENT, GW_PAGE_ABSENT},
		{GW_PAGE_INSTALLING, DATA, GW_PAGE_PRESENT, GW_PAGE_ABSENT},
		{GW_PAGE_FILLED, HOLE, 0, GW_PAGE_REMOVED},
		{GW_PAGE_FILLED, DATA, 0, GW_PAGE_PRESENT},
		{GW_PAGE_PRESENT, HOLE, GW_PAGE_REMOVED, GW_PAGE_REMOVED},
		{GW_PAGE_PRESENT, DATA, GW_PAGE_PRESENT, GW_PAGE_PRESENT},
		{GW_PAGE_ZERO, HOLE, GW_PAGE_ZERO, GW_PAGE_ZERO},
		{GW_PAGE_ZERO, DATA, GW_PAGE_PRESENT, GW_PAGE_PRESENT},
		{GW_PAGE_REMOVED, HOLE, GW_PAGE_REMOVED, GW_PAGE_REMOVED},
		{GW_PAGE_REMOVED, DATA, GW_PAGE_REMOVED, GW_PAGE_REMOVED},
		{GW_PAGE_POISONED, HOLE, GW_PAGE_POISONED, GW_PAGE_POISONED},
		{0, HOLE, 0, 0},
		{0x55, DATA, 0, 0},
	};

	for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
		const uint8_t want = method == GW_INSTALL_COPY ? rows[i].want_copy
							       : rows[i].want_continue;
		struct guest guest = guest_of_method();
		struct bench bench;

		bench_open(&bench, &guest, false);
		atomic_store(&bench.map->states[3], rows[i].state);
		if (rows[i].cache == DATA)
			CHECK_EQ(gw_sys_pwrite(guest.ram_fd, patterns, PAGE, 3 * (off_t)PAGE),
				 (ssize_t)PAGE);
		CHECK_EQ(gw_install_adopt(&bench.install, &bench.again), want ? 0 : -ENOTEMPTY);
		CHECK_EQ(gw_page_map_is_violated(bench.map), want == 0);
		if (want) {
			CHECK_EQ(gw_page_map_get(bench.map, 3), want);
			CHECK_EQ(gw_bitmap_is_absent(gw_page_map_bitmap(bench.map), 3),
				 !gw_page_state_is_final(want));
			CHECK_EQ(gw_page_map_counter(bench.map, GW_COUNT_VIOLATION), 0);
		}
		if (want == GW_PAGE_ABSENT)
			CHECK(!guest_cache_has(&guest, 3));
		/* Everything else is as it was. */
		CHECK_EQ(gw_page_map_get(bench.map, 2), GW_PAGE_ABSENT);
		bench_close(&bench);
		CHECK_EQ(gw_page_map_unlink(path), 0);
		guest_destroy(&guest);
	}
}

/* A violation is not forgotten by dying. */
static void a_violated_map_stays_violated(void)
{
	struct guest guest = guest_of_method();
	struct bench bench;

	bench_open(&bench, &guest, false);
	gw_install_violate(&bench.install);
	bench_close(&bench);
	bench_open(&bench, &guest, true);
	CHECK_EQ(gw_install_adopt(&bench.install, &bench.again), 0);
	CHECK(gw_page_map_move(bench.map, 1, GW_PAGE_ABSENT, GW_PAGE_REQUESTED_BULK));
	CHECK_EQ(gw_install_run(&bench.install, 1, 1, patterns, &bench.again), GW_INSTALL_VIOLATED);
	CHECK(!guest_cache_has(&guest, 1));
	bench_close(&bench);
	CHECK_EQ(gw_page_map_unlink(path), 0);
	guest_destroy(&guest);
}

int main(void)
{
	uint64_t features = 0;

	guest_need_uffd();
	CHECK_EQ(gw_uffd_probe(&features), 0);
	(void)snprintf(path, sizeof(path), "/dev/shm/gw-test-adopt-%d", (int)getpid());
	guest_left_path = path;
	for (uint64_t page = 0; page < PAGE_COUNT; page++)
		guest_pattern(page, patterns + page * PAGE);
	for (method = GW_INSTALL_COPY; method <= GW_INSTALL_CONTINUE; method++) {
		if (method == GW_INSTALL_CONTINUE && !(features & GW_UFFD_FEATURE_MINOR_SHMEM)) {
			check_need(false, "minor-shmem", "a kernel of 5.14 or later");
			continue;
		}
		fprintf(stderr, "%s\n", method == GW_INSTALL_COPY ? "copy" : "continue");
		RUN_FORKED(adoption_after_a_kill_at_each_step);
		RUN_FORKED(a_map_killed_before_it_is_whole_is_none);
		RUN_FORKED(the_table);
		RUN_FORKED(a_violated_map_stays_violated);
	}
	return EXIT_SUCCESS;
}
