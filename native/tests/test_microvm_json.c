/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_microvm_json.c - the control socket's lines: what is no flat object is refused, and what is
 * written is JSON whatever was put into it.
 */
#include "check.h"
#include "json.h"

#include <errno.h>

/* Parses a copy without a terminator behind it, so that a sanitizer sees a read too far. */
static int parse(const char *text, size_t len, struct mv_json *ret_json, char **ret_line)
{
	struct mv_error error;
	char *line = malloc(len > 0 ? len : 1);

	CHECK(line);
	memcpy(line, text, len);
	*ret_line = line;
	return mv_json_parse(line, len, ret_json, &error);
}

static void a_flat_object_is_read(void)
{
	static const char text[] =
		" { \"cmd\" : \"sa\\u0076e\" ,\"path\":\"a\\\"\\\\\\/\\n\\u00e4\\u20ac\",\"id\":"
		"18446744073709551615,\"deep\":true,\"low\":false,\"zero\":0 } \r";
	struct mv_json json;
	struct mv_error error;
	const char *string;
	uint64_t number = 7;
	char *line;

	CHECK_EQ(parse(text, strlen(text), &json, &line), 0);
	CHECK_EQ(mv_json_take_string(&json, "cmd", &string, &error), 1);
	CHECK_EQ(strcmp(string, "save"), 0);
	CHECK_EQ(mv_json_take_string(&json, "path", &string, &error), 1);
	CHECK_EQ(strcmp(string, "a\"\\/\n\xc3\xa4\xe2\x82\xac"), 0);
	CHECK_EQ(mv_json_take_number(&json, "nothing", &number, &error), 0);
	CHECK_EQ(number, 7);
	CHECK_EQ(mv_json_take_number(&json, "id", &number, &error), 1);
	CHECK(number == UINT64_MAX);
	CHECK_EQ(mv_json_take_number(&json, "deep", &number, &error), -EINVAL);
	CHECK_EQ(mv_json_take_string(&json, "zero", &string, &error), -EINVAL);
	CHECK_EQ(mv_json_take_number(&json, "zero", &number, &error), 1);
	CHECK_EQ(number, 0);
	CHECK_EQ(mv_json_end(&json, &error), -EINVAL);
	CHECK(strstr(error.text, "deep"));
	free(line);
}

static void anything_else_is_refused(void)
{
	static const char *const lines[] = {
		"",
		" ",
		"null",
		"[]",
		"\"cmd\"",
		"{",
		"}",
		"{}}",
		"{} x",
		"{,}",
		"{\"a\"}",
		"{\"a\":}",
		"{\"a\":1,}",
		"{\"a\":1 \"b\":2}",
		"{a:1}",
		"{'a':1}",
		"{\"a\":-1}",
		"{\"a\":1.5}",
		"{\"a\":1e3}",
		"{\"a\":01}",
		"{\"a\":+1}",
		"{\"a\":18446744073709551616}",
		"{\"a\":99999999999999999999999}",
		"{\"a\":null}",
		"{\"a\":truely}",
		"{\"a\":tru",
		"{\"a\":{}}",
		"{\"a\":[1]}",
		"{\"a\":\"b}",
		"{\"a\":\"b\\",
		"{\"a\":\"\\x\"}",
		"{\"a\":\"\\u12\"}",
		"{\"a\":\"\\u0000\"}",
		"{\"a\":\"\\ud800\"}",
		"{\"a\":\"\\udfff\"}",
		"{\"a\":\"tab\there\"}",
		"{\"a\":1,\"a\":2}",
		"{\"\\u0061\":1,\"a\":2}",
		"{\"1\":1,\"2\":1,\"3\":1,\"4\":1,\"5\":1,\"6\":1,\"7\":1,\"8\":1,\"9\":1}",
	};

	for (size_t i = 0; i < sizeof(lines) / sizeof(lines[0]); i++) {
		struct mv_json json;
		char *line;

		const int rc = parse(lines[i], strlen(lines[i]), &json, &line);

		if (rc != -EINVAL)
			fprintf(stderr, "accepted: %s\n", lines[i]);
		CHECK_EQ(rc, -EINVAL);
		free(line);
	}
}

static void every_beginning_and_every_changed_byte_is_survived(void)
{
	static const char text[] = "{\"cmd\":\"sa\\u0076e\",\"id\":12,\"x\":true}";
	const size_t len = strlen(text);
	struct mv_json json;
	char *line;

	for (size_t cut = 0; cut < len; cut++) {
		CHECK_EQ(parse(text, cut, &json, &line), -EINVAL);
		free(line);
	}
	for (size_t at = 0; at < len; at++) {
		for (int byte = 0; byte < 256; byte++) {
			char changed[sizeof(text)];

			memcpy(changed, text, sizeof(text));
			changed[at] = (char)byte;
			(void)parse(changed, len, &json, &line);
			free(line);
		}
	}
}

static void a_written_string_is_ascii_json(void)
{
	struct mv_text *text = calloc(1, sizeof(*text));

	CHECK(text);
	mv_text_add_string(text, "a\"b\\c\n\x7f\xff");
	CHECK_EQ(strcmp(text->bytes, "\"a\\\"b\\\\c\\u000a\\u007f?\""), 0);
	CHECK(!text->cut);
	free(text);
}

static void a_full_text_says_that_it_is_cut(void)
{
	struct mv_text *text = calloc(1, sizeof(*text));

	CHECK(text);
	for (unsigned int i = 0; i < MV_TEXT_LEN_MAX; i++)
		mv_text_add(text, "ab");
	CHECK(text->cut);
	CHECK(text->len < MV_TEXT_LEN_MAX);
	free(text);
}

int main(void)
{
	RUN(a_flat_object_is_read);
	RUN(anything_else_is_refused);
	RUN(every_beginning_and_every_changed_byte_is_survived);
	RUN(a_written_string_is_ascii_json);
	RUN(a_full_text_says_that_it_is_cut);
	return EXIT_SUCCESS;
}
