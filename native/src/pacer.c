/* SPDX-License-Identifier: Apache-2.0 */
/*
 * pacer.c - see pacer.h for Threads, Errors, Ownership, Units and Source.
 *
 * Ordering. Rate and weights are relaxed: a share that is a moment old is as good as any. The reference
 * count is released and, by the last, acquired, so that nobody reads what is freed.
 */
#include <godwit/pacer.h>

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>

struct gw_pacer {
	_Atomic uint64_t rate;
	_Atomic uint64_t weight_sum; /* of those who have something to ask for */
	_Atomic uint32_t ref_count;
};

int gw_pacer_create(uint64_t bytes_per_s_max, struct gw_pacer **ret_pacer)
{
	struct gw_pacer *const pacer = calloc(1, sizeof(*pacer));

	if (!pacer)
		return -ENOMEM;
	atomic_init(&pacer->rate, bytes_per_s_max);
	atomic_init(&pacer->ref_count, 1);
	*ret_pacer = pacer;
	return 0;
}

void gw_pacer_set_rate(struct gw_pacer *pacer, uint64_t bytes_per_s_max)
{
	atomic_store_explicit(&pacer->rate, bytes_per_s_max, memory_order_relaxed);
}

void gw_pacer_ref(struct gw_pacer *pacer)
{
	atomic_fetch_add_explicit(&pacer->ref_count, 1, memory_order_relaxed);
}

void gw_pacer_destroy(struct gw_pacer *pacer)
{
	if (pacer && atomic_fetch_sub_explicit(&pacer->ref_count, 1, memory_order_acq_rel) == 1)
		free(pacer);
}

void gw_pacer_enter(struct gw_pacer *pacer, uint32_t weight)
{
	atomic_fetch_add_explicit(&pacer->weight_sum, weight, memory_order_relaxed);
}

void gw_pacer_leave(struct gw_pacer *pacer, uint32_t weight)
{
	atomic_fetch_sub_explicit(&pacer->weight_sum, weight, memory_order_relaxed);
}

uint64_t gw_pacer_share(const struct gw_pacer *pacer, uint32_t weight)
{
	const uint64_t rate = atomic_load_explicit(&pacer->rate, memory_order_relaxed);
	const uint64_t sum = atomic_load_explicit(&pacer->weight_sum, memory_order_relaxed);

	if (rate == 0)
		return 0;
	/* Who asks has entered as a rule; if not, it is alone as far as it knows. */
	const uint64_t share =
		(uint64_t)((unsigned __int128)rate * weight / (sum > weight ? sum : weight));

	return share > 0 ? share : 1;
}
