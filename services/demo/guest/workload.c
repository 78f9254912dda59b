// SPDX-License-Identifier: Apache-2.0
/*
 * The guest's job in `godwit demo`: memory, disk and network whose every byte can be checked.
 *
 * Threads	One worker a vCPU, pinned, owns the pages {n : n % workers == worker} and is the only
 *		one to touch them: dirty at random, verify in sequence. One heartbeat thread
 *		(SCHED_FIFO: regular also while workers burn the CPU). One reader of commands.
 *		Disk and ping are processes of their own, forked before the memory is filled.
 * Errors	Reported on the console, counted, never fatal: the guest must go on and tell.
 * Ownership	Everything lives until the guest is switched off.
 * Units	Pages are 4 KiB. Times in ns unless the name says otherwise.
 * Source	Console lines are read by services/demo/console.py; each is one write(2).
 *
 *	BOOT <boot id> pages=N workers=N	once; a second one is a reboot
 *	HB <n> ops= err= sweeps= verified=	n rises by exactly one
 *	SWEEP <n> begin|end|cut verified= err=	a pass over all pages; cut: restarted by command
 *	WL ERR page= gen= found= kind=		zero | stale | torn; the first ERROR_LINES_MAX only
 *	DISK n= bad= err=			rounds, wrong blocks, failed calls
 *	NET sent= ok= lost=			pings
 *
 * Command on the console: "sweep", a full pass at full speed, from now.
 */
#define _GNU_SOURCE
#include "guest.h"

#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <termios.h>
#include <unistd.h>

enum {
	WORKERS_MAX = 8,
	ERROR_LINES_MAX = 64,
	TICK_NS = 5000000,
	/* After a stall a worker catches up on at most this much time, else it would burst. */
	CATCH_UP_NS = 4 * TICK_NS,
	FULL_SPEED_BATCH = 64,
	NICE_WORKER = 10,
};

struct worker {
	_Alignas(64) _Atomic uint64_t ops;
	_Atomic uint64_t verified;
	_Atomic uint64_t errors;
	uint64_t random;
	uint64_t page_count; /* of this worker */
	uint64_t sweep;	     /* the pass that position belongs to */
	uint64_t position;   /* next page of the stripe to verify */
	uint64_t sweep_errors;
	unsigned index;
};

/* The pass now under way. The mutex guards all but number, which workers poll without it: a stale
 * value costs them one batch of a pass that no longer counts. */
static struct {
	pthread_mutex_t mutex;
	_Atomic uint64_t number;
	_Atomic bool at_full_speed;
	unsigned running; /* workers still in it */
	uint64_t verified;
	uint64_t errors;
	_Atomic uint64_t finished;
} sweep = {.mutex = PTHREAD_MUTEX_INITIALIZER};

static struct worker workers[WORKERS_MAX];
static unsigned worker_count;
static uint64_t *memory;
static uint32_t *generations; /* one a page; as movable as the pages themselves */
static uint64_t page_count;
static uint64_t dirty_rate; /* pages/s of all workers; 0 = as fast as it goes */
static int64_t sweep_ns = 2000000000;
static int64_t heartbeat_ns = 10000000;
static _Atomic unsigned error_lines;

/* A wrong page is written anew after the report, so that each corruption counts once. */
static bool page_verify(struct worker *worker, uint64_t page)
{
	uint64_t *words = memory + page * PAGE_WORDS;

	atomic_fetch_add_explicit(&worker->verified, 1, memory_order_relaxed);
	if (page_holds(words, page, generations[page]))
		return true;
	atomic_fetch_add_explicit(&worker->errors, 1, memory_order_relaxed);
	if (atomic_fetch_add(&error_lines, 1) < ERROR_LINES_MAX)
		say("WL ERR page=%lu gen=%u found=%lu kind=%s\n", page, generations[page], words[2],
		    page_damage(words, page));
	page_fill(words, page, ++generations[page]);
	return false;
}

static void page_dirty(struct worker *worker)
{
	uint64_t slot = random_next(&worker->random) % worker->page_count;
	uint64_t page = slot * worker_count + worker->index;

	page_verify(worker, page);
	page_fill(memory + page * PAGE_WORDS, page, ++generations[page]);
	atomic_fetch_add_explicit(&worker->ops, 1, memory_order_relaxed);
}

/* Caller holds sweep.mutex. */
static void sweep_begin(void)
{
	uint64_t number = atomic_load(&sweep.number) + 1;

	sweep.running = worker_count;
	sweep.verified = 0;
	sweep.errors = 0;
	say("SWEEP %lu begin verified=0 err=0\n", number);
	atomic_store(&sweep.number, number);
}

static void sweep_restart(void)
{
	pthread_mutex_lock(&sweep.mutex);
	say("SWEEP %lu cut verified=%lu err=%lu\n", atomic_load(&sweep.number), sweep.verified,
	    sweep.errors);
	atomic_store(&sweep.at_full_speed, true);
	sweep_begin();
	pthread_mutex_unlock(&sweep.mutex);
}

static void sweep_stripe_done(const struct worker *worker)
{
	pthread_mutex_lock(&sweep.mutex);
	if (worker->sweep == atomic_load(&sweep.number)) {
		sweep.verified += worker->page_count;
		sweep.errors += worker->sweep_errors;
		if (--sweep.running == 0) {
			say("SWEEP %lu end verified=%lu err=%lu\n", worker->sweep, sweep.verified,
			    sweep.errors);
			atomic_fetch_add(&sweep.finished, 1);
			atomic_store(&sweep.at_full_speed, false);
			sweep_begin();
		}
	}
	pthread_mutex_unlock(&sweep.mutex);
}

static void sweep_step(struct worker *worker, uint64_t budget)
{
	uint64_t number = atomic_load_explicit(&sweep.number, memory_order_acquire);

	if (worker->sweep != number) {
		worker->sweep = number;
		worker->position = 0;
		worker->sweep_errors = 0;
	}
	if (worker->position == worker->page_count)
		return; /* the others are still at it */
	for (; budget > 0 && worker->position < worker->page_count; budget--, worker->position++)
		if (!page_verify(worker, worker->position * worker_count + worker->index))
			worker->sweep_errors++;
	if (worker->position == worker->page_count)
		sweep_stripe_done(worker);
}

static bool sweep_hurries(const struct worker *worker)
{
	return atomic_load_explicit(&sweep.at_full_speed, memory_order_relaxed) &&
	       (worker->position < worker->page_count ||
		worker->sweep != atomic_load_explicit(&sweep.number, memory_order_relaxed));
}

/* What is owed for elapsed_ns at `pages` per period_ns; the rest is carried over. */
static uint64_t budget_take(uint64_t *carry, uint64_t pages, int64_t elapsed_ns, int64_t period_ns)
{
	uint64_t due = *carry + pages * (uint64_t)elapsed_ns;

	*carry = due % (uint64_t)period_ns;
	return due / (uint64_t)period_ns;
}

static void *worker_run(void *argument)
{
	struct worker *worker = argument;
	uint64_t dirty_carry = 0, sweep_carry = 0;
	int64_t last = now_ns();
	cpu_set_t cpus;

	CPU_ZERO(&cpus);
	CPU_SET(worker->index, &cpus);
	sched_setaffinity(0, sizeof(cpus), &cpus);
	setpriority(PRIO_PROCESS, 0, NICE_WORKER); /* Linux: of this thread alone */
	for (;;) {
		int64_t now = now_ns();
		int64_t elapsed = now - last < CATCH_UP_NS ? now - last : CATCH_UP_NS;
		bool hurry = sweep_hurries(worker);
		uint64_t dirty = dirty_rate ? budget_take(&dirty_carry, dirty_rate, elapsed,
							  SECOND_NS * worker_count)
					    : FULL_SPEED_BATCH;

		last = now;
		while (dirty-- > 0)
			page_dirty(worker);
		sweep_step(worker,
			   budget_take(&sweep_carry, worker->page_count, elapsed, sweep_ns) +
				   (hurry ? FULL_SPEED_BATCH : 0));
		if (dirty_rate && !hurry)
			sleep_until(now + TICK_NS);
	}
	return NULL;
}

static void *heartbeat_run(void *argument)
{
	struct sched_param priority = {.sched_priority = 1};
	int64_t next = now_ns();

	(void)argument;
	pthread_setschedparam(pthread_self(), SCHED_FIFO, &priority);
	for (uint64_t n = 1;; n++) {
		uint64_t ops = 0, errors = 0, verified = 0;

		for (unsigned i = 0; i < worker_count; i++) {
			ops += atomic_load_explicit(&workers[i].ops, memory_order_relaxed);
			errors += atomic_load_explicit(&workers[i].errors, memory_order_relaxed);
			verified +=
				atomic_load_explicit(&workers[i].verified, memory_order_relaxed);
		}
		say("HB %lu ops=%lu err=%lu sweeps=%lu verified=%lu\n", n, ops, errors,
		    atomic_load(&sweep.finished), verified);
		/* Beats that a stall ate are not made up for: n counts beats, not time. */
		next = next + heartbeat_ns > now_ns() ? next + heartbeat_ns
						      : now_ns() + heartbeat_ns;
		sleep_until(next);
	}
	return NULL;
}

/* What this guest takes for the time. */
static void clock_say(void)
{
	struct timespec real;

	clock_gettime(CLOCK_REALTIME, &real);
	say("CLOCK mono_ns=%ld real_ns=%ld\n", now_ns(), real.tv_sec * 1000000000 + real.tv_nsec);
}

static void commands_run(void)
{
	char line[32];
	size_t length = 0;
	char c;

	while (read(STDIN_FILENO, &c, 1) == 1) {
		if (c != '\n' && c != '\r') {
			/* A line too long keeps its tail: it matches no command. */
			line[length++ % sizeof(line)] = c;
			continue;
		}
		if (length == 5 && memcmp(line, "sweep", 5) == 0)
			sweep_restart();
		if (length == 5 && memcmp(line, "clock", 5) == 0)
			clock_say();
		if (length == 3 && memcmp(line, "end", 3) == 0)
			reboot(RB_POWER_OFF);
		length = 0;
	}
}

/* Forked before the memory is filled, else it would be copied on write; at work when the gate's
 * last writer is gone, so that the fill has the CPU for itself. */
static void child_start(const int gate[2], void (*run)(const char *), const char *argument)
{
	char nothing;

	if (fork() != 0)
		return;
	close(gate[1]);
	if (read(gate[0], &nothing, 1) == 0)
		run(argument);
	_exit(0);
}

static void console_prepare(void)
{
	struct termios mode;

	if (tcgetattr(STDIN_FILENO, &mode) == 0) {
		cfmakeraw(&mode);
		tcsetattr(STDIN_FILENO, TCSANOW, &mode);
	}
}

static void boot_line(void)
{
	char id[37] = "unknown";
	int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);

	if (fd >= 0 && read(fd, id, 36) == 36)
		id[36] = '\0';
	say("BOOT %s pages=%lu workers=%u\n", id, page_count, worker_count);
	close(fd);
}

static void memory_prepare(void)
{
	memory = mmap(NULL, page_count * PAGE_BYTES, PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	generations = calloc(page_count, sizeof(*generations));
	if (memory == MAP_FAILED || !generations) {
		say("INIT no memory for %lu pages\n", page_count);
		_exit(1);
	}
	/* Guest huge pages: 512 times fewer page faults to fill them, seconds saved under TCG.
	 * The host's pages, the ones that migrate, stay 4 KiB. */
	madvise(memory, page_count * PAGE_BYTES, MADV_HUGEPAGE);
	for (uint64_t page = 0; page < page_count; page++)
		page_fill(memory + page * PAGE_WORDS, page, generations[page] = 1);
}

static void workers_start(void)
{
	pthread_t thread;

	for (unsigned i = 0; i < worker_count; i++) {
		workers[i].index = i;
		workers[i].random = PATTERN_STEP * (i + 1);
		workers[i].page_count = (page_count - i + worker_count - 1) / worker_count;
	}
	pthread_mutex_lock(&sweep.mutex);
	sweep_begin();
	pthread_mutex_unlock(&sweep.mutex);
	pthread_create(&thread, NULL, heartbeat_run, NULL);
	for (unsigned i = 0; i < worker_count; i++)
		pthread_create(&thread, NULL, worker_run, &workers[i]);
}

static const char *option(const char *argument, const char *name)
{
	size_t length = strlen(name);

	return strncmp(argument, name, length) == 0 ? argument + length : NULL;
}

int main(int count, char **arguments)
{
	const char *disk = NULL, *net = NULL, *value;
	int gate[2];
	long cpus = sysconf(_SC_NPROCESSORS_ONLN);

	page_count = UINT64_C(256) * 256;
	dirty_rate = 2000;
	for (int i = 1; i < count; i++) {
		if ((value = option(arguments[i], "mib=")))
			page_count = strtoul(value, NULL, 10) * 256;
		else if ((value = option(arguments[i], "hb_ms=")))
			heartbeat_ns = strtol(value, NULL, 10) * 1000000;
		else if ((value = option(arguments[i], "rate=")))
			dirty_rate = strtoul(value, NULL, 10);
		else if ((value = option(arguments[i], "sweep_ms=")))
			sweep_ns = strtol(value, NULL, 10) * 1000000;
		else if ((value = option(arguments[i], "disk=")))
			disk = value;
		else if ((value = option(arguments[i], "net=")))
			net = value;
	}
	worker_count = cpus < 1 ? 1 : cpus > WORKERS_MAX ? WORKERS_MAX : (unsigned)cpus;
	if (page_count < worker_count || heartbeat_ns <= 0 || sweep_ns <= 0) {
		say("INIT bad parameters\n");
		return 1;
	}
	signal(SIGCHLD, SIG_IGN);
	console_prepare();
	boot_line();
	if (pipe(gate) != 0)
		return 1;
	if (disk)
		child_start(gate, disk_run, disk);
	if (net)
		child_start(gate, net_run, net);
	memory_prepare();
	close(gate[1]);
	workers_start();
	commands_run();
	for (;;)
		pause(); /* the console's input may close; the guest goes on */
}
