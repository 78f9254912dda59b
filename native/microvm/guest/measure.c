/* SPDX-License-Identifier: Apache-2.0 */
/*
 * measure.c - see measure.h.
 *
 * Threads, Errors, Ownership, Units, Source: see measure.h.
 */
#include "measure.h"

#include "platform.h"

#define STRIDE_SHARE 0x9E37u /* of 65536: the golden section, so that neighbours come far apart */

void gm_measure_begin(struct gm_vcpu *vcpu)
{
	vcpu->measure = (struct gm_measure){0};
}

static uint64_t common_divisor(uint64_t a, uint64_t b)
{
	while (b != 0) {
		const uint64_t rest = a % b;

		a = b;
		b = rest;
	}
	return a;
}

uint64_t gm_measure_order(uint64_t index, uint64_t count)
{
	uint64_t stride = (count * STRIDE_SHARE >> 16) | 1;

	while (common_divisor(stride, count) != 1)
		stride += 2;
	return index * stride % count;
}

static uint32_t bucket_of(uint64_t ticks)
{
	uint32_t shift;
	uint64_t bucket;

	if (ticks < 2u << GM_MEASURE_CUT_BITS)
		return (uint32_t)ticks;
	shift = 63u - (uint32_t)__builtin_clzll(ticks) - GM_MEASURE_CUT_BITS;
	bucket = ((uint64_t)shift << GM_MEASURE_CUT_BITS) + (ticks >> shift);
	return bucket < GM_MEASURE_BUCKET_COUNT ? (uint32_t)bucket : GM_MEASURE_BUCKET_COUNT - 1;
}

/* The most that falls into a bucket. */
static uint64_t upper_end(uint32_t bucket)
{
	uint32_t shift;

	if (bucket < 2u << GM_MEASURE_CUT_BITS)
		return bucket;
	shift = (bucket >> GM_MEASURE_CUT_BITS) - 1;
	return ((((uint64_t)bucket - ((uint64_t)shift << GM_MEASURE_CUT_BITS)) + 1) << shift) - 1;
}

void gm_measure_touch(struct gm_vcpu *vcpu, uint64_t *word)
{
	struct gm_measure *measure = &vcpu->measure;
	const uint64_t start = gm_tick();
	uint64_t end;

	/* Adds nothing, but is a store: an absent page cannot be read as a zero page either. */
	__atomic_fetch_add(word, 0, __ATOMIC_RELAXED);
	end = gm_tick();
	measure->counts[bucket_of(end - start)]++;
	if (measure->first_tick == 0)
		measure->first_tick = start;
	measure->last_tick = end;
}

void gm_measure_report(struct gm_vcpu *vcpu)
{
	const struct gm_measure *measure = &vcpu->measure;

	for (uint32_t i = 0; i < GM_MEASURE_BUCKET_COUNT; i++)
		if (measure->counts[i] > 0)
			gm_hypercall(vcpu, GM_CALL_MEASURED, upper_end(i), measure->counts[i],
				     measure->first_tick, measure->last_tick);
}
