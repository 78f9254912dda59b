/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_importer.c - a private page is fetched, imported, flipped and published, in this order and no
 * other: for one page, for runs, for many vCPUs at once, and after a failure of every step. And the
 * shim that says so is not blind: each wrong order is caught.
 */
#include <errno.h>
#include <pthread.h>

#include <godwit/importer.h>
#include <godwit/sys.h>

#include "check.h"
#include "private_shim.h"

#define PAGES	PRIVATE_PAGE_COUNT
#define LEN	PRIVATE_PAGE_LEN
#define WAIT_MS 60000

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

static const int passing_errors[] = {-EAGAIN, -EINTR, -EBUSY, -ENOMEM};
static const int lasting_errors[] = {-EIO, -EINVAL, -EFAULT, -EPERM, -ENOTTY, -EEXIST};

struct fixture {
	struct private_shim shim;
	struct gw_importer *importer;
	uint8_t data[PAGES * LEN];
};

static void set_up(struct fixture *fixture)
{
	static const struct gw_private_run all = {.first = 0, .count = PAGES};

	memset(fixture, 0, sizeof(*fixture));
	shim_init(&fixture->shim);
	CHECK_EQ(gw_importer_create(PAGES, &all, 1, &shim_ops, &fixture->shim, &fixture->importer),
		 0);
}

static void tear_down(struct fixture *fixture)
{
	if (fixture->shim.broken[0])
		fprintf(stderr, "  broken: %s\n  %s\n", fixture->shim.broken, fixture->shim.log);
	CHECK(fixture->shim.broken[0] == 0);
	gw_importer_destroy(fixture->importer);
}

static void fetch(struct fixture *fixture, uint64_t first, uint64_t count)
{
	shim_fetch(&fixture->shim, first, count, fixture->data + first * LEN);
}

static int run(struct fixture *fixture, uint64_t first, uint64_t count)
{
	return gw_importer_run(fixture->importer, first, count, fixture->data + first * LEN, LEN);
}

static void check_log(struct fixture *fixture, const char *want)
{
	if (strcmp(fixture->shim.log, want) != 0)
		fprintf(stderr, "  got  %s\n  want %s\n", fixture->shim.log, want);
	CHECK(strcmp(fixture->shim.log, want) == 0);
	fixture->shim.log[0] = 0;
}

static void is_in(const struct fixture *fixture, uint64_t page, enum gw_private_state state)
{
	CHECK_EQ(gw_importer_state(fixture->importer, page), state);
	CHECK_EQ(fixture->shim.pages[page].is_clear,
		 state == GW_PRIVATE_PRESENT || state == GW_PRIVATE_GIVEN_BACK);
}

static void one_page_in_order(void)
{
	struct fixture f;

	set_up(&f);
	fetch(&f, 5, 1);
	CHECK_EQ(run(&f, 5, 1), GW_IMPORTER_DONE);
	check_log(&f, "fetch 5+1 import 5+1 private 5+1 publish 5+1 ");
	is_in(&f, 5, GW_PRIVATE_PRESENT);
	is_in(&f, 4, GW_PRIVATE_ABSENT);
	CHECK_EQ(gw_importer_left_count(f.importer), PAGES - 1);
	/* Content that comes again, by the other lane say. */
	CHECK_EQ(run(&f, 5, 1), GW_IMPORTER_DONE);
	check_log(&f, "");
	tear_down(&f);
}

static void runs_in_order(void)
{
	struct fixture f;

	set_up(&f);
	fetch(&f, 3, 8);
	CHECK_EQ(run(&f, 3, 8), GW_IMPORTER_DONE);
	check_log(&f, "fetch 3+8 import 3+8 private 3+8 publish 3+8 ");
	/* Around what is there, and where the kernel takes a part only. */
	fetch(&f, 0, 3);
	fetch(&f, 11, 5);
	f.shim.import_max = 2;
	CHECK_EQ(run(&f, 0, 16), GW_IMPORTER_DONE);
	check_log(&f, "fetch 0+3 fetch 11+5 import 0+2 private 0+2 publish 0+2 "
		      "import 2+1 private 2+1 publish 2+1 import 11+5 private 11+5 publish 11+5 ");
	CHECK_EQ(gw_importer_left_count(f.importer), PAGES - 16);
	tear_down(&f);
}

static void a_passing_failure_of_the_import_leaves_the_page_absent(void)
{
	for (size_t i = 0; i < COUNT(passing_errors); i++) {
		struct fixture f;

		set_up(&f);
		fetch(&f, 0, 4);
		f.shim.import_error = passing_errors[i];
		CHECK_EQ(run(&f, 0, 4), GW_IMPORTER_AGAIN);
		for (uint64_t page = 0; page < 4; page++)
			is_in(&f, page, GW_PRIVATE_ABSENT);
		CHECK_EQ(gw_importer_left_count(f.importer), PAGES);
		f.shim.log[0] = 0;
		CHECK_EQ(run(&f, 0, 4), GW_IMPORTER_DONE);
		check_log(&f, "import 0+4 private 0+4 publish 0+4 ");
		tear_down(&f);
	}
}

/* Nobody knows what is in the page: it is never flipped, its neighbours are not touched by that. */
static void a_lasting_failure_of_the_import_holds_the_page(void)
{
	for (size_t i = 0; i < COUNT(lasting_errors); i++)
		for (int done = 0; done < 2; done++) {
			struct fixture f;

			set_up(&f);
			fetch(&f, 0, 3);
			f.shim.import_error = lasting_errors[i];
			f.shim.import_done = done;
			CHECK_EQ(run(&f, 0, 3), GW_IMPORTER_HELD);
			is_in(&f, 0, GW_PRIVATE_HELD);
			is_in(&f, 1, GW_PRIVATE_PRESENT);
			is_in(&f, 2, GW_PRIVATE_PRESENT);
			f.shim.log[0] = 0;
			CHECK_EQ(run(&f, 0, 1), GW_IMPORTER_HELD);
			CHECK_EQ(gw_importer_settle(f.importer, 0, 1), GW_IMPORTER_HELD);
			check_log(&f, "");
			/* The operator says: once more. What had happened is success now. */
			CHECK_EQ(gw_importer_retry_held(f.importer, 0), 0);
			CHECK_EQ(gw_importer_retry_held(f.importer, 0), -EINVAL);
			is_in(&f, 0, GW_PRIVATE_DOUBTFUL);
			CHECK_EQ(run(&f, 0, 1), GW_IMPORTER_DONE);
			check_log(&f, done ? "import 0+1=-17 private 0+1 publish 0+1 "
					   : "import 0+1 private 0+1 publish 0+1 ");
			is_in(&f, 0, GW_PRIVATE_PRESENT);
			tear_down(&f);
		}
}

/* The content is in: it is never imported again, never fetched again, and never seen before the flip. */
static void a_failure_of_the_flip_leaves_the_import(void)
{
	static const int *const errors[] = {passing_errors, lasting_errors};

	for (unsigned int lasting = 0; lasting < 2; lasting++)
		for (size_t i = 0; i < 4; i++) {
			struct fixture f;

			set_up(&f);
			fetch(&f, 7, 2);
			f.shim.flip_error = errors[lasting][i];
			CHECK_EQ(run(&f, 7, 2), lasting ? GW_IMPORTER_HELD : GW_IMPORTER_AGAIN);
			is_in(&f, 7, GW_PRIVATE_IMPORTED);
			is_in(&f, 8, GW_PRIVATE_IMPORTED);
			CHECK_EQ(gw_importer_left_count(f.importer), PAGES);
			f.shim.log[0] = 0;
			/* With content or without. */
			CHECK_EQ(i % 2 ? run(&f, 7, 2) : gw_importer_settle(f.importer, 7, 2),
				 GW_IMPORTER_DONE);
			check_log(&f, "private 7+2 publish 7+2 ");
			is_in(&f, 7, GW_PRIVATE_PRESENT);
			tear_down(&f);
		}
}

static void steps_that_lie_hold_the_pages(void)
{
	struct fixture f;

	set_up(&f);
	fetch(&f, 0, 2);
	f.shim.import_error = 3;
	CHECK_EQ(run(&f, 0, 2), GW_IMPORTER_HELD);
	is_in(&f, 0, GW_PRIVATE_HELD);
	is_in(&f, 1, GW_PRIVATE_HELD);
	f.shim.import_max = 0;
	fetch(&f, 2, 1);
	CHECK_EQ(run(&f, 2, 1), GW_IMPORTER_AGAIN);
	is_in(&f, 2, GW_PRIVATE_ABSENT);
	tear_down(&f);
}

/* A page that was there before us is not the source's: EEXIST on a first attempt holds it. */
static void content_that_is_not_ours_is_not_published(void)
{
	struct fixture f;

	set_up(&f);
	fetch(&f, 9, 1);
	f.shim.import_error = -EEXIST;
	CHECK_EQ(run(&f, 9, 1), GW_IMPORTER_HELD);
	is_in(&f, 9, GW_PRIVATE_HELD);
	CHECK_EQ(f.shim.pages[9].flip_count, 0);
	tear_down(&f);
}

/*
 * The agent dies: what it had brought is in the VMM's record; its successor brings what is wanted still,
 * or all of it again, and nothing is imported twice.
 */
static void a_new_agent_brings_only_what_is_missing(void)
{
	struct fixture f;

	set_up(&f);
	fetch(&f, 0, 4);
	f.shim.flip_error = -EINTR;
	CHECK_EQ(run(&f, 0, 2), GW_IMPORTER_AGAIN);
	f.shim.log[0] = 0;
	CHECK_EQ(gw_importer_settle(f.importer, 0, 4), GW_IMPORTER_AGAIN);
	check_log(&f, "private 0+2 publish 0+2 ");
	CHECK_EQ(run(&f, 0, 4), GW_IMPORTER_DONE);
	check_log(&f, "import 2+2 private 2+2 publish 2+2 ");
	tear_down(&f);
}

struct caller {
	pthread_t thread;
	struct fixture *fixture;
	uint64_t first, count;
	int result;
};

static void *call_run(void *argument)
{
	struct caller *const caller = argument;

	caller->result = run(caller->fixture, caller->first, caller->count);
	return NULL;
}

static void start(struct caller *caller, struct fixture *fixture, uint64_t first, uint64_t count)
{
	*caller = (struct caller){.fixture = fixture, .first = first, .count = count};
	CHECK_EQ(pthread_create(&caller->thread, NULL, call_run, caller), 0);
}

/* Four vCPUs fault on one page, both lanes bring it: who comes second leaves it to the first. */
static void one_import_whoever_asks(void)
{
	struct fixture f;
	struct caller first, others[3];

	set_up(&f);
	for (unsigned int i = 0; i < 4; i++)
		fetch(&f, 20, 1);
	gw_hook_hold("importer.imported");
	start(&first, &f, 20, 1);
	CHECK(gw_hook_wait("importer.imported", 1, WAIT_MS));
	for (unsigned int i = 0; i < COUNT(others); i++) {
		start(&others[i], &f, 20, 1);
		CHECK_EQ(pthread_join(others[i].thread, NULL), 0);
		CHECK_EQ(others[i].result, GW_IMPORTER_DONE);
	}
	/* Between the steps nobody sees it. */
	is_in(&f, 20, GW_PRIVATE_FLIPPING);
	CHECK(!f.shim.pages[20].is_private);
	gw_hook_release("importer.imported");
	CHECK_EQ(pthread_join(first.thread, NULL), 0);
	CHECK_EQ(first.result, GW_IMPORTER_DONE);
	is_in(&f, 20, GW_PRIVATE_PRESENT);
	CHECK_EQ(f.shim.pages[20].import_count, 1);
	CHECK_EQ(f.shim.pages[20].flip_count, 1);
	tear_down(&f);
}

static void *call_runs(void *argument)
{
	struct caller *const caller = argument;
	uint64_t random = caller->first * 2654435761U + 1;

	for (unsigned int i = 0; i < 4000; i++) {
		random = random * 6364136223846793005ULL + 1442695040888963407ULL;
		const uint64_t first = (random >> 33) % PAGES;
		const uint64_t count = 1 + (random >> 45) % 9;
		const int result =
			run(caller->fixture, first, count < PAGES - first ? count : PAGES - first);

		CHECK_EQ(result, GW_IMPORTER_DONE);
	}
	return NULL;
}

/* Overlapping runs from four threads: every page exactly once through every step. */
static void many_runs_at_once(void)
{
	for (unsigned int round = 0; round < 20; round++) {
		struct fixture f;
		struct caller callers[4];

		set_up(&f);
		fetch(&f, 0, PAGES);
		for (unsigned int i = 0; i < COUNT(callers); i++) {
			callers[i] = (struct caller){.fixture = &f, .first = round * 4 + i};
			CHECK_EQ(pthread_create(&callers[i].thread, NULL, call_runs, &callers[i]),
				 0);
		}
		for (unsigned int i = 0; i < COUNT(callers); i++)
			CHECK_EQ(pthread_join(callers[i].thread, NULL), 0);
		CHECK_EQ(gw_importer_left_count(f.importer), 0);
		for (uint64_t page = 0; page < PAGES; page++) {
			is_in(&f, page, GW_PRIVATE_PRESENT);
			CHECK_EQ(f.shim.pages[page].import_count, 1);
			CHECK_EQ(f.shim.pages[page].flip_count, 1);
			CHECK_EQ(f.shim.pages[page].publish_count, 1);
		}
		tear_down(&f);
	}
}

static void what_is_given_back_is_never_imported(void)
{
	struct fixture f;

	set_up(&f);
	fetch(&f, 0, 4);
	CHECK_EQ(run(&f, 0, 1), GW_IMPORTER_DONE);
	f.shim.log[0] = 0;
	f.shim.flip_error = -EINTR;
	CHECK_EQ(gw_importer_give_back(f.importer, 0, 3), GW_IMPORTER_AGAIN);
	CHECK_EQ(gw_importer_left_count(f.importer), PAGES - 3);
	/* Between the two tries the content comes: too late. */
	CHECK_EQ(run(&f, 0, 3), GW_IMPORTER_DONE);
	CHECK_EQ(gw_importer_give_back(f.importer, 0, 3), GW_IMPORTER_DONE);
	check_log(&f, "shared 0+3=-4 shared 0+3 publish 0+3 ");
	is_in(&f, 2, GW_PRIVATE_GIVEN_BACK);
	CHECK_EQ(f.shim.pages[1].import_count, 0);
	CHECK_EQ(gw_importer_left_count(f.importer), PAGES - 3);
	tear_down(&f);
}

static void a_page_on_its_way_is_not_given_back(void)
{
	struct fixture f;
	struct caller caller;

	set_up(&f);
	fetch(&f, 30, 1);
	gw_hook_hold("importer.flipped");
	start(&caller, &f, 30, 1);
	CHECK(gw_hook_wait("importer.flipped", 1, WAIT_MS));
	CHECK_EQ(gw_importer_give_back(f.importer, 30, 1), -EBUSY);
	gw_hook_release("importer.flipped");
	CHECK_EQ(pthread_join(caller.thread, NULL), 0);
	CHECK_EQ(gw_importer_give_back(f.importer, 30, 1), GW_IMPORTER_DONE);
	is_in(&f, 30, GW_PRIVATE_GIVEN_BACK);
	tear_down(&f);
}

static void bad_maps_and_calls_are_refused(void)
{
	static const struct gw_private_run bad[][2] = {
		{{0, 0}, {4, 1}}, {{4, 2}, {5, 1}},	     {{4, 2}, {0, 1}},
		{{0, 1}, {8, 1}}, {{0, 1}, {7, UINT64_MAX}}, {{0, 9}, {9, 1}},
	};
	static const struct gw_private_run good[2] = {{1, 2}, {3, 1}};
	static const uint8_t data[8 * LEN];
	struct private_shim shim;
	struct gw_importer *importer = NULL;

	shim_init(&shim);
	for (size_t i = 0; i < COUNT(bad); i++) {
		CHECK_EQ(gw_importer_create(8, bad[i], 2, &shim_ops, &shim, &importer), -EINVAL);
		CHECK(!importer);
	}
	CHECK_EQ(gw_importer_create(8, good, 2, &shim_ops, &shim, &importer), 0);
	CHECK_EQ(gw_importer_left_count(importer), 3);
	CHECK_EQ(gw_importer_run(importer, 0, 2, data, LEN), -EINVAL);
	CHECK_EQ(gw_importer_run(importer, 3, 2, data, LEN), -EINVAL);
	CHECK_EQ(gw_importer_run(importer, 1, 0, data, LEN), -EINVAL);
	CHECK_EQ(gw_importer_run(importer, 1, UINT64_MAX, data, LEN), -EINVAL);
	CHECK_EQ(gw_importer_run(importer, 1, 1, NULL, LEN), -EINVAL);
	CHECK_EQ(gw_importer_give_back(importer, 0, 1), -EINVAL);
	CHECK_EQ(gw_importer_retry_held(importer, 1), -EINVAL);
	CHECK_EQ(gw_importer_retry_held(importer, 8), -EINVAL);
	CHECK_EQ(gw_importer_state(importer, 8), GW_PRIVATE_NOT);
	/* Nothing was done by any of these. */
	CHECK(shim.log[0] == 0);
	gw_importer_destroy(importer);
	gw_importer_destroy(NULL);
}

/* --- the shim is not blind ---------------------------------------------------------------------- */

enum step { FETCH, IMPORT, FLIP, PUBLISH, STEP_COUNT };

static void take(struct private_shim *shim, enum step step, uint64_t first, uint64_t count,
		 uint8_t *data)
{
	switch (step) {
	case FETCH:
		shim_fetch(shim, first, count, data);
		break;
	case IMPORT:
		(void)shim_import(shim, first, count, data);
		break;
	case FLIP:
		(void)shim_set_attributes(shim, first, count, GW_ATTRIBUTE_PRIVATE);
		break;
	default:
		shim_publish(shim, first, count);
	}
}

static bool is_caught(const enum step *steps, size_t step_count)
{
	struct private_shim shim;
	uint8_t data[LEN] = {0};

	shim_init(&shim);
	for (size_t i = 0; i < step_count; i++)
		take(&shim, steps[i], 0, 1, data);
	return shim.broken[0] != 0;
}

/* Every sequence of up to four steps that clears the bit: exactly one of them passes. */
static void of_all_orders_one_passes(void)
{
	unsigned int passed = 0, tried = 0;

	for (unsigned int len = 1; len <= STEP_COUNT; len++)
		for (unsigned int code = 0; code < 1U << (2 * len); code++) {
			enum step steps[STEP_COUNT];
			bool ends = false;

			for (unsigned int i = 0; i < len; i++) {
				steps[i] = (enum step)(code >> (2 * i) & 3);
				ends |= steps[i] == PUBLISH;
			}
			if (!ends)
				continue;
			tried++;
			if (is_caught(steps, len))
				continue;
			passed++;
			CHECK_EQ(len, 4);
			for (unsigned int i = 0; i < len; i++)
				CHECK_EQ(steps[i], i);
		}
	fprintf(stderr, "  %u of %u\n", passed, tried);
	CHECK_EQ(passed, 1);
}

/* Importers with one mistake each, of the kind that a change to importer.c could make. */
static void wrong_importers_are_caught(void)
{
	enum { IGNORES_IMPORT, IGNORES_PART, IGNORES_FLIP, TOO_LONG, STALE, GIVEN_BACK, MISTAKES };

	for (int mistake = 0; mistake < MISTAKES; mistake++) {
		struct private_shim shim;
		uint8_t data[4 * LEN] = {0};

		shim_init(&shim);
		shim_fetch(&shim, 0, 4, data);
		if (mistake == IGNORES_IMPORT)
			shim.import_error = -EAGAIN;
		if (mistake == IGNORES_PART)
			shim.import_max = 3;
		if (mistake == IGNORES_FLIP)
			shim.flip_error = -EINTR;
		if (mistake == STALE)
			data[LEN] ^= 1;
		if (mistake == GIVEN_BACK)
			(void)shim_set_attributes(&shim, 2, 1, 0);
		(void)shim_import(&shim, 0, 4, data);
		(void)shim_set_attributes(&shim, 0, mistake == TOO_LONG ? 5 : 4,
					  GW_ATTRIBUTE_PRIVATE);
		shim_publish(&shim, 0, 4);
		fprintf(stderr, "  %d: %s\n", mistake, shim.broken);
		CHECK(shim.broken[0] != 0);
	}
}

int main(void)
{
	RUN(one_page_in_order);
	RUN(runs_in_order);
	RUN(a_passing_failure_of_the_import_leaves_the_page_absent);
	RUN(a_lasting_failure_of_the_import_holds_the_page);
	RUN(a_failure_of_the_flip_leaves_the_import);
	RUN(steps_that_lie_hold_the_pages);
	RUN(content_that_is_not_ours_is_not_published);
	RUN(a_new_agent_brings_only_what_is_missing);
	RUN(one_import_whoever_asks);
	RUN(many_runs_at_once);
	RUN(what_is_given_back_is_never_imported);
	RUN(a_page_on_its_way_is_not_given_back);
	RUN(bad_maps_and_calls_are_refused);
	RUN(of_all_orders_one_passes);
	RUN(wrong_importers_are_caught);
	return EXIT_SUCCESS;
}
