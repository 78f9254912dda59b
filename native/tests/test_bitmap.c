/* SPDX-License-Identifier: Apache-2.0 */
/* test_bitmap.c - the userfault bitmap against an array of bools, and its order between threads. */
#include "check.h"

#include <pthread.h>
#include <stdatomic.h>

#include <godwit/bitmap.h>

#define PAGE_COUNT_MAX 400

static uint32_t random_state = 12345;

static uint64_t random_below(uint64_t limit)
{
	random_state = random_state * 1664525U + 1013904223U;
	return (random_state >> 8) % limit;
}

static void check_same(const struct gw_bitmap *bitmap, const bool *model)
{
	uint8_t bytes[PAGE_COUNT_MAX / 8 + 2];
	uint64_t absent_count = 0;
	const uint64_t len = (bitmap->page_count + 7) / 8;

	memset(bytes, 0xa5, sizeof(bytes));
	gw_bitmap_copy(bitmap, bytes);
	CHECK_EQ(bytes[len], 0xa5);
	for (uint64_t i = 0; i < len * 8; i++)
		CHECK_EQ(bytes[i / 8] >> (i % 8) & 1, i < bitmap->page_count && model[i]);
	for (uint64_t i = 0; i < bitmap->page_count; i++) {
		CHECK_EQ(gw_bitmap_is_absent(bitmap, i), model[i]);
		absent_count += model[i];
	}
	CHECK_EQ(gw_bitmap_absent_count(bitmap), absent_count);
	for (uint64_t from = 0; from <= bitmap->page_count; from++) {
		uint64_t want = from;
		uint64_t first = 0;

		while (want < bitmap->page_count && !model[want])
			want++;
		CHECK_EQ(gw_bitmap_next_absent(bitmap, from), want);
		uint64_t end = want;

		while (end < bitmap->page_count && model[end] && end - want < 70)
			end++;
		CHECK_EQ(gw_bitmap_next_run(bitmap, from, 70, &first), end - want);
		if (end > want)
			CHECK_EQ(first, want);
	}
}

static void against_a_model(void)
{
	static const uint64_t page_counts[] = {1, 7, 63, 64, 65, 128, 129, PAGE_COUNT_MAX};

	for (size_t i = 0; i < sizeof(page_counts) / sizeof(page_counts[0]); i++) {
		const uint64_t page_count = page_counts[i];
		bool model[PAGE_COUNT_MAX] = {false};
		struct gw_bitmap bitmap;
		void *const words = malloc(gw_bitmap_len(page_count));

		/* Bits past the end are not pages: a count of absent ones must not see them. */
		memset(words, 0xff, gw_bitmap_len(page_count));
		gw_bitmap_init(&bitmap, words, page_count);
		memset(model, true, sizeof(model));
		check_same(&bitmap, model);
		for (int round = 0; round < 30; round++) {
			const uint64_t first = random_below(page_count);
			const uint64_t count = random_below(page_count - first + 1);
			uint64_t cleared_count = 0;
			const bool set = round % 3 == 2;

			for (uint64_t page = first; page < first + count; page++) {
				cleared_count += model[page];
				model[page] = set;
			}
			if (set)
				gw_bitmap_mark_absent(&bitmap, first, count);
			else
				CHECK_EQ(gw_bitmap_publish(&bitmap, first, count), cleared_count);
			check_same(&bitmap, model);
		}
		free(words);
	}
}

/* Four threads clear every fourth page each: they meet in every word. */
struct publisher {
	struct gw_bitmap *bitmap;
	uint64_t first;
	uint64_t cleared_count;
};

static void *publish_every_fourth(void *argument)
{
	struct publisher *const publisher = argument;

	for (uint64_t i = publisher->first; i < publisher->bitmap->page_count; i += 4)
		publisher->cleared_count += gw_bitmap_publish(publisher->bitmap, i, 1);
	return NULL;
}

static void publishers_of_one_word_lose_nothing(void)
{
	const uint64_t page_count = 64000;
	void *const words = malloc(gw_bitmap_len(page_count));
	struct gw_bitmap bitmap;
	struct publisher publishers[4];
	pthread_t threads[4];
	uint64_t cleared_count = 0;

	memset(words, 0xff, gw_bitmap_len(page_count));
	gw_bitmap_init(&bitmap, words, page_count);
	for (uint64_t i = 0; i < 4; i++) {
		publishers[i] = (struct publisher){.bitmap = &bitmap, .first = i};
		CHECK_EQ(pthread_create(&threads[i], NULL, publish_every_fourth, &publishers[i]),
			 0);
	}
	for (int i = 0; i < 4; i++) {
		CHECK_EQ(pthread_join(threads[i], NULL), 0);
		cleared_count += publishers[i].cleared_count;
	}
	CHECK_EQ(cleared_count, page_count);
	CHECK_EQ(gw_bitmap_absent_count(&bitmap), 0);
	CHECK_EQ(gw_bitmap_next_absent(&bitmap, 0), page_count);
	free(words);
}

/* Plain (non-atomic) content, so that ThreadSanitizer sees a missing order as a race. */
#define ORDER_PAGE_COUNT 2000
static uint64_t contents[ORDER_PAGE_COUNT];

static void *fill_and_publish(void *argument)
{
	for (uint64_t i = 0; i < ORDER_PAGE_COUNT; i++) {
		contents[i] = i + 1;
		gw_bitmap_publish(argument, i, 1);
	}
	return NULL;
}

static void a_clear_bit_means_that_the_content_is_there(void)
{
	void *const words = malloc(gw_bitmap_len(ORDER_PAGE_COUNT));
	struct gw_bitmap bitmap;
	pthread_t thread;

	memset(words, 0xff, gw_bitmap_len(ORDER_PAGE_COUNT));
	gw_bitmap_init(&bitmap, words, ORDER_PAGE_COUNT);
	CHECK_EQ(pthread_create(&thread, NULL, fill_and_publish, &bitmap), 0);
	for (uint64_t i = 0; i < ORDER_PAGE_COUNT; i++) {
		while (gw_bitmap_is_absent(&bitmap, i))
			;
		CHECK_EQ(contents[i], i + 1);
	}
	CHECK_EQ(pthread_join(thread, NULL), 0);
	free(words);
}

int main(void)
{
	RUN(against_a_model);
	RUN(publishers_of_one_word_lose_nothing);
	RUN(a_clear_bit_means_that_the_content_is_there);
	return EXIT_SUCCESS;
}
