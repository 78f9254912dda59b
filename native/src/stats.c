/* SPDX-License-Identifier: Apache-2.0 */
/*
 * stats.c - see stats.h for Threads, Errors, Ownership, Units and Source.
 *
 * Every atomic here is relaxed: a counter orders nothing.
 */
#include <godwit/stats.h>

#define CUT_COUNT (1U << GW_HISTOGRAM_CUT_BITS)

static uint32_t bucket_of(uint64_t value)
{
	if (value < CUT_COUNT)
		return (uint32_t)value;
	const uint32_t power = 63U - (uint32_t)__builtin_clzll(value);
	const uint32_t shift = power - GW_HISTOGRAM_CUT_BITS;

	return ((shift + 1) << GW_HISTOGRAM_CUT_BITS) + (uint32_t)(value >> shift) % CUT_COUNT;
}

/* The largest value that bucket_of puts there. */
static uint64_t bucket_top(uint32_t bucket)
{
	if (bucket < CUT_COUNT)
		return bucket;
	const uint32_t shift = (bucket >> GW_HISTOGRAM_CUT_BITS) - 1;
	const uint64_t first = (uint64_t)(CUT_COUNT + bucket % CUT_COUNT) << shift;

	return first + ((uint64_t)1 << shift) - 1;
}

static void raise_max(struct gw_histogram *histogram, uint64_t value)
{
	uint64_t seen = atomic_load_explicit(&histogram->max, memory_order_relaxed);

	while (value > seen &&
	       !atomic_compare_exchange_weak_explicit(&histogram->max, &seen, value,
						      memory_order_relaxed, memory_order_relaxed))
		;
}

void gw_histogram_record(struct gw_histogram *histogram, uint64_t value)
{
	atomic_fetch_add_explicit(&histogram->counts[bucket_of(value)], 1, memory_order_relaxed);
	raise_max(histogram, value);
}

uint64_t gw_histogram_count(const struct gw_histogram *histogram)
{
	uint64_t count = 0;

	for (uint32_t i = 0; i < GW_HISTOGRAM_BUCKET_COUNT; i++)
		count += atomic_load_explicit(&histogram->counts[i], memory_order_relaxed);
	return count;
}

uint64_t gw_histogram_quantile(const struct gw_histogram *histogram, uint32_t per_mille)
{
	const uint64_t count = gw_histogram_count(histogram);
	const uint64_t max = atomic_load_explicit(&histogram->max, memory_order_relaxed);
	/* The rank, rounded up and at least the first; in two steps, so that nothing overflows. */
	uint64_t rank = count / 1000 * per_mille + (count % 1000 * per_mille + 999) / 1000;
	uint64_t seen = 0;

	if (count == 0)
		return 0;
	rank = rank == 0 ? 1 : rank;
	for (uint32_t i = 0; i < GW_HISTOGRAM_BUCKET_COUNT; i++) {
		seen += atomic_load_explicit(&histogram->counts[i], memory_order_relaxed);
		if (seen >= rank)
			return bucket_top(i) < max ? bucket_top(i) : max;
	}
	return max;
}

void gw_histogram_summarise(const struct gw_histogram *histogram,
			    struct gw_latency_summary *ret_summary)
{
	ret_summary->sample_count = gw_histogram_count(histogram);
	ret_summary->p50_ns = gw_histogram_quantile(histogram, 500);
	ret_summary->p99_ns = gw_histogram_quantile(histogram, 990);
	ret_summary->p999_ns = gw_histogram_quantile(histogram, 999);
	ret_summary->max_ns = atomic_load_explicit(&histogram->max, memory_order_relaxed);
}

void gw_histogram_merge(struct gw_histogram *histogram, const struct gw_histogram *from)
{
	for (uint32_t i = 0; i < GW_HISTOGRAM_BUCKET_COUNT; i++) {
		const uint64_t count = atomic_load_explicit(&from->counts[i], memory_order_relaxed);

		if (count > 0)
			atomic_fetch_add_explicit(&histogram->counts[i], count,
						  memory_order_relaxed);
	}
	raise_max(histogram, atomic_load_explicit(&from->max, memory_order_relaxed));
}
