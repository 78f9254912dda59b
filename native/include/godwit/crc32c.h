/* SPDX-License-Identifier: Apache-2.0 */
/*
 * crc32c.h - CRC-32C (Castagnoli), the checksum of every message of pages.
 *
 * Threads    A pure function: any thread.
 * Errors     None.
 * Ownership  Nothing is kept.
 * Units      Bytes.
 * Source     RFC 3720 appendix B.4 (test vectors).
 */
#ifndef GW_CRC32C_H
#define GW_CRC32C_H

#include <stddef.h>
#include <stdint.h>

/* Of `data` after what gave `crc`; 0 to begin with. data may be NULL if len is 0. */
uint32_t gw_crc32c(uint32_t crc, const void *data, size_t len);

/* The same without the widest instructions, as where the processor has none: so that it is tested, too. */
uint32_t gw_crc32c_unfolded(uint32_t crc, const void *data, size_t len);

/* The same without the processor's instruction, slowly: what the fast one is tested against. */
uint32_t gw_crc32c_portable(uint32_t crc, const void *data, size_t len);

#endif /* GW_CRC32C_H */
