/* SPDX-License-Identifier: Apache-2.0 */
/*
 * install.c - one page, one install. Faults on settled pages, zeros and removals are in
 * install_fault.c, adoption in install_adopt.c.
 *
 * Threads, Errors, Ownership, Units, Source: see install.h.
 *
 * Why no page is installed twice. Content is written only by who moved the page to INSTALLING,
 * and only out of REQUESTED; no state leads back to REQUESTED except ABSENT, and INSTALLING
 * goes back to ABSENT only where the kernel has said that it put nothing there. An
 * answer that comes twice, or from a lost connection, finds no REQUESTED page and is dropped.
 *
 * Why EEXIST is a violation here. Our record says INSTALLING, but because we wrote that a moment
 * ago; this install has put nothing there yet. The page was there before us: somebody touched it before
 * REGISTER or through another mapping, and it read zeros. The record counts as "we began it"
 * only where it is older than the attempt: in an adoption, and for FILLED, whose content is
 * ours. (A COPY that was interrupted says how far it got; it is gone on with after that.)
 */
#include "install_internal.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#include <godwit/sys.h>
#include <godwit/uffd.h>

#define HUGE_PAGE_SIZE (UINT32_C(2) << 20)

bool gw_install_is_huge(const struct gw_install *install)
{
	return install->page_size == HUGE_PAGE_SIZE;
}

off_t gw_install_offset_of(const struct gw_install *install, uint64_t page)
{
	return (off_t)(page * install->page_size);
}

static const struct gw_install_region *region_of(const struct gw_install *install, uint64_t page)
{
	for (uint32_t i = 0; i < install->region_count; i++) {
		const struct gw_install_region *const region = &install->regions[i];

		if (page - region->first_page < region->page_count)
			return region;
	}
	return NULL;
}

/* The part of a run that is contiguous in the guest's process too, and of one userfaultfd. */
static uint64_t span_at(const struct gw_install *install, uint64_t first, uint64_t count,
			int *ret_uffd, uint64_t *ret_address)
{
	const struct gw_install_region *const region = region_of(install, first);

	if (!region)
		return 0;
	const uint64_t left = region->page_count - (first - region->first_page);

	*ret_uffd = region->uffd;
	*ret_address = region->host_addr + (first - region->first_page) * install->page_size;
	return count < left ? count : left;
}

bool gw_install_host_addr(const struct gw_install *install, uint64_t page, int *ret_uffd,
			  uint64_t *ret_address)
{
	return span_at(install, page, 1, ret_uffd, ret_address) == 1;
}

bool gw_install_page_of(const struct gw_install *install, uint64_t address, uint64_t *ret_page)
{
	for (uint32_t i = 0; i < install->region_count; i++) {
		const struct gw_install_region *const region = &install->regions[i];
		const uint64_t distance = address - region->host_addr;

		if (distance < region->page_count * install->page_size) {
			*ret_page = region->first_page + distance / install->page_size;
			return true;
		}
	}
	return false;
}

void gw_install_wake(const struct gw_install *install, uint64_t first, uint64_t count)
{
	uint64_t address = 0;
	int uffd = -1;

	while (count > 0) {
		const uint64_t span = span_at(install, first, count, &uffd, &address);

		if (span == 0)
			return;
		/* Fails for a range that is no range, and in tests; a waiter not woken waits for ever. */
		if (uffd >= 0 && gw_uffd_wake(uffd, address, span * install->page_size) < 0)
			(void)gw_uffd_wake(uffd, address, span * install->page_size);
		first += span;
		count -= span;
	}
}

int gw_install_wake_all(const struct gw_install *install)
{
	for (uint32_t i = 0; i < install->region_count; i++) {
		const struct gw_install_region *const region = &install->regions[i];
		const int err = region->uffd < 0
					? 0
					: gw_uffd_wake(region->uffd, region->host_addr,
						       region->page_count * install->page_size);

		if (err < 0)
			return err;
	}
	if (install->exits)
		gw_exits_repost(install->exits);
	return 0;
}

void gw_install_violate(struct gw_install *install)
{
	gw_page_map_count(install->map, GW_COUNT_VIOLATION, 1);
	gw_page_map_set_violated(install->map);
}

void gw_install_publish(struct gw_install *install, uint64_t first, uint64_t count)
{
	gw_bitmap_publish(gw_page_map_bitmap(install->map), first, count);
	if (install->exits)
		gw_exits_publish(install->exits, first, count);
}

/* Publish what is settled, then wake. */
void gw_install_publish_and_wake(struct gw_install *install, uint64_t first, uint64_t count)
{
	if (count == 0)
		return;
	gw_install_publish(install, first, count);
	GW_HOOK("install.published");
	gw_install_wake(install, first, count);
}

/* Pages that this thread has moved to INSTALLING, contiguous in the guest's process too. */
struct claimed {
	uint64_t first;
	uint64_t count;
	uint64_t address;
	int uffd;
	const uint8_t *data;
	enum gw_page_counter counter; /* what they count as once they are PRESENT */
};

/* Pages that the kernel has not touched: whoever wants them asks again. */
static void put_back(struct gw_install *install, uint64_t first, uint64_t count)
{
	for (uint64_t i = 0; i < count; i++)
		(void)gw_page_map_move(install->map, first + i, GW_PAGE_INSTALLING, GW_PAGE_ABSENT);
}

/* Pages are in place. Those REMOVED meanwhile stay so: the guest gives them back just now. */
static void settle_present(struct gw_install *install, const struct claimed *claimed, uint64_t at,
			   uint64_t count, uint8_t from)
{
	uint64_t moved_count = 0;

	for (uint64_t i = 0; i < count; i++)
		moved_count += gw_page_map_move(install->map, claimed->first + at + i, from,
						GW_PAGE_PRESENT);
	gw_page_map_count(install->map, claimed->counter, moved_count);
	GW_HOOK("install.present");
	gw_install_publish_and_wake(install, claimed->first + at, count);
}

/* What an unlucky kernel answer means for the whole install. */
int gw_install_outcome_of(struct gw_install *install, int outcome)
{
	switch (outcome) {
	case GW_UFFD_GONE:
		return GW_INSTALL_GONE;
	case GW_UFFD_NO_SPACE:
		return GW_INSTALL_FULL;
	case GW_UFFD_EXISTS:
	case GW_UFFD_NOT_REGISTERED:
		/* Not registered: what is absent reads zero there, and we were not asked. */
		gw_install_violate(install);
		return GW_INSTALL_VIOLATED;
	default:
		return outcome < 0 ? outcome : -EIO;
	}
}

/* How many pages from `first` are in `state`, up to count. */
static uint64_t run_in(const struct gw_install *install, uint64_t first, uint64_t count,
		       uint8_t state)
{
	uint64_t i = 0;

	while (i < count && gw_page_map_get(install->map, first + i) == state)
		i++;
	return i;
}

/* How many pages from `first` are not in `state`, up to count. */
static uint64_t run_not_in(const struct gw_install *install, uint64_t first, uint64_t count,
			   uint8_t state)
{
	uint64_t i = 0;

	while (i < count && gw_page_map_get(install->map, first + i) != state)
		i++;
	return i;
}

/* UFFDIO_COPY of claimed pages. */
static int copy_claimed(struct gw_install *install, const struct claimed *claimed,
			const struct gw_install_again *again)
{
	const uint64_t page_size = install->page_size;
	const uint64_t first = claimed->first;
	int outcome = GW_INSTALL_DONE;
	uint64_t at = 0;

	while (outcome == GW_INSTALL_DONE) {
		/* After an EAGAIN pages may have been REMOVED: they are not ours any more. */
		at += run_not_in(install, first + at, claimed->count - at, GW_PAGE_INSTALLING);
		const uint64_t run =
			run_in(install, first + at, claimed->count - at, GW_PAGE_INSTALLING);
		uint64_t done = 0;

		if (run == 0)
			return GW_INSTALL_DONE;
		const int answer = gw_uffd_copy(claimed->uffd, claimed->address + at * page_size,
						claimed->data + at * page_size, run * page_size,
						&done);

		GW_HOOK("install.copied");
		settle_present(install, claimed, at, done / page_size, GW_PAGE_INSTALLING);
		at += done / page_size;
		if (answer == GW_UFFD_AGAIN)
			outcome = again->on_again(again->user) == 0 ? GW_INSTALL_DONE
								    : GW_INSTALL_STOPPED;
		else if (answer != GW_UFFD_DONE)
			outcome = gw_install_outcome_of(install, answer);
	}
	put_back(install, first + at, claimed->count - at);
	return outcome;
}

/* True if the page cache has nothing in the run. Unknown for huge pages: hugetlbfs does not say. */
static int cache_is_empty(const struct gw_install *install, uint64_t first, uint64_t count)
{
	if (gw_install_is_huge(install))
		return 1;
	const off_t data =
		gw_sys_lseek(install->ram_fd, gw_install_offset_of(install, first), SEEK_DATA);

	if (data == -ENXIO)
		return 1;
	return data < 0 ? (int)data : data >= gw_install_offset_of(install, first + count);
}

static int punch(const struct gw_install *install, uint64_t first, uint64_t count)
{
	int err;

	do
		err = gw_sys_fallocate(install->ram_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
				       gw_install_offset_of(install, first),
				       gw_install_offset_of(install, count));
	while (err == -EINTR);
	return err;
}

/*
 * Write content into the page cache, where the guest cannot see it: it takes a minor fault on
 * a page that it has not mapped, and waits for CONTINUE. Through the fd and not through a
 * mapping of ours, because a full tmpfs answers a store with SIGBUS and a write with ENOSPC;
 * hugetlbfs has no write, and reserves its pages when it is mapped.
 *
 * Returns the pages that are whole; what is not whole is a hole again.
 */
static uint64_t fill(const struct gw_install *install, uint64_t first, uint64_t count,
		     const uint8_t *data, int *ret_err)
{
	const size_t len = (size_t)(count * install->page_size);
	size_t done = 0;

	*ret_err = 0;
	if (install->alias) {
		memcpy(install->alias + gw_install_offset_of(install, first), data, len);
		return count;
	}
	while (done < len) {
		const ssize_t written =
			gw_sys_pwrite(install->ram_fd, data + done, len - done,
				      gw_install_offset_of(install, first) + (off_t)done);

		if (written == -EINTR)
			continue;
		if (written <= 0) {
			*ret_err = written == 0 ? -EIO : (int)written;
			break;
		}
		done += (size_t)written;
	}
	const uint64_t whole = done / install->page_size;

	if (whole < count) {
		const int err = punch(install, first + whole, count - whole);

		*ret_err = err < 0 ? err : *ret_err;
	}
	return whole;
}

/* UFFDIO_CONTINUE of pages [at, at + count) of the claimed ones: they are FILLED. */
static int continue_filled(struct gw_install *install, const struct claimed *claimed, uint64_t at,
			   uint64_t count, const struct gw_install_again *again)
{
	const uint64_t page_size = install->page_size;
	const uint64_t end = at + count;

	while (at < end) {
		uint64_t done = 0;
		const int answer = gw_uffd_continue(claimed->uffd,
						    claimed->address + at * page_size,
						    (end - at) * page_size, &done);
		/* EXISTS: mapped already; the content is ours (FILLED), so is the mapping of it. */
		const uint64_t present = done / page_size + (answer == GW_UFFD_EXISTS);

		settle_present(install, claimed, at, present, GW_PAGE_FILLED);
		at += present;
		if (answer == GW_UFFD_NO_PAGE) {
			/* Filled, and gone from the page cache since: the guest gave it back. */
			if (gw_page_map_move(install->map, claimed->first + at, GW_PAGE_FILLED,
					     GW_PAGE_REMOVED))
				gw_page_map_count(install->map, GW_COUNT_REMOVED_PAGE, 1);
			gw_install_publish_and_wake(install, claimed->first + at, 1);
			at++;
		} else if (answer == GW_UFFD_AGAIN) {
			/* FILLED stays: an adopter continues it. */
			if (again->on_again(again->user) < 0)
				return GW_INSTALL_STOPPED;
		} else if (answer != GW_UFFD_DONE && answer != GW_UFFD_EXISTS) {
			return gw_install_outcome_of(install, answer);
		}
	}
	return GW_INSTALL_DONE;
}

/*
 * Pages that were filled and could not be mapped, for want of memory say: nobody has seen them, so they
 * are fetched again. Left FILLED they would be nobody's until the next agent: a fault there waits for
 * who fills. By INSTALLING, because an adopter takes a FILLED hole for one that the guest made.
 */
static void unfill(struct gw_install *install, uint64_t first, uint64_t count)
{
	for (uint64_t page = first; page < first + count; page++) {
		if (gw_page_map_get(install->map, page) != GW_PAGE_FILLED ||
		    !gw_page_map_move(install->map, page, GW_PAGE_FILLED, GW_PAGE_INSTALLING))
			continue;
		/* With content it must not be ABSENT: it stays for an adopter, which punches it. */
		if (punch(install, page, 1) == 0)
			put_back(install, page, 1);
	}
}

static int fill_outcome(int err)
{
	if (err < 0)
		return err == -ENOSPC || err == -ENOMEM ? GW_INSTALL_FULL : err;
	return GW_INSTALL_DONE;
}

/* Fill; and with CONTINUE mark, continue claimed pages. */
static int fill_claimed(struct gw_install *install, const struct claimed *claimed,
			const struct gw_install_again *again)
{
	const uint64_t first = claimed->first;
	const int empty = cache_is_empty(install, first, claimed->count);
	int fill_err = 0;

	if (empty <= 0) {
		put_back(install, first, claimed->count);
		return empty < 0 ? empty : gw_install_outcome_of(install, GW_UFFD_EXISTS);
	}
	const uint64_t filled = fill(install, first, claimed->count, claimed->data, &fill_err);

	GW_HOOK("install.copied");
	put_back(install, first + filled, claimed->count - filled);
	if (install->method == GW_INSTALL_WRITE) {
		/* Nobody can see it before its bit is clear: there is nothing to map. */
		settle_present(install, claimed, 0, filled, GW_PAGE_INSTALLING);
		return fill_outcome(fill_err);
	}
	for (uint64_t i = 0; i < filled; i++) {
		/* REMOVED meanwhile: what we wrote must not be what the guest finds. */
		if (!gw_page_map_move(install->map, first + i, GW_PAGE_INSTALLING, GW_PAGE_FILLED))
			(void)punch(install, first + i, 1);
	}
	GW_HOOK("install.filled");
	for (uint64_t at = 0; at < filled;) {
		at += run_not_in(install, first + at, filled - at, GW_PAGE_FILLED);
		const uint64_t run = run_in(install, first + at, filled - at, GW_PAGE_FILLED);
		const int outcome = continue_filled(install, claimed, at, run, again);

		if (outcome == GW_INSTALL_FULL || outcome < 0)
			unfill(install, first, filled);
		if (outcome != GW_INSTALL_DONE)
			return outcome;
		at += run;
	}
	return fill_outcome(fill_err);
}

/*
 * Claim consecutive REQUESTED pages. A run is of one kind, so that it is counted as what it
 * was when it was claimed: somebody waited for it, or nobody did. 0: the first is no (longer) ours.
 */
static uint64_t claim(struct gw_install *install, uint64_t first, uint64_t count,
		      uint8_t *ret_state)
{
	for (;;) {
		const uint8_t state = gw_page_map_get(install->map, first);

		*ret_state = state;
		if (state != GW_PAGE_REQUESTED_BULK && state != GW_PAGE_REQUESTED_DEMAND)
			return 0;
		const uint64_t run =
			gw_page_map_move_run(install->map, first, count, state, GW_PAGE_INSTALLING);

		/* None: a fault promoted it between look and claim. At most once a page. */
		if (run > 0)
			return run;
	}
}

int gw_install_run(struct gw_install *install, uint64_t first, uint64_t count, const uint8_t *data,
		   const struct gw_install_again *again)
{
	uint64_t at = 0;

	while (at < count) {
		struct claimed claimed = {.first = first + at,
					  .data = data + at * install->page_size};
		uint8_t state = 0;
		const uint64_t span =
			span_at(install, first + at, count - at, &claimed.uffd, &claimed.address);

		if (span == 0)
			return -EINVAL;
		if (gw_page_map_is_violated(install->map))
			return GW_INSTALL_VIOLATED;
		claimed.count = claim(install, first + at, span, &state);
		if (claimed.count == 0) {
			gw_page_map_count(install->map, GW_COUNT_DUPLICATE_PAGE, 1);
			at++;
			continue;
		}
		claimed.counter = state == GW_PAGE_REQUESTED_DEMAND ? GW_COUNT_DEMAND_PAGE
								    : GW_COUNT_BULK_PAGE;
		GW_HOOK("install.claimed");
		const int outcome = install->method == GW_INSTALL_COPY
					    ? copy_claimed(install, &claimed, again)
					    : fill_claimed(install, &claimed, again);

		if (outcome != GW_INSTALL_DONE)
			return outcome;
		at += claimed.count;
	}
	return GW_INSTALL_DONE;
}
