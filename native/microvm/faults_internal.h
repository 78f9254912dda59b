/* SPDX-License-Identifier: Apache-2.0 */
/*
 * faults_internal.h - what faults.c and faults_setup.c share; nobody else includes it.
 *
 * Threads, Errors, Ownership, Units, Source: see faults.h.
 */
#ifndef MV_FAULTS_INTERNAL_H
#define MV_FAULTS_INTERNAL_H

#include <stdatomic.h>

#include "discover.h"
#include "faults.h"
#include "guest/layout.h"
#include "machine.h"

#define MV_FAULTS_REASON_LEN (2 * GW_VMM_REASON_LEN_MAX)

/* The last fault without an address of one vCPU; only its own thread touches it. */
struct mv_progress {
	struct mv_registers registers;
	uint32_t try_count; /* 0: there was none */
};

struct mv_faults {
	struct mv_machine *machine;
	struct gw_vmm *vmm;
	enum gw_vmm_backend backend;
	char reason[MV_FAULTS_REASON_LEN];			/* why not a better one */
	struct gw_vmm_region regions[MV_MEMORY_SLOT_COUNT_MAX]; /* one a memory slot */
	/*
	 * enum mv_faults_state; written by the control thread before there are others, then by the
	 * library's thread alone. Release and acquire: who sees COMPLETE sees every page.
	 */
	_Atomic uint32_t state;
	struct mv_progress progress[GM_VCPU_COUNT_MAX];
};

/* faults.c */
void mv_faults_handle(struct mv_faults *faults);
void mv_faults_finish(void *opaque);

#endif
