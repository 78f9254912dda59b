/* SPDX-License-Identifier: Apache-2.0 */
/*
 * layout.h - what the guest and its VMM agree on: where things are in guest memory, what the guest
 * is told at its start, and how it calls its VMM.
 *
 * Threads: constants and plain structs only.
 * Errors: none.
 * Ownership: none.
 * Units: guest-physical addresses and bytes, unless a name says otherwise. An image offset is a
 *        position in the memory file: equal to the GPA below the hole, less by the hole above it.
 * Source: native/microvm/README.md; Intel SDM vol. 3 chapters 3-6 for what the processor reads.
 */
#ifndef GM_LAYOUT_H
#define GM_LAYOUT_H

#include <stdint.h>

/* Goes up whenever a guest in memory and a VMM of another build would misunderstand each other. */
#define GM_ABI_VERSION 2u

#define GM_PAGE_SIZE	  4096ull
#define GM_HUGE_PAGE_SIZE 0x200000ull
#define GM_VCPU_COUNT_MAX 32u

/* No memory here: the LAPIC, the IOAPIC and KVM's own pages are in it, as on a PC. */
#define GM_HOLE_START 0xC0000000ull
#define GM_HOLE_END   0x100000000ull

#define GM_MEMORY_BYTES_MIN (64ull << 20)
#define GM_MEMORY_BYTES_MAX (254ull << 30)

/*
 * The system area, 2 MiB: what the processor itself reads and what ring 0 touches. It is a memory
 * slot of its own: where KVM emulates ring 0, a missing page here is no fault that could be told,
 * it must be resident before the guest runs (KERNEL.md 3).
 */
#define GM_SYSTEM_SIZE	   0x200000ull
#define GM_BOOT_GPA	   0x1000ull
#define GM_GDT_GPA	   0x2000ull
#define GM_IDT_GPA	   0x3000ull
#define GM_PML4_GPA	   0x4000ull
#define GM_PDPT_GPA	   0x5000ull
#define GM_ISR_GPA	   0x6000ull
#define GM_VCPU_SYSTEM_GPA 0x10000ull  /* one page a vCPU: struct gm_vcpu_system */
#define GM_PD_GPA	   0x100000ull /* 256 page directories: 256 GiB */

/* Ordinary memory, where every access may fault. */
#define GM_CODE_GPA	 0x200000ull
#define GM_CODE_SIZE_MAX 0x10000ull
#define GM_CONTROL_GPA	 0x210000ull /* struct gm_control */
#define GM_STACK_GPA	 0x220000ull /* one stack a vCPU */
#define GM_STACK_SIZE	 0x4000ull
#define GM_WORK_OFFSET	 0x400000ull /* where the pages that the workload keeps may begin */

#define GM_TIMER_VECTOR 0x40u

enum gm_workload {
	GM_WORKLOAD_VERIFY = 1,	    /* random pages, a quarter of the touches on shared ones */
	GM_WORKLOAD_SEQUENTIAL = 2, /* its own pages in order, over and over */
	GM_WORKLOAD_HOT = 3,	    /* 15 of 16 touches on a sixteenth of its own pages */
	GM_WORKLOAD_IDLE = 4,	    /* fills its pages, then only beats */
	GM_WORKLOAD_MEASURE = 5,    /* idle; before a sweep it times the first touch of each page */
};

#define GM_BOOT_MAGIC 0x746f6f42764d6d47ull /* "GmMvBoot" */

/* At GM_BOOT_GPA: written once by the VMM that starts the guest, read by the guest ever after. */
struct gm_boot {
	uint64_t magic;
	uint32_t abi_version;
	uint32_t vcpu_count;
	uint32_t workload;     /* enum gm_workload */
	uint32_t tick_us;      /* period of each vCPU's timer */
	uint64_t memory_bytes; /* of the image */
	uint64_t work_offset;  /* image offset of the pages that the workload keeps */
	uint64_t work_page_count;
	uint64_t
		shared_page_count; /* the first of them belong to every vCPU, the rest to one each */
	uint64_t op_count_per_tick; /* of each vCPU; 0 = as fast as it can */
	uint64_t seed;
};
_Static_assert(sizeof(struct gm_boot) == 72, "the guest of another build reads it");

/* At GM_CONTROL_GPA: what the vCPUs share besides pages. Every counter is lock-incremented. */
struct gm_control {
	uint64_t arrived;		      /* at barriers, ever */
	uint64_t op_total;		      /* of all vCPUs */
	uint64_t op_count[GM_VCPU_COUNT_MAX]; /* each vCPU's own count, published for a sweep */
	uint64_t seen_count
		[GM_VCPU_COUNT_MAX];	      /* touches of each vCPU that a sweep found in pages */
	uint64_t seen_sum[GM_VCPU_COUNT_MAX]; /* and their running sums */
};
_Static_assert(sizeof(struct gm_control) <= GM_PAGE_SIZE, "one page");

/* At GM_VCPU_SYSTEM_GPA + id * 4096. The ring-0 stack grows down from the end of the page. */
struct gm_vcpu_system {
	uint32_t tss[26];      /* 64-bit TSS: rsp0 is at byte 4, the bitmap's offset at byte 102 */
	uint8_t io_bitmap[24]; /* of ports 0 to 191: a zero bit lets ring 3 use the port */
	uint64_t tick_count;   /* timer interrupts taken; ring 3 reads it */
};
_Static_assert(__builtin_offsetof(struct gm_vcpu_system, tick_count) == 128,
	       "kvm_boot.c's handler");

/*
 * Hypercalls: `in eax` from port GM_PORT_BASE + call, arguments in rbx, rcx, rsi, rdi, the answer in
 * eax. One exit carries both ways. Ring 3 may do it by IOPL 3 and by the TSS's bitmap: PVM forgets
 * IOPL when it delivers an interrupt, and looks into the bitmap then.
 */
#define GM_PORT_BASE 0x10u

enum gm_call {
	/* beat number, ops, errors, ticks -> the sweep that is asked for, or GM_BEAT_POWER_OFF */
	GM_CALL_BEAT = 1,
	GM_CALL_IDLE = 2,      /* microseconds to sleep at most */
	GM_CALL_ERROR = 3,     /* enum gm_error, page, got, want */
	GM_CALL_FILLED = 4,    /* pages filled */
	GM_CALL_VERIFIED = 5,  /* sweep number, pages checked, errors found in it, ops */
	GM_CALL_MEASURED = 6,  /* ticks that a touch took at most, touches, first tick, last tick */
	GM_CALL_POWER_OFF = 7, /* the guest has ended; it does not come back from this call */
};
#define GM_CALL_MAX	  7u
#define GM_BEAT_POWER_OFF 0x80000000u

enum gm_error {
	GM_ERROR_TAG = 1,      /* the page's number: another page, or none */
	GM_ERROR_SLOT = 2,     /* a vCPU's {generation, sum, last op} against its checksum */
	GM_ERROR_BODY = 3,     /* content that the page's generation says */
	GM_ERROR_LOCKED = 4,   /* lock-incremented counter against the generations */
	GM_ERROR_COUNT = 5,    /* all generations of a vCPU against the ops that it remembers */
	GM_ERROR_SUM = 6,      /* all running sums of a vCPU against the one that it remembers */
	GM_ERROR_REGISTER = 7, /* the running sum that lives in a vector register */
	GM_ERROR_OP_TOTAL = 8, /* the one counter that every vCPU increments */
	GM_ERROR_BOOT = 9,     /* struct gm_boot is not what was once written */
};

#endif
