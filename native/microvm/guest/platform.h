/* SPDX-License-Identifier: Apache-2.0 */
/*
 * platform.h - the few things that differ between the workload in a KVM guest and in a thread.
 *
 * Threads: as workload.h.
 * Errors: none.
 * Ownership: none.
 * Units: image offsets in bytes.
 * Source: layout.h.
 */
#ifndef GM_PLATFORM_H
#define GM_PLATFORM_H

#include "workload.h"

/* Not before what comes before it, nor after what comes after. */
static inline uint64_t gm_tick(void)
{
#ifdef __x86_64__
	uint32_t low, high;

	__asm__ volatile("lfence; rdtsc; lfence" : "=a"(low), "=d"(high) : : "memory");
	return (uint64_t)high << 32 | low;
#else
	uint64_t ticks;

	__asm__ volatile("isb; mrs %0, cntvct_el0; isb" : "=r"(ticks) : : "memory");
	return ticks;
#endif
}

#ifdef GM_GUEST

static inline void *gm_at(const struct gm_vcpu *vcpu, uint64_t offset)
{
	(void)vcpu;
	return (void *)(offset < GM_HOLE_START ? offset : offset + (GM_HOLE_END - GM_HOLE_START));
}

static inline uint32_t gm_hypercall(const struct gm_vcpu *vcpu, uint32_t call, uint64_t a,
				    uint64_t b, uint64_t c, uint64_t d)
{
	uint32_t answer;

	(void)vcpu;
	__asm__ volatile("inl %w1, %0"
			 : "=a"(answer)
			 : "d"(GM_PORT_BASE + call), "b"(a), "c"(b), "S"(c), "D"(d)
			 : "memory");
	return answer;
}

/* The interrupt handler of this vCPU counts; volatile, because it does so behind our back. */
static inline uint64_t gm_ticks(const struct gm_vcpu *vcpu)
{
	const volatile struct gm_vcpu_system *system =
		(const volatile struct gm_vcpu_system *)(GM_VCPU_SYSTEM_GPA +
							 vcpu->ctx.id * GM_PAGE_SIZE);

	return system->tick_count;
}

/*
 * The running sum that only a register holds: xmm15, which nothing else touches (the guest is
 * compiled for general registers only). It is what a lost XSAVE area would lose.
 */
static inline void gm_register_sum_set(struct gm_vcpu *vcpu, uint64_t value)
{
	(void)vcpu;
	__asm__ volatile("movq %0, %%xmm15" : : "r"(value));
}

static inline void gm_register_sum_add(struct gm_vcpu *vcpu, uint64_t value)
{
	(void)vcpu;
	__asm__ volatile("movq %0, %%xmm14\n\tpaddq %%xmm14, %%xmm15" : : "r"(value));
}

static inline uint64_t gm_register_sum(const struct gm_vcpu *vcpu)
{
	uint64_t value;

	(void)vcpu;
	__asm__ volatile("movq %%xmm15, %0" : "=r"(value));
	return value;
}

#else

static inline void *gm_at(const struct gm_vcpu *vcpu, uint64_t offset)
{
	/* GPAs below the hole are image offsets, and the workload names nothing above it by GPA. */
	return vcpu->ram + offset;
}

static inline uint32_t gm_hypercall(struct gm_vcpu *vcpu, uint32_t call, uint64_t a, uint64_t b,
				    uint64_t c, uint64_t d)
{
	const uint64_t args[4] = {a, b, c, d};

	return vcpu->hypercall(vcpu, call, args);
}

static inline uint64_t gm_ticks(struct gm_vcpu *vcpu)
{
	vcpu->update_ticks(vcpu);
	return vcpu->ctx.tick_count;
}

static inline void gm_register_sum_set(struct gm_vcpu *vcpu, uint64_t value)
{
	vcpu->ctx.register_sum = value;
}

static inline void gm_register_sum_add(struct gm_vcpu *vcpu, uint64_t value)
{
	vcpu->ctx.register_sum += value;
}

static inline uint64_t gm_register_sum(const struct gm_vcpu *vcpu)
{
	return vcpu->ctx.register_sum;
}

#endif

#endif
