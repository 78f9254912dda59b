/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vmm_memory.c - make accesses to absent memory known: userfaultfds, SIGBUS, PROT_NONE; and undo it.
 *
 * Threads, Errors, Ownership, Units, Source: see vmm.h.
 *
 *                  host_addr                        guest_addr
 *   uffd           blocks, fds of the agent's too   the same mapping
 *   kvm-userfault  blocks, the same                 the same mapping; the slot's bitmap comes first
 *   exit-emulation blocks, the same                 SIGBUS, an fd of ours alone
 *   exit-sigsegv   nothing: nobody touches it       PROT_NONE
 */
#include "vmm_internal.h"

#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

#include <godwit/sys.h>
#include <godwit/uffd.h>

/* A cut inside of 2 MiB would keep the kernel from ever making one huge page of them. */
#define CUT_LEN UINT64_C(0x200000)

static void *pointer(uint64_t address)
{
	return (void *)(uintptr_t)address; /* NOLINT(performance-no-int-to-ptr): a mapping */
}

/* Where the part of the `index`th of `count` userfaultfds begins. */
static uint64_t cut(const struct gw_vmm *vmm, uint32_t index, uint32_t count)
{
	const uint64_t len = vmm->page_count * vmm->page_size;
	const uint64_t unit = len / count >= CUT_LEN ? CUT_LEN : vmm->page_size;

	return index == count ? len
			      : vmm->page_count * index / count * vmm->page_size / unit * unit;
}

/* The image in equal parts, one a userfaultfd: each has its own queue and lock in the kernel. */
static void deal(struct gw_vmm *vmm, uint32_t count)
{
	for (uint32_t uffd = 0; uffd < count; uffd++) {
		const uint64_t start = cut(vmm, uffd, count);
		const uint64_t end = cut(vmm, uffd + 1, count);

		for (uint32_t i = 0; i < vmm->region_count; i++) {
			const struct gw_vmm_region *const region = &vmm->regions[i].at;
			const uint64_t from = start > region->offset ? start : region->offset;
			const uint64_t region_end = region->offset + region->len;
			const uint64_t to = end < region_end ? end : region_end;

			if (from >= to)
				continue;
			vmm->pieces[vmm->piece_count++] = (struct gw_vmm_piece){
				.address = region->host_addr + (from - region->offset),
				.len = to - from,
				.offset = from,
				.gpa = region->gpa + (from - region->offset),
				.uffd = uffd,
			};
		}
	}
}

static int open_uffd(uint64_t features, bool user_mode_ok)
{
	const int uffd = gw_uffd_open(features, NULL);

	if (uffd >= 0 || !user_mode_ok)
		return uffd;
	const int user_uffd = gw_uffd_open_user_mode(features, NULL);

	/* The first refusal says more. */
	return user_uffd >= 0 ? user_uffd : uffd;
}

static int arm_blocking(struct gw_vmm *vmm, uint32_t uffd_count, bool user_mode_ok)
{
	const uint64_t features = GW_UFFD_FEATURE_EVENT_REMOVE |
				  (vmm->page_size == GW_VMM_PAGE_LEN
					   ? (uint64_t)GW_UFFD_FEATURE_MISSING_SHMEM
					   : (uint64_t)GW_UFFD_FEATURE_MISSING_HUGETLBFS);

	while (vmm->uffd_count < uffd_count) {
		const int uffd = open_uffd(features, user_mode_ok);

		if (uffd < 0)
			return uffd;
		vmm->uffds[vmm->uffd_count++] = uffd;
	}
	deal(vmm, uffd_count);
	for (uint32_t i = 0; i < vmm->piece_count; i++) {
		const struct gw_vmm_piece *const piece = &vmm->pieces[i];
		const int err = gw_uffd_register(vmm->uffds[piece->uffd], piece->address,
						 piece->len, UFFDIO_REGISTER_MODE_MISSING, NULL);

		if (err < 0)
			return err;
	}
	return 0;
}

/*
 * An fd of ours alone, and no events on it: nobody reads it. User mode is always enough: where it is
 * so, the kernel's own accesses fail as those do that SIGBUS mode is for.
 */
static int arm_sigbus(struct gw_vmm *vmm)
{
	vmm->sigbus_uffd = open_uffd(GW_UFFD_FEATURE_SIGBUS | GW_UFFD_FEATURE_MISSING_SHMEM, true);
	if (vmm->sigbus_uffd < 0)
		return vmm->sigbus_uffd;
	for (uint32_t i = 0; i < vmm->region_count; i++) {
		const struct gw_vmm_region *const region = &vmm->regions[i].at;

		if (region->guest_addr == 0)
			continue;
		const int err = gw_uffd_register(vmm->sigbus_uffd, region->guest_addr, region->len,
						 UFFDIO_REGISTER_MODE_MISSING, NULL);

		if (err < 0)
			return err;
	}
	return 0;
}

static int protect(const struct gw_vmm *vmm, int prot)
{
	for (uint32_t i = 0; i < vmm->region_count; i++) {
		const struct gw_vmm_region *const region = &vmm->regions[i].at;
		const int err =
			gw_sys_mprotect(pointer(region->guest_addr), (size_t)region->len, prot);

		if (err < 0)
			return err;
	}
	return 0;
}

/*
 * After the registration: what was touched before it would read zero for ever, and is nobody's to
 * publish. Not for hugetlbfs, which answers SEEK_DATA as if it had no holes; the agent looks there.
 */
static int check_empty(const struct gw_vmm *vmm)
{
	if (vmm->page_size != GW_VMM_PAGE_LEN)
		return 0;
	const off_t data = gw_sys_lseek(vmm->ram_fd, 0, SEEK_DATA);

	if (data == -ENXIO || data >= (off_t)(vmm->page_count * vmm->page_size))
		return 0;
	return data < 0 ? (int)data : -EEXIST;
}

int gw_vmm_memory_arm(struct gw_vmm *vmm, uint32_t uffd_count, bool user_mode_ok)
{
	int err;

	if (vmm->backend == GW_VMM_EXIT_SIGSEGV) {
		deal(vmm, 1);
		err = protect(vmm, PROT_NONE);
	} else {
		err = arm_blocking(vmm, uffd_count, user_mode_ok);
		if (err == 0 && vmm->backend == GW_VMM_EXIT_EMULATION)
			err = arm_sigbus(vmm);
	}
	return err < 0 ? err : check_empty(vmm);
}

/* Every page is here or is a hole that reads zero: nothing needs to be known any more. */
int gw_vmm_memory_disarm(struct gw_vmm *vmm)
{
	if (vmm->backend == GW_VMM_EXIT_SIGSEGV)
		return protect(vmm, PROT_READ | PROT_WRITE);
	for (uint32_t i = 0; vmm->sigbus_uffd >= 0 && i < vmm->region_count; i++) {
		const struct gw_vmm_region *const region = &vmm->regions[i].at;
		const int err = region->guest_addr == 0
					? 0
					: gw_uffd_unregister(vmm->sigbus_uffd, region->guest_addr,
							     region->len);

		if (err < 0)
			return err;
	}
	for (uint32_t i = 0; i < vmm->piece_count; i++) {
		const struct gw_vmm_piece *const piece = &vmm->pieces[i];
		const int err =
			gw_uffd_unregister(vmm->uffds[piece->uffd], piece->address, piece->len);

		if (err < 0)
			return err;
	}
	return 0;
}

/* A hole becomes a page of zeros; a page stays as it is. */
static int fill_hole(const struct gw_vmm *vmm, uint64_t page)
{
	const struct gw_vmm_region_state *const region = gw_vmm_region_of_page(vmm, page);
	uint64_t done = 0;

	if (region->at.guest_addr == 0)
		return 0;
	const uint64_t address = region->at.guest_addr + (page - region->first) * vmm->page_size;
	const int outcome = gw_uffd_zeropage(vmm->sigbus_uffd, address, vmm->page_size, &done);

	switch (outcome) {
	case GW_UFFD_DONE:
	case GW_UFFD_EXISTS:
	/* Released meanwhile: the kernel makes zero pages itself. */
	case GW_UFFD_NOT_REGISTERED:
		return 0;
	case GW_UFFD_NO_SPACE:
		return -ENOMEM;
	case GW_UFFD_AGAIN:
		return -EAGAIN;
	case GW_UFFD_GONE:
		return -ESRCH;
	default:
		return outcome;
	}
}

int gw_vmm_fill_holes(struct gw_vmm *vmm, const uint64_t *gpas, uint32_t count)
{
	if (!vmm->words)
		return 0;
	for (uint32_t i = 0; i < count; i++) {
		const uint64_t page = gw_vmm_page_of(vmm, gpas[i]);
		uint64_t first = 0;
		uint64_t block_count = 0;
		int err = 0;

		if (page == GW_EXIT_PAGE_NONE)
			continue;
		/* Zeros where content is still to come would be the guest's end. */
		if (gw_vmm_page_is_absent(vmm, page))
			return -EAGAIN;
		if (vmm->backend == GW_VMM_EXIT_SIGSEGV)
			err = gw_vmm_give(vmm, page, &first, &block_count);
		else if (vmm->backend == GW_VMM_EXIT_EMULATION)
			err = fill_hole(vmm, page);
		if (err < 0)
			return err;
	}
	return 0;
}
