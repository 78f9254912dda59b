/* SPDX-License-Identifier: Apache-2.0 */
/*
 * bitmap.c - see bitmap.h for Threads, Errors, Ownership, Units and Source.
 *
 * Ordering. publish is the only writer of shared words and clears with an atomic AND, release:
 * the page's content and its state in the page map are stored before. Readers load with acquire.
 * Two publishers of neighbouring pages meet in one word; the AND keeps both. tests:
 * publishers_of_one_word_lose_nothing, a_clear_bit_means_that_the_content_is_there.
 */
#include <godwit/bitmap.h>

#include <string.h>

#define WORD_BITS 64U

static uint64_t word_count(const struct gw_bitmap *bitmap)
{
	return (bitmap->page_count + WORD_BITS - 1) / WORD_BITS;
}

/* The bits of word `word` that belong to pages [first, first + count). */
static uint64_t mask_of(uint64_t word, uint64_t first, uint64_t count)
{
	const uint64_t base = word * WORD_BITS;
	const uint64_t end = first + count;
	uint64_t mask = UINT64_MAX;

	if (first > base)
		mask <<= first - base;
	if (end < base + WORD_BITS)
		mask &= UINT64_MAX >> (base + WORD_BITS - end);
	return mask;
}

size_t gw_bitmap_len(uint64_t page_count)
{
	return (size_t)((page_count + WORD_BITS - 1) / WORD_BITS * sizeof(uint64_t));
}

void gw_bitmap_init(struct gw_bitmap *bitmap, void *words, uint64_t page_count)
{
	uint64_t absent_count = 0;

	bitmap->words = words;
	bitmap->page_count = page_count;
	for (uint64_t i = 0; i < word_count(bitmap); i++) {
		const uint64_t mask = mask_of(i, 0, page_count);
		const uint64_t word = atomic_fetch_and(&bitmap->words[i], mask) & mask;

		absent_count += (uint64_t)__builtin_popcountll(word);
	}
	atomic_init(&bitmap->absent_count, absent_count);
}

void gw_bitmap_mark_absent(struct gw_bitmap *bitmap, uint64_t first, uint64_t count)
{
	if (count == 0)
		return;
	for (uint64_t i = first / WORD_BITS; i <= (first + count - 1) / WORD_BITS; i++) {
		const uint64_t mask = mask_of(i, first, count);
		const uint64_t old = atomic_fetch_or(&bitmap->words[i], mask);

		atomic_fetch_add(&bitmap->absent_count,
				 (uint64_t)__builtin_popcountll(mask & ~old));
	}
}

uint64_t gw_bitmap_publish(struct gw_bitmap *bitmap, uint64_t first, uint64_t count)
{
	uint64_t cleared_count = 0;

	if (count == 0)
		return 0;
	for (uint64_t i = first / WORD_BITS; i <= (first + count - 1) / WORD_BITS; i++) {
		const uint64_t mask = mask_of(i, first, count);
		const uint64_t old =
			atomic_fetch_and_explicit(&bitmap->words[i], ~mask, memory_order_release);

		cleared_count += (uint64_t)__builtin_popcountll(mask & old);
	}
	/* acq_rel: who brings it to 0 has seen everybody's pages. */
	atomic_fetch_sub_explicit(&bitmap->absent_count, cleared_count, memory_order_acq_rel);
	return cleared_count;
}

bool gw_bitmap_is_absent(const struct gw_bitmap *bitmap, uint64_t page)
{
	return atomic_load_explicit(&bitmap->words[page / WORD_BITS], memory_order_acquire) >>
		       (page % WORD_BITS) &
	       1U;
}

uint64_t gw_bitmap_absent_count(const struct gw_bitmap *bitmap)
{
	return atomic_load_explicit(&bitmap->absent_count, memory_order_acquire);
}

/* The first page at or after `from` whose bit is `set`; page_count if there is none. */
static uint64_t next_bit(const struct gw_bitmap *bitmap, uint64_t from, bool set)
{
	if (from >= bitmap->page_count)
		return bitmap->page_count;
	for (uint64_t i = from / WORD_BITS; i < word_count(bitmap); i++) {
		uint64_t word = atomic_load_explicit(&bitmap->words[i], memory_order_acquire);

		if (!set)
			word = ~word;
		if (i == from / WORD_BITS)
			word &= UINT64_MAX << (from % WORD_BITS);
		if (word == 0)
			continue;
		const uint64_t page = i * WORD_BITS + (uint64_t)__builtin_ctzll(word);

		return page < bitmap->page_count ? page : bitmap->page_count;
	}
	return bitmap->page_count;
}

uint64_t gw_bitmap_next_absent(const struct gw_bitmap *bitmap, uint64_t from)
{
	return next_bit(bitmap, from, true);
}

uint64_t gw_bitmap_next_run(const struct gw_bitmap *bitmap, uint64_t from, uint64_t count_max,
			    uint64_t *ret_first)
{
	const uint64_t first = next_bit(bitmap, from, true);

	if (first == bitmap->page_count)
		return 0;
	const uint64_t count = next_bit(bitmap, first + 1, false) - first;

	*ret_first = first;
	return count < count_max ? count : count_max;
}

void gw_bitmap_copy(const struct gw_bitmap *bitmap, uint8_t *ret_bytes)
{
	const uint64_t len = (bitmap->page_count + 7) / 8;

	for (uint64_t i = 0; i < word_count(bitmap); i++) {
		const uint64_t word = atomic_load_explicit(&bitmap->words[i], memory_order_acquire);
		const uint64_t left = len - i * sizeof(word);

		memcpy(ret_bytes + i * sizeof(word), &word,
		       left < sizeof(word) ? (size_t)left : sizeof(word));
	}
}
