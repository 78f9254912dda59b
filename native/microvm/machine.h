/* SPDX-License-Identifier: Apache-2.0 */
/*
 * machine.h - the virtual machine: its memory, its vCPUs, and what may be done to it when.
 *
 *   INCOMING --load--> PAUSED --resume--> RUNNING --pause--> PAUSED ...   any --error--> FAILED
 *                                         RUNNING --the guest powers itself off--> ENDED
 *
 * Threads: one control thread calls the functions; vCPU threads call those below the line.
 * Errors: 0 or -errno, with words. What is refused changes nothing.
 * Ownership: create makes everything, destroy stops the vCPUs and frees everything; a named memory
 *            file stays behind.
 * Units: bytes, nanoseconds.
 * Source: native/microvm/README.md.
 */
#ifndef MV_MACHINE_H
#define MV_MACHINE_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "error.h"
#include "faults.h"
#include "memory.h"
#include "vcpu.h"

#define MV_ACCEL_RULE_COUNT_MAX 16u
#define MV_EVENT_COUNT_MAX	64u
#define MV_EVENT_LEN_MAX	320u
#define MV_SWEEP_MAX		0x7FFFFFFFull /* a hypercall's answer has 32 bits */

enum mv_accel {
	MV_ACCEL_AUTO = 0, /* KVM, or threads where KVM cannot be used */
	MV_ACCEL_KVM = 1,
	MV_ACCEL_THREAD = 2,
};

enum mv_state {
	MV_INCOMING = 1,
	MV_PAUSED = 2,
	MV_RUNNING = 3,
	MV_FAILED = 4,
	MV_ENDED = 5,
};

/* A record of --beat-log, in the order of CLOCK_MONOTONIC for each vCPU. Append only. */
struct mv_logged_beat {
	uint64_t number;
	uint64_t time_ns;
	uint32_t pid; /* of the VMM */
	uint32_t vcpu;
};
_Static_assert(sizeof(struct mv_logged_beat) == 24, "readers of the file know it");

struct mv_machine_config {
	struct mv_memory_config memory; /* incoming is in there */
	struct mv_faults_config faults; /* with a socket_path: memory comes through an agent */
	enum mv_accel accel;
	uint32_t vcpu_count;	 /* 1..GM_VCPU_COUNT_MAX */
	uint32_t workload;	 /* enum gm_workload; this and what follows is not for --incoming */
	uint32_t tick_us;	 /* 200..1000000 */
	uint64_t work_offset;	 /* 0 = GM_WORK_OFFSET; where the workload's pages begin */
	uint64_t work_bytes;	 /* 0 = half of the memory */
	uint64_t op_count_per_s; /* of each vCPU; 0 = no limit */
	uint64_t seed;
	const char *beat_log; /* file that every heartbeat is appended to; NULL: none */
	bool paused;	      /* start a new guest paused */
};

/* Lines for the outside, in order; the control thread takes them out. */
struct mv_events {
	char lines[MV_EVENT_COUNT_MAX][MV_EVENT_LEN_MAX];
	uint32_t first;
	uint32_t count;
	uint64_t lost_count;
};

/* What a state blob carries besides an accelerator's sections. */
struct mv_machine_book {
	uint64_t sweep_asked;
	uint64_t reserved[7];
};
_Static_assert(sizeof(struct mv_machine_book) == 64, "in state blobs");

struct mv_vcpu_book {
	uint64_t beat_number;
	uint64_t op_count;
	uint64_t error_count;
	uint64_t tick_count;
	uint64_t sweep_number;
	uint64_t sweep_page_count;
	uint64_t sweep_error_count;
	uint64_t sweep_op_count;
};
_Static_assert(sizeof(struct mv_vcpu_book) == 64, "in state blobs");

struct mv_machine {
	struct mv_machine_config config;
	struct mv_memory memory;
	const struct mv_accel_ops *accel;
	void *accel_data;
	bool has_exits;	    /* by the accelerator: a vCPU's fault can leave the guest */
	uint64_t made_tick; /* gm_tick() and mv_now_ns() of one moment */
	uint64_t made_ns;
	char accel_reason[MV_ERROR_LEN_MAX]; /* why not KVM; empty if it is, or was not asked for */
	struct mv_faults *faults;	     /* NULL: without an agent */
	struct mv_fault_handler fault_handler;
	int notify_fd;	 /* eventfd: readable when an event came or a sweep ended */
	int beat_log_fd; /* -1: no log. A record is one write to it: O_APPEND keeps them whole */
	struct mv_vcpu *vcpus;

	/* Guards everything below, and what vcpu.h says. Held for moments, never across a sleep. */
	pthread_mutex_t lock;
	pthread_cond_t changed; /* a vCPU parked */
	enum mv_state state;
	uint32_t parked_count;
	bool quitting;
	uint64_t sweep_asked;
	bool power_off_asked;
	uint64_t pause_ns; /* how long the last pause took until every vCPU was parked */
	struct mv_events events;
	char failure[MV_ERROR_LEN_MAX];
};

/*
 * Makes the machine, its vCPUs parked; a new guest is then resumed, unless config.paused.
 *
 * Returns 0; -EINVAL; -ENODEV --accel kvm and KVM cannot be used; or what memory.h says.
 */
int mv_machine_create(const struct mv_machine_config *config, struct mv_machine **ret_machine,
		      struct mv_error *error);

/*
 * Stops every vCPU. If one does not stop in time (it may be asleep in the kernel on absent memory),
 * those that did run on.
 *
 * Returns 0, also if it is paused already; -EBUSY wrong state; -ETIMEDOUT.
 */
int mv_machine_pause(struct mv_machine *machine, uint64_t timeout_ns, struct mv_error *error);

/* Returns 0, also if it is running already; -EBUSY wrong state. */
int mv_machine_resume(struct mv_machine *machine, struct mv_error *error);

/* The state as bytes, which the caller frees. Returns 0; -EBUSY not paused; -ENOMEM; -errno. */
int mv_machine_save(struct mv_machine *machine, uint8_t **ret_bytes, size_t *ret_len,
		    struct mv_error *error);

/*
 * Loads a state into an incoming machine, which is then paused.
 *
 * Returns 0; -EBUSY not incoming; -EBADMSG the blob is not one, or not for this machine: nothing
 * has changed; another -errno: KVM refused half-way, the machine has FAILED.
 */
int mv_machine_load(struct mv_machine *machine, const uint8_t *bytes, size_t len,
		    struct mv_error *error);

/*
 * Asks the guest to check every page and every sum; it does so by itself, while it runs. Returns 0
 * and the sweep's number, which every vCPU's told.sweep_number will reach; -EBUSY not running; a
 * sweep that is on is joined.
 */
int mv_machine_ask_sweep(struct mv_machine *machine, uint64_t *ret_number, struct mv_error *error);

/* True if every vCPU has finished sweep `number`. */
bool mv_machine_swept(struct mv_machine *machine, uint64_t number);

/*
 * Presses the power button: the guest ends itself at its next heartbeat, and the machine is ENDED.
 * Returns 0, also if it has ended already; -EBUSY not running.
 */
int mv_machine_power_off(struct mv_machine *machine, struct mv_error *error);

/* True if the machine has FAILED, and why. */
bool mv_machine_failed(struct mv_machine *machine, struct mv_error *ret_why);

/* Takes the oldest event out, NUL-terminated; false if there is none. */
bool mv_machine_take_event(struct mv_machine *machine, char ret_line[MV_EVENT_LEN_MAX]);

/* Stops and joins the vCPUs, frees everything. NULL is a no-op. */
void mv_machine_destroy(struct mv_machine *machine);

const char *mv_state_name(enum mv_state state);

/* Under the lock: -EBUSY, and that `what` cannot be in this state. */
int mv_machine_refuse(const struct mv_machine *machine, const char *what, struct mv_error *error);

/* --- called by vCPU threads --------------------------------------------------------------------- */

/* Under the lock: one line of JSON for the outside. */
void mv_machine_event(struct mv_machine *machine, const char *format, ...)
	__attribute__((format(printf, 2, 3)));

/* Without the lock: this vCPU cannot go on; everybody stops and the guest is held. */
void mv_machine_fail(struct mv_machine *machine, const struct mv_vcpu *vcpu, const char *why);

/* Without the lock: the guest has powered itself off. */
void mv_machine_end(struct mv_machine *machine);

/* Without the lock: true if no vCPU is ever to run again. */
bool mv_machine_over(struct mv_machine *machine);

/* Wakes whoever polls notify_fd. */
void mv_machine_notify(struct mv_machine *machine);

#endif
