/* SPDX-License-Identifier: Apache-2.0 */
/*
 * kvm_state.c - everything that KVM holds of a stopped guest, out of one VM and into another.
 *
 * Threads, Errors, Ownership, Units: see kvm.h.
 * Source: Documentation/virt/kvm/api.rst; the order of loading is explained at LOAD_ORDER.
 */
#include "kvm.h"

#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>

#define IRQCHIP_COUNT 3u

/* State of a vCPU that is one struct of a fixed size. */
struct item {
	enum mv_section section;
	uint32_t len;
	unsigned long get;
	unsigned long set;
	const char *name;
};

#define ITEM(section_, type_, name_)                                                               \
	{                                                                                          \
		MV_SECTION_KVM_##section_, sizeof(struct type_), KVM_GET_##name_, KVM_SET_##name_, \
			#name_                                                                     \
	}

static const struct item SREGS2 = ITEM(SREGS2, kvm_sregs2, SREGS2);
static const struct item XCRS = ITEM(XCRS, kvm_xcrs, XCRS);
static const struct item LAPIC = ITEM(LAPIC, kvm_lapic_state, LAPIC);
static const struct item DEBUGREGS = ITEM(DEBUGREGS, kvm_debugregs, DEBUGREGS);
static const struct item REGS = ITEM(REGS, kvm_regs, REGS);
static const struct item MP_STATE = ITEM(MP_STATE, kvm_mp_state, MP_STATE);
static const struct item VCPU_EVENTS = ITEM(VCPU_EVENTS, kvm_vcpu_events, VCPU_EVENTS);

#define ITEM_LEN_MAX sizeof(struct kvm_lapic_state)
_Static_assert(sizeof(struct kvm_xcrs) <= ITEM_LEN_MAX, "the largest");
_Static_assert(sizeof(struct kvm_sregs2) <= ITEM_LEN_MAX, "the largest");

/* --- MSRs ---------------------------------------------------------------------------------------- */

/* Which of the MSRs that KVM lists can be read here; asked once, then they are read all at once. */
int mv_kvm_list_msrs(struct mv_machine *machine, struct mv_error *error)
{
	struct mv_kvm *kvm = mv_kvm_of(machine);
	const int fd = mv_kvm_vcpu_of(&machine->vcpus[0])->fd;
	struct {
		struct kvm_msr_list head;
		uint32_t indexes[MV_MSR_COUNT_MAX];
	} list = {.head.nmsrs = MV_MSR_COUNT_MAX};
	const int rc = mv_kvm_ioctl(kvm->kvm_fd, KVM_GET_MSR_INDEX_LIST, &list);

	if (rc < 0)
		return mv_refuse_errno(error, rc, "KVM_GET_MSR_INDEX_LIST");
	for (uint32_t i = 0; i < list.head.nmsrs; i++) {
		struct mv_msrs one = {.head.nmsrs = 1, .entries[0].index = list.indexes[i]};

		if (mv_kvm_ioctl(fd, KVM_GET_MSRS, &one) == 1)
			kvm->msr_indexes[kvm->msr_count++] = list.indexes[i];
	}
	return 0;
}

static int save_msrs(const struct mv_kvm *kvm, const struct mv_kvm_vcpu *vcpu, uint32_t id,
		     struct mv_blob_writer *writer)
{
	struct mv_msrs msrs = {.head.nmsrs = kvm->msr_count};
	int rc;

	for (uint32_t i = 0; i < kvm->msr_count; i++)
		msrs.entries[i].index = kvm->msr_indexes[i];
	rc = mv_kvm_ioctl(vcpu->fd, KVM_GET_MSRS, &msrs);
	if (rc >= 0 && rc != (int)kvm->msr_count)
		rc = -EIO;
	if (rc >= 0)
		mv_blob_add(writer, MV_SECTION_KVM_MSRS, id, msrs.entries,
			    kvm->msr_count * sizeof(msrs.entries[0]));
	return rc < 0 ? rc : 0;
}

/* An MSR that cannot be set may be left out if it has that value anyway: it is constant here. */
static bool has_value(const struct mv_kvm_vcpu *vcpu, const struct kvm_msr_entry *entry)
{
	struct mv_msrs one = {.head.nmsrs = 1, .entries[0].index = entry->index};

	return mv_kvm_ioctl(vcpu->fd, KVM_GET_MSRS, &one) == 1 &&
	       one.entries[0].data == entry->data;
}

static int load_msrs(const struct mv_kvm_vcpu *vcpu, const struct kvm_msr_entry *entries,
		     size_t count, struct mv_error *error)
{
	size_t done = 0;

	while (done < count) {
		struct mv_msrs msrs = {.head.nmsrs = (uint32_t)(count - done)};
		int rc;

		memcpy(msrs.entries, entries + done, (count - done) * sizeof(entries[0]));
		rc = mv_kvm_ioctl(vcpu->fd, KVM_SET_MSRS, &msrs);
		if (rc < 0)
			return mv_refuse_errno(error, rc, "KVM_SET_MSRS");
		done += (size_t)rc; /* it stops at the first that it refuses */
		if (done == count)
			break;
		if (!has_value(vcpu, &entries[done]))
			return mv_refuse(error, -EINVAL, "MSR %#x cannot be set to %#llx",
					 entries[done].index,
					 (unsigned long long)entries[done].data);
		done++;
	}
	return 0;
}

/* --- TSC ----------------------------------------------------------------------------------------- */

/* KVM's own tolerance: within it the guest's clock sources do not notice. */
static bool tsc_near(uint64_t a, uint64_t b)
{
	const uint64_t difference = a > b ? a - b : b - a;

	return difference * 4000 <= a;
}

static int load_tsc_khz(const struct mv_kvm_vcpu *vcpu, uint64_t khz, struct mv_error *error)
{
	const int here = mv_kvm_ioctl(vcpu->fd, KVM_GET_TSC_KHZ, NULL);
	int rc;

	if (here > 0 && (uint64_t)here == khz)
		return 0;
	rc = mv_kvm_ioctl(vcpu->fd, KVM_SET_TSC_KHZ, (const void *)(uintptr_t)khz);
	if (rc == 0 || (here > 0 && tsc_near((uint64_t)here, khz)))
		return 0;
	return mv_refuse_errno(error, rc, "TSC of %llu kHz on a host with %d",
			       (unsigned long long)khz, here);
}

/* --- a vCPU -------------------------------------------------------------------------------------- */

static int save_item(const struct mv_kvm_vcpu *vcpu, uint32_t id, const struct item *item,
		     struct mv_blob_writer *writer)
{
	uint8_t bytes[ITEM_LEN_MAX] = {0};
	const int rc = mv_kvm_ioctl(vcpu->fd, item->get, bytes);

	if (rc >= 0)
		mv_blob_add(writer, item->section, id, bytes, item->len);
	return rc < 0 ? rc : 0;
}

static int save_cpuid(const struct mv_kvm_vcpu *vcpu, uint32_t id, struct mv_blob_writer *writer)
{
	struct mv_cpuid cpuid = {.head.nent = MV_CPUID_COUNT_MAX};
	const int rc = mv_kvm_ioctl(vcpu->fd, KVM_GET_CPUID2, &cpuid);

	if (rc >= 0)
		mv_blob_add(writer, MV_SECTION_KVM_CPUID, id, cpuid.entries,
			    cpuid.head.nent * sizeof(cpuid.entries[0]));
	return rc < 0 ? rc : 0;
}

static int save_xsave(const struct mv_kvm *kvm, const struct mv_kvm_vcpu *vcpu, uint32_t id,
		      struct mv_blob_writer *writer)
{
	uint8_t bytes[MV_XSAVE_LEN_MAX] __attribute__((aligned(64))) = {0};
	const int rc = mv_kvm_ioctl(vcpu->fd, KVM_GET_XSAVE2, bytes);

	if (rc >= 0)
		mv_blob_add(writer, MV_SECTION_KVM_XSAVE, id, bytes, kvm->xsave_size);
	return rc < 0 ? rc : 0;
}

static int save_tsc_khz(const struct mv_kvm_vcpu *vcpu, uint32_t id, struct mv_blob_writer *writer)
{
	const int rc = mv_kvm_ioctl(vcpu->fd, KVM_GET_TSC_KHZ, NULL);
	const uint64_t khz = rc > 0 ? (uint64_t)rc : 0;

	if (rc >= 0)
		mv_blob_add(writer, MV_SECTION_KVM_TSC_KHZ, id, &khz, sizeof(khz));
	return rc < 0 ? rc : 0;
}

/* One section of every vCPU, in the blob's order: by type, then by vCPU. */
static int save_section(const struct mv_machine *machine, enum mv_section section,
			const struct item *item, struct mv_blob_writer *writer)
{
	const struct mv_kvm *kvm = mv_kvm_of(machine);
	int rc = 0;

	for (uint32_t i = 0; rc == 0 && i < machine->config.vcpu_count; i++) {
		const struct mv_kvm_vcpu *vcpu = mv_kvm_vcpu_of(&machine->vcpus[i]);

		if (item)
			rc = save_item(vcpu, i, item, writer);
		else if (section == MV_SECTION_KVM_CPUID)
			rc = save_cpuid(vcpu, i, writer);
		else if (section == MV_SECTION_KVM_TSC_KHZ)
			rc = save_tsc_khz(vcpu, i, writer);
		else if (section == MV_SECTION_KVM_XSAVE)
			rc = save_xsave(kvm, vcpu, i, writer);
		else
			rc = save_msrs(kvm, vcpu, i, writer);
	}
	return rc;
}

/* By ascending section, as a blob is written. */
static const struct {
	enum mv_section section;
	const struct item *item; /* NULL: not of a fixed size */
} VCPU_SECTIONS[] = {
	{MV_SECTION_KVM_CPUID, NULL},
	{MV_SECTION_KVM_TSC_KHZ, NULL},
	{MV_SECTION_KVM_SREGS2, &SREGS2},
	{MV_SECTION_KVM_XCRS, &XCRS},
	{MV_SECTION_KVM_XSAVE, NULL},
	{MV_SECTION_KVM_LAPIC, &LAPIC},
	{MV_SECTION_KVM_MSRS, NULL},
	{MV_SECTION_KVM_DEBUGREGS, &DEBUGREGS},
	{MV_SECTION_KVM_REGS, &REGS},
	{MV_SECTION_KVM_MP_STATE, &MP_STATE},
	{MV_SECTION_KVM_VCPU_EVENTS, &VCPU_EVENTS},
};
#define VCPU_SECTION_COUNT (sizeof(VCPU_SECTIONS) / sizeof(VCPU_SECTIONS[0]))
_Static_assert(3 + VCPU_SECTION_COUNT <= MV_ACCEL_RULE_COUNT_MAX, "room for the rules");

static int load_item(const struct mv_kvm_vcpu *vcpu, uint32_t id, const struct item *item,
		     const struct mv_blob_reader *reader, struct mv_error *error)
{
	size_t len;
	const void *bytes = mv_blob_find(reader, item->section, id, &len);
	const int rc = mv_kvm_ioctl(vcpu->fd, item->set, bytes);

	return rc < 0 ? mv_refuse_errno(error, rc, "KVM_SET_%s of vCPU %u", item->name, id) : 0;
}

static int load_cpuid(const struct mv_kvm_vcpu *vcpu, uint32_t id,
		      const struct mv_blob_reader *reader, struct mv_error *error)
{
	struct mv_cpuid cpuid = {0};
	size_t len;
	const void *entries = mv_blob_find(reader, MV_SECTION_KVM_CPUID, id, &len);
	int rc;

	cpuid.head.nent = (uint32_t)(len / sizeof(cpuid.entries[0]));
	memcpy(cpuid.entries, entries, len);
	rc = mv_kvm_ioctl(vcpu->fd, KVM_SET_CPUID2, &cpuid);
	return rc < 0 ? mv_refuse_errno(error, rc, "KVM_SET_CPUID2 of vCPU %u", id) : 0;
}

static int load_xsave(const struct mv_kvm_vcpu *vcpu, uint32_t id,
		      const struct mv_blob_reader *reader, struct mv_error *error)
{
	size_t len;
	const void *bytes = mv_blob_find(reader, MV_SECTION_KVM_XSAVE, id, &len);
	const int rc = mv_kvm_ioctl(vcpu->fd, KVM_SET_XSAVE, bytes);

	return rc < 0 ? mv_refuse_errno(error, rc, "KVM_SET_XSAVE of vCPU %u", id) : 0;
}

/*
 * LOAD_ORDER. CPUID first: what may be set depends on it. SREGS2 before LAPIC: the APIC's mode says
 * how its registers are read. LAPIC before MSRs: the deadline timer's MSR is ignored in any other
 * timer mode. XCRS before XSAVE: they say which parts there are. REGS after SREGS2, which may touch
 * rflags. MP_STATE and VCPU_EVENTS last: others clear what they set.
 */
static int load_vcpu(const struct mv_kvm_vcpu *vcpu, uint32_t id,
		     const struct mv_blob_reader *reader, struct mv_error *error)
{
	static const struct item *const behind_msrs[] = {&DEBUGREGS, &REGS, &MP_STATE,
							 &VCPU_EVENTS};
	size_t len;
	const uint64_t *khz = mv_blob_find(reader, MV_SECTION_KVM_TSC_KHZ, id, &len);
	const struct kvm_msr_entry *msrs;
	int rc = load_cpuid(vcpu, id, reader, error);

	if (rc == 0)
		rc = load_tsc_khz(vcpu, *khz, error);
	if (rc == 0)
		rc = load_item(vcpu, id, &SREGS2, reader, error);
	if (rc == 0)
		rc = load_item(vcpu, id, &XCRS, reader, error);
	if (rc == 0)
		rc = load_xsave(vcpu, id, reader, error);
	if (rc == 0)
		rc = load_item(vcpu, id, &LAPIC, reader, error);
	msrs = mv_blob_find(reader, MV_SECTION_KVM_MSRS, id, &len);
	if (rc == 0)
		rc = load_msrs(vcpu, msrs, len / sizeof(msrs[0]), error);
	for (size_t i = 0; rc == 0 && i < sizeof(behind_msrs) / sizeof(behind_msrs[0]); i++)
		rc = load_item(vcpu, id, behind_msrs[i], reader, error);
	return rc;
}

/* --- the VM -------------------------------------------------------------------------------------- */

static int save_vm(const struct mv_kvm *kvm, struct mv_blob_writer *writer)
{
	struct kvm_pit_state2 pit = {0};
	struct kvm_clock_data clock = {0};
	int rc = 0;

	for (uint32_t i = 0; rc >= 0 && i < IRQCHIP_COUNT; i++) {
		struct kvm_irqchip chip = {.chip_id = i};

		rc = mv_kvm_ioctl(kvm->vm_fd, KVM_GET_IRQCHIP, &chip);
		mv_blob_add(writer, MV_SECTION_KVM_IRQCHIP, i, &chip, sizeof(chip));
	}
	if (rc >= 0)
		rc = mv_kvm_ioctl(kvm->vm_fd, KVM_GET_PIT2, &pit);
	if (rc >= 0) {
		mv_blob_add(writer, MV_SECTION_KVM_PIT2, 0, &pit, sizeof(pit));
		rc = mv_kvm_ioctl(kvm->vm_fd, KVM_GET_CLOCK, &clock);
	}
	/* The host's own clocks, which come with it, mean nothing on another host. */
	clock.flags = 0;
	clock.realtime = 0;
	clock.host_tsc = 0;
	if (rc >= 0)
		mv_blob_add(writer, MV_SECTION_KVM_CLOCK, 0, &clock, sizeof(clock));
	return rc < 0 ? rc : 0;
}

static int load_vm(const struct mv_kvm *kvm, const struct mv_blob_reader *reader,
		   struct mv_error *error)
{
	size_t len;
	int rc = 0;

	for (uint32_t i = 0; rc >= 0 && i < IRQCHIP_COUNT; i++)
		rc = mv_kvm_ioctl(kvm->vm_fd, KVM_SET_IRQCHIP,
				  mv_blob_find(reader, MV_SECTION_KVM_IRQCHIP, i, &len));
	if (rc >= 0)
		rc = mv_kvm_ioctl(kvm->vm_fd, KVM_SET_PIT2,
				  mv_blob_find(reader, MV_SECTION_KVM_PIT2, 0, &len));
	if (rc >= 0)
		rc = mv_kvm_ioctl(kvm->vm_fd, KVM_SET_CLOCK,
				  mv_blob_find(reader, MV_SECTION_KVM_CLOCK, 0, &len));
	return rc < 0 ? mv_refuse_errno(error, rc, "load the VM's chips and clock") : 0;
}

/* --- whole -------------------------------------------------------------------------------------- */

int mv_kvm_save(struct mv_machine *machine, struct mv_blob_writer *writer, struct mv_error *error)
{
	int rc = save_vm(mv_kvm_of(machine), writer);

	for (size_t i = 0; rc == 0 && i < VCPU_SECTION_COUNT; i++) {
		rc = save_section(machine, VCPU_SECTIONS[i].section, VCPU_SECTIONS[i].item, writer);
		if (rc < 0)
			return mv_refuse_errno(error, rc, "save section %u",
					       VCPU_SECTIONS[i].section);
	}
	return rc < 0 ? mv_refuse_errno(error, rc, "save the VM") : 0;
}

int mv_kvm_load(struct mv_machine *machine, const struct mv_blob_reader *reader,
		struct mv_error *error)
{
	int rc = load_vm(mv_kvm_of(machine), reader, error);

	for (uint32_t i = 0; rc == 0 && i < machine->config.vcpu_count; i++)
		rc = load_vcpu(mv_kvm_vcpu_of(&machine->vcpus[i]), i, reader, error);
	return rc;
}

static struct mv_blob_rule rule(enum mv_section section, uint32_t count, size_t len_min,
				size_t len_max, size_t unit)
{
	return (struct mv_blob_rule){section, count, (uint32_t)len_min, (uint32_t)len_max,
				     (uint32_t)unit};
}

size_t mv_kvm_rules(const struct mv_machine *machine,
		    struct mv_blob_rule ret_rules[MV_ACCEL_RULE_COUNT_MAX])
{
	const struct mv_kvm *kvm = mv_kvm_of(machine);
	const uint32_t vcpus = machine->config.vcpu_count;
	size_t count = 0;

	ret_rules[count++] = rule(MV_SECTION_KVM_IRQCHIP, IRQCHIP_COUNT, sizeof(struct kvm_irqchip),
				  sizeof(struct kvm_irqchip), 1);
	ret_rules[count++] = rule(MV_SECTION_KVM_PIT2, 1, sizeof(struct kvm_pit_state2),
				  sizeof(struct kvm_pit_state2), 1);
	ret_rules[count++] = rule(MV_SECTION_KVM_CLOCK, 1, sizeof(struct kvm_clock_data),
				  sizeof(struct kvm_clock_data), 1);
	for (size_t i = 0; i < VCPU_SECTION_COUNT; i++) {
		const enum mv_section section = VCPU_SECTIONS[i].section;
		const struct item *item = VCPU_SECTIONS[i].item;

		if (item)
			ret_rules[count++] = rule(section, vcpus, item->len, item->len, 1);
		else if (section == MV_SECTION_KVM_CPUID)
			ret_rules[count++] =
				rule(section, vcpus, sizeof(struct kvm_cpuid_entry2),
				     MV_CPUID_COUNT_MAX * sizeof(struct kvm_cpuid_entry2),
				     sizeof(struct kvm_cpuid_entry2));
		else if (section == MV_SECTION_KVM_TSC_KHZ)
			ret_rules[count++] =
				rule(section, vcpus, sizeof(uint64_t), sizeof(uint64_t), 1);
		else if (section == MV_SECTION_KVM_XSAVE)
			ret_rules[count++] =
				rule(section, vcpus, kvm->xsave_size, kvm->xsave_size, 1);
		else
			ret_rules[count++] = rule(section, vcpus, sizeof(struct kvm_msr_entry),
						  MV_MSR_COUNT_MAX * sizeof(struct kvm_msr_entry),
						  sizeof(struct kvm_msr_entry));
	}
	return count;
}
