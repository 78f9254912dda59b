/* SPDX-License-Identifier: Apache-2.0 */
/*
 * kvm_check.c - may a state that was saved elsewhere run on this processor and this kernel?
 *
 * Threads, Errors, Ownership, Units: see kvm.h.
 * Source: Intel SDM vol. 2, CPUID; Documentation/virt/kvm/api.rst.
 *
 * A guest looks once at what the processor can do. So what it saw must be there on the destination;
 * more may be there, it keeps the CPUID of its birth.
 */
#include "kvm.h"

#include <errno.h>

enum reg { EAX, EBX, ECX, EDX };

/* CPUID words that are sets of features, and the bits in them that say something else. */
static const struct word {
	uint32_t function;
	uint32_t index;
	enum reg reg;
	uint32_t ignored;
	const char *name;
} WORDS[] = {
	{0x1, 0, ECX, 1u << 27, "1.ecx"},
	{0x1, 0, EDX, 0, "1.edx"},
	{0x7, 0, EBX, 0, "7.ebx"},
	{0x7, 0, ECX, 1u << 4, "7.ecx"},
	{0x7, 0, EDX, 0, "7.edx"},
	{0x7, 1, EAX, 0, "7.1.eax"},
	{0xD, 0, EAX, 0, "D.eax"},
	{0xD, 0, EDX, 0, "D.edx"},
	{0xD, 1, EAX, 0, "D.1.eax"},
	{0x80000001, 0, ECX, 0, "80000001.ecx"},
	{0x80000001, 0, EDX, 0, "80000001.edx"},
	{0x80000007, 0, EDX, 0, "80000007.edx"},
	{0x40000001, 0, EAX, 0, "40000001.eax"},
};

static const struct kvm_cpuid_entry2 *find_leaf(const struct kvm_cpuid_entry2 *entries,
						size_t count, uint32_t function, uint32_t index)
{
	for (size_t i = 0; i < count; i++)
		if (entries[i].function == function && entries[i].index == index)
			return &entries[i];
	return NULL;
}

static uint32_t value_of(const struct kvm_cpuid_entry2 *entry, enum reg reg)
{
	if (!entry)
		return 0;
	switch (reg) {
	case EAX:
		return entry->eax;
	case EBX:
		return entry->ebx;
	case ECX:
		return entry->ecx;
	case EDX:
		return entry->edx;
	}
	return 0;
}

static int check_vendor(const struct mv_kvm *kvm, const struct kvm_cpuid_entry2 *entries,
			size_t count, struct mv_error *error)
{
	const struct kvm_cpuid_entry2 *theirs = find_leaf(entries, count, 0, 0);
	const struct kvm_cpuid_entry2 *ours =
		find_leaf(kvm->seen.entries, kvm->seen.head.nent, 0, 0);

	for (enum reg reg = EBX; reg <= EDX; reg++)
		if (value_of(theirs, reg) != value_of(ours, reg))
			return mv_refuse(error, -EBADMSG,
					 "state of another vendor's processor than this host's");
	return 0;
}

static int check_cpuid(const struct mv_kvm *kvm, const struct kvm_cpuid_entry2 *entries,
		       size_t count, struct mv_error *error)
{
	for (size_t i = 0; i < sizeof(WORDS) / sizeof(WORDS[0]); i++) {
		const struct word *word = &WORDS[i];
		const uint32_t theirs =
			value_of(find_leaf(entries, count, word->function, word->index), word->reg);
		const uint32_t ours = value_of(find_leaf(kvm->seen.entries, kvm->seen.head.nent,
							 word->function, word->index),
					       word->reg);
		const uint32_t missing = theirs & ~ours & ~word->ignored;

		if (missing != 0)
			return mv_refuse(error, -EBADMSG,
					 "the guest has seen processor features that this host "
					 "lacks: CPUID %s bits %#x",
					 word->name, missing);
	}
	return check_vendor(kvm, entries, count, error);
}

static bool knows_msr(const struct mv_kvm *kvm, uint32_t index)
{
	for (uint32_t i = 0; i < kvm->msr_count; i++)
		if (kvm->msr_indexes[i] == index)
			return true;
	return false;
}

static int check_vcpu(const struct mv_kvm *kvm, const struct mv_blob_reader *reader, uint32_t id,
		      struct mv_error *error)
{
	size_t len;
	const struct kvm_cpuid_entry2 *entries =
		mv_blob_find(reader, MV_SECTION_KVM_CPUID, id, &len);
	const struct kvm_msr_entry *msrs;
	const uint64_t *khz;
	const int rc = check_cpuid(kvm, entries, len / sizeof(entries[0]), error);

	if (rc < 0)
		return rc;
	msrs = mv_blob_find(reader, MV_SECTION_KVM_MSRS, id, &len);
	for (size_t i = 0; i < len / sizeof(msrs[0]); i++)
		if (!knows_msr(kvm, msrs[i].index) || msrs[i].reserved != 0)
			return mv_refuse(error, -EBADMSG, "vCPU %u: this host has no MSR %#x", id,
					 msrs[i].index);
	khz = mv_blob_find(reader, MV_SECTION_KVM_TSC_KHZ, id, &len);
	if (*khz == 0 || *khz > UINT32_MAX)
		return mv_refuse(error, -EBADMSG, "vCPU %u: a TSC of %llu kHz", id,
				 (unsigned long long)*khz);
	return 0;
}

int mv_kvm_check(const struct mv_machine *machine, const struct mv_blob_reader *reader,
		 struct mv_error *error)
{
	const struct mv_kvm *kvm = mv_kvm_of(machine);
	size_t len;
	int rc = 0;

	for (uint32_t i = 0; i < 3; i++) {
		const struct kvm_irqchip *chip =
			mv_blob_find(reader, MV_SECTION_KVM_IRQCHIP, i, &len);

		if (chip->chip_id != i)
			return mv_refuse(error, -EBADMSG, "interrupt chip %u says it is %u", i,
					 chip->chip_id);
	}
	for (uint32_t i = 0; rc == 0 && i < machine->config.vcpu_count; i++)
		rc = check_vcpu(kvm, reader, i, error);
	return rc;
}
