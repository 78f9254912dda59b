/* SPDX-License-Identifier: Apache-2.0 */
/*
 * serve_lz4.h - whether packing pays, found by trying.
 *
 * Threads    The connection's own.
 * Errors     0 or -ENOMEM.
 * Ownership  A stream owns its packer.
 * Units      Bytes of guest memory; nanoseconds.
 * Source     docs/design/wire.md.
 *
 * The link, the two processors and what else they do decide whether packing makes bulk faster, and none of them
 * tells. So the stream sends some as it is, some packed, and goes on with what was faster; and tries
 * again later, ever more seldom while the answer stays the same. Only time in which wants were waiting counts: a
 * peer that paces itself measures nothing, and packing stays off.
 */
#ifndef GW_SERVE_LZ4_H
#define GW_SERVE_LZ4_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Of each way in a trial; its first quarter drains what the other way left in the sockets. */
#define SERVE_LZ4_TRIAL_LEN (16ul << 20)
/* How long the winner goes on, the first time; doubles up to the second. */
#define SERVE_LZ4_RUN_LEN     (128ul << 20)
#define SERVE_LZ4_RUN_LEN_MAX (4ul << 30)

struct serve_lz4 {
	void *state;	 /* NULL: this stream does not pack */
	uint8_t *packed; /* SERVE_PIECE_LEN */
	bool on;	 /* pieces are packed now */
	bool in_trial;
	bool won;	   /* the last trial's answer */
	uint64_t left_len; /* until the next decision */
	uint64_t run_len;
	uint64_t trial_len, trial_ns; /* measured in this half of the trial */
	uint64_t raw_rate;	      /* bytes a millisecond */
	uint64_t piece_ns;	      /* when the last piece was begun */
	size_t piece_len;	      /* of the last piece; 0: nothing waited behind it */
};

int serve_lz4_create(struct serve_lz4 *lz4);
void serve_lz4_free(struct serve_lz4 *lz4);
/* A piece is begun. Returns whether it is to be packed. */
bool serve_lz4_begin(struct serve_lz4 *lz4, uint64_t now_ns);
/* It was `len` bytes long; `more`: another want waits. */
void serve_lz4_end(struct serve_lz4 *lz4, size_t len, bool more);

#endif /* GW_SERVE_LZ4_H */
