/* SPDX-License-Identifier: Apache-2.0 */
/*
 * arrival_bulk.c - one bulk thread: everything that nobody waits for, over a connection of its own.
 *
 * Threads    Each bulk has one. It never touches what belongs to the demand thread.
 * Errors, Ownership, Units: see arrival_internal.h.
 * Source     DESIGN 3.3.
 *
 * The gate. While faults are hot, which is while one waits and ARRIVAL_GATE_NS after the last, so that a
 * guest that faults again at once does not find the pipes full, all links together have one step of
 * ARRIVAL_BULK_STEP_LEN on its way and no more: that is all that a fault can queue behind in the
 * network, the page server or on a core. Then they rest as long as the step took, so that every other fault
 * finds the way free, however fast it is; not longer, because a guest that faults without a break
 * would never be whole. (A rest of a millisecond, and a gate closed for two after each fault, were measured to
 * leave bulk a tenth of the way beside one fault a millisecond, and gained the faults nothing.) When
 * they cool down the window opens by doubling, to ARRIVAL_BULK_WINDOW_BYTES, and a fault shuts it at once.
 */
#include "arrival_internal.h"

#include <errno.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>

#include <godwit/sandbox.h>
#include <godwit/sys.h>

enum { TAG_WAKE, TAG_LINK };

#define AGAIN_NS  20000L
#define NS_PER_MS UINT64_C(1000000)

/* An event waits for the demand thread: give it the time. */
static int on_again(void *user)
{
	const struct arrival_bulk *const bulk = user;

	if (atomic_load_explicit(&bulk->arrival->stopping, memory_order_relaxed))
		return -ECANCELED;
	(void)nanosleep(&(struct timespec){.tv_nsec = AGAIN_NS}, NULL);
	return 0;
}

static void give_back(struct gw_arrival *arrival, uint64_t first, uint64_t count)
{
	/* Only those that no fault has promoted and no answer settled. */
	for (uint64_t page = first; page < first + count; page++)
		if (gw_page_map_get(arrival->map, page) == GW_PAGE_REQUESTED_BULK)
			(void)gw_page_map_move(arrival->map, page, GW_PAGE_REQUESTED_BULK,
					       GW_PAGE_ABSENT);
	atomic_fetch_add(&arrival->returned_version, 1);
}

static void on_up(void *owner)
{
	(void)owner;
}

static void on_down(void *owner)
{
	struct arrival_bulk *const bulk = owner;
	struct arrival_link *const link = &bulk->link;
	const uint64_t page_size = bulk->arrival->page_size;

	for (uint32_t i = 0; i < link->want_count; i++) {
		const struct link_want *const want =
			&link->wants[(link->want_first + i) % link->want_cap];
		const uint64_t first = want->offset / page_size;

		give_back(bulk->arrival, first,
			  (want->offset + want->len + page_size - 1) / page_size - first);
	}
	/* Other lanes may ask for them. */
	if (link->want_count > 0)
		arrival_wake_bulk(bulk->arrival);
}

static void tell_settled(struct arrival_bulk *bulk, uint64_t page, uint64_t woken_ns)
{
	struct settled_ring *const ring = &bulk->settled;
	const uint32_t written = atomic_load_explicit(&ring->written, memory_order_relaxed);

	if (written - atomic_load_explicit(&ring->taken, memory_order_acquire) ==
	    ARRIVAL_SETTLED_COUNT_MAX)
		return;
	ring->slots[written % ARRIVAL_SETTLED_COUNT_MAX] =
		(struct settled){.page = page, .woken_ns = woken_ns};
	atomic_store_explicit(&ring->written, written + 1, memory_order_release);
}

/* Somebody waits for these: the demand thread is told when they were woken. */
static uint32_t find_waited(const struct arrival_bulk *bulk, uint64_t first, uint64_t count,
			    uint64_t ret_pages[ARRIVAL_SETTLED_COUNT_MAX])
{
	uint32_t found = 0;

	for (uint64_t page = first; page < first + count && found < ARRIVAL_SETTLED_COUNT_MAX;
	     page++)
		if (gw_page_map_get(bulk->arrival->map, page) == GW_PAGE_REQUESTED_DEMAND)
			ret_pages[found++] = page;
	return found;
}

static void on_pages(void *owner, uint64_t first, uint64_t count, const uint8_t *data)
{
	struct arrival_bulk *const bulk = owner;
	struct gw_arrival *const arrival = bulk->arrival;
	uint64_t waited[ARRIVAL_SETTLED_COUNT_MAX];
	const uint32_t waited_count = find_waited(bulk, first, count, waited);
	int outcome;

	if (bulk->window_len < ARRIVAL_BULK_WINDOW_BYTES)
		bulk->window_len *= 2;
	if (data) {
		outcome = gw_install_run(&arrival->install, first, count, data, &bulk->again);
	} else {
		rate_refund(arrival, count * arrival->page_size);
		outcome = gw_install_zero_run(&arrival->install, first, count, &bulk->again);
	}
	if (outcome != GW_INSTALL_DONE) {
		/* Those that were not installed are ABSENT, or still REQUESTED by this want. */
		give_back(arrival, first, count);
		bulk->pause_ns = gw_sys_now_ns() + ARRIVAL_FULL_RETRY_NS;
		arrival_on_outcome(arrival, outcome);
	}
	if (data)
		hold_tried(arrival, outcome);
	if (waited_count > 0) {
		const uint64_t now_ns = gw_sys_now_ns();

		for (uint32_t i = 0; i < waited_count; i++)
			if (gw_page_state_is_final(gw_page_map_get(arrival->map, waited[i])))
				tell_settled(bulk, waited[i], now_ns);
	}
	if (waited_count > 0 || gw_bitmap_absent_count(gw_page_map_bitmap(arrival->map)) == 0)
		arrival_wake_demand(arrival);
}

static void on_zeros_beyond(void *owner, uint64_t first, uint64_t count)
{
	struct arrival_bulk *const bulk = owner;
	struct gw_arrival *const arrival = bulk->arrival;
	const int outcome = gw_install_zeros_beyond(&arrival->install, first, count, &bulk->again);

	/* What was not settled is as it was, and is asked for in its turn. */
	if (outcome != GW_INSTALL_DONE)
		arrival_on_outcome(arrival, outcome);
	if (gw_bitmap_absent_count(gw_page_map_bitmap(arrival->map)) == 0)
		arrival_wake_demand(arrival);
}

static const struct link_handler handler = {
	.on_up = on_up,
	.on_pages = on_pages,
	.on_zeros_beyond = on_zeros_beyond,
	.on_down = on_down,
};

int bulk_init(struct arrival_bulk *bulk, struct gw_arrival *arrival, uint32_t index)
{
	bulk->arrival = arrival;
	bulk->again = (struct gw_install_again){.on_again = on_again, .user = bulk};
	bulk->window_len = ARRIVAL_BULK_STEP_LEN;
	bulk->wake_fd = -1;
	bulk->epoll_fd = gw_sys_epoll_create();
	if (bulk->epoll_fd < 0)
		return bulk->epoll_fd;
	bulk->wake_fd = gw_sys_eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (bulk->wake_fd < 0)
		return bulk->wake_fd;
	struct epoll_event event = {.events = EPOLLIN, .data.u32 = TAG_WAKE};
	const int err = gw_sys_epoll_ctl(bulk->epoll_fd, EPOLL_CTL_ADD, bulk->wake_fd, &event);

	if (err < 0)
		return err;
	return link_init(&bulk->link, arrival, index, GW_PAGE_LANE_BULK, bulk->epoll_fd, TAG_LINK,
			 &handler, bulk);
}

void bulk_fini(struct arrival_bulk *bulk)
{
	link_fini(&bulk->link);
	if (bulk->wake_fd >= 0)
		(void)gw_sys_close(bulk->wake_fd);
	if (bulk->epoll_fd >= 0)
		(void)gw_sys_close(bulk->epoll_fd);
}

bool arrival_gate_is_closed(struct gw_arrival *arrival, uint64_t now_ns, uint64_t *ret_until_ns)
{
	const uint64_t until_ns =
		atomic_load_explicit(&arrival->fault_ns, memory_order_relaxed) + ARRIVAL_GATE_NS;

	if (atomic_load_explicit(&arrival->demand.faults.count, memory_order_relaxed) > 0)
		*ret_until_ns = now_ns + ARRIVAL_GATE_NS;
	else if (until_ns > now_ns)
		*ret_until_ns = until_ns;
	else
		return false;
	return true;
}

/* The step has come, or is lost: let the links rest. */
static void end_step(struct arrival_bulk *bulk, uint64_t now_ns)
{
	uint64_t rest_ns = now_ns - bulk->asked_ns;

	if (!bulk->stepping)
		return;
	bulk->stepping = false;
	if (rest_ns > ARRIVAL_BULK_REST_MAX)
		rest_ns = ARRIVAL_BULK_REST_MAX;
	atomic_store_explicit(&bulk->arrival->step_due_ns, now_ns + rest_ns, memory_order_relaxed);
}

/* Take the next step of all links. False: not before *ret_due_ns. One that is lost is over by itself. */
static bool take_step(struct arrival_bulk *bulk, uint64_t now_ns, uint64_t *ret_due_ns)
{
	_Atomic uint64_t *const due = &bulk->arrival->step_due_ns;
	uint64_t due_ns = atomic_load_explicit(due, memory_order_relaxed);

	if (now_ns < due_ns ||
	    !atomic_compare_exchange_strong_explicit(due, &due_ns, now_ns + ARRIVAL_BULK_REST_MAX,
						     memory_order_relaxed, memory_order_relaxed)) {
		*ret_due_ns = due_ns;
		return false;
	}
	bulk->stepping = true;
	bulk->asked_ns = now_ns;
	return true;
}

/* How much to ask for now; 0: nothing before *ret_due_ns, or before an answer. */
static uint64_t allowance(struct arrival_bulk *bulk, uint64_t now_ns, uint64_t *ret_due_ns)
{
	struct gw_arrival *const arrival = bulk->arrival;
	const uint64_t page_size = arrival->page_size;
	uint64_t len = bulk->link.want_len_max > page_size ? bulk->link.want_len_max : page_size;
	uint64_t gate_ns = 0;

	if (bulk->pause_ns > now_ns) {
		*ret_due_ns = bulk->pause_ns;
		return 0;
	}
	/* A page at a time until one finds room. */
	if (atomic_load_explicit(&arrival->no_room, memory_order_relaxed))
		return bulk->link.want_count > 0 ? 0 : rate_want_len(arrival, arrival->page_size);
	if (arrival_gate_is_closed(arrival, now_ns, &gate_ns)) {
		bulk->window_len = ARRIVAL_BULK_STEP_LEN;
		if (bulk->link.in_flight_bytes > 0) {
			*ret_due_ns = gate_ns;
			return 0;
		}
		end_step(bulk, now_ns);
		if (!take_step(bulk, now_ns, ret_due_ns))
			return 0;
	} else {
		bulk->stepping = false;
	}
	if (bulk->link.in_flight_bytes >= bulk->window_len)
		return 0;
	if (len > bulk->window_len)
		len = bulk->window_len > page_size ? bulk->window_len : page_size;
	return rate_want_len(arrival, len);
}

/*
 * Just after the switch the guest needs its working set, a page after the other, and every page of bulk
 * takes a core from it: for ARRIVAL_NEAR_NS only what is wanted soon is asked for, as long as it
 * faults every now and then; between two faults it computes, so the gate's own time is too short to tell.
 */
static bool is_near_only(struct gw_arrival *arrival, uint64_t now_ns, uint64_t *ret_until_ns)
{
	const uint64_t until_ns = atomic_load_explicit(&arrival->fault_ns, memory_order_relaxed) +
				  ARRIVAL_NEAR_HOT_NS;

	if (arrival_gate_is_closed(arrival, now_ns, ret_until_ns))
		return true;
	*ret_until_ns = until_ns;
	return now_ns < until_ns;
}

/* Fill the window. Returns when there may be more to ask for. */
static uint64_t ask(struct arrival_bulk *bulk, uint64_t now_ns)
{
	struct gw_arrival *const arrival = bulk->arrival;
	struct arrival_link *const link = &bulk->link;
	const uint64_t full_ns = atomic_load(&arrival->bulk_full_ns);
	uint64_t gate_ns = 0;
	const bool near_only = now_ns < full_ns && is_near_only(arrival, now_ns, &gate_ns);
	uint64_t due_ns = near_only ? (gate_ns < full_ns ? gate_ns : full_ns) : UINT64_MAX;
	bool found = true;

	while (link->up && link->cause == LINK_UP && atomic_load(&arrival->bulk_started) &&
	       arrival_is_fetching(arrival)) {
		uint64_t first = 0;
		uint64_t len = allowance(bulk, now_ns, &due_ns);

		if (len == 0)
			break;
		if (near_only && len > ARRIVAL_NEAR_LEN && arrival->page_size < ARRIVAL_NEAR_LEN)
			len = ARRIVAL_NEAR_LEN;
		const uint64_t wait_ns = rate_spend(arrival, len, now_ns);

		if (wait_ns > 0) {
			due_ns = now_ns + wait_ns;
			break;
		}
		const uint64_t count_max = len / arrival->page_size;
		const uint64_t count = near_only ? pick_wanted_soon(arrival, count_max, &first)
						 : pick_run(bulk, count_max, &first);

		rate_refund(arrival, len - count * arrival->page_size);
		found = count > 0;
		if (!found)
			break;
		if (link_want(link, first, count, now_ns) < 0) {
			give_back(arrival, first, count);
			break;
		}
		bulk->asked_ns = now_ns;
		GW_HOOK("bulk.asked");
	}
	atomic_store(&bulk->idle, !found && !near_only && link->want_count == 0);
	/* One that is idle speaks for all: what is left is on its way over the others. */
	rate_enter(arrival, link->up && found && atomic_load(&arrival->bulk_started) &&
				    arrival_is_fetching(arrival));
	link_flush(link, now_ns);
	return due_ns;
}

/* Of less than a millisecond the kernel's poll knows nothing: sleep it, where no answer is due. */
static int timeout_ms(const struct arrival_bulk *bulk, uint64_t due_ns, uint64_t now_ns)
{
	if (due_ns <= now_ns)
		return 0;
	if (due_ns - now_ns < NS_PER_MS && bulk->link.in_flight_bytes == 0) {
		(void)nanosleep(&(struct timespec){.tv_nsec = (long)(due_ns - now_ns)}, NULL);
		return 0;
	}
	const uint64_t ms = (due_ns - now_ns + NS_PER_MS - 1) / NS_PER_MS;

	return ms < ARRIVAL_WAIT_MS_MAX ? (int)ms : ARRIVAL_WAIT_MS_MAX;
}

void *bulk_main(void *argument)
{
	struct arrival_bulk *const bulk = argument;
	struct gw_arrival *const arrival = bulk->arrival;
	uint64_t now_ns = gw_sys_now_ns();

	(void)gw_sandbox_enter(GW_SANDBOX_PAGE_THREAD, arrival->sandbox);
	while (!atomic_load(&arrival->stopping)) {
		struct epoll_event events[2];
		uint64_t due_ns = UINT64_MAX;

		if (arrival_is_over(arrival)) {
			if (bulk->link.conn)
				link_close(&bulk->link, LINK_BROKEN, now_ns);
			atomic_store(&bulk->idle, true);
			rate_enter(arrival, false);
		} else {
			due_ns = link_on_time(&bulk->link, now_ns);
			const uint64_t ask_ns = ask(bulk, now_ns);

			due_ns = ask_ns < due_ns ? ask_ns : due_ns;
			/* ask may have brought the link down: its retry is due then. */
			if (!bulk->link.conn && bulk->link.retry_ns < due_ns)
				due_ns = bulk->link.retry_ns;
		}
		const int count = gw_sys_epoll_wait(bulk->epoll_fd, events, 2,
						    timeout_ms(bulk, due_ns, now_ns));

		now_ns = gw_sys_now_ns();
		for (int i = 0; i < count; i++) {
			if (events[i].data.u32 == TAG_WAKE)
				(void)arrival_drain_fd(bulk->wake_fd);
			else
				link_on_event(&bulk->link, events[i].events, now_ns);
		}
	}
	return NULL;
}
