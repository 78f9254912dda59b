/* SPDX-License-Identifier: Apache-2.0 */
/*
 * arrival_pick.c - what bulk asks for next, and how fast.
 *
 * Threads    Any bulk thread; hints come from the demand thread. Atomics only: a run is won by
 *            compare-and-swap of its pages' states, so that the cursor and the hints may
 *            be stale without harm.
 * Errors, Ownership, Units: see arrival_internal.h.
 * Source     DESIGN 3.3. The limit is a virtual clock (GCRA): the time at which everything sent
 *            so far would have gone out at the rate.
 */
#include "arrival_internal.h"

#include <godwit/sys.h>

#define RATE_BURST_NS UINT64_C(20000000)
#define NS_PER_S      UINT64_C(1000000000)
/* Of a hint, for the count; the page has the rest: 2^40 pages and more. */
#define HINT_COUNT_BITS 12

_Static_assert(PREFETCH_LEN_MAX < 1 << HINT_COUNT_BITS, "a window fits a hint");

/* --- order ------------------------------------------------------------------------------------ */

static uint64_t hint_of(uint64_t first, uint64_t count)
{
	return (first + 1) << HINT_COUNT_BITS | count;
}

void pick_hint(struct gw_arrival *arrival, uint64_t first, uint32_t count)
{
	const uint32_t at = atomic_fetch_add_explicit(&arrival->hint_next, 1, memory_order_relaxed);

	atomic_store_explicit(&arrival->hints[at % ARRIVAL_HINT_COUNT], hint_of(first, count),
			      memory_order_relaxed);
}

static uint64_t claim_from(struct gw_arrival *arrival, uint64_t first, uint64_t count)
{
	return gw_page_map_move_run(arrival->map, first, count, GW_PAGE_ABSENT,
				    GW_PAGE_REQUESTED_BULK);
}

/* The first run of ABSENT pages in [from, end) that can be claimed. */
static uint64_t claim_between(struct gw_arrival *arrival, uint64_t from, uint64_t end,
			      uint64_t count_max, uint64_t *ret_first)
{
	const struct gw_bitmap *const bitmap = gw_page_map_bitmap(arrival->map);

	while (from < end) {
		uint64_t first = 0;
		uint64_t count = gw_bitmap_next_run(bitmap, from, count_max, &first);

		if (count == 0 || first >= end)
			return 0;
		count = count < end - first ? count : end - first;
		const uint64_t claimed = claim_from(arrival, first, count);

		if (claimed > 0) {
			*ret_first = first;
			return claimed;
		}
		/* Absent, and another's already. */
		from = first + 1;
	}
	return 0;
}

/*
 * What prefetch.h has named, the newest first. A hint belongs to who exchanged it for 0; what
 * is left of it goes back only into an empty slot: a newer one is worth more than a rest.
 */
static uint64_t pick_near_fault(struct gw_arrival *arrival, uint64_t count_max, uint64_t *ret_first)
{
	const uint32_t newest = atomic_load_explicit(&arrival->hint_next, memory_order_relaxed);

	for (uint32_t i = 1; i <= ARRIVAL_HINT_COUNT; i++) {
		_Atomic uint64_t *const slot = &arrival->hints[(newest - i) % ARRIVAL_HINT_COUNT];
		const uint64_t hint = atomic_exchange_explicit(slot, 0, memory_order_relaxed);

		if (hint == 0)
			continue;
		const uint64_t first = (hint >> HINT_COUNT_BITS) - 1;
		const uint64_t end = first + (hint & ((UINT64_C(1) << HINT_COUNT_BITS) - 1));
		const uint64_t claimed = claim_between(arrival, first, end, count_max, ret_first);

		if (claimed == 0)
			continue;
		const uint64_t rest = *ret_first + claimed;
		uint64_t none = 0;

		if (rest < end)
			(void)atomic_compare_exchange_strong_explicit(slot, &none,
								      hint_of(rest, end - rest),
								      memory_order_relaxed,
								      memory_order_relaxed);
		atomic_fetch_add_explicit(&arrival->prefetch.window.wanted_page_count, claimed,
					  memory_order_relaxed);
		return claimed;
	}
	return 0;
}

/* Along the recorded order. Where it stands may be stale without harm: pages are won by their states. */
static uint64_t pick_recorded(struct gw_arrival *arrival, uint64_t count_max, uint64_t *ret_first)
{
	uint64_t first = 0;
	uint64_t at = 0;
	uint64_t count;

	while ((count = prefetch_order_next(&arrival->prefetch, &first, &at)) > 0) {
		const uint64_t claimed =
			claim_between(arrival, first, first + count, count_max, ret_first);

		prefetch_order_advance(&arrival->prefetch, at,
				       claimed > 0 ? *ret_first + claimed - first : count);
		if (claimed == 0)
			continue;
		atomic_fetch_add_explicit(&arrival->prefetch.recorded.wanted_page_count, claimed,
					  memory_order_relaxed);
		return claimed;
	}
	return 0;
}

uint64_t pick_wanted_soon(struct gw_arrival *arrival, uint64_t count_max, uint64_t *ret_first)
{
	const uint64_t claimed = pick_near_fault(arrival, count_max, ret_first);

	return claimed > 0 ? claimed : pick_recorded(arrival, count_max, ret_first);
}

uint64_t pick_run(struct arrival_bulk *bulk, uint64_t count_max, uint64_t *ret_first)
{
	struct gw_arrival *const arrival = bulk->arrival;
	const uint64_t version = atomic_load(&arrival->returned_version);
	uint64_t claimed = pick_wanted_soon(arrival, count_max, ret_first);

	if (claimed > 0)
		return claimed;
	/* A whole scan found nothing, and nothing was given back since. */
	if (bulk->scanned_version == version + 1)
		return 0;
	const uint64_t cursor = atomic_load_explicit(&arrival->cursor, memory_order_relaxed);

	claimed = claim_between(arrival, cursor, arrival->page_count, count_max, ret_first);
	if (claimed == 0)
		claimed = claim_between(arrival, 0, cursor, count_max, ret_first);
	if (claimed == 0) {
		bulk->scanned_version = version + 1;
		return 0;
	}
	atomic_store_explicit(&arrival->cursor, *ret_first + claimed, memory_order_relaxed);
	return claimed;
}

/* --- rate ------------------------------------------------------------------------------------- */

/* The engine's own limit, or its share of the pacer's if that is less. 0 = none. */
static uint64_t rate_now(const struct gw_arrival *arrival)
{
	const uint64_t own = atomic_load_explicit(&arrival->rate, memory_order_relaxed);
	const uint64_t share = arrival->pacer ? gw_pacer_share(arrival->pacer, arrival->weight) : 0;

	return share > 0 && (own == 0 || share < own) ? share : own;
}

void rate_enter(struct gw_arrival *arrival, bool wants)
{
	if (!arrival->pacer ||
	    atomic_exchange_explicit(&arrival->pacing, wants, memory_order_relaxed) == wants)
		return;
	if (wants)
		gw_pacer_enter(arrival->pacer, arrival->weight);
	else
		gw_pacer_leave(arrival->pacer, arrival->weight);
}

static uint64_t cost_ns(uint64_t len, uint64_t rate)
{
	/* len is at most a want or a huge page: the product fits. */
	return len * NS_PER_S / rate;
}

uint64_t rate_want_len(const struct gw_arrival *arrival, uint64_t len_max)
{
	const uint64_t rate = rate_now(arrival);
	/* About 10 ms worth, so that a slow lane does not come in lumps. */
	const uint64_t len = rate / 100 - rate / 100 % arrival->page_size;

	if (rate == 0 || len >= len_max)
		return len_max;
	return len < arrival->page_size ? arrival->page_size : len;
}

uint64_t rate_spend(struct gw_arrival *arrival, uint64_t len, uint64_t now_ns)
{
	const uint64_t rate = rate_now(arrival);
	uint64_t next_ns = atomic_load_explicit(&arrival->rate_next_ns, memory_order_relaxed);

	if (rate == 0)
		return 0;
	for (;;) {
		if (next_ns > now_ns)
			return next_ns - now_ns;
		const uint64_t base_ns = next_ns + RATE_BURST_NS > now_ns ? next_ns
									  : now_ns - RATE_BURST_NS;

		if (atomic_compare_exchange_weak_explicit(
			    &arrival->rate_next_ns, &next_ns, base_ns + cost_ns(len, rate),
			    memory_order_relaxed, memory_order_relaxed))
			return 0;
	}
}

void rate_refund(struct gw_arrival *arrival, uint64_t len)
{
	const uint64_t rate = rate_now(arrival);
	uint64_t next_ns = atomic_load_explicit(&arrival->rate_next_ns, memory_order_relaxed);

	if (rate == 0)
		return;
	const uint64_t back_ns = cost_ns(len, rate);

	while (!atomic_compare_exchange_weak_explicit(&arrival->rate_next_ns, &next_ns,
						      next_ns > back_ns ? next_ns - back_ns : 0,
						      memory_order_relaxed, memory_order_relaxed))
		;
}
