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

#include <godwit/arrival.h>

#define GW_PAGE_MAP_MAGIC      UINT64_C(0x50414d5449574447) /* "GDWITMAP" */
#define GW_PAGE_MAP_VERSION    1U
#define GW_PAGE_MAP_HEADER_LEN 4096U

/*
 * What an engine leaves for the next one to say how long the guest was held between them. Times are
 * CLOCK_MONOTONIC, which goes on across processes; the file is in tmpfs and ends with the boot. All
 * zeros in a map of a release that did not know it. Written by the demand thread alone, relaxed: each
 * field stands for itself.
 */
struct gw_page_map_life {
	_Atomic uint64_t alive_ns;    /* the demand thread's last turn */
	_Atomic uint64_t outage_ns;   /* since when no page can be had; 0: they can */
	_Atomic uint64_t held_ns;     /* since when somebody waits in it; 0: nobody */
	_Atomic uint64_t held_sum_ns; /* waits of this outage that are over */
	_Atomic uint32_t cause;	      /* of the outage */
	_Atomic uint32_t runs;	      /* the guest runs */
	_Atomic uint64_t hold_count;
	_Atomic uint64_t held_total_ns;
	struct {
		_Atomic uint64_t cause;
		_Atomic uint64_t outage_ns;
		_Atomic uint64_t held_ns;
	} holds[GW_ARRIVAL_HOLD_COUNT_MAX];
};

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
	struct gw_page_map_life life;
};

_Static_assert(offsetof(struct gw_page_map_header, life) == 320, "the layout is version 1's");
_Static_assert(sizeof(struct gw_page_map_header) <= GW_PAGE_MAP_HEADER_LEN, "it fits its place");
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
