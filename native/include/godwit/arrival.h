/* SPDX-License-Identifier: Apache-2.0 */
/*
 * arrival.h - destination half of post-copy: userfault events and vCPU exits become page
 * requests, the pages that come back are installed, published and woken.
 *
 * Threads    One engine per arriving guest. It owns one demand thread (reads the
 *            userfaultfds and the exit channel, talks on the demand connection, installs what it
 *            receives) and one thread a bulk connection. Every function here may
 *            be called from any thread, one caller at a time per engine; none
 *            calls back. Nothing here needs the caller to make progress.
 * Errors     Functions return a count or an outcome >= 0, or -errno; they never
 *            log and never touch a ret_ argument when they fail. What goes wrong
 *            later is in gw_arrival_status and makes wait_fd readable.
 * Ownership  create duplicates the descriptors; the caller keeps its own. The
 *            VMM keeps its own userfaultfds always: destroy closes ours and leaves
 *            the guest blocked on what is absent, never reading zeros.
 * Units      Offsets and lengths are bytes of the image, page aligned.
 * Source     DESIGN 3.1-3.3; userfaultfd(2); docs/design/page-path.md.
 */
#ifndef GW_ARRIVAL_H
#define GW_ARRIVAL_H

#include <stddef.h>
#include <stdint.h>

#include <godwit/export.h>
#include <godwit/pacer.h>
#include <godwit/tls.h>

/* cdef:begin - extracted for cffi by tools/gen_ffi.py; keep it plain C. */

#define GW_ARRIVAL_REGION_COUNT_MAX	     64
#define GW_ARRIVAL_UFFD_COUNT_MAX	     16
#define GW_ARRIVAL_BULK_CONNECTION_COUNT_MAX 8
#define GW_ARRIVAL_REASON_LEN_MAX	     192
#define GW_ARRIVAL_HOLD_COUNT_MAX	     8
#define GW_ARRIVAL_TOKEN_LEN_MAX	     1024
#define GW_ARRIVAL_ORDER_COUNT_MAX	     65536

/* Opaque. One per guest being received. */
struct gw_arrival;

enum gw_arrival_phase {
	GW_ARRIVAL_CONNECTING = 1, /* lanes are being opened for the first time */
	GW_ARRIVAL_ARMED = 2,	   /* both lanes are up, the gate is closed: faults are held */
	GW_ARRIVAL_FETCHING = 3,   /* the gate is open */
	GW_ARRIVAL_LINK_LOST = 4,  /* the demand lane is down; reconnecting by itself */
	GW_ARRIVAL_COMPLETE = 5,   /* every page is PRESENT, ZERO or REMOVED */
	GW_ARRIVAL_ENDED = 6,	   /* the guest's process is gone */
	GW_ARRIVAL_REFUSED = 7,	   /* the server refused for good: see reason */
	GW_ARRIVAL_VIOLATION =
		8, /* an invariant broke: nothing more is installed, the guest is held */
	GW_ARRIVAL_NO_MEMORY = 9, /* pages come and there is no room for them: tried again */
};

/* Why no page could be had for a while: docs/recovery.md. */
enum gw_hold_cause {
	GW_HOLD_NONE = 0,
	GW_HOLD_LINK_LOST = 1,	   /* the page server is silent, or cannot be reached */
	GW_HOLD_PAGE_SERVER = 2,   /* nobody listens there, or it refuses the image */
	GW_HOLD_AGENT_RESTART = 3, /* the engine was gone */
	GW_HOLD_NO_MEMORY = 4,	   /* pages came and found no room */
};

/* How pages are put in place. */
enum gw_install_method {
	GW_INSTALL_COPY = 1, /* UFFDIO_COPY on MISSING: the default */
	GW_INSTALL_CONTINUE =
		2, /* fill through an alias of ram_fd, then UFFDIO_CONTINUE: needs MINOR */
	/*
	 * Write to ram_fd; no userfaultfd. Only with an exit channel whose guest cannot see a page
	 * before its bit is clear (PROT_NONE).
	 */
	GW_INSTALL_WRITE = 3,
};

struct gw_arrival_region {
	uint64_t offset;     /* of its first byte, in the image; equals its offset in ram_fd */
	uint64_t host_addr;  /* of its first byte, in the guest's process */
	uint64_t len;	     /* > 0 */
	uint32_t uffd_index; /* of the userfaultfd that it is registered with; 0 if there is none */
	uint32_t reserved;   /* zero */
};

struct gw_arrival_config {
	uint32_t struct_size;	   /* sizeof(struct gw_arrival_config) */
	uint32_t page_size;	   /* 4096 or 2097152 */
	uint64_t epoch;		   /* the destination's epoch, >= 1 */
	const char *page_map_path; /* page-state file, in tmpfs; made by create, or adopted */
	const char *session_id;	   /* 1..64 characters */
	const char *image_id;	   /* 1..128 characters */
	const char *page_host;	   /* numeric address of the page server */
	const char *traceparent;   /* may be empty */
	uint32_t page_port;	   /* 1..65535 */
	const int32_t *uffds;	   /* API handshake done, regions registered */
	uint32_t uffd_count;	   /* 0 with GW_INSTALL_WRITE, else 1..GW_ARRIVAL_UFFD_COUNT_MAX */
	int32_t ram_fd;		  /* the destination's RAM file: the page cache is looked up here */
	int32_t exit_channel_fd;  /* of the VMM (docs/exit-channel.md); -1: its faults are uffd's */
	int32_t exit_doorbell_fd; /* with it, else -1 */
	uint32_t install_method;  /* enum gw_install_method */
	uint32_t bulk_connection_count; /* 1..GW_ARRIVAL_BULK_CONNECTION_COUNT_MAX */
	uint32_t adopt;			/* 1: page_map_path is a predecessor's: take it over */
	uint64_t bulk_bytes_per_s_max;	/* 0 = no limit; demand is never limited */
	const struct gw_arrival_region *regions; /* ascending, not overlapping */
	uint32_t region_count;			 /* 1..GW_ARRIVAL_REGION_COUNT_MAX */
	uint32_t
		sandbox; /* enum gw_sandbox_mode of its threads; where it cannot be, they run without */
	struct gw_tls_identity *tls;  /* NULL: plaintext; a reference is taken */
	const char *page_server_name; /* with TLS: the name that its certificate must have */
	const uint8_t *token;	      /* a FetchToken; NULL: none */
	uint64_t token_len;	      /* up to GW_ARRIVAL_TOKEN_LEN_MAX */
};

struct gw_latency_summary {
	uint64_t sample_count;
	uint64_t p50_ns, p99_ns, p999_ns, max_ns;
};

/* Consecutive pages of the image. */
struct gw_page_run {
	uint64_t first;
	uint64_t count; /* > 0 */
};

/* How well a prefetch policy guesses: docs/design/page-path.md. */
struct gw_prefetch_summary {
	uint64_t window_count; /* runs that were asked for because of it */
	uint64_t hit_count;    /* windows judged, or faults: it was right */
	uint64_t miss_count;   /* or wrong */
	uint64_t page_count;   /* pages asked for so */
	uint32_t
		off; /* 1: it did not pay. Windows are tried again within a second, an order is not */
	uint32_t reserved;
};

/*
 * A time in which no page could be had, while the guest ran, and how much of it the guest was
 * held: somebody waited for an absent page. Held begins with the first fault that waits (or with the
 * outage, if one waits already) and ends when that fault is served; so it may outlast the outage
 * by one fetch. After AGENT_RESTART it counts from the last sign of life of the engine
 * before, if anybody waits: an upper bound, as nobody knows when in between the fault was.
 */
struct gw_hold {
	uint32_t cause;	   /* enum gw_hold_cause */
	uint32_t reserved; /* zero */
	uint64_t outage_ns;
	uint64_t held_ns; /* 0: nobody waited */
};

struct gw_arrival_status {
	uint32_t phase;	     /* enum gw_arrival_phase */
	uint32_t bulk_done;  /* 1: the bulk lanes have nothing left to ask for */
	int32_t grpc_status; /* of the last stream that ended with an error, else 0 */
	uint32_t reserved;
	uint64_t page_count, absent_count;
	uint64_t demand_page_count, bulk_page_count, zero_page_count, removed_page_count;
	uint64_t fault_count;	   /* events, a second waiter on a page included */
	uint64_t held_fault_count; /* waiting now: REQUESTED by demand and not installed */
	uint64_t received_bytes, checksum_error_count, reconnect_count, violation_count;
	uint64_t link_lost_ns; /* how long the demand lane has been down, now; 0 = up */
	struct gw_latency_summary fault_latency;
	struct gw_prefetch_summary prefetch; /* windows behind faults */
	struct gw_prefetch_summary recorded; /* the order of gw_arrival_set_order */
	/* Outages of this arrival that are over, across adoptions: the last ones, by number - 1 modulo. */
	uint64_t hold_count;
	uint64_t held_total_ns; /* the one that is not over included */
	struct gw_hold holds[GW_ARRIVAL_HOLD_COUNT_MAX];
	struct gw_hold hold_now;		/* cause 0: pages can be had */
	char reason[GW_ARRIVAL_REASON_LEN_MAX]; /* why, in words; NUL-terminated */
};

/*
 * Take over a guest whose memory is absent. New map: checks that ram_fd has no
 * data anywhere (the regions are registered already, so that nothing can slip
 * in afterwards). Adopted map: reads it together with the page cache (DESIGN
 * 3.2), wakes the whole range so that every waiter faults again.
 *
 * Returns 0; -EINVAL a field is out of range; -ENOTEMPTY the memory has data that
 * no map accounts for: it is not the guest's, do not run it; -ESTALE the adopted
 * map is of another epoch or geometry; -EPROTONOSUPPORT a newer release made it;
 * -ENOENT nothing to adopt; -ENXIO the memory is not registered (any more); -ENOMEM;
 * or the -errno of a failing call.
 */
int gw_arrival_create(const struct gw_arrival_config *config, struct gw_arrival **ret_arrival);

/* Start the threads: connect both lanes, serve. Returns 0; -EALREADY; -errno of a failing call. */
int gw_arrival_start(struct gw_arrival *arrival);

/*
 * The image is FROZEN at `generation`: ask for pages from now on, faults held
 * so far first. Recorded in the map, so that an adopter goes on. Until this call
 * no page is requested and none installed.
 *
 * Returns 0; -EINVAL 0; -EALREADY another generation was given.
 */
int gw_arrival_open_gate(struct gw_arrival *arrival, uint64_t generation);

/* Let the bulk lanes run; the gate must be open. Idempotent. Returns 0; -EAGAIN gate closed. */
int gw_arrival_start_bulk(struct gw_arrival *arrival);

/* Change the limit of the bulk lanes, now. 0 = none. */
int gw_arrival_set_bulk_rate(struct gw_arrival *arrival, uint64_t bytes_per_s_max);

/*
 * Share a pacer's bandwidth with its other members: bulk is limited by the share and by its own rate, whichever
 * is less. Before start. Returns 0; -EINVAL weight is not 1..GW_PACER_WEIGHT_MAX; -EALREADY.
 */
int gw_arrival_share(struct gw_arrival *arrival, struct gw_pacer *pacer, uint32_t weight);

/*
 * Ask for these pages first, in this order: an earlier arrival's, or a snapshot's (gw_arrival_order). Demand and
 * what follows faults come before them, all the rest after. Given up when under a quarter of the
 * faults are on pages of it. Before start.
 *
 * Returns 0; -EINVAL a run beyond the image, or more than GW_ARRIVAL_ORDER_COUNT_MAX; -EALREADY
 * started, or given before; -ENOMEM.
 */
int gw_arrival_set_order(struct gw_arrival *arrival, const struct gw_page_run *runs,
			 uint32_t count);

/*
 * The pages that were touched while absent, in the order of their first touch; the last run may grow
 * yet and is left out. The first GW_ARRIVAL_ORDER_COUNT_MAX runs are kept. Never blocks.
 *
 * Returns how many runs were written, at most `count_max`.
 */
int gw_arrival_order(const struct gw_arrival *arrival, struct gw_page_run *ret_runs,
		     uint32_t count_max);

/* Fetch from another page server from now on; streams are opened again. */
int gw_arrival_set_page_server(struct gw_arrival *arrival, const char *host, uint32_t port);

/* Show another token from the next stream on. Returns 0; -EINVAL it is too long. */
int gw_arrival_set_token(struct gw_arrival *arrival, const uint8_t *token, uint64_t len);

/*
 * The key by which the page server was known when a lane came up last: to be pinned for as long as
 * this guest needs it. GW_TLS_KEY_LEN bytes. Returns 0; -ENOENT no lane has been up with TLS.
 */
int gw_arrival_page_server_key(const struct gw_arrival *arrival, uint8_t *ret_key);

/* An eventfd, readable after the phase changed. Borrowed: read it, do not close it. */
int gw_arrival_wait_fd(const struct gw_arrival *arrival);

/* Copy out where it stands. Never blocks. */
int gw_arrival_status(const struct gw_arrival *arrival, struct gw_arrival_status *ret_status);

/*
 * Copy out the userfault bitmap, bit i (LSB first) = page i, set = absent.
 * `len` is at least (page_count + 7) / 8. Never blocks; a bit once seen clear
 * stays clear.
 *
 * Returns the bytes written; -ENOSPC `len` is too short.
 */
int gw_arrival_bitmap(const struct gw_arrival *arrival, uint8_t *ret_bitmap, size_t len);

/* The enum gw_page_state of one page; -ENOENT. For tests and the audit. */
int gw_arrival_page_state(const struct gw_arrival *arrival, uint64_t offset);

/* The generation in force: 0 before the gate is open. After an adoption, what the map says. */
uint64_t gw_arrival_generation(const struct gw_arrival *arrival);

/*
 * End the arrival: UNREGISTER every region, so that the guest needs nobody any
 * more. Only in COMPLETE. Returns 0; -EBUSY pages are absent; -errno of the ioctl.
 */
int gw_arrival_finish(struct gw_arrival *arrival);

/* Stop, join, close. The guest stays blocked on what is absent. NULL is a no-op. */
void gw_arrival_destroy(struct gw_arrival *arrival);

/* cdef:end */

#endif /* GW_ARRIVAL_H */
