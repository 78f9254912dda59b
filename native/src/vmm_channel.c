/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vmm_channel.c - make the memory that is shared with the agent, and its doorbell.
 *
 * Threads, Errors, Ownership, Units, Source: see vmm.h; the layout: exit_channel.h.
 *
 * It is sealed at its length for both sides: an agent that could cut it would make a vCPU's look at
 * a bit a SIGBUS, a VMM that could would do so to the agent.
 */
#include "vmm_internal.h"

#include <errno.h>
#include <sys/eventfd.h>
#include <sys/mman.h>

#include <godwit/sys.h>

static uint64_t whole_pages(uint64_t len)
{
	return (len + GW_VMM_PAGE_LEN - 1) / GW_VMM_PAGE_LEN * GW_VMM_PAGE_LEN;
}

static void fill_header(struct gw_vmm *vmm, uint64_t vcpus_offset)
{
	struct gw_exit_header *const header = vmm->header;

	header->magic = GW_EXIT_MAGIC;
	header->version = GW_EXIT_VERSION;
	header->header_len = GW_EXIT_HEADER_LEN;
	header->total_len = vmm->channel_len;
	header->page_size = vmm->page_size;
	header->vcpu_count = vmm->vcpu_count;
	header->page_count = vmm->page_count;
	header->bitmap_offset = GW_EXIT_HEADER_LEN;
	header->vcpus_offset = vcpus_offset;
}

/* Nobody else sees it yet: plain stores in effect. The hand-off orders them before the agent. */
static void fill(struct gw_vmm *vmm, uint64_t vcpus_offset)
{
	struct gw_bitmap bitmap;

	fill_header(vmm, vcpus_offset);
	/* Writing every word also makes the bitmap resident: KVM reads it where it cannot wait. */
	gw_bitmap_init(&bitmap, (void *)vmm->words, vmm->page_count);
	gw_bitmap_mark_absent(&bitmap, 0, vmm->page_count);
	for (uint32_t i = 0; i < vmm->vcpu_count; i++)
		for (uint32_t j = 0; j < GW_EXIT_WAIT_COUNT; j++)
			atomic_init(&vmm->rings[i].wait_pages[j], GW_EXIT_PAGE_NONE);
}

int gw_vmm_channel_create(struct gw_vmm *vmm)
{
	const uint64_t bitmap_len = whole_pages(gw_bitmap_len(vmm->page_count));
	const uint64_t vcpus_offset = GW_EXIT_HEADER_LEN + bitmap_len;
	const uint64_t len =
		vcpus_offset + whole_pages((uint64_t)vmm->vcpu_count * GW_EXIT_VCPU_LEN);
	void *address = NULL;
	int err;

	vmm->doorbell_fd = gw_sys_eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (vmm->doorbell_fd < 0)
		return vmm->doorbell_fd;
	vmm->channel_fd = gw_sys_memfd_create("godwit-exits", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	if (vmm->channel_fd < 0)
		return vmm->channel_fd;
	err = gw_sys_ftruncate(vmm->channel_fd, (off_t)len);
	if (err == 0)
		err = gw_sys_fcntl(vmm->channel_fd, F_ADD_SEALS,
				   F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
	if (err == 0)
		err = gw_sys_mmap(NULL, (size_t)len, PROT_READ | PROT_WRITE,
				  MAP_SHARED | MAP_POPULATE, vmm->channel_fd, 0, &address);
	if (err != 0)
		return err;
	vmm->channel_len = (size_t)len;
	vmm->header = address;
	vmm->words = (_Atomic uint64_t *)(void *)((char *)address + GW_EXIT_HEADER_LEN);
	vmm->rings = (struct gw_exit_vcpu *)(void *)((char *)address + vcpus_offset);
	fill(vmm, vcpus_offset);
	return 0;
}

void gw_vmm_channel_destroy(struct gw_vmm *vmm)
{
	if (vmm->header)
		(void)gw_sys_munmap(vmm->header, vmm->channel_len);
	if (vmm->channel_fd >= 0)
		(void)gw_sys_close(vmm->channel_fd);
	if (vmm->doorbell_fd >= 0)
		(void)gw_sys_close(vmm->doorbell_fd);
}
