/* SPDX-License-Identifier: Apache-2.0 */
/*
 * target.h - a stand-in for a VMM: a process of two threads that maps a memory, to be injected into.
 *
 * Threads: its main thread waits in one of three ways; the other one touches page 3 when it is told.
 * Errors: as check.h.
 * Ownership: target_stop kills it; its descriptors live until the test ends.
 * Units: pages.
 * Source: inject.h.
 */
#ifndef GODWIT_TESTS_TARGET_H
#define GODWIT_TESTS_TARGET_H

#include "guest.h"

#include <dirent.h>
#include <sched.h>
#include <stdio.h>
#include <sys/eventfd.h>
#include <time.h>

#define TARGET_PAGE_COUNT 16

/* What the main thread waits in when it is stopped. */
enum wait_kind { WAIT_READ, WAIT_SLEEP, WAIT_SPIN };

struct target {
	pid_t pid;
	int ram_fd;
	uint8_t *
		shared; /* counters: [0] turns of the other thread, [1] main is back from its wait */
	int wake_fd;	/* ends WAIT_READ */
	int touch_fd;	/* one byte in: the other thread reads page 3 */
	int value_fd;	/* and writes here what it found */
};

struct target_threads {
	struct target *target;
	uint8_t *memory;
};

static inline void *target_other_thread(void *argument)
{
	const struct target_threads *const threads = argument;
	char byte;

	threads->target->shared[3] = 1;

	while (read(threads->target->touch_fd, &byte, 1) == 1) {
		uint64_t value = *(const volatile uint64_t *)(threads->memory + 3 * PAGE);

		CHECK_EQ(write(threads->target->value_fd, &value, sizeof(value)), sizeof(value));
	}
	return NULL;
}

static inline void target_main(struct target *target, enum wait_kind kind)
{
	struct target_threads threads = {.target = target};
	void *address = NULL;
	pthread_t thread;
	uint64_t value;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	CHECK_EQ(gw_sys_mmap(NULL, TARGET_PAGE_COUNT * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED,
			     target->ram_fd, 0, &address),
		 0);
	threads.memory = address;
	CHECK_EQ(pthread_create(&thread, NULL, target_other_thread, &threads), 0);
	target->shared[0] = 1;
	if (kind == WAIT_READ) {
		CHECK_EQ(read(target->wake_fd, &value, sizeof(value)), sizeof(value));
	} else if (kind == WAIT_SLEEP) {
		const struct timespec nap = {.tv_nsec = 300000000};

		CHECK_EQ(nanosleep(&nap, NULL), 0);
	} else {
		while (*(volatile uint8_t *)&target->shared[2] == 0)
			continue;
	}
	target->shared[1] = 1;
	for (;;)
		pause();
}

static inline struct target target_start(enum wait_kind kind)
{
	struct target target = {.ram_fd = gw_sys_memfd_create("ram", MFD_CLOEXEC),
				.wake_fd = eventfd(0, 0)};
	void *shared = NULL;
	int touch[2];
	int value[2];

	CHECK_EQ(gw_sys_ftruncate(target.ram_fd, TARGET_PAGE_COUNT * PAGE), 0);
	CHECK_EQ(gw_sys_mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0,
			     &shared),
		 0);
	target.shared = shared;
	CHECK_EQ(pipe(touch), 0);
	CHECK_EQ(pipe(value), 0);
	target.pid = fork();
	CHECK(target.pid >= 0);
	if (target.pid == 0) {
		target.touch_fd = touch[0];
		target.value_fd = value[1];
		target_main(&target, kind);
	}
	target.touch_fd = touch[1];
	target.value_fd = value[0];
	/* Both threads, so that what the target maps and has open is settled. */
	while (*(volatile uint8_t *)&target.shared[0] == 0 ||
	       *(volatile uint8_t *)&target.shared[3] == 0)
		sched_yield();
	return target;
}

static inline void target_stop(const struct target *target)
{
	CHECK_EQ(kill(target->pid, SIGKILL), 0);
	CHECK_EQ(waitpid(target->pid, NULL, 0), target->pid);
}

static inline int fd_count(pid_t pid)
{
	char path[64];
	int count = 0;

	(void)snprintf(path, sizeof(path), "/proc/%d/fd", (int)pid);
	DIR *const directory = opendir(path);

	CHECK(directory != NULL);
	while (readdir(directory))
		count++;
	closedir(directory);
	return count;
}

static inline int map_count(pid_t pid)
{
	char path[64];
	int count = 0;
	int byte;

	(void)snprintf(path, sizeof(path), "/proc/%d/maps", (int)pid);
	FILE *const maps = fopen(path, "r");

	CHECK(maps != NULL);
	while ((byte = fgetc(maps)) != EOF)
		count += byte == '\n';
	(void)fclose(maps);
	return count;
}

/* Blocked signals and tracer, as /proc/PID/status says them. */
static inline void status_lines(pid_t pid, unsigned long *ret_blocked, int *ret_tracer)
{
	char path[64];
	char line[256];

	(void)snprintf(path, sizeof(path), "/proc/%d/status", (int)pid);
	FILE *const file = fopen(path, "re");

	CHECK(file != NULL);
	while (fgets(line, sizeof(line), file)) {
		if (strncmp(line, "SigBlk:", 7) == 0)
			*ret_blocked = strtoul(line + 7, NULL, 16);
		if (strncmp(line, "TracerPid:", 10) == 0)
			*ret_tracer = (int)strtol(line + 10, NULL, 10);
	}
	(void)fclose(file);
}

static inline void check_untouched(const struct target *target, int fd_count_before,
				   int map_count_before)
{
	unsigned long blocked = 1;
	int tracer = 1;

	status_lines(target->pid, &blocked, &tracer);
	CHECK_EQ(blocked, 0);
	CHECK_EQ(tracer, 0);
	CHECK_EQ(fd_count(target->pid), fd_count_before);
	CHECK_EQ(map_count(target->pid), map_count_before);
}

#endif
