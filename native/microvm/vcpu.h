/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vcpu.h - one vCPU: its thread, its hypercalls, its stops and starts, and the seam where a fault
 * on absent memory leaves the guest.
 *
 * Threads: each vCPU has one thread, which alone runs the guest. What the control thread does to it
 *          goes through the machine's lock, and `kicked`, which is read without it.
 * Errors: 0 or -errno. What a vCPU cannot go on from fails the machine: its guest is held.
 * Ownership: the machine owns its vCPUs; an accelerator owns `accel_data`.
 * Units: nanoseconds of CLOCK_MONOTONIC, which all processes of a host share.
 * Source: guest/layout.h for the hypercalls.
 */
#ifndef MV_VCPU_H
#define MV_VCPU_H

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include <godwit/stats.h>

#include "error.h"
#include "guest/layout.h"

/* Ends KVM_RUN. Its handler does nothing; nobody else may use it in this process. */
#define MV_KICK_SIGNAL SIGRTMIN

struct mv_machine;

struct mv_beat {
	uint64_t number; /* 0 = none yet */
	uint64_t time_ns;
};

/* What the guest told, guarded by the machine's lock. */
struct mv_told {
	uint64_t op_count;
	uint64_t error_count;
	uint64_t tick_count;
	struct mv_beat first_beat; /* in this process */
	struct mv_beat last_beat;  /* number: in any process, the state carries it over */
	uint64_t beat_gap_max_ns;  /* longest time between two beats in this process */
	uint64_t beat_jump_count;  /* beats that did not follow their predecessor's number */
	uint64_t filled_page_count;
	uint64_t sweep_number; /* of the last sweep that this vCPU finished */
	uint64_t sweep_page_count;
	uint64_t sweep_error_count;
	uint64_t sweep_op_count;
};

/* What this process counted; only the vCPU's thread writes them, anyone may read. */
struct mv_vcpu_counters {
	_Atomic uint64_t exit_count; /* returns of KVM_RUN, or steps' ends */
	_Atomic uint64_t hypercall_count;
	_Atomic uint64_t interrupted_count; /* exits because of a kick or another signal */
	_Atomic uint64_t fault_count;	    /* exits on absent memory */
	_Atomic uint64_t spurious_count;    /* of them, those where nothing was absent any more */
	_Atomic uint64_t blocked_ns;	    /* asleep on absent memory, by those exits */
	_Atomic uint64_t idle_ns;	    /* asleep because the guest asked for it */
};

/* First touches that the guest has timed (--workload measure), guarded by the machine's lock. */
struct mv_touches {
	uint64_t span_ticks; /* from the first one's start to the last one's end */
	struct gw_histogram ticks;
};

struct mv_vcpu {
	struct mv_machine *machine;
	uint32_t id;
	pthread_t thread;
	bool started; /* thread is valid */
	_Atomic int tid;
	/*
	 * Set under the lock by who wants the vCPU parked, read by its thread before each entry and
	 * each sleep. Release and acquire, but what really orders it is the lock: a vCPU parks and
	 * leaves only under it.
	 */
	_Atomic bool kicked;
	bool parked; /* guarded by the lock: its thread runs no guest code and touches no state */
	pthread_cond_t wake; /* with the lock: kicked, or resumed */
	struct mv_told told;
	struct mv_vcpu_counters counters;
	struct mv_touches touches;
	void *accel_data;
};

enum mv_fault_kind {
	/* KVM_RUN = EFAULT and nothing more: the handler has to find the address. */
	MV_FAULT_BARE = 1,
	/* The address is known: KVM_EXIT_MEMORY_FAULT with USERFAULT, or a thread's signal. */
	MV_FAULT_EXIT = 2,
	/* KVM's emulator gave up, perhaps because a page is absent. None is: -ENODATA. */
	MV_FAULT_EMULATOR = 3,
};

struct mv_memory_fault {
	enum mv_fault_kind kind;
	uint64_t gpa; /* of MV_FAULT_EXIT */
};

/*
 * THE SEAM for vCPU userfault exits. Called on the vCPU's thread, outside of the guest, with no
 * lock held; the vCPU's registers are at the faulting instruction and may be read. It makes the
 * page present, or sleeps until somebody has.
 *
 * Returns 0: enter the guest again, which repeats the instruction; -EINTR: the vCPU was kicked
 * while the page is still absent (mv_vcpu_kicked; `kick` of the machine's fault_handler wakes the
 * sleeper): it parks, and the fault happens again after the resume, wherever that is; any other
 * -errno, with words: the machine fails and the guest is held.
 */
struct mv_fault_handler {
	int (*handle)(void *opaque, struct mv_vcpu *vcpu, const struct mv_memory_fault *fault,
		      struct mv_error *error);
	void (*kick)(void *opaque, struct mv_vcpu *vcpu); /* may be NULL; any thread, lock held */
	void (*release)(void *opaque, struct mv_vcpu *vcpu); /* takes a kick back; the same */
	void *opaque;
};

/* --- for the machine --- */

/* Starts the thread, parked. Returns 0 or -errno. */
int mv_vcpu_start(struct mv_vcpu *vcpu);

/* Under the lock: tells the vCPU to stop, wherever it is. It will park. */
void mv_vcpu_kick(struct mv_vcpu *vcpu);

/* Under the lock: lets it run again. */
void mv_vcpu_release(struct mv_vcpu *vcpu);

/* --- for accelerators, on the vCPU's thread --- */

static inline bool mv_vcpu_kicked(const struct mv_vcpu *vcpu)
{
	return atomic_load_explicit(&vcpu->kicked, memory_order_acquire);
}

static inline void mv_count(_Atomic uint64_t *counter, uint64_t more)
{
	/* One writer: a load and a store are enough, and cheaper than a locked add. */
	atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + more,
			      memory_order_relaxed);
}

/* Answers the guest. Returns what eax is to hold, or -ENOSYS for a call that there is not. */
int64_t mv_vcpu_hypercall(struct mv_vcpu *vcpu, uint32_t call, const uint64_t args[4]);

/* Passes a fault to the machine's fault_handler; -EFAULT if there is none. */
int mv_vcpu_memory_fault(struct mv_vcpu *vcpu, const struct mv_memory_fault *fault,
			 struct mv_error *error);

uint64_t mv_now_ns(void);

#endif
