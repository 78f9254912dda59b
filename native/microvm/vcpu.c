/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vcpu.c - see vcpu.h.
 *
 * Threads, Errors, Ownership, Units, Source: see vcpu.h.
 *
 * Stopping a vCPU. The control thread, under the lock, sets `kicked` and lets the accelerator force
 * an exit (KVM: immediate_exit, then a signal). The vCPU's thread is in one of four places:
 *   in the guest         the signal ends KVM_RUN with EINTR;
 *   about to enter it    immediate_exit was stored before the signal was sent: KVM_RUN returns at
 *                        once, there is no window in which a signal could come too early;
 *   in a hypercall       a sleep waits for `wake` with `kicked` in its condition, under the lock;
 *   in a memory fault    the handler's own `kick` wakes it.
 * Then run() completes what the exit left pending and returns, and the thread parks.
 * test_microvm_machine.c stops and starts vCPUs thousands of times over.
 */
#include "vcpu.h"

#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "accel.h"
#include "machine.h"

#define NS_PER_S	1000000000ull
#define NS_PER_US	1000ull
#define IDLE_US_MAX	1000000ull
#define VCPU_STACK_SIZE (256u << 10)

uint64_t mv_now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * NS_PER_S + (uint64_t)now.tv_nsec;
}

/* --- the thread ---------------------------------------------------------------------------------- */

/* Parks while the machine is not running. Returns false when the thread is to end. */
static bool wait_to_run(struct mv_vcpu *vcpu)
{
	struct mv_machine *machine = vcpu->machine;
	bool run;

	pthread_mutex_lock(&machine->lock);
	while (!machine->quitting && machine->state != MV_RUNNING) {
		if (!vcpu->parked) {
			vcpu->parked = true;
			machine->parked_count++;
			pthread_cond_broadcast(&machine->changed);
		}
		pthread_cond_wait(&vcpu->wake, &machine->lock);
	}
	if (vcpu->parked) {
		vcpu->parked = false;
		machine->parked_count--;
	}
	run = !machine->quitting;
	pthread_mutex_unlock(&machine->lock);
	return run;
}

static void *vcpu_main(void *argument)
{
	struct mv_vcpu *vcpu = argument;

	atomic_store_explicit(&vcpu->tid, (int)syscall(SYS_gettid), memory_order_release);
	while (wait_to_run(vcpu)) {
		struct mv_error error = {""};
		const int rc = vcpu->machine->accel->run(vcpu, &error);

		if (rc < 0)
			mv_machine_fail(vcpu->machine, vcpu, error.text);
	}
	return NULL;
}

int mv_vcpu_start(struct mv_vcpu *vcpu)
{
	pthread_attr_t attr;
	static const int kept[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT};
	sigset_t blocked, before;
	int rc;

	/* SIGTERM and its like are the control thread's; what a vCPU does itself stays its own. */
	sigfillset(&blocked);
	sigdelset(&blocked, MV_KICK_SIGNAL);
	for (size_t i = 0; i < sizeof(kept) / sizeof(kept[0]); i++)
		sigdelset(&blocked, kept[i]);
	pthread_sigmask(SIG_SETMASK, &blocked, &before);
	pthread_attr_init(&attr);
	pthread_attr_setstacksize(&attr, VCPU_STACK_SIZE);
	rc = pthread_create(&vcpu->thread, &attr, vcpu_main, vcpu);
	pthread_attr_destroy(&attr);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	vcpu->started = rc == 0;
	return -rc;
}

void mv_vcpu_kick(struct mv_vcpu *vcpu)
{
	const struct mv_fault_handler *handler = &vcpu->machine->fault_handler;

	atomic_store_explicit(&vcpu->kicked, true, memory_order_release);
	vcpu->machine->accel->kick(vcpu);
	if (handler->kick)
		handler->kick(handler->opaque, vcpu);
	pthread_cond_broadcast(&vcpu->wake);
}

void mv_vcpu_release(struct mv_vcpu *vcpu)
{
	const struct mv_fault_handler *handler = &vcpu->machine->fault_handler;

	if (handler->release)
		handler->release(handler->opaque, vcpu);
	atomic_store_explicit(&vcpu->kicked, false, memory_order_release);
	vcpu->machine->accel->release(vcpu);
	pthread_cond_broadcast(&vcpu->wake);
}

/* --- the seam ------------------------------------------------------------------------------------ */

int mv_vcpu_memory_fault(struct mv_vcpu *vcpu, const struct mv_memory_fault *fault,
			 struct mv_error *error)
{
	const struct mv_fault_handler *handler = &vcpu->machine->fault_handler;
	const uint64_t start_ns = mv_now_ns();
	int rc;

	mv_count(&vcpu->counters.fault_count, 1);
	if (!handler->handle)
		return mv_refuse(error, -EFAULT, "absent memory, and nobody who brings it");
	rc = handler->handle(handler->opaque, vcpu, fault, error);
	mv_count(&vcpu->counters.blocked_ns, mv_now_ns() - start_ns);
	return rc;
}

/* --- hypercalls ---------------------------------------------------------------------------------- */

/* Asleep until the time is over or the vCPU is kicked: a spinning vCPU would slow every pause. */
static int64_t idle(struct mv_vcpu *vcpu, uint64_t time_us)
{
	struct mv_machine *machine = vcpu->machine;
	const uint64_t start_ns = mv_now_ns();
	const uint64_t limit_us = time_us < IDLE_US_MAX ? time_us : IDLE_US_MAX;
	const uint64_t end_ns = start_ns + limit_us * NS_PER_US;
	const struct timespec end = {
		.tv_sec = (time_t)(end_ns / NS_PER_S),
		.tv_nsec = (long)(end_ns % NS_PER_S),
	};
	int rc = 0;

	pthread_mutex_lock(&machine->lock);
	while (rc == 0 && !mv_vcpu_kicked(vcpu))
		rc = pthread_cond_timedwait(&vcpu->wake, &machine->lock, &end);
	pthread_mutex_unlock(&machine->lock);
	mv_count(&vcpu->counters.idle_ns, mv_now_ns() - start_ns);
	return 0;
}

/* In the order of the beats: they are this thread's. One that cannot be written is missing there. */
static void log_beat(const struct mv_vcpu *vcpu, const struct mv_beat *beat)
{
	const struct mv_logged_beat logged = {.number = beat->number,
					      .time_ns = beat->time_ns,
					      .pid = (uint32_t)getpid(),
					      .vcpu = vcpu->id};
	ssize_t written;

	if (vcpu->machine->beat_log_fd < 0)
		return;
	written = write(vcpu->machine->beat_log_fd, &logged, sizeof(logged));
	(void)written;
}

static int64_t beat(struct mv_vcpu *vcpu, const uint64_t args[4])
{
	struct mv_machine *machine = vcpu->machine;
	struct mv_told *told = &vcpu->told;
	const struct mv_beat now = {.number = args[0], .time_ns = mv_now_ns()};
	uint64_t asked;

	pthread_mutex_lock(&machine->lock);
	if (now.number != told->last_beat.number + 1) {
		told->beat_jump_count++;
		mv_machine_event(machine,
				 "{\"event\":\"beat_jump\",\"vcpu\":%u,\"from\":%" PRIu64
				 ",\"to\":%" PRIu64 "}",
				 vcpu->id, told->last_beat.number, now.number);
	}
	if (told->first_beat.number == 0)
		told->first_beat = now;
	else if (now.time_ns - told->last_beat.time_ns > told->beat_gap_max_ns)
		told->beat_gap_max_ns = now.time_ns - told->last_beat.time_ns;
	told->last_beat = now;
	told->op_count = args[1];
	told->error_count = args[2];
	told->tick_count = args[3];
	asked = machine->sweep_asked | (machine->power_off_asked ? GM_BEAT_POWER_OFF : 0);
	pthread_mutex_unlock(&machine->lock);
	log_beat(vcpu, &now);
	return (int64_t)(asked & UINT32_MAX);
}

static int64_t power_off(struct mv_vcpu *vcpu)
{
	mv_machine_end(vcpu->machine);
	return 0;
}

static int64_t guest_error(struct mv_vcpu *vcpu, const uint64_t args[4])
{
	struct mv_machine *machine = vcpu->machine;

	pthread_mutex_lock(&machine->lock);
	vcpu->told.error_count++; /* the next beat brings the guest's own count */
	mv_machine_event(machine,
			 "{\"event\":\"guest_error\",\"vcpu\":%u,\"kind\":%" PRIu64
			 ",\"page\":%" PRId64 ",\"got\":%" PRIu64 ",\"want\":%" PRIu64 "}",
			 vcpu->id, args[0], (int64_t)args[1], args[2], args[3]);
	pthread_mutex_unlock(&machine->lock);
	return 0;
}

static int64_t filled(struct mv_vcpu *vcpu, const uint64_t args[4])
{
	struct mv_machine *machine = vcpu->machine;

	pthread_mutex_lock(&machine->lock);
	vcpu->told.filled_page_count = args[0];
	mv_machine_event(machine, "{\"event\":\"filled\",\"vcpu\":%u,\"pages\":%" PRIu64 "}",
			 vcpu->id, args[0]);
	pthread_mutex_unlock(&machine->lock);
	return 0;
}

static int64_t verified(struct mv_vcpu *vcpu, const uint64_t args[4])
{
	struct mv_machine *machine = vcpu->machine;

	pthread_mutex_lock(&machine->lock);
	vcpu->told.sweep_number = args[0];
	vcpu->told.sweep_page_count = args[1];
	vcpu->told.sweep_error_count = args[2];
	vcpu->told.sweep_op_count = args[3];
	mv_machine_notify(machine);
	pthread_mutex_unlock(&machine->lock);
	return 0;
}

static int64_t measured(struct mv_vcpu *vcpu, const uint64_t args[4])
{
	struct mv_machine *machine = vcpu->machine;

	pthread_mutex_lock(&machine->lock);
	vcpu->touches.span_ticks = args[3] - args[2];
	/* A guest that claims more touches than there are pages gets the time it asks for, and no more. */
	for (uint64_t i = 0; i < args[1] && i < machine->memory.size / GM_PAGE_SIZE; i++)
		gw_histogram_record(&vcpu->touches.ticks, args[0]);
	pthread_mutex_unlock(&machine->lock);
	return 0;
}

int64_t mv_vcpu_hypercall(struct mv_vcpu *vcpu, uint32_t call, const uint64_t args[4])
{
	mv_count(&vcpu->counters.hypercall_count, 1);
	switch (call) {
	case GM_CALL_BEAT:
		return beat(vcpu, args);
	case GM_CALL_IDLE:
		return idle(vcpu, args[0]);
	case GM_CALL_ERROR:
		return guest_error(vcpu, args);
	case GM_CALL_FILLED:
		return filled(vcpu, args);
	case GM_CALL_VERIFIED:
		return verified(vcpu, args);
	case GM_CALL_MEASURED:
		return measured(vcpu, args);
	case GM_CALL_POWER_OFF:
		return power_off(vcpu);
	default:
		return -ENOSYS;
	}
}
