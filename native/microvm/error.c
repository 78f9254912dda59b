/* SPDX-License-Identifier: Apache-2.0 */
/*
 * error.c - see error.h.
 *
 * Threads, Errors, Ownership, Units, Source: see error.h.
 */
#include "error.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

int mv_refuse(struct mv_error *error, int code, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	/* NOLINTNEXTLINE(clang-analyzer-valist.Uninitialized): false when one run checks many files */
	(void)vsnprintf(error->text, sizeof(error->text), format, args);
	va_end(args);
	return code;
}

int mv_refuse_errno(struct mv_error *error, int code, const char *format, ...)
{
	va_list args;
	size_t len;

	va_start(args, format);
	/* NOLINTNEXTLINE(clang-analyzer-valist.Uninitialized): false when one run checks many files */
	(void)vsnprintf(error->text, sizeof(error->text), format, args);
	va_end(args);
	len = strlen(error->text);
	(void)snprintf(error->text + len, sizeof(error->text) - len, ": %s", strerror(-code));
	return code;
}
