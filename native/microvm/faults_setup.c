/* SPDX-License-Identifier: Apache-2.0 */
/*
 * faults_setup.c - see faults.h: which backend, and how memory is mapped for it.
 *
 * Threads, Errors, Ownership, Units, Source: see faults.h.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "accel.h"
#include "faults_internal.h"

#define NS_PER_US	  1000u
#define BACKEND_COUNT_MAX 3u

/* --- the choice ---------------------------------------------------------------------------------- */

/* Best first, GW_VMM_AUTO at the end. */
static const enum gw_vmm_backend FOR_KVM[] = {GW_VMM_KVM_USERFAULT, GW_VMM_EXIT_EMULATION,
					      GW_VMM_UFFD, GW_VMM_AUTO};
static const enum gw_vmm_backend FOR_THREADS[] = {GW_VMM_UFFD, GW_VMM_EXIT_SIGSEGV, GW_VMM_AUTO};
static const enum gw_vmm_backend FOR_HUGE_PAGES[] = {GW_VMM_UFFD, GW_VMM_AUTO};

static const enum gw_vmm_backend *candidates(const struct mv_machine *machine)
{
	if (machine->memory.page_size != GM_PAGE_SIZE)
		return FOR_HUGE_PAGES;
	return machine->accel->id == MV_ACCEL_KVM ? FOR_KVM : FOR_THREADS;
}

/* `why` names its backend itself. */
static void add_reason(struct mv_faults *faults, const char *why)
{
	const size_t len = strlen(faults->reason);

	(void)snprintf(faults->reason + len, sizeof(faults->reason) - len, "%s%s",
		       len > 0 ? "; " : "", why);
}

static int try(const struct mv_machine *machine, enum gw_vmm_backend backend,
	       char ret_why[GW_VMM_REASON_LEN_MAX])
{
	const bool kvm = machine->accel->id == MV_ACCEL_KVM;
	const int kvm_fd = kvm ? open("/dev/kvm", O_RDWR | O_CLOEXEC) : -1;
	int rc;

	if (kvm && kvm_fd < 0) {
		(void)snprintf(ret_why, GW_VMM_REASON_LEN_MAX, "/dev/kvm cannot be opened");
		return -ENODEV;
	}
	rc = gw_vmm_try(backend, kvm_fd, ret_why);
	if (rc == 0 && backend != GW_VMM_UFFD && !machine->has_exits) {
		(void)snprintf(ret_why, GW_VMM_REASON_LEN_MAX,
			       "%s: this KVM cannot be kept from asynchronous page faults",
			       gw_vmm_backend_name(backend));
		rc = -ENODEV;
	}
	if (kvm_fd >= 0)
		close(kvm_fd);
	return rc;
}

static int choose_named(struct mv_faults *faults, enum gw_vmm_backend wanted,
			struct mv_error *error)
{
	const struct mv_machine *machine = faults->machine;
	const enum gw_vmm_backend *candidate = candidates(machine);
	const char *name = gw_vmm_backend_name(wanted);
	char why[GW_VMM_REASON_LEN_MAX] = "";

	while (*candidate != GW_VMM_AUTO && *candidate != wanted)
		candidate++;
	if (*candidate == GW_VMM_AUTO)
		return mv_refuse(error, -ENODEV, "--fault-backend %s: not with %s", name,
				 machine->memory.page_size == GM_PAGE_SIZE
					 ? machine->accel->id == MV_ACCEL_KVM ? "--accel kvm"
									      : "--accel thread"
					 : "pages of 2 MiB");
	if (try(machine, wanted, why) < 0)
		return mv_refuse(error, -ENODEV, "--fault-backend: %s", why);
	faults->backend = wanted;
	(void)snprintf(faults->reason, sizeof(faults->reason), "asked for by name");
	return 0;
}

static int choose(struct mv_faults *faults, struct mv_error *error)
{
	const struct mv_machine *machine = faults->machine;
	const enum gw_vmm_backend wanted = machine->config.faults.backend;

	if (wanted != GW_VMM_AUTO)
		return choose_named(faults, wanted, error);
	if (machine->memory.page_size != GM_PAGE_SIZE)
		(void)snprintf(faults->reason, sizeof(faults->reason),
			       "pages of 2 MiB come by userfaultfd alone");
	for (const enum gw_vmm_backend *candidate = candidates(machine); *candidate != GW_VMM_AUTO;
	     candidate++) {
		char why[GW_VMM_REASON_LEN_MAX] = "";

		if (try(machine, *candidate, why) == 0) {
			faults->backend = *candidate;
			if (faults->reason[0] == '\0')
				(void)snprintf(faults->reason, sizeof(faults->reason),
					       "the best that there is");
			return 0;
		}
		add_reason(faults, why);
	}
	return mv_refuse(error, -ENODEV, "memory cannot be made absent here: %s", faults->reason);
}

/* --- the mappings -------------------------------------------------------------------------------- */

static int map(struct mv_faults *faults, struct mv_error *error)
{
	struct mv_memory *memory = &faults->machine->memory;
	const bool twice = faults->backend == GW_VMM_EXIT_EMULATION ||
			   faults->backend == GW_VMM_EXIT_SIGSEGV;
	const int protection = faults->backend == GW_VMM_EXIT_SIGSEGV ? PROT_NONE
								      : PROT_READ | PROT_WRITE;
	const int rc = twice ? mv_memory_map_guest(memory, protection, error) : 0;

	for (uint32_t i = 0; i < memory->slot_count; i++) {
		const struct mv_memory_slot *slot = &memory->slots[i];
		/* What KVM's emulator touches: there a fault can only wait. */
		const bool blocks = slot->gpa == 0 && (faults->backend == GW_VMM_EXIT_EMULATION ||
						       faults->backend == GW_VMM_KVM_USERFAULT);

		faults->regions[i] = (struct gw_vmm_region){
			.gpa = slot->gpa,
			.len = slot->size,
			.offset = slot->offset,
			.host_addr = (uintptr_t)memory->base + slot->offset,
			.guest_addr = blocks ? 0 : (uintptr_t)memory->guest + slot->offset,
		};
	}
	return rc;
}

static int create_vmm(struct mv_faults *faults, struct mv_error *error)
{
	const struct mv_machine *machine = faults->machine;
	const struct mv_faults_config *config = &machine->config.faults;
	const struct gw_vmm_config vmm_config = {
		.struct_size = sizeof(vmm_config),
		.page_size = (uint32_t)machine->memory.page_size,
		.vcpu_count = machine->config.vcpu_count,
		.backend = faults->backend,
		.uffd_count = config->uffd_count,
		.spin_ns = config->spin_us * NS_PER_US,
		.user_mode_ok = machine->accel->id != MV_ACCEL_KVM,
		.ram_fd = machine->memory.fd,
		.vmm_name = "godwit-microvm",
		.why = faults->reason,
		.regions = faults->regions,
		.region_count = machine->memory.slot_count,
		.on_complete = mv_faults_finish,
		.opaque = faults,
	};
	const int rc = gw_vmm_create(&vmm_config, &faults->vmm);

	return rc < 0 ? mv_refuse_errno(error, rc, "--fault-backend %s",
					gw_vmm_backend_name(faults->backend))
		      : 0;
}

int mv_faults_create(struct mv_machine *machine, struct mv_error *error)
{
	struct mv_faults *faults = calloc(1, sizeof(*faults));
	int rc;

	if (!faults)
		return mv_refuse_errno(error, -ENOMEM, "make the exit channel");
	faults->machine = machine;
	machine->faults = faults;
	rc = choose(faults, error);
	if (rc == 0)
		rc = map(faults, error);
	if (rc == 0)
		rc = create_vmm(faults, error);
	if (rc < 0)
		return rc;
	atomic_store_explicit(&faults->state, MV_FAULTS_ARMED, memory_order_release);
	mv_faults_handle(faults);
	return 0;
}

int mv_faults_connect(struct mv_machine *machine, struct mv_error *error)
{
	const char *path = machine->config.faults.socket_path;
	const int rc = gw_vmm_connect(machine->faults->vmm, path);

	return rc < 0 ? mv_refuse_errno(error, rc, "--fault-socket %s", path) : 0;
}

void mv_faults_destroy(struct mv_faults *faults)
{
	if (!faults)
		return;
	gw_vmm_destroy(faults->vmm);
	faults->machine->faults = NULL;
	free(faults);
}
