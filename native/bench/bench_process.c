/* SPDX-License-Identifier: Apache-2.0 */
/*
 * bench_process.c - a process to be moved by CRIU: reads its memory at random, checks what it reads,
 * and says every few milliseconds that it is alive.
 *
 *   bench_process LOG MIB READS_PER_S     READS_PER_S: 0 = as many as it can
 *
 * A line a beat in LOG: CLOCK_MONOTONIC in ns, reads, wrong pages. tests/bench/peers/criu.py drives it.
 */
#include "check.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <godwit/sys.h>

#define PAGE	4096ul
#define BEAT_NS 5000000L
#define JUMP	2654435761ul
#define GOLDEN	0x9E3779B97F4A7C15ul

static _Atomic uint64_t read_count;
static _Atomic uint64_t error_count;
static FILE *log_file;

static void *beat_main(void *argument)
{
	(void)argument;
	for (;;) {
		fprintf(log_file, "%" PRIu64 " %" PRIu64 " %" PRIu64 "\n", gw_sys_now_ns(),
			atomic_load(&read_count), atomic_load(&error_count));
		fflush(log_file);
		(void)nanosleep(&(struct timespec){.tv_nsec = BEAT_NS}, NULL);
	}
	return NULL;
}

int main(int argc, char **argv)
{
	CHECK_EQ(argc, 4);
	const uint64_t page_count = strtoull(argv[2], NULL, 10) << 8;
	const uint64_t rate = strtoull(argv[3], NULL, 10);
	pthread_t thread;
	void *address = NULL;

	log_file = fopen(argv[1], "we");
	CHECK(log_file);
	CHECK_EQ(gw_sys_mmap(NULL, page_count * PAGE, PROT_READ | PROT_WRITE,
			     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0, &address),
		 0);
	uint8_t *const memory = address;

	for (uint64_t page = 0; page < page_count; page++) {
		const uint64_t word = page * GOLDEN | 1;

		for (uint64_t at = 0; at < PAGE; at += sizeof(word))
			memcpy(memory + page * PAGE + at, &word, sizeof(word));
	}
	CHECK_EQ(pthread_create(&thread, NULL, beat_main, NULL), 0);
	for (uint64_t i = 0;; i++) {
		const uint64_t page = i * JUMP % page_count;
		uint64_t word;

		memcpy(&word, memory + page * PAGE, sizeof(word));
		if (word != (page * GOLDEN | 1))
			atomic_fetch_add(&error_count, 1);
		atomic_fetch_add(&read_count, 1);
		if (rate > 0)
			(void)nanosleep(&(struct timespec){.tv_nsec = (long)(1000000000 / rate)},
					NULL);
	}
}
