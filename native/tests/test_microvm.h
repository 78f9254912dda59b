/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_microvm.h - what the tests of whole machines share: making, watching and moving them.
 *
 * Threads: one test thread, which is the machines' control thread.
 * Errors: a failed check ends the process; waits end it after WAIT_MS.
 * Ownership: machines belong to the test.
 * Units: none.
 * Source: machine.h.
 */
#ifndef GODWIT_TESTS_TEST_MICROVM_H
#define GODWIT_TESTS_TEST_MICROVM_H

#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <sys/mman.h>
#include <unistd.h>

#include "accel.h"
#include "check.h"
#include "machine.h"

#define WAIT_MS	     100000
#define MEMORY_BYTES (64ull << 20)
#define WORK_BYTES   (2ull << 20)
#define WORK_PAGES   (WORK_BYTES / GM_PAGE_SIZE)
#define PAUSE_NS     60000000000ull
#define COPY_LEN     (1u << 20)
#define EVENT_FAILED "\"event\":\"failed\""
#define EVENT_GUEST  "\"event\":\"guest_error\""
#define EVENT_FILLED "\"event\":\"filled\""

/* What a machine has said so far. */
struct watch {
	uint32_t filled;
	uint32_t guest_errors;
	uint32_t failed;
	uint32_t others;
};

static inline struct mv_machine_config test_config(enum mv_accel accel, uint32_t vcpu_count)
{
	return (struct mv_machine_config){
		.memory = {.size = MEMORY_BYTES},
		.accel = accel,
		.vcpu_count = vcpu_count,
		.workload = GM_WORKLOAD_VERIFY,
		.tick_us = 1000,
		.work_bytes = WORK_BYTES,
		.seed = vcpu_count,
	};
}

static inline struct mv_machine *test_machine(const struct mv_machine_config *config)
{
	struct mv_machine *machine = NULL;
	struct mv_error error;
	const int rc = mv_machine_create(config, &machine, &error);

	if (rc < 0)
		fprintf(stderr, "mv_machine_create: %d %s\n", rc, error.text);
	CHECK_EQ(rc, 0);
	return machine;
}

static inline void watch_events(struct mv_machine *machine, struct watch *watch)
{
	char line[MV_EVENT_LEN_MAX];

	while (mv_machine_take_event(machine, line)) {
		if (strstr(line, EVENT_FILLED)) {
			watch->filled++;
			continue;
		}
		if (strstr(line, EVENT_GUEST))
			watch->guest_errors++;
		else if (strstr(line, EVENT_FAILED))
			watch->failed++;
		else
			watch->others++;
		fprintf(stderr, "event: %s\n", line);
	}
}

/* Until the machine says something; no sleep stands for that. */
static inline void await_notice(struct mv_machine *machine)
{
	struct pollfd poller = {.fd = machine->notify_fd, .events = POLLIN};
	uint64_t count;

	CHECK_EQ(poll(&poller, 1, WAIT_MS), 1);
	CHECK_EQ(read(machine->notify_fd, &count, sizeof(count)), sizeof(count));
}

static inline void await_filled(struct mv_machine *machine, struct watch *watch)
{
	for (watch_events(machine, watch); watch->filled < machine->config.vcpu_count;
	     watch_events(machine, watch))
		await_notice(machine);
}

static inline void await_failed(struct mv_machine *machine, struct watch *watch)
{
	for (watch_events(machine, watch); watch->failed == 0; watch_events(machine, watch))
		await_notice(machine);
}

static inline uint64_t ask_sweep(struct mv_machine *machine)
{
	struct mv_error error;
	uint64_t number;

	CHECK_EQ(mv_machine_ask_sweep(machine, &number, &error), 0);
	return number;
}

/* The end of a sweep; returns the errors that its vCPUs have found in their lives. */
static inline uint64_t await_sweep(struct mv_machine *machine, uint64_t number)
{
	struct watch watch = {0};
	uint64_t pages = 0, errors = 0;

	while (!mv_machine_swept(machine, number)) {
		await_notice(machine);
		watch_events(machine, &watch);
		CHECK_EQ(watch.failed, 0);
	}
	pthread_mutex_lock(&machine->lock);
	for (uint32_t i = 0; i < machine->config.vcpu_count; i++) {
		pages += machine->vcpus[i].told.sweep_page_count;
		errors += machine->vcpus[i].told.error_count;
		errors += machine->vcpus[i].told.sweep_error_count;
		CHECK_EQ(machine->vcpus[i].told.beat_jump_count, 0);
	}
	pthread_mutex_unlock(&machine->lock);
	CHECK_EQ(pages, WORK_PAGES);
	return errors;
}

static inline uint64_t sweep(struct mv_machine *machine)
{
	return await_sweep(machine, ask_sweep(machine));
}

static inline void pause_machine(struct mv_machine *machine)
{
	struct mv_error error;
	const int rc = mv_machine_pause(machine, PAUSE_NS, &error);

	if (rc < 0)
		fprintf(stderr, "pause: %s\n", error.text);
	CHECK_EQ(rc, 0);
}

static inline void resume_machine(struct mv_machine *machine)
{
	struct mv_error error;

	CHECK_EQ(mv_machine_resume(machine, &error), 0);
}

/* Data only: a hole stays one. */
static inline void copy_memory(const struct mv_memory *from, const struct mv_memory *to)
{
	char *buffer = malloc(COPY_LEN);
	off_t start = 0, end;

	CHECK(buffer);
	while ((start = lseek(from->fd, start, SEEK_DATA)) >= 0) {
		end = lseek(from->fd, start, SEEK_HOLE);
		while (start < end) {
			const size_t left = (size_t)(end - start);
			const size_t len = left < COPY_LEN ? left : COPY_LEN;

			CHECK_EQ(pread(from->fd, buffer, len, start), len);
			CHECK_EQ(pwrite(to->fd, buffer, len, start), len);
			start += (off_t)len;
		}
	}
	CHECK_EQ(errno, ENXIO);
	free(buffer);
}

static inline uint8_t *save_machine(struct mv_machine *machine, size_t *ret_len)
{
	struct mv_error error;
	uint8_t *bytes;
	const int rc = mv_machine_save(machine, &bytes, ret_len, &error);

	if (rc < 0)
		fprintf(stderr, "save: %s\n", error.text);
	CHECK_EQ(rc, 0);
	return bytes;
}

static inline struct mv_machine *incoming_for(const struct mv_machine *source)
{
	struct mv_machine_config config = source->config;

	config.accel = source->accel->id;
	config.memory.incoming = true;
	return test_machine(&config);
}

static inline void load_machine(struct mv_machine *machine, const uint8_t *bytes, size_t len)
{
	struct mv_error error;
	const int rc = mv_machine_load(machine, bytes, len, &error);

	if (rc < 0)
		fprintf(stderr, "load: %s\n", error.text);
	CHECK_EQ(rc, 0);
}

/* Runs `body` on threads, and on KVM where there is one. */
static inline void on_every_accel(void (*body)(enum mv_accel accel, uint32_t vcpu_count))
{
	static const uint32_t counts[] = {1, 2, 4};
	const struct mv_machine_config config = test_config(MV_ACCEL_KVM, 1);
	struct mv_machine *machine;
	struct mv_error error;
	const bool kvm = mv_machine_create(&config, &machine, &error) == 0;

	if (kvm)
		mv_machine_destroy(machine);
	else if (check_required("kvm"))
		CHECK(!"kvm is required");
	else
		fprintf(stderr, "  without kvm: %s\n", error.text);
	for (size_t i = 0; i < sizeof(counts) / sizeof(counts[0]); i++) {
		body(MV_ACCEL_THREAD, counts[i]);
		if (kvm)
			body(MV_ACCEL_KVM, counts[i]);
	}
}

#endif
