/* SPDX-License-Identifier: Apache-2.0 */
/*
 * page_map.h - the state of every page of an arriving guest, one byte each, in a file
 * that outlives the agent; and beside it, in `<path>.bitmap`, the userfault bitmap.
 *
 * Threads    move, claim and the counters: any thread, no lock. create, adopt and destroy:
 *            one thread, nobody else looking.
 * Errors     0 or -errno. A move that the table forbids is not made; it is counted.
 * Ownership  The files stay when the map is destroyed: they are what a successor adopts.
 *            Removing them is the agent's business, after the guest is whole.
 * Units      Pages; offsets in bytes.
 * Source     DESIGN 3.2; docs/design/page-path.md.
 *
 *   ABSENT -> REQUESTED_BULK -> REQUESTED_DEMAND -> INSTALLING -> [FILLED ->] PRESENT
 *
 * INSTALLING is stored before the ioctl: whatever killed the agent, a page that has data
 * without our say-so is told apart from one that we brought.
 */
#ifndef GW_PAGE_MAP_H
#define GW_PAGE_MAP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <godwit/export.h>

/* cdef:begin - extracted for cffi by tools/gen_ffi.py; keep it plain C. */

/* What gw_arrival_page_state returns. 0 is no state: a file of zeros is not a map. */
enum gw_page_state {
	GW_PAGE_ABSENT = 1,
	GW_PAGE_REQUESTED_BULK = 2,   /* asked for; nobody is known to wait */
	GW_PAGE_REQUESTED_DEMAND = 3, /* a vCPU or the VMM waits */
	GW_PAGE_INSTALLING = 4,	      /* about to be put in place, or just put there */
	GW_PAGE_FILLED = 5,	      /* CONTINUE method: the content is whole, not yet mapped */
	GW_PAGE_PRESENT = 6,
	GW_PAGE_ZERO = 7,     /* the source said zero; left as a hole */
	GW_PAGE_REMOVED = 8,  /* the guest gave it back; reads zero, never fetched again */
	GW_PAGE_POISONED = 9, /* lost, by an operator's order */
};

/* cdef:end */

#include <godwit/bitmap.h>

#define GW_PAGE_STATE_COUNT	  10
#define GW_PAGE_MAP_PATH_LEN_MAX  4000
#define GW_PAGE_MAP_IMAGE_LEN_MAX 128
#define GW_PAGE_MAP_BITMAP_SUFFIX ".bitmap"

/* Counters that must survive an adoption. */
enum gw_page_counter {
	GW_COUNT_DEMAND_PAGE,
	GW_COUNT_BULK_PAGE,
	GW_COUNT_ZERO_PAGE,
	GW_COUNT_REMOVED_PAGE,
	GW_COUNT_FAULT,
	GW_COUNT_RECEIVED_BYTES,
	GW_COUNT_DUPLICATE_PAGE, /* arrived and was there already: both lanes asked */
	GW_COUNT_STALE_MESSAGE,	 /* LIVE, or of another generation: dropped */
	GW_COUNT_CHECKSUM_ERROR,
	GW_COUNT_RECONNECT,
	GW_COUNT_VIOLATION,
	GW_COUNT_COUNT,
};

/* What a map is of: an adopter must say the same. */
struct gw_page_map_identity {
	uint64_t epoch;
	uint64_t page_count;
	uint32_t page_size;
	uint32_t install_method; /* enum gw_install_method */
	const char *image_id;	 /* up to GW_PAGE_MAP_IMAGE_LEN_MAX */
};

struct gw_page_map;

/*
 * Make both files, every page ABSENT. The map appears under its name only when it is whole.
 * Returns 0; -EEXIST there is one already: it may be a living guest's; -EINVAL; -ENOSPC;
 * -errno of a failing call.
 */
int gw_page_map_create(const char *path, const struct gw_page_map_identity *identity,
		       struct gw_page_map **ret_map);

/*
 * Map a predecessor's files. States are as they were; reading them together with the page
 * cache is gw_install_adopt's work.
 * Returns 0; -ENOENT; -ESTALE it is not a map of this identity; -EPROTONOSUPPORT a newer release
 * made it; -errno of a failing call.
 */
int gw_page_map_adopt(const char *path, const struct gw_page_map_identity *identity,
		      struct gw_page_map **ret_map);

/* Unmap; the files stay. NULL is a no-op. */
void gw_page_map_destroy(struct gw_page_map *map);
/* Remove both files. Returns 0; -errno of the first that could not be. */
int gw_page_map_unlink(const char *path);

uint64_t gw_page_map_page_count(const struct gw_page_map *map);
struct gw_bitmap *gw_page_map_bitmap(struct gw_page_map *map);
const struct gw_bitmap *gw_page_map_bitmap_const(const struct gw_page_map *map);

/* The enum gw_page_state, or what a damaged file says. Acquire. */
uint8_t gw_page_map_get(const struct gw_page_map *map, uint64_t page);

/* May a page go from one state to another? */
bool gw_page_state_may_move(uint8_t from, uint8_t to);

/*
 * Compare and swap one page. False if it is not in `from` (any more), or if the table
 * forbids it: that is a bug, counted as a violation.
 */
bool gw_page_map_move(struct gw_page_map *map, uint64_t page, uint8_t from, uint8_t to);

/* move for consecutive pages from `first`, up to count_max, until one is not in `from`. */
uint64_t gw_page_map_move_run(struct gw_page_map *map, uint64_t first, uint64_t count_max,
			      uint8_t from, uint8_t to);

/* Whether the page's content is settled: PRESENT, ZERO or REMOVED; its bit is clear or about to be. */
bool gw_page_state_is_final(uint8_t state);

void gw_page_map_count(struct gw_page_map *map, enum gw_page_counter counter, uint64_t more);
uint64_t gw_page_map_counter(const struct gw_page_map *map, enum gw_page_counter counter);

/* 0 until the gate is open. */
uint64_t gw_page_map_generation(const struct gw_page_map *map);
/* Open the gate at a generation. Returns 0; -EINVAL 0; -EALREADY it is open at another. */
int gw_page_map_set_generation(struct gw_page_map *map, uint64_t generation);

/* Marks that outlive us. A violated map installs nothing any more, whoever adopts it. */
void gw_page_map_set_complete(struct gw_page_map *map);
bool gw_page_map_is_complete(const struct gw_page_map *map);
void gw_page_map_set_violated(struct gw_page_map *map);
bool gw_page_map_is_violated(const struct gw_page_map *map);

#endif /* GW_PAGE_MAP_H */
