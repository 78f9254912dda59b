/* SPDX-License-Identifier: Apache-2.0 */
/*
 * error.h - why something was refused, in words, beside the -errno.
 *
 * Threads: a struct mv_error belongs to one caller.
 * Errors: none.
 * Ownership: the caller's.
 * Units: none.
 * Source: the control socket and main() print it.
 */
#ifndef MV_ERROR_H
#define MV_ERROR_H

#define MV_ERROR_LEN_MAX 256

struct mv_error {
	char text[MV_ERROR_LEN_MAX]; /* NUL-terminated; cut if longer */
};

/* Writes the reason and returns `code`, a -errno, so that it can be the return statement. */
int mv_refuse(struct mv_error *error, int code, const char *format, ...)
	__attribute__((format(printf, 3, 4)));

/* The same, with the meaning of `code` appended. */
int mv_refuse_errno(struct mv_error *error, int code, const char *format, ...)
	__attribute__((format(printf, 3, 4)));

#endif
