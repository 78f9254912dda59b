/* SPDX-License-Identifier: Apache-2.0 */
/*
 * page_map_internal.h - the layout of a page map, shared by page_map*.c and their tests.
 *
 * Threads, Errors, Ownership, Units, Source: see page_map.h.
 */
#ifndef GW_PAGE_MAP_INTERNAL_H
#define GW_PAGE_MAP_INTERNAL_H

#include <godwit/page_map.h>

#include <stdatomic.h>

#define GW_PAGE_MAP_MAGIC      UINT64_C(0x50414d5449574447) /* "GDWITMAP" */
#define GW_PAGE_MAP_VERSION    1U
#define GW_PAGE_MAP_HEADER_LEN 4096U

/* The file: this, padded to GW_PAGE_MAP_HEADER_LEN, then one byte a page. Native byte order. */
struct gw_page_map_header {
	uint64_t magic;
	uint32_t version;
	uint32_t header_len;
	uint64_t epoch;
	uint64_t page_count;
	uint32_t page_size;
	uint32_t install_method;
	_Atomic uint64_t generation; /* 0: the gate is closed */
	_Atomic uint32_t complete;
	_Atomic uint32_t violated;
	_Atomic uint64_t counters[16]; /* by enum gw_page_counter */
	char image_id[GW_PAGE_MAP_IMAGE_LEN_MAX + 8];
};

_Static_assert(sizeof(struct gw_page_map_header) == 320, "the layout is version 1's");
_Static_assert(GW_COUNT_COUNT <= 16, "a counter has its place in the header");
_Static_assert(sizeof(_Atomic uint8_t) == 1, "a state is one byte");

struct gw_page_map {
	struct gw_page_map_header *header;
	_Atomic uint8_t *states;
	size_t map_len;
	size_t bitmap_len;
	struct gw_bitmap bitmap;
};

#endif /* GW_PAGE_MAP_INTERNAL_H */
