/* SPDX-License-Identifier: Apache-2.0 */
/*
 * discover.h - which pages an instruction needs, where KVM said EFAULT and nothing more.
 *
 * Threads: the vCPU's own, outside of the guest.
 * Errors: 0 or -errno, with words.
 * Ownership: none.
 * Units: guest-physical addresses of pages.
 * Source: KERNEL.md 3; Documentation/virt/kvm/api.rst, KVM_TRANSLATE.
 *
 * The registers are at the faulting instruction: its bytes and its operands say what it needs. What
 * they do not say is what the processor reads by itself: page tables, descriptors, ring-0 stacks.
 * These are in the system area, which blocks in the kernel and gives no exits.
 */
#ifndef MV_DISCOVER_H
#define MV_DISCOVER_H

#include <stdbool.h>
#include <stdint.h>

#include "decode.h"
#include "error.h"
#include "vcpu.h"

#define MV_NEED_COUNT_MAX 8u

struct mv_needs {
	struct mv_registers registers; /* at the instruction */
	/*
	 * What it needs, each page once: the code first. If `fetch`, the code itself is absent, and
	 * what its operands are nobody knows yet.
	 */
	uint64_t gpas[MV_NEED_COUNT_MAX];
	uint32_t count;
	bool fetch;
};

/* Returns 0; -ENOSYS the decoder does not know the instruction; -errno. Needs machine->faults. */
int mv_kvm_discover(struct mv_vcpu *vcpu, struct mv_needs *ret_needs, struct mv_error *error);

#endif
