/* SPDX-License-Identifier: Apache-2.0 */
/*
 * measure.h - how long the first touch of a page takes, seen by who waits for it.
 *
 * Threads, Errors, Ownership: as workload.h.
 * Units: ticks of the TSC; the VMM knows how many there are in a second.
 * Source: native/microvm/README.md; make bench-faults.
 */
#ifndef GM_MEASURE_H
#define GM_MEASURE_H

#include "workload.h"

void gm_measure_begin(struct gm_vcpu *vcpu);

/* The index-th page of `count` in an order that jumps about and takes each exactly once. */
uint64_t gm_measure_order(uint64_t index, uint64_t count);

/* Write to a page without changing it, and remember how long that took. */
void gm_measure_touch(struct gm_vcpu *vcpu, uint64_t *word);

/* Tell the VMM, a call for each bucket that is not empty. */
void gm_measure_report(struct gm_vcpu *vcpu);

#endif
