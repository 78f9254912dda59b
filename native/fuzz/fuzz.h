/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fuzz.h - what the fuzz targets share.
 *
 * Threads    One.
 * Errors     A broken promise traps, so that libFuzzer and a sanitizer show where.
 * Ownership  The input is the caller's and is only read.
 * Units      Bytes.
 * Source     https://llvm.org/docs/LibFuzzer.html
 *
 * A target is one file, fuzz_NAME.c, with LLVMFuzzerTestOneInput. It is built twice: with clang and
 * libFuzzer by `make fuzz`, and with replay.c by every variant of the native tests, which play what
 * has been found so far (corpus/NAME) and must not fall again.
 */
#ifndef GW_FUZZ_H
#define GW_FUZZ_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len);

/* A promise of the code under test. */
#define FUZZ_CHECK(cond)                  \
	do {                              \
		if (!(cond))              \
			__builtin_trap(); \
	} while (0)

/* The input, read from its front; zeros when it has ended. */
struct fuzz_input {
	const uint8_t *data;
	size_t len;
};

static inline void fuzz_take(struct fuzz_input *input, void *ret_bytes, size_t len)
{
	const size_t there = len < input->len ? len : input->len;

	memset(ret_bytes, 0, len);
	if (there)
		memcpy(ret_bytes, input->data, there);
	input->data += there;
	input->len -= there;
}

static inline uint8_t fuzz_take_u8(struct fuzz_input *input)
{
	uint8_t value;

	fuzz_take(input, &value, sizeof(value));
	return value;
}

static inline uint16_t fuzz_take_u16(struct fuzz_input *input)
{
	uint16_t value;

	fuzz_take(input, &value, sizeof(value));
	return value;
}

static inline uint64_t fuzz_take_u64(struct fuzz_input *input)
{
	uint64_t value;

	fuzz_take(input, &value, sizeof(value));
	return value;
}

#endif /* GW_FUZZ_H */
