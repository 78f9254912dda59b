/* SPDX-License-Identifier: Apache-2.0 */
/*
 * prefetch.h - which pages the guest will want next, and whether saying so has been worth it.
 *
 * Threads    on_fault: the demand thread. order_next, order_advance: any bulk thread. set_order: before
 *            the threads. summarise, recorded_runs: any. What is shared is atomic; nothing but set_order and
 *            init allocates, nothing calls anybody.
 * Errors     set_order, init: 0 or -ENOMEM.
 * Ownership  A struct of the engine's, all zeros to begin with but for prefetch_init; prefetch_fini frees.
 * Units      Pages of the image.
 * Source     Linux readahead; Hines and Gopalan, VEE'09 (pre-paging around faults); REAP, ASPLOS'21
 *            (a recorded order).
 *
 * Two policies, each scoring itself, over what is fetched anyway, from the start to the end. Demand is ahead of all.
 *
 * Window: each fault opens a window of the pages that follow it, or moves one on. That a page was
 * prefetched and then used shows nowhere: it does not fault, and nobody can read the accessed bits of
 * another's second-level page table cheaply. What does show is where the next fault is:
 *
 *   in a window              hit: the guest wants what was asked for, only it was not there yet
 *   at, or just behind, its  hit: the guest went through it without a fault; the next is twice as long
 *   end
 *   anywhere else            begins a stream in place of another; if that one's window never had a hit it is
 *                            a miss, and new windows are half as long
 *
 * When fewer than a quarter of the windows are hits it is off, for a second: a fault alone opens none then, only a
 * second one behind the first. So a guest that jumps about costs nothing, and the sweep that it makes
 * beside its jumps is followed all the same. For that, streams that have had a hit are not replaced by
 * ones that have not, until they have been quiet for PREFETCH_QUIET faults. Misses cost little: a page too early is
 * not a page too many, as all of them come. Not seen: descending and strided orders (misses).
 *
 * Recorded: runs of pages in the order in which a guest touched them once, asked for in that order
 * behind the windows. A fault on a page that was recorded is a hit (it was right, only late), any other
 * a miss: under a quarter of the last faults the rest of the order is given up. The other half of it: the order
 * of this arrival's own faults is kept, for the next one.
 */
#ifndef GW_PREFETCH_H
#define GW_PREFETCH_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include <godwit/arrival.h>

#define PREFETCH_STREAM_COUNT 16U
#define PREFETCH_LEN_MIN      4U
#define PREFETCH_LEN_FIRST    16U
#define PREFETCH_LEN_MAX      256U
#define PREFETCH_SLACK	      4U /* how far behind a window's end a fault is still its continuation */
#define PREFETCH_PROVEN_MAX \
	12U /* streams that are kept from new ones; the others are left to those */
#define PREFETCH_QUIET	    4096U /* in faults */
#define PREFETCH_JUDGED_MIN 32U
#define PREFETCH_SCORE_ONE  1024U
#define PREFETCH_OFF_NS	    UINT64_C(1000000000)

/* Hits and misses of a policy; the last sixteen, or so, weigh as much as all before them. */
struct prefetch_score {
	uint32_t score; /* hits in PREFETCH_SCORE_ONE; of the demand thread, as the next */
	uint32_t judged_count;
	/* Relaxed: told. Nothing but `off` decides, and it may be seen late. */
	_Atomic uint64_t hit_count;
	_Atomic uint64_t miss_count;
	_Atomic uint64_t wanted_page_count; /* counted by who asks for them */
	_Atomic bool off;
};

/* A window that was asked for, [first, end); empty while only a fault just before it is known. */
struct prefetch_stream {
	uint64_t first;
	uint64_t end; /* 0: free */
	uint64_t used_at;
	uint32_t len;
	bool hit;    /* this window or one before it: the stream is proven */
	bool judged; /* this window */
};

struct prefetch {
	/* Window. Of the demand thread. */
	uint64_t page_count;
	uint32_t
		len_max; /* in pages of this guest: a window is 1 MiB at most, and a page at least */
	struct prefetch_stream streams[PREFETCH_STREAM_COUNT];
	uint64_t clock;	    /* faults */
	uint32_t len_first; /* of a new window */
	uint64_t off_until_ns;
	_Atomic uint64_t window_count;
	struct prefetch_score window;
	/* Recorded. The order is written before the threads start, and read only. */
	struct gw_page_run *order;
	uint32_t order_count;
	uint64_t *order_bits; /* of the pages in it */
	/* The next run, and how many of its pages are behind: run << 32 | pages. Compare and swap; relaxed. */
	_Atomic uint64_t order_at;
	struct prefetch_score recorded;
	/* This arrival's own order: appended by the demand thread; count is released after its run. */
	struct gw_page_run *faults;
	_Atomic uint32_t fault_run_count;
};

/* Returns 0; -ENOMEM. */
int prefetch_init(struct prefetch *prefetch, uint64_t page_count, uint32_t page_size);
void prefetch_fini(struct prefetch *prefetch);

/* Have it asked for in this order. Returns 0; -EINVAL beyond the image, or too many; -EALREADY; -ENOMEM. */
int prefetch_set_order(struct prefetch *prefetch, const struct gw_page_run *runs, uint32_t count);

/* A fault at `page`. Returns how many pages to ask for from *ret_first on; 0 = none. */
uint32_t prefetch_on_fault(struct prefetch *prefetch, uint64_t page, uint64_t now_ns,
			   uint64_t *ret_first);

/*
 * Where the recorded order stands: the pages of its next run, from *ret_first on; 0: it is through,
 * or off. Then, with the same *ret_at, how many of them are behind now; somebody else may have been quicker.
 */
uint64_t prefetch_order_next(const struct prefetch *prefetch, uint64_t *ret_first,
			     uint64_t *ret_at);
void prefetch_order_advance(struct prefetch *prefetch, uint64_t at, uint64_t count);

/* What the guest touched so far, in order. Returns how many runs were written, at most `count_max`. */
uint32_t prefetch_faults(const struct prefetch *prefetch, struct gw_page_run *ret_runs,
			 uint32_t count_max);

void prefetch_summarise(const struct prefetch *prefetch, struct gw_prefetch_summary *ret_window,
			struct gw_prefetch_summary *ret_recorded);

#endif /* GW_PREFETCH_H */
