/* SPDX-License-Identifier: Apache-2.0 */
/*
 * arrival_internal.h - what arrival*.c share: the engine, its links, its outstanding faults.
 *
 * Threads    One demand thread, one thread a bulk link, and callers of the API. What is not
 *            atomic belongs to one thread, named at its struct; `text_lock` guards strings.
 * Errors     Inside, functions return 0 or -errno; what the owner shall know goes to `reason`.
 * Ownership  See arrival.h.
 * Units      Bytes; ns of CLOCK_MONOTONIC; pages counted from the start of the image.
 * Source     DESIGN 3.1-3.3; docs/design/page-path.md.
 *
 *            +--------------- demand thread ---------------+
 *   uffds -> | events -> faults -> want --> demand link ----|--> page server
 *            |            ^                     |           |
 *            |            +-- install, publish, wake <------|---
 *            +----------------------------------------------+
 *   bulk thread: pick ABSENT run -> want --> bulk link -> install, publish, wake
 *
 * The threads share the page map and the bitmap, which need no lock, and a few atomics. Neither ever
 * waits for the other: a fault on a page that a bulk want has on its way is asked for again on
 * the demand link, and whichever answer comes first is installed (install.h: once). Rejected:
 * waiting for the bulk answer. It may be a megabyte away, or on a link that has just stalled,
 * and the price of asking again is one page of bandwidth.
 */
#ifndef GW_ARRIVAL_INTERNAL_H
#define GW_ARRIVAL_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include <godwit/arrival.h>
#include <godwit/exits.h>
#include <godwit/grpc.h>
#include <godwit/install.h>
#include <godwit/page_wire.h>
#include <godwit/stats.h>
#include <godwit/uffd.h>

#include "prefetch.h"
#include "spin.h"

#define ARRIVAL_HEARTBEAT_NS   UINT64_C(1000000000)
#define ARRIVAL_SILENCE_NS_MAX UINT64_C(2500000000) /* so that it is known within 3 s */
/* No want answered for so long, whatever else is said: the server is stuck, or drips. */
#define ARRIVAL_STALL_NS_DEMAND	    UINT64_C(5000000000)
#define ARRIVAL_STALL_NS_BULK	    UINT64_C(60000000000)
#define ARRIVAL_BACKOFF_NS_MIN	    UINT64_C(10000000)
#define ARRIVAL_BACKOFF_NS_MAX	    UINT64_C(1000000000)
#define ARRIVAL_DIAL_NS		    UINT64_C(500000000) /* between two attempts to connect */
#define ARRIVAL_DIAL_COUNT_MAX	    6U
#define ARRIVAL_FULL_RETRY_NS	    UINT64_C(100000000)
#define ARRIVAL_FAULT_COUNT_MAX	    4096U /* outstanding at once; more wait in the kernel */
#define ARRIVAL_EVENT_COUNT_MAX	    1024U /* read and not handled yet */
#define ARRIVAL_READ_COUNT	    64U	  /* events one read(2) takes */
#define ARRIVAL_REMOVAL_COUNT_MAX   256U
#define ARRIVAL_HINT_COUNT	    16U
#define ARRIVAL_SETTLED_COUNT_MAX   256U
#define ARRIVAL_BULK_WINDOW_BYTES   (UINT64_C(4) << 20)
#define ARRIVAL_BULK_STEP_LEN	    (UINT64_C(128) << 10) /* while faults are hot, one at a time */
#define ARRIVAL_BULK_REST_MAX	    UINT64_C(2000000)	  /* from one to the next, ns */
#define ARRIVAL_GATE_NS		    UINT64_C(100000)	  /* how long they stay so after the last */
#define ARRIVAL_NEAR_NS		    UINT64_C(100000000) /* how long bulk keeps to the faults at first */
#define ARRIVAL_NEAR_HOT_NS	    UINT64_C(2000000)	 /* since the last fault */
#define ARRIVAL_NEAR_LEN	    (UINT64_C(64) << 10) /* and how much it asks for at once */
#define ARRIVAL_ID_LEN_MAX	    128
#define ARRIVAL_SESSION_LEN_MAX	    64
#define ARRIVAL_TRACEPARENT_LEN_MAX 255
#define ARRIVAL_HOST_LEN_MAX	    63
/* Also how old a sign of life may be: what a successor cannot know of a hold (arrival_hold.c). */
#define ARRIVAL_WAIT_MS_MAX    100
#define ARRIVAL_WANT_COUNT_MAX 8192U /* of a demand link: a 2 MiB page is two wants */

struct gw_arrival;
struct arrival_link;

/* What is on its way: wants of a stream are answered in the order in which they were sent. */
struct link_want {
	uint64_t offset;
	uint64_t len;
	uint64_t done;
};

/* What the owner of a link is told, in the owner's thread. */
struct link_handler {
	/* The stream is accepted: ask. */
	void (*on_up)(void *owner);
	/* Checked pages; data is NULL where they are zero. */
	void (*on_pages)(void *owner, uint64_t first, uint64_t count, const uint8_t *data);
	/* Zeros that nobody asked for, behind a want that was all zeros. Bulk alone. */
	void (*on_zeros_beyond)(void *owner, uint64_t first, uint64_t count);
	/* The link is down; its wants are still in wants[], and are forgotten afterwards. */
	void (*on_down)(void *owner);
};

/* Why a link went down: how soon, and whether, it is tried again. */
enum link_cause {
	LINK_UP = 0,
	LINK_BROKEN = 1,  /* the transport, or the server for now: soon */
	LINK_DAMAGED = 2, /* what came was wrong: with a back-off that only good pages end */
	LINK_UNKNOWN = 3, /* the server does not know the image, yet: once a second */
	LINK_REFUSED = 4, /* for good: not until another server is named */
};

/* Attempts to connect that are on their way, the oldest first. */
struct arrival_dial {
	int fds[ARRIVAL_DIAL_COUNT_MAX];
	uint32_t count;
};

/* One lane's connection. All of it belongs to its thread. */
struct arrival_link {
	struct gw_arrival *arrival;
	const struct link_handler *handler;
	void *owner;
	struct gw_grpc *conn;	   /* NULL: down */
	struct arrival_dial dial;  /* empty while there is a connection */
	uint64_t dial_ns;	   /* the first of these attempts */
	struct gw_grpc_call *call; /* NULL: not opened, or ended */
	int epoll_fd;
	uint32_t epoll_tag;
	uint32_t epoll_events; /* as registered; 0 = not */
	uint32_t index;	       /* 0 = demand, 1.. = bulk */
	int32_t lane;	       /* enum gw_page_lane */
	bool up;	       /* accepted by ready */
	bool was_up;	       /* ever */
	bool good;	       /* no damage since the last good pages */
	enum link_cause cause; /* why it is about to go down, or went */
	uint32_t failure_count;
	uint32_t server_version;
	uint64_t opened_ns;
	uint64_t retry_ns; /* without a connection: when to do the next thing about it */
	uint64_t sent_ns;  /* the last message of ours */
	uint64_t
		progress_ns; /* the last want answered, or the first one asked since none was due */
	uint64_t heartbeat_sequence;
	uint64_t want_len_max;
	uint64_t zero_run_max; /* longest run of zeros that we take beyond a want's end; 0 = none */
	struct link_want *wants; /* ring */
	uint32_t want_cap;
	uint32_t want_first;
	uint32_t want_count;
	uint64_t in_flight_bytes;
	uint8_t *plain; /* bulk: packed pages are unpacked here; NULL = none are taken */
	uint8_t *page;	/* page size 2 MiB: put together here */
	uint64_t page_len;
	bool page_is_zero;
	char authority[ARRIVAL_HOST_LEN_MAX + 16];
	uint8_t hello[512 + GW_ARRIVAL_TOKEN_LEN_MAX];
	uint8_t token[GW_ARRIVAL_TOKEN_LEN_MAX]; /* as it was when the stream was opened */
};

/* A fault that waits for its page: one for each page, however many wait. */
struct fault {
	uint64_t page_plus_1; /* 0: free */
	uint64_t read_ns;
	uint32_t waiter_count;
	bool sent; /* on the link that is up now */
};

/* Open addressing, linear probing. Of the demand thread; count is read by others. */
struct fault_table {
	struct fault slots[ARRIVAL_FAULT_COUNT_MAX * 2];
	_Atomic uint32_t count;
	uint32_t unsent_count;
	bool overflowed; /* some were dropped: wake everybody when there is room, they fault again */
};

/* A REMOVE event that was read before the act: looked at again. */
struct removal {
	uint64_t first;
	uint64_t count;
	uint64_t due_ns;
	bool again; /* once more after this */
};

/* Of the demand thread. */
struct arrival_demand {
	struct gw_arrival *arrival;
	pthread_t thread;
	int epoll_fd;
	struct arrival_link link;
	struct gw_install_again again;
	struct fault_table faults;
	struct uffd_msg events[ARRIVAL_EVENT_COUNT_MAX]; /* ring */
	uint64_t event_ns[ARRIVAL_EVENT_COUNT_MAX];
	uint32_t event_first;
	uint32_t event_count;
	struct removal removals[ARRIVAL_REMOVAL_COUNT_MAX];
	uint32_t removal_count;
	bool phase_untold; /* the eventfd could not be written */
	struct spin spin;
	bool wake_bulk;		   /* there are hints: once the wants are out */
	uint64_t held_page_plus_1; /* whose fault holds the guest (arrival_hold.c); 0: none */
};

/* A page that somebody waited for, and bulk has brought. */
struct settled {
	uint64_t page;
	uint64_t woken_ns;
};

/* One writer, one reader. Full: the demand thread finds out by itself, later. */
struct settled_ring {
	struct settled slots[ARRIVAL_SETTLED_COUNT_MAX];
	_Atomic uint32_t written; /* release: the slot is whole */
	_Atomic uint32_t taken;	  /* release: the slot is free */
};

/* Of its bulk thread. */
struct arrival_bulk {
	struct gw_arrival *arrival;
	pthread_t thread;
	int epoll_fd;
	int wake_fd;
	struct arrival_link link;
	struct gw_install_again again;
	uint64_t asked_ns;	     /* the last want */
	bool stepping;		     /* that was a step of the closed gate */
	uint64_t window_len;	     /* how much may be on its way */
	uint64_t scanned_version;    /* of returned_version, when a whole scan found nothing */
	uint64_t pause_ns;	     /* ask for nothing before: no room */
	struct settled_ring settled; /* read by the demand thread */
	_Atomic bool idle;	     /* nothing on its way and nothing to ask for */
};

struct gw_arrival {
	/* Constant after create. */
	int uffds[GW_ARRIVAL_UFFD_COUNT_MAX];
	uint32_t uffd_count;
	int doorbell_fd;	/* of the exit channel; -1: none */
	struct gw_exits *exits; /* NULL: none */
	int ram_fd;
	int wait_fd;
	int wake_fd; /* the demand thread's */
	uint32_t page_size;
	uint32_t sandbox; /* enum gw_sandbox_mode */
	uint64_t page_count;
	uint64_t epoch;
	struct gw_page_map *map;
	struct gw_install install;
	uint32_t bulk_count;
	char image_id[ARRIVAL_ID_LEN_MAX + 1];
	char session_id[ARRIVAL_SESSION_LEN_MAX + 1];
	char traceparent[ARRIVAL_TRACEPARENT_LEN_MAX + 1];

	/* Of the callers of the API: one at a time. */
	bool started;

	/* Constant from create on. */
	struct gw_tls_identity *tls; /* NULL: plaintext */
	char server_name[GW_TLS_NAME_LEN_MAX + 1];
	/* text_lock: taken for copies of strings alone, never with a fault waiting on it. */
	pthread_mutex_t text_lock;
	size_t token_len;
	uint8_t token[GW_ARRIVAL_TOKEN_LEN_MAX];
	bool has_server_key;
	uint8_t server_key[GW_TLS_KEY_LEN];
	char host[ARRIVAL_HOST_LEN_MAX + 1];
	uint32_t port;
	char reason[GW_ARRIVAL_REASON_LEN_MAX];
	bool reason_is_final; /* of a guest that is held or gone: nothing that follows hides it */

	_Atomic bool stopping;
	_Atomic uint32_t phase;
	_Atomic uint32_t server_version; /* counts set_page_server */
	_Atomic bool bulk_started;
	_Atomic uint64_t bulk_full_ns; /* until then bulk keeps to the neighbours of faults */
	/*
	 * No step of the closed gate before; moved ahead by whoever takes one (compare and swap: one
	 * link at a time) and set when it has come. relaxed: nothing is read by it.
	 */
	_Atomic uint64_t step_due_ns;
	_Atomic uint64_t fault_ns; /* the last fault came then, or was answered; relaxed: a hint */
	_Atomic bool gone;	   /* the guest's process */
	_Atomic uint64_t demand_down_ns; /* since when; 0 = up */
	_Atomic bool demand_was_up;
	_Atomic bool nobody_listens;   /* at the page server's address, when it was last tried */
	_Atomic bool no_room;	       /* the last page with content found none */
	_Atomic uint32_t up_mask;      /* bit = link index */
	_Atomic uint32_t refused_mask; /* bit = link index */
	_Atomic int32_t grpc_status;
	_Atomic uint64_t wake_all_ns; /* wake every waiter then; 0 = no need */
	_Atomic uint64_t
		returned_version; /* counts pages given back to ABSENT, so that bulk looks again */
	_Atomic uint64_t cursor;  /* where bulk goes on */
	/* Runs that follow recent faults: (first + 1) << 12 | count; 0 = taken. */
	_Atomic uint64_t hints[ARRIVAL_HINT_COUNT];
	_Atomic uint32_t hint_next;
	_Atomic uint64_t rate; /* bytes a second; 0 = no limit */
	_Atomic uint64_t rate_next_ns;
	struct gw_histogram latency;
	struct prefetch prefetch;
	struct gw_pacer *pacer; /* constant after start; NULL: none */
	uint32_t weight;
	_Atomic bool pacing; /* counted among those who have something to ask for */

	struct arrival_demand demand;
	struct arrival_bulk bulks[GW_ARRIVAL_BULK_CONNECTION_COUNT_MAX];
};

/* arrival.c */
void arrival_set_reason(struct gw_arrival *arrival, const char *format, ...)
	__attribute__((format(printf, 2, 3)));
/* The last word: why the guest is held for good, or gone. */
void arrival_set_final_reason(struct gw_arrival *arrival, const char *format, ...)
	__attribute__((format(printf, 2, 3)));
void arrival_wake_demand(struct gw_arrival *arrival);
void arrival_wake_bulk(struct gw_arrival *arrival);
/* What an install says to the engine: who is gone, what is held, when to try again. */
void arrival_on_outcome(struct gw_arrival *arrival, int outcome);
/* May anything be asked for or installed? The gate is open and nothing is wrong. */
bool arrival_is_fetching(const struct gw_arrival *arrival);
/* Is there nothing left to do but answer late faults? */
bool arrival_is_over(const struct gw_arrival *arrival);
int arrival_drain_fd(int fd);

/* arrival_dial.c */
/* Try once more; the oldest of too many attempts is given up. 0; -errno: this one has failed. */
int dial_more(struct arrival_dial *dial, const char *host, uint32_t port, int epoll_fd,
	      uint32_t epoll_tag);
/*
 * The first attempt that is there: 1 and its descriptor, registered for EPOLLOUT, the others are
 * given up. 0 none yet; -errno the last one has failed.
 */
int dial_take(struct arrival_dial *dial, int *ret_fd);
void dial_stop(struct arrival_dial *dial);

/* arrival_link.c */
int link_init(struct arrival_link *link, struct gw_arrival *arrival, uint32_t index, int32_t lane,
	      int epoll_fd, uint32_t epoll_tag, const struct link_handler *handler, void *owner);
void link_fini(struct arrival_link *link);
/* epoll said so. */
void link_on_event(struct arrival_link *link, uint32_t events, uint64_t now_ns);
/* Connect, say that we live, give up a silent peer. Returns when to call again. */
uint64_t link_on_time(struct arrival_link *link, uint64_t now_ns);
/* Ask for pages. 0; -EAGAIN the queue is full; -ENOTCONN. */
int link_want(struct arrival_link *link, uint64_t first, uint64_t count, uint64_t now_ns);
/* Send what was asked; afterwards the link may be down. */
void link_flush(struct arrival_link *link, uint64_t now_ns);
/* Go down; nothing is tried again until link_on_time. */
void link_close(struct arrival_link *link, enum link_cause cause, uint64_t now_ns);
/* In a callback of the connection: go down as soon as it is over. */
void link_fail(struct arrival_link *link, enum link_cause cause);

/* The server has accepted the stream. */
void link_set_up(struct arrival_link *link);

/* arrival_receive.c: one message on a link. */
void link_on_message(struct arrival_link *link, const uint8_t *data, size_t len);

/* arrival_fault.c */
/* Take what vCPUs have posted, and see to it that their pages come. True if there was anything. */
bool demand_handle_exits(struct arrival_demand *demand);
/* Read what there is into the ring; removals are acted on at once. */
void demand_read_events(struct arrival_demand *demand);
void demand_handle_events(struct arrival_demand *demand);
void demand_look_at_removals(struct arrival_demand *demand, uint64_t now_ns);
uint64_t demand_removal_due_ns(const struct arrival_demand *demand);
/* Ask for every fault that has not been, as far as the link takes it. */
void demand_send_faults(struct arrival_demand *demand, uint64_t now_ns);
void demand_forget_sent(struct arrival_demand *demand);
/* Pages [first, first + count) were answered. */
void demand_answered(struct arrival_demand *demand, uint64_t first, uint64_t count);
/* Faults whose pages bulk has brought: nobody waits for them any more. */
void demand_take_settled(struct arrival_demand *demand);
/* Who was dropped, or could not be given room, faults again. */
void demand_wake_dropped(struct arrival_demand *demand, uint64_t now_ns);
/* The fault that has waited longest: its page + 1; 0: nobody waits. */
uint64_t demand_oldest_fault(const struct arrival_demand *demand, uint64_t *ret_read_ns);

/* arrival_hold.c: how long no page can be had, and how long the guest is held by it. */
/* Before there are threads: what a predecessor left. */
void hold_adopt(struct gw_arrival *arrival);
/* At each turn of the demand thread, its last. */
void hold_turn(struct arrival_demand *demand);
/* Pages with content were tried. */
void hold_tried(struct gw_arrival *arrival, int outcome);
void hold_status(const struct gw_arrival *arrival, struct gw_arrival_status *ret_status);

/* arrival_demand.c, arrival_bulk.c */
int demand_init(struct arrival_demand *demand, struct gw_arrival *arrival);
void demand_fini(struct arrival_demand *demand);
void *demand_main(void *demand);
int bulk_init(struct arrival_bulk *bulk, struct gw_arrival *arrival, uint32_t index);
void bulk_fini(struct arrival_bulk *bulk);
void *bulk_main(void *bulk);

/* Are faults hot? Then bulk goes in steps. */
bool arrival_gate_is_closed(struct gw_arrival *arrival, uint64_t now_ns, uint64_t *ret_until_ns);

/* arrival_pick.c */
/* Claim a run (REQUESTED_BULK) of up to count_max pages. Its length; 0 = nothing to ask for now. */
uint64_t pick_run(struct arrival_bulk *bulk, uint64_t count_max, uint64_t *ret_first);
/* The same, but only what follows a recent fault, or a recorded order names. */
uint64_t pick_wanted_soon(struct gw_arrival *arrival, uint64_t count_max, uint64_t *ret_first);
/* Ask for these next. Of the demand thread. */
void pick_hint(struct gw_arrival *arrival, uint64_t first, uint32_t count);
/* Spend bytes of the limit. 0, or how long to wait first. */
uint64_t rate_spend(struct gw_arrival *arrival, uint64_t len, uint64_t now_ns);
void rate_refund(struct gw_arrival *arrival, uint64_t len);
/* Bulk has something to ask for now, or not: its weight counts. */
void rate_enter(struct gw_arrival *arrival, bool wants);
/* How much one want should ask for under the limit. */
uint64_t rate_want_len(const struct gw_arrival *arrival, uint64_t len_max);

#endif /* GW_ARRIVAL_INTERNAL_H */
