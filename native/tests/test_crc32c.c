/* SPDX-License-Identifier: Apache-2.0 */
/* test_crc32c.c - the checksum of pages: known vectors, and the fast path against the slow one. */
#include "check.h"

#include <godwit/crc32c.h>

static void known_vectors(void)
{
	uint8_t bytes[32];

	/* RFC 3720 B.4, and the customary check value. */
	CHECK_EQ(gw_crc32c(0, "123456789", 9), 0xe3069283U);
	memset(bytes, 0, sizeof(bytes));
	CHECK_EQ(gw_crc32c(0, bytes, sizeof(bytes)), 0x8a9136aaU);
	memset(bytes, 0xff, sizeof(bytes));
	CHECK_EQ(gw_crc32c(0, bytes, sizeof(bytes)), 0x62a8ab43U);
	for (uint8_t i = 0; i < 32; i++)
		bytes[i] = i;
	CHECK_EQ(gw_crc32c(0, bytes, sizeof(bytes)), 0x46dd794eU);
	CHECK_EQ(gw_crc32c(0x12345678U, NULL, 0), 0x12345678U);
	CHECK_EQ(gw_crc32c_portable(0, "123456789", 9), 0xe3069283U);
}

/* Every length around the block sizes, unaligned, and split in two at every place of some. */
static void fast_is_the_same_as_slow(void)
{
	static uint8_t bytes[3 * 4096 + 8];
	uint32_t random = 1;

	for (size_t i = 0; i < sizeof(bytes); i++) {
		random = random * 1664525U + 1013904223U;
		bytes[i] = (uint8_t)(random >> 24);
	}
	for (size_t len = 0; len < sizeof(bytes) - 8; len += len < 64 ? 1 : 61) {
		for (size_t at = 0; at < 8; at += 3) {
			const uint32_t want = gw_crc32c_portable(0, bytes + at, len);

			CHECK_EQ(gw_crc32c(0, bytes + at, len), want);
			CHECK_EQ(gw_crc32c_unfolded(0, bytes + at, len), want);
		}
		const size_t cut = len / 3;
		const uint32_t begun = gw_crc32c_portable(0, bytes, cut);

		CHECK_EQ(gw_crc32c(begun, bytes + cut, len - cut),
			 gw_crc32c_portable(0, bytes, len));
		CHECK_EQ(gw_crc32c_unfolded(begun, bytes + cut, len - cut),
			 gw_crc32c_portable(0, bytes, len));
	}
}

static void any_single_bit_is_noticed(void)
{
	static uint8_t page[4096];
	const uint32_t right = gw_crc32c(0, page, sizeof(page));

	for (size_t bit = 0; bit < sizeof(page) * 8; bit += 7) {
		page[bit / 8] ^= (uint8_t)(1U << (bit % 8));
		CHECK(gw_crc32c(0, page, sizeof(page)) != right);
		page[bit / 8] ^= (uint8_t)(1U << (bit % 8));
	}
}

int main(void)
{
	RUN(known_vectors);
	RUN(fast_is_the_same_as_slow);
	RUN(any_single_bit_is_noticed);
	return EXIT_SUCCESS;
}
