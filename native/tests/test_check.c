/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_check.c - the tests' own words: a wrong value must fail and a missing thing must skip, or
 * every other native test could pass by saying nothing.
 */
#include "check.h"

#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

/* Runs body in a child that says nothing; returns its wait status. */
static int status_of(void (*body)(void))
{
	int status = -1;
	const pid_t pid = fork();

	CHECK(pid >= 0);
	if (pid == 0) {
		const struct rlimit no_core = {0, 0};

		setrlimit(RLIMIT_CORE, &no_core);
		/* A sanitizer would turn the abort into a report and an exit status of its own. */
		signal(SIGABRT, SIG_DFL);
		if (!freopen("/dev/null", "w", stderr))
			_exit(EXIT_FAILURE);
		body();
		_exit(EXIT_SUCCESS);
	}
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	return status;
}

static void fails_check(void)
{
	CHECK(1 + 1 == 3);
}
static void fails_check_eq(void)
{
	CHECK_EQ(1 + 1, 3);
}
static void passes(void)
{
	CHECK_EQ(1 + 1, 2);
}
static void lacks_wings(void)
{
	check_need(false, "wings", "grow some");
}

static void wrong_values_abort(void)
{
	CHECK(WIFSIGNALED(status_of(fails_check)));
	CHECK(WIFSIGNALED(status_of(fails_check_eq)));
	CHECK_EQ(status_of(passes), 0);
}

static void missing_things_skip_unless_required(void)
{
	CHECK_EQ(unsetenv("GODWIT_REQUIRE"), 0);
	CHECK_EQ(WEXITSTATUS(status_of(lacks_wings)), CHECK_SKIPPED);
	CHECK_EQ(setenv("GODWIT_REQUIRE", "uffd,wing,wingspan", 1), 0);
	CHECK_EQ(WEXITSTATUS(status_of(lacks_wings)), CHECK_SKIPPED);
	CHECK_EQ(setenv("GODWIT_REQUIRE", "uffd,wings", 1), 0);
	CHECK_EQ(WEXITSTATUS(status_of(lacks_wings)), EXIT_FAILURE);
}

int main(void)
{
	RUN(wrong_values_abort);
	RUN(missing_things_skip_unless_required);
	return EXIT_SUCCESS;
}
