/* SPDX-License-Identifier: Apache-2.0 */
/*
 * importer.h - private pages of a confidential guest: import the content, then flip the page's
 * attribute to private, then publish. Never another order.
 *
 * Threads    run, settle, give_back, retry_held and the readers: any thread, no lock: a page belongs
 *            to who moved it to IMPORTING or FLIPPING. create and destroy: one thread.
 * Errors     An outcome >= 0, or -errno for a call that cannot be right.
 * Ownership  Borrows ops, self and, in a KVM importer, all that its config names. Lives in the VMM's
 *            process, as KVM's VM ioctls answer EIO in any other: the record of what was imported
 *            dies with what it is a record of.
 * Units      Pages of the image.
 * Source     DESIGN 3.1; docs/design/private-pages.md. Has not met real hardware.
 *
 *   ABSENT -> IMPORTING -> FLIPPING -> PRESENT          the bit is cleared after PRESENT
 *      ^         |  |          |
 *      +---------+  v          v
 *   DOUBTFUL <-- HELD      IMPORTED -> FLIPPING         imported once; only the flip is done again
 *
 * Why this order. A page whose attribute says private, without content, is a page of zeros to the guest
 * or a fatal error; one whose bit is clear without the attribute is an exit that nobody answers.
 */
#ifndef GW_IMPORTER_H
#define GW_IMPORTER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <godwit/bitmap.h>

/* The steps, each a system call or more. Any thread may call any of them at once, on other pages. */
struct gw_importer_ops {
	/*
	 * Put the pages' content into the guest's private memory, in order. Returns how many are whole,
	 * >= 0: those after them are untouched. -errno speaks of the first page alone, the others are
	 * untouched: -EAGAIN, -EINTR, -EBUSY, -ENOMEM nothing has happened; -EEXIST it has content;
	 * anything else: nobody knows.
	 */
	int64_t (*import)(void *self, uint64_t first, uint64_t count, const uint8_t *data);
	/* GW_ATTRIBUTE_PRIVATE or 0 = shared. Idempotent. Returns 0; -errno some may have changed. */
	int (*set_attributes)(void *self, uint64_t first, uint64_t count, uint64_t attributes);
	/* Clear the pages' bits (release) and wake who waits. Idempotent, cannot fail. */
	void (*publish)(void *self, uint64_t first, uint64_t count);
};

/* KVM_MEMORY_ATTRIBUTE_PRIVATE of linux/kvm.h 6.8. */
#define GW_ATTRIBUTE_PRIVATE (UINT64_C(1) << 3)

enum gw_private_state {
	GW_PRIVATE_NOT = 0,	  /* shared, by the source's map: no business of ours */
	GW_PRIVATE_ABSENT = 1,	  /* fetch it */
	GW_PRIVATE_DOUBTFUL = 2,  /* fetch it; an import of it may have happened */
	GW_PRIVATE_IMPORTING = 3, /* somebody is at it */
	GW_PRIVATE_IMPORTED = 4,  /* content is in, the attribute is not: settle, without a fetch */
	GW_PRIVATE_FLIPPING = 5,  /* somebody is at it */
	GW_PRIVATE_PRESENT = 6,
	GW_PRIVATE_HELD = 7,	   /* nobody knows what is in it; only an operator's order helps */
	GW_PRIVATE_GIVEN_BACK = 8, /* the guest made it shared: its content is nobody's any more */
};

enum gw_importer_outcome {
	GW_IMPORTER_DONE = 0,  /* every page is present, or is another's business */
	GW_IMPORTER_AGAIN = 1, /* some are absent or imported still: later again */
	GW_IMPORTER_HELD = 2,  /* some cannot be had: hold the guest */
};

/* A run of private pages, as the source's map says it: > 0 pages, ascending, apart from each other. */
struct gw_private_run {
	uint64_t first;
	uint64_t count;
};

struct gw_importer;

/* Returns 0; -EINVAL runs are empty, out of order, overlap or leave the image; -ENOMEM. */
int gw_importer_create(uint64_t page_count, const struct gw_private_run *runs, size_t run_count,
		       const struct gw_importer_ops *ops, void *self,
		       struct gw_importer **ret_importer);
void gw_importer_destroy(struct gw_importer *importer);

/*
 * Content has come and is checked: import what is ABSENT or DOUBTFUL, flip what is IMPORTED, publish,
 * leave all others alone. `data` is count whole pages of page_len bytes.
 * Returns enum gw_importer_outcome; -EINVAL pages outside, or shared ones among them.
 */
int gw_importer_run(struct gw_importer *importer, uint64_t first, uint64_t count,
		    const uint8_t *data, size_t page_len);
/* The same without content: flip what is IMPORTED. What an AGAIN leaves, without another fetch. */
int gw_importer_settle(struct gw_importer *importer, uint64_t first, uint64_t count);

/*
 * The guest makes the pages shared: what the source has of them is never imported, the attribute is
 * flipped, then they are published. Returns DONE, AGAIN, HELD; -EBUSY an import is under way, which must
 * end first: again; -EINVAL.
 */
int gw_importer_give_back(struct gw_importer *importer, uint64_t first, uint64_t count);
/* An operator's order: HELD becomes DOUBTFUL. Returns 0; -EINVAL it is not HELD. */
int gw_importer_retry_held(struct gw_importer *importer, uint64_t page);

enum gw_private_state gw_importer_state(const struct gw_importer *importer, uint64_t page);
/* Private pages that are neither PRESENT nor GIVEN_BACK. 0: this part of the guest is resident. */
uint64_t gw_importer_left_count(const struct gw_importer *importer);

/* --- the steps by KVM --------------------------------------------------------------------------- */

struct gw_import_piece {
	uint64_t gpa;
	uint64_t page_count;
	const uint8_t *data;
};

#define GW_IMPORT_ARGUMENT_LEN_MAX 256

/* The ioctl by which one type of confidential guest takes content. */
struct gw_import_call {
	int fd; /* of the VM or of a vCPU, as the type wants it */
	unsigned long request;
	void (*fill)(void *argument, const struct gw_import_piece *piece);
	/* After the call: how many of the piece's pages it has not taken. */
	uint64_t (*left)(const void *argument);
};

struct gw_kvm_import_region {
	uint64_t first_page;
	uint64_t page_count;
	uint64_t gpa;
	uint8_t *window; /* without a call: where the guest_memfd is mapped */
};

/* Fields are the caller's to fill; self of gw_kvm_importer_ops. */
struct gw_kvm_importer {
	int vm_fd;
	uint32_t page_size;
	uint32_t region_count;
	const struct gw_kvm_import_region *regions; /* ascending */
	/*
	 * NULL: the content is copied into the guest_memfd through its window, while it is shared, and
	 * becomes private in place.
	 */
	const struct gw_import_call *call;
	struct gw_bitmap *bitmap;
	void (*on_published)(void *opaque, uint64_t first, uint64_t count); /* wakes; may be NULL */
	void *opaque;
};

extern const struct gw_importer_ops gw_kvm_importer_ops;

#endif /* GW_IMPORTER_H */
