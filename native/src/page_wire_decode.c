/* SPDX-License-Identifier: Apache-2.0 */
/*
 * page_wire_decode.c - godwit.page.v1 from the wire. Everything here comes from a
 * peer that may lie: each length is compared with what is left before it is used.
 *
 * Threads, Errors, Ownership, Units, Source: see page_wire.h.
 */
#include <godwit/page_wire.h>

#include <errno.h>
#include <stdbool.h>
#include <string.h>

enum wire_type {
	WIRE_VARINT = 0,
	WIRE_FIXED64 = 1,
	WIRE_BYTES = 2,
	WIRE_GROUP = 3,
	WIRE_GROUP_END = 4,
	WIRE_FIXED32 = 5,
};

/* As deep as unknown groups may nest; protobuf's own limit. */
#define GROUP_DEPTH_MAX 100
#define VARINT_LEN_MAX	10
#define TAG_LEN_MAX	5

struct reader {
	const uint8_t *at;
	const uint8_t *end;
};

/* One field: `value` of a scalar, `data` and `len` of a length-delimited one. */
struct field {
	uint32_t number;
	enum wire_type type;
	uint64_t value;
	const uint8_t *data;
	size_t len;
};

static size_t left(const struct reader *reader)
{
	return (size_t)(reader->end - reader->at);
}

static bool read_varint(struct reader *reader, size_t len_max, uint64_t *ret_value)
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

static bool read_fixed(struct reader *reader, size_t len, uint64_t *ret_value)
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

static bool read_tag(struct reader *reader, uint32_t *ret_number, uint32_t *ret_type)
{
	uint64_t tag;

	if (!read_varint(reader, TAG_LEN_MAX, &tag) || tag > UINT32_MAX || tag >> 3 == 0)
		return false;
	*ret_number = (uint32_t)(tag >> 3);
	*ret_type = (uint32_t)(tag & 7);
	return true;
}

/* Read what follows a tag, groups excepted. */
static bool read_value(struct reader *reader, uint32_t type, struct field *ret_field)
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
static bool skip_group(struct reader *reader, uint32_t number)
{
	uint32_t open[GROUP_DEPTH_MAX];
	size_t depth = 0;

	open[depth++] = number;
	while (depth > 0) {
		struct field ignored;
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

/* The next field that is not a group. Returns 1; 0 at the end; -EBADMSG. */
static int next_field(struct reader *reader, struct field *ret_field)
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

static struct reader reader_of(const uint8_t *data, size_t len)
{
	return (struct reader){.at = data, .end = len ? data + len : data};
}

static struct reader reader_in(const struct field *field)
{
	return reader_of(field->data, field->len);
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

static int take_string(const struct field *field, struct gw_wire_string *ret_string)
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

/*
 * Each decoder below decodes into what is there, so that a message member that comes
 * twice is merged as protobuf merges it; its caller clears first. A field with a known
 * number and another wire type falls through every condition: it is unknown.
 */

static int decode_hello(struct reader reader, struct gw_page_hello *hello)
{
	struct field field;
	int got;

	while ((got = next_field(&reader, &field)) > 0) {
		int err = 0;

		if (field.number == 1 && field.type == WIRE_BYTES)
			err = take_string(&field, &hello->session_id);
		else if (field.number == 2 && field.type == WIRE_BYTES)
			err = take_string(&field, &hello->image_id);
		else if (field.number == 3 && field.type == WIRE_VARINT)
			hello->epoch = field.value;
		else if (field.number == 4 && field.type == WIRE_VARINT)
			hello->lane = (int32_t)(uint32_t)field.value;
		else if (field.number == 5 && field.type == WIRE_BYTES)
			err = take_string(&field, &hello->traceparent);
		if (err)
			return err;
	}
	return got;
}

static int decode_want(struct reader reader, struct gw_page_want *want)
{
	struct field field;
	int got;

	while ((got = next_field(&reader, &field)) > 0) {
		if (field.type != WIRE_VARINT)
			continue;
		if (field.number == 1)
			want->offset = field.value;
		else if (field.number == 2)
			want->len = field.value;
		else if (field.number == 3)
			want->generation = field.value;
	}
	return got;
}

static int decode_heartbeat(struct reader reader, struct gw_page_heartbeat *heartbeat)
{
	struct field field;
	int got;

	while ((got = next_field(&reader, &field)) > 0) {
		if (field.number == 1 && field.type == WIRE_VARINT)
			heartbeat->sequence = field.value;
	}
	return got;
}

static int decode_region(struct reader reader, struct gw_wire_region *region)
{
	struct field field;
	int got;

	while ((got = next_field(&reader, &field)) > 0) {
		if (field.type != WIRE_VARINT)
			continue;
		if (field.number == 1)
			region->region_id = (uint32_t)field.value;
		else if (field.number == 2)
			region->gpa = field.value;
		else if (field.number == 3)
			region->size = field.value;
		else if (field.number == 4)
			region->page_size = (uint32_t)field.value;
	}
	return got;
}

static int decode_image_region(const struct field *field, struct gw_wire_image *image)
{
	struct gw_wire_region region = {0};
	const int err = decode_region(reader_in(field), &region);

	if (err)
		return err;
	if (image->region_count < GW_PAGE_REGION_COUNT_MAX)
		image->regions[image->region_count] = region;
	/* Counted beyond the array, so that the owner can see that it has not got them all. */
	if (image->region_count < UINT32_MAX)
		image->region_count++;
	return 0;
}

static int decode_image(struct reader reader, struct gw_wire_image *image)
{
	struct field field;
	int got;

	while ((got = next_field(&reader, &field)) > 0) {
		int err = 0;

		if (field.number == 1 && field.type == WIRE_BYTES)
			err = take_string(&field, &image->image_id);
		else if (field.number == 2 && field.type == WIRE_BYTES)
			err = take_string(&field, &image->vm_id);
		else if (field.number == 3 && field.type == WIRE_VARINT)
			image->epoch = field.value;
		else if (field.number == 4 && field.type == WIRE_BYTES)
			err = take_string(&field, &image->boot_id);
		else if (field.number == 5 && field.type == WIRE_VARINT)
			image->inode = field.value;
		else if (field.number == 6 && field.type == WIRE_VARINT)
			image->generation = field.value;
		else if (field.number == 7 && field.type == WIRE_VARINT)
			image->state = (int32_t)(uint32_t)field.value;
		else if (field.number == 8 && field.type == WIRE_BYTES)
			err = decode_image_region(&field, image);
		if (err)
			return err;
	}
	return got;
}

static int decode_ready(struct reader reader, struct gw_page_ready *ready)
{
	struct field field;
	int got;

	while ((got = next_field(&reader, &field)) > 0) {
		int err = 0;

		if (field.number == 1 && field.type == WIRE_BYTES)
			err = decode_image(reader_in(&field), &ready->image);
		else if (field.number == 2 && field.type == WIRE_VARINT)
			ready->want_max = field.value;
		if (err)
			return err;
	}
	return got;
}

static int decode_pages(struct reader reader, struct gw_pages *pages)
{
	struct field field;
	int got;

	while ((got = next_field(&reader, &field)) > 0) {
		if (field.number == 1 && field.type == WIRE_VARINT)
			pages->offset = field.value;
		else if (field.number == 2 && field.type == WIRE_VARINT)
			pages->len = field.value;
		else if (field.number == 3 && field.type == WIRE_VARINT)
			pages->encoding = (int32_t)(uint32_t)field.value;
		else if (field.number == 4 && field.type == WIRE_VARINT)
			pages->generation = field.value;
		else if (field.number == 5 && field.type == WIRE_VARINT)
			pages->image_state = (int32_t)(uint32_t)field.value;
		else if (field.number == 6 && field.type == WIRE_FIXED32)
			pages->crc32c = (uint32_t)field.value;
		else if (field.number == 15 && field.type == WIRE_BYTES)
			pages->data = (struct gw_wire_bytes){.data = field.data, .len = field.len};
	}
	return got;
}

int gw_fetch_request_decode(const uint8_t *data, size_t len, struct gw_fetch_request *ret_request)
{
	struct reader reader = reader_of(data, len);
	struct gw_fetch_request *request = ret_request;
	struct field field;
	int got;

	request->kind = GW_FETCH_REQUEST_NONE;
	while ((got = next_field(&reader, &field)) > 0) {
		int err;

		if (field.type != WIRE_BYTES || field.number < GW_FETCH_REQUEST_HELLO ||
		    field.number > GW_FETCH_REQUEST_HEARTBEAT)
			continue;
		if (request->kind != (enum gw_fetch_request_kind)field.number) {
			memset(request, 0, sizeof(*request));
			request->kind = (enum gw_fetch_request_kind)field.number;
		}
		if (request->kind == GW_FETCH_REQUEST_HELLO)
			err = decode_hello(reader_in(&field), &request->hello);
		else if (request->kind == GW_FETCH_REQUEST_WANT)
			err = decode_want(reader_in(&field), &request->want);
		else
			err = decode_heartbeat(reader_in(&field), &request->heartbeat);
		if (err)
			return err;
	}
	return got;
}

int gw_fetch_response_decode(const uint8_t *data, size_t len,
			     struct gw_fetch_response *ret_response)
{
	struct reader reader = reader_of(data, len);
	struct gw_fetch_response *response = ret_response;
	struct field field;
	int got;

	response->kind = GW_FETCH_RESPONSE_NONE;
	while ((got = next_field(&reader, &field)) > 0) {
		enum gw_fetch_response_kind kind = (enum gw_fetch_response_kind)field.number;
		const bool same = response->kind == kind;
		int err = 0;

		if (field.type != WIRE_BYTES)
			continue;
		if (kind == GW_FETCH_RESPONSE_READY) {
			if (!same)
				memset(&response->ready, 0, sizeof(response->ready));
			err = decode_ready(reader_in(&field), &response->ready);
		} else if (kind == GW_FETCH_RESPONSE_PAGES) {
			if (!same)
				memset(&response->pages, 0, sizeof(response->pages));
			err = decode_pages(reader_in(&field), &response->pages);
		} else if (kind == GW_FETCH_RESPONSE_HEARTBEAT) {
			if (!same)
				memset(&response->heartbeat, 0, sizeof(response->heartbeat));
			err = decode_heartbeat(reader_in(&field), &response->heartbeat);
		} else {
			continue;
		}
		if (err)
			return err;
		response->kind = kind;
	}
	return got;
}

int gw_describe_request_decode(const uint8_t *data, size_t len, struct gw_wire_string *ret_image_id)
{
	struct reader reader = reader_of(data, len);
	struct field field;
	int got;

	*ret_image_id = (struct gw_wire_string){0};
	while ((got = next_field(&reader, &field)) > 0) {
		if (field.number == 1 && field.type == WIRE_BYTES &&
		    take_string(&field, ret_image_id))
			return -EBADMSG;
	}
	return got;
}

static int decode_extent(struct reader reader, struct gw_wire_extent *extent)
{
	struct field field;
	int got;

	while ((got = next_field(&reader, &field)) > 0) {
		if (field.type != WIRE_VARINT)
			continue;
		if (field.number == 1)
			extent->offset = field.value;
		else if (field.number == 2)
			extent->len = field.value;
	}
	return got;
}

int gw_describe_response_decode(const uint8_t *data, size_t len,
				struct gw_describe_response *ret_response)
{
	struct reader reader = reader_of(data, len);
	struct gw_wire_extent extent = {0};
	struct field field;
	int got;

	memset(ret_response, 0, sizeof(*ret_response));
	while ((got = next_field(&reader, &field)) > 0) {
		int err = 0;

		if (field.type != WIRE_BYTES)
			continue;
		if (field.number == 1) {
			err = decode_image(reader_in(&field), &ret_response->image);
		} else if (field.number == 2) {
			err = decode_extent(reader_in(&field), &extent);
			ret_response->extent_count++;
		}
		if (err)
			return err;
	}
	return got;
}

int gw_describe_response_next(const uint8_t *data, size_t len, size_t *cursor,
			      struct gw_wire_extent *ret_extent)
{
	struct reader reader = reader_of(data + *cursor, len - *cursor);
	struct field field;
	int got;

	while ((got = next_field(&reader, &field)) > 0) {
		if (field.number != 2 || field.type != WIRE_BYTES)
			continue;
		*ret_extent = (struct gw_wire_extent){0};
		got = decode_extent(reader_in(&field), ret_extent);
		if (got < 0)
			return got;
		*cursor = (size_t)(reader.at - data);
		return 1;
	}
	*cursor = len;
	return got;
}
