/* SPDX-License-Identifier: Apache-2.0 */
/*
 * faults.c - see faults.h: what happens when a vCPU meets memory that is not there.
 *
 * Threads, Errors, Ownership, Units, Source: see faults.h. The choice of the backend is in
 * faults_setup.c.
 *
 * exit 39, or SIGSEGV       the address is known: gw_vmm_fault sleeps until its bit is clear
 * EFAULT and nothing more   discover.c says what the instruction needs. Those of the pages whose
 *                           bit is set are asked for. If none is, the page came meanwhile: the
 *                           instruction is run again. If that comes to nothing, it is a hole, which
 *                           a SIGBUS-mode userfaultfd refuses although its bit is clear: filled.
 */
#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#include "accel.h"
#include "faults_internal.h"
#include "godwit/exit_channel.h"

/* Ever the same fault with nothing absent: something is wrong that more tries do not mend. */
#define TRY_COUNT_MAX 1000u

static uint32_t take_absent(const struct mv_faults *faults, const struct mv_needs *needs,
			    uint64_t ret_gpas[MV_NEED_COUNT_MAX])
{
	uint32_t count = 0;

	for (uint32_t i = 0; i < needs->count; i++)
		if (gw_vmm_is_absent(faults->vmm, needs->gpas[i]))
			ret_gpas[count++] = needs->gpas[i];
	return count;
}

/* How often the vCPU has been at this point, with these registers, in a row. */
static uint32_t count_try(struct mv_progress *progress, const struct mv_registers *registers)
{
	if (progress->try_count > 0 &&
	    memcmp(&progress->registers, registers, sizeof(*registers)) == 0)
		return ++progress->try_count;
	progress->registers = *registers;
	progress->try_count = 1;
	return 1;
}

static int ask(struct mv_faults *faults, struct mv_vcpu *vcpu, const uint64_t *gpas, uint32_t count,
	       uint64_t flags, struct mv_error *error)
{
	const int rc = gw_vmm_fault(faults->vmm, vcpu->id, gpas, count, flags);

	if (rc == GW_VMM_FAULT_HERE)
		mv_count(&vcpu->counters.spurious_count, 1);
	if (rc >= 0)
		return 0;
	return rc == -EINTR ? rc
			    : mv_refuse_errno(error, rc, "absent memory at %#llx",
					      (unsigned long long)gpas[0]);
}

static int fill(struct mv_faults *faults, const uint64_t *gpas, uint32_t count,
		struct mv_error *error)
{
	const int rc = gw_vmm_fill_holes(faults->vmm, gpas, count);

	/* EAGAIN: given back meanwhile, it faults again. Complete: its registration may be gone. */
	if (rc >= 0 || rc == -EAGAIN ||
	    atomic_load_explicit(&faults->state, memory_order_acquire) != MV_FAULTS_ARMED)
		return 0;
	return mv_refuse_errno(error, rc, "a hole at %#llx cannot be filled",
			       (unsigned long long)gpas[0]);
}

/* Nothing is absent, and the vCPU was at this point `try_count` times. */
static int nothing_absent(struct mv_faults *faults, const struct mv_needs *needs, bool emulator,
			  uint32_t try_count, struct mv_error *error)
{
	/* The emulator may fail for any reason: once more, with holes filled, and then it is real. */
	if (emulator && try_count > 1)
		return -ENODATA;
	if (!emulator && try_count == 1)
		return 0;
	if (try_count > TRY_COUNT_MAX)
		return mv_refuse(error, -EFAULT, "for ever, and nothing is absent");
	return fill(faults, needs->gpas, needs->count, error);
}

static int bare_fault(struct mv_faults *faults, struct mv_vcpu *vcpu, bool emulator,
		      struct mv_error *error)
{
	uint64_t absent[MV_NEED_COUNT_MAX];
	struct mv_needs needs;
	uint32_t absent_count, try_count;
	int rc;

	if (!vcpu->machine->accel->discover)
		return mv_refuse(error, -EFAULT, "EFAULT without an address");
	rc = vcpu->machine->accel->discover(vcpu, &needs, error);
	if (rc < 0)
		return rc;
	try_count = count_try(&faults->progress[vcpu->id], &needs.registers);
	absent_count = take_absent(faults, &needs, absent);
	if (absent_count > 0) {
		/* The code comes first and alone: what it says decides what else is needed. */
		faults->progress[vcpu->id].try_count = 1;
		return ask(faults, vcpu, absent, absent_count, needs.fetch ? GW_EXIT_EXEC : 0,
			   error);
	}
	mv_count(&vcpu->counters.spurious_count, 1);
	return needs.fetch ? 0 : nothing_absent(faults, &needs, emulator, try_count, error);
}

static int known_fault(struct mv_faults *faults, struct mv_vcpu *vcpu, uint64_t gpa,
		       struct mv_error *error)
{
	int rc = ask(faults, vcpu, &gpa, 1, 0, error);

	/* A thread's page is not to be had before somebody gives it access. */
	if (rc == 0 && faults->backend == GW_VMM_EXIT_SIGSEGV)
		rc = fill(faults, &gpa, 1, error);
	return rc;
}

static int handle(void *opaque, struct mv_vcpu *vcpu, const struct mv_memory_fault *fault,
		  struct mv_error *error)
{
	struct mv_faults *faults = opaque;

	return fault->kind == MV_FAULT_EXIT
		       ? known_fault(faults, vcpu, fault->gpa, error)
		       : bare_fault(faults, vcpu, fault->kind == MV_FAULT_EMULATOR, error);
}

static void kick(void *opaque, struct mv_vcpu *vcpu)
{
	const struct mv_faults *faults = opaque;
	const struct mv_machine *machine = vcpu->machine;

	/*
	 * A thread is in the middle of a step, which cannot be left and taken up again: it waits for
	 * its page, and the pause for it. Only when the guest never runs again may it be dropped.
	 */
	if (faults->backend == GW_VMM_EXIT_SIGSEGV && !machine->quitting &&
	    machine->state != MV_FAILED && machine->state != MV_ENDED)
		return;
	gw_vmm_kick(faults->vmm, vcpu->id);
}

static void release(void *opaque, struct mv_vcpu *vcpu)
{
	gw_vmm_unkick(((const struct mv_faults *)opaque)->vmm, vcpu->id);
}

void mv_faults_handle(struct mv_faults *faults)
{
	/* userfaultfd that blocks gives no exits: what looks like one is an error. */
	if (faults->backend != GW_VMM_UFFD)
		faults->machine->fault_handler = (struct mv_fault_handler){
			.handle = handle, .kick = kick, .release = release, .opaque = faults};
}

/* --- the end ------------------------------------------------------------------------------------- */

void mv_faults_finish(void *opaque)
{
	struct mv_faults *faults = opaque;
	struct mv_machine *machine = faults->machine;
	int rc = 0;

	atomic_store_explicit(&faults->state, MV_FAULTS_COMPLETE, memory_order_release);
	if (machine->accel->disarm)
		rc = machine->accel->disarm(machine);
	/* A slot whose flag stays on runs slower, but its bits are clear: the guest lacks nothing. */
	if (rc == 0)
		rc = gw_vmm_release(faults->vmm);
	if (rc == 0)
		atomic_store_explicit(&faults->state, MV_FAULTS_RELEASED, memory_order_release);
	pthread_mutex_lock(&machine->lock);
	if (rc == 0)
		mv_machine_event(machine, "{\"event\":\"faults_complete\"}");
	else
		mv_machine_event(machine, "{\"event\":\"faults_complete\",\"not_released\":\"%s\"}",
				 strerrorname_np(-rc));
	pthread_mutex_unlock(&machine->lock);
}

/* --- what others ask ----------------------------------------------------------------------------- */

enum mv_faults_state mv_faults_state(const struct mv_machine *machine)
{
	if (!machine->faults)
		return MV_FAULTS_NONE;
	return atomic_load_explicit(&machine->faults->state, memory_order_acquire);
}

const char *mv_faults_state_name(enum mv_faults_state state)
{
	switch (state) {
	case MV_FAULTS_NONE:
		return "none";
	case MV_FAULTS_ARMED:
		return "armed";
	case MV_FAULTS_COMPLETE:
		return "complete";
	case MV_FAULTS_RELEASED:
		return "released";
	}
	return "unknown";
}

enum gw_vmm_backend mv_faults_backend(const struct mv_faults *faults)
{
	return faults->backend;
}

const char *mv_faults_reason(const struct mv_faults *faults)
{
	return faults->reason;
}

uint64_t mv_faults_slot_addr(const struct mv_machine *machine, uint32_t slot)
{
	const struct mv_memory *memory = &machine->memory;

	if (machine->faults && machine->faults->regions[slot].guest_addr > 0)
		return machine->faults->regions[slot].guest_addr;
	return (uintptr_t)memory->base + memory->slots[slot].offset;
}

uint32_t mv_faults_slot_flags(const struct mv_machine *machine, uint32_t slot)
{
	if (mv_faults_state(machine) != MV_FAULTS_ARMED ||
	    machine->faults->regions[slot].guest_addr == 0)
		return 0;
	return gw_vmm_slot_flags(machine->faults->vmm);
}

const uint64_t *mv_faults_slot_bitmap(const struct mv_machine *machine, uint32_t slot)
{
	return machine->faults ? gw_vmm_slot_bitmap(machine->faults->vmm, slot) : NULL;
}

bool mv_faults_absent(const struct mv_machine *machine, uint64_t gpa)
{
	return machine->faults && gw_vmm_is_absent(machine->faults->vmm, gpa);
}
