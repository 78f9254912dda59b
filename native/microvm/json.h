/* SPDX-License-Identifier: Apache-2.0 */
/*
 * json.h - the little JSON that the control socket speaks: one flat object a line in, any text out.
 *
 * Threads: none of it is shared.
 * Errors: -EINVAL with words. The reader refuses what it does not know: nested values, negative or
 *         broken numbers, doubled members, bytes behind the object.
 * Ownership: a parsed object points into the line, which it has changed.
 * Units: none.
 * Source: RFC 8259.
 */
#ifndef MV_JSON_H
#define MV_JSON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "error.h"

#define MV_JSON_MEMBER_COUNT_MAX 8u
#define MV_TEXT_LEN_MAX		 65536u

enum mv_json_type { MV_JSON_STRING = 1, MV_JSON_NUMBER = 2, MV_JSON_BOOL = 3 };

struct mv_json_member {
	const char *name;
	enum mv_json_type type;
	const char *string; /* NUL-terminated: \u0000 is refused */
	uint64_t number;    /* of a bool: 0 or 1 */
	bool taken;
};

struct mv_json {
	struct mv_json_member members[MV_JSON_MEMBER_COUNT_MAX];
	uint32_t count;
};

/* `line` has `len` bytes and room for a NUL behind them. Returns 0 or -EINVAL. */
int mv_json_parse(char *line, size_t len, struct mv_json *ret_json, struct mv_error *error);

/*
 * Take a member of that name and type. Return 1 and the value; 0 there is none, *ret_ is untouched;
 * -EINVAL it has another type.
 */
int mv_json_take_string(struct mv_json *json, const char *name, const char **ret_string,
			struct mv_error *error);
int mv_json_take_number(struct mv_json *json, const char *name, uint64_t *ret_number,
			struct mv_error *error);

/* Returns 0, or -EINVAL if there is a member that nobody took. */
int mv_json_end(const struct mv_json *json, struct mv_error *error);

/* Text that is cut, and says so, when it is full. */
struct mv_text {
	char bytes[MV_TEXT_LEN_MAX];
	size_t len;
	bool cut;
};

void mv_text_add(struct mv_text *text, const char *format, ...)
	__attribute__((format(printf, 2, 3)));

/* A JSON string with its quotes; what is not ASCII becomes a question mark. */
void mv_text_add_string(struct mv_text *text, const char *string);

#endif
