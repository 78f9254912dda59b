/* SPDX-License-Identifier: Apache-2.0 */
/*
 * page_wire_read.c - protobuf's wire format, field by field. Everything here comes from a peer
 * that may lie: each length is compared with what is left before it is used.
 *
 * Threads, Errors, Ownership, Units, Source: see page_wire_read.h.
 */
#include "page_wire_read.h"

#include <errno.h>
#include <stdbool.h>

/* As deep as unknown groups may nest; protobuf's own limit. */
#define GROUP_DEPTH_MAX 100
#define VARINT_LEN_MAX	10
#define TAG_LEN_MAX	5

static size_t left(const struct wire_reader *reader)
{
	return (size_t)(reader->end - reader->at);
}

static bool read_varint(struct wire_reader *reader, size_t len_max, uint64_t *ret_value)
{
	uint64_t value = 0;
	const size_t len = left(reader) < len_max ? left(reader) : len_max;

	for (size_t i = 0; i < len; i++) {
		const uint8_t byte = reader->at[i];

		/* The tenth byte has room for one bit; what is above falls off, as in protobuf. */
		value |= (uint64_t)(byte & 0x7f) << (7 * i);
		if (byte < 0x80) {
			reader->at += i + 1;
			*ret_value = value;
			return true;
		}
	}
	return false;
}

static bool read_fixed(struct wire_reader *reader, size_t len, uint64_t *ret_value)
{
	uint64_t value = 0;

	if (left(reader) < len)
		return false;
	for (size_t i = 0; i < len; i++)
		value |= (uint64_t)reader->at[i] << (8 * i);
	reader->at += len;
	*ret_value = value;
	return true;
}

static bool read_tag(struct wire_reader *reader, uint32_t *ret_number, uint32_t *ret_type)
{
	uint64_t tag;

	if (!read_varint(reader, TAG_LEN_MAX, &tag) || tag > UINT32_MAX || tag >> 3 == 0)
		return false;
	*ret_number = (uint32_t)(tag >> 3);
	*ret_type = (uint32_t)(tag & 7);
	return true;
}

/* Read what follows a tag, groups excepted. */
static bool read_value(struct wire_reader *reader, uint32_t type, struct wire_field *ret_field)
{
	uint64_t value = 0;

	switch (type) {
	case WIRE_VARINT:
		if (!read_varint(reader, VARINT_LEN_MAX, &value))
			return false;
		break;
	case WIRE_FIXED64:
		if (!read_fixed(reader, 8, &value))
			return false;
		break;
	case WIRE_FIXED32:
		if (!read_fixed(reader, 4, &value))
			return false;
		break;
	case WIRE_BYTES:
		if (!read_varint(reader, VARINT_LEN_MAX, &value) || value > left(reader))
			return false;
		ret_field->data = reader->at;
		ret_field->len = (size_t)value;
		reader->at += value;
		break;
	default:
		return false;
	}
	ret_field->type = (enum wire_type)type;
	ret_field->value = value;
	return true;
}

/* Skip the rest of a group whose start tag has been read; iterative, a peer chooses the depth. */
static bool skip_group(struct wire_reader *reader, uint32_t number)
{
	uint32_t open[GROUP_DEPTH_MAX];
	size_t depth = 0;

	open[depth++] = number;
	while (depth > 0) {
		struct wire_field ignored;
		uint32_t type;

		if (!read_tag(reader, &number, &type))
			return false;
		if (type == WIRE_GROUP_END) {
			if (open[--depth] != number)
				return false;
		} else if (type == WIRE_GROUP) {
			if (depth == GROUP_DEPTH_MAX)
				return false;
			open[depth++] = number;
		} else if (!read_value(reader, type, &ignored)) {
			return false;
		}
	}
	return true;
}

int wire_next_field(struct wire_reader *reader, struct wire_field *ret_field)
{
	while (left(reader) > 0) {
		uint32_t type;

		if (!read_tag(reader, &ret_field->number, &type))
			return -EBADMSG;
		if (type == WIRE_GROUP) {
			if (!skip_group(reader, ret_field->number))
				return -EBADMSG;
			continue;
		}
		return read_value(reader, type, ret_field) ? 1 : -EBADMSG;
	}
	return 0;
}

/* Bytes of the UTF-8 sequence at `at`, at most `len_max` long; 0 if it is none. */
static size_t utf8_sequence(const uint8_t *at, size_t len_max)
{
	const uint8_t lead = at[0];
	size_t len;
	uint8_t low = 0x80;
	uint8_t high = 0xbf;

	if (lead < 0x80)
		return 1;
	if (lead >= 0xc2 && lead <= 0xdf)
		len = 2;
	else if (lead >= 0xe0 && lead <= 0xef)
		len = 3;
	else if (lead >= 0xf0 && lead <= 0xf4)
		len = 4;
	else
		return 0;
	if (len > len_max)
		return 0;
	/* Overlong forms, surrogates, and what is above U+10FFFF, all told by the second byte. */
	if (lead == 0xe0)
		low = 0xa0;
	else if (lead == 0xed)
		high = 0x9f;
	else if (lead == 0xf0)
		low = 0x90;
	else if (lead == 0xf4)
		high = 0x8f;
	if (at[1] < low || at[1] > high)
		return 0;
	for (size_t i = 2; i < len; i++) {
		if (at[i] < 0x80 || at[i] > 0xbf)
			return 0;
	}
	return len;
}

int wire_take_string(const struct wire_field *field, struct gw_wire_string *ret_string)
{
	for (size_t i = 0; i < field->len;) {
		const size_t len = utf8_sequence(field->data + i, field->len - i);

		if (len == 0)
			return -EBADMSG;
		i += len;
	}
	ret_string->data = (const char *)field->data;
	ret_string->len = field->len;
	return 0;
}
