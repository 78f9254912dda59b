/* SPDX-License-Identifier: Apache-2.0 */
/*
 * arrival_hold.c - how long no page could be had, and how long the guest was held by it.
 *
 * Threads    hold_turn: the demand thread. hold_tried: any of ours. hold_status: callers of the API;
 *            what it reads is written by the demand thread alone, and each field stands for itself.
 * Errors, Ownership, Units: see arrival_internal.h.
 * Source     arrival.h, struct gw_hold: what the words mean; docs/recovery.md.
 *
 * Everything is kept in the page map, which outlives us: a successor goes on with an outage that we
 * saw begin, and takes our last turn as the beginning of the one that our death was. An outage
 * is counted from the moment at which the guest runs (the bulk lanes were started); before it
 * nobody but the VMM's loading can wait.
 */
#include "arrival_internal.h"
#include "page_map_internal.h"

#include <godwit/sys.h>

static uint64_t load(const _Atomic uint64_t *value)
{
	return atomic_load_explicit(value, memory_order_relaxed);
}

static void store(_Atomic uint64_t *value, uint64_t to)
{
	atomic_store_explicit(value, to, memory_order_relaxed);
}

static struct gw_page_map_life *life_of(const struct gw_arrival *arrival)
{
	return &arrival->map->header->life;
}

void hold_adopt(struct gw_arrival *arrival)
{
	struct gw_page_map_life *const life = life_of(arrival);

	if (atomic_load(&life->runs) == 0 || load(&life->alive_ns) == 0 ||
	    load(&life->outage_ns) != 0 || arrival_is_over(arrival))
		return;
	atomic_store(&life->cause, GW_HOLD_AGENT_RESTART);
	store(&life->held_sum_ns, 0);
	store(&life->outage_ns, load(&life->alive_ns));
}

void hold_tried(struct gw_arrival *arrival, int outcome)
{
	if (outcome != GW_INSTALL_FULL && outcome != GW_INSTALL_DONE)
		return;
	const bool no_room = outcome == GW_INSTALL_FULL;

	if (atomic_load_explicit(&arrival->no_room, memory_order_relaxed) != no_room) {
		atomic_store(&arrival->no_room, no_room);
		arrival_wake_demand(arrival);
	}
}

/* Why no page can be had now; 0: they can. */
static uint32_t obstacle(const struct gw_arrival *arrival)
{
	if (atomic_load(&arrival->no_room))
		return GW_HOLD_NO_MEMORY;
	if (atomic_load(&arrival->up_mask) & 1U)
		return 0;
	return atomic_load(&arrival->nobody_listens) || atomic_load(&arrival->refused_mask) & 1U
		       ? GW_HOLD_PAGE_SERVER
		       : GW_HOLD_LINK_LOST;
}

static void begin_outage(struct gw_arrival *arrival, uint32_t cause, uint64_t now_ns)
{
	struct gw_page_map_life *const life = life_of(arrival);
	const uint64_t down_ns = atomic_load(&arrival->demand_down_ns);

	atomic_store(&life->cause, cause);
	store(&life->held_sum_ns, 0);
	store(&life->outage_ns, cause != GW_HOLD_NO_MEMORY && down_ns != 0 ? down_ns : now_ns);
}

/* Is whoever held the guest served, and who holds it now? */
static void follow_waiters(struct arrival_demand *demand, uint64_t now_ns)
{
	struct gw_arrival *const arrival = demand->arrival;
	struct gw_page_map_life *const life = life_of(arrival);
	const uint64_t outage_ns = load(&life->outage_ns);
	uint64_t read_ns = 0;

	/* Held, but by a fault that only a predecessor knew: it has been made to fault again. */
	if (load(&life->held_ns) != 0 && demand->held_page_plus_1 == 0)
		demand->held_page_plus_1 = demand_oldest_fault(demand, &read_ns);
	if (demand->held_page_plus_1 != 0 &&
	    gw_page_state_is_final(gw_page_map_get(arrival->map, demand->held_page_plus_1 - 1))) {
		store(&life->held_sum_ns, load(&life->held_sum_ns) + now_ns - load(&life->held_ns));
		store(&life->held_ns, 0);
		demand->held_page_plus_1 = 0;
	}
	/* One that began when pages could be had again is an ordinary fault. */
	if (demand->held_page_plus_1 != 0 ||
	    (obstacle(arrival) == 0 && load(&life->held_sum_ns) != 0))
		return;
	demand->held_page_plus_1 = demand_oldest_fault(demand, &read_ns);
	if (demand->held_page_plus_1 == 0)
		return;
	/* An adopter reads the event of a wait that may be as old as its predecessor's death. */
	if (read_ns < outage_ns || atomic_load(&life->cause) == GW_HOLD_AGENT_RESTART)
		read_ns = outage_ns;
	if (load(&life->held_ns) == 0)
		store(&life->held_ns, read_ns);
}

static void end_outage(struct arrival_demand *demand, uint64_t now_ns)
{
	struct gw_arrival *const arrival = demand->arrival;
	struct gw_page_map_life *const life = life_of(arrival);
	const uint64_t count = load(&life->hold_count);
	const uint64_t since_ns = load(&life->held_ns);
	/* Not 0: it waited when a predecessor died, and does not any more. */
	const uint64_t held_ns = load(&life->held_sum_ns) + (since_ns ? now_ns - since_ns : 0);
	const uint64_t one = 1;

	store(&life->holds[count % GW_ARRIVAL_HOLD_COUNT_MAX].cause, atomic_load(&life->cause));
	store(&life->holds[count % GW_ARRIVAL_HOLD_COUNT_MAX].outage_ns,
	      now_ns - load(&life->outage_ns));
	store(&life->holds[count % GW_ARRIVAL_HOLD_COUNT_MAX].held_ns, held_ns);
	store(&life->held_total_ns, load(&life->held_total_ns) + held_ns);
	store(&life->outage_ns, 0);
	store(&life->held_ns, 0);
	store(&life->held_sum_ns, 0);
	atomic_store(&life->cause, 0);
	/* Release: who reads the count sees the slot. */
	atomic_store_explicit(&life->hold_count, count + 1, memory_order_release);
	(void)gw_sys_write(arrival->wait_fd, &one, sizeof(one));
}

void hold_turn(struct arrival_demand *demand)
{
	struct gw_arrival *const arrival = demand->arrival;
	struct gw_page_map_life *const life = life_of(arrival);
	const uint64_t now_ns = gw_sys_now_ns();
	const bool runs = atomic_load_explicit(&arrival->bulk_started, memory_order_relaxed);

	store(&life->alive_ns, now_ns);
	if (runs && atomic_load_explicit(&life->runs, memory_order_relaxed) == 0)
		atomic_store(&life->runs, 1);
	/* Nobody is there to be held, or nothing will ever come: neither is an outage that ends. */
	if (atomic_load(&arrival->gone) || gw_page_map_is_violated(arrival->map))
		return;
	const bool over = arrival_is_over(arrival);
	const uint32_t cause = over ? 0 : obstacle(arrival);

	if (load(&life->outage_ns) == 0) {
		if (cause == 0 || !runs)
			return;
		begin_outage(arrival, cause, now_ns);
	} else if (cause == GW_HOLD_NO_MEMORY || (cause == GW_HOLD_PAGE_SERVER &&
						  atomic_load(&life->cause) == GW_HOLD_LINK_LOST)) {
		/* The first thing known of a killed page server is that it is silent. */
		atomic_store(&life->cause, cause);
	}
	follow_waiters(demand, now_ns);
	if (over || (cause == 0 && demand->held_page_plus_1 == 0 && demand->event_count == 0))
		end_outage(demand, now_ns);
}

void hold_status(const struct gw_arrival *arrival, struct gw_arrival_status *ret_status)
{
	const struct gw_page_map_life *const life = life_of(arrival);
	const uint64_t now_ns = gw_sys_now_ns();
	const uint64_t outage_ns = load(&life->outage_ns);
	const uint64_t held_ns = load(&life->held_ns);

	ret_status->hold_count = atomic_load_explicit(&life->hold_count, memory_order_acquire);
	for (uint32_t i = 0; i < GW_ARRIVAL_HOLD_COUNT_MAX; i++)
		ret_status->holds[i] = (struct gw_hold){
			.cause = (uint32_t)load(&life->holds[i].cause),
			.outage_ns = load(&life->holds[i].outage_ns),
			.held_ns = load(&life->holds[i].held_ns),
		};
	if (outage_ns != 0 && now_ns > outage_ns)
		ret_status->hold_now = (struct gw_hold){
			.cause = atomic_load(&life->cause),
			.outage_ns = now_ns - outage_ns,
			.held_ns = load(&life->held_sum_ns) +
				   (held_ns != 0 && now_ns > held_ns ? now_ns - held_ns : 0),
		};
	ret_status->held_total_ns = load(&life->held_total_ns) + ret_status->hold_now.held_ns;
}
