/* SPDX-License-Identifier: Apache-2.0 */
/*
 * prefetch.h - which pages the guest will want next, and whether saying so has been worth it.
 *
 * Threads    on_fault: the demand thread. summarise: any; what it reads are relaxed atomics. Nothing
 *            here allocates or calls anybody.
 * Errors     None.
 * Ownership  A struct of the engine's, all zeros to begin with but for prefetch_init.
 * Units      Pages of the image.
 * Source     Linux readahead; Hines and Gopalan, VEE'09 (pre-paging around faults).
 *
 * Window: each fault opens a window of the pages that follow it, or moves one on. That a page was
 * prefetched and then used shows nowhere: it does not fault, and nobody can read the accessed bits of
 * another's second-level page table cheaply. What does show is where the next fault is:
 *
 *   in a window              hit: the guest wants what was asked for, only it was not there yet
 *   at, or just behind, its  hit: the guest went through it without a fault; the next is twice as long
 *   end
 *   anywhere else            opens a window in place of the one that was longest without a fault; if that one
 *                            never had a hit it is a miss, and new windows are half as long
 *
 * When fewer than a quarter of the windows are hits there are no more of them, for a second; then
 * a few to see. Misses cost little: a page too early is not a page too many, as all of them come.
 * Not seen: descending and strided orders (misses); both would need a fault history a stream.
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
#define PREFETCH_JUDGED_MIN   32U
#define PREFETCH_SCORE_ONE    1024U
#define PREFETCH_OFF_NS	      UINT64_C(1000000000)

/* A window that was asked for, [first, end). */
struct prefetch_stream {
	uint64_t first;
	uint64_t end; /* 0: free */
	uint64_t used_at;
	uint32_t len;
	bool hit;
};

struct prefetch {
	/* Of the demand thread. */
	uint64_t page_count;
	uint32_t
		len_max; /* in pages of this guest: a window is 1 MiB at most, and a page at least */
	struct prefetch_stream streams[PREFETCH_STREAM_COUNT];
	uint64_t clock;
	uint32_t len_first; /* of a new window */
	uint32_t score;	    /* of the last windows, hits in PREFETCH_SCORE_ONE */
	uint32_t judged_count;
	uint64_t off_until_ns;
	/* Relaxed: told, nothing is decided by them. */
	_Atomic uint64_t window_count;
	_Atomic uint64_t hit_count;
	_Atomic uint64_t miss_count;
	_Atomic uint64_t wanted_page_count; /* counted by who asks for them */
	_Atomic bool off;
};

void prefetch_init(struct prefetch *prefetch, uint64_t page_count, uint32_t page_size);

/* A fault at `page`. Returns how many pages to ask for from *ret_first on; 0 = none. */
uint32_t prefetch_on_fault(struct prefetch *prefetch, uint64_t page, uint64_t now_ns,
			   uint64_t *ret_first);

void prefetch_summarise(const struct prefetch *prefetch, struct gw_prefetch_summary *ret_summary);

#endif /* GW_PREFETCH_H */
