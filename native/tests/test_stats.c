/* SPDX-License-Identifier: Apache-2.0 */
/* test_stats.c - the latency histogram: error bound, ranks, merge, many writers. */
#include "check.h"

#include <pthread.h>

#include <godwit/stats.h>

static struct gw_histogram *fresh(void)
{
	struct gw_histogram *const histogram = calloc(1, sizeof(*histogram));

	CHECK(histogram);
	return histogram;
}

/* A value alone in the histogram is its own quantile, because the top is cut at the maximum; so a
 * larger one is put beside it. */
static void a_quantile_is_never_too_small_and_at_most_a_32nd_too_large(void)
{
	for (uint64_t value = 1; value < UINT64_C(1) << 62; value += value / 7 + 1) {
		struct gw_histogram *const histogram = fresh();

		gw_histogram_record(histogram, value);
		gw_histogram_record(histogram, UINT64_MAX);
		const uint64_t got = gw_histogram_quantile(histogram, 500);

		CHECK(got >= value);
		CHECK(got - value <= value / 32);
		free(histogram);
	}
}

static void ranks_and_extremes(void)
{
	struct gw_histogram *const histogram = fresh();
	struct gw_latency_summary summary;

	gw_histogram_summarise(histogram, &summary);
	CHECK_EQ(summary.sample_count, 0);
	CHECK_EQ(summary.p50_ns, 0);
	CHECK_EQ(summary.max_ns, 0);
	for (uint64_t i = 1; i <= 1000; i++)
		gw_histogram_record(histogram, i <= 990 ? 10 : i <= 999 ? 20 : 30);
	gw_histogram_summarise(histogram, &summary);
	CHECK_EQ(summary.sample_count, 1000);
	CHECK_EQ(summary.p50_ns, 10);
	CHECK_EQ(summary.p99_ns, 10);
	CHECK_EQ(summary.p999_ns, 20);
	CHECK_EQ(summary.max_ns, 30);
	CHECK_EQ(gw_histogram_quantile(histogram, 1000), 30);
	CHECK_EQ(gw_histogram_quantile(histogram, 0), 10);
	gw_histogram_record(histogram, 0);
	gw_histogram_record(histogram, UINT64_MAX);
	CHECK_EQ(gw_histogram_quantile(histogram, 1000), UINT64_MAX);
	free(histogram);
}

static void merge_adds(void)
{
	struct gw_histogram *const left = fresh();
	struct gw_histogram *const right = fresh();

	for (uint64_t i = 0; i < 300; i++)
		gw_histogram_record(i % 3 ? left : right, i * 1000);
	gw_histogram_merge(left, right);
	CHECK_EQ(gw_histogram_count(left), 300);
	CHECK_EQ(gw_histogram_quantile(left, 1000), 299000);
	CHECK(gw_histogram_quantile(left, 500) >= 149000);
	free(left);
	free(right);
}

static void *record_many(void *argument)
{
	for (uint64_t i = 0; i < 20000; i++)
		gw_histogram_record(argument, i);
	return NULL;
}

static void many_writers_lose_nothing(void)
{
	struct gw_histogram *const histogram = fresh();
	pthread_t threads[4];

	for (int i = 0; i < 4; i++)
		CHECK_EQ(pthread_create(&threads[i], NULL, record_many, histogram), 0);
	for (int i = 0; i < 4; i++)
		CHECK_EQ(pthread_join(threads[i], NULL), 0);
	CHECK_EQ(gw_histogram_count(histogram), 80000);
	CHECK_EQ(gw_histogram_quantile(histogram, 1000), 19999);
	free(histogram);
}

int main(void)
{
	RUN(a_quantile_is_never_too_small_and_at_most_a_32nd_too_large);
	RUN(ranks_and_extremes);
	RUN(merge_adds);
	RUN(many_writers_lose_nothing);
	return EXIT_SUCCESS;
}
