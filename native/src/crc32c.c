/* SPDX-License-Identifier: Apache-2.0 */
/*
 * crc32c.c - CRC-32C by the SSE4.2 instruction, three streams at a time, or by table.
 *
 * Threads, Errors, Ownership, Units: see crc32c.h.
 * Source     RFC 3720; Intel SDM vol. 2, CRC32 and PCLMULQDQ. A single stream waits three cycles
 *            for each eight bytes; three independent ones fill them. A 4 KiB page is
 *            three blocks of 1360 bytes and a tail of 16.
 *
 * Not here: the ARMv8 instruction; the table serves there.
 */
#include <godwit/crc32c.h>

#include <string.h>

/* Entry i of the table is linear in the bits of i: eight constants make it at compile time. */
#define BIT(i, n, value) ((((i) >> (n)) & 1U) * (value))
#define ENTRY(i)                                                                    \
	(BIT(i, 0, 0xf26b8303U) ^ BIT(i, 1, 0xe13b70f7U) ^ BIT(i, 2, 0xc79a971fU) ^ \
	 BIT(i, 3, 0x8ad958cfU) ^ BIT(i, 4, 0x105ec76fU) ^ BIT(i, 5, 0x20bd8edeU) ^ \
	 BIT(i, 6, 0x417b1dbcU) ^ BIT(i, 7, 0x82f63b78U))
#define ROW4(i)	 ENTRY(i), ENTRY((i) + 1U), ENTRY((i) + 2U), ENTRY((i) + 3U)
#define ROW16(i) ROW4(i), ROW4((i) + 4U), ROW4((i) + 8U), ROW4((i) + 12U)
#define ROW64(i) ROW16(i), ROW16((i) + 16U), ROW16((i) + 32U), ROW16((i) + 48U)

static const uint32_t table[256] = {ROW64(0U), ROW64(64U), ROW64(128U), ROW64(192U)};

uint32_t gw_crc32c_portable(uint32_t crc, const void *data, size_t len)
{
	const uint8_t *bytes = data;

	crc = ~crc;
	for (size_t i = 0; i < len; i++)
		crc = crc >> 8 ^ table[(crc ^ bytes[i]) & 0xffU];
	return ~crc;
}

#ifdef __x86_64__

#include <immintrin.h>

#define BLOCK_LEN ((size_t)1360)
/* x^(8 * len - 33) mod P, reflected: what clmul then crc32 of zero need to append len zero bytes. */
#define APPEND_1360 0x3f70cc6fU
#define APPEND_2720 0x5aa1f3cfU

static inline uint64_t load64(const uint8_t *bytes)
{
	uint64_t value;

	memcpy(&value, bytes, sizeof(value));
	return value;
}

__attribute__((target("sse4.2,pclmul"))) static inline uint64_t append_zeros(uint64_t crc,
									     uint32_t factor)
{
	const __m128i product = _mm_clmulepi64_si128(_mm_cvtsi64_si128((long long)crc),
						     _mm_cvtsi64_si128((long long)factor), 0);

	return _mm_crc32_u64(0, (uint64_t)_mm_cvtsi128_si64(product));
}

__attribute__((target("sse4.2,pclmul"))) static uint32_t
by_instruction(uint32_t crc, const uint8_t *bytes, size_t len)
{
	uint64_t state = (uint32_t)~crc;

	for (; len >= 3 * BLOCK_LEN; bytes += 3 * BLOCK_LEN, len -= 3 * BLOCK_LEN) {
		uint64_t second = 0;
		uint64_t third = 0;

		for (size_t i = 0; i < BLOCK_LEN; i += 8) {
			state = _mm_crc32_u64(state, load64(bytes + i));
			second = _mm_crc32_u64(second, load64(bytes + BLOCK_LEN + i));
			third = _mm_crc32_u64(third, load64(bytes + 2 * BLOCK_LEN + i));
		}
		state = append_zeros(state, APPEND_2720) ^ append_zeros(second, APPEND_1360) ^
			third;
	}
	for (; len >= 8; bytes += 8, len -= 8)
		state = _mm_crc32_u64(state, load64(bytes));
	for (; len > 0; bytes++, len--)
		state = _mm_crc32_u8((uint32_t)state, *bytes);
	return ~(uint32_t)state;
}

uint32_t gw_crc32c(uint32_t crc, const void *data, size_t len)
{
	if (__builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("pclmul"))
		return by_instruction(crc, data, len);
	return gw_crc32c_portable(crc, data, len);
}

#else

uint32_t gw_crc32c(uint32_t crc, const void *data, size_t len)
{
	return gw_crc32c_portable(crc, data, len);
}

#endif
