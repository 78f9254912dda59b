/* SPDX-License-Identifier: Apache-2.0 */
/*
 * prefetch.c - see prefetch.h for Threads, Errors, Ownership, Units and Source.
 */
#include "prefetch.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define LEN_BYTES_MAX (UINT32_C(1) << 20)
#define BITS_PER_WORD 64U
#define AT_PAGE_BITS  32
#define AT_PAGE_MASK  ((UINT64_C(1) << AT_PAGE_BITS) - 1)

_Static_assert(GW_ARRIVAL_ORDER_COUNT_MAX <= AT_PAGE_MASK, "a run's number fits order_at");

static uint32_t min_u32(uint32_t a, uint32_t b)
{
	return a < b ? a : b;
}

static void add(_Atomic uint64_t *counter)
{
	atomic_fetch_add_explicit(counter, 1, memory_order_relaxed);
}

/* --- scores ----------------------------------------------------------------------------------- */

/* True: fewer than a quarter of the last ones were hits. */
static bool judge(struct prefetch_score *score, bool hit)
{
	const uint32_t sample = hit ? PREFETCH_SCORE_ONE : 0;

	add(hit ? &score->hit_count : &score->miss_count);
	score->score = (score->score * 15 + sample) / 16;
	if (score->judged_count < PREFETCH_JUDGED_MIN)
		score->judged_count++;
	return score->judged_count == PREFETCH_JUDGED_MIN && score->score < PREFETCH_SCORE_ONE / 4;
}

static void set_off(struct prefetch_score *score, bool off)
{
	atomic_store_explicit(&score->off, off, memory_order_relaxed);
}

static bool is_off(const struct prefetch_score *score)
{
	return atomic_load_explicit(&score->off, memory_order_relaxed);
}

/* --- window ----------------------------------------------------------------------------------- */

/* Fresh windows are not trusted while it is off. Tried again by itself, with short ones. */
static bool is_trusting(struct prefetch *prefetch, uint64_t now_ns)
{
	if (!is_off(&prefetch->window))
		return true;
	if (now_ns < prefetch->off_until_ns)
		return false;
	prefetch->window.score = PREFETCH_SCORE_ONE / 4;
	prefetch->window.judged_count = PREFETCH_JUDGED_MIN / 2;
	prefetch->len_first = min_u32(PREFETCH_LEN_MIN, prefetch->len_max);
	set_off(&prefetch->window, false);
	return true;
}

static void judge_window(struct prefetch *prefetch, struct prefetch_stream *stream, bool hit,
			 uint64_t now_ns)
{
	if (stream->judged)
		return;
	stream->judged = true;
	if (judge(&prefetch->window, hit) && !is_off(&prefetch->window)) {
		prefetch->off_until_ns = now_ns + PREFETCH_OFF_NS;
		set_off(&prefetch->window, true);
	}
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

/*
 * A free stream, or the one that was longest without a fault: of those that are not proven, as long as
 * the proven ones leave some room and are heard of.
 */
static struct prefetch_stream *replaceable(struct prefetch *prefetch)
{
	struct prefetch_stream *fresh = NULL;
	struct prefetch_stream *proven = NULL;
	uint32_t proven_count = 0;

	for (uint32_t i = 0; i < PREFETCH_STREAM_COUNT; i++) {
		struct prefetch_stream *const stream = &prefetch->streams[i];
		struct prefetch_stream **const oldest = stream->hit ? &proven : &fresh;

		proven_count += stream->hit;
		if (!*oldest || stream->used_at < (*oldest)->used_at)
			*oldest = stream;
	}
	if (fresh && (!proven || (proven_count <= PREFETCH_PROVEN_MAX &&
				  prefetch->clock < proven->used_at + PREFETCH_QUIET)))
		return fresh;
	return proven;
}

/* The stream's next window begins at `first`. */
static uint32_t move_on(struct prefetch *prefetch, struct prefetch_stream *stream, uint64_t first,
			uint64_t *ret_first)
{
	const uint64_t left = first < prefetch->page_count ? prefetch->page_count - first : 0;
	const uint32_t count = left < stream->len ? (uint32_t)left : stream->len;

	stream->first = first;
	stream->end = first + count;
	stream->judged = count == 0;
	*ret_first = first;
	if (count > 0)
		add(&prefetch->window_count);
	return count;
}

static uint32_t go_on(struct prefetch *prefetch, struct prefetch_stream *stream, uint64_t page,
		      uint64_t now_ns, uint64_t *ret_first)
{
	const uint32_t len_first = min_u32(PREFETCH_LEN_FIRST, prefetch->len_max);

	stream->hit = true;
	stream->used_at = prefetch->clock;
	if (page >= stream->end) {
		/* One that was not trusted with a window has earned its first. */
		stream->len = stream->len == 0 ? len_first
					       : min_u32(stream->len * 2, prefetch->len_max);
		if (prefetch->len_first < len_first)
			prefetch->len_first *= 2;
		judge_window(prefetch, stream, true, now_ns);
		return move_on(prefetch, stream, page + 1, ret_first);
	}
	/* Not there yet, so longer would not help; but the second half is the time to ask for what follows. */
	if (page < stream->first + (stream->end - stream->first) / 2)
		return 0;
	judge_window(prefetch, stream, true, now_ns);
	return move_on(prefetch, stream, stream->end, ret_first);
}

static uint32_t follow(struct prefetch *prefetch, uint64_t page, uint64_t now_ns,
		       uint64_t *ret_first)
{
	struct prefetch_stream *stream = find(prefetch, page);

	if (stream)
		return go_on(prefetch, stream, page, now_ns, ret_first);
	stream = replaceable(prefetch);
	if (stream->end > 0 && !stream->judged) {
		if (!stream->hit && prefetch->len_first / 2 >= PREFETCH_LEN_MIN)
			prefetch->len_first /= 2;
		judge_window(prefetch, stream, false, now_ns);
	}
	*stream = (struct prefetch_stream){
		.used_at = prefetch->clock,
		.len = is_trusting(prefetch, now_ns) ? prefetch->len_first : 0,
	};
	return move_on(prefetch, stream, page + 1, ret_first);
}

/* --- recorded --------------------------------------------------------------------------------- */

static bool is_recorded(const struct prefetch *prefetch, uint64_t page)
{
	return prefetch->order_bits[page / BITS_PER_WORD] >> page % BITS_PER_WORD & 1;
}

static void judge_order(struct prefetch *prefetch, uint64_t page)
{
	if (!prefetch->order || is_off(&prefetch->recorded))
		return;
	if (judge(&prefetch->recorded, is_recorded(prefetch, page)))
		set_off(&prefetch->recorded, true);
}

int prefetch_set_order(struct prefetch *prefetch, const struct gw_page_run *runs, uint32_t count)
{
	if (prefetch->order)
		return -EALREADY;
	if (count > GW_ARRIVAL_ORDER_COUNT_MAX)
		return -EINVAL;
	for (uint32_t i = 0; i < count; i++)
		if (runs[i].count == 0 || runs[i].count > AT_PAGE_MASK ||
		    runs[i].count > prefetch->page_count ||
		    runs[i].first > prefetch->page_count - runs[i].count)
			return -EINVAL;
	if (count == 0)
		return 0;
	prefetch->order_bits = calloc(prefetch->page_count / BITS_PER_WORD + 1, sizeof(uint64_t));
	prefetch->order = calloc(count, sizeof(*runs));
	if (!prefetch->order || !prefetch->order_bits) {
		free(prefetch->order);
		free(prefetch->order_bits);
		prefetch->order = NULL;
		prefetch->order_bits = NULL;
		return -ENOMEM;
	}
	memcpy(prefetch->order, runs, count * sizeof(*runs));
	for (uint32_t i = 0; i < count; i++)
		for (uint64_t page = runs[i].first; page < runs[i].first + runs[i].count; page++)
			prefetch->order_bits[page / BITS_PER_WORD] |= UINT64_C(1)
								      << page % BITS_PER_WORD;
	prefetch->order_count = count;
	return 0;
}

uint64_t prefetch_order_next(const struct prefetch *prefetch, uint64_t *ret_first, uint64_t *ret_at)
{
	const uint64_t at = atomic_load_explicit(&prefetch->order_at, memory_order_relaxed);
	const uint64_t run = at >> AT_PAGE_BITS;
	const uint64_t behind = at & AT_PAGE_MASK;

	if (run >= prefetch->order_count || is_off(&prefetch->recorded))
		return 0;
	*ret_first = prefetch->order[run].first + behind;
	*ret_at = at;
	return prefetch->order[run].count - behind;
}

void prefetch_order_advance(struct prefetch *prefetch, uint64_t at, uint64_t count)
{
	const uint64_t run = at >> AT_PAGE_BITS;
	const bool through = (at & AT_PAGE_MASK) + count >= prefetch->order[run].count;
	const uint64_t next = through ? (run + 1) << AT_PAGE_BITS : at + count;

	(void)atomic_compare_exchange_strong_explicit(&prefetch->order_at, &at, next,
						      memory_order_relaxed, memory_order_relaxed);
}

/* --- the order of this arrival's own faults ------------------------------------------------------ */

static void record(struct prefetch *prefetch, uint64_t page)
{
	const uint32_t count =
		atomic_load_explicit(&prefetch->fault_run_count, memory_order_relaxed);

	if (!prefetch->faults) /* never: made by init */
		return;
	struct gw_page_run *const last = count > 0 ? &prefetch->faults[count - 1] : NULL;

	/* A run that others may read is not written any more: a reader sees the last but one at most. */
	if (last && page == last->first + last->count) {
		last->count++;
	} else if (count < GW_ARRIVAL_ORDER_COUNT_MAX) {
		prefetch->faults[count] = (struct gw_page_run){.first = page, .count = 1};
		atomic_store_explicit(&prefetch->fault_run_count, count + 1, memory_order_release);
	}
}

uint32_t prefetch_faults(const struct prefetch *prefetch, struct gw_page_run *ret_runs,
			 uint32_t count_max)
{
	const uint32_t written =
		atomic_load_explicit(&prefetch->fault_run_count, memory_order_acquire);
	const uint32_t count = min_u32(written > 0 ? written - 1 : 0, count_max);

	if (count > 0)
		memcpy(ret_runs, prefetch->faults, count * sizeof(*ret_runs));
	return count;
}

/* --- both ------------------------------------------------------------------------------------- */

int prefetch_init(struct prefetch *prefetch, uint64_t page_count, uint32_t page_size)
{
	memset(prefetch, 0, sizeof(*prefetch));
	prefetch->page_count = page_count;
	prefetch->len_max = min_u32(LEN_BYTES_MAX / page_size, PREFETCH_LEN_MAX);
	if (prefetch->len_max == 0)
		prefetch->len_max = 1;
	prefetch->len_first = min_u32(PREFETCH_LEN_FIRST, prefetch->len_max);
	prefetch->window.score = PREFETCH_SCORE_ONE / 2;
	prefetch->recorded.score = PREFETCH_SCORE_ONE / 2;
	/* Touched as it is filled: an arrival of few faults costs little. */
	prefetch->faults = calloc(GW_ARRIVAL_ORDER_COUNT_MAX, sizeof(*prefetch->faults));
	return prefetch->faults ? 0 : -ENOMEM;
}

void prefetch_fini(struct prefetch *prefetch)
{
	free(prefetch->order);
	free(prefetch->order_bits);
	free(prefetch->faults);
	prefetch->order = NULL;
	prefetch->order_bits = NULL;
	prefetch->faults = NULL;
}

uint32_t prefetch_on_fault(struct prefetch *prefetch, uint64_t page, uint64_t now_ns,
			   uint64_t *ret_first)
{
	prefetch->clock++;
	record(prefetch, page);
	judge_order(prefetch, page);
	return follow(prefetch, page, now_ns, ret_first);
}

static struct gw_prefetch_summary summary_of(const struct prefetch_score *score,
					     uint64_t window_count)
{
	return (struct gw_prefetch_summary){
		.window_count = window_count,
		.hit_count = atomic_load_explicit(&score->hit_count, memory_order_relaxed),
		.miss_count = atomic_load_explicit(&score->miss_count, memory_order_relaxed),
		.page_count = atomic_load_explicit(&score->wanted_page_count, memory_order_relaxed),
		.off = is_off(score),
	};
}

void prefetch_summarise(const struct prefetch *prefetch, struct gw_prefetch_summary *ret_window,
			struct gw_prefetch_summary *ret_recorded)
{
	const uint64_t at = atomic_load_explicit(&prefetch->order_at, memory_order_relaxed);

	*ret_window = summary_of(&prefetch->window, atomic_load_explicit(&prefetch->window_count,
									 memory_order_relaxed));
	*ret_recorded = summary_of(&prefetch->recorded, at >> AT_PAGE_BITS);
}
