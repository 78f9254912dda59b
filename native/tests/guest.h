/* SPDX-License-Identifier: Apache-2.0 */
/*
 * guest.h - a memory that faults, for the tests: a memfd, mapped and registered with a real
 * userfaultfd, and threads that touch it as vCPUs would.
 *
 * Threads: as each test says; a toucher is a thread of its own.
 * Errors: a failing call ends the process, as everything in check.h does.
 * Ownership: the caller destroys what it creates. Each test function runs in a child process
 *            (RUN_FORKED), so that a blocked toucher never outlives it.
 * Units: pages of 4 KiB.
 * Source: userfaultfd(2).
 */
#ifndef GODWIT_TESTS_GUEST_H
#define GODWIT_TESTS_GUEST_H

#include "check.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <godwit/sys.h>
#include <godwit/uffd.h>

#define PAGE	   ((size_t)4096)
#define TIMEOUT_MS 60000

#ifdef __SANITIZE_THREAD__
/* A child that a threaded test forks has threads of its own; it is killed, or exits at once, and
 * the threads of its parent are no leak of its. */
__attribute__((visibility("default"))) const char *__tsan_default_options(void);
const char *__tsan_default_options(void)
{
	return "die_after_fork=0:report_thread_leaks=0";
}
#endif

struct guest {
	int ram_fd;
	int uffd;
	uint64_t page_count;
	uint8_t *memory;
};

/* Run a test function in a child of its own. */
#define RUN_FORKED(function)                          \
	do {                                          \
		fprintf(stderr, "- %s\n", #function); \
		guest_run_forked(function);           \
	} while (0)

/* A file, and its bitmap, that a failed test may leave; NULL: none. */
static const char *guest_left_path __attribute__((unused));

static inline void guest_run_forked(void (*function)(void))
{
	int status = -1;
	const pid_t pid = fork();

	CHECK(pid >= 0);
	if (pid == 0) {
		/* A test that hangs must not outlive the run. */
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		alarm(100);
		function();
		_exit(EXIT_SUCCESS);
	}
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	if (status != 0 && guest_left_path) {
		char bitmap[128];

		(void)snprintf(bitmap, sizeof(bitmap), "%s.bitmap", guest_left_path);
		(void)unlink(guest_left_path);
		(void)unlink(bitmap);
	}
	CHECK_EQ(status, 0);
}

/*
 * A process of its own, for an engine that is to be killed. It is forked before the test starts a
 * thread: the child of a process with threads may find a lock of the allocator taken (ASan's: once
 * in some hundred forks) by a thread that it does not have.
 */
struct guest_life {
	pid_t pid;    /* 0 in the child */
	int start_fd; /* takes the word to start: the page server's port */
};

/* The child returns when it is told to start, with the port in *port. */
static inline struct guest_life guest_fork_life(uint32_t *port)
{
	int pair[2];

	CHECK_EQ(pipe(pair), 0);
	const struct guest_life life = {.pid = fork(), .start_fd = pair[1]};

	CHECK(life.pid >= 0);
	if (life.pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		CHECK_EQ(read(pair[0], port, sizeof(*port)), sizeof(*port));
	}
	CHECK_EQ(close(pair[0]), 0);
	return life;
}

static inline void guest_start_life(const struct guest_life *life, uint32_t port)
{
	CHECK_EQ(write(life->start_fd, &port, sizeof(port)), sizeof(port));
}

/* Its wait status, when it has ended. */
static inline int guest_wait_life(const struct guest_life *life)
{
	int status = 0;

	CHECK_EQ(waitpid(life->pid, &status, 0), life->pid);
	CHECK_EQ(close(life->start_fd), 0);
	return status;
}

static inline void guest_need_uffd(void)
{
	uint64_t features = 0;
	const int err = gw_uffd_probe(&features);

	check_need(err == 0 && features & GW_UFFD_FEATURE_MISSING_SHMEM, "uffd",
		   "run as root, or give access to /dev/userfaultfd");
}

/* Registered for `mode`; 0 leaves it unregistered. */
static inline struct guest guest_create(uint64_t page_count, uint64_t features, uint64_t mode)
{
	struct guest guest = {.page_count = page_count};
	void *address = NULL;

	guest.ram_fd = gw_sys_memfd_create("guest", MFD_CLOEXEC);
	CHECK(guest.ram_fd >= 0);
	CHECK_EQ(gw_sys_ftruncate(guest.ram_fd, (off_t)(page_count * PAGE)), 0);
	CHECK_EQ(gw_sys_mmap(NULL, page_count * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED,
			     guest.ram_fd, 0, &address),
		 0);
	guest.memory = address;
	guest.uffd = gw_uffd_open(features, NULL);
	CHECK(guest.uffd >= 0);
	if (mode)
		CHECK_EQ(gw_uffd_register(guest.uffd, (uintptr_t)address, page_count * PAGE, mode,
					  NULL),
			 0);
	return guest;
}

static inline void guest_destroy(struct guest *guest)
{
	CHECK_EQ(gw_sys_munmap(guest->memory, guest->page_count * PAGE), 0);
	CHECK_EQ(gw_sys_close(guest->uffd), 0);
	CHECK_EQ(gw_sys_close(guest->ram_fd), 0);
}

static inline uint64_t guest_address(const struct guest *guest, uint64_t page)
{
	return (uintptr_t)guest->memory + page * PAGE;
}

/* The content of page i in every test: no two alike, none zero. */
static inline void guest_pattern(uint64_t page, uint8_t *ret_page)
{
	uint64_t value = page * UINT64_C(0x9e3779b97f4a7c15) + 1;

	for (size_t i = 0; i < PAGE; i += sizeof(value)) {
		value ^= value << 13;
		value ^= value >> 7;
		value ^= value << 17;
		memcpy(ret_page + i, &value, sizeof(value));
	}
}

static inline bool guest_has_pattern(const uint8_t *memory, uint64_t page)
{
	uint8_t want[PAGE];

	guest_pattern(page, want);
	return memcmp(memory + page * PAGE, want, PAGE) == 0;
}

/* A thread that reads the first word of a page, and blocks there as long as it is absent. */
struct toucher {
	pthread_t thread;
	const uint8_t *at;
	uint64_t value;
	_Atomic bool done;
};

static inline void *toucher_main(void *argument)
{
	struct toucher *const toucher = argument;

	toucher->value = *(const volatile uint64_t *)(const void *)toucher->at;
	atomic_store(&toucher->done, true);
	return NULL;
}

static inline void toucher_start(struct toucher *toucher, const struct guest *guest, uint64_t page)
{
	toucher->at = guest->memory + page * PAGE;
	atomic_store(&toucher->done, false);
	CHECK_EQ(pthread_create(&toucher->thread, NULL, toucher_main, toucher), 0);
}

static inline uint64_t toucher_join(struct toucher *toucher)
{
	CHECK_EQ(pthread_join(toucher->thread, NULL), 0);
	return toucher->value;
}

/* The next event; it must come. */
static inline struct uffd_msg guest_next_event(const struct guest *guest)
{
	struct uffd_msg event;

	for (;;) {
		struct pollfd poll_fd = {.fd = guest->uffd, .events = POLLIN};
		const int count = gw_uffd_read(guest->uffd, &event, 1);

		CHECK(count >= 0);
		if (count == 1)
			return event;
		CHECK_EQ(poll(&poll_fd, 1, TIMEOUT_MS), 1);
	}
}

static inline uint64_t guest_next_fault(const struct guest *guest)
{
	const struct uffd_msg event = guest_next_event(guest);

	CHECK_EQ(event.event, UFFD_EVENT_PAGEFAULT);
	return (event.arg.pagefault.address - (uintptr_t)guest->memory) / PAGE;
}

static inline bool guest_cache_has(const struct guest *guest, uint64_t page)
{
	const off_t at = (off_t)(page * PAGE);

	return gw_sys_lseek(guest->ram_fd, at, SEEK_DATA) == at;
}

static inline uint64_t first_word(uint64_t page)
{
	uint8_t bytes[PAGE];
	uint64_t value;

	guest_pattern(page, bytes);
	memcpy(&value, bytes, sizeof(value));
	return value;
}

#endif
