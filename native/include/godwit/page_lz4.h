/* SPDX-License-Identifier: Apache-2.0 */
/*
 * page_lz4.h - pages as LZ4 blocks: ENCODING_LZ4.
 *
 * Threads    Pure functions; a `state` belongs to one thread at a time.
 * Errors     A length, 0 for what is not worth packing, or -errno.
 * Ownership  The caller's buffers.
 * Units      Bytes.
 * Source     lz4.h (block format); protos/godwit/page/v1/page_service.proto.
 */
#ifndef GW_PAGE_LZ4_H
#define GW_PAGE_LZ4_H

#include <stddef.h>
#include <stdint.h>

#include <godwit/page_wire.h>

/* Memory that packing works in: so much, aligned as malloc does. */
size_t gw_page_lz4_state_len(void);

/*
 * Pack `len` bytes, whole pages, at most GW_PAGE_WANT_LEN_MAX. Two pages are tried first: where neither
 * shrinks by an eighth the rest is not looked at. `ret_packed` has `len` bytes.
 *
 * Returns the packed length, at most seven eighths of `len`; 0 = send them as they are.
 */
size_t gw_page_lz4_pack(void *state, const uint8_t *data, size_t len, uint8_t *ret_packed);

/*
 * Unpack what a peer sent: `pages` is LZ4 and came as it is from the wire. On success *ret_plain is
 * the same message with `data` in `ret_data`, over which gw_pages_crc32c is what the peer must have said.
 * `cap` is the most that is taken, whatever pages->len says.
 *
 * Returns 0; -EBADMSG the block does not give exactly pages->len bytes, or that is no length for it.
 */
int gw_page_lz4_unpack(const struct gw_pages *pages, uint8_t *ret_data, size_t cap,
		       struct gw_pages *ret_plain);

#endif /* GW_PAGE_LZ4_H */
