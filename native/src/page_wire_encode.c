/* SPDX-License-Identifier: Apache-2.0 */
/*
 * page_wire_encode.c - godwit.page.v1 onto the wire.
 *
 * A message is written from its end to its beginning, so that the length of a nested
 * message is known when its prefix is written: one pass, no size functions that could
 * disagree with the writers. Fields of one message therefore appear here last first.
 *
 * Threads, Errors, Ownership, Units, Source: see page_wire.h.
 */
#include <godwit/crc32c.h>
#include <godwit/page_wire.h>

#include <errno.h>
#include <stdbool.h>
#include <string.h>

#define TAG(number, type) ((uint64_t)(number) << 3 | (type))
#define VARINT		  0u
#define BYTES		  2u
#define FIXED32		  5u

/* What has been written is [at, end); full = it did not fit, and nothing in it counts. */
struct writer {
	uint8_t *begin;
	uint8_t *at;
	uint8_t *end;
	bool full;
};

static struct writer writer_of(uint8_t *data, size_t cap)
{
	return (struct writer){.begin = data, .at = data + cap, .end = data + cap};
}

static size_t written(const struct writer *writer)
{
	return (size_t)(writer->end - writer->at);
}

static void put_bytes(struct writer *writer, const void *data, size_t len)
{
	if (writer->full || (size_t)(writer->at - writer->begin) < len) {
		writer->full = true;
		return;
	}
	writer->at -= len;
	if (len)
		memcpy(writer->at, data, len);
}

static void put_varint(struct writer *writer, uint64_t value)
{
	uint8_t bytes[10];
	size_t len = 0;

	do {
		bytes[len] = (uint8_t)(value & 0x7f);
		value >>= 7;
		if (value)
			bytes[len] |= 0x80;
		len++;
	} while (value);
	put_bytes(writer, bytes, len);
}

/* proto3: a scalar that is zero is not written. */
static void put_scalar(struct writer *writer, uint32_t number, uint64_t value)
{
	if (value == 0)
		return;
	put_varint(writer, value);
	put_varint(writer, TAG(number, VARINT));
}

/* An enum is an int32: a negative one is written as ten bytes, as protobuf does. */
static void put_enum(struct writer *writer, uint32_t number, int32_t value)
{
	put_scalar(writer, number, (uint64_t)(int64_t)value);
}

static void put_string(struct writer *writer, uint32_t number, const struct gw_wire_string *string)
{
	if (string->len == 0)
		return;
	put_bytes(writer, string->data, string->len);
	put_varint(writer, string->len);
	put_varint(writer, TAG(number, BYTES));
}

static void put_view(struct writer *writer, uint32_t number, const struct gw_wire_bytes *view)
{
	const struct gw_wire_string string = {.data = (const char *)view->data, .len = view->len};

	put_string(writer, number, &string);
}

static void put_fixed32(struct writer *writer, uint32_t number, uint32_t value)
{
	const uint8_t bytes[4] = {(uint8_t)value, (uint8_t)(value >> 8), (uint8_t)(value >> 16),
				  (uint8_t)(value >> 24)};

	if (value == 0)
		return;
	put_bytes(writer, bytes, sizeof(bytes));
	put_varint(writer, TAG(number, FIXED32));
}

/* The prefix of a nested message whose content is what was written since `end_len`. */
static void put_message(struct writer *writer, uint32_t number, size_t end_len)
{
	put_varint(writer, written(writer) - end_len);
	put_varint(writer, TAG(number, BYTES));
}

static ssize_t finish(struct writer *writer, uint8_t *ret_data)
{
	const size_t len = written(writer);

	if (writer->full)
		return -ENOSPC;
	memmove(ret_data, writer->at, len);
	return (ssize_t)len;
}

static void put_image(struct writer *writer, uint32_t number, const struct gw_wire_image *image)
{
	const size_t end_len = written(writer);

	for (uint32_t i = image->region_count; i-- > 0;) {
		const struct gw_wire_region *region = &image->regions[i];
		const size_t region_end_len = written(writer);

		put_scalar(writer, 4, region->page_size);
		put_scalar(writer, 3, region->size);
		put_scalar(writer, 2, region->gpa);
		put_scalar(writer, 1, region->region_id);
		put_message(writer, 8, region_end_len);
	}
	put_enum(writer, 7, image->state);
	put_scalar(writer, 6, image->generation);
	put_scalar(writer, 5, image->inode);
	put_string(writer, 4, &image->boot_id);
	put_scalar(writer, 3, image->epoch);
	put_string(writer, 2, &image->vm_id);
	put_string(writer, 1, &image->image_id);
	put_message(writer, number, end_len);
}

ssize_t gw_fetch_request_encode(const struct gw_fetch_request *request, uint8_t *ret_data,
				size_t cap)
{
	struct writer writer = writer_of(ret_data, cap);

	switch (request->kind) {
	case GW_FETCH_REQUEST_HELLO:
		put_view(&writer, 8, &request->hello.token);
		put_scalar(&writer, 7, request->hello.accepts_lz4);
		put_scalar(&writer, 6, request->hello.zero_run_max);
		put_string(&writer, 5, &request->hello.traceparent);
		put_enum(&writer, 4, request->hello.lane);
		put_scalar(&writer, 3, request->hello.epoch);
		put_string(&writer, 2, &request->hello.image_id);
		put_string(&writer, 1, &request->hello.session_id);
		break;
	case GW_FETCH_REQUEST_WANT:
		put_scalar(&writer, 3, request->want.generation);
		put_scalar(&writer, 2, request->want.len);
		put_scalar(&writer, 1, request->want.offset);
		break;
	case GW_FETCH_REQUEST_HEARTBEAT:
		put_scalar(&writer, 1, request->heartbeat.sequence);
		break;
	default:
		return -EINVAL;
	}
	put_message(&writer, (uint32_t)request->kind, 0);
	return finish(&writer, ret_data);
}

ssize_t gw_fetch_response_encode(const struct gw_fetch_response *response, uint8_t *ret_data,
				 size_t cap)
{
	struct writer writer = writer_of(ret_data, cap);

	switch (response->kind) {
	case GW_FETCH_RESPONSE_READY:
		if (response->ready.image.region_count > GW_PAGE_REGION_COUNT_MAX)
			return -EINVAL;
		put_scalar(&writer, 2, response->ready.want_max);
		put_image(&writer, 1, &response->ready.image);
		break;
	case GW_FETCH_RESPONSE_HEARTBEAT:
		put_scalar(&writer, 1, response->heartbeat.sequence);
		break;
	default:
		return -EINVAL;
	}
	put_message(&writer, (uint32_t)response->kind, 0);
	return finish(&writer, ret_data);
}

ssize_t gw_describe_request_encode(const struct gw_wire_string *image_id, uint8_t *ret_data,
				   size_t cap)
{
	struct writer writer = writer_of(ret_data, cap);

	put_string(&writer, 1, image_id);
	return finish(&writer, ret_data);
}

ssize_t gw_describe_response_encode(const struct gw_wire_image *image,
				    const struct gw_wire_extent *extents, size_t extent_count,
				    uint8_t *ret_data, size_t cap)
{
	struct writer writer = writer_of(ret_data, cap);

	if (image->region_count > GW_PAGE_REGION_COUNT_MAX)
		return -EINVAL;
	for (size_t i = extent_count; i-- > 0;) {
		const size_t end_len = written(&writer);

		put_scalar(&writer, 2, extents[i].len);
		put_scalar(&writer, 1, extents[i].offset);
		put_message(&writer, 2, end_len);
	}
	put_image(&writer, 1, image);
	return finish(&writer, ret_data);
}

size_t gw_pages_encode_head(const struct gw_pages *pages, uint8_t *ret_head)
{
	uint8_t head[GW_PAGES_HEAD_LEN_MAX];
	struct writer writer = writer_of(head, sizeof(head));

	if (pages->data.len) {
		put_varint(&writer, pages->data.len);
		put_varint(&writer, TAG(15, BYTES));
	}
	put_fixed32(&writer, 6, pages->crc32c);
	put_enum(&writer, 5, pages->image_state);
	put_scalar(&writer, 4, pages->generation);
	put_enum(&writer, 3, pages->encoding);
	put_scalar(&writer, 2, pages->len);
	put_scalar(&writer, 1, pages->offset);
	put_varint(&writer, written(&writer) + pages->data.len);
	put_varint(&writer, TAG(GW_FETCH_RESPONSE_PAGES, BYTES));
	/* Three u64 and two enums of 11 bytes each, the CRC 5, the data's prefix 11, the outer 11. */
	_Static_assert(5 * 11 + 5 + 11 + 11 <= GW_PAGES_HEAD_LEN_MAX, "any value fits");
	return (size_t)finish(&writer, ret_head);
}

static void store_le(uint8_t *at, uint64_t value, size_t len)
{
	for (size_t i = 0; i < len; i++)
		at[i] = (uint8_t)(value >> (8 * i));
}

uint32_t gw_pages_crc32c(const struct gw_pages *pages)
{
	uint8_t header[32];

	store_le(header, pages->offset, 8);
	store_le(header + 8, pages->len, 8);
	store_le(header + 16, pages->generation, 8);
	store_le(header + 24, (uint32_t)pages->encoding, 4);
	store_le(header + 28, (uint32_t)pages->image_state, 4);
	return gw_crc32c(gw_crc32c(0, header, sizeof(header)), pages->data.data, pages->data.len);
}
