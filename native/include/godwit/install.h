/* SPDX-License-Identifier: Apache-2.0 */
/*
 * install.h - put pages in place, each exactly once, and decide what a fault, a removal or
 * a predecessor's death means for a page.
 *
 * Threads    run, zero_run and fault: any thread, no lock: a page belongs to who moved it
 *            to INSTALLING. removed: the thread that reads the events. The rest: one thread,
 *            before the others start.
 * Errors     An outcome >= 0, or -errno for what the kernel should not have said. Except for
 *            DONE, pages that were not put in place are ABSENT again, and nobody was woken:
 *            the caller wakes them when it makes sense to try again.
 * Ownership  Borrows the fds and the map.
 * Units      Pages, counted from the start of the image; addresses are the guest process's.
 * Source     DESIGN 3.2; KERNEL.md 1; docs/design/page-path.md.
 *
 * The order, kept everywhere: INSTALLING, content, PRESENT, bit (release), wake; our own bit, which
 * nobody else can write, before the one that the vCPUs obey.
 */
#ifndef GW_INSTALL_H
#define GW_INSTALL_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include <godwit/arrival.h>
#include <godwit/exits.h>
#include <godwit/page_map.h>

enum gw_install_outcome {
	GW_INSTALL_DONE = 0,	 /* every page of the run is settled, or is another's business */
	GW_INSTALL_GONE = 1,	 /* the guest's process is */
	GW_INSTALL_VIOLATED = 2, /* memory was touched before us, or is not ours: hold the guest */
	GW_INSTALL_FULL = 3,	 /* no room for the page: later */
	GW_INSTALL_STOPPED = 4,	 /* on_again said so */
};

/* One thread's way to wait while the kernel holds installs back. */
struct gw_install_again {
	/* An event waits to be read: read it, or give the reader time. 0 = try again; < 0 = stop. */
	int (*on_again)(void *user);
	void *user;
};

struct gw_install_region {
	uint64_t first_page;
	uint64_t page_count;
	uint64_t host_addr;
	int uffd; /* -1: none, GW_INSTALL_WRITE */
};

struct gw_install {
	int ram_fd;
	uint32_t page_size;
	uint32_t method; /* enum gw_install_method */
	uint32_t region_count;
	struct gw_page_map *map;
	struct gw_exits *exits; /* told of each page after the map; NULL: no vCPU exits */
	uint8_t *alias;		/* page size 2 MiB, CONTINUE: our own mapping of the file */
	uint8_t *zeros;		/* page size 2 MiB: there is no ZEROPAGE, zeros are copied */
	_Atomic bool released;	/* whole, and the registrations are being taken off */
	struct gw_install_region regions[GW_ARRIVAL_REGION_COUNT_MAX];
};

/*
 * Regions laid end to end from offset 0, each with one of the userfaultfds; none with
 * GW_INSTALL_WRITE. Returns 0; -EINVAL; -ENOMEM; -errno of mmap.
 */
int gw_install_init(struct gw_install *install, const int *uffds, uint32_t uffd_count, int ram_fd,
		    uint32_t page_size, uint32_t method, struct gw_page_map *map,
		    const struct gw_arrival_region *regions, uint32_t region_count);
void gw_install_fini(struct gw_install *install);

/*
 * Nothing may be in the file, not even room allocated for it: whoever put it there did so
 * before the range was registered, or beside it.
 * Returns 0; -ENOTEMPTY; -EINVAL the file is shorter than the regions; -errno.
 */
int gw_install_check_empty(const struct gw_install *install);

/*
 * Read a predecessor's map and the page cache together:
 *
 *   state                      | hole                | data
 *   ABSENT, REQUESTED          | ABSENT              | violation
 *   INSTALLING, COPY           | ABSENT              | PRESENT: a copy shows whole pages only
 *   INSTALLING, other methods  | ABSENT              | ABSENT, punched: nobody has seen it
 *   FILLED                     | REMOVED             | CONTINUE again, PRESENT
 *   PRESENT                    | REMOVED             | PRESENT
 *   ZERO                       | ZERO                | PRESENT: its fault was answered
 *   REMOVED, POISONED          | as it is            | as it is
 *
 * Returns 0; -ENOTEMPTY a violation, recorded in the map; -ESRCH; -ECANCELED; -errno.
 */
int gw_install_adopt(struct gw_install *install, const struct gw_install_again *again);

/*
 * Content for pages [first, first + count) has come and is checked: install those that
 * are REQUESTED, leave all others alone.
 */
int gw_install_run(struct gw_install *install, uint64_t first, uint64_t count, const uint8_t *data,
		   const struct gw_install_again *again);

/* The source says that they are zero: those REQUESTED become ZERO, holes; who waits gets its page. */
int gw_install_zero_run(struct gw_install *install, uint64_t first, uint64_t count,
			const struct gw_install_again *again);

/*
 * The same for zeros that nobody asked for: those ABSENT become ZERO as well. Any length: what is settled
 * already costs a bit of the bitmap.
 */
int gw_install_zeros_beyond(struct gw_install *install, uint64_t first, uint64_t count,
			    const struct gw_install_again *again);

/*
 * A fault on a settled page: ZERO and REMOVED read zero; PRESENT is a late event (the page
 * is there) or was given back since (it reads zero). Never fetches. `minor`: the event said so.
 */
int gw_install_fault(struct gw_install *install, uint64_t page, bool minor,
		     const struct gw_install_again *again);

/*
 * A REMOVE event was read for the pages. It is a hint: only where the page cache has no page do
 * they become REMOVED. The event comes before the act, so that a PRESENT page still has its
 * content now: call again later. Returns how many became REMOVED; -errno.
 */
int64_t gw_install_removed(struct gw_install *install, uint64_t first, uint64_t count);

/* Where the guest's process has the page, and its userfaultfd (-1: none); false if no region has it. */
bool gw_install_host_addr(const struct gw_install *install, uint64_t page, int *ret_uffd,
			  uint64_t *ret_address);
/* The page that a fault address is in; false if no region has it. */
bool gw_install_page_of(const struct gw_install *install, uint64_t address, uint64_t *ret_page);

/* The pages may be touched: clear their bits, ours and the vCPUs'; who waits is not woken by it
 * unless it is a vCPU in an exit. */
void gw_install_publish(struct gw_install *install, uint64_t first, uint64_t count);

/* Everybody who waits, anywhere, faults again. Returns 0; -errno. */
int gw_install_wake_all(const struct gw_install *install);

/* Record that an invariant broke. From now on nothing is installed, whoever asks. */
void gw_install_violate(struct gw_install *install);

#endif /* GW_INSTALL_H */
