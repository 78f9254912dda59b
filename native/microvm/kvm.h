/* SPDX-License-Identifier: Apache-2.0 */
/*
 * kvm.h - what kvm.c, kvm_boot.c and kvm_state.c share; nobody else includes it.
 *
 * Threads, Errors, Ownership: see accel.h.
 * Units: none.
 * Source: Documentation/virt/kvm/api.rst of the kernel.
 */
#ifndef MV_KVM_H
#define MV_KVM_H

#include <linux/kvm.h>
#include <stdbool.h>
#include <stdint.h>

#include "accel.h"
#include "decode.h"

#define MV_CPUID_COUNT_MAX 256u
#define MV_MSR_COUNT_MAX   512u
#define MV_XSAVE_LEN_MAX   16384u

/* A struct of the kernel's that ends in an array, with room for it. */
struct mv_cpuid {
	struct kvm_cpuid2 head;
	struct kvm_cpuid_entry2 entries[MV_CPUID_COUNT_MAX];
};

struct mv_msrs {
	struct kvm_msrs head;
	struct kvm_msr_entry entries[MV_MSR_COUNT_MAX];
};

struct mv_kvm {
	int kvm_fd;
	int vm_fd;
	size_t run_size;
	uint32_t xsave_size;   /* of KVM_GET_XSAVE2 */
	struct mv_cpuid cpuid; /* supported here; what a new guest is given */
	struct mv_cpuid seen;  /* and what it then sees: PVM lets ring 3 see the host's own */
	uint32_t msr_count;    /* of those that can be read and mean something */
	uint32_t msr_indexes[MV_MSR_COUNT_MAX];
};

struct mv_kvm_vcpu {
	int fd;
	struct kvm_run *run;
	bool io_pending; /* the last exit is completed by the next entry only */
	/* discover.c: where it was last time, and which page its code was in. */
	bool code_known;
	uint64_t code_page;
	uint64_t code_gpa;
	struct mv_registers code_registers;
};

static inline struct mv_kvm *mv_kvm_of(const struct mv_machine *machine)
{
	return machine->accel_data;
}

static inline struct mv_kvm_vcpu *mv_kvm_vcpu_of(const struct mv_vcpu *vcpu)
{
	return vcpu->accel_data;
}

/* An ioctl that is done again when a signal interrupts it. Returns >= 0 or -errno. */
int mv_kvm_ioctl(int fd, unsigned long request, const void *argument);

/* kvm_boot.c */
int mv_kvm_boot(struct mv_machine *machine, struct mv_error *error);

/* kvm_state.c; list_msrs needs one vCPU */
int mv_kvm_list_msrs(struct mv_machine *machine, struct mv_error *error);
int mv_kvm_save(struct mv_machine *machine, struct mv_blob_writer *writer, struct mv_error *error);
size_t mv_kvm_rules(const struct mv_machine *machine,
		    struct mv_blob_rule ret_rules[MV_ACCEL_RULE_COUNT_MAX]);
int mv_kvm_load(struct mv_machine *machine, const struct mv_blob_reader *reader,
		struct mv_error *error);

/* kvm_check.c: may a state of another host run on this processor? */
int mv_kvm_check(const struct mv_machine *machine, const struct mv_blob_reader *reader,
		 struct mv_error *error);

#endif
