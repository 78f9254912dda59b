/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vmm.h - what a VMM links to let Godwit bring a guest's memory in while the guest runs:
 * userfaultfd, vCPU exits and the bitmap that vCPUs obey, handed off over a unix socket.
 *
 * Threads    fault: the vCPU's own thread, one at a time a vCPU. kick and the readers: any
 *            thread, also inside of a lock of the caller's. The rest: one thread. The
 *            library has one thread of its own, which speaks with the agent and calls back.
 * Errors     0, a count or an outcome >= 0, or -errno. Never logs.
 * Ownership  create duplicates ram_fd. The library holds userfaultfds, channel and doorbell for as
 *            long as the VMM lives: if the agent dies, nobody reads zeros, and the next agent gets
 *            the same hand-off again.
 * Units      Pages of page_size, counted from the start of the image; bytes; ns.
 * Source     docs/exit-channel.md; Firecracker's hand-off of userfaultfds; KVM Userfault v3.
 *
 * A VMM's part, in order:
 *   1. make the guest's memory, absent, and map it; touch none of it, ever;
 *   2. gw_vmm_create: registers the memory, makes the bitmap, all absent;
 *   3. KVM and exits: no asynchronous page faults (docs/exit-channel.md 4, or the vCPU hangs);
 *      memory slots: gw_vmm_slot_flags and gw_vmm_slot_bitmap for each (KVM only);
 *   4. gw_vmm_connect: the agent gets it all; load state, run vCPUs;
 *   5. KVM_RUN or a signal says that memory is missing: gw_vmm_classify, gw_vmm_fault, run again;
 *   6. on_complete: every page is here. Flags off, then gw_vmm_release; the VMM is on its own.
 */
#ifndef GW_VMM_H
#define GW_VMM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define GW_VMM_REGION_COUNT_MAX 16
#define GW_VMM_UFFD_COUNT_MAX	16
#define GW_VMM_REASON_LEN_MAX	192
#define GW_VMM_SPIN_NS_MAX	1000000

/* How a missing page makes itself known. Chosen by trying: see gw_vmm_create. */
enum gw_vmm_backend {
	GW_VMM_AUTO = 0,
	/* The memory slot has the flag and the bitmap, the vCPU leaves KVM_RUN with exit 39. */
	GW_VMM_KVM_USERFAULT = 1,
	/* userfaultfd in SIGBUS mode under the slots: KVM_RUN = EFAULT, the VMM finds the page. */
	GW_VMM_EXIT_EMULATION = 2,
	/* Threads, not vCPUs: the page is PROT_NONE, its SIGSEGV is the exit. No privilege at all. */
	GW_VMM_EXIT_SIGSEGV = 3,
	/* userfaultfd that blocks in the kernel: for every VMM and every guest. No exits. */
	GW_VMM_UFFD = 4,
};

struct gw_vmm;

struct gw_vmm_region {
	uint64_t gpa;	    /* guest-physical address of its first byte */
	uint64_t len;	    /* > 0, a multiple of the page size */
	uint64_t offset;    /* of its first byte in ram_fd, which is its place in the image */
	uint64_t host_addr; /* where the VMM itself has it mapped: the VMM's window */
	/*
	 * Where vCPUs, or threads, have it mapped: what the memory slot's userspace_addr is. The same
	 * as host_addr, or 0, for GW_VMM_UFFD and GW_VMM_KVM_USERFAULT. For GW_VMM_EXIT_EMULATION 0 =
	 * the region takes no exits and blocks in the kernel (what KVM's own emulator touches, say).
	 */
	uint64_t guest_addr;
};

struct gw_vmm_config {
	uint32_t struct_size; /* sizeof(struct gw_vmm_config) */
	uint32_t page_size;   /* 4096, or 2 MiB with GW_VMM_UFFD */
	uint32_t vcpu_count;  /* 1..GW_EXIT_VCPU_COUNT_MAX */
	enum gw_vmm_backend backend;
	uint32_t uffd_count; /* 1..GW_VMM_UFFD_COUNT_MAX: the memory is dealt out among so many */
	/*
	 * How long a vCPU looks at the bit before it sleeps, at most: less, while that does not pay.
	 * 0 = not at all; up to GW_VMM_SPIN_NS_MAX.
	 */
	uint32_t spin_ns;
	/*
	 * Where userfaultfd is refused, take one for faults of user space only. Enough for threads.
	 * Under KVM it is not: an access of the kernel to what takes no exits fails with EFAULT.
	 */
	bool user_mode_ok;
	int ram_fd;
	const char *vmm_name; /* for people */
	const char *why;      /* of the backend, for people; may be NULL */
	/*
	 * Ascending by offset from 0 on, without holes: the image. No two overlap anywhere. With
	 * GW_VMM_KVM_USERFAULT offsets are multiples of 64 pages: a slot's bitmap begins with a word.
	 */
	const struct gw_vmm_region *regions;
	uint32_t region_count;
	/*
	 * Called once, on the library's thread with all signals blocked, when every page is here.
	 * gw_vmm_release afterwards, from any thread, tells the agent that it may go.
	 */
	void (*on_complete)(void *opaque);
	void *opaque;
};

/* What KVM_RUN said. The same classes for every kernel that has or has not the feature. */
enum gw_vmm_exit {
	GW_VMM_EXIT_OTHER = 0,	    /* not about memory: the VMM's usual work */
	GW_VMM_EXIT_USERFAULT = 1,  /* gpa is absent: gw_vmm_fault */
	GW_VMM_EXIT_BARE_FAULT = 2, /* EFAULT without an address: find it, then gw_vmm_fault */
	GW_VMM_EXIT_PRIVATE = 3,    /* to be private: fetch, import, then flip the attribute */
	/* To be shared: flip. Where the attribute says so already: hold, nothing would change. */
	GW_VMM_EXIT_SHARED = 4,
	GW_VMM_EXIT_INTERRUPTED = 5, /* EINTR, EAGAIN: run again unless kicked */
	GW_VMM_EXIT_POISON = 6,	     /* EHWPOISON: the page's content is lost in this host */
	/*
	 * MMIO inside RAM: KVM's emulator could not reach the page, absent or without a slot. Absent:
	 * gw_vmm_fault, then answer the access out of RAM, as a device would. Running again without an
	 * answer gives the guest zeros, or loses its store.
	 */
	GW_VMM_EXIT_RAM_MMIO = 7,
	GW_VMM_EXIT_UNKNOWN = 8, /* exit 39 that nobody knows how to read: hold the guest */
	/*
	 * KVM's emulator gave up. So it does where it cannot fetch the instruction, or cannot reach a
	 * page with a locked one: find the pages as for BARE_FAULT. One is absent: gw_vmm_fault, run
	 * again. None is: a real failure, the VMM's usual work. Needs
	 * KVM_CAP_EXIT_ON_EMULATION_FAILURE, without which KVM may give the guest a #UD instead.
	 */
	GW_VMM_EXIT_NOT_EMULATED = 9,
};

/* gw_vmm_exit_info.gpa where the class has no address. */
#define GW_VMM_GPA_NONE UINT64_MAX

struct gw_vmm_exit_info {
	/* USERFAULT, PRIVATE, SHARED, RAM_MMIO; POISON where the kernel says it; UNKNOWN, as found. */
	uint64_t gpa;
	/* Bytes from gpa on; 0 without gpa. NOT_EMULATED: of the instruction, as far as KVM got it. */
	uint64_t len;
	/*
	 * USERFAULT, PRIVATE, SHARED, UNKNOWN: the kernel's. RAM_MMIO, NOT_EMULATED: of enum
	 * gw_exit_flag; NOT_EMULATED has GW_EXIT_EXEC where the fetch itself may be what failed.
	 */
	uint64_t flags;
};

/* All 0 for GW_VMM_UFFD, as for a vCPU that does not exist. */
struct gw_vmm_stats {
	uint64_t exit_count;	 /* gw_vmm_fault calls */
	uint64_t spurious_count; /* whose pages were all here already */
	uint64_t blocked_ns;	 /* in gw_vmm_fault */
};

/* How gw_vmm_fault ended. */
enum gw_vmm_fault_outcome {
	GW_VMM_FAULT_PRESENT = 0, /* every page is here: run again */
	GW_VMM_FAULT_HERE = 1,	  /* all were here when it was called: see gw_vmm_fill_holes */
};

/*
 * Is the backend possible here? Tried on throw-away objects: a KVM machine, a userfaultfd, a mapping.
 * `kvm_fd` is /dev/kvm, or -1: the guest is threads, and userfaultfd for user space is enough
 * (config: user_mode_ok). Returns 0, or why not as -errno; either way with words in ret_reason.
 */
int gw_vmm_try(enum gw_vmm_backend backend, int kvm_fd, char ret_reason[GW_VMM_REASON_LEN_MAX]);

/*
 * Registers userfaultfds, makes channel and doorbell, every bit set. GW_VMM_AUTO is refused: the VMM
 * chooses with gw_vmm_try, because where its guest_addr mappings are depends on it.
 * Returns 0; -EINVAL a field is out of range; -EEXIST the memory has content already, which would be
 * taken for the guest's; -ENOMEM; -errno of the call that failed. After a failure with
 * GW_VMM_EXIT_SIGSEGV the guest_addr mappings may be PROT_NONE.
 */
int gw_vmm_create(const struct gw_vmm_config *config, struct gw_vmm **ret_vmm);

/*
 * From now on, until the release: connect to the agent's socket, hand off, and again whenever the
 * connection breaks. Never blocks on the agent. Returns 0; -EALREADY; -EINVAL the path is too long.
 */
int gw_vmm_connect(struct gw_vmm *vmm, const char *socket_path);

/*
 * Of one region's memory slot. flags: KVM_MEM_USERFAULT until on_complete, 0 after it and for other
 * backends; bitmap: the slot's own first word, NULL for GW_VMM_UFFD.
 */
uint32_t gw_vmm_slot_flags(const struct gw_vmm *vmm);
const uint64_t *gw_vmm_slot_bitmap(const struct gw_vmm *vmm, uint32_t region);

/*
 * Acquire: where it says false, the page's content may be read. GW_VMM_UFFD has no bitmap: all is
 * absent until on_complete, then nothing.
 */
bool gw_vmm_is_absent(const struct gw_vmm *vmm, uint64_t gpa);
uint64_t gw_vmm_absent_count(const struct gw_vmm *vmm);

/*
 * A vCPU needs the pages that the addresses are in: ask for those that are absent, sleep until none is.
 * Addresses outside of every region are ignored. flags: of enum gw_exit_flag.
 *
 * Async-signal-safe, errno as it was: GW_VMM_EXIT_SIGSEGV calls it in the signal's handler, and there
 * it gives the pages to the threads as well, so that the handler may return.
 *
 * Returns GW_VMM_FAULT_PRESENT, GW_VMM_FAULT_HERE; -EINTR gw_vmm_kick was called and pages are
 * absent still: park, and fault again after the resume; -EINVAL count is 0 or above
 * GW_EXIT_WAIT_COUNT, none is in a region, there is no such vCPU, or no exits (GW_VMM_UFFD);
 * -errno of mprotect: the pages are here and the threads cannot have them: hold the guest.
 */
int gw_vmm_fault(struct gw_vmm *vmm, uint32_t vcpu, const uint64_t *gpas, uint32_t count,
		 uint64_t flags);

/*
 * The pages' bits are clear and the vCPU faults on them all the same: in SIGBUS mode, holes, which the
 * source said are zero or the guest has given back. Makes them zero pages; what is there stays.
 * Other backends need it not: the kernel fills holes, or gw_vmm_fault has given the page.
 * Async-signal-safe. Returns 0; -EAGAIN a bit is set (again: fault); -errno.
 */
int gw_vmm_fill_holes(struct gw_vmm *vmm, const uint64_t *gpas, uint32_t count);

/*
 * Makes gw_vmm_fault of this vCPU return -EINTR, now or at its next call, until gw_vmm_unkick.
 * Neither blocks. Async-signal-safe.
 */
void gw_vmm_kick(struct gw_vmm *vmm, uint32_t vcpu);
void gw_vmm_unkick(struct gw_vmm *vmm, uint32_t vcpu);

/*
 * After on_complete, and after the slots' flags are off: undo every registration, then tell the
 * agent. Returns 0, from when on the guest needs no agent (again: 0); -EBUSY pages are absent;
 * -errno of the call that failed: again.
 */
int gw_vmm_release(struct gw_vmm *vmm);
/* The agent has been told; if none is there, the next one will be. */
bool gw_vmm_is_released(const struct gw_vmm *vmm);

void gw_vmm_stats(const struct gw_vmm *vmm, uint32_t vcpu, struct gw_vmm_stats *ret_stats);
enum gw_vmm_backend gw_vmm_backend_of(const struct gw_vmm *vmm);
/* "kvm-userfault", "exit-emulation", "exit-sigsegv", "uffd", "auto". */
const char *gw_vmm_backend_name(enum gw_vmm_backend backend);
/* The backend of that name; -EINVAL. */
int gw_vmm_backend_by_name(const char *name, enum gw_vmm_backend *ret_backend);

/*
 * Closes everything. Only after the release, or when the guest will never run again: closing the last
 * userfaultfd would let it read zeros. Unmaps nothing of the caller's. NULL is a no-op.
 */
void gw_vmm_destroy(struct gw_vmm *vmm);

/*
 * What a return of KVM_RUN means. `result` is 0 or -errno; `run` is the struct kvm_run;
 * is_ram: is the address RAM of this machine? Must not be NULL. Pure: no system call.
 */
struct kvm_run;
enum gw_vmm_exit gw_vmm_classify(int result, const struct kvm_run *run,
				 bool (*is_ram)(const void *opaque, uint64_t gpa),
				 const void *opaque, struct gw_vmm_exit_info *ret_info);

#endif /* GW_VMM_H */
