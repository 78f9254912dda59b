/* SPDX-License-Identifier: Apache-2.0 */
/*
 * page_wire_read.h - protobuf's wire format, field by field, from bytes that may lie.
 *
 * Threads    Pure functions.
 * Errors     -EBADMSG.
 * Ownership  Views into the input.
 * Units      Bytes.
 * Source     https://protobuf.dev/programming-guides/encoding/.
 */
#ifndef GW_PAGE_WIRE_READ_H
#define GW_PAGE_WIRE_READ_H

#include <godwit/page_wire.h>

#include <stddef.h>
#include <stdint.h>

enum wire_type {
	WIRE_VARINT = 0,
	WIRE_FIXED64 = 1,
	WIRE_BYTES = 2,
	WIRE_GROUP = 3,
	WIRE_GROUP_END = 4,
	WIRE_FIXED32 = 5,
};

struct wire_reader {
	const uint8_t *at;
	const uint8_t *end;
};

/* One field: `value` of a scalar, `data` and `len` of a length-delimited one. */
struct wire_field {
	uint32_t number;
	enum wire_type type;
	uint64_t value;
	const uint8_t *data;
	size_t len;
};

static inline struct wire_reader wire_reader_of(const uint8_t *data, size_t len)
{
	return (struct wire_reader){.at = data, .end = len ? data + len : data};
}

/* The content of a length-delimited field. */
static inline struct wire_reader wire_reader_in(const struct wire_field *field)
{
	return wire_reader_of(field->data, field->len);
}

/* The next field that is not a group; groups are passed over. Returns 1; 0 at the end; -EBADMSG. */
int wire_next_field(struct wire_reader *reader, struct wire_field *ret_field);

/* A string field, which must be UTF-8. Returns 0; -EBADMSG. */
int wire_take_string(const struct wire_field *field, struct gw_wire_string *ret_string);

#endif /* GW_PAGE_WIRE_READ_H */
