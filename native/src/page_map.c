/* SPDX-License-Identifier: Apache-2.0 */
/*
 * page_map.c - the states and their table. The files are made in page_map_file.c.
 *
 * Threads, Errors, Ownership, Units, Source: see page_map.h.
 *
 * Ordering. A state is moved by compare-and-swap, acq_rel: who moves a page to INSTALLING has
 * it alone until it moves it on, and sees what the one before did. The order of an install is
 * kept by its caller: INSTALLING, ioctl, PRESENT (here, release), bit (bitmap.c, release), wake.
 * So a clear bit implies a settled state, never the other way round; an adopter that finds a
 * settled state with its bit set only has to clear it. A store into the mapped file survives the
 * death of the process at any instruction: the page cache is the file. tests: test_page_map.c,
 * adoption_after_a_kill_at_each_step in test_adopt.c.
 */
#include "page_map_internal.h"

#include <errno.h>

#define BIT(state) (1U << (state))

/* row: from; bits: to. */
static const uint16_t legal_moves[GW_PAGE_STATE_COUNT] = {
	[GW_PAGE_ABSENT] = BIT(GW_PAGE_REQUESTED_BULK) | BIT(GW_PAGE_REQUESTED_DEMAND) |
			   BIT(GW_PAGE_ZERO) | BIT(GW_PAGE_REMOVED) | BIT(GW_PAGE_POISONED),
	/* A fault promotes it; a lost connection gives it back. */
	[GW_PAGE_REQUESTED_BULK] = BIT(GW_PAGE_ABSENT) | BIT(GW_PAGE_REQUESTED_DEMAND) |
				   BIT(GW_PAGE_INSTALLING) | BIT(GW_PAGE_ZERO) |
				   BIT(GW_PAGE_REMOVED),
	/* ABSENT: an adopter knows no waiters; whoever waits faults again. */
	[GW_PAGE_REQUESTED_DEMAND] = BIT(GW_PAGE_ABSENT) | BIT(GW_PAGE_INSTALLING) |
				     BIT(GW_PAGE_ZERO) | BIT(GW_PAGE_REMOVED) |
				     BIT(GW_PAGE_POISONED),
	/* ABSENT: the kernel said that it has put nothing there. */
	[GW_PAGE_INSTALLING] = BIT(GW_PAGE_ABSENT) | BIT(GW_PAGE_FILLED) | BIT(GW_PAGE_PRESENT) |
			       BIT(GW_PAGE_REMOVED),
	/* INSTALLING: it could not be mapped, and is to be a hole again. */
	[GW_PAGE_FILLED] = BIT(GW_PAGE_INSTALLING) | BIT(GW_PAGE_PRESENT) | BIT(GW_PAGE_REMOVED),
	[GW_PAGE_PRESENT] = BIT(GW_PAGE_REMOVED),
	[GW_PAGE_ZERO] = BIT(GW_PAGE_PRESENT),
	[GW_PAGE_REMOVED] = 0,
	[GW_PAGE_POISONED] = 0,
};

bool gw_page_state_may_move(uint8_t from, uint8_t to)
{
	return from < GW_PAGE_STATE_COUNT && to < GW_PAGE_STATE_COUNT &&
	       (legal_moves[from] & BIT(to)) != 0;
}

bool gw_page_state_is_final(uint8_t state)
{
	return state == GW_PAGE_PRESENT || state == GW_PAGE_ZERO || state == GW_PAGE_REMOVED;
}

uint64_t gw_page_map_page_count(const struct gw_page_map *map)
{
	return map->bitmap.page_count;
}

struct gw_bitmap *gw_page_map_bitmap(struct gw_page_map *map)
{
	return &map->bitmap;
}

const struct gw_bitmap *gw_page_map_bitmap_const(const struct gw_page_map *map)
{
	return &map->bitmap;
}

uint8_t gw_page_map_get(const struct gw_page_map *map, uint64_t page)
{
	return atomic_load_explicit(&map->states[page], memory_order_acquire);
}

uint64_t gw_page_map_move_run(struct gw_page_map *map, uint64_t first, uint64_t count_max,
			      uint8_t from, uint8_t to)
{
	uint64_t count = 0;

	if (!gw_page_state_may_move(from, to)) {
		gw_page_map_count(map, GW_COUNT_VIOLATION, 1);
		return 0;
	}
	for (; count < count_max; count++) {
		uint8_t seen = from;

		if (!atomic_compare_exchange_strong_explicit(&map->states[first + count], &seen, to,
							     memory_order_acq_rel,
							     memory_order_acquire))
			break;
	}
	return count;
}

bool gw_page_map_move(struct gw_page_map *map, uint64_t page, uint8_t from, uint8_t to)
{
	return gw_page_map_move_run(map, page, 1, from, to) == 1;
}

/* Relaxed: a counter orders nothing. */
void gw_page_map_count(struct gw_page_map *map, enum gw_page_counter counter, uint64_t more)
{
	atomic_fetch_add_explicit(&map->header->counters[counter], more, memory_order_relaxed);
}

uint64_t gw_page_map_counter(const struct gw_page_map *map, enum gw_page_counter counter)
{
	return atomic_load_explicit(&map->header->counters[counter], memory_order_relaxed);
}

uint64_t gw_page_map_generation(const struct gw_page_map *map)
{
	return atomic_load_explicit(&map->header->generation, memory_order_acquire);
}

int gw_page_map_set_generation(struct gw_page_map *map, uint64_t generation)
{
	uint64_t seen = 0;

	if (generation == 0)
		return -EINVAL;
	/* The first one counts: pages of two generations must never mix in one guest. */
	if (atomic_compare_exchange_strong(&map->header->generation, &seen, generation) ||
	    seen == generation)
		return 0;
	return -EALREADY;
}

void gw_page_map_set_complete(struct gw_page_map *map)
{
	atomic_store(&map->header->complete, 1);
}

bool gw_page_map_is_complete(const struct gw_page_map *map)
{
	return atomic_load(&map->header->complete) != 0;
}

void gw_page_map_set_violated(struct gw_page_map *map)
{
	atomic_store(&map->header->violated, 1);
}

bool gw_page_map_is_violated(const struct gw_page_map *map)
{
	return atomic_load_explicit(&map->header->violated, memory_order_acquire) != 0;
}
