/* SPDX-License-Identifier: Apache-2.0 */
/*
 * install_fault.c - pages that get no content: known zeros, faults on settled pages, removals.
 *
 * Threads, Errors, Ownership, Units, Source: see install.h.
 *
 * REMOVE races with an install. The kernel queues the event, waits for its reader, and only then
 * removes; until the read every install says EAGAIN. The reader moves what is not there to REMOVED,
 * INSTALLING too; the installer looks at the state after each EAGAIN and drops its page. One window
 * stays: look, event read, removal, ioctl. Then the guest finds the content it had when it gave
 * the page back, which a balloon allows, and QEMU's own order (punch through the fd, then
 * madvise) has that window in any design. Rejected: a lock around look and ioctl, taken for each
 * fault to save nobody. tests: remove_while_an_install_is_held_back.
 */
#include "install_internal.h"

#include <errno.h>
#include <unistd.h>

#include <godwit/sys.h>
#include <godwit/uffd.h>

#define ZERO_BATCH_COUNT 512U

/* Give a zero page to who waits on a page that has none. */
static int zero_answer(const struct gw_install *install, int uffd, uint64_t address)
{
	uint64_t done = 0;

	if (install->zeros)
		return gw_uffd_copy(uffd, address, install->zeros, install->page_size, &done);
	return gw_uffd_zeropage(uffd, address, install->page_size, &done);
}

int gw_install_fault(struct gw_install *install, uint64_t page, bool minor,
		     const struct gw_install_again *again)
{
	uint64_t address = 0;
	uint64_t done = 0;
	int uffd = -1;

	if (!gw_install_host_addr(install, page, &uffd, &address))
		return -EINVAL;
	for (;;) {
		if (gw_page_map_is_violated(install->map))
			return GW_INSTALL_VIOLATED;
		/* A vCPU in an exit needs no page made for it: its bit is clear, a hole reads zero. */
		if (uffd < 0) {
			gw_install_publish(install, page, 1);
			return GW_INSTALL_DONE;
		}
		/* Minor: the page cache has the page, this mapping of it was dropped. */
		const int answer =
			minor ? gw_uffd_continue(uffd, address, install->page_size, &done)
			      : zero_answer(install, uffd, address);

		switch (answer) {
		case GW_UFFD_NO_PAGE:
			minor = false;
			continue;
		case GW_UFFD_AGAIN:
			if (again->on_again(again->user) < 0)
				return GW_INSTALL_STOPPED;
			continue;
		case GW_UFFD_DONE:
		case GW_UFFD_EXISTS:
			/*
			 * There already: PRESENT and a late event; or, on ZERO and REMOVED, answered
			 * before. Whoever else made it made zeros, which is what it has to read.
			 */
			(void)gw_page_map_move(install->map, page, GW_PAGE_ZERO, GW_PAGE_PRESENT);
			gw_install_publish_and_wake(install, page, 1);
			return GW_INSTALL_DONE;
		case GW_UFFD_NOT_REGISTERED:
			/* An event from before the end: the page reads what it should without us. */
			if (atomic_load(&install->released)) {
				gw_install_publish_and_wake(install, page, 1);
				return GW_INSTALL_DONE;
			}
			return gw_install_outcome_of(install, answer);
		default:
			return gw_install_outcome_of(install, answer);
		}
	}
}

/* Move a page that waits for content to ZERO; the state it was in, or 0 if it is not ours to settle. */
static uint8_t claim_zero(struct gw_install *install, uint64_t page, bool absent_too)
{
	for (;;) {
		const uint8_t state = gw_page_map_get(install->map, page);

		if (state != GW_PAGE_REQUESTED_BULK && state != GW_PAGE_REQUESTED_DEMAND &&
		    !(absent_too && state == GW_PAGE_ABSENT))
			return 0;
		if (gw_page_map_move(install->map, page, state, GW_PAGE_ZERO))
			return state;
	}
}

/* ZERO pages [first, first + count): counted first, who sees that nothing is absent sees where it went. */
static void publish_zeros(struct gw_install *install, uint64_t first, uint64_t count)
{
	if (count == 0)
		return;
	GW_HOOK("install.zeros");
	gw_page_map_count(install->map, GW_COUNT_ZERO_PAGE, count);
	gw_install_publish(install, first, count);
}

/*
 * Pages of a run to ZERO, published in batches: no call and no counter a page. Between a page's move and
 * its batch a fault on it finds ZERO, and is answered and published by whoever handles it; a vCPU in an
 * exit waits for the batch, which is short.
 */
static int zero_run(struct gw_install *install, uint64_t first, uint64_t count, bool absent_too,
		    const struct gw_install_again *again)
{
	uint64_t batch_first = first;
	uint64_t duplicate_count = 0;
	int outcome = GW_INSTALL_DONE;
	uint64_t page = first;

	for (; page < first + count && outcome == GW_INSTALL_DONE; page++) {
		if (page - batch_first == ZERO_BATCH_COUNT) {
			publish_zeros(install, batch_first, page - batch_first);
			batch_first = page;
		}
		if (gw_page_map_is_violated(install->map)) {
			outcome = GW_INSTALL_VIOLATED;
			break;
		}
		const uint8_t state = claim_zero(install, page, absent_too);

		if (state != 0 && state != GW_PAGE_REQUESTED_DEMAND)
			continue;
		publish_zeros(install, batch_first, page - batch_first + (state != 0));
		batch_first = page + 1;
		if (state == 0)
			duplicate_count++;
		else
			outcome = gw_install_fault(install, page, false, again);
	}
	if (page > batch_first)
		publish_zeros(install, batch_first, page - batch_first);
	if (!absent_too && duplicate_count > 0)
		gw_page_map_count(install->map, GW_COUNT_DUPLICATE_PAGE, duplicate_count);
	return outcome;
}

int gw_install_zero_run(struct gw_install *install, uint64_t first, uint64_t count,
			const struct gw_install_again *again)
{
	return zero_run(install, first, count, false, again);
}

int gw_install_zeros_beyond(struct gw_install *install, uint64_t first, uint64_t count,
			    const struct gw_install_again *again)
{
	const struct gw_bitmap *const bitmap = gw_page_map_bitmap(install->map);
	const uint64_t end = first + count;
	int outcome = GW_INSTALL_DONE;

	while (first < end && outcome == GW_INSTALL_DONE) {
		uint64_t run_first = 0;
		const uint64_t run = gw_bitmap_next_run(bitmap, first, end - first, &run_first);

		if (run == 0 || run_first >= end)
			break;
		first = run_first + run < end ? run_first + run : end;
		outcome = zero_run(install, run_first, first - run_first, true, again);
	}
	return outcome;
}

/* The next stretch of the page cache without pages in [first, end): its length, 0 = none. */
static int64_t next_hole(const struct gw_install *install, uint64_t first, uint64_t end,
			 uint64_t *ret_first)
{
	const off_t hole =
		gw_sys_lseek(install->ram_fd, gw_install_offset_of(install, first), SEEK_HOLE);

	if (hole < 0)
		return hole == -ENXIO ? 0 : hole;
	const uint64_t hole_first = (uint64_t)hole / install->page_size;

	if (hole_first >= end)
		return 0;
	const off_t data = gw_sys_lseek(install->ram_fd, hole, SEEK_DATA);

	if (data < 0 && data != -ENXIO)
		return data;
	const uint64_t hole_end = data < 0 ? end : (uint64_t)data / install->page_size;

	*ret_first = hole_first;
	return (int64_t)((hole_end < end ? hole_end : end) - hole_first);
}

/* One page without content: what the guest gave back while it was on its way, or just now. */
static bool remove_page(struct gw_install *install, uint64_t page)
{
	for (;;) {
		const uint8_t state = gw_page_map_get(install->map, page);

		/* FILLED has content by definition; ZERO reads zero as it is. */
		if (!gw_page_state_may_move(state, GW_PAGE_REMOVED) || state == GW_PAGE_FILLED)
			return false;
		if (gw_page_map_move(install->map, page, state, GW_PAGE_REMOVED))
			return true;
	}
}

int64_t gw_install_removed(struct gw_install *install, uint64_t first, uint64_t count)
{
	const uint64_t end = first + count;
	int64_t removed_count = 0;

	/* hugetlbfs cannot be asked. A page stays what it was: a late fault on it reads zero. */
	if (gw_install_is_huge(install) || gw_page_map_is_violated(install->map))
		return 0;
	while (first < end) {
		uint64_t hole = 0;
		int64_t moved_count = 0;
		const int64_t len = next_hole(install, first, end, &hole);

		if (len < 0)
			return len;
		if (len == 0)
			break;
		for (uint64_t page = hole; page < hole + (uint64_t)len; page++) {
			if (!remove_page(install, page))
				continue;
			moved_count++;
			/* Counted first: who sees that nothing is absent sees where it all went. */
			gw_page_map_count(install->map, GW_COUNT_REMOVED_PAGE, 1);
			gw_install_publish(install, page, 1);
		}
		/* Who waits there faults again and gets its zero page, or waits on as before. */
		if (moved_count > 0)
			gw_install_wake(install, hole, (uint64_t)len);
		removed_count += moved_count;
		first = hole + (uint64_t)len;
	}
	return removed_count;
}
