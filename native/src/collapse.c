/* SPDX-License-Identifier: Apache-2.0 */
/*
 * collapse.c - see collapse.h for Threads, Errors, Ownership, Units and Source.
 *
 * By a mapping of our own, at an address that a huge page fits: the kernel collapses the page cache and
 * takes the small mappings off everybody. So nothing is needed of the VMM, and no privilege over it.
 */
#include <godwit/collapse.h>

#include <errno.h>
#include <stddef.h>
#include <sys/mman.h>

#include <godwit/sys.h>

#define ADVICE_COLLAPSE 25 /* MADV_COLLAPSE; the C library's headers are older */

int gw_collapse(int32_t ram_fd, uint64_t offset)
{
	const size_t len = GW_COLLAPSE_LEN;
	void *room;
	void *range;
	int err;

	if (offset % len != 0)
		return -EINVAL;
	err = gw_sys_mmap(NULL, 2 * len, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1,
			  0, &room);
	if (err < 0)
		return err;
	void *const address = (char *)room + (len - (uintptr_t)room % len) % len;

	err = gw_sys_mmap(address, len, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, ram_fd,
			  (off_t)offset, &range);
	if (err == 0)
		err = gw_sys_madvise(range, len, ADVICE_COLLAPSE);
	(void)gw_sys_munmap(room, 2 * len);
	return err;
}
