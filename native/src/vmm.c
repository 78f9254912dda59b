/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vmm.c - see vmm.h for Threads, Errors, Ownership, Units and Source. What is where:
 * vmm_internal.h.
 */
#include "vmm_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include <godwit/sys.h>

#define WAIT_NS_MAX UINT64_C(1000000000)

/* --- create and destroy ----------------------------------------------------------------------- */

static int check_ram(const struct gw_vmm *vmm)
{
	struct stat stat = {0};
	const int err = gw_sys_fstat(vmm->ram_fd, &stat);

	if (err < 0)
		return err;
	return stat.st_size >= 0 && (uint64_t)stat.st_size / vmm->page_size >= vmm->page_count
		       ? 0
		       : -EINVAL;
}

static int make_vcpus(struct gw_vmm *vmm)
{
	vmm->vcpus =
		aligned_alloc(_Alignof(struct gw_vmm_vcpu), vmm->vcpu_count * sizeof(*vmm->vcpus));
	if (!vmm->vcpus)
		return -ENOMEM;
	memset(vmm->vcpus, 0, vmm->vcpu_count * sizeof(*vmm->vcpus));
	for (uint32_t i = 0; i < vmm->vcpu_count; i++)
		vmm->vcpus[i].spin_ns = vmm->spin_ns_max;
	if (vmm->backend != GW_VMM_EXIT_SIGSEGV)
		return 0;
	vmm->given = calloc(1, gw_bitmap_len(vmm->page_count));
	return vmm->given ? 0 : -ENOMEM;
}

static int build(struct gw_vmm *vmm, const struct gw_vmm_config *config)
{
	int err = gw_vmm_configure(vmm, config);

	if (err < 0)
		return err;
	vmm->ram_fd = gw_sys_dup(config->ram_fd);
	if (vmm->ram_fd < 0)
		return vmm->ram_fd;
	err = check_ram(vmm);
	if (err == 0)
		err = make_vcpus(vmm);
	if (err == 0 && vmm->backend != GW_VMM_UFFD)
		err = gw_vmm_channel_create(vmm);
	/* Last of what can fail for lack of something: it changes the caller's mappings. */
	if (err == 0)
		err = gw_vmm_memory_arm(vmm, config->uffd_count, config->user_mode_ok);
	if (err == 0)
		err = gw_vmm_message_create(vmm, config->vmm_name, config->why);
	return err;
}

int gw_vmm_create(const struct gw_vmm_config *config, struct gw_vmm **ret_vmm)
{
	struct gw_vmm *const vmm = calloc(1, sizeof(*vmm));

	if (!vmm)
		return -ENOMEM;
	vmm->ram_fd = -1;
	vmm->channel_fd = -1;
	vmm->doorbell_fd = -1;
	vmm->sigbus_uffd = -1;
	vmm->stop_fd = -1;
	vmm->wait_ns_max = WAIT_NS_MAX;
	atomic_init(&vmm->granule, 1);
	const int err = build(vmm, config);

	if (err < 0) {
		gw_vmm_destroy(vmm);
		return err;
	}
	*ret_vmm = vmm;
	return 0;
}

void gw_vmm_destroy(struct gw_vmm *vmm)
{
	if (!vmm)
		return;
	gw_vmm_handoff_stop(vmm);
	gw_vmm_channel_destroy(vmm);
	for (uint32_t i = 0; i < vmm->uffd_count; i++)
		(void)gw_sys_close(vmm->uffds[i]);
	if (vmm->sigbus_uffd >= 0)
		(void)gw_sys_close(vmm->sigbus_uffd);
	if (vmm->ram_fd >= 0)
		(void)gw_sys_close(vmm->ram_fd);
	free((void *)vmm->given);
	free(vmm->vcpus);
	free(vmm->message);
	free(vmm);
}

int gw_vmm_release(struct gw_vmm *vmm)
{
	if (atomic_load_explicit(&vmm->release_wanted, memory_order_acquire))
		return 0;
	/* Acquire: every bit was seen clear before. Earlier, a guest would read zeros. */
	if (!atomic_load_explicit(&vmm->complete, memory_order_acquire))
		return -EBUSY;
	const int err = gw_vmm_memory_disarm(vmm);

	if (err < 0)
		return err;
	atomic_store_explicit(&vmm->release_wanted, true, memory_order_release);
	gw_vmm_handoff_poke(vmm);
	return 0;
}

/* --- readers ---------------------------------------------------------------------------------- */

const struct gw_vmm_region_state *gw_vmm_region_of_page(const struct gw_vmm *vmm, uint64_t page)
{
	for (uint32_t i = 0; i < vmm->region_count; i++)
		if (page - vmm->regions[i].first < vmm->regions[i].count)
			return &vmm->regions[i];
	return NULL;
}

uint64_t gw_vmm_page_of(const struct gw_vmm *vmm, uint64_t gpa)
{
	for (uint32_t i = 0; i < vmm->region_count; i++) {
		const struct gw_vmm_region_state *const region = &vmm->regions[i];

		if (gpa - region->at.gpa < region->at.len)
			return region->first + (gpa - region->at.gpa) / vmm->page_size;
	}
	return GW_EXIT_PAGE_NONE;
}

uint32_t gw_vmm_slot_flags(const struct gw_vmm *vmm)
{
	return vmm->backend == GW_VMM_KVM_USERFAULT &&
			       !atomic_load_explicit(&vmm->complete, memory_order_acquire)
		       ? GW_VMM_MEM_USERFAULT
		       : 0;
}

const uint64_t *gw_vmm_slot_bitmap(const struct gw_vmm *vmm, uint32_t region)
{
	if (!vmm->words || region >= vmm->region_count)
		return NULL;
	/* For the kernel, which reads whole words; nobody here reads them through this pointer. */
	return (const uint64_t *)(const void *)&vmm->words[vmm->regions[region].first / 64];
}

bool gw_vmm_is_absent(const struct gw_vmm *vmm, uint64_t gpa)
{
	const uint64_t page = gw_vmm_page_of(vmm, gpa);

	if (page == GW_EXIT_PAGE_NONE)
		return false;
	return vmm->words ? gw_vmm_page_is_absent(vmm, page)
			  : !atomic_load_explicit(&vmm->complete, memory_order_acquire);
}

uint64_t gw_vmm_absent_count(const struct gw_vmm *vmm)
{
	uint64_t count = 0;

	if (!vmm->words)
		return atomic_load_explicit(&vmm->complete, memory_order_acquire) ? 0
										  : vmm->page_count;
	for (size_t i = 0; i < gw_bitmap_len(vmm->page_count) / sizeof(uint64_t); i++)
		count += (uint64_t)__builtin_popcountll(
			atomic_load_explicit(&vmm->words[i], memory_order_acquire));
	return count;
}

bool gw_vmm_is_released(const struct gw_vmm *vmm)
{
	return atomic_load_explicit(&vmm->released, memory_order_acquire);
}

void gw_vmm_stats(const struct gw_vmm *vmm, uint32_t vcpu, struct gw_vmm_stats *ret_stats)
{
	*ret_stats = (struct gw_vmm_stats){0};
	if (!vmm->words || vcpu >= vmm->vcpu_count)
		return;
	const struct gw_exit_vcpu *const ring = &vmm->rings[vcpu];

	ret_stats->exit_count = atomic_load_explicit(&ring->exit_count, memory_order_relaxed);
	ret_stats->spurious_count =
		atomic_load_explicit(&ring->spurious_count, memory_order_relaxed);
	ret_stats->blocked_ns = atomic_load_explicit(&ring->blocked_ns, memory_order_relaxed);
}

enum gw_vmm_backend gw_vmm_backend_of(const struct gw_vmm *vmm)
{
	return vmm->backend;
}
