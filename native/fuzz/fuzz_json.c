/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fuzz_json.c - the JSON of godwit-microvm's control socket and hand-off: parsed within its line, and
 * what it says of a member's type is true.
 */
#include "fuzz.h"

#include "json.h"

#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
	static struct mv_json json;
	struct mv_error error;
	/* As the parser asks: room for a NUL behind it, and not a byte more. */
	char *line = malloc(len + 1);
	const char *string = NULL;
	uint64_t number = 0;
	int err;

	FUZZ_CHECK(line);
	if (len)
		memcpy(line, data, len);
	err = mv_json_parse(line, len, &json, &error);
	FUZZ_CHECK(err == 0 || err < 0);
	if (err == 0) {
		FUZZ_CHECK(json.count <= MV_JSON_MEMBER_COUNT_MAX);
		for (uint32_t i = 0; i < json.count; i++) {
			const struct mv_json_member *member = &json.members[i];

			FUZZ_CHECK(strlen(member->name) <= len);
			if (member->type == MV_JSON_STRING)
				FUZZ_CHECK(strlen(member->string) <= len);
		}
		(void)mv_json_take_string(&json, "cmd", &string, &error);
		(void)mv_json_take_number(&json, "len", &number, &error);
		(void)mv_json_end(&json, &error);
	}
	free(line);
	return 0;
}
