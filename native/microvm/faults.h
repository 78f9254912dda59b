/* SPDX-License-Identifier: Apache-2.0 */
/*
 * faults.h - memory that is not there yet: the exit channel of a machine, over godwit/vmm.h.
 *
 * Threads: create, connect and destroy on the control thread, without vCPUs running; the handler on
 *          vCPU threads; the end on the library's thread. The rest anywhere.
 * Errors: 0 or -errno, with words.
 * Ownership: the machine owns its faults.
 * Units: guest-physical addresses.
 * Source: docs/exit-channel.md.
 */
#ifndef MV_FAULTS_H
#define MV_FAULTS_H

#include <stdbool.h>
#include <stdint.h>

#include "error.h"
#include "godwit/vmm.h"

struct mv_machine;
struct mv_faults;

#define MV_FAULT_SPIN_US_MAX 1000u

struct mv_faults_config {
	const char *socket_path; /* of the agent; NULL: memory is nobody's business but the VMM's */
	enum gw_vmm_backend backend;
	uint32_t uffd_count; /* 1..GW_VMM_UFFD_COUNT_MAX */
	uint32_t spin_us;
};

enum mv_faults_state {
	MV_FAULTS_NONE = 0,
	MV_FAULTS_ARMED = 1,
	MV_FAULTS_COMPLETE = 2, /* every page is here */
	MV_FAULTS_RELEASED = 3, /* and nothing is left of the channel in the guest's way */
};

/*
 * Chooses the backend, maps memory a second time where that needs it, registers everything as absent
 * and becomes the machine's fault_handler. Before the guest gets its memory (accel->attach).
 *
 * Returns 0; -ENODEV the backend cannot be, with the reason; -errno.
 */
int mv_faults_create(struct mv_machine *machine, struct mv_error *error);

/* After accel->attach: the agent may have it now. Returns 0 or -errno. */
int mv_faults_connect(struct mv_machine *machine, struct mv_error *error);

/* After the last vCPU thread. NULL is a no-op. */
void mv_faults_destroy(struct mv_faults *faults);

enum mv_faults_state mv_faults_state(const struct mv_machine *machine);
const char *mv_faults_state_name(enum mv_faults_state state);
enum gw_vmm_backend mv_faults_backend(const struct mv_faults *faults);
const char *mv_faults_reason(const struct mv_faults *faults);

/* Of memory slot `slot`: what its vCPUs have it mapped at, and how it gives exits. */
uint64_t mv_faults_slot_addr(const struct mv_machine *machine, uint32_t slot);
uint32_t mv_faults_slot_flags(const struct mv_machine *machine, uint32_t slot);
const uint64_t *mv_faults_slot_bitmap(const struct mv_machine *machine, uint32_t slot);

/* May the page not be looked at yet? False without faults. */
bool mv_faults_absent(const struct mv_machine *machine, uint64_t gpa);

#endif
