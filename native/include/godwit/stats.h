/* SPDX-License-Identifier: Apache-2.0 */
/*
 * stats.h - a latency histogram of fixed size: powers of two, each cut in 32.
 *
 * Threads    record may be called from any thread, without a lock; summarise and
 *            merge read while others record and may miss what is being recorded.
 * Errors     None.
 * Ownership  The caller's memory, all zeros to begin with.
 * Units      Nanoseconds, or whatever the caller counts.
 * Source     HdrHistogram's buckets. A percentile is the upper end of its bucket: never
 *            too small, at most 1/32 (3.2 %) too large.
 */
#ifndef GW_STATS_H
#define GW_STATS_H

#include <stdatomic.h>
#include <stdint.h>

#include <godwit/arrival.h>

#define GW_HISTOGRAM_CUT_BITS	  5
#define GW_HISTOGRAM_BUCKET_COUNT ((64 - GW_HISTOGRAM_CUT_BITS + 1) << GW_HISTOGRAM_CUT_BITS)

struct gw_histogram {
	_Atomic uint64_t counts[GW_HISTOGRAM_BUCKET_COUNT];
	_Atomic uint64_t max;
};

void gw_histogram_record(struct gw_histogram *histogram, uint64_t value);
/* The value that `per_mille` of 1000 samples do not exceed; 0 if there is none. */
uint64_t gw_histogram_quantile(const struct gw_histogram *histogram, uint32_t per_mille);
uint64_t gw_histogram_count(const struct gw_histogram *histogram);
void gw_histogram_summarise(const struct gw_histogram *histogram,
			    struct gw_latency_summary *ret_summary);
/* Add what `from` has counted. */
void gw_histogram_merge(struct gw_histogram *histogram, const struct gw_histogram *from);

#endif /* GW_STATS_H */
