/* SPDX-License-Identifier: Apache-2.0 */
/*
 * arrival_demand.c - the demand thread: faults in, wants out, pages in, guests on.
 *
 * Threads    One. It never waits for anything but epoll, and for an event that holds back an
 *            install, which it is itself the one to read.
 * Errors, Ownership, Units: see arrival_internal.h.
 * Source     DESIGN 3.1 and 3.3.
 *
 * While faults are hot it looks instead of sleeping: spin.h. test_arrival.c: a_crowded_host_is_not_looked_away.
 */
#include "arrival_internal.h"

#include <errno.h>
#include <sched.h>
#include <string.h>
#include <time.h>

#include <godwit/sandbox.h>
#include <godwit/sys.h>

enum { TAG_UFFD, TAG_WAKE, TAG_LINK, TAG_DOORBELL };

#define AGAIN_NS	    20000L
#define EVENT_COUNT_MAX	    (GW_ARRIVAL_UFFD_COUNT_MAX + 3)
#define SPIN_UFFD_COUNT_MAX 2U /* each is a call a look; with more epoll asks them all at once */

/* Give the core away. False: for so long that looking does not pay here. */
static bool yield(struct arrival_demand *demand, uint64_t *ret_now_ns)
{
	const uint64_t begin_ns = gw_sys_now_ns();

	(void)sched_yield();
	GW_HOOK("demand.yielded");
	*ret_now_ns = gw_sys_now_ns();
	return spin_yielded(&demand->spin, begin_ns, *ret_now_ns);
}

static int on_again(void *user)
{
	struct arrival_demand *const demand = user;
	uint64_t now_ns = gw_sys_now_ns();

	if (atomic_load_explicit(&demand->arrival->stopping, memory_order_relaxed))
		return -ECANCELED;
	demand_read_events(demand);
	/* Read, and held back still: the guest's thread has to come out of its madvise. */
	if (now_ns < demand->spin.sleep_ns)
		(void)nanosleep(&(struct timespec){.tv_nsec = AGAIN_NS}, NULL);
	else
		(void)yield(demand, &now_ns);
	return 0;
}

static void on_up(void *owner)
{
	struct arrival_demand *const demand = owner;

	demand_send_faults(demand, gw_sys_now_ns());
}

static void on_pages(void *owner, uint64_t first, uint64_t count, const uint8_t *data)
{
	struct arrival_demand *const demand = owner;
	struct gw_arrival *const arrival = demand->arrival;
	const int outcome =
		data ? gw_install_run(&arrival->install, first, count, data, &demand->again)
		     : gw_install_zero_run(&arrival->install, first, count, &demand->again);

	if (outcome != GW_INSTALL_DONE)
		arrival_on_outcome(arrival, outcome);
	if (data)
		hold_tried(arrival, outcome); /* behind the reason: the phase follows from it */
	if (outcome == GW_INSTALL_FULL)
		hold_turn(demand); /* who waits for it is about to be forgotten */
	demand_answered(demand, first, count);
}

static void on_down(void *owner)
{
	/* They stay REQUESTED_DEMAND, in the table, and go first when there is a link again. */
	demand_forget_sent(owner);
}

static const struct link_handler handler = {
	.on_up = on_up,
	.on_pages = on_pages,
	.on_down = on_down,
};

static int watch(struct arrival_demand *demand, int fd, uint32_t tag)
{
	/*
	 * The doorbell is the VMM's: read it, and a VMM that emptied it between poll and read would hold
	 * us. Each ring is an edge of its own; nobody needs the count.
	 */
	const uint32_t edge = tag == TAG_DOORBELL ? EPOLLET : 0;
	struct epoll_event event = {.events = EPOLLIN | edge, .data.u32 = tag};

	return gw_sys_epoll_ctl(demand->epoll_fd, EPOLL_CTL_ADD, fd, &event);
}

int demand_init(struct arrival_demand *demand, struct gw_arrival *arrival)
{
	int err;

	demand->arrival = arrival;
	demand->again = (struct gw_install_again){.on_again = on_again, .user = demand};
	demand->epoll_fd = gw_sys_epoll_create();
	if (demand->epoll_fd < 0)
		return demand->epoll_fd;
	err = watch(demand, arrival->wake_fd, TAG_WAKE);
	for (uint32_t i = 0; i < arrival->uffd_count && err == 0; i++)
		err = watch(demand, arrival->uffds[i], TAG_UFFD);
	if (err == 0 && arrival->exits)
		err = watch(demand, arrival->doorbell_fd, TAG_DOORBELL);
	if (err < 0)
		return err;
	return link_init(&demand->link, arrival, 0, GW_PAGE_LANE_DEMAND, demand->epoll_fd, TAG_LINK,
			 &handler, demand);
}

void demand_fini(struct arrival_demand *demand)
{
	link_fini(&demand->link);
	if (demand->epoll_fd >= 0)
		(void)gw_sys_close(demand->epoll_fd);
}

/* --- the phase -------------------------------------------------------------------------------- */

static uint32_t phase_now(struct gw_arrival *arrival)
{
	const uint32_t all = (UINT32_C(1) << (arrival->bulk_count + 1)) - 1;
	const uint32_t up_mask = atomic_load(&arrival->up_mask);

	if (gw_page_map_is_violated(arrival->map))
		return GW_ARRIVAL_VIOLATION;
	if (atomic_load(&arrival->gone))
		return GW_ARRIVAL_ENDED;
	if (gw_bitmap_absent_count(gw_page_map_bitmap(arrival->map)) == 0)
		return GW_ARRIVAL_COMPLETE;
	if (atomic_load(&arrival->refused_mask) != 0)
		return GW_ARRIVAL_REFUSED;
	if (gw_page_map_generation(arrival->map) != 0 && (up_mask & 1U) == 0)
		return GW_ARRIVAL_LINK_LOST;
	if (gw_page_map_generation(arrival->map) != 0)
		return atomic_load(&arrival->no_room) ? GW_ARRIVAL_NO_MEMORY : GW_ARRIVAL_FETCHING;
	if (up_mask == all)
		return GW_ARRIVAL_ARMED;
	/* The gate is closed: LINK_LOST is for what was once there. */
	return (up_mask & 1U) == 0 && atomic_load(&arrival->demand_was_up) ? GW_ARRIVAL_LINK_LOST
									   : GW_ARRIVAL_CONNECTING;
}

static void tell_phase(struct gw_arrival *arrival)
{
	const uint32_t phase = phase_now(arrival);
	const uint64_t one = 1;

	if (phase == atomic_load(&arrival->phase) && !arrival->demand.phase_untold)
		return;
	if (phase == GW_ARRIVAL_COMPLETE)
		gw_page_map_set_complete(arrival->map);
	atomic_store(&arrival->phase, phase);
	const ssize_t written = gw_sys_write(arrival->wait_fd, &one, sizeof(one));

	/* EAGAIN: it rings already. What was not told is told at the next turn, a second away at most. */
	arrival->demand.phase_untold = written < 0 && written != -EAGAIN;
	/* Bulk threads end with it, or begin. */
	arrival_wake_bulk(arrival);
}

/* --- the loop --------------------------------------------------------------------------------- */

static uint64_t on_time(struct arrival_demand *demand, uint64_t now_ns)
{
	struct gw_arrival *const arrival = demand->arrival;
	const uint64_t wake_all_ns = atomic_load(&arrival->wake_all_ns);
	uint64_t due_ns = demand_removal_due_ns(demand);

	if (arrival_is_over(arrival)) {
		if (demand->link.conn)
			link_close(&demand->link, LINK_BROKEN, now_ns);
	} else {
		const uint64_t link_ns = link_on_time(&demand->link, now_ns);

		due_ns = link_ns < due_ns ? link_ns : due_ns;
	}
	if (wake_all_ns != 0 && wake_all_ns < due_ns)
		due_ns = wake_all_ns;
	return due_ns;
}

static int timeout_ms(uint64_t due_ns, uint64_t now_ns)
{
	if (due_ns <= now_ns)
		return 0;
	const uint64_t ms = (due_ns - now_ns + 999999) / 1000000;

	return ms < ARRIVAL_WAIT_MS_MAX ? (int)ms : ARRIVAL_WAIT_MS_MAX;
}

/* Sleep, or look only, if something is due or a vCPU has posted. */
static int sleep_for_events(struct arrival_demand *demand, struct epoll_event *ret_events,
			    int timeout)
{
	struct gw_exits *const exits = demand->arrival->exits;

	if (!exits || timeout == 0 || !gw_exits_sleep(exits))
		return gw_sys_epoll_wait(demand->epoll_fd, ret_events, EVENT_COUNT_MAX,
					 exits ? 0 : timeout);
	const int count = gw_sys_epoll_wait(demand->epoll_fd, ret_events, EVENT_COUNT_MAX, timeout);

	gw_exits_awake(exits);
	return count;
}

/*
 * One look, without epoll: one call less, and what there is has been taken already. A fault, an
 * exit, or bytes on the link? Whatever else epoll watches can wait as long as the looking does.
 */
static bool look(struct arrival_demand *demand, uint64_t now_ns)
{
	struct arrival_link *const link = &demand->link;

	if (atomic_load_explicit(&demand->faults.count, memory_order_relaxed) > 0) {
		link_on_event(link, EPOLLIN, now_ns);
		if (!link->conn || gw_grpc_received_ns(link->conn) == now_ns)
			return true;
	}
	demand_read_events(demand);
	return demand->event_count > 0 || demand_handle_exits(demand);
}

/* May looking pay? Not if epoll has to say when the socket takes more. */
static bool may_spin(const struct arrival_demand *demand, uint64_t due_ns, uint64_t now_ns)
{
	return spin_may(&demand->spin, now_ns) && due_ns > now_ns && demand->link.up &&
	       demand->arrival->uffd_count <= SPIN_UFFD_COUNT_MAX &&
	       arrival_is_fetching(demand->arrival) && !gw_grpc_wants_write(demand->link.conn);
}

static bool spin(struct arrival_demand *demand, uint64_t due_ns, uint64_t begin_ns)
{
	const uint64_t spin_end_ns = begin_ns + demand->spin.look_ns;
	const uint64_t end_ns = spin_end_ns < due_ns ? spin_end_ns : due_ns;

	uint64_t now_ns;

	do {
		/* First: whoever we have just given work may need this core for it. */
		const bool pays = yield(demand, &now_ns);

		if (look(demand, now_ns))
			return true;
		if (!pays)
			return false;
	} while (now_ns < end_ns);
	return false;
}

/* Look, then sleep. Returns how many events epoll has; 0 also if looking has found something. */
static int wait_events(struct arrival_demand *demand, struct epoll_event *ret_events,
		       uint64_t due_ns, uint64_t now_ns)
{
	if (may_spin(demand, due_ns, now_ns) && spin(demand, due_ns, now_ns))
		return 0;
	return sleep_for_events(demand, ret_events, timeout_ms(due_ns, now_ns));
}

void *demand_main(void *argument)
{
	struct arrival_demand *const demand = argument;
	struct gw_arrival *const arrival = demand->arrival;
	uint64_t now_ns = gw_sys_now_ns();
	uint64_t due_ns = on_time(demand, now_ns);

	/* Without it the guest is served all the same; who started us knows whether it works here. */
	(void)gw_sandbox_enter(GW_SANDBOX_PAGE_THREAD, arrival->sandbox);
	while (!atomic_load(&arrival->stopping)) {
		struct epoll_event events[EVENT_COUNT_MAX];
		uint32_t link_events = 0;
		const uint64_t begin_ns = now_ns;
		const int count = wait_events(demand, events, due_ns, now_ns);
		bool faulted = false;

		now_ns = gw_sys_now_ns();
		spin_learn(&demand->spin, now_ns - begin_ns);
		for (int i = 0; i < count; i++) {
			if (events[i].data.u32 == TAG_UFFD)
				faulted = true;
			else if (events[i].data.u32 == TAG_WAKE)
				(void)arrival_drain_fd(arrival->wake_fd);
			else if (events[i].data.u32 == TAG_LINK)
				link_events = events[i].events;
		}
		if (faulted)
			demand_read_events(demand);
		demand_take_settled(demand);
		/* Wants first: the network works on them while we install what has come. */
		demand_handle_events(demand);
		(void)demand_handle_exits(demand);
		demand_send_faults(demand, now_ns);
		link_flush(&demand->link, now_ns);
		if (demand->wake_bulk)
			arrival_wake_bulk(arrival);
		demand->wake_bulk = false;
		if (link_events)
			link_on_event(&demand->link, link_events, now_ns);
		demand_look_at_removals(demand, now_ns);
		demand_wake_dropped(demand, now_ns);
		due_ns = on_time(demand, now_ns);
		tell_phase(arrival);
		hold_turn(demand);
	}
	return NULL;
}
