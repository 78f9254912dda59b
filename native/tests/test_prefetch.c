/* SPDX-License-Identifier: Apache-2.0 */
/* test_prefetch.c - windows that follow the guest, and that stop where they do not pay. Pure logic. */
#include "check.h"

#include <errno.h>

#include "prefetch.h"

#define PAGE_COUNT ((uint64_t)1 << 20)

static struct prefetch prefetch;

static void begin(uint64_t page_count, uint32_t page_size)
{
	prefetch_fini(&prefetch);
	CHECK_EQ(prefetch_init(&prefetch, page_count, page_size), 0);
}

static struct gw_prefetch_summary summary(void)
{
	struct gw_prefetch_summary window;
	struct gw_prefetch_summary recorded;

	prefetch_summarise(&prefetch, &window, &recorded);
	return window;
}

static struct gw_prefetch_summary recorded_summary(void)
{
	struct gw_prefetch_summary window;
	struct gw_prefetch_summary recorded;

	prefetch_summarise(&prefetch, &window, &recorded);
	return recorded;
}

/* A guest that reads on from `page`, each window there in time. Returns the faults it took. */
static uint64_t walk(uint64_t page, uint64_t end, uint64_t now_ns)
{
	uint64_t fault_count = 0;
	uint64_t first = 0;

	while (page < end) {
		const uint32_t count = prefetch_on_fault(&prefetch, page, now_ns, &first);

		fault_count++;
		if (count > 0)
			CHECK_EQ(first, page + 1);
		page += 1 + count;
	}
	return fault_count;
}

/* A guest that jumps about: no page is near one before. */
static uint64_t jump(uint64_t times, uint64_t now_ns)
{
	static uint64_t page = 12345;
	uint64_t asked_count = 0;
	uint64_t first;

	for (uint64_t i = 0; i < times; i++) {
		page = (page + 104729) % PAGE_COUNT;
		asked_count += prefetch_on_fault(&prefetch, page, now_ns, &first) > 0;
	}
	return asked_count;
}

static void a_guest_that_reads_on_faults_ever_less(void)
{
	begin(PAGE_COUNT, 4096);
	/* 16 + 32 + 64 + 128 + 256 and so on, each with its fault. */
	CHECK_EQ(walk(1000, 1000 + 65536, 1), 4 + (65536 - 244 + 256) / 257);
	CHECK_EQ(summary().miss_count, 0);
	CHECK_EQ(summary().hit_count, summary().window_count - 1);
	CHECK_EQ(summary().off, 0);
}

static void many_guests_threads_are_told_apart(void)
{
	uint64_t at[PREFETCH_STREAM_COUNT];
	uint64_t first;

	begin(PAGE_COUNT, 4096);
	for (uint64_t i = 0; i < PREFETCH_STREAM_COUNT; i++)
		at[i] = i * 50000;
	for (int round = 0; round < 20; round++)
		for (uint64_t i = 0; i < PREFETCH_STREAM_COUNT; i++)
			at[i] += 1 + prefetch_on_fault(&prefetch, at[i], 1, &first);
	CHECK_EQ(summary().miss_count, 0);
	for (uint64_t i = 0; i < PREFETCH_STREAM_COUNT; i++)
		CHECK(at[i] - i * 50000 > 10ul * PREFETCH_LEN_MAX);
}

/* The page was on its way, only late: right, and no reason for a longer window. */
static void a_fault_in_a_window_is_a_hit(void)
{
	uint64_t first = 0;

	begin(PAGE_COUNT, 4096);
	CHECK_EQ(prefetch_on_fault(&prefetch, 100, 1, &first), PREFETCH_LEN_FIRST);
	CHECK_EQ(prefetch_on_fault(&prefetch, 102, 1, &first), 0);
	CHECK_EQ(prefetch_on_fault(&prefetch, 110, 1, &first), PREFETCH_LEN_FIRST);
	CHECK_EQ(first, 101 + PREFETCH_LEN_FIRST);
	CHECK_EQ(summary().hit_count, 1);
}

static void a_guest_that_jumps_turns_it_off_for_a_while(void)
{
	uint64_t now_ns = 1;

	begin(PAGE_COUNT, 4096);
	/* The windows that are judged, and those that are still open. */
	CHECK_EQ(jump(1000, now_ns), PREFETCH_JUDGED_MIN + PREFETCH_STREAM_COUNT - 1);
	CHECK_EQ(summary().off, 1);
	CHECK_EQ(summary().hit_count, 0);
	CHECK_EQ(jump(1000, now_ns + PREFETCH_OFF_NS - 1), 0);
	/* Tried again, with fewer, shorter windows; and given up again. */
	now_ns += PREFETCH_OFF_NS;
	CHECK_EQ(jump(1000, now_ns), PREFETCH_JUDGED_MIN / 2 + PREFETCH_STREAM_COUNT - 1);
	CHECK_EQ(summary().off, 1);
	/* And if the guest has changed its ways it stays on. */
	now_ns += PREFETCH_OFF_NS;
	CHECK(walk(1000, 9000, now_ns) < 100);
	CHECK_EQ(summary().off, 0);
}

static void nothing_is_asked_for_beyond_the_end(void)
{
	uint64_t first = 0;

	begin(100, 4096);
	CHECK_EQ(prefetch_on_fault(&prefetch, 95, 1, &first), 4);
	CHECK_EQ(first, 96);
	CHECK_EQ(prefetch_on_fault(&prefetch, 99, 1, &first), 0);
	/* A page of 2 MiB: one at a time. */
	begin(100, 2u << 20);
	CHECK_EQ(prefetch_on_fault(&prefetch, 10, 1, &first), 1);
	CHECK_EQ(prefetch_on_fault(&prefetch, 12, 1, &first), 1);
	CHECK_EQ(first, 13);
}

/*
 * A guest that jumps about and goes over its memory beside it, 64 jumps to 128 pages: the jumps
 * cost nothing after a while, and the walk is followed all the same.
 */
static void a_walk_among_jumps_is_followed(void)
{
	uint64_t at = 500000;
	uint64_t fault_count = 0;
	uint64_t asked_count = 0;
	uint64_t end = at; /* of what is there */
	uint64_t first;

	begin(PAGE_COUNT, 4096);
	for (uint64_t round = 0; round < 200; round++) {
		asked_count += jump(64, 1 + round);
		for (uint64_t i = 0; i < 128; i++, at++) {
			if (at < end)
				continue;
			fault_count++;
			end = at + 1 + prefetch_on_fault(&prefetch, at, 1 + round, &first);
		}
	}
	CHECK(asked_count < 100);
	CHECK(fault_count < 400);
	/* It does not come back: in the end its place is given to others. */
	at = 900000;
	for (uint64_t i = 0; i < 2UL * PREFETCH_PROVEN_MAX; i++) {
		(void)jump(PREFETCH_QUIET, 200);
		CHECK(walk(at + i * 1000, at + i * 1000 + 300, 200) < 10);
	}
}

static void a_recorded_order_is_given_run_by_run(void)
{
	const struct gw_page_run runs[] = {{.first = 700, .count = 2}, {.first = 5, .count = 1}};
	uint64_t first = 0;
	uint64_t at = 0;

	begin(1000, 4096);
	CHECK_EQ(prefetch_order_next(&prefetch, &first, &at), 0);
	CHECK_EQ(prefetch_set_order(&prefetch, runs, 2), 0);
	CHECK_EQ(prefetch_set_order(&prefetch, runs, 2), -EALREADY);
	CHECK_EQ(prefetch_order_next(&prefetch, &first, &at), 2);
	CHECK_EQ(first, 700);
	prefetch_order_advance(&prefetch, at, 1);
	/* Somebody was slower, and changes nothing. */
	prefetch_order_advance(&prefetch, at, 2);
	CHECK_EQ(prefetch_order_next(&prefetch, &first, &at), 1);
	CHECK_EQ(first, 701);
	prefetch_order_advance(&prefetch, at, 1);
	CHECK_EQ(prefetch_order_next(&prefetch, &first, &at), 1);
	CHECK_EQ(first, 5);
	prefetch_order_advance(&prefetch, at, 1);
	CHECK_EQ(prefetch_order_next(&prefetch, &first, &at), 0);
	CHECK_EQ(recorded_summary().window_count, 2);
}

static void an_order_beyond_the_image_is_refused(void)
{
	const struct gw_page_run wrong[] = {{.first = 999, .count = 2},
					    {.first = 0, .count = 0},
					    {.first = 1, .count = UINT64_MAX},
					    {.first = UINT64_MAX, .count = 1}};

	begin(1000, 4096);
	for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++)
		CHECK_EQ(prefetch_set_order(&prefetch, &wrong[i], 1), -EINVAL);
	CHECK_EQ(prefetch_set_order(&prefetch, wrong, GW_ARRIVAL_ORDER_COUNT_MAX + 1), -EINVAL);
}

static void an_order_of_another_guest_is_given_up(void)
{
	const struct gw_page_run order = {.first = 0, .count = 1000};
	uint64_t first = 0;
	uint64_t at = 0;

	begin(PAGE_COUNT, 4096);
	CHECK_EQ(prefetch_set_order(&prefetch, &order, 1), 0);
	/* Each third fault is one of it: it stays. */
	for (uint64_t i = 0; i < 100; i++) {
		(void)prefetch_on_fault(&prefetch, i * 7 % 1000, 1, &first);
		(void)jump(2, 1);
	}
	CHECK_EQ(recorded_summary().off, 0);
	CHECK_EQ(recorded_summary().hit_count, 100);
	CHECK(prefetch_order_next(&prefetch, &first, &at) > 0);
	(void)jump(100, 1);
	CHECK_EQ(recorded_summary().off, 1);
	CHECK_EQ(prefetch_order_next(&prefetch, &first, &at), 0);
}

/* What one arrival touched is the order of the next. */
static void first_touches_are_kept_in_order(void)
{
	const uint64_t touched[] = {9, 10, 11, 3, 500, 501, 2};
	struct gw_page_run runs[8];
	uint64_t first;

	begin(1000, 4096);
	CHECK_EQ(prefetch_faults(&prefetch, runs, 8), 0);
	for (size_t i = 0; i < sizeof(touched) / sizeof(touched[0]); i++)
		(void)prefetch_on_fault(&prefetch, touched[i], 1, &first);
	/* The last may grow yet. */
	CHECK_EQ(prefetch_faults(&prefetch, runs, 8), 3);
	CHECK(runs[0].first == 9 && runs[0].count == 3);
	CHECK(runs[1].first == 3 && runs[1].count == 1);
	CHECK(runs[2].first == 500 && runs[2].count == 2);
	CHECK_EQ(prefetch_faults(&prefetch, runs, 1), 1);
	/* No more than there is room for. */
	begin(PAGE_COUNT, 4096);
	for (uint64_t i = 0; i < GW_ARRIVAL_ORDER_COUNT_MAX + 10; i++)
		(void)prefetch_on_fault(&prefetch, i * 3, 1, &first);
	CHECK_EQ(prefetch_faults(&prefetch, runs, 8), 8);
	CHECK_EQ(runs[7].first, 21);
}

int main(void)
{
	RUN(a_guest_that_reads_on_faults_ever_less);
	RUN(many_guests_threads_are_told_apart);
	RUN(a_fault_in_a_window_is_a_hit);
	RUN(a_guest_that_jumps_turns_it_off_for_a_while);
	RUN(nothing_is_asked_for_beyond_the_end);
	RUN(a_walk_among_jumps_is_followed);
	RUN(a_recorded_order_is_given_run_by_run);
	RUN(an_order_beyond_the_image_is_refused);
	RUN(an_order_of_another_guest_is_given_up);
	RUN(first_touches_are_kept_in_order);
	prefetch_fini(&prefetch);
	return EXIT_SUCCESS;
}
