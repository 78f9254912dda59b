/* SPDX-License-Identifier: Apache-2.0 */
/*
 * exit_channel.h - the memory that a VMM and the agent share: the userfault bitmap that
 * the vCPUs obey, and a ring a vCPU for its exits. docs/exit-channel.md has it byte by byte.
 *
 * Threads    Two processes. Each field below names its one writer; who reads it orders itself
 *            by the acquire or release named there.
 * Errors     None: this is a layout. gw_exits_attach (exits.h) and gw_vmm_create (vmm.h)
 *            check it.
 * Ownership  The VMM makes the memory, a memfd sealed against shrinking, and keeps it for as
 *            long as pages are absent. It outlives any agent.
 * Units      Pages, counted from the start of the image; bytes; ns of CLOCK_MONOTONIC.
 * Source     KVM Userfault v3 (the bitmap's polarity); DESIGN 3.1 and 3.2; ADR 0005.
 *
 *   vCPU thread                                  agent
 *   request: slot, then request_head (release)
 *   doorbell, if agent_idle                  ->  takes requests, fetches, installs
 *   wait_pages, then waiting, fence              clear the bits (release), fence
 *   bits (acquire): clear -> enter the guest     waiting and wait_pages: one of those?
 *   set -> futex sleep on wake_count         <-  wake_count++, futex wake
 *
 * The bit is the completion. There is no second word that could disagree with it, and a
 * vCPU whose wake was lost with an agent finds out by looking again.
 */
#ifndef GW_EXIT_CHANNEL_H
#define GW_EXIT_CHANNEL_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#define GW_EXIT_MAGIC	       UINT64_C(0x314e414843545845) /* "EXTCHAN1", little-endian */
#define GW_EXIT_VERSION	       1U
#define GW_EXIT_HEADER_LEN     4096U
#define GW_EXIT_VCPU_LEN       1024U
#define GW_EXIT_VCPU_COUNT_MAX 512U
#define GW_EXIT_REQUEST_COUNT  16U /* slots of a ring; a power of two */
#define GW_EXIT_WAIT_COUNT     8U  /* pages that one instruction may need at once */
#define GW_EXIT_PAGE_NONE      UINT64_MAX

/* At offset 0 of the memory. */
struct gw_exit_header {
	/* Constant, written by the VMM before the memory is handed off. */
	uint64_t magic;
	uint32_t version;
	uint32_t header_len; /* GW_EXIT_HEADER_LEN */
	uint64_t total_len;  /* of the memory, whole pages of 4096 */
	uint32_t page_size;  /* of a bit: 4096 */
	uint32_t vcpu_count; /* 1..GW_EXIT_VCPU_COUNT_MAX */
	uint64_t page_count;
	uint64_t bitmap_offset; /* page aligned; bit i (LSB first) = page i, set = absent */
	uint64_t vcpus_offset;	/* page aligned; vcpu_count times struct gw_exit_vcpu */
	uint64_t reserved0[9];	/* zero */

	/* Written by the agent; a cache line of its own. */
	/*
	 * Counts what makes a vCPU post its requests again: a new agent, and requests that the agent
	 * has dropped. Release after what it announces; the vCPU reads it with acquire.
	 */
	_Atomic uint32_t repost_count;
	/* 1: the agent sleeps, or is about to: ring the doorbell after a request. */
	_Atomic uint32_t agent_idle;
	uint32_t reserved1[14];
};

/* One exit, in a ring. */
struct gw_exit_request {
	uint64_t page;
	uint64_t flags; /* enum gw_exit_flag */
};

enum gw_exit_flag {
	GW_EXIT_WRITE = 1 << 0, /* a store, where the VMM knows */
	GW_EXIT_EXEC = 1 << 1,	/* an instruction fetch, where the VMM knows */
};

/* At vcpus_offset + index * GW_EXIT_VCPU_LEN. */
struct gw_exit_vcpu {
	/* Written by the vCPU's thread. */
	_Atomic uint32_t
		request_head;	  /* requests ever posted, modulo 2^32; release after the slot */
	_Atomic uint32_t waiting; /* 1: it sleeps, or is about to, on wake_count */
	/*
	 * What it waits for, GW_EXIT_PAGE_NONE where there is nothing. Stored before `waiting`; the
	 * agent reads them after it. A value half of an older wait costs one needless wake, or is
	 * followed by the look at the bits that finds the page.
	 */
	_Atomic uint64_t wait_pages[GW_EXIT_WAIT_COUNT];
	/* For people and metrics: faults, those that found all pages there already, time in faults. */
	_Atomic uint64_t exit_count;
	_Atomic uint64_t spurious_count;
	_Atomic uint64_t blocked_ns;
	uint64_t reserved0[4];

	/* Written by the agent, and wake_count by who kicks the vCPU too; lines of their own. */
	_Atomic uint32_t
		request_tail; /* requests taken, modulo 2^32; release after the slot was read */
	_Atomic uint32_t wake_count; /* the futex word; only ever counts up */
	uint64_t reserved1[15];

	struct gw_exit_request requests[GW_EXIT_REQUEST_COUNT];
	uint64_t reserved2[64];
};

_Static_assert(offsetof(struct gw_exit_header, repost_count) == 128, "docs/exit-channel.md");
_Static_assert(sizeof(struct gw_exit_header) == 192, "docs/exit-channel.md");
_Static_assert(offsetof(struct gw_exit_vcpu, wait_pages) == 8, "docs/exit-channel.md");
_Static_assert(offsetof(struct gw_exit_vcpu, request_tail) == 128, "docs/exit-channel.md");
_Static_assert(offsetof(struct gw_exit_vcpu, requests) == 256, "docs/exit-channel.md");
_Static_assert(sizeof(struct gw_exit_vcpu) == GW_EXIT_VCPU_LEN, "docs/exit-channel.md");
_Static_assert((GW_EXIT_REQUEST_COUNT & (GW_EXIT_REQUEST_COUNT - 1)) == 0, "a mask finds the slot");

#endif /* GW_EXIT_CHANNEL_H */
