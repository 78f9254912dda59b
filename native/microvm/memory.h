/* SPDX-License-Identifier: Apache-2.0 */
/*
 * memory.h - the guest's memory: one file, one mapping or two, up to three memory slots.
 *
 * Threads: created before the vCPUs and destroyed after them; read-only in between.
 * Errors: 0 or -errno, with words.
 * Ownership: the struct owns the file descriptor and the mapping. A named file stays behind.
 * Units: bytes.
 * Source: guest/layout.h for the slots.
 *
 * Nothing here reads or writes guest memory: with --incoming every page of it may be absent, and
 * one that the VMM touched would count as somebody else's data (DESIGN 3.2).
 */
#ifndef MV_MEMORY_H
#define MV_MEMORY_H

#include <stdbool.h>
#include <stdint.h>

#include "error.h"

#define MV_MEMORY_SLOT_COUNT_MAX 3u

/* A run of guest-physical memory that is contiguous in the file as well. */
struct mv_memory_slot {
	uint64_t gpa;
	uint64_t size;
	uint64_t offset; /* in the file */
};

struct mv_memory {
	int fd;		/* memfd or file */
	uint8_t *base;	/* the VMM's window */
	uint8_t *guest; /* what vCPUs or threads use: the same, or a mapping of its own */
	uint64_t size;
	uint64_t page_size;
	uint32_t slot_count;
	struct mv_memory_slot slots[MV_MEMORY_SLOT_COUNT_MAX];
};

struct mv_memory_config {
	uint64_t size;	  /* multiple of 2 MiB, GM_MEMORY_BYTES_MIN..GM_MEMORY_BYTES_MAX */
	const char *path; /* NULL: a memfd */
	bool huge;	  /* pages of 2 MiB; a path must then be in hugetlbfs */
	bool incoming;	  /* a file that is there already is taken over; else it must be empty */
};

/*
 * A named file is locked for as long as it is open, so that no second VMM runs on it.
 *
 * Returns 0; -EBUSY another process runs on the file; -EEXIST the file has a size and this is not
 * --incoming, or a size other than `size`; -EINVAL; -ENOMEM not enough huge pages; or the -errno of
 * the call that failed.
 */
int mv_memory_create(const struct mv_memory_config *config, struct mv_memory *ret_memory,
		     struct mv_error *error);

/* Gives the guest a mapping of its own. Before it runs. Returns 0 or -errno. */
int mv_memory_map_guest(struct mv_memory *memory, int protection, struct mv_error *error);

/* Where in the file; false: no memory is there. */
bool mv_memory_offset(const struct mv_memory *memory, uint64_t gpa, uint64_t *ret_offset);

/* The other way round; `offset` is less than memory->size. */
uint64_t mv_memory_gpa(const struct mv_memory *memory, uint64_t offset);

void mv_memory_destroy(struct mv_memory *memory);

#endif
