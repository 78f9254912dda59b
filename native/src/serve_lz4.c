/* SPDX-License-Identifier: Apache-2.0 */
/*
 * serve_lz4.c - whether packing pays, found by trying.
 *
 * Threads, Errors, Ownership, Units, Source: see serve_lz4.h.
 */
#include "serve_lz4.h"

#include "serve_internal.h"

#include <godwit/page_lz4.h>

#include <errno.h>
#include <stdlib.h>

#define NS_PER_MS 1000000u

int serve_lz4_create(struct serve_lz4 *lz4)
{
	*lz4 = (struct serve_lz4){
		.in_trial = true, .left_len = SERVE_LZ4_TRIAL_LEN, .run_len = SERVE_LZ4_RUN_LEN};
	lz4->state = malloc(gw_page_lz4_state_len());
	lz4->packed = malloc(SERVE_PIECE_LEN);
	if (lz4->state && lz4->packed)
		return 0;
	serve_lz4_free(lz4);
	return -ENOMEM;
}

void serve_lz4_free(struct serve_lz4 *lz4)
{
	free(lz4->state);
	free(lz4->packed);
	lz4->state = NULL;
	lz4->packed = NULL;
}

static void start(struct serve_lz4 *lz4, bool in_trial, bool on, uint64_t len)
{
	lz4->in_trial = in_trial;
	lz4->on = on;
	lz4->left_len = len;
	lz4->trial_len = 0;
	lz4->trial_ns = 0;
}

static void decide(struct serve_lz4 *lz4)
{
	const uint64_t rate = lz4->trial_ns ? lz4->trial_len * NS_PER_MS / lz4->trial_ns : 0;
	bool won;

	if (!lz4->in_trial) {
		start(lz4, true, false, SERVE_LZ4_TRIAL_LEN);
	} else if (!lz4->on) {
		lz4->raw_rate = rate;
		start(lz4, true, true, SERVE_LZ4_TRIAL_LEN);
	} else {
		/* By a tenth at least: it takes both hosts' processors from their guests. */
		won = lz4->raw_rate > 0 && rate > lz4->raw_rate + lz4->raw_rate / 10;
		if (won != lz4->won)
			lz4->run_len = SERVE_LZ4_RUN_LEN;
		else if (lz4->run_len < SERVE_LZ4_RUN_LEN_MAX)
			lz4->run_len *= 2;
		lz4->won = won;
		start(lz4, false, won, lz4->run_len);
	}
}

bool serve_lz4_begin(struct serve_lz4 *lz4, uint64_t now_ns)
{
	const bool counts = lz4->in_trial &&
			    lz4->left_len <= SERVE_LZ4_TRIAL_LEN - SERVE_LZ4_TRIAL_LEN / 4;

	if (counts && lz4->piece_len > 0) {
		lz4->trial_len += lz4->piece_len;
		lz4->trial_ns += now_ns - lz4->piece_ns;
	}
	if (lz4->left_len == 0)
		decide(lz4);
	lz4->piece_ns = now_ns;
	lz4->piece_len = 0;
	return lz4->on;
}

void serve_lz4_end(struct serve_lz4 *lz4, size_t len, bool more)
{
	lz4->left_len -= len < lz4->left_len ? len : lz4->left_len;
	lz4->piece_len = more ? len : 0;
}
