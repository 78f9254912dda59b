/* SPDX-License-Identifier: Apache-2.0 */
/*
 * accel.h - what can run the guest: KVM, or threads of this process.
 *
 * Threads: create, boot, save, load and destroy on the control thread while every vCPU is parked;
 *          run on the vCPU's thread; kick and release on any, under the machine's lock.
 * Errors: 0 or -errno, with words where the caller asks for them.
 * Ownership: an accelerator owns machine->accel_data and each vcpu->accel_data.
 * Units: none.
 * Source: none.
 */
#ifndef MV_ACCEL_H
#define MV_ACCEL_H

#include "blob.h"
#include "discover.h"
#include "machine.h"

struct mv_accel_ops {
	const char *name;
	enum mv_accel id;
	/* Memory is mapped, vCPUs are there without threads. Touches no guest memory. */
	int (*create)(struct mv_machine *machine, struct mv_error *error);
	/* How memory gives faults is settled (machine->faults): the guest gets it. */
	int (*attach)(struct mv_machine *machine, struct mv_error *error);
	/* A new guest: writes code, tables and registers. struct gm_boot is there already. */
	int (*boot)(struct mv_machine *machine, struct mv_error *error);
	/* Runs the guest until the vCPU is kicked: 0, its state is complete. Else -errno. */
	int (*run)(struct mv_vcpu *vcpu, struct mv_error *error);
	void (*kick)(struct mv_vcpu *vcpu);
	void (*release)(struct mv_vcpu *vcpu);
	int (*save)(struct mv_machine *machine, struct mv_blob_writer *writer,
		    struct mv_error *error);
	/* The sections of MV_SECTION_* >= 16 that a blob must hold; fills *ret_rules. */
	size_t (*rules)(const struct mv_machine *machine,
			struct mv_blob_rule ret_rules[MV_ACCEL_RULE_COUNT_MAX]);
	/* May this blob run here? Changes nothing. */
	int (*check)(const struct mv_machine *machine, const struct mv_blob_reader *reader,
		     struct mv_error *error);
	/* Of a blob that was checked. An error leaves the machine unusable. */
	int (*load)(struct mv_machine *machine, const struct mv_blob_reader *reader,
		    struct mv_error *error);
	void (*destroy)(struct mv_machine *machine);
	/* On the vCPU's thread: what its instruction needs. NULL: every fault has an address. */
	int (*discover)(struct mv_vcpu *vcpu, struct mv_needs *ret_needs, struct mv_error *error);
	/*
	 * Every page is here: no exits any more, and huge mappings where there may be some. Any thread,
	 * while vCPUs run. NULL: nothing to do. Returns 0 or -errno.
	 */
	int (*disarm)(struct mv_machine *machine);
};

extern const struct mv_accel_ops mv_accel_kvm;
extern const struct mv_accel_ops mv_accel_thread;

#endif
