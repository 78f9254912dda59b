/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the parts of the guest's workload share: console lines, time, checkable pages.
 *
 * Threads	All functions are safe from any thread; pages belong to their caller.
 * Errors	A console that cannot be written ends the process: without it there is no witness.
 * Ownership	Nothing is allocated.
 * Units	Pages are 4 KiB. Times in ns unless the name says otherwise.
 * Source	services/demo/console.py reads the lines.
 */
#ifndef GODWIT_DEMO_GUEST_H
#define GODWIT_DEMO_GUEST_H

#include <stdbool.h>
#include <stdint.h>

enum {
	PAGE_BYTES = 4096,
	PAGE_WORDS = PAGE_BYTES / 8,
};

#define SECOND_NS    INT64_C(1000000000)
#define PATTERN_STEP UINT64_C(0x9e3779b97f4a7c15)

/* One line, one write: the tty keeps the lines of several processes whole. */
__attribute__((format(printf, 1, 2))) void say(const char *format, ...);

int64_t now_ns(void);
void sleep_until(int64_t deadline_ns);

/* xorshift64*; each thread has a state of its own, not 0. */
uint64_t random_next(uint64_t *state);

/* Layout: magic, page number, generation, seed, then seed + i * step to the end. */
void page_fill(uint64_t *words, uint64_t page, uint64_t generation);
bool page_holds(const uint64_t *words, uint64_t page, uint64_t generation);
/* Why a page does not hold: "zero", "stale" (whole, of another generation) or "torn". */
const char *page_damage(const uint64_t *words, uint64_t page);

/* Never return where there is something to do; they report on the console. */
void disk_run(const char *device_name);
void net_run(const char *peer_address);

#endif
