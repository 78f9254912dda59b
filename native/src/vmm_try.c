/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vmm_try.c - which backends are possible here: each is tried on things that are thrown away.
 *
 * Threads, Errors, Ownership, Units: see vmm.h.
 * Source     KVM Userfault v3; ioctl_userfaultfd(2).
 *
 * Never by version or capability number: a distribution belies the first, and the numbers that the
 * patches of KVM Userfault use mean other things in other kernels.
 */
#include "vmm_internal.h"

#include <errno.h>
#include <linux/ioctl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include <godwit/sys.h>
#include <godwit/uffd.h>

#define KVM_IOC_CREATE_VM   _IO(0xAE, 0x01)
#define KVM_IOC_SET_MEMORY  _IOW(0xAE, 0x46, struct kvm_memory)
#define KVM_IOC_SET_MEMORY2 _IOW(0xAE, 0x49, struct kvm_memory2)

/* struct kvm_userspace_memory_region and its successor; headers of old distributions lack that. */
struct kvm_memory {
	uint32_t slot;
	uint32_t flags;
	uint64_t guest_phys_addr;
	uint64_t memory_size;
	uint64_t userspace_addr;
};

struct kvm_memory2 {
	struct kvm_memory base;
	uint64_t guest_memfd_offset;
	uint32_t guest_memfd;
	uint32_t pad1;
	uint64_t userfault_bitmap; /* pad2[0] where there is no KVM Userfault */
	uint64_t pad2[13];
};

_Static_assert(sizeof(struct kvm_memory) == 32, "linux/kvm.h");
_Static_assert(sizeof(struct kvm_memory2) == 160, "linux/kvm.h");
_Static_assert(offsetof(struct kvm_memory2, userfault_bitmap) == 48, "KVM Userfault v3");

/* Two pages of a memfd, mapped. */
struct scrap {
	int fd;
	void *address;
};

#define SCRAP_LEN ((size_t)2 * GW_VMM_PAGE_LEN)

static const struct {
	enum gw_vmm_backend backend;
	const char *name;
} NAMES[] = {
	{GW_VMM_AUTO, "auto"},
	{GW_VMM_KVM_USERFAULT, "kvm-userfault"},
	{GW_VMM_EXIT_EMULATION, "exit-emulation"},
	{GW_VMM_EXIT_SIGSEGV, "exit-sigsegv"},
	{GW_VMM_UFFD, "uffd"},
};

const char *gw_vmm_backend_name(enum gw_vmm_backend backend)
{
	for (size_t i = 0; i < sizeof(NAMES) / sizeof(NAMES[0]); i++)
		if (NAMES[i].backend == backend)
			return NAMES[i].name;
	return "unknown";
}

int gw_vmm_backend_by_name(const char *name, enum gw_vmm_backend *ret_backend)
{
	for (size_t i = 0; i < sizeof(NAMES) / sizeof(NAMES[0]); i++)
		if (strcmp(NAMES[i].name, name) == 0) {
			*ret_backend = NAMES[i].backend;
			return 0;
		}
	return -EINVAL;
}

/* --- words ------------------------------------------------------------------------------------ */

static int say(char *ret_reason, enum gw_vmm_backend backend, int err, const char *what)
{
	const char *const name = strerrorname_np(-err);

	(void)snprintf(ret_reason, GW_VMM_REASON_LEN_MAX, "%s: %s%s%s%s",
		       gw_vmm_backend_name(backend), what, err < 0 ? " (" : "",
		       err < 0 ? (name ? name : "?") : "", err < 0 ? ")" : "");
	return err;
}

/* --- what is tried ---------------------------------------------------------------------------- */

static int scrap_make(struct scrap *ret_scrap)
{
	int err;

	ret_scrap->fd = gw_sys_memfd_create("godwit-try", MFD_CLOEXEC);
	if (ret_scrap->fd < 0)
		return ret_scrap->fd;
	err = gw_sys_ftruncate(ret_scrap->fd, (off_t)SCRAP_LEN);
	if (err == 0)
		err = gw_sys_mmap(NULL, SCRAP_LEN, PROT_READ | PROT_WRITE, MAP_SHARED,
				  ret_scrap->fd, 0, &ret_scrap->address);
	if (err < 0)
		(void)gw_sys_close(ret_scrap->fd);
	return err;
}

static void scrap_free(const struct scrap *scrap)
{
	(void)gw_sys_munmap(scrap->address, SCRAP_LEN);
	(void)gw_sys_close(scrap->fd);
}

/* Can memory be registered for these features? Takes the uffd. */
static int registers(int uffd, const struct scrap *scrap)
{
	if (uffd < 0)
		return uffd;
	const int err = gw_uffd_register(uffd, (uintptr_t)scrap->address, SCRAP_LEN,
					 UFFDIO_REGISTER_MODE_MISSING, NULL);

	(void)gw_sys_close(uffd);
	return err;
}

/* `kvm_fd` is -1 for threads: then user mode will do, as *ret_user_mode says. */
static int try_blocking(int kvm_fd, const struct scrap *scrap, bool *ret_user_mode)
{
	const uint64_t features = GW_UFFD_FEATURE_MISSING_SHMEM | GW_UFFD_FEATURE_EVENT_REMOVE;
	const int err = registers(gw_uffd_open(features, NULL), scrap);

	*ret_user_mode = false;
	if (err == 0 || kvm_fd >= 0)
		return err;
	if (registers(gw_uffd_open_user_mode(features, NULL), scrap) < 0)
		return err;
	*ret_user_mode = true;
	return 0;
}

static int try_sigbus(const struct scrap *scrap)
{
	const uint64_t features = GW_UFFD_FEATURE_MISSING_SHMEM | GW_UFFD_FEATURE_SIGBUS;
	const int err = registers(gw_uffd_open(features, NULL), scrap);

	return err < 0 && registers(gw_uffd_open_user_mode(features, NULL), scrap) == 0 ? 0 : err;
}

static int try_threads(const struct scrap *scrap)
{
	/* PROT_NONE, and one page of it given: the mapping is cut in two. */
	const int err = gw_sys_mprotect(scrap->address, SCRAP_LEN, PROT_NONE);

	return err < 0 ? err
		       : gw_sys_mprotect(scrap->address, GW_VMM_PAGE_LEN, PROT_READ | PROT_WRITE);
}

static struct kvm_memory slot_of(const struct scrap *scrap)
{
	return (struct kvm_memory){
		.memory_size = SCRAP_LEN,
		.userspace_addr = (uintptr_t)scrap->address,
	};
}

/* A slot with the flag, on a machine without vCPUs. *ret_what: what was refused. */
static int try_userfault(int kvm_fd, const struct scrap *scrap, const char **ret_what)
{
	uint64_t bitmap = UINT64_MAX;
	struct kvm_memory2 slot = {.base = slot_of(scrap)};
	const int vm = gw_sys_ioctl(kvm_fd, KVM_IOC_CREATE_VM, NULL);

	*ret_what = "no KVM machine can be created";
	if (vm < 0)
		return vm;
	*ret_what = "the kernel has no KVM_SET_USER_MEMORY_REGION2";
	int err = gw_sys_ioctl(vm, KVM_IOC_SET_MEMORY2, &slot);

	if (err == 0) {
		slot.base.slot = 1;
		slot.base.guest_phys_addr = SCRAP_LEN;
		slot.base.flags = GW_VMM_MEM_USERFAULT;
		slot.userfault_bitmap = (uintptr_t)&bitmap;
		*ret_what = "the kernel refuses the flag KVM_MEM_USERFAULT";
		err = gw_sys_ioctl(vm, KVM_IOC_SET_MEMORY2, &slot);
	}
	(void)gw_sys_close(vm);
	return err;
}

static int try_machine(int kvm_fd, const struct scrap *scrap)
{
	struct kvm_memory slot = slot_of(scrap);
	const int vm = gw_sys_ioctl(kvm_fd, KVM_IOC_CREATE_VM, NULL);

	if (vm < 0)
		return vm;
	const int err = gw_sys_ioctl(vm, KVM_IOC_SET_MEMORY, &slot);

	(void)gw_sys_close(vm);
	return err;
}

/* --- each backend ----------------------------------------------------------------------------- */

static int try_on(enum gw_vmm_backend backend, int kvm_fd, const struct scrap *scrap,
		  char *ret_reason)
{
	const char *what = "";
	bool user_mode = false;
	int err;

	if (backend == GW_VMM_EXIT_SIGSEGV) {
		err = try_threads(scrap);
		return say(ret_reason, backend, err, err < 0 ? "mprotect is refused" : "works");
	}
	if (backend != GW_VMM_UFFD && kvm_fd < 0)
		return say(ret_reason, backend, -ENODEV, "there is no usable /dev/kvm");
	if (backend == GW_VMM_KVM_USERFAULT) {
		err = try_userfault(kvm_fd, scrap, &what);
		if (err < 0)
			return say(ret_reason, backend, err, what);
	}
	if (backend == GW_VMM_EXIT_EMULATION) {
		err = try_machine(kvm_fd, scrap);
		if (err < 0)
			return say(ret_reason, backend, err, "no KVM machine can be created");
		err = try_sigbus(scrap);
		if (err < 0)
			return say(ret_reason, backend, err, "no userfaultfd in SIGBUS mode");
	}
	err = try_blocking(kvm_fd, scrap, &user_mode);
	if (err < 0)
		return say(ret_reason, backend, err, "userfaultfd is refused");
	return say(ret_reason, backend, 0, user_mode ? "works, for user space only" : "works");
}

int gw_vmm_try(enum gw_vmm_backend backend, int kvm_fd, char ret_reason[GW_VMM_REASON_LEN_MAX])
{
	struct scrap scrap = {.fd = -1};

	if (backend < GW_VMM_KVM_USERFAULT || backend > GW_VMM_UFFD)
		return say(ret_reason, backend, -EINVAL, "is not a backend that can be tried");
	int err = scrap_make(&scrap);

	if (err < 0)
		return say(ret_reason, backend, err, "no shared memory can be made");
	err = try_on(backend, kvm_fd, &scrap, ret_reason);
	scrap_free(&scrap);
	return err;
}
