/* SPDX-License-Identifier: Apache-2.0 */
/*
 * crc32c.c - CRC-32C by folding 256 bytes at a time (AVX-512, VPCLMULQDQ), by the SSE4.2 instruction, three
 * streams at a time, or by table.
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

/*
 * A polynomial folded over a distance of d bits is its halves times x^(d + 32) and x^(d - 32) mod P (reflected,
 * and shifted by the bit that a reflected product lacks), congruent to it; so any number of bytes becomes 64
 * whose CRC is theirs. Four folds are under way at a time: each waits for its multiplications.
 */
#define FOLD_LEN       ((size_t)256)
#define FOLD_512_LOW   0x740eef02
#define FOLD_512_HIGH  0x9e4addf8
#define FOLD_2048_LOW  0xdcb17aa4
#define FOLD_2048_HIGH 0xb9e02b86

#define FOLD_TARGET __attribute__((target("avx512f,vpclmulqdq,sse4.2,pclmul")))

FOLD_TARGET static inline __m512i fold(__m512i value, __m512i factors, __m512i next)
{
	/* 0x96: exclusive or of all three. */
	return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(value, factors, 0x00),
					 _mm512_clmulepi64_epi128(value, factors, 0x11), next,
					 0x96);
}

FOLD_TARGET static inline __m512i factors_of(long long low, long long high)
{
	return _mm512_set_epi64(high, low, high, low, high, low, high, low);
}

/*
 * `len` is at least FOLD_LEN. Without AddressSanitizer: its stack for use after return, of this gcc, does not
 * align a variable to the 64 bytes that the stores of the registers ask for.
 */
__attribute__((no_sanitize("address"))) FOLD_TARGET static uint32_t
by_folding(uint32_t crc, const uint8_t *bytes, size_t len)
{
	const __m512i by_64 = factors_of(FOLD_512_LOW, FOLD_512_HIGH);
	const __m512i by_256 = factors_of(FOLD_2048_LOW, FOLD_2048_HIGH);
	__m512i value[4];
	uint64_t folded[8];
	uint64_t state = 0;

	for (size_t i = 0; i < 4; i++)
		value[i] = _mm512_loadu_si512(bytes + 64 * i);
	value[0] = _mm512_xor_si512(value[0], _mm512_zextsi128_si512(_mm_cvtsi32_si128((int)~crc)));
	bytes += FOLD_LEN;
	len -= FOLD_LEN;
	for (; len >= FOLD_LEN; bytes += FOLD_LEN, len -= FOLD_LEN) {
		value[0] = fold(value[0], by_256, _mm512_loadu_si512(bytes));
		value[1] = fold(value[1], by_256, _mm512_loadu_si512(bytes + 64));
		value[2] = fold(value[2], by_256, _mm512_loadu_si512(bytes + 128));
		value[3] = fold(value[3], by_256, _mm512_loadu_si512(bytes + 192));
	}
	for (size_t i = 1; i < 4; i++)
		value[i] = fold(value[i - 1], by_64, value[i]);
	for (; len >= 64; bytes += 64, len -= 64)
		value[3] = fold(value[3], by_64, _mm512_loadu_si512(bytes));
	_mm512_storeu_si512(folded, value[3]);
	for (size_t i = 0; i < 8; i++)
		state = _mm_crc32_u64(state, folded[i]);
	return by_instruction(~(uint32_t)state, bytes, len);
}

uint32_t gw_crc32c(uint32_t crc, const void *data, size_t len)
{
	if (len >= FOLD_LEN && __builtin_cpu_supports("avx512f") &&
	    __builtin_cpu_supports("vpclmulqdq"))
		return by_folding(crc, data, len);
	return gw_crc32c_unfolded(crc, data, len);
}

uint32_t gw_crc32c_unfolded(uint32_t crc, const void *data, size_t len)
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

uint32_t gw_crc32c_unfolded(uint32_t crc, const void *data, size_t len)
{
	return gw_crc32c_portable(crc, data, len);
}

#endif
