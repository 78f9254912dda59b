/* SPDX-License-Identifier: Apache-2.0 */
/*
 * workload.h - what the guest does all day: touch pages in a way that a lost, stale, doubled or
 * torn page, a lost increment or a lost register cannot go unnoticed.
 *
 * Threads: one struct gm_vcpu per vCPU, stepped by that vCPU alone. They meet in guest memory only,
 *          through the atomics named at struct gm_control and struct gm_page.
 * Errors: found in the guest's memory; counted in gm_ctx.error_count, reported by GM_CALL_ERROR.
 * Ownership: the caller owns the vCPU; the guest's memory outlives it.
 * Units: pages of 4 KiB, numbered from gm_boot.work_offset on.
 * Source: native/microvm/README.md, "The guest".
 *
 * The same source is compiled twice: freestanding into the guest (GM_GUEST), and into the VMM for
 * --accel thread. A step does a bounded amount of work and returns, so that a thread can be stopped
 * between two steps and go on elsewhere from gm_ctx; a vCPU of KVM stops anywhere.
 */
#ifndef GM_WORKLOAD_H
#define GM_WORKLOAD_H

#include <stdbool.h>
#include <stdint.h>

#include "layout.h"

/* What one vCPU left in a page. A slot is written by its vCPU alone. */
struct gm_slot {
	uint64_t generation; /* how often this vCPU touched the page */
	uint64_t sum;	     /* of the numbers of the ops that did */
	uint64_t last_op;    /* the last of them */
	uint64_t check;	     /* over {page, vCPU, generation, sum, last_op} */
};

#define GM_BODY_LEN 382u

/* A page of the workload, once filled. Every byte is checked by a sweep. */
struct gm_page {
	uint64_t tag;	 /* of the page number: never zero */
	uint64_t locked; /* touches by any vCPU, lock-incremented */
	struct gm_slot slots[GM_VCPU_COUNT_MAX];
	/*
	 * Page of one vCPU: generation g wrote body[g % GM_BODY_LEN], so that the generation alone
	 * tells all of it. Shared page: as filled.
	 */
	uint64_t body[GM_BODY_LEN];
};
_Static_assert(sizeof(struct gm_page) == GM_PAGE_SIZE, "a page");

/*
 * The registers of a vCPU that is a thread; in the guest it lives in the stack. Saved as it is:
 * u64 only, no pointers. Appending is a new GM_ABI_VERSION.
 */
struct gm_ctx {
	uint64_t id;
	uint64_t phase;	 /* enum gm_phase in workload.c */
	uint64_t cursor; /* pages done in this phase */
	uint64_t random; /* never zero */
	uint64_t op_count;
	uint64_t op_sum; /* 1 + 2 + ... + op_count */
	uint64_t beat_count;
	uint64_t tick_seen;
	uint64_t op_budget; /* ops left in this tick */
	uint64_t barrier_count;
	uint64_t sweep_number;
	uint64_t sweep_error_count;
	uint64_t sweep_page_count;
	uint64_t error_count;
	uint64_t register_sum; /* --accel thread only: stands for the vector register */
	uint64_t tick_count;   /* --accel thread only: stands for the LAPIC timer */
};
_Static_assert(sizeof(struct gm_ctx) == 16 * 8, "state blobs hold it");

/* How long touches took: powers of two, each cut in 32, as in godwit/stats.h. */
#define GM_MEASURE_CUT_BITS	5u
#define GM_MEASURE_BUCKET_COUNT 1024u /* up to 2^36 ticks; what takes longer counts as that */

/* Of one measurement, which a move would lose. Times are ticks of the TSC. */
struct gm_measure {
	uint64_t first_tick;
	uint64_t last_tick;
	uint32_t counts[GM_MEASURE_BUCKET_COUNT];
};

struct gm_vcpu {
	struct gm_ctx ctx;
	struct gm_measure measure;
#ifndef GM_GUEST
	uint8_t *ram; /* of image offset 0 */
	uint32_t (*hypercall)(struct gm_vcpu *vcpu, uint32_t call, const uint64_t args[4]);
	void (*update_ticks)(struct gm_vcpu *vcpu); /* brings ctx.tick_count up to date */
	void *owner;				    /* for these two */
#endif
};

/* Sets a vCPU to its start; it reads struct gm_boot. */
void gm_vcpu_init(struct gm_vcpu *vcpu, uint64_t id);

/* Goes on a little: at most some ten microseconds, sleeps and page faults apart. */
void gm_vcpu_step(struct gm_vcpu *vcpu);

/* May gm_ctx.phase have this value? For whoever loads one. */
bool gm_phase_valid(uint64_t phase);

/* Pages that belong to vCPU `id` alone: *ret_first, and how many. */
uint64_t gm_own_pages(const struct gm_boot *boot, uint64_t id, uint64_t *ret_first);

#endif
