/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vmm_exit.c - what a return of KVM_RUN means. Pure: it looks at the result and at struct kvm_run.
 *
 * Threads, Errors, Ownership, Units: see vmm.h.
 * Source     Linux Documentation/virt/kvm/api.rst (KVM_RUN, KVM_EXIT_MEMORY_FAULT, KVM_EXIT_MMIO,
 *            KVM_EXIT_INTERNAL_ERROR); KVM Userfault v3; test_vmm_exit_kvm.c, on a real kernel.
 *
 * Why exit_reason is believed with EFAULT and EHWPOISON alone. KVM_EXIT_MEMORY_FAULT is the one exit
 * that comes with -1; beside any other error the field is left over from an earlier exit. With EFAULT
 * it is fresh: kernels that know 39 (6.8 on) set it to 0 at each entry, older ones never write 39.
 *
 * Why flags are read strictly. A bit that we do not know may say that gpa means something else: an RFC
 * has 1 << 5 for "the page comes by itself, later". Guessing installs a page at a wrong moment; holding
 * costs a pause.
 *
 * Why nothing is held back for a fetch. Where the guest runs natively, a fetch from an absent page is
 * a bare EFAULT as any access is, rip unchanged. Where KVM emulates, its fetch fails and the emulation
 * with it: exit 17, suberror 1, with the bytes it got. None, or fewer than an instruction can have:
 * the fetch may be what failed. 15: it was not, but a locked access to an absent page ends the same way.
 * rip is a virtual address; whether it is in RAM takes a translation, which is not pure.
 */
#include <godwit/vmm.h>

#include <errno.h>
#include <linux/kvm.h>

#include <godwit/exit_channel.h>

/* linux/kvm.h of 6.8. The distribution's is of 6.1. */
#ifndef KVM_EXIT_MEMORY_FAULT
#define KVM_EXIT_MEMORY_FAULT 39
#endif
#ifndef KVM_MEMORY_EXIT_FLAG_PRIVATE
#define KVM_MEMORY_EXIT_FLAG_PRIVATE (UINT64_C(1) << 3)
#endif
/* KVM Userfault v3, June 2025, not merged. */
#ifndef KVM_MEMORY_EXIT_FLAG_USERFAULT
#define KVM_MEMORY_EXIT_FLAG_USERFAULT (UINT64_C(1) << 4)
#endif

#define KNOWN_FLAGS    (KVM_MEMORY_EXIT_FLAG_PRIVATE | KVM_MEMORY_EXIT_FLAG_USERFAULT)
#define INSN_LEN_MAX   15U /* of x86 */
#define INSN_NDATA_MIN 3U  /* words of emulation_failure that hold flags and bytes */

/* kvm_run.memory_fault of 6.8, in the union where every exit's own words are. */
struct memory_fault {
	uint64_t flags;
	uint64_t gpa;
	uint64_t size;
};

_Static_assert(offsetof(struct kvm_run, hw) == 32, "the union of exits, part of the ABI");

struct ram {
	bool (*is_ram)(const void *opaque, uint64_t gpa);
	const void *opaque;
};

static const struct memory_fault *memory_fault_of(const struct kvm_run *run)
{
	return (const void *)&run->hw;
}

static bool is_range(uint64_t gpa, uint64_t len)
{
	return len > 0 && len - 1 <= UINT64_MAX - gpa;
}

/* First and last byte: a fault never spans slots, and regions are much larger than a page. */
static bool is_all_ram(const struct ram *ram, uint64_t gpa, uint64_t len)
{
	return ram->is_ram(ram->opaque, gpa) && ram->is_ram(ram->opaque, gpa + len - 1);
}

static enum gw_vmm_exit classify_memory_fault(const struct memory_fault *fault,
					      const struct ram *ram, struct gw_vmm_exit_info *info)
{
	*info = (struct gw_vmm_exit_info){
		.gpa = fault->gpa, .len = fault->size, .flags = fault->flags};
	if ((fault->flags & ~KNOWN_FLAGS) != 0 || !is_range(fault->gpa, fault->size))
		return GW_VMM_EXIT_UNKNOWN;
	/* A guest may declare a device's addresses shared: those need no RAM. */
	if (fault->flags == 0)
		return GW_VMM_EXIT_SHARED;
	if (!is_all_ram(ram, fault->gpa, fault->size))
		return GW_VMM_EXIT_UNKNOWN;
	/* Both: a private page whose bit is set. The import comes before all else, and clears the bit. */
	if (fault->flags & KVM_MEMORY_EXIT_FLAG_PRIVATE)
		return GW_VMM_EXIT_PRIVATE;
	return GW_VMM_EXIT_USERFAULT;
}

static enum gw_vmm_exit classify_poison(const struct kvm_run *run, struct gw_vmm_exit_info *info)
{
	const struct memory_fault *const fault = memory_fault_of(run);

	if (run->exit_reason == KVM_EXIT_MEMORY_FAULT && is_range(fault->gpa, fault->size)) {
		info->gpa = fault->gpa;
		info->len = fault->size;
	}
	return GW_VMM_EXIT_POISON;
}

static enum gw_vmm_exit classify_mmio(const struct kvm_run *run, const struct ram *ram,
				      struct gw_vmm_exit_info *info)
{
	const uint64_t gpa = run->mmio.phys_addr;
	const uint64_t len = run->mmio.len > 0 ? run->mmio.len : 1;

	/* One byte of it is enough: a device's register never begins or ends in RAM. */
	if (!ram->is_ram(ram->opaque, gpa) &&
	    (!is_range(gpa, len) || !ram->is_ram(ram->opaque, gpa + len - 1)))
		return GW_VMM_EXIT_OTHER;
	*info = (struct gw_vmm_exit_info){
		.gpa = gpa, .len = len, .flags = run->mmio.is_write ? GW_EXIT_WRITE : 0};
	return GW_VMM_EXIT_RAM_MMIO;
}

static enum gw_vmm_exit classify_internal_error(const struct kvm_run *run,
						struct gw_vmm_exit_info *info)
{
	if (run->internal.suberror != KVM_INTERNAL_ERROR_EMULATION)
		return GW_VMM_EXIT_OTHER;
	/* Kernels before 5.14 have no words there. */
	if (run->emulation_failure.ndata >= INSN_NDATA_MIN &&
	    (run->emulation_failure.flags & KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES))
		info->len = run->emulation_failure.insn_size;
	if (info->len < INSN_LEN_MAX)
		info->flags = GW_EXIT_EXEC;
	return GW_VMM_EXIT_NOT_EMULATED;
}

static enum gw_vmm_exit classify_exit(const struct kvm_run *run, const struct ram *ram,
				      struct gw_vmm_exit_info *info)
{
	switch (run->exit_reason) {
	case KVM_EXIT_MMIO:
		return classify_mmio(run, ram, info);
	case KVM_EXIT_INTERNAL_ERROR:
		return classify_internal_error(run, info);
	case KVM_EXIT_MEMORY_FAULT:
		/* Comes with -1, always. A kernel that says it otherwise is one we do not know. */
		(void)classify_memory_fault(memory_fault_of(run), ram, info);
		return GW_VMM_EXIT_UNKNOWN;
	default:
		return GW_VMM_EXIT_OTHER;
	}
}

enum gw_vmm_exit gw_vmm_classify(int result, const struct kvm_run *run,
				 bool (*is_ram)(const void *opaque, uint64_t gpa),
				 const void *opaque, struct gw_vmm_exit_info *ret_info)
{
	const struct ram ram = {.is_ram = is_ram, .opaque = opaque};

	*ret_info = (struct gw_vmm_exit_info){.gpa = GW_VMM_GPA_NONE};
	switch (result) {
	case 0:
		return classify_exit(run, &ram, ret_info);
	case -EFAULT:
		if (run->exit_reason != KVM_EXIT_MEMORY_FAULT)
			return GW_VMM_EXIT_BARE_FAULT;
		return classify_memory_fault(memory_fault_of(run), &ram, ret_info);
	case -EHWPOISON:
		return classify_poison(run, ret_info);
	case -EINTR:
	case -EAGAIN:
		return GW_VMM_EXIT_INTERRUPTED;
	default:
		return GW_VMM_EXIT_OTHER;
	}
}
