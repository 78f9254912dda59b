/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_page_lz4.c - packed pages: the same memory again, blocks that lie refused, and packing
 * only where it makes the stream faster.
 */
#include "check.h"

#include "serve_lz4.h"

#include <godwit/page_lz4.h>

#include <errno.h>

#define PAGE 4096ul
#define MIB  (1ul << 20)

static uint32_t random_next(uint32_t *seed)
{
	*seed = *seed * 1664525u + 1013904223u;
	return *seed >> 8;
}

/* `share` of 256 bytes are random, the others count: packs the worse the more there are. */
static void fill(uint8_t *data, size_t len, uint32_t share)
{
	uint32_t seed = 7;

	for (size_t i = 0; i < len; i++) {
		const uint32_t random = random_next(&seed);

		data[i] = random % 256 < share ? (uint8_t)(random >> 8) : (uint8_t)(i / 64);
	}
}

static struct gw_pages packed_of(void *state, const uint8_t *data, size_t len, uint8_t *packed)
{
	return (struct gw_pages){.len = len,
				 .encoding = GW_PAGE_ENCODING_LZ4,
				 .data = {.data = packed,
					  .len = gw_page_lz4_pack(state, data, len, packed)}};
}

static void pages_come_back_as_they_were(void)
{
	static const size_t lens[] = {PAGE, 2 * PAGE, 5 * PAGE, 32 * PAGE, MIB};
	void *state = malloc(gw_page_lz4_state_len());
	uint8_t *data = malloc(MIB);
	uint8_t *got = malloc(MIB);

	for (size_t i = 0; i < sizeof(lens) / sizeof(lens[0]); i++) {
		/* Of the very length: ASan sees a byte too far. */
		uint8_t *packed = malloc(lens[i]);
		struct gw_pages plain;
		struct gw_pages pages;

		fill(data, lens[i], 20);
		pages = packed_of(state, data, lens[i], packed);
		CHECK(pages.data.len > 0 && pages.data.len <= lens[i] - lens[i] / 8);
		CHECK_EQ(gw_page_lz4_unpack(&pages, got, MIB, &plain), 0);
		CHECK_EQ(plain.data.len, lens[i]);
		CHECK_EQ(memcmp(got, data, lens[i]), 0);
		/* What does not shrink by an eighth stays as it is. */
		fill(data, lens[i], 256);
		CHECK_EQ(gw_page_lz4_pack(state, data, lens[i], packed), 0);
		free(packed);
	}
	free(state);
	free(data);
	free(got);
}

static void blocks_that_lie_are_refused(void)
{
	void *state = malloc(gw_page_lz4_state_len());
	uint8_t *data = malloc(MIB);
	uint8_t *packed = malloc(MIB);
	uint8_t *got = malloc(32 * PAGE);
	struct gw_pages plain = {.len = 1};
	struct gw_pages pages;
	struct gw_pages lie;
	uint32_t seed = 3;

	fill(data, 32 * PAGE, 20);
	pages = packed_of(state, data, 32 * PAGE, packed);
#define REFUSED(field, value)                                                         \
	do {                                                                          \
		lie = pages;                                                          \
		lie.field = value;                                                    \
		CHECK_EQ(gw_page_lz4_unpack(&lie, got, 32 * PAGE, &plain), -EBADMSG); \
		CHECK_EQ(plain.len, 1);                                               \
	} while (0)
	REFUSED(len, 0);
	REFUSED(len, 31 * PAGE);
	REFUSED(len, 33 * PAGE);
	REFUSED(len, UINT64_MAX);
	REFUSED(len, 1ull << 32);
	REFUSED(data.len, 0);
	REFUSED(data.len, pages.data.len - 1);
	REFUSED(data.len, 32 * PAGE);
	lie = pages;
	CHECK_EQ(gw_page_lz4_unpack(&lie, got, 31 * PAGE, &plain), -EBADMSG);
	/* Wounded anywhere: refused, or other bytes of the right length, which the checksum tells. */
	for (size_t round = 0; round < 3000; round++) {
		uint8_t *copy = malloc(pages.data.len);

		memcpy(copy, packed, pages.data.len);
		for (size_t i = 0; i <= round % 4; i++)
			copy[random_next(&seed) % pages.data.len] = (uint8_t)random_next(&seed);
		lie = pages;
		lie.data.data = copy;
		if (gw_page_lz4_unpack(&lie, got, 32 * PAGE, &plain) == 0)
			CHECK_EQ(plain.data.len, 32 * PAGE);
		free(copy);
	}
	free(state);
	free(data);
	free(packed);
	free(got);
}

/* Send `len` bytes at so many ns a byte, plain and packed. Returns how many were packed. */
static uint64_t send_all(struct serve_lz4 *lz4, uint64_t len, uint64_t raw_ns, uint64_t packed_ns,
			 bool waits)
{
	const size_t piece = 128ul * 1024;
	uint64_t packed_len = 0;
	uint64_t now_ns = 1;

	for (uint64_t at = 0; at < len; at += piece) {
		const bool packing = serve_lz4_begin(lz4, now_ns);

		packed_len += packing ? piece : 0;
		now_ns += piece * (packing ? packed_ns : raw_ns);
		serve_lz4_end(lz4, piece, waits);
	}
	return packed_len;
}

static void packing_goes_on_only_where_it_is_faster(void)
{
	struct serve_lz4 lz4;
	uint64_t packed_len;

	/* A slow link: all but the trials. */
	CHECK_EQ(serve_lz4_create(&lz4), 0);
	packed_len = send_all(&lz4, 2048 * MIB, 10, 4, true);
	CHECK(packed_len > 2048 * MIB * 9 / 10);
	/* It has become fast: seen at the next trial; and slow again. */
	CHECK_EQ(send_all(&lz4, 4096 * MIB, 1, 4, true) > 3000 * MIB, false);
	CHECK(send_all(&lz4, 8192 * MIB, 10, 4, true) > 4096 * MIB);
	serve_lz4_free(&lz4);

	/* A fast one: only the trials, and ever fewer of them. */
	CHECK_EQ(serve_lz4_create(&lz4), 0);
	packed_len = send_all(&lz4, 8192 * MIB, 1, 4, true);
	CHECK(packed_len > 0 && packed_len <= 8 * SERVE_LZ4_TRIAL_LEN);
	serve_lz4_free(&lz4);

	/* Not worth what it costs, and a peer that never waits. */
	CHECK_EQ(serve_lz4_create(&lz4), 0);
	CHECK(send_all(&lz4, 2048 * MIB, 100, 95, true) <= 8 * SERVE_LZ4_TRIAL_LEN);
	serve_lz4_free(&lz4);
	CHECK_EQ(serve_lz4_create(&lz4), 0);
	CHECK(send_all(&lz4, 2048 * MIB, 10, 4, false) <= 8 * SERVE_LZ4_TRIAL_LEN);
	serve_lz4_free(&lz4);
}

int main(void)
{
	RUN(pages_come_back_as_they_were);
	RUN(blocks_that_lie_are_refused);
	RUN(packing_goes_on_only_where_it_is_faster);
	return EXIT_SUCCESS;
}
