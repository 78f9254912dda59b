/* SPDX-License-Identifier: Apache-2.0 */
/* test_page_map.c - the table of moves, the files, and that every failing call leaves nothing. */
#include "check.h"

#include <errno.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <godwit/arrival.h>
#include <godwit/sys.h>

#include "page_map_internal.h"

#define PAGE_COUNT 1000

static char path[64];
static const struct gw_page_map_identity identity = {
	.epoch = 7,
	.page_count = PAGE_COUNT,
	.page_size = 4096,
	.install_method = GW_INSTALL_COPY,
	.image_id = "vm-1",
};

static bool exists(const char *suffix)
{
	char name[128];

	(void)snprintf(name, sizeof(name), "%s%s", path, suffix);
	return access(name, F_OK) == 0;
}

static struct gw_page_map *created(void)
{
	struct gw_page_map *map = NULL;

	CHECK_EQ(gw_page_map_create(path, &identity, &map), 0);
	return map;
}

/* The whole product, from the design's prose: what may follow what. */
static void only_legal_moves_are_made(void)
{
	static const char *const may_follow[GW_PAGE_STATE_COUNT] = {
		[GW_PAGE_ABSENT] = "\2\3\7\10\11", /* both REQUESTED, ZERO, REMOVED, POISONED */
		[GW_PAGE_REQUESTED_BULK] = "\1\3\4\7\10",
		[GW_PAGE_REQUESTED_DEMAND] = "\1\4\7\10\11",
		[GW_PAGE_INSTALLING] = "\1\5\6\10",
		[GW_PAGE_FILLED] = "\4\6\10",
		[GW_PAGE_PRESENT] = "\10",
		[GW_PAGE_ZERO] = "\6",
		[GW_PAGE_REMOVED] = "",
		[GW_PAGE_POISONED] = "",
	};
	struct gw_page_map *const map = created();
	uint64_t violation_count = 0;

	for (uint8_t from = 0; from < GW_PAGE_STATE_COUNT + 2; from++) {
		for (uint8_t to = 0; to < GW_PAGE_STATE_COUNT + 2; to++) {
			const bool legal = from > 0 && from < GW_PAGE_STATE_COUNT && to > 0 &&
					   strchr(may_follow[from], to) != NULL;

			atomic_store(&map->states[3], from);
			CHECK_EQ(gw_page_state_may_move(from, to), legal);
			CHECK_EQ(gw_page_map_move(map, 3, from, to), legal);
			CHECK_EQ(gw_page_map_get(map, 3), legal ? to : from);
			violation_count += !legal;
			CHECK_EQ(gw_page_map_counter(map, GW_COUNT_VIOLATION), violation_count);
			/* Legal, and not in `from`: no move and no violation. */
			atomic_store(&map->states[3], 0x77);
			if (legal)
				CHECK(!gw_page_map_move(map, 3, from, to));
		}
	}
	CHECK_EQ(gw_page_map_counter(map, GW_COUNT_VIOLATION), violation_count);
	gw_page_map_destroy(map);
	CHECK_EQ(gw_page_map_unlink(path), 0);
}

static void a_run_moves_until_the_first_that_is_elsewhere(void)
{
	struct gw_page_map *const map = created();

	CHECK_EQ(gw_page_map_move_run(map, 10, 20, GW_PAGE_ABSENT, GW_PAGE_REQUESTED_BULK), 20);
	CHECK(gw_page_map_move(map, 15, GW_PAGE_REQUESTED_BULK, GW_PAGE_REQUESTED_DEMAND));
	CHECK_EQ(gw_page_map_move_run(map, 10, 20, GW_PAGE_REQUESTED_BULK, GW_PAGE_INSTALLING), 5);
	CHECK_EQ(gw_page_map_move_run(map, 15, 20, GW_PAGE_REQUESTED_BULK, GW_PAGE_INSTALLING), 0);
	CHECK_EQ(gw_page_map_get(map, 9), GW_PAGE_ABSENT);
	CHECK_EQ(gw_page_map_get(map, 14), GW_PAGE_INSTALLING);
	CHECK_EQ(gw_page_map_get(map, 16), GW_PAGE_REQUESTED_BULK);
	gw_page_map_destroy(map);
	CHECK_EQ(gw_page_map_unlink(path), 0);
}

static void an_adopter_finds_what_was_left(void)
{
	struct gw_page_map *map = created();
	struct gw_page_map *other = NULL;
	struct gw_page_map_identity wrong = identity;

	CHECK_EQ(gw_page_map_create(path, &identity, &other), -EEXIST);
	CHECK_EQ(gw_bitmap_absent_count(gw_page_map_bitmap(map)), PAGE_COUNT);
	CHECK(gw_page_map_move(map, 5, GW_PAGE_ABSENT, GW_PAGE_REQUESTED_DEMAND));
	gw_bitmap_publish(gw_page_map_bitmap(map), 8, 2);
	gw_page_map_count(map, GW_COUNT_DEMAND_PAGE, 41);
	CHECK_EQ(gw_page_map_generation(map), 0);
	CHECK_EQ(gw_page_map_set_generation(map, 0), -EINVAL);
	CHECK_EQ(gw_page_map_set_generation(map, 3), 0);
	CHECK_EQ(gw_page_map_set_generation(map, 3), 0);
	CHECK_EQ(gw_page_map_set_generation(map, 4), -EALREADY);
	gw_page_map_set_violated(map);
	gw_page_map_destroy(map);

	wrong.epoch = 8;
	CHECK_EQ(gw_page_map_adopt(path, &wrong, &map), -ESTALE);
	wrong = identity;
	wrong.page_count = PAGE_COUNT - 1;
	CHECK_EQ(gw_page_map_adopt(path, &wrong, &map), -ESTALE);
	wrong = identity;
	wrong.image_id = "vm-2";
	CHECK_EQ(gw_page_map_adopt(path, &wrong, &map), -ESTALE);
	wrong = identity;
	wrong.install_method = GW_INSTALL_CONTINUE;
	CHECK_EQ(gw_page_map_adopt(path, &wrong, &map), -ESTALE);

	CHECK_EQ(gw_page_map_adopt(path, &identity, &map), 0);
	CHECK_EQ(gw_page_map_get(map, 5), GW_PAGE_REQUESTED_DEMAND);
	CHECK_EQ(gw_page_map_get(map, 6), GW_PAGE_ABSENT);
	CHECK_EQ(gw_bitmap_absent_count(gw_page_map_bitmap(map)), PAGE_COUNT - 2);
	CHECK_EQ(gw_page_map_counter(map, GW_COUNT_DEMAND_PAGE), 41);
	CHECK_EQ(gw_page_map_generation(map), 3);
	CHECK(gw_page_map_is_violated(map));
	CHECK(!gw_page_map_is_complete(map));
	gw_page_map_destroy(map);

	CHECK_EQ(truncate(path, 4096), 0);
	CHECK_EQ(gw_page_map_adopt(path, &identity, &map), -ESTALE);
	CHECK_EQ(gw_page_map_unlink(path), 0);
	CHECK_EQ(gw_page_map_adopt(path, &identity, &map), -ENOENT);
}

static void nonsense_is_refused(void)
{
	struct gw_page_map *map = NULL;
	struct gw_page_map_identity wrong = identity;

	wrong.page_count = 0;
	CHECK_EQ(gw_page_map_create(path, &wrong, &map), -EINVAL);
	wrong = identity;
	wrong.epoch = 0;
	CHECK_EQ(gw_page_map_create(path, &wrong, &map), -EINVAL);
	wrong = identity;
	wrong.image_id = "";
	CHECK_EQ(gw_page_map_create(path, &wrong, &map), -EINVAL);
	CHECK_EQ(gw_page_map_create("", &identity, &map), -EINVAL);
	CHECK_EQ(gw_page_map_create("/nowhere/at/all", &identity, &map), -ENOENT);
	CHECK(!map);
	gw_page_map_destroy(NULL);
}

/* Fail each call that create makes: an error comes back, and no map is there under its name. */
static void a_failing_call_leaves_no_map(void)
{
	const uint64_t before = gw_sys_count(GW_SYS_ANY);

	gw_page_map_destroy(created());
	const uint64_t call_count = gw_sys_count(GW_SYS_ANY) - before;

	CHECK_EQ(gw_page_map_unlink(path), 0);
	for (uint64_t nth = 1; nth <= call_count; nth++) {
		struct gw_page_map *map = NULL;

		gw_sys_fail_nth(GW_SYS_ANY, nth, EIO);
		const int err = gw_page_map_create(path, &identity, &map);

		gw_sys_fail_none();
		/* close and munmap fail without a consequence. */
		CHECK(err == -EIO || err == 0);
		CHECK_EQ(err == 0, map != NULL);
		CHECK_EQ(exists(""), err == 0);
		CHECK(!exists(".new"));
		gw_page_map_destroy(map);
		(void)gw_page_map_unlink(path);
	}
}

/* Eight threads fight for each page; one gets it. */
#define FIGHTER_COUNT 8
static void *fight(void *argument)
{
	struct gw_page_map *const map = argument;
	uint64_t won_count = 0;

	for (uint64_t page = 0; page < PAGE_COUNT; page++)
		won_count +=
			gw_page_map_move(map, page, GW_PAGE_REQUESTED_BULK, GW_PAGE_INSTALLING);
	return (void *)(uintptr_t)won_count; /* NOLINT(performance-no-int-to-ptr) */
}

static void one_thread_wins_each_page(void)
{
	struct gw_page_map *const map = created();
	pthread_t threads[FIGHTER_COUNT];
	uint64_t won_count = 0;

	CHECK_EQ(gw_page_map_move_run(map, 0, PAGE_COUNT, GW_PAGE_ABSENT, GW_PAGE_REQUESTED_BULK),
		 PAGE_COUNT);
	for (int i = 0; i < FIGHTER_COUNT; i++)
		CHECK_EQ(pthread_create(&threads[i], NULL, fight, map), 0);
	for (int i = 0; i < FIGHTER_COUNT; i++) {
		void *won = NULL;

		CHECK_EQ(pthread_join(threads[i], &won), 0);
		won_count += (uintptr_t)won;
	}
	CHECK_EQ(won_count, PAGE_COUNT);
	CHECK_EQ(gw_page_map_counter(map, GW_COUNT_VIOLATION), 0);
	gw_page_map_destroy(map);
	CHECK_EQ(gw_page_map_unlink(path), 0);
}

int main(void)
{
	(void)snprintf(path, sizeof(path), "/dev/shm/gw-test-map-%d", (int)getpid());
	RUN(only_legal_moves_are_made);
	RUN(a_run_moves_until_the_first_that_is_elsewhere);
	RUN(an_adopter_finds_what_was_left);
	RUN(nonsense_is_refused);
	RUN(a_failing_call_leaves_no_map);
	RUN(one_thread_wins_each_page);
	return EXIT_SUCCESS;
}
