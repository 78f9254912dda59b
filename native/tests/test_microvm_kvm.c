/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_microvm_kvm.c - what KVM holds of a guest comes through save and load unchanged, also where
 * our own guest would not notice; and a guest that does what it must not is held.
 */
#include "test_microvm.h"

#ifdef __x86_64__

#include "kvm.h"

#define MSR_TSC		   0x10u
#define MSR_SYSENTER_EIP   0x176u
#define MSR_TSC_DEADLINE   0x6e0u
#define MSR_KERNEL_GS_BASE 0xc0000102u
#define PATTERN		   0x00005afe12345678ull
#define APIC_TIMER_NOW	   0x390u
#define XMM7_OFFSET	   (160u + 7u * 16u)

static struct mv_machine *paused_machine(uint32_t vcpu_count)
{
	struct mv_machine_config config = test_config(MV_ACCEL_KVM, vcpu_count);

	config.paused = true;
	return test_machine(&config);
}

static void set_msr(const struct mv_vcpu *vcpu, uint32_t index, uint64_t value)
{
	struct mv_msrs one = {.head.nmsrs = 1, .entries[0] = {.index = index, .data = value}};

	CHECK_EQ(mv_kvm_ioctl(mv_kvm_vcpu_of(vcpu)->fd, KVM_SET_MSRS, &one), 1);
}

static uint64_t msr(const struct mv_vcpu *vcpu, uint32_t index)
{
	struct mv_msrs one = {.head.nmsrs = 1, .entries[0].index = index};

	CHECK_EQ(mv_kvm_ioctl(mv_kvm_vcpu_of(vcpu)->fd, KVM_GET_MSRS, &one), 1);
	return one.entries[0].data;
}

/* Values that no reset and no boot makes. */
static void leave_marks(const struct mv_vcpu *vcpu)
{
	const int fd = mv_kvm_vcpu_of(vcpu)->fd;
	struct kvm_debugregs debug = {0};
	struct kvm_xsave xsave = {0};
	struct kvm_regs regs = {0};
	const uint64_t words[2] = {PATTERN + vcpu->id, ~PATTERN};

	set_msr(vcpu, MSR_KERNEL_GS_BASE, PATTERN + vcpu->id);
	set_msr(vcpu, MSR_SYSENTER_EIP, PATTERN - vcpu->id);
	CHECK_EQ(mv_kvm_ioctl(fd, KVM_GET_DEBUGREGS, &debug), 0);
	debug.db[1] = PATTERN + vcpu->id;
	CHECK_EQ(mv_kvm_ioctl(fd, KVM_SET_DEBUGREGS, &debug), 0);
	CHECK_EQ(mv_kvm_ioctl(fd, KVM_GET_XSAVE, &xsave), 0);
	/* xmm7, in the legacy area; byte 512 on is the header's word that says so. */
	memcpy((uint8_t *)&xsave + XMM7_OFFSET, words, sizeof(words));
	((uint64_t *)&xsave)[512 / 8] |= 3;
	CHECK_EQ(mv_kvm_ioctl(fd, KVM_SET_XSAVE, &xsave), 0);
	CHECK_EQ(mv_kvm_ioctl(fd, KVM_GET_REGS, &regs), 0);
	regs.r13 = PATTERN + vcpu->id;
	CHECK_EQ(mv_kvm_ioctl(fd, KVM_SET_REGS, &regs), 0);
}

static void leave_chip_marks(const struct mv_machine *machine)
{
	const int fd = mv_kvm_of(machine)->vm_fd;
	struct kvm_irqchip pic = {.chip_id = KVM_IRQCHIP_PIC_SLAVE};
	struct kvm_irqchip ioapic = {.chip_id = KVM_IRQCHIP_IOAPIC};

	CHECK_EQ(mv_kvm_ioctl(fd, KVM_GET_IRQCHIP, &pic), 0);
	pic.chip.pic.imr = 0xA5;
	CHECK_EQ(mv_kvm_ioctl(fd, KVM_SET_IRQCHIP, &pic), 0);
	CHECK_EQ(mv_kvm_ioctl(fd, KVM_GET_IRQCHIP, &ioapic), 0);
	ioapic.chip.ioapic.redirtbl[5].fields.vector = 0x55;
	ioapic.chip.ioapic.redirtbl[5].fields.mask = 1;
	CHECK_EQ(mv_kvm_ioctl(fd, KVM_SET_IRQCHIP, &ioapic), 0);
}

static void check_marks(const struct mv_vcpu *vcpu)
{
	const int fd = mv_kvm_vcpu_of(vcpu)->fd;
	struct kvm_debugregs debug = {0};
	struct kvm_xsave xsave = {0};
	struct kvm_regs regs = {0};
	uint64_t word;

	CHECK_EQ(msr(vcpu, MSR_KERNEL_GS_BASE), PATTERN + vcpu->id);
	CHECK_EQ(msr(vcpu, MSR_SYSENTER_EIP), PATTERN - vcpu->id);
	CHECK_EQ(mv_kvm_ioctl(fd, KVM_GET_DEBUGREGS, &debug), 0);
	CHECK_EQ(debug.db[1], PATTERN + vcpu->id);
	CHECK_EQ(mv_kvm_ioctl(fd, KVM_GET_XSAVE, &xsave), 0);
	memcpy(&word, (uint8_t *)&xsave + XMM7_OFFSET, sizeof(word));
	CHECK_EQ(word, PATTERN + vcpu->id);
	CHECK_EQ(mv_kvm_ioctl(fd, KVM_GET_REGS, &regs), 0);
	CHECK_EQ(regs.r13, PATTERN + vcpu->id);
	CHECK_EQ(regs.rip, GM_CODE_GPA);
}

/* MSRs that go on by themselves are not compared. */
static void same_msrs(const struct kvm_msr_entry *a, const struct kvm_msr_entry *b, size_t len)
{
	for (size_t i = 0; i < len / sizeof(*a); i++) {
		CHECK_EQ(a[i].index, b[i].index);
		if (a[i].index == MSR_TSC || a[i].index == MSR_TSC_DEADLINE)
			continue;
		if (a[i].data != b[i].data)
			fprintf(stderr, "MSR %#x\n", a[i].index);
		CHECK_EQ(a[i].data, b[i].data);
	}
}

static void same_apic(const uint8_t *a, const uint8_t *b, size_t len)
{
	for (size_t i = 0; i < len; i += sizeof(uint32_t)) {
		/* The current count runs, and with it the interrupt may have become due. */
		if (i == APIC_TIMER_NOW || (i >= 0x200 && i < 0x280))
			continue;
		CHECK_EQ(memcmp(a + i, b + i, sizeof(uint32_t)), 0);
	}
}

static void same_section(const struct mv_blob_reader *a, const struct mv_blob_reader *b,
			 enum mv_section type, uint32_t index)
{
	size_t a_len, b_len;
	const void *a_data = mv_blob_find(a, type, index, &a_len);
	const void *b_data = mv_blob_find(b, type, index, &b_len);

	CHECK(a_data && b_data);
	CHECK_EQ(a_len, b_len);
	if (type == MV_SECTION_KVM_MSRS)
		same_msrs(a_data, b_data, a_len);
	else if (type == MV_SECTION_KVM_LAPIC)
		same_apic(a_data, b_data, a_len);
	else
		CHECK_EQ(memcmp(a_data, b_data, a_len), 0);
}

static void what_is_loaded_is_what_was_saved(void)
{
	static const enum mv_section types[] = {
		MV_SECTION_VCPU,       MV_SECTION_KVM_CPUID,	MV_SECTION_KVM_TSC_KHZ,
		MV_SECTION_KVM_SREGS2, MV_SECTION_KVM_XCRS,	MV_SECTION_KVM_XSAVE,
		MV_SECTION_KVM_LAPIC,  MV_SECTION_KVM_MSRS,	MV_SECTION_KVM_DEBUGREGS,
		MV_SECTION_KVM_REGS,   MV_SECTION_KVM_MP_STATE, MV_SECTION_KVM_VCPU_EVENTS,
	};
	struct mv_machine *source = paused_machine(3);
	struct mv_machine *destination = incoming_for(source);
	struct mv_blob_reader a, b;
	struct mv_error error;
	uint8_t *saved, *again;
	size_t saved_len, again_len;

	for (uint32_t i = 0; i < 3; i++)
		leave_marks(&source->vcpus[i]);
	leave_chip_marks(source);
	saved = save_machine(source, &saved_len);
	load_machine(destination, saved, saved_len);
	for (uint32_t i = 0; i < 3; i++)
		check_marks(&destination->vcpus[i]);
	again = save_machine(destination, &again_len);
	CHECK_EQ(saved_len, again_len);
	CHECK_EQ(mv_blob_open(saved, saved_len, &a, &error), 0);
	CHECK_EQ(mv_blob_open(again, again_len, &b, &error), 0);
	for (size_t t = 0; t < sizeof(types) / sizeof(types[0]); t++)
		for (uint32_t i = 0; i < 3; i++)
			same_section(&a, &b, types[t], i);
	for (uint32_t i = 0; i < 3; i++)
		same_section(&a, &b, MV_SECTION_KVM_IRQCHIP, i);
	free(saved);
	free(again);
	mv_machine_destroy(source);
	mv_machine_destroy(destination);
}

/* The clock of the guest does not run backwards, and does not start anew. */
static void the_clock_goes_on(void)
{
	struct mv_machine *source = paused_machine(1);
	struct mv_machine *destination = incoming_for(source);
	const struct kvm_clock_data hour = {.clock = 3600000000000ull};
	struct kvm_clock_data clock = {0};
	size_t len;
	uint8_t *bytes;

	CHECK_EQ(mv_kvm_ioctl(mv_kvm_of(source)->vm_fd, KVM_SET_CLOCK, &hour), 0);
	bytes = save_machine(source, &len);
	load_machine(destination, bytes, len);
	CHECK_EQ(mv_kvm_ioctl(mv_kvm_of(destination)->vm_fd, KVM_GET_CLOCK, &clock), 0);
	CHECK(clock.clock >= hour.clock);
	CHECK(clock.clock < 2 * hour.clock);
	free(bytes);
	mv_machine_destroy(source);
	mv_machine_destroy(destination);
}

/* A guest of other code: it is held, and the machine says why. */
static void fails_with(const uint8_t *code, size_t len, const char *why)
{
	struct mv_machine *machine = paused_machine(2);
	struct watch watch = {0};
	struct mv_error error;

	memcpy(machine->memory.base + GM_CODE_GPA, code, len);
	resume_machine(machine);
	await_failed(machine, &watch);
	CHECK(mv_machine_failed(machine, &error));
	if (!strstr(error.text, why))
		fprintf(stderr, "said: %s\n", error.text);
	CHECK(strstr(error.text, why));
	CHECK_EQ(mv_machine_resume(machine, &error), -EBUSY);
	mv_machine_destroy(machine);
}

static void a_guest_that_misbehaves_is_held(void)
{
	static const uint8_t undefined[] = {0x0f, 0x0b};
	static const uint8_t no_call[] = {0xba, 0x18, 0, 0, 0, 0xed}; /* in eax, port 18h */
	static const uint8_t a_byte[] = {0xba, 0x11, 0, 0, 0, 0xec};  /* in al, port 11h */
	static const uint8_t outward[] = {0xba, 0x11, 0, 0, 0, 0xef}; /* out port 11h, eax */

	fails_with(undefined, sizeof(undefined), "shut down");
	fails_with(no_call, sizeof(no_call), "no such hypercall");
	fails_with(a_byte, sizeof(a_byte), "not a hypercall");
	fails_with(outward, sizeof(outward), "not a hypercall");
}

int main(void)
{
	const struct mv_machine_config config = test_config(MV_ACCEL_KVM, 1);
	struct mv_machine *machine;
	struct mv_error error = {""};
	const bool kvm = mv_machine_create(&config, &machine, &error) == 0;

	check_need(kvm, "kvm", error.text);
	mv_machine_destroy(machine);
	RUN(what_is_loaded_is_what_was_saved);
	RUN(the_clock_goes_on);
	RUN(a_guest_that_misbehaves_is_held);
	return EXIT_SUCCESS;
}

#else

int main(void)
{
	check_need(false, "kvm", "the guest's code is for x86-64");
	return EXIT_FAILURE;
}

#endif
