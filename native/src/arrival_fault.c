/* SPDX-License-Identifier: Apache-2.0 */
/*
 * arrival_fault.c - events of the userfaultfd, and the faults that wait for a page.
 *
 * Threads    The demand thread alone, but for the atomics named in arrival_internal.h.
 * Errors, Ownership, Units: see arrival_internal.h.
 * Source     userfaultfd(2); DESIGN 3.2.
 *
 * Nothing here allocates and everything is bounded. What does not fit is dropped, not lost: a waiter
 * that is woken while its page is absent faults again, so that dropping is "wake everybody
 * later". Events are read into a ring first, because an install that is held back (EAGAIN) can only go
 * on when they are, and it may be the handling of an event that is held back.
 */
#include "arrival_internal.h"

#include <sched.h>
#include <string.h>

#include <godwit/sys.h>

#define SLOT_COUNT	  (ARRIVAL_FAULT_COUNT_MAX * 2)
#define REMOVAL_FIRST_NS  UINT64_C(1000000)
#define REMOVAL_SECOND_NS UINT64_C(50000000)

_Static_assert((SLOT_COUNT & (SLOT_COUNT - 1)) == 0, "a mask finds the slot");

/* --- the table -------------------------------------------------------------------------------- */

static uint32_t slot_of(uint64_t page)
{
	return (uint32_t)(page * UINT64_C(0x9e3779b97f4a7c15) >> 40) & (SLOT_COUNT - 1);
}

static struct fault *table_find(struct fault_table *table, uint64_t page)
{
	for (uint32_t i = slot_of(page);; i = (i + 1) & (SLOT_COUNT - 1)) {
		struct fault *const fault = &table->slots[i];

		if (fault->page_plus_1 == page + 1)
			return fault;
		if (fault->page_plus_1 == 0)
			return NULL;
	}
}

static uint32_t table_count(const struct fault_table *table)
{
	return atomic_load_explicit(&table->count, memory_order_relaxed);
}

/* NULL: it is full. */
static struct fault *table_add(struct fault_table *table, uint64_t page, uint64_t read_ns)
{
	uint32_t i = slot_of(page);

	if (table_count(table) == ARRIVAL_FAULT_COUNT_MAX)
		return NULL;
	while (table->slots[i].page_plus_1 != 0)
		i = (i + 1) & (SLOT_COUNT - 1);
	table->slots[i] = (struct fault){
		.page_plus_1 = page + 1,
		.read_ns = read_ns,
		.waiter_count = 1,
	};
	table->unsent_count++;
	atomic_store_explicit(&table->count, table_count(table) + 1, memory_order_relaxed);
	return &table->slots[i];
}

/* Close the gap, so that no probe stops short of what lies behind it. */
static void table_remove(struct fault_table *table, struct fault *fault)
{
	uint32_t gap = (uint32_t)(fault - table->slots);

	table->unsent_count -= !fault->sent;
	for (uint32_t i = (gap + 1) & (SLOT_COUNT - 1); table->slots[i].page_plus_1 != 0;
	     i = (i + 1) & (SLOT_COUNT - 1)) {
		const uint32_t home = slot_of(table->slots[i].page_plus_1 - 1);

		/* It may move to the gap only if its home is not between the two. */
		if (((i - home) & (SLOT_COUNT - 1)) >= ((i - gap) & (SLOT_COUNT - 1))) {
			table->slots[gap] = table->slots[i];
			gap = i;
		}
	}
	table->slots[gap].page_plus_1 = 0;
	atomic_store_explicit(&table->count, table_count(table) - 1, memory_order_relaxed);
}

uint64_t demand_oldest_fault(const struct arrival_demand *demand, uint64_t *ret_read_ns)
{
	const struct fault *oldest = NULL;

	if (table_count(&demand->faults) == 0)
		return 0;
	for (uint32_t i = 0; i < SLOT_COUNT; i++) {
		const struct fault *const fault = &demand->faults.slots[i];

		if (fault->page_plus_1 != 0 && (!oldest || fault->read_ns < oldest->read_ns))
			oldest = fault;
	}
	if (!oldest)
		return 0;
	*ret_read_ns = oldest->read_ns;
	return oldest->page_plus_1;
}

/* --- reading ---------------------------------------------------------------------------------- */

static void look_at_removal(struct arrival_demand *demand, uint64_t first, uint64_t count)
{
	struct gw_arrival *const arrival = demand->arrival;
	const int64_t removed = gw_install_removed(&arrival->install, first, count);

	if (removed < 0)
		arrival_set_reason(arrival, "the page cache cannot be looked into: %s",
				   strerror((int)-removed));
}

static void on_remove(struct arrival_demand *demand, uint64_t start, uint64_t end, uint64_t now_ns)
{
	const struct gw_install *const install = &demand->arrival->install;

	for (uint32_t i = 0; i < install->region_count; i++) {
		const struct gw_install_region *const region = &install->regions[i];
		const uint64_t region_end =
			region->host_addr + region->page_count * install->page_size;
		const uint64_t from = start > region->host_addr ? start : region->host_addr;
		const uint64_t to = end < region_end ? end : region_end;

		if (from >= to)
			continue;
		const uint64_t first =
			region->first_page + (from - region->host_addr) / install->page_size;
		const uint64_t count = (to - from) / install->page_size;

		look_at_removal(demand, first, count);
		/* Full: what is not seen as REMOVED stays PRESENT, and a fault there reads zero as well. */
		if (demand->removal_count < ARRIVAL_REMOVAL_COUNT_MAX)
			demand->removals[demand->removal_count++] = (struct removal){
				.first = first,
				.count = count,
				.due_ns = now_ns + REMOVAL_FIRST_NS,
				.again = true,
			};
	}
}

void demand_look_at_removals(struct arrival_demand *demand, uint64_t now_ns)
{
	uint32_t kept_count = 0;

	for (uint32_t i = 0; i < demand->removal_count; i++) {
		struct removal removal = demand->removals[i];

		if (removal.due_ns <= now_ns) {
			look_at_removal(demand, removal.first, removal.count);
			if (!removal.again)
				continue;
			removal.again = false;
			removal.due_ns = now_ns + REMOVAL_SECOND_NS;
		}
		demand->removals[kept_count++] = removal;
	}
	demand->removal_count = kept_count;
}

uint64_t demand_removal_due_ns(const struct arrival_demand *demand)
{
	uint64_t due_ns = UINT64_MAX;

	for (uint32_t i = 0; i < demand->removal_count; i++)
		if (demand->removals[i].due_ns < due_ns)
			due_ns = demand->removals[i].due_ns;
	return due_ns;
}

static void read_events_of(struct arrival_demand *demand, int uffd)
{
	struct uffd_msg events[ARRIVAL_READ_COUNT];

	/* Bounded by the guest's threads: each has one fault at a time. */
	for (;;) {
		const int count = gw_uffd_read(uffd, events, ARRIVAL_READ_COUNT);
		const uint64_t now_ns = gw_sys_now_ns();

		if (count < 0) {
			arrival_set_reason(demand->arrival, "read of the userfaultfd: %s",
					   strerror(-count));
			return;
		}
		for (int i = 0; i < count; i++) {
			if (events[i].event == UFFD_EVENT_REMOVE) {
				on_remove(demand, events[i].arg.remove.start,
					  events[i].arg.remove.end, now_ns);
				continue;
			}
			if (events[i].event != UFFD_EVENT_PAGEFAULT)
				continue;
			if (demand->event_count == ARRIVAL_EVENT_COUNT_MAX) {
				demand->faults.overflowed = true;
				continue;
			}
			const uint32_t at = (demand->event_first + demand->event_count++) %
					    ARRIVAL_EVENT_COUNT_MAX;

			demand->events[at] = events[i];
			demand->event_ns[at] = now_ns;
		}
		if (count < (int)ARRIVAL_READ_COUNT)
			return;
	}
}

void demand_read_events(struct arrival_demand *demand)
{
	for (uint32_t i = 0; i < demand->arrival->uffd_count; i++)
		read_events_of(demand, demand->arrival->uffds[i]);
}

/* --- handling --------------------------------------------------------------------------------- */

static void record_latency(struct gw_arrival *arrival, uint64_t read_ns)
{
	const uint64_t now_ns = gw_sys_now_ns();

	gw_histogram_record(&arrival->latency, now_ns > read_ns ? now_ns - read_ns : 0);
}

/* Nobody waits for the page any more, since `woken_ns`. */
static void forget(struct arrival_demand *demand, struct fault *fault, uint64_t woken_ns)
{
	const uint64_t waited_ns = woken_ns > fault->read_ns ? woken_ns - fault->read_ns : 0;

	for (uint32_t i = 0; i < fault->waiter_count; i++)
		gw_histogram_record(&demand->arrival->latency, waited_ns);
	table_remove(&demand->faults, fault);
}

void demand_take_settled(struct arrival_demand *demand)
{
	struct gw_arrival *const arrival = demand->arrival;

	for (uint32_t i = 0; i < arrival->bulk_count; i++) {
		struct settled_ring *const ring = &arrival->bulks[i].settled;
		const uint32_t written = atomic_load_explicit(&ring->written, memory_order_acquire);
		uint32_t taken = atomic_load_explicit(&ring->taken, memory_order_relaxed);

		for (; taken != written; taken++) {
			const struct settled *const settled =
				&ring->slots[taken % ARRIVAL_SETTLED_COUNT_MAX];
			struct fault *const fault = table_find(&demand->faults, settled->page);

			/* One that faulted again since, on a page given back, waits still. */
			if (fault && settled->woken_ns >= fault->read_ns)
				forget(demand, fault, settled->woken_ns);
		}
		atomic_store_explicit(&ring->taken, taken, memory_order_release);
	}
}

/* Ask for one fault. False: the link takes no more now. */
static bool send_fault(struct arrival_demand *demand, struct fault *fault, uint64_t now_ns)
{
	if (link_want(&demand->link, fault->page_plus_1 - 1, 1, now_ns) < 0)
		return false;
	fault->sent = true;
	demand->faults.unsent_count--;
	return true;
}

void demand_send_faults(struct arrival_demand *demand, uint64_t now_ns)
{
	struct fault_table *const table = &demand->faults;

	if (table->unsent_count == 0 || !demand->link.up || !arrival_is_fetching(demand->arrival))
		return;
	for (uint32_t i = 0; i < SLOT_COUNT && table->unsent_count > 0; i++) {
		struct fault *const fault = &table->slots[i];

		if (fault->page_plus_1 != 0 && !fault->sent && !send_fault(demand, fault, now_ns))
			return;
	}
}

void demand_forget_sent(struct arrival_demand *demand)
{
	struct fault_table *const table = &demand->faults;

	for (uint32_t i = 0; i < SLOT_COUNT;) {
		struct fault *const fault = &table->slots[i];

		/* Bulk has settled it: its waiters are gone, only our own answer was still due. */
		if (fault->page_plus_1 != 0 &&
		    gw_page_state_is_final(
			    gw_page_map_get(demand->arrival->map, fault->page_plus_1 - 1))) {
			forget(demand, fault, gw_sys_now_ns());
			continue; /* another may have moved here */
		}
		fault->sent = false;
		i++;
	}
	table->unsent_count = table_count(table);
}

/*
 * A fault on a page that is not settled. True if it waits in the table now, false if the state
 * changed under us: look again.
 */
static bool wait_for(struct arrival_demand *demand, uint64_t page, uint8_t state, uint64_t read_ns)
{
	struct gw_arrival *const arrival = demand->arrival;
	struct fault *fault = table_find(&demand->faults, page);
	uint64_t hint_first = 0;
	uint32_t hint_next;

	if (fault) {
		/* A second waiter, never a second request. Waking is by range: one wake for all. */
		fault->waiter_count++;
		return true;
	}
	if (table_count(&demand->faults) == ARRIVAL_FAULT_COUNT_MAX) {
		demand->faults.overflowed = true;
		return true;
	}
	if (state != GW_PAGE_REQUESTED_DEMAND &&
	    !gw_page_map_move(arrival->map, page, state, GW_PAGE_REQUESTED_DEMAND))
		return false;
	fault = table_add(&demand->faults, page, read_ns);
	hint_next = prefetch_on_fault(&arrival->prefetch, page, read_ns, &hint_first);
	if (hint_next > 0) {
		pick_hint(arrival, hint_first, hint_next);
		/* Later bulk is awake anyway, and a wake costs as much as a fault. */
		if (read_ns < atomic_load_explicit(&arrival->bulk_full_ns, memory_order_relaxed))
			demand->wake_bulk = true;
	}
	atomic_store_explicit(&arrival->fault_ns, read_ns, memory_order_relaxed);
	if (arrival_is_fetching(arrival) && demand->link.up)
		(void)send_fault(demand, fault, read_ns);
	return true;
}

/* How the fault on a page came to us. */
enum fault_source {
	FAULT_MISSING, /* event of a userfaultfd: its thread sleeps in the kernel */
	FAULT_MINOR,   /* the same; the page cache has the page */
	FAULT_EXIT,    /* a vCPU in its exit, which sleeps until the page's bit is clear */
};

static void answer_settled(struct arrival_demand *demand, uint64_t page, enum fault_source source,
			   uint64_t read_ns)
{
	struct gw_arrival *const arrival = demand->arrival;

	/* Its bit is clear, or whoever settled the page is about to clear it and to wake. */
	if (source == FAULT_EXIT) {
		record_latency(arrival, read_ns);
		return;
	}
	const int outcome =
		gw_install_fault(&arrival->install, page, source == FAULT_MINOR, &demand->again);

	if (outcome == GW_INSTALL_DONE)
		record_latency(arrival, read_ns);
	else
		arrival_on_outcome(arrival, outcome);
}

static void handle_fault(struct arrival_demand *demand, uint64_t page, enum fault_source source,
			 uint64_t read_ns)
{
	struct gw_arrival *const arrival = demand->arrival;

	gw_page_map_count(arrival->map, GW_COUNT_FAULT, 1);
	for (;;) {
		const uint8_t state = gw_page_map_get(arrival->map, page);

		switch (state) {
		case GW_PAGE_ABSENT:
		case GW_PAGE_REQUESTED_BULK:
		case GW_PAGE_REQUESTED_DEMAND:
			if (wait_for(demand, page, state, read_ns))
				return;
			continue;
		case GW_PAGE_PRESENT:
		case GW_PAGE_ZERO:
		case GW_PAGE_REMOVED:
			answer_settled(demand, page, source, read_ns);
			return;
		case GW_PAGE_INSTALLING:
		case GW_PAGE_FILLED:
			/* About to be woken by who installs it, or to fault again if that fails. */
		case GW_PAGE_POISONED:
		default:
			return;
		}
	}
}

static void handle_event(struct arrival_demand *demand, const struct uffd_msg *event,
			 uint64_t read_ns)
{
	struct gw_arrival *const arrival = demand->arrival;
	const uint64_t address = event->arg.pagefault.address;
	const bool minor = (event->arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_MINOR) != 0;
	uint64_t page = 0;

	if (!gw_install_page_of(&arrival->install, address, &page)) {
		gw_install_violate(&arrival->install);
		arrival_set_final_reason(arrival, "a fault at %#llx, outside of every region",
					 (unsigned long long)address);
		return;
	}
	handle_fault(demand, page, minor ? FAULT_MINOR : FAULT_MISSING, read_ns);
}

void demand_handle_events(struct arrival_demand *demand)
{
	while (demand->event_count > 0) {
		const struct uffd_msg event = demand->events[demand->event_first];
		const uint64_t read_ns = demand->event_ns[demand->event_first];

		demand->event_first = (demand->event_first + 1) % ARRIVAL_EVENT_COUNT_MAX;
		demand->event_count--;
		handle_event(demand, &event, read_ns);
	}
}

bool demand_handle_exits(struct arrival_demand *demand)
{
	struct gw_arrival *const arrival = demand->arrival;
	struct gw_exit_request requests[ARRIVAL_READ_COUNT];
	uint32_t count;
	bool found = false;

	if (!arrival->exits)
		return false;
	do {
		const uint64_t now_ns = gw_sys_now_ns();

		count = gw_exits_take(arrival->exits, requests, ARRIVAL_READ_COUNT);
		for (uint32_t i = 0; i < count; i++)
			handle_fault(demand, requests[i].page, FAULT_EXIT, now_ns);
		found = found || count > 0;
		/* A VMM that posts for ever must not keep the pages from coming. */
	} while (count == ARRIVAL_READ_COUNT &&
		 table_count(&demand->faults) < ARRIVAL_FAULT_COUNT_MAX);
	return found;
}

void demand_answered(struct arrival_demand *demand, uint64_t first, uint64_t count)
{
	struct gw_arrival *const arrival = demand->arrival;

	atomic_store_explicit(&arrival->fault_ns, gw_sys_now_ns(), memory_order_relaxed);
	for (uint64_t page = first; page < first + count; page++) {
		struct fault *const fault = table_find(&demand->faults, page);

		if (!fault)
			continue;
		const uint8_t state = gw_page_map_get(arrival->map, page);

		/*
		 * Settled by this answer; or by bulk, which tells when (demand_take_settled). INSTALLING, FILLED: bulk is about to wake them. Else there was no room,
		 * or it went back to ABSENT by bulk's failing: who waits is woken later and asks again.
		 */
		if (gw_page_state_is_final(state)) {
			forget(demand, fault, gw_sys_now_ns());
			continue;
		}
		if (state == GW_PAGE_ABSENT || state == GW_PAGE_REQUESTED_BULK ||
		    state == GW_PAGE_REQUESTED_DEMAND)
			arrival_on_outcome(arrival, GW_INSTALL_FULL);
		table_remove(&demand->faults, fault);
	}
}

void demand_wake_dropped(struct arrival_demand *demand, uint64_t now_ns)
{
	struct gw_arrival *const arrival = demand->arrival;
	const uint64_t due_ns = atomic_load(&arrival->wake_all_ns);
	bool wake = due_ns != 0 && due_ns <= now_ns;

	if (demand->faults.overflowed && demand->event_count == 0 &&
	    table_count(&demand->faults) < ARRIVAL_FAULT_COUNT_MAX / 2)
		wake = true;
	if (!wake)
		return;
	demand->faults.overflowed = false;
	atomic_store(&arrival->wake_all_ns, 0);
	if (gw_install_wake_all(&arrival->install) < 0)
		atomic_store(&arrival->wake_all_ns, now_ns + ARRIVAL_FULL_RETRY_NS);
}
