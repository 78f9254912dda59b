/* SPDX-License-Identifier: Apache-2.0 */
/*
 * kvm_boot.c - a new guest: its code, its tables, and registers that start it in ring 3.
 *
 * Threads, Errors, Ownership, Units: see kvm.h.
 * Source: Intel SDM vol. 3, 4.5 (paging), 5.14 (interrupts), 8.7 (TSS), 11.5 (LAPIC timer).
 *
 * There is no boot code: the VMM writes what one would have made. Ring 3, because that is what PVM,
 * a KVM without hardware virtualisation, runs natively; it emulates ring 0, where only the timer's
 * handler is. Page-table entries have their accessed and dirty bits set, so that nobody writes them.
 */
#include "kvm.h"

#include <errno.h>
#include <string.h>

#include "guest/layout.h"

#define PTE_TABLE 0x67ull /* present, writable, user, accessed, dirty */
#define PTE_HUGE  0xE7ull /* and a page of its own */
#define GIB	  (1ull << 30)

enum { SELECTOR_CODE0 = 0x08, SELECTOR_DATA3 = 0x1b, SELECTOR_CODE3 = 0x23, SELECTOR_TSS = 0x28 };

#define GDT_CODE0 0x00af9b000000ffffull
#define GDT_DATA0 0x00cf93000000ffffull
#define GDT_DATA3 0x00cff3000000ffffull
#define GDT_CODE3 0x00affb000000ffffull

#define CR0_BITS    0x80050033ull /* PG, AM, WP, NE, ET, MP, PE */
#define CR4_BITS    0x620ull	  /* PAE, OSFXSR, OSXMMEXCPT */
#define EFER_BITS   0x500ull	  /* LMA, LME */
#define RFLAGS_BITS 0x3202ull	  /* IOPL 3, interrupts on */

/* `in eax` needs the bits of four ports. */
_Static_assert(GM_PORT_BASE % 8 == 0 && GM_CALL_MAX + 3 < 16, "two bytes of the I/O bitmap");

#define APIC_BASE_X2APIC 0xC00ull /* enabled, in x2APIC mode: all its registers are MSRs */
#define APIC_SVR	 0xF0
#define APIC_LVT_TIMER	 0x320
#define APIC_TIMER_INIT	 0x380
#define APIC_TIMER_NOW	 0x390
#define APIC_TIMER_DIV	 0x3E0
#define APIC_PERIODIC	 0x20000u
#define APIC_ENABLE	 0x1FFu
#define APIC_DIVIDE_BY_1 0xBu

/* The guest's code, made by CMakeLists.txt out of guest/. */
extern const uint8_t mv_guest_code[], mv_guest_code_end[];
__asm__(".pushsection .rodata\n"
	".globl mv_guest_code, mv_guest_code_end\n"
	"mv_guest_code: .incbin \"" MV_GUEST_BIN "\"\n"
	"mv_guest_code_end:\n"
	".popsection\n");

/*
 * The timer's handler, in ring 0: counts in the page that holds its own stack (struct
 * gm_vcpu_system), ends the interrupt. 80h is tick_count's place, 80Bh the x2APIC's EOI.
 */
extern const uint8_t mv_guest_isr[], mv_guest_isr_end[];
__asm__(".pushsection .rodata\n"
	".code64\n"
	".globl mv_guest_isr, mv_guest_isr_end\n"
	"mv_guest_isr:\n"
	"	push %rax\n"
	"	push %rcx\n"
	"	push %rdx\n"
	"	mov %rsp, %rax\n"
	"	and $-4096, %rax\n"
	"	lock incq 0x80(%rax)\n"
	"	mov $0x80b, %ecx\n"
	"	xor %eax, %eax\n"
	"	xor %edx, %edx\n"
	"	wrmsr\n"
	"	pop %rdx\n"
	"	pop %rcx\n"
	"	pop %rax\n"
	"	iretq\n"
	"mv_guest_isr_end:\n"
	".popsection\n");

/* --- memory -------------------------------------------------------------------------------------- */

static uint64_t *words_at(const struct mv_memory *memory, uint64_t gpa)
{
	return (uint64_t *)(memory->base + gpa); /* below the hole: also the image offset */
}

static void write_page_tables(const struct mv_memory *memory)
{
	const struct mv_memory_slot *last = &memory->slots[memory->slot_count - 1];
	const uint64_t end = last->gpa + last->size;

	words_at(memory, GM_PML4_GPA)[0] = GM_PDPT_GPA | PTE_TABLE;
	for (uint64_t gib = 0; gib * GIB < end; gib++)
		words_at(memory, GM_PDPT_GPA)[gib] = (GM_PD_GPA + gib * GM_PAGE_SIZE) | PTE_TABLE;
	for (uint32_t i = 0; i < memory->slot_count; i++) {
		const struct mv_memory_slot *slot = &memory->slots[i];

		for (uint64_t gpa = slot->gpa; gpa < slot->gpa + slot->size;
		     gpa += GM_HUGE_PAGE_SIZE)
			words_at(memory, GM_PD_GPA)[gpa / GM_HUGE_PAGE_SIZE] = gpa | PTE_HUGE;
	}
}

static void write_descriptors(const struct mv_memory *memory)
{
	static const uint64_t gdt[] = {0, GDT_CODE0, GDT_DATA0, GDT_DATA3, GDT_CODE3, 0, 0};
	uint64_t *gate = words_at(memory, GM_IDT_GPA) + 2ull * GM_TIMER_VECTOR;

	memcpy(words_at(memory, GM_GDT_GPA), gdt, sizeof(gdt));
	/* A 64-bit interrupt gate to ring 0. Every other vector is absent: it ends the guest. */
	gate[0] = (GM_ISR_GPA & 0xFFFF) | (uint64_t)SELECTOR_CODE0 << 16 | 0x8E00ull << 32 |
		  (GM_ISR_GPA >> 16 & 0xFFFF) << 48;
	gate[1] = GM_ISR_GPA >> 32;
}

static void write_vcpu_systems(const struct mv_machine *machine)
{
	for (uint32_t i = 0; i < machine->config.vcpu_count; i++) {
		const uint64_t gpa = GM_VCPU_SYSTEM_GPA + i * GM_PAGE_SIZE;
		const uint64_t stack = gpa + GM_PAGE_SIZE;
		struct gm_vcpu_system *system = (void *)words_at(&machine->memory, gpa);

		memcpy(&system->tss[1], &stack, sizeof(stack));
		system->tss[25] = (uint32_t)offsetof(struct gm_vcpu_system, io_bitmap) << 16;
		memset(system->io_bitmap, 0xFF, sizeof(system->io_bitmap));
		memset(&system->io_bitmap[GM_PORT_BASE / 8], 0, 2);
	}
}

static int write_memory(const struct mv_machine *machine, struct mv_error *error)
{
	const struct mv_memory *memory = &machine->memory;
	const size_t code_len = (size_t)(mv_guest_code_end - mv_guest_code);

	if (code_len > GM_CODE_SIZE_MAX)
		return mv_refuse(error, -EINVAL, "the guest's code has %zu bytes", code_len);
	memcpy(words_at(memory, GM_CODE_GPA), mv_guest_code, code_len);
	memcpy(words_at(memory, GM_ISR_GPA), mv_guest_isr,
	       (size_t)(mv_guest_isr_end - mv_guest_isr));
	write_page_tables(memory);
	write_descriptors(memory);
	write_vcpu_systems(machine);
	return 0;
}

/* --- registers ----------------------------------------------------------------------------------- */

static struct kvm_segment code3(void)
{
	return (struct kvm_segment){.limit = 0xffffffff,
				    .selector = SELECTOR_CODE3,
				    .type = 11,
				    .present = 1,
				    .dpl = 3,
				    .s = 1,
				    .l = 1,
				    .g = 1};
}

static struct kvm_segment data3(void)
{
	return (struct kvm_segment){.limit = 0xffffffff,
				    .selector = SELECTOR_DATA3,
				    .type = 3,
				    .present = 1,
				    .dpl = 3,
				    .db = 1,
				    .s = 1,
				    .g = 1};
}

static int set_sregs(const struct mv_kvm_vcpu *vcpu, uint32_t id)
{
	struct kvm_sregs2 sregs = {0};
	int rc = mv_kvm_ioctl(vcpu->fd, KVM_GET_SREGS2, &sregs);

	if (rc < 0)
		return rc;
	sregs.cs = code3();
	sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data3();
	sregs.tr = (struct kvm_segment){.base = GM_VCPU_SYSTEM_GPA + id * GM_PAGE_SIZE,
					.limit = offsetof(struct gm_vcpu_system, tick_count) - 1,
					.selector = SELECTOR_TSS,
					.type = 11,
					.present = 1};
	sregs.gdt = (struct kvm_dtable){.base = GM_GDT_GPA, .limit = 7 * 8 - 1};
	sregs.idt = (struct kvm_dtable){.base = GM_IDT_GPA, .limit = GM_PAGE_SIZE - 1};
	sregs.cr0 = CR0_BITS;
	sregs.cr3 = GM_PML4_GPA;
	sregs.cr4 = CR4_BITS;
	sregs.efer = EFER_BITS;
	sregs.apic_base |= APIC_BASE_X2APIC;
	sregs.flags = 0;
	return mv_kvm_ioctl(vcpu->fd, KVM_SET_SREGS2, &sregs);
}

static void set_apic(struct kvm_lapic_state *apic, size_t offset, uint32_t value)
{
	memcpy(apic->regs + offset, &value, sizeof(value));
}

/* KVM's LAPIC counts nanoseconds when it divides by one. */
static int set_timer(const struct mv_kvm_vcpu *vcpu, uint32_t period_ns)
{
	struct kvm_lapic_state apic = {0};
	int rc = mv_kvm_ioctl(vcpu->fd, KVM_GET_LAPIC, &apic);

	if (rc < 0)
		return rc;
	set_apic(&apic, APIC_SVR, APIC_ENABLE);
	set_apic(&apic, APIC_LVT_TIMER, APIC_PERIODIC | GM_TIMER_VECTOR);
	set_apic(&apic, APIC_TIMER_DIV, APIC_DIVIDE_BY_1);
	set_apic(&apic, APIC_TIMER_INIT, period_ns);
	set_apic(&apic, APIC_TIMER_NOW, period_ns);
	return mv_kvm_ioctl(vcpu->fd, KVM_SET_LAPIC, &apic);
}

static int set_regs(const struct mv_kvm_vcpu *vcpu, uint32_t id)
{
	const struct kvm_regs regs = {
		.rip = GM_CODE_GPA,
		.rflags = RFLAGS_BITS,
		.rdi = id,
		/* As after a call: the return address that is not there makes it odd. */
		.rsp = GM_STACK_GPA + (id + 1) * GM_STACK_SIZE - 8,
	};
	/* All but the first would wait for a start-up message that nobody sends. */
	const struct kvm_mp_state runnable = {.mp_state = KVM_MP_STATE_RUNNABLE};
	const int rc = mv_kvm_ioctl(vcpu->fd, KVM_SET_REGS, &regs);

	return rc < 0 ? rc : mv_kvm_ioctl(vcpu->fd, KVM_SET_MP_STATE, &runnable);
}

int mv_kvm_boot(struct mv_machine *machine, struct mv_error *error)
{
	const struct mv_kvm *kvm = mv_kvm_of(machine);
	int rc = write_memory(machine, error);

	if (rc < 0)
		return rc;
	for (uint32_t i = 0; i < machine->config.vcpu_count; i++) {
		const struct mv_kvm_vcpu *vcpu = mv_kvm_vcpu_of(&machine->vcpus[i]);

		rc = mv_kvm_ioctl(vcpu->fd, KVM_SET_CPUID2, &kvm->cpuid);
		if (rc == 0)
			rc = set_sregs(vcpu, i);
		if (rc == 0)
			rc = set_timer(vcpu, machine->config.tick_us * 1000);
		if (rc == 0)
			rc = set_regs(vcpu, i);
		if (rc < 0)
			return mv_refuse_errno(error, rc, "set the registers of vCPU %u", i);
	}
	return 0;
}
