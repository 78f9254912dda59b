/* SPDX-License-Identifier: Apache-2.0 */
/*
 * bitmap.h - the userfault bitmap: bit i (LSB first) = page i, set = absent: an
 * access faults.
 *
 * Threads    publish and the readers may be called from any thread at once; init and
 *            mark_absent before anybody else looks. A bit goes from set to clear
 *            and never back.
 * Errors     None: no system call is made.
 * Ownership  The words are the caller's, shared memory as a rule: a vCPU thread or, with
 *            KVM Userfault, the kernel itself reads them.
 * Units      Pages.
 * Source     KVM Userfault v3 (polarity, unsigned long array); DESIGN 2 and 3.2.
 */
#ifndef GW_BITMAP_H
#define GW_BITMAP_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Word order is byte order only here; a big-endian port has to swap in copy. */
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "bit i is bit i%8 of byte i/8");

struct gw_bitmap {
	_Atomic uint64_t *words;
	uint64_t page_count;
	_Atomic uint64_t absent_count; /* set bits; the moment it is 0 the guest is resident */
};

/* Bytes that the words of so many pages take, whole words. */
size_t gw_bitmap_len(uint64_t page_count);
/* Take over words as they are; bits past page_count are cleared. */
void gw_bitmap_init(struct gw_bitmap *bitmap, void *words, uint64_t page_count);
/* Set bits, before anybody looks. */
void gw_bitmap_mark_absent(struct gw_bitmap *bitmap, uint64_t first, uint64_t count);

/*
 * The pages have their content: clear their bits with release order, so that whoever sees
 * a clear bit (acquire) sees the content. Returns how many were set: who clears the last one
 * knows it.
 */
uint64_t gw_bitmap_publish(struct gw_bitmap *bitmap, uint64_t first, uint64_t count);

bool gw_bitmap_is_absent(const struct gw_bitmap *bitmap, uint64_t page);
uint64_t gw_bitmap_absent_count(const struct gw_bitmap *bitmap);
/* The first absent page at or after `from`; page_count if there is none. */
uint64_t gw_bitmap_next_absent(const struct gw_bitmap *bitmap, uint64_t from);
/* The next run of absent pages at or after `from`, cut at count_max. Returns its length, 0 = none. */
uint64_t gw_bitmap_next_run(const struct gw_bitmap *bitmap, uint64_t from, uint64_t count_max,
			    uint64_t *ret_first);
/* Copy out (page_count + 7) / 8 bytes. */
void gw_bitmap_copy(const struct gw_bitmap *bitmap, uint8_t *ret_bytes);

#endif /* GW_BITMAP_H */
