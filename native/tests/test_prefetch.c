/* SPDX-License-Identifier: Apache-2.0 */
/* test_prefetch.c - windows that follow the guest, and that stop where they do not pay. Pure logic. */
#include "check.h"

#include "prefetch.h"

#define PAGE_COUNT ((uint64_t)1 << 20)

static struct prefetch prefetch;

static struct gw_prefetch_summary summary(void)
{
	struct gw_prefetch_summary got;

	prefetch_summarise(&prefetch, &got);
	return got;
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
	prefetch_init(&prefetch, PAGE_COUNT, 4096);
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

	prefetch_init(&prefetch, PAGE_COUNT, 4096);
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

	prefetch_init(&prefetch, PAGE_COUNT, 4096);
	CHECK_EQ(prefetch_on_fault(&prefetch, 100, 1, &first), PREFETCH_LEN_FIRST);
	CHECK_EQ(prefetch_on_fault(&prefetch, 102, 1, &first), 0);
	CHECK_EQ(prefetch_on_fault(&prefetch, 110, 1, &first), PREFETCH_LEN_FIRST);
	CHECK_EQ(first, 101 + PREFETCH_LEN_FIRST);
	CHECK_EQ(summary().hit_count, 1);
}

static void a_guest_that_jumps_turns_it_off_for_a_while(void)
{
	uint64_t now_ns = 1;

	prefetch_init(&prefetch, PAGE_COUNT, 4096);
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

	prefetch_init(&prefetch, 100, 4096);
	CHECK_EQ(prefetch_on_fault(&prefetch, 95, 1, &first), 4);
	CHECK_EQ(first, 96);
	CHECK_EQ(prefetch_on_fault(&prefetch, 99, 1, &first), 0);
	/* A page of 2 MiB: one at a time. */
	prefetch_init(&prefetch, 100, 2u << 20);
	CHECK_EQ(prefetch_on_fault(&prefetch, 10, 1, &first), 1);
	CHECK_EQ(prefetch_on_fault(&prefetch, 12, 1, &first), 1);
	CHECK_EQ(first, 13);
}

int main(void)
{
	RUN(a_guest_that_reads_on_faults_ever_less);
	RUN(many_guests_threads_are_told_apart);
	RUN(a_fault_in_a_window_is_a_hit);
	RUN(a_guest_that_jumps_turns_it_off_for_a_while);
	RUN(nothing_is_asked_for_beyond_the_end);
	return EXIT_SUCCESS;
}
