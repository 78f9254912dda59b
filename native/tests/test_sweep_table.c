/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_sweep_table.c - every system call of sys.h has a row that says with which errnos it is failed and
 * where; docs/design/system-calls.md is that table. With an argument it prints it.
 */
#include "sweep.h"

#include <ctype.h>

#define TABLE_PATH GW_SOURCE_DIR "/docs/design/system-calls.md"

static const char *const head =
	"# System calls that fail\n"
	"\n"
	"Each system call of the C core, and with which errnos it is failed, each as its first, "
	"second, ... call in each scenario. Printed by\n"
	"`test_sweep_table print`, which as a test compares it; each scenario of "
	"`native/tests/sweep.h` itself checks that it makes no other calls, and\n"
	"that each was failed with each errno. `short`: the transfer is cut to one byte. A call "
	"without a row fails the test.\n"
	"\n";

static const struct sweep_elsewhere *elsewhere_of(enum gw_sys_call call)
{
	for (size_t i = 0; i < sizeof(sweep_elsewhere) / sizeof(sweep_elsewhere[0]); i++)
		if (sweep_elsewhere[i].call == call)
			return &sweep_elsewhere[i];
	return NULL;
}

static bool is_swept_by(enum gw_sys_call call, const struct sweep_scenario *scenario)
{
	for (const enum gw_sys_call *declared = scenario->calls; *declared; declared++)
		if (*declared == call)
			return true;
	return false;
}

static void print_name(FILE *file, const char *name)
{
	for (; *name; name++)
		(void)fputc(tolower(*name), file);
}

static void print_table(FILE *file)
{
	(void)fprintf(file, "%s| scenario | test in `native/tests` |\n|---|---|\n", head);
	for (size_t i = 0; i < SWEEP_SCENARIO_COUNT; i++)
		(void)fprintf(file, "| %c: %s | `%s` |\n", (char)('A' + i), sweep_scenarios[i].name,
			      sweep_scenarios[i].test);
	(void)fprintf(file, "\n| call | failed with | in |\n|---|---|---|\n");
	for (enum gw_sys_call call = 1; call < GW_SYS_CALL_COUNT; call++) {
		const struct sweep_elsewhere *const elsewhere = elsewhere_of(call);
		bool any = false;

		(void)fprintf(file, "| ");
		print_name(file, gw_sys_name(call));
		(void)fprintf(file, " |");
		for (size_t e = 0; sweep_errors[call][e]; e++)
			(void)fprintf(file, " %s", sweep_error_name(sweep_errors[call][e]));
		(void)fprintf(file, "%s |", sweep_errors[call][0] ? "" : " –");
		for (size_t i = 0; i < SWEEP_SCENARIO_COUNT; i++) {
			if (!is_swept_by(call, &sweep_scenarios[i]))
				continue;
			(void)fprintf(file, " %c", (char)('A' + i));
			any = true;
		}
		if (elsewhere)
			(void)fprintf(file, "%s%s", any ? "; " : " ", elsewhere->why);
		(void)fprintf(file, " |\n");
	}
}

/* Swept with at least one errno; or failed elsewhere; or not called. */
static void every_call_has_a_row(void)
{
	for (enum gw_sys_call call = 1; call < GW_SYS_CALL_COUNT; call++) {
		bool swept = false;

		for (size_t i = 0; i < SWEEP_SCENARIO_COUNT; i++)
			swept = swept || is_swept_by(call, &sweep_scenarios[i]);
		if (!swept && !elsewhere_of(call))
			fprintf(stderr, "%s is failed nowhere\n", gw_sys_name(call));
		CHECK(swept || elsewhere_of(call));
		CHECK(!swept || sweep_errors[call][0]);
	}
}

static void the_document_is_the_table(void)
{
	char *text = NULL;
	size_t len = 0;
	FILE *const memory = open_memstream(&text, &len);
	FILE *const file = fopen(TABLE_PATH, "re");
	char *const found = calloc(1, 1 << 16);

	CHECK(memory && found);
	print_table(memory);
	CHECK_EQ(fclose(memory), 0);
	if (!file)
		fprintf(stderr, "%s is not there\n", TABLE_PATH);
	CHECK(file);
	CHECK(fread(found, 1, (1 << 16) - 1, file) > 0);
	(void)fclose(file);
	if (strcmp(found, text) != 0)
		fprintf(stderr, "not current: test_sweep_table print > %s\n", TABLE_PATH);
	CHECK(strcmp(found, text) == 0);
	free(found);
	free(text);
}

int main(int argc, char **argv)
{
	(void)argv;
	if (argc > 1) {
		print_table(stdout);
		return EXIT_SUCCESS;
	}
	RUN(every_call_has_a_row);
	RUN(the_document_is_the_table);
	return EXIT_SUCCESS;
}
