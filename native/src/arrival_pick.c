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

/* --- order ------------------------------------------------------------------------------------ */

void pick_hint(struct gw_arrival *arrival, uint64_t page)
{
	const uint32_t at = atomic_fetch_add_explicit(&arrival->hint_next, 1, memory_order_relaxed);

	atomic_store_explicit(&arrival->hints[at % ARRIVAL_HINT_COUNT], page + 1,
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

/* What follows a page that was just touched is touched next, as a rule. The newest first. */
uint64_t pick_near_fault(struct gw_arrival *arrival, uint64_t count_max, uint64_t *ret_first)
{
	const uint64_t hint_pages = ARRIVAL_HINT_LEN / arrival->page_size;
	const uint64_t reach = hint_pages > 0 ? hint_pages : 1;
	const uint32_t newest = atomic_load_explicit(&arrival->hint_next, memory_order_relaxed);

	for (uint32_t i = 1; i <= ARRIVAL_HINT_COUNT; i++) {
		const uint64_t page_plus_1 =
			atomic_exchange_explicit(&arrival->hints[(newest - i) % ARRIVAL_HINT_COUNT],
						 0, memory_order_relaxed);

		if (page_plus_1 == 0)
			continue;
		/* page_plus_1 is the page after the one that faulted. */
		const uint64_t end = page_plus_1 + reach < arrival->page_count
					     ? page_plus_1 + reach
					     : arrival->page_count;
		const uint64_t claimed = claim_between(arrival, page_plus_1, end,
						       count_max < reach ? count_max : reach,
						       ret_first);

		if (claimed > 0)
			return claimed;
	}
	return 0;
}

uint64_t pick_run(struct arrival_bulk *bulk, uint64_t count_max, uint64_t *ret_first)
{
	struct gw_arrival *const arrival = bulk->arrival;
	const uint64_t version = atomic_load(&arrival->returned_version);
	uint64_t claimed = pick_near_fault(arrival, count_max, ret_first);

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

static uint64_t cost_ns(uint64_t len, uint64_t rate)
{
	/* len is at most a want or a huge page: the product fits. */
	return len * NS_PER_S / rate;
}

uint64_t rate_want_len(const struct gw_arrival *arrival, uint64_t len_max)
{
	const uint64_t rate = atomic_load_explicit(&arrival->rate, memory_order_relaxed);
	/* About 10 ms worth, so that a slow lane does not come in lumps. */
	const uint64_t len = rate / 100 - rate / 100 % arrival->page_size;

	if (rate == 0 || len >= len_max)
		return len_max;
	return len < arrival->page_size ? arrival->page_size : len;
}

uint64_t rate_spend(struct gw_arrival *arrival, uint64_t len, uint64_t now_ns)
{
	const uint64_t rate = atomic_load_explicit(&arrival->rate, memory_order_relaxed);
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
	const uint64_t rate = atomic_load_explicit(&arrival->rate, memory_order_relaxed);
	uint64_t next_ns = atomic_load_explicit(&arrival->rate_next_ns, memory_order_relaxed);

	if (rate == 0)
		return;
	const uint64_t back_ns = cost_ns(len, rate);

	while (!atomic_compare_exchange_weak_explicit(&arrival->rate_next_ns, &next_ns,
						      next_ns > back_ns ? next_ns - back_ns : 0,
						      memory_order_relaxed, memory_order_relaxed))
		;
}
