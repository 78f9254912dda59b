/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vmm_config.c - what gw_vmm_create refuses, before it has made anything.
 *
 * Threads, Errors, Ownership, Units, Source: see vmm.h.
 */
#include "vmm_internal.h"

#include <errno.h>

#define WORD_PAGES 64U

static bool is_aligned(uint64_t value, uint64_t to)
{
	return value % to == 0;
}

static bool overlap(uint64_t a, uint64_t a_len, uint64_t b, uint64_t b_len)
{
	return a < b + b_len && b < a + a_len;
}

/* Does its end fit into 64 bits? */
static bool fits(uint64_t start, uint64_t len)
{
	return start <= UINT64_MAX - len;
}

/* Where vCPUs see the region, as the backend wants it. */
static bool guest_addr_is_right(const struct gw_vmm *vmm, const struct gw_vmm_region *region)
{
	switch (vmm->backend) {
	case GW_VMM_UFFD:
	case GW_VMM_KVM_USERFAULT:
		return region->guest_addr == region->host_addr || region->guest_addr == 0;
	case GW_VMM_EXIT_SIGSEGV:
		/* Nothing else could hold a thread there. */
		return region->guest_addr != 0;
	default:
		return true;
	}
}

static bool region_is_right(const struct gw_vmm *vmm, const struct gw_vmm_region *region)
{
	const uint64_t unit = vmm->backend == GW_VMM_KVM_USERFAULT
				      ? (uint64_t)vmm->page_size * WORD_PAGES
				      : vmm->page_size;

	return region->len > 0 && region->host_addr != 0 &&
	       is_aligned(region->len, vmm->page_size) && is_aligned(region->gpa, vmm->page_size) &&
	       is_aligned(region->host_addr, vmm->page_size) &&
	       is_aligned(region->guest_addr, vmm->page_size) &&
	       /* A slot's own part of the bitmap begins with a word. */
	       is_aligned(region->offset, unit) && fits(region->gpa, region->len) &&
	       fits(region->host_addr, region->len) && fits(region->guest_addr, region->len) &&
	       guest_addr_is_right(vmm, region);
}

static bool have_two_mappings(const struct gw_vmm *vmm)
{
	return vmm->backend == GW_VMM_EXIT_EMULATION || vmm->backend == GW_VMM_EXIT_SIGSEGV;
}

static bool are_apart(const struct gw_vmm *vmm, const struct gw_vmm_region *a,
		      const struct gw_vmm_region *b)
{
	const bool guests = a->guest_addr != 0 && b->guest_addr != 0;

	return !overlap(a->gpa, a->len, b->gpa, b->len) &&
	       !overlap(a->host_addr, a->len, b->host_addr, b->len) &&
	       (!guests || !overlap(a->guest_addr, a->len, b->guest_addr, b->len)) &&
	       (!have_two_mappings(vmm) ||
		((a->guest_addr == 0 || !overlap(a->guest_addr, a->len, b->host_addr, b->len)) &&
		 (b->guest_addr == 0 || !overlap(b->guest_addr, b->len, a->host_addr, a->len))));
}

static bool add_region(struct gw_vmm *vmm, const struct gw_vmm_region *region)
{
	if (!region_is_right(vmm, region) || region->offset != vmm->page_count * vmm->page_size)
		return false;
	if (have_two_mappings(vmm) && region->guest_addr != 0 &&
	    overlap(region->guest_addr, region->len, region->host_addr, region->len))
		return false;
	for (uint32_t i = 0; i < vmm->region_count; i++)
		if (!are_apart(vmm, region, &vmm->regions[i].at))
			return false;
	vmm->regions[vmm->region_count++] = (struct gw_vmm_region_state){
		.at = *region,
		.first = vmm->page_count,
		.count = region->len / vmm->page_size,
	};
	vmm->page_count += region->len / vmm->page_size;
	return true;
}

static bool numbers_are_right(const struct gw_vmm_config *config)
{
	return config->struct_size == sizeof(*config) &&
	       (config->page_size == GW_VMM_PAGE_LEN ||
		(config->page_size == GW_VMM_HUGE_PAGE_LEN && config->backend == GW_VMM_UFFD)) &&
	       config->vcpu_count >= 1 && config->vcpu_count <= GW_EXIT_VCPU_COUNT_MAX &&
	       config->backend >= GW_VMM_KVM_USERFAULT && config->backend <= GW_VMM_UFFD &&
	       config->uffd_count >= 1 && config->uffd_count <= GW_VMM_UFFD_COUNT_MAX &&
	       config->spin_ns <= GW_VMM_SPIN_NS_MAX && config->vmm_name && config->on_complete &&
	       config->regions && config->region_count >= 1 &&
	       config->region_count <= GW_VMM_REGION_COUNT_MAX;
}

int gw_vmm_configure(struct gw_vmm *vmm, const struct gw_vmm_config *config)
{
	if (!numbers_are_right(config))
		return -EINVAL;
	vmm->backend = config->backend;
	vmm->page_size = config->page_size;
	vmm->vcpu_count = config->vcpu_count;
	vmm->spin_ns_max = config->spin_ns;
	vmm->on_complete = config->on_complete;
	vmm->opaque = config->opaque;
	for (uint32_t i = 0; i < config->region_count; i++)
		if (!add_region(vmm, &config->regions[i]))
			return -EINVAL;
	return 0;
}
