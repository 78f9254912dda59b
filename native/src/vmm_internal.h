/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vmm_internal.h - what the files of vmm.h's library share.
 *
 * Threads    What create writes is constant afterwards. Each later field names its threads.
 * Errors     As in vmm.h.
 * Ownership  gw_vmm_destroy frees it all; functions here undo nothing of what others did.
 * Units      Pages of page_size, counted from the start of the image; bytes; ns.
 * Source     vmm.h, docs/exit-channel.md.
 *
 * Files: vmm.c (create, destroy, readers), vmm_config.c (what create refuses), vmm_channel.c (the
 * shared memory), vmm_memory.c (registrations), vmm_give.c (pages to threads, exit-sigsegv),
 * vmm_fault.c (a vCPU's wait), vmm_handoff.c (the library's thread), vmm_message.c (its text),
 * vmm_try.c (which backend is possible), vmm_exit.c (gw_vmm_classify, which needs none of this).
 */
#ifndef GW_VMM_INTERNAL_H
#define GW_VMM_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/un.h>

#include <godwit/bitmap.h>
#include <godwit/exit_channel.h>
#include <godwit/vmm.h>

#define GW_VMM_MEM_USERFAULT   (UINT32_C(1) << 3) /* KVM_MEM_USERFAULT of KVM Userfault v3 */
#define GW_VMM_PAGE_LEN	       4096U
#define GW_VMM_HUGE_PAGE_LEN   (2U << 20)
#define GW_VMM_FD_COUNT_MAX    (3 + GW_VMM_UFFD_COUNT_MAX)
#define GW_VMM_PIECE_COUNT_MAX (GW_VMM_REGION_COUNT_MAX + GW_VMM_UFFD_COUNT_MAX)
#define GW_VMM_MESSAGE_LEN_MAX 16384U
#define GW_VMM_NAME_LEN_MAX    64U

struct gw_vmm_region_state {
	struct gw_vmm_region at;
	uint64_t first; /* page of the image */
	uint64_t count;
};

/* A run of the image that one userfaultfd serves: a mapping of the hand-off. */
struct gw_vmm_piece {
	uint64_t address; /* in the VMM's window */
	uint64_t len;
	uint64_t offset;
	uint64_t gpa;
	uint32_t uffd;
};

/* Of a vCPU, what is none of the agent's business. A cache line each: vCPUs share none. */
struct gw_vmm_vcpu {
	/* By any thread: gw_vmm_kick and unkick. Read by the vCPU's; vmm_fault.c has the order. */
	_Alignas(64) _Atomic uint32_t kicked;
	/* The vCPU's thread alone: how long it spins now, and what it has counted. */
	uint64_t spin_ns;
	uint64_t exit_count;
	uint64_t spurious_count;
	uint64_t blocked_ns;
};

struct gw_vmm {
	/* --- constant after create --- */
	enum gw_vmm_backend backend;
	uint32_t page_size;
	uint32_t vcpu_count;
	uint32_t region_count;
	uint32_t uffd_count;
	uint32_t piece_count;
	uint32_t spin_ns_max;
	uint64_t page_count;
	/* After so long a sleeping vCPU looks again by itself: a second. Tests make it for ever. */
	uint64_t wait_ns_max;
	struct gw_vmm_region_state regions[GW_VMM_REGION_COUNT_MAX];
	struct gw_vmm_piece pieces[GW_VMM_PIECE_COUNT_MAX];
	int ram_fd;
	int channel_fd;
	int doorbell_fd;
	int sigbus_uffd;
	int uffds[GW_VMM_UFFD_COUNT_MAX];
	void (*on_complete)(void *opaque);
	void *opaque;
	char *message; /* the hand-off, ready to be sent */
	size_t message_len;

	/* --- shared with the agent; NULL for GW_VMM_UFFD --- */
	struct gw_exit_header *header;
	_Atomic uint64_t *words;
	struct gw_exit_vcpu *rings;
	size_t channel_len;

	struct gw_vmm_vcpu *vcpus;

	/* --- exit-sigsegv, vmm_give.c: by every vCPU's thread, inside of its signal handler --- */
	_Atomic uint64_t *given;     /* bit set: the threads have the page */
	_Atomic uint64_t give_count; /* since the mappings were counted */
	_Atomic uint64_t granule;    /* pages that are given at least at once; only grows */

	/* --- the library's thread, vmm_handoff.c --- */
	pthread_t thread;
	bool thread_runs; /* the caller's thread */
	int stop_fd;	  /* eventfd: look at stop and release_wanted */
	struct sockaddr_un address;
	_Atomic bool stop;
	_Atomic bool complete; /* by the library's thread, release after the last page's bit */
	_Atomic bool release_wanted;
	_Atomic bool released;
};

/* vmm_config.c. Returns 0 or -EINVAL; fills regions, page_count and the plain numbers. */
int gw_vmm_configure(struct gw_vmm *vmm, const struct gw_vmm_config *config);

/* vmm_channel.c */
int gw_vmm_channel_create(struct gw_vmm *vmm);
void gw_vmm_channel_destroy(struct gw_vmm *vmm);

/* vmm_memory.c */
int gw_vmm_memory_arm(struct gw_vmm *vmm, uint32_t uffd_count, bool user_mode_ok);
int gw_vmm_memory_disarm(struct gw_vmm *vmm);

/* vmm_give.c */
/*
 * Give a page whose bit is clear to the threads. Async-signal-safe. 0; -EAGAIN first the pages of
 * [*ret_first, + *ret_count) must be here; -errno of mprotect.
 */
int gw_vmm_give(struct gw_vmm *vmm, uint64_t page, uint64_t *ret_first, uint64_t *ret_count);

/* vmm_message.c */
int gw_vmm_message_create(struct gw_vmm *vmm, const char *vmm_name, const char *why);
/* The descriptors in the order of the message's "fds". Returns how many. */
uint32_t gw_vmm_message_fds(const struct gw_vmm *vmm, int ret_fds[GW_VMM_FD_COUNT_MAX]);

/* vmm_handoff.c */
void gw_vmm_handoff_stop(struct gw_vmm *vmm);
/* Have the thread look at stop and release_wanted. */
void gw_vmm_handoff_poke(struct gw_vmm *vmm);

/* The region that a page of the image, or an address, is in; NULL: none. */
const struct gw_vmm_region_state *gw_vmm_region_of_page(const struct gw_vmm *vmm, uint64_t page);
/* Page of the image at a guest-physical address; GW_EXIT_PAGE_NONE outside of every region. */
uint64_t gw_vmm_page_of(const struct gw_vmm *vmm, uint64_t gpa);

/* Acquire: see bitmap.h. Only with a channel. */
static inline bool gw_vmm_page_is_absent(const struct gw_vmm *vmm, uint64_t page)
{
	return atomic_load_explicit(&vmm->words[page / 64], memory_order_acquire) >> (page % 64) &
	       1U;
}

#endif /* GW_VMM_INTERNAL_H */
