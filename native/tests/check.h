/* SPDX-License-Identifier: Apache-2.0 */
/*
 * check.h - the few words that the native tests are written in.
 *
 * Threads: every function may be called from any thread; a failed check ends the process.
 * Errors: a failed check prints where and what and aborts, so that a sanitizer or a debugger
 *         shows the stack. A skip exits with 77, which ctest knows.
 * Ownership: nothing is kept.
 * Units: none.
 * Source: docs/adr/0001-build.md; tests/harness/require.py does the same for Python.
 */
#ifndef GODWIT_TESTS_CHECK_H
#define GODWIT_TESTS_CHECK_H

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(cond)                                                                             \
	do {                                                                                    \
		if (!(cond)) {                                                                  \
			fprintf(stderr, "%s:%d: %s: CHECK(%s)\n", __FILE__, __LINE__, __func__, \
				#cond);                                                         \
			abort();                                                                \
		}                                                                               \
	} while (0)

/* Integers of any width; both sides are evaluated once. */
#define CHECK_EQ(got, want)                                                                 \
	do {                                                                                \
		long long check_got_ = (long long)(got);                                    \
		long long check_want_ = (long long)(want);                                  \
		if (check_got_ != check_want_) {                                            \
			fprintf(stderr, "%s:%d: %s: %s is %lld, not %s (%lld)\n", __FILE__, \
				__LINE__, __func__, #got, check_got_, #want, check_want_);  \
			abort();                                                            \
		}                                                                           \
	} while (0)

/* Runs one test function, saying its name first: the last name printed is the one that failed. */
#define RUN(function)                                 \
	do {                                          \
		fprintf(stderr, "- %s\n", #function); \
		function();                           \
	} while (0)

#define CHECK_SKIPPED 77

/* True if GODWIT_REQUIRE, a list such as "uffd,kvm", names the thing. */
static inline bool check_required(const char *thing)
{
	const char *list = getenv("GODWIT_REQUIRE");
	const size_t len = strlen(thing);

	while (list && *list) {
		const size_t item = strcspn(list, ",");

		if (item == len && memcmp(list, thing, len) == 0)
			return true;
		list += item;
		list += *list == ',';
	}
	return false;
}

/*
 * Ends the process if the machine lacks what the test is about: skipped, or failed where
 * GODWIT_REQUIRE says that this machine must have it.
 */
static inline void check_need(bool there, const char *thing, const char *what_to_do)
{
	if (there)
		return;
	fprintf(stderr, "needs %s: %s\n", thing, what_to_do);
	exit(check_required(thing) ? EXIT_FAILURE : CHECK_SKIPPED);
}

#endif
