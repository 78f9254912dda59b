/* SPDX-License-Identifier: Apache-2.0 */
/*
 * json.c - see json.h.
 *
 * Threads, Errors, Ownership, Units, Source: see json.h.
 */
#include "json.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* What is left of a line. Unescaping writes behind the reader: text never gets longer. */
struct cursor {
	char *at;
	char *end;
};

static void skip_space(struct cursor *cursor)
{
	while (cursor->at < cursor->end && (*cursor->at == ' ' || *cursor->at == '\t' ||
					    *cursor->at == '\r' || *cursor->at == '\n'))
		cursor->at++;
}

static bool take(struct cursor *cursor, char wanted)
{
	skip_space(cursor);
	if (cursor->at == cursor->end || *cursor->at != wanted)
		return false;
	cursor->at++;
	return true;
}

static int hex_digit(char digit)
{
	if (digit >= '0' && digit <= '9')
		return digit - '0';
	if (digit >= 'a' && digit <= 'f')
		return digit - 'a' + 10;
	if (digit >= 'A' && digit <= 'F')
		return digit - 'A' + 10;
	return -1;
}

/* Four hex digits; no surrogates, which would come in pairs, and no NUL. */
static bool take_code(struct cursor *cursor, uint32_t *ret_code)
{
	uint32_t code = 0;

	if (cursor->end - cursor->at < 4)
		return false;
	for (int i = 0; i < 4; i++) {
		const int digit = hex_digit(*cursor->at++);

		if (digit < 0)
			return false;
		code = code << 4 | (uint32_t)digit;
	}
	*ret_code = code;
	return code != 0 && (code < 0xD800 || code > 0xDFFF);
}

static char *put_utf8(char *to, uint32_t code)
{
	if (code < 0x80) {
		*to++ = (char)code;
	} else if (code < 0x800) {
		*to++ = (char)(0xC0 | code >> 6);
		*to++ = (char)(0x80 | (code & 0x3F));
	} else {
		*to++ = (char)(0xE0 | code >> 12);
		*to++ = (char)(0x80 | (code >> 6 & 0x3F));
		*to++ = (char)(0x80 | (code & 0x3F));
	}
	return to;
}

/* Behind a backslash. Returns where the next character goes, NULL if it is no escape. */
static char *take_escape(struct cursor *cursor, char *to)
{
	static const char names[] = "\"\\/bfnrt", values[] = "\"\\/\b\f\n\r\t";
	const char name = cursor->at < cursor->end ? *cursor->at++ : '\0';
	const char *found = name != '\0' ? strchr(names, name) : NULL;
	uint32_t code;

	if (found) {
		*to++ = values[found - names];
		return to;
	}
	return name == 'u' && take_code(cursor, &code) ? put_utf8(to, code) : NULL;
}

static bool take_string(struct cursor *cursor, const char **ret_string)
{
	char *start, *to;

	if (!take(cursor, '"'))
		return false;
	start = to = cursor->at;
	while (cursor->at < cursor->end) {
		const char next = *cursor->at++;

		if (next == '"') {
			*to = '\0'; /* at the quote or before it */
			*ret_string = start;
			return true;
		}
		if ((unsigned char)next < 0x20)
			return false;
		if (next != '\\')
			*to++ = next;
		else if (!(to = take_escape(cursor, to)))
			return false;
	}
	return false;
}

static bool take_number(struct cursor *cursor, uint64_t *ret_number)
{
	const char *start = cursor->at;
	uint64_t number = 0;

	while (cursor->at < cursor->end && *cursor->at >= '0' && *cursor->at <= '9') {
		if (__builtin_mul_overflow(number, 10u, &number) ||
		    __builtin_add_overflow(number, (uint64_t)(*cursor->at - '0'), &number))
			return false;
		cursor->at++;
	}
	*ret_number = number;
	return cursor->at > start && (*start != '0' || cursor->at == start + 1);
}

static bool take_word(struct cursor *cursor, const char *word)
{
	const size_t len = strlen(word);

	if ((size_t)(cursor->end - cursor->at) < len || memcmp(cursor->at, word, len) != 0)
		return false;
	cursor->at += len;
	return true;
}

static bool take_value(struct cursor *cursor, struct mv_json_member *member)
{
	skip_space(cursor);
	if (cursor->at == cursor->end)
		return false;
	if (*cursor->at == '"') {
		member->type = MV_JSON_STRING;
		return take_string(cursor, &member->string);
	}
	member->type = MV_JSON_BOOL;
	member->number = *cursor->at == 't';
	if (take_word(cursor, "true") || take_word(cursor, "false"))
		return true;
	member->type = MV_JSON_NUMBER;
	return take_number(cursor, &member->number);
}

static struct mv_json_member *find(struct mv_json *json, const char *name)
{
	for (uint32_t i = 0; i < json->count; i++)
		if (strcmp(json->members[i].name, name) == 0)
			return &json->members[i];
	return NULL;
}

static int take_member(struct cursor *cursor, struct mv_json *json, struct mv_error *error)
{
	struct mv_json_member member = {0};

	if (!take_string(cursor, &member.name) || !take(cursor, ':') ||
	    !take_value(cursor, &member))
		return mv_refuse(error, -EINVAL,
				 "member %u is not \"name\": string, number >= 0 or bool",
				 json->count);
	if (find(json, member.name))
		return mv_refuse(error, -EINVAL, "member %u is there already", json->count);
	if (json->count == MV_JSON_MEMBER_COUNT_MAX)
		return mv_refuse(error, -EINVAL, "more than %u members", MV_JSON_MEMBER_COUNT_MAX);
	json->members[json->count++] = member;
	return 0;
}

int mv_json_parse(char *line, size_t len, struct mv_json *ret_json, struct mv_error *error)
{
	struct cursor cursor = {.at = line, .end = line + len};
	struct mv_json json = {0};

	if (!take(&cursor, '{'))
		return mv_refuse(error, -EINVAL, "not a JSON object");
	if (!take(&cursor, '}')) {
		do {
			const int rc = take_member(&cursor, &json, error);

			if (rc < 0)
				return rc;
		} while (take(&cursor, ','));
		if (!take(&cursor, '}'))
			return mv_refuse(error, -EINVAL, "the object does not end");
	}
	skip_space(&cursor);
	if (cursor.at != cursor.end)
		return mv_refuse(error, -EINVAL, "%zu bytes behind the object",
				 (size_t)(cursor.end - cursor.at));
	*ret_json = json;
	return 0;
}

static int take_typed(struct mv_json *json, const char *name, enum mv_json_type type,
		      struct mv_json_member **ret_member, struct mv_error *error)
{
	struct mv_json_member *member = find(json, name);

	if (!member)
		return 0;
	if (member->type != type)
		return mv_refuse(error, -EINVAL, "%s is not a %s", name,
				 type == MV_JSON_STRING ? "string" : "number");
	member->taken = true;
	*ret_member = member;
	return 1;
}

int mv_json_take_string(struct mv_json *json, const char *name, const char **ret_string,
			struct mv_error *error)
{
	struct mv_json_member *member = NULL;
	const int rc = take_typed(json, name, MV_JSON_STRING, &member, error);

	if (member)
		*ret_string = member->string;
	return rc;
}

int mv_json_take_number(struct mv_json *json, const char *name, uint64_t *ret_number,
			struct mv_error *error)
{
	struct mv_json_member *member = NULL;
	const int rc = take_typed(json, name, MV_JSON_NUMBER, &member, error);

	if (member)
		*ret_number = member->number;
	return rc;
}

int mv_json_end(const struct mv_json *json, struct mv_error *error)
{
	for (uint32_t i = 0; i < json->count; i++)
		if (!json->members[i].taken)
			return mv_refuse(error, -EINVAL, "unknown member %.64s",
					 json->members[i].name);
	return 0;
}

/* --- writing ------------------------------------------------------------------------------------- */

void mv_text_add(struct mv_text *text, const char *format, ...)
{
	const size_t room = sizeof(text->bytes) - text->len;
	va_list args;
	int len;

	va_start(args, format);
	/* NOLINTNEXTLINE(clang-analyzer-valist.Uninitialized): false when one run checks many files */
	len = vsnprintf(text->bytes + text->len, room, format, args);
	va_end(args);
	if (len < 0 || (size_t)len >= room)
		text->cut = true;
	else
		text->len += (size_t)len;
}

void mv_text_add_string(struct mv_text *text, const char *string)
{
	mv_text_add(text, "\"");
	for (; *string != '\0'; string++) {
		const unsigned char next = (unsigned char)*string;

		if (next == '"' || next == '\\')
			mv_text_add(text, "\\%c", next);
		else if (next < 0x20 || next == 0x7F)
			mv_text_add(text, "\\u%04x", next);
		else if (next >= 0x80)
			mv_text_add(text, "?"); /* maybe not UTF-8: a reply must always be JSON */
		else
			mv_text_add(text, "%c", next);
	}
	mv_text_add(text, "\"");
}
