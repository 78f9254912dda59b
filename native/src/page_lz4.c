/* SPDX-License-Identifier: Apache-2.0 */
/*
 * page_lz4.c - pages as LZ4 blocks.
 *
 * Threads, Errors, Ownership, Units, Source: see page_lz4.h.
 */
#include <godwit/page_lz4.h>

#include <errno.h>
#include <lz4.h>

#define PAGE_LEN     ((size_t)4096)
#define ACCELERATION 1

_Static_assert(GW_PAGE_WANT_LEN_MAX <= LZ4_MAX_INPUT_SIZE, "any want is one block");

size_t gw_page_lz4_state_len(void)
{
	return (size_t)LZ4_sizeofState();
}

static size_t pack(void *state, const uint8_t *data, size_t len, uint8_t *ret_packed)
{
	/* What does not fit is given up by the library: bytes beyond are never written. */
	const int got = LZ4_compress_fast_extState(state, (const char *)data, (char *)ret_packed,
						   (int)len, (int)(len - len / 8), ACCELERATION);

	return got > 0 ? (size_t)got : 0;
}

size_t gw_page_lz4_pack(void *state, const uint8_t *data, size_t len, uint8_t *ret_packed)
{
	const size_t page_count = len / PAGE_LEN;

	if (page_count > 4 &&
	    !pack(state, data + page_count / 4 * PAGE_LEN, PAGE_LEN, ret_packed) &&
	    !pack(state, data + page_count * 3 / 4 * PAGE_LEN, PAGE_LEN, ret_packed))
		return 0;
	return pack(state, data, len, ret_packed);
}

int gw_page_lz4_unpack(const struct gw_pages *pages, uint8_t *ret_data, size_t cap,
		       struct gw_pages *ret_plain)
{
	if (pages->len == 0 || pages->len > cap || pages->len > GW_PAGE_WANT_LEN_MAX ||
	    pages->data.len == 0 || pages->data.len >= pages->len)
		return -EBADMSG;
	/* Reads nothing behind the block and writes nothing behind pages->len, whatever it says. */
	if (LZ4_decompress_safe((const char *)pages->data.data, (char *)ret_data,
				(int)pages->data.len, (int)pages->len) != (int)pages->len)
		return -EBADMSG;
	*ret_plain = *pages;
	ret_plain->data = (struct gw_wire_bytes){.data = ret_data, .len = (size_t)pages->len};
	return 0;
}
