/* SPDX-License-Identifier: Apache-2.0 */
/*
 * prefetch.c - see prefetch.h for Threads, Errors, Ownership, Units and Source.
 */
#include "prefetch.h"

#include <string.h>

#define LEN_BYTES_MAX (UINT32_C(1) << 20)

static uint32_t min_u32(uint32_t a, uint32_t b)
{
	return a < b ? a : b;
}

static void add(_Atomic uint64_t *counter)
{
	atomic_fetch_add_explicit(counter, 1, memory_order_relaxed);
}

void prefetch_init(struct prefetch *prefetch, uint64_t page_count, uint32_t page_size)
{
	memset(prefetch, 0, sizeof(*prefetch));
	prefetch->page_count = page_count;
	prefetch->len_max = min_u32(LEN_BYTES_MAX / page_size, PREFETCH_LEN_MAX);
	if (prefetch->len_max == 0)
		prefetch->len_max = 1;
	prefetch->len_first = min_u32(PREFETCH_LEN_FIRST, prefetch->len_max);
	prefetch->score = PREFETCH_SCORE_ONE / 2;
}

/* The last sixteen windows, or so, weigh as much as all before them. */
static void judge(struct prefetch *prefetch, bool hit, uint64_t now_ns)
{
	const uint32_t sample = hit ? PREFETCH_SCORE_ONE : 0;

	add(hit ? &prefetch->hit_count : &prefetch->miss_count);
	prefetch->score = (prefetch->score * 15 + sample) / 16;
	if (prefetch->judged_count < PREFETCH_JUDGED_MIN)
		prefetch->judged_count++;
	if (prefetch->judged_count < PREFETCH_JUDGED_MIN ||
	    prefetch->score >= PREFETCH_SCORE_ONE / 4)
		return;
	prefetch->off_until_ns = now_ns + PREFETCH_OFF_NS;
	atomic_store_explicit(&prefetch->off, true, memory_order_relaxed);
	memset(prefetch->streams, 0, sizeof(prefetch->streams));
}

static bool is_off(struct prefetch *prefetch, uint64_t now_ns)
{
	if (prefetch->off_until_ns == 0)
		return false;
	if (now_ns < prefetch->off_until_ns)
		return true;
	/* Some windows to see: as many as fill the streams are judged before it is off again. */
	prefetch->off_until_ns = 0;
	prefetch->score = PREFETCH_SCORE_ONE / 4;
	prefetch->judged_count = PREFETCH_JUDGED_MIN / 2;
	prefetch->len_first = PREFETCH_LEN_MIN < prefetch->len_max ? PREFETCH_LEN_MIN
								   : prefetch->len_max;
	atomic_store_explicit(&prefetch->off, false, memory_order_relaxed);
	return false;
}

static struct prefetch_stream *find(struct prefetch *prefetch, uint64_t page)
{
	for (uint32_t i = 0; i < PREFETCH_STREAM_COUNT; i++) {
		struct prefetch_stream *const stream = &prefetch->streams[i];

		if (stream->end > 0 && page >= stream->first && page < stream->end + PREFETCH_SLACK)
			return stream;
	}
	return NULL;
}

/* A free stream, or the one that was longest without a fault. */
static struct prefetch_stream *oldest(struct prefetch *prefetch)
{
	struct prefetch_stream *found = &prefetch->streams[0];

	for (uint32_t i = 1; i < PREFETCH_STREAM_COUNT; i++)
		if (prefetch->streams[i].used_at < found->used_at)
			found = &prefetch->streams[i];
	return found;
}

/* The stream's next window begins at `first`. */
static uint32_t move_on(struct prefetch *prefetch, struct prefetch_stream *stream, uint64_t first,
			uint64_t *ret_first)
{
	const uint64_t left = first < prefetch->page_count ? prefetch->page_count - first : 0;
	const uint32_t count = left < stream->len ? (uint32_t)left : stream->len;

	stream->first = first;
	stream->end = first + count;
	*ret_first = first;
	if (count > 0)
		add(&prefetch->window_count);
	return count;
}

static uint32_t go_on(struct prefetch *prefetch, struct prefetch_stream *stream, uint64_t page,
		      uint64_t now_ns, uint64_t *ret_first)
{
	stream->hit = true;
	stream->used_at = ++prefetch->clock;
	if (page >= stream->end) {
		if (stream->len < prefetch->len_max)
			stream->len = min_u32(stream->len * 2, prefetch->len_max);
		if (prefetch->len_first < min_u32(PREFETCH_LEN_FIRST, prefetch->len_max))
			prefetch->len_first *= 2;
		judge(prefetch, true, now_ns);
		return move_on(prefetch, stream, page + 1, ret_first);
	}
	/* Not there yet, so longer would not help; but the second half is the time to ask for what follows. */
	if (page < stream->first + (stream->end - stream->first) / 2)
		return 0;
	judge(prefetch, true, now_ns);
	return move_on(prefetch, stream, stream->end, ret_first);
}

uint32_t prefetch_on_fault(struct prefetch *prefetch, uint64_t page, uint64_t now_ns,
			   uint64_t *ret_first)
{
	struct prefetch_stream *stream;

	if (is_off(prefetch, now_ns))
		return 0;
	stream = find(prefetch, page);
	if (stream)
		return go_on(prefetch, stream, page, now_ns, ret_first);
	stream = oldest(prefetch);
	if (stream->end > 0 && !stream->hit) {
		if (prefetch->len_first / 2 >= PREFETCH_LEN_MIN)
			prefetch->len_first /= 2;
		judge(prefetch, false, now_ns);
		if (is_off(prefetch, now_ns))
			return 0;
	}
	*stream =
		(struct prefetch_stream){.used_at = ++prefetch->clock, .len = prefetch->len_first};
	return move_on(prefetch, stream, page + 1, ret_first);
}

void prefetch_summarise(const struct prefetch *prefetch, struct gw_prefetch_summary *ret_summary)
{
	*ret_summary = (struct gw_prefetch_summary){
		.window_count = atomic_load_explicit(&prefetch->window_count, memory_order_relaxed),
		.hit_count = atomic_load_explicit(&prefetch->hit_count, memory_order_relaxed),
		.miss_count = atomic_load_explicit(&prefetch->miss_count, memory_order_relaxed),
		.page_count =
			atomic_load_explicit(&prefetch->wanted_page_count, memory_order_relaxed),
		.off = atomic_load_explicit(&prefetch->off, memory_order_relaxed),
	};
}
