// SPDX-License-Identifier: Apache-2.0
/* See guest.h. */
#define _GNU_SOURCE
#include "guest.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

enum { HEADER_WORDS = 4 };

static const uint64_t PAGE_MAGIC = 0x31454741505f5747; /* "GW_PAGE1" */

int64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * SECOND_NS + t.tv_nsec;
}

void sleep_until(int64_t deadline_ns)
{
	struct timespec t = {deadline_ns / SECOND_NS, deadline_ns % SECOND_NS};

	while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) == EINTR)
		;
}

void say(const char *format, ...)
{
	char line[192];
	va_list arguments;
	int length;

	va_start(arguments, format);
	length = vsnprintf(line, sizeof(line), format, arguments);
	va_end(arguments);
	if (length > 0 && write(STDOUT_FILENO, line, (size_t)length) < 0)
		_exit(1); /* no console, no witness */
}

uint64_t random_next(uint64_t *state)
{
	*state ^= *state >> 12;
	*state ^= *state << 25;
	*state ^= *state >> 27;
	return *state * 0x2545f4914f6cdd1d;
}

static uint64_t pattern_seed(uint64_t page, uint64_t generation)
{
	uint64_t x = page * 0x100000001 + generation + 1;

	x ^= x >> 31;
	x *= PATTERN_STEP;
	return x ^ x >> 29;
}

void page_fill(uint64_t *words, uint64_t page, uint64_t generation)
{
	uint64_t seed = pattern_seed(page, generation);

	words[0] = PAGE_MAGIC;
	words[1] = page;
	words[2] = generation;
	words[3] = seed;
	for (uint64_t i = HEADER_WORDS; i < PAGE_WORDS; i++)
		words[i] = seed + i * PATTERN_STEP;
}

bool page_holds(const uint64_t *words, uint64_t page, uint64_t generation)
{
	uint64_t seed = pattern_seed(page, generation);
	uint64_t wrong = words[0] ^ PAGE_MAGIC;

	wrong |= (words[1] ^ page) | (words[2] ^ generation) | (words[3] ^ seed);
	for (uint64_t i = HEADER_WORDS; i < PAGE_WORDS; i++)
		wrong |= words[i] ^ (seed + i * PATTERN_STEP);
	return wrong == 0;
}

const char *page_damage(const uint64_t *words, uint64_t page)
{
	uint64_t any = 0;

	for (uint64_t i = 0; i < PAGE_WORDS; i++)
		any |= words[i];
	if (any == 0)
		return "zero";
	return page_holds(words, page, words[2]) ? "stale" : "torn";
}
