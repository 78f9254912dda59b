/* SPDX-License-Identifier: Apache-2.0 */
/*
 * machine.c - see machine.h.
 *
 * Threads, Errors, Ownership, Units, Source: see machine.h.
 */
#include "machine.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "accel.h"
#include "guest/platform.h"

#define NS_PER_S    1000000000ull
#define US_PER_S    1000000ull
#define TICK_US_MIN 200u /* KVM's own lower limit for the LAPIC timer */
#define TICK_US_MAX 1000000u

const char *mv_state_name(enum mv_state state)
{
	switch (state) {
	case MV_INCOMING:
		return "incoming";
	case MV_PAUSED:
		return "paused";
	case MV_RUNNING:
		return "running";
	case MV_FAILED:
		return "failed";
	case MV_ENDED:
		return "ended";
	}
	return "unknown";
}

/* --- events ------------------------------------------------------------------------------------- */

void mv_machine_notify(struct mv_machine *machine)
{
	const uint64_t one = 1;
	/* Fails only when the counter is full: then it is readable anyway. */
	const ssize_t written = write(machine->notify_fd, &one, sizeof(one));

	(void)written;
}

void mv_machine_event(struct mv_machine *machine, const char *format, ...)
{
	struct mv_events *events = &machine->events;
	va_list args;

	if (events->count == MV_EVENT_COUNT_MAX) {
		events->lost_count++;
		return;
	}
	va_start(args, format);
	/* NOLINTNEXTLINE(clang-analyzer-valist.Uninitialized): false when one run checks many files */
	(void)vsnprintf(events->lines[(events->first + events->count) % MV_EVENT_COUNT_MAX],
			MV_EVENT_LEN_MAX, format, args);
	va_end(args);
	events->count++;
	mv_machine_notify(machine);
}

bool mv_machine_take_event(struct mv_machine *machine, char ret_line[MV_EVENT_LEN_MAX])
{
	struct mv_events *events = &machine->events;
	bool there;

	pthread_mutex_lock(&machine->lock);
	there = events->count > 0;
	if (there) {
		memcpy(ret_line, events->lines[events->first], MV_EVENT_LEN_MAX);
		events->first = (events->first + 1) % MV_EVENT_COUNT_MAX;
		events->count--;
	}
	pthread_mutex_unlock(&machine->lock);
	return there;
}

/* --- stopping and going on, under the lock -------------------------------------------------------- */

static void kick_all(struct mv_machine *machine)
{
	for (uint32_t i = 0; i < machine->config.vcpu_count; i++)
		mv_vcpu_kick(&machine->vcpus[i]);
}

static void release_all(struct mv_machine *machine)
{
	for (uint32_t i = 0; i < machine->config.vcpu_count; i++)
		mv_vcpu_release(&machine->vcpus[i]);
}

void mv_machine_fail(struct mv_machine *machine, const struct mv_vcpu *vcpu, const char *why)
{
	pthread_mutex_lock(&machine->lock);
	if (machine->state != MV_FAILED) {
		(void)snprintf(machine->failure, sizeof(machine->failure), "vCPU %u: %s", vcpu->id,
			       why);
		machine->state = MV_FAILED;
		/* The reason is our own text: nothing in it needs escaping. */
		mv_machine_event(machine, "{\"event\":\"failed\",\"reason\":\"%s\"}",
				 machine->failure);
		kick_all(machine);
		pthread_cond_broadcast(&machine->changed);
	}
	pthread_mutex_unlock(&machine->lock);
}

void mv_machine_end(struct mv_machine *machine)
{
	pthread_mutex_lock(&machine->lock);
	if (machine->state == MV_RUNNING) {
		machine->state = MV_ENDED;
		mv_machine_event(machine, "{\"event\":\"ended\"}");
		kick_all(machine);
		pthread_cond_broadcast(&machine->changed);
	}
	pthread_mutex_unlock(&machine->lock);
}

int mv_machine_refuse(const struct mv_machine *machine, const char *what, struct mv_error *error)
{
	if (machine->state == MV_FAILED)
		return mv_refuse(error, -EBUSY, "%s: the machine has failed: %s", what,
				 machine->failure);
	return mv_refuse(error, -EBUSY, "%s: the machine is %s", what,
			 mv_state_name(machine->state));
}

bool mv_machine_failed(struct mv_machine *machine, struct mv_error *ret_why)
{
	bool failed;

	pthread_mutex_lock(&machine->lock);
	failed = machine->state == MV_FAILED;
	if (failed)
		memcpy(ret_why->text, machine->failure, sizeof(ret_why->text));
	pthread_mutex_unlock(&machine->lock);
	return failed;
}

bool mv_machine_over(struct mv_machine *machine)
{
	bool over;

	pthread_mutex_lock(&machine->lock);
	over = machine->quitting || machine->state == MV_FAILED || machine->state == MV_ENDED;
	pthread_mutex_unlock(&machine->lock);
	return over;
}

static int wait_parked(struct mv_machine *machine, uint64_t timeout_ns, struct mv_error *error)
{
	const uint64_t end_ns = mv_now_ns() + timeout_ns;
	const struct timespec end = {
		.tv_sec = (time_t)(end_ns / NS_PER_S),
		.tv_nsec = (long)(end_ns % NS_PER_S),
	};
	int rc = 0;

	while (rc == 0 && machine->state == MV_PAUSED &&
	       machine->parked_count < machine->config.vcpu_count)
		rc = pthread_cond_timedwait(&machine->changed, &machine->lock, &end);
	if (machine->state == MV_FAILED)
		return mv_machine_refuse(machine, "pause", error);
	if (machine->parked_count == machine->config.vcpu_count)
		return 0;
	return mv_refuse(error, -ETIMEDOUT,
			 "pause: %u of %u vCPUs stopped in %llu ms; the others may wait for memory",
			 machine->parked_count, machine->config.vcpu_count,
			 (unsigned long long)(timeout_ns / 1000000));
}

int mv_machine_pause(struct mv_machine *machine, uint64_t timeout_ns, struct mv_error *error)
{
	const uint64_t start_ns = mv_now_ns();
	int rc = 0;

	pthread_mutex_lock(&machine->lock);
	if (machine->state == MV_RUNNING) {
		machine->state = MV_PAUSED;
		kick_all(machine);
		rc = wait_parked(machine, timeout_ns, error);
		if (rc == -ETIMEDOUT) {
			machine->state = MV_RUNNING;
			release_all(machine);
		}
		machine->pause_ns = mv_now_ns() - start_ns;
	} else if (machine->state != MV_PAUSED) {
		rc = mv_machine_refuse(machine, "pause", error);
	}
	pthread_mutex_unlock(&machine->lock);
	return rc;
}

int mv_machine_resume(struct mv_machine *machine, struct mv_error *error)
{
	int rc = 0;

	pthread_mutex_lock(&machine->lock);
	if (machine->state == MV_PAUSED) {
		machine->state = MV_RUNNING;
		release_all(machine);
	} else if (machine->state != MV_RUNNING) {
		rc = mv_machine_refuse(machine, "resume", error);
	}
	pthread_mutex_unlock(&machine->lock);
	return rc;
}

int mv_machine_power_off(struct mv_machine *machine, struct mv_error *error)
{
	int rc = 0;

	pthread_mutex_lock(&machine->lock);
	if (machine->state == MV_RUNNING)
		machine->power_off_asked = true;
	else if (machine->state != MV_ENDED)
		rc = mv_machine_refuse(machine, "power-off", error);
	pthread_mutex_unlock(&machine->lock);
	return rc;
}

/* --- sweeps -------------------------------------------------------------------------------------- */

static bool swept_by_all(const struct mv_machine *machine, uint64_t number)
{
	for (uint32_t i = 0; i < machine->config.vcpu_count; i++)
		if (machine->vcpus[i].told.sweep_number < number)
			return false;
	return true;
}

int mv_machine_ask_sweep(struct mv_machine *machine, uint64_t *ret_number, struct mv_error *error)
{
	int rc = 0;

	pthread_mutex_lock(&machine->lock);
	if (machine->state != MV_RUNNING) {
		rc = mv_machine_refuse(machine, "verify", error);
	} else if (machine->sweep_asked >= MV_SWEEP_MAX) {
		rc = mv_refuse(error, -EBUSY, "verify: no sweep numbers left");
	} else {
		/* A sweep is a meeting of all vCPUs: a new one only when the last is over everywhere. */
		if (swept_by_all(machine, machine->sweep_asked))
			machine->sweep_asked++;
		*ret_number = machine->sweep_asked;
	}
	pthread_mutex_unlock(&machine->lock);
	return rc;
}

bool mv_machine_swept(struct mv_machine *machine, uint64_t number)
{
	bool swept;

	pthread_mutex_lock(&machine->lock);
	swept = swept_by_all(machine, number);
	pthread_mutex_unlock(&machine->lock);
	return swept;
}

/* --- birth and death ----------------------------------------------------------------------------- */

static uint64_t work_offset(const struct mv_machine_config *config)
{
	return config->work_offset > 0 ? config->work_offset : GM_WORK_OFFSET;
}

static uint64_t work_bytes(const struct mv_machine_config *config)
{
	return config->work_bytes > 0 ? config->work_bytes : config->memory.size / 2;
}

static int check_work(const struct mv_machine_config *config, struct mv_error *error)
{
	const uint64_t offset = work_offset(config);

	if (config->memory.size < GM_MEMORY_BYTES_MIN)
		return 0; /* memory.c has words for that */
	if (offset < GM_WORK_OFFSET || offset % GM_PAGE_SIZE != 0 || offset > config->memory.size)
		return mv_refuse(error, -EINVAL,
				 "the workload begins at a page between %llu and %llu",
				 (unsigned long long)GM_WORK_OFFSET,
				 (unsigned long long)config->memory.size);
	if (work_bytes(config) > config->memory.size - offset)
		return mv_refuse(error, -EINVAL, "the workload does not fit: at most %llu bytes",
				 (unsigned long long)(config->memory.size - offset));
	if (work_bytes(config) / GM_PAGE_SIZE < 4ull * config->vcpu_count)
		return mv_refuse(error, -EINVAL, "the workload needs 4 pages a vCPU at least");
	return 0;
}

static int check_config(const struct mv_machine_config *config, struct mv_error *error)
{
	if (config->vcpu_count < 1 || config->vcpu_count > GM_VCPU_COUNT_MAX)
		return mv_refuse(error, -EINVAL, "1 to %u vCPUs, not %u", GM_VCPU_COUNT_MAX,
				 config->vcpu_count);
	if (config->faults.socket_path && !config->memory.incoming)
		return mv_refuse(error, -EINVAL, "--fault-socket is for --incoming");
	if (config->memory.incoming)
		return 0;
	if (config->workload < GM_WORKLOAD_VERIFY || config->workload > GM_WORKLOAD_MEASURE)
		return mv_refuse(error, -EINVAL, "no workload %u", config->workload);
	if (config->tick_us < TICK_US_MIN || config->tick_us > TICK_US_MAX)
		return mv_refuse(error, -EINVAL, "a tick is %u to %u microseconds, not %u",
				 TICK_US_MIN, TICK_US_MAX, config->tick_us);
	return check_work(config, error);
}

static void write_boot(struct mv_machine *machine)
{
	const struct mv_machine_config *config = &machine->config;
	const uint64_t page_count = work_bytes(config) / GM_PAGE_SIZE;
	const uint64_t ops = config->op_count_per_s * config->tick_us / US_PER_S;
	struct gm_boot *boot = (struct gm_boot *)(machine->memory.base + GM_BOOT_GPA);

	*boot = (struct gm_boot){
		.magic = GM_BOOT_MAGIC,
		.abi_version = GM_ABI_VERSION,
		.vcpu_count = config->vcpu_count,
		.workload = config->workload,
		.tick_us = config->tick_us,
		.memory_bytes = machine->memory.size,
		.work_offset = work_offset(config),
		.work_page_count = page_count,
		.shared_page_count = page_count / 4,
		/* At least one a tick: a limit must not become "no limit". */
		.op_count_per_tick = config->op_count_per_s > 0 && ops == 0 ? 1 : ops,
		.seed = config->seed,
	};
}

static int init_sync(struct mv_machine *machine)
{
	pthread_condattr_t attr;

	pthread_mutex_init(&machine->lock, NULL);
	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(&machine->changed, &attr);
	for (uint32_t i = 0; i < machine->config.vcpu_count; i++) {
		machine->vcpus[i].machine = machine;
		machine->vcpus[i].id = i;
		pthread_cond_init(&machine->vcpus[i].wake, &attr);
	}
	pthread_condattr_destroy(&attr);
	machine->notify_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	return machine->notify_fd < 0 ? -errno : 0;
}

/* Created: whoever reads it may open it later. */
static int open_beat_log(struct mv_machine *machine, struct mv_error *error)
{
	const char *path = machine->config.beat_log;

	if (!path)
		return 0;
	machine->beat_log_fd = open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
	return machine->beat_log_fd < 0 ? mv_refuse_errno(error, -errno, "%.128s", path) : 0;
}

static struct mv_machine *allocate(const struct mv_machine_config *config)
{
	struct mv_machine *machine = calloc(1, sizeof(*machine));

	if (!machine)
		return NULL;
	machine->vcpus = calloc(config->vcpu_count, sizeof(*machine->vcpus));
	if (!machine->vcpus) {
		free(machine);
		return NULL;
	}
	machine->config = *config;
	machine->memory.fd = -1;
	machine->notify_fd = -1;
	machine->beat_log_fd = -1;
	machine->made_tick = gm_tick();
	machine->made_ns = mv_now_ns();
	machine->state = config->memory.incoming ? MV_INCOMING : MV_PAUSED;
	return machine;
}

/* The accelerator that was asked for, or the first that can be used. */
static int choose_accel(struct mv_machine *machine, struct mv_error *error)
{
	const enum mv_accel wanted = machine->config.accel;
	int rc;

	if (wanted != MV_ACCEL_THREAD) {
		machine->accel = &mv_accel_kvm;
		rc = machine->accel->create(machine, error);
		if (rc == 0 || wanted == MV_ACCEL_KVM)
			return rc;
		machine->accel->destroy(machine);
		memcpy(machine->accel_reason, error->text, sizeof(machine->accel_reason));
	}
	machine->accel = &mv_accel_thread;
	return machine->accel->create(machine, error);
}

static int start_threads(struct mv_machine *machine, struct mv_error *error)
{
	for (uint32_t i = 0; i < machine->config.vcpu_count; i++) {
		const int rc = mv_vcpu_start(&machine->vcpus[i]);

		if (rc < 0)
			return mv_refuse_errno(error, rc, "start the thread of vCPU %u", i);
	}
	return 0;
}

/* The guest gets its memory when it is settled how that gives faults, and the agent after it. */
static int attach_memory(struct mv_machine *machine, struct mv_error *error)
{
	const bool by_agent = machine->config.faults.socket_path;
	int rc = by_agent ? mv_faults_create(machine, error) : 0;

	if (rc == 0)
		rc = machine->accel->attach(machine, error);
	if (rc == 0 && by_agent)
		rc = mv_faults_connect(machine, error);
	return rc;
}

static int build(struct mv_machine *machine, struct mv_error *error)
{
	int rc = init_sync(machine);

	if (rc < 0)
		return mv_refuse_errno(error, rc, "eventfd");
	rc = open_beat_log(machine, error);
	if (rc == 0)
		rc = mv_memory_create(&machine->config.memory, &machine->memory, error);
	if (rc == 0)
		rc = choose_accel(machine, error);
	if (rc == 0)
		rc = attach_memory(machine, error);
	if (rc == 0 && machine->state != MV_INCOMING) {
		write_boot(machine);
		rc = machine->accel->boot(machine, error);
	}
	if (rc == 0)
		rc = start_threads(machine, error);
	return rc;
}

int mv_machine_create(const struct mv_machine_config *config, struct mv_machine **ret_machine,
		      struct mv_error *error)
{
	struct mv_machine *machine;
	int rc = check_config(config, error);

	if (rc < 0)
		return rc;
	machine = allocate(config);
	if (!machine)
		return mv_refuse_errno(error, -ENOMEM, "make the machine");
	rc = build(machine, error);
	if (rc == 0 && machine->state == MV_PAUSED && !config->paused)
		rc = mv_machine_resume(machine, error);
	if (rc < 0) {
		mv_machine_destroy(machine);
		return rc;
	}
	*ret_machine = machine;
	return 0;
}

void mv_machine_destroy(struct mv_machine *machine)
{
	if (!machine)
		return;
	pthread_mutex_lock(&machine->lock);
	machine->quitting = true;
	if (machine->accel)
		kick_all(machine);
	pthread_mutex_unlock(&machine->lock);
	for (uint32_t i = 0; i < machine->config.vcpu_count; i++)
		if (machine->vcpus[i].started)
			pthread_join(machine->vcpus[i].thread, NULL);
	mv_faults_destroy(machine->faults);
	if (machine->accel)
		machine->accel->destroy(machine);
	mv_memory_destroy(&machine->memory);
	if (machine->notify_fd >= 0)
		close(machine->notify_fd);
	if (machine->beat_log_fd >= 0)
		close(machine->beat_log_fd);
	for (uint32_t i = 0; i < machine->config.vcpu_count; i++)
		pthread_cond_destroy(&machine->vcpus[i].wake);
	pthread_cond_destroy(&machine->changed);
	pthread_mutex_destroy(&machine->lock);
	free(machine->vcpus);
	free(machine);
}
