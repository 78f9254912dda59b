/* SPDX-License-Identifier: Apache-2.0 */
/*
 * kvm.c - the guest on KVM: the VM and its vCPUs, entering and leaving the guest.
 *
 * Threads, Errors, Ownership, Units, Source: see kvm.h.
 */
#include "kvm.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "discover.h"
#include "faults.h"

/* Three pages and one in the hole that Intel processors want; any free place does. */
#define TSS_ADDR	  0xfffbd000ull
#define IDENTITY_MAP_ADDR 0xfffbc000ull

#define KICKED_RETRY_US 1000u

/* linux/kvm.h of 6.1 does not have it yet; KVM Userfault's bitmap is in its padding. */
struct region2 {
	uint32_t slot;
	uint32_t flags;
	uint64_t gpa;
	uint64_t size;
	uint64_t host_addr;
	uint64_t gmem_offset;
	uint32_t gmem_fd;
	uint32_t pad1;
	uint64_t bitmap;
	uint64_t pad2[13];
};
_Static_assert(sizeof(struct region2) == 160, "the kernel's size");
#define SET_USER_MEMORY_REGION2 _IOW(KVMIO, 0x49, struct region2)

int mv_kvm_ioctl(int fd, unsigned long request, const void *argument)
{
	int rc;

	do {
		rc = ioctl(fd, request, argument);
	} while (rc < 0 && errno == EINTR);
	return rc < 0 ? -errno : rc;
}

/* --- creation ----------------------------------------------------------------------------------- */

static int check_extensions(const struct mv_kvm *kvm, struct mv_error *error)
{
	static const struct {
		uintptr_t number;
		const char *name;
	} needed[] = {
		{KVM_CAP_USER_MEMORY, "USER_MEMORY"},
		{KVM_CAP_IRQCHIP, "IRQCHIP"},
		{KVM_CAP_PIT2, "PIT2"},
		{KVM_CAP_SYNC_REGS, "SYNC_REGS"},
		{KVM_CAP_IMMEDIATE_EXIT, "IMMEDIATE_EXIT"},
		{KVM_CAP_SREGS2, "SREGS2"},
		{KVM_CAP_XCRS, "XCRS"},
		{KVM_CAP_XSAVE2, "XSAVE2"},
		{KVM_CAP_DEBUGREGS, "DEBUGREGS"},
		{KVM_CAP_VCPU_EVENTS, "VCPU_EVENTS"},
		{KVM_CAP_MP_STATE, "MP_STATE"},
		{KVM_CAP_ADJUST_CLOCK, "ADJUST_CLOCK"},
		{KVM_CAP_GET_TSC_KHZ, "GET_TSC_KHZ"},
		{KVM_CAP_EXT_CPUID, "EXT_CPUID"},
	};

	for (size_t i = 0; i < sizeof(needed) / sizeof(needed[0]); i++)
		if (ioctl(kvm->kvm_fd, KVM_CHECK_EXTENSION, needed[i].number) <= 0)
			return mv_refuse(error, -ENODEV, "this KVM lacks KVM_CAP_%s",
					 needed[i].name);
	return 0;
}

/*
 * No asynchronous page faults. With a LAPIC in the kernel KVM lets a worker wait for a page, halts the
 * vCPU meanwhile and enters again, also for a guest that never heard of them; a fault that is to be an
 * exit then never is one: it happens again for ever, in the kernel. KVM does not do so where the guest
 * may halt by itself, which ours never does. Before there are vCPUs.
 */
static bool forbid_async_faults(const struct mv_kvm *kvm)
{
	static const struct kvm_enable_cap no_hlt_exits = {.cap = KVM_CAP_X86_DISABLE_EXITS,
							   .args = {KVM_X86_DISABLE_EXITS_HLT}};
	const int can = ioctl(kvm->vm_fd, KVM_CHECK_EXTENSION, KVM_CAP_X86_DISABLE_EXITS);

	return can > 0 && (can & KVM_X86_DISABLE_EXITS_HLT) &&
	       mv_kvm_ioctl(kvm->vm_fd, KVM_ENABLE_CAP, &no_hlt_exits) == 0;
}

static int create_vm(struct mv_kvm *kvm, struct mv_error *error)
{
	static const uint64_t identity_map = IDENTITY_MAP_ADDR;
	static const struct kvm_pit_config pit = {0};
	static const struct kvm_enable_cap tell_failures = {
		.cap = KVM_CAP_EXIT_ON_EMULATION_FAILURE, .args = {1}};
	int rc;

	kvm->vm_fd = mv_kvm_ioctl(kvm->kvm_fd, KVM_CREATE_VM, NULL);
	if (kvm->vm_fd < 0)
		return mv_refuse_errno(error, kvm->vm_fd, "KVM_CREATE_VM");
	rc = mv_kvm_ioctl(kvm->vm_fd, KVM_SET_IDENTITY_MAP_ADDR, &identity_map);
	if (rc == 0)
		rc = mv_kvm_ioctl(kvm->vm_fd, KVM_SET_TSS_ADDR, (const void *)TSS_ADDR);
	if (rc == 0)
		rc = mv_kvm_ioctl(kvm->vm_fd, KVM_CREATE_IRQCHIP, NULL);
	if (rc == 0)
		rc = mv_kvm_ioctl(kvm->vm_fd, KVM_CREATE_PIT2, &pit);
	/* Else the guest may get a #UD where its memory is absent. Linux 5.14; without it, no worse. */
	(void)mv_kvm_ioctl(kvm->vm_fd, KVM_ENABLE_CAP, &tell_failures);
	return rc < 0 ? mv_refuse_errno(error, rc, "make the VM") : 0;
}

/* With the flags that it has now: a second time, once they are gone, turns exits off. */
static int set_slot(const struct mv_machine *machine, uint32_t slot, uint32_t flags)
{
	const struct mv_memory_slot *memory = &machine->memory.slots[slot];
	const struct kvm_userspace_memory_region region = {
		.slot = slot,
		.guest_phys_addr = memory->gpa,
		.memory_size = memory->size,
		.userspace_addr = mv_faults_slot_addr(machine, slot),
	};
	const struct region2 region2 = {
		.slot = slot,
		.flags = flags,
		.gpa = memory->gpa,
		.size = memory->size,
		.host_addr = region.userspace_addr,
		.bitmap = (uintptr_t)mv_faults_slot_bitmap(machine, slot),
	};
	const int fd = mv_kvm_of(machine)->vm_fd;

	return flags == 0 ? mv_kvm_ioctl(fd, KVM_SET_USER_MEMORY_REGION, &region)
			  : mv_kvm_ioctl(fd, SET_USER_MEMORY_REGION2, &region2);
}

static int kvm_attach(struct mv_machine *machine, struct mv_error *error)
{
	for (uint32_t i = 0; i < machine->memory.slot_count; i++) {
		const int rc = set_slot(machine, i, mv_faults_slot_flags(machine, i));

		if (rc < 0)
			return mv_refuse_errno(error, rc, "set memory slot %u", i);
	}
	return 0;
}

/* Without the flag KVM looks at no bitmap and may map huge pages again. */
static int kvm_disarm(struct mv_machine *machine)
{
	int rc = 0;

	if (mv_faults_backend(machine->faults) != GW_VMM_KVM_USERFAULT)
		return 0;
	for (uint32_t i = 0; rc == 0 && i < machine->memory.slot_count; i++)
		rc = set_slot(machine, i, 0);
	return rc;
}

static int create_vcpu(const struct mv_kvm *kvm, struct mv_vcpu *vcpu, struct mv_error *error)
{
	struct mv_kvm_vcpu *kvm_vcpu = calloc(1, sizeof(*kvm_vcpu));

	if (!kvm_vcpu)
		return mv_refuse_errno(error, -ENOMEM, "make vCPU %u", vcpu->id);
	vcpu->accel_data = kvm_vcpu;
	kvm_vcpu->fd = mv_kvm_ioctl(kvm->vm_fd, KVM_CREATE_VCPU, (const void *)(uintptr_t)vcpu->id);
	if (kvm_vcpu->fd < 0)
		return mv_refuse_errno(error, kvm_vcpu->fd, "KVM_CREATE_VCPU %u", vcpu->id);
	kvm_vcpu->run =
		mmap(NULL, kvm->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, kvm_vcpu->fd, 0);
	if (kvm_vcpu->run == MAP_FAILED) {
		kvm_vcpu->run = NULL;
		return mv_refuse_errno(error, -errno, "map vCPU %u", vcpu->id);
	}
	/* A hypercall's arguments then come with the exit. */
	kvm_vcpu->run->kvm_valid_regs = KVM_SYNC_X86_REGS;
	return 0;
}

static void ignore_signal(int number)
{
	(void)number;
}

/* Without SA_RESTART: it is to interrupt. For the whole process; a second machine sets the same. */
static int install_kick_signal(void)
{
	const struct sigaction action = {.sa_handler = ignore_signal};

	return sigaction(MV_KICK_SIGNAL, &action, NULL) < 0 ? -errno : 0;
}

static int open_kvm(struct mv_kvm *kvm, struct mv_error *error)
{
	int size;

	kvm->kvm_fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (kvm->kvm_fd < 0)
		return mv_refuse_errno(error, -ENODEV, "/dev/kvm cannot be opened (%s)",
				       strerrorname_np(errno));
	if (ioctl(kvm->kvm_fd, KVM_GET_API_VERSION, 0) != KVM_API_VERSION)
		return mv_refuse(error, -ENODEV, "/dev/kvm speaks another API version");
	size = ioctl(kvm->kvm_fd, KVM_GET_VCPU_MMAP_SIZE, 0);
	if (size < (int)sizeof(struct kvm_run))
		return mv_refuse(error, -ENODEV, "KVM_GET_VCPU_MMAP_SIZE answers %d", size);
	kvm->run_size = (size_t)size;
	return check_extensions(kvm, error);
}

static int read_cpuid(struct mv_machine *machine, struct mv_error *error)
{
	struct mv_kvm *kvm = mv_kvm_of(machine);
	const int fd = mv_kvm_vcpu_of(&machine->vcpus[0])->fd;
	int rc;

	kvm->cpuid.head.nent = MV_CPUID_COUNT_MAX;
	kvm->seen.head.nent = MV_CPUID_COUNT_MAX;
	rc = mv_kvm_ioctl(kvm->kvm_fd, KVM_GET_SUPPORTED_CPUID, &kvm->cpuid);
	if (rc >= 0)
		rc = mv_kvm_ioctl(fd, KVM_SET_CPUID2, &kvm->cpuid);
	if (rc >= 0)
		rc = mv_kvm_ioctl(fd, KVM_GET_CPUID2, &kvm->seen);
	return rc < 0 ? mv_refuse_errno(error, rc, "CPUID") : 0;
}

static int kvm_create(struct mv_machine *machine, struct mv_error *error)
{
	struct mv_kvm *kvm = calloc(1, sizeof(*kvm));
	int rc;

	if (!kvm)
		return mv_refuse_errno(error, -ENOMEM, "make the VM");
	machine->accel_data = kvm;
	kvm->kvm_fd = -1;
	kvm->vm_fd = -1;
	rc = install_kick_signal();
	if (rc < 0)
		return mv_refuse_errno(error, rc, "sigaction");
	rc = open_kvm(kvm, error);
	if (rc == 0)
		rc = create_vm(kvm, error);
	/* Every machine: it changes what CPUID says, and a state is to load with every backend. */
	if (rc == 0)
		machine->has_exits = forbid_async_faults(kvm);
	for (uint32_t i = 0; rc == 0 && i < machine->config.vcpu_count; i++)
		rc = create_vcpu(kvm, &machine->vcpus[i], error);
	if (rc < 0)
		return rc;
	rc = read_cpuid(machine, error);
	if (rc < 0)
		return rc;
	kvm->xsave_size = (uint32_t)ioctl(kvm->vm_fd, KVM_CHECK_EXTENSION, KVM_CAP_XSAVE2);
	if (kvm->xsave_size < sizeof(struct kvm_xsave) || kvm->xsave_size > MV_XSAVE_LEN_MAX)
		return mv_refuse(error, -ENODEV, "this KVM saves %u bytes of vector registers",
				 kvm->xsave_size);
	return mv_kvm_list_msrs(machine, error);
}

static void kvm_destroy(struct mv_machine *machine)
{
	struct mv_kvm *kvm = mv_kvm_of(machine);

	for (uint32_t i = 0; i < machine->config.vcpu_count; i++) {
		struct mv_kvm_vcpu *vcpu = mv_kvm_vcpu_of(&machine->vcpus[i]);

		if (!vcpu)
			continue;
		if (vcpu->run)
			munmap(vcpu->run, kvm->run_size);
		if (vcpu->fd >= 0)
			close(vcpu->fd);
		free(vcpu);
		machine->vcpus[i].accel_data = NULL;
	}
	if (!kvm)
		return;
	if (kvm->vm_fd >= 0)
		close(kvm->vm_fd);
	if (kvm->kvm_fd >= 0)
		close(kvm->kvm_fd);
	free(kvm);
	machine->accel_data = NULL;
}

/* --- in and out of the guest --------------------------------------------------------------------- */

static void set_immediate_exit(struct kvm_run *run, bool on)
{
	/* Read by the kernel, written by two threads: a byte, whole in any case. */
	__atomic_store_n(&run->immediate_exit, on, __ATOMIC_RELEASE);
}

static void kvm_kick(struct mv_vcpu *vcpu)
{
	const struct mv_kvm_vcpu *kvm_vcpu = mv_kvm_vcpu_of(vcpu);
	const int tid = atomic_load_explicit(&vcpu->tid, memory_order_acquire);

	if (!kvm_vcpu)
		return;
	/* In this order: see vcpu.c. */
	set_immediate_exit(kvm_vcpu->run, true);
	if (tid > 0)
		(void)syscall(SYS_tgkill, getpid(), tid, MV_KICK_SIGNAL);
}

static void kvm_release(struct mv_vcpu *vcpu)
{
	set_immediate_exit(mv_kvm_vcpu_of(vcpu)->run, false);
}

static int hypercall(struct mv_vcpu *vcpu, struct mv_error *error)
{
	struct mv_kvm_vcpu *kvm_vcpu = mv_kvm_vcpu_of(vcpu);
	struct kvm_run *run = kvm_vcpu->run;
	const struct kvm_regs *regs = &run->s.regs.regs;
	const uint64_t args[4] = {regs->rbx, regs->rcx, regs->rsi, regs->rdi};
	int64_t answer;

	if (run->io.direction != KVM_EXIT_IO_IN || run->io.size != sizeof(uint32_t) ||
	    run->io.count != 1 || run->io.port < GM_PORT_BASE)
		return mv_refuse(error, -ENOSYS, "port %#x: not a hypercall", run->io.port);
	answer = mv_vcpu_hypercall(vcpu, run->io.port - GM_PORT_BASE, args);
	if (answer < 0)
		return mv_refuse(error, -ENOSYS, "port %#x: no such hypercall", run->io.port);
	*(uint32_t *)((uint8_t *)run + run->io.data_offset) = (uint32_t)answer;
	kvm_vcpu->io_pending = true;
	return 0;
}

static bool is_ram(const void *opaque, uint64_t gpa)
{
	uint64_t offset;

	return mv_memory_offset(opaque, gpa, &offset);
}

static int memory_fault(struct mv_vcpu *vcpu, enum mv_fault_kind kind, uint64_t gpa,
			struct mv_error *error)
{
	const struct kvm_run *run = mv_kvm_vcpu_of(vcpu)->run;
	const struct mv_memory_fault fault = {.kind = kind, .gpa = gpa};
	struct mv_error why = {""};
	const int rc = mv_vcpu_memory_fault(vcpu, &fault, &why);

	if (rc == 0 || rc == -EINTR)
		return 0;
	return rc == -ENODATA ? rc
			      : mv_refuse(error, rc, "absent memory: %s, rip %#llx: %.160s",
					  kind == MV_FAULT_EXIT ? "exit 39" : "EFAULT",
					  (unsigned long long)run->s.regs.regs.rip, why.text);
}

/*
 * KVM's emulator could not reach a page and takes it for a device. It may be absent, or a hole: once
 * it is there the access is answered out of the file, as a device would.
 */
static int ram_access(struct mv_vcpu *vcpu, uint64_t gpa, struct mv_error *error)
{
	const struct mv_memory *memory = &vcpu->machine->memory;
	struct mv_kvm_vcpu *kvm_vcpu = mv_kvm_vcpu_of(vcpu);
	struct kvm_run *run = kvm_vcpu->run;
	uint64_t offset;
	ssize_t done = -1;

	while (mv_faults_absent(vcpu->machine, gpa)) {
		const int rc = memory_fault(vcpu, MV_FAULT_EXIT, gpa, error);

		if (rc < 0)
			return rc;
		if (!mv_vcpu_kicked(vcpu))
			continue;
		/*
		 * The access is KVM's and half done: it cannot be left and taken up again. A pause waits
		 * for the page, as it does where the emulator waits in the kernel.
		 */
		if (mv_machine_over(vcpu->machine))
			return 0;
		(void)usleep(KICKED_RETRY_US);
	}
	if (vcpu->machine->faults && run->mmio.len <= sizeof(run->mmio.data) &&
	    mv_memory_offset(memory, gpa, &offset))
		done = run->mmio.is_write
			       ? pwrite(memory->fd, run->mmio.data, run->mmio.len, (off_t)offset)
			       : pread(memory->fd, run->mmio.data, run->mmio.len, (off_t)offset);
	if (done < 0 || (uint32_t)done != run->mmio.len)
		return mv_refuse(error, -EIO, "KVM finds no memory at %#llx",
				 (unsigned long long)gpa);
	kvm_vcpu->io_pending = true;
	return 0;
}

static int refuse_exit(const struct kvm_run *run, struct mv_error *error)
{
	switch (run->exit_reason) {
	case KVM_EXIT_SHUTDOWN:
		return mv_refuse(error, -EIO, "the guest shut down (triple fault)");
	case KVM_EXIT_INTERNAL_ERROR:
		return mv_refuse(error, -EIO, "KVM internal error %u, rip %#llx",
				 run->internal.suberror, (unsigned long long)run->s.regs.regs.rip);
	case KVM_EXIT_FAIL_ENTRY:
		return mv_refuse(error, -EIO, "KVM cannot enter the guest: reason %#llx",
				 (unsigned long long)run->fail_entry.hardware_entry_failure_reason);
	case KVM_EXIT_MMIO:
		return mv_refuse(error, -EIO, "the guest touched %#llx, where no memory is",
				 (unsigned long long)run->mmio.phys_addr);
	default:
		return mv_refuse(error, -EIO, "unexpected exit %u", run->exit_reason);
	}
}

/* Lets KVM put the answer into eax and step over the instruction, without entering the guest. */
static int complete_io(struct mv_kvm_vcpu *kvm_vcpu, struct mv_error *error)
{
	if (!kvm_vcpu->io_pending)
		return 0;
	set_immediate_exit(kvm_vcpu->run, true);
	if (ioctl(kvm_vcpu->fd, KVM_RUN, 0) >= 0 || errno != EINTR)
		return mv_refuse(error, -EIO, "KVM_RUN did not heed immediate_exit");
	kvm_vcpu->io_pending = false;
	/*
	 * Off again: if the pause has timed out meanwhile, nobody else would do it and the vCPU
	 * would never enter the guest. A kick that this hides has changed the state before, under
	 * the lock, and run() returns to where that is looked at.
	 */
	set_immediate_exit(kvm_vcpu->run, false);
	return 0;
}

/* An exit that is not a hypercall. */
static int other_exit(struct mv_vcpu *vcpu, int result, struct mv_error *error)
{
	const struct kvm_run *run = mv_kvm_vcpu_of(vcpu)->run;
	struct gw_vmm_exit_info info;
	int rc;

	switch (gw_vmm_classify(result, run, is_ram, &vcpu->machine->memory, &info)) {
	case GW_VMM_EXIT_INTERRUPTED:
		mv_count(&vcpu->counters.interrupted_count, 1);
		return 0;
	case GW_VMM_EXIT_USERFAULT:
		return memory_fault(vcpu, MV_FAULT_EXIT, info.gpa, error);
	case GW_VMM_EXIT_BARE_FAULT:
		return memory_fault(vcpu, MV_FAULT_BARE, GW_VMM_GPA_NONE, error);
	case GW_VMM_EXIT_RAM_MMIO:
		return ram_access(vcpu, info.gpa, error);
	case GW_VMM_EXIT_NOT_EMULATED:
		rc = vcpu->machine->faults
			     ? memory_fault(vcpu, MV_FAULT_EMULATOR, GW_VMM_GPA_NONE, error)
			     : -ENODATA;
		return rc == -ENODATA ? refuse_exit(run, error) : rc;
	case GW_VMM_EXIT_POISON:
		return mv_refuse(error, -EHWPOISON,
				 "the content of a page is lost, in this host's memory: %#llx",
				 (unsigned long long)info.gpa);
	case GW_VMM_EXIT_PRIVATE:
	case GW_VMM_EXIT_SHARED:
	case GW_VMM_EXIT_UNKNOWN:
		return mv_refuse(error, -EFAULT,
				 "exit 39 at %#llx with flags %#llx: no such memory here",
				 (unsigned long long)info.gpa, (unsigned long long)info.flags);
	case GW_VMM_EXIT_OTHER:
		break;
	}
	return result < 0 ? mv_refuse_errno(error, result, "KVM_RUN") : refuse_exit(run, error);
}

static int one_exit(struct mv_vcpu *vcpu, struct mv_error *error)
{
	struct mv_kvm_vcpu *kvm_vcpu = mv_kvm_vcpu_of(vcpu);
	const int rc = ioctl(kvm_vcpu->fd, KVM_RUN, 0) < 0 ? -errno : 0;

	mv_count(&vcpu->counters.exit_count, 1);
	kvm_vcpu->io_pending = false;
	if (rc == 0 && kvm_vcpu->run->exit_reason == KVM_EXIT_IO)
		return hypercall(vcpu, error);
	return other_exit(vcpu, rc, error);
}

static int kvm_run(struct mv_vcpu *vcpu, struct mv_error *error)
{
	int rc = 0;

	while (rc == 0 && !mv_vcpu_kicked(vcpu))
		rc = one_exit(vcpu, error);
	return rc == 0 ? complete_io(mv_kvm_vcpu_of(vcpu), error) : rc;
}

const struct mv_accel_ops mv_accel_kvm = {
	.name = "kvm",
	.id = MV_ACCEL_KVM,
	.create = kvm_create,
	.attach = kvm_attach,
	.boot = mv_kvm_boot,
	.run = kvm_run,
	.kick = kvm_kick,
	.release = kvm_release,
	.save = mv_kvm_save,
	.rules = mv_kvm_rules,
	.check = mv_kvm_check,
	.load = mv_kvm_load,
	.destroy = kvm_destroy,
	.discover = mv_kvm_discover,
	.disarm = kvm_disarm,
};
