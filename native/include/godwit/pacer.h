/* SPDX-License-Identifier: Apache-2.0 */
/*
 * pacer.h - the bandwidth between two hosts, shared by the guests that arrive over it, by weight.
 *
 * Threads    Any. A member reads its share whenever it asks for pages: three relaxed loads.
 * Errors     0 or -errno.
 * Ownership  Counted: the pacer lives until its creator has destroyed it and its last member has
 *            left (gw_arrival_destroy), in any order.
 * Units      Bytes a second; weights are of this pacer's members alone.
 * Source     DESIGN 3.3.
 *
 * A member's share is rate * weight / the weights of all who have something to ask for just now, so
 * that what one does not use is the others'. Rejected: one token bucket for all, from which who asks
 * oftenest takes most; weights would need a queue of members behind it.
 */
#ifndef GW_PACER_H
#define GW_PACER_H

#include <stdint.h>

#include <godwit/export.h>

/* cdef:begin - extracted for cffi by tools/gen_ffi.py; keep it plain C. */

#define GW_PACER_WEIGHT_MAX 1000

/* Opaque. One per pair of hosts, or whatever else is shared. */
struct gw_pacer;

/* 0: no limit, for now. Returns 0; -ENOMEM. */
int gw_pacer_create(uint64_t bytes_per_s_max, struct gw_pacer **ret_pacer);
/* Change it, now. 0 = none. */
void gw_pacer_set_rate(struct gw_pacer *pacer, uint64_t bytes_per_s_max);
/* Let go of it; members go on under its last rate. NULL is a no-op. */
void gw_pacer_destroy(struct gw_pacer *pacer);

/* cdef:end */

/* Of members: another reference; whether one with this weight has something to ask for. */
void gw_pacer_ref(struct gw_pacer *pacer);
void gw_pacer_enter(struct gw_pacer *pacer, uint32_t weight);
void gw_pacer_leave(struct gw_pacer *pacer, uint32_t weight);
/* Of one with this weight: >= 1; 0 = no limit. */
uint64_t gw_pacer_share(const struct gw_pacer *pacer, uint32_t weight);

#endif /* GW_PACER_H */
