/* SPDX-License-Identifier: Apache-2.0 */
/*
 * page_wire_decode.c - the messages of godwit.page.v1 from the wire.
 *
 * Threads, Errors, Ownership, Units, Source: see page_wire.h.
 */
#include "page_wire_read.h"

#include <errno.h>
#include <stdbool.h>
#include <string.h>

/*
 * Each decoder below decodes into what is there, so that a message member that comes
 * twice is merged as protobuf merges it; its caller clears first. A field with a known
 * number and another wire type falls through every condition: it is unknown.
 */

static int decode_hello(struct wire_reader reader, struct gw_page_hello *hello)
{
	struct wire_field field;
	int got;

	while ((got = wire_next_field(&reader, &field)) > 0) {
		int err = 0;

		if (field.number == 1 && field.type == WIRE_BYTES)
			err = wire_take_string(&field, &hello->session_id);
		else if (field.number == 2 && field.type == WIRE_BYTES)
			err = wire_take_string(&field, &hello->image_id);
		else if (field.number == 3 && field.type == WIRE_VARINT)
			hello->epoch = field.value;
		else if (field.number == 4 && field.type == WIRE_VARINT)
			hello->lane = (int32_t)(uint32_t)field.value;
		else if (field.number == 5 && field.type == WIRE_BYTES)
			err = wire_take_string(&field, &hello->traceparent);
		else if (field.number == 6 && field.type == WIRE_VARINT)
			hello->zero_run_max = field.value;
		else if (field.number == 7 && field.type == WIRE_VARINT)
			hello->accepts_lz4 = field.value != 0;
		else if (field.number == 8 && field.type == WIRE_BYTES)
			hello->token = (struct gw_wire_bytes){.data = field.data, .len = field.len};
		if (err)
			return err;
	}
	return got;
}

static int decode_token(struct wire_reader reader, struct gw_page_token *token)
{
	struct wire_field field;
	int got;

	while ((got = wire_next_field(&reader, &field)) > 0) {
		const struct gw_wire_bytes view = {.data = field.data, .len = field.len};

		if (field.type != WIRE_BYTES)
			continue;
		if (field.number == 1)
			token->claims = view;
		else if (field.number == 2)
			token->signature = view;
	}
	return got;
}

static int decode_claims(struct wire_reader reader, struct gw_page_claims *claims)
{
	struct wire_field field;
	int got;

	while ((got = wire_next_field(&reader, &field)) > 0) {
		int err = 0;

		if (field.number == 1 && field.type == WIRE_BYTES)
			err = wire_take_string(&field, &claims->image_id);
		else if (field.number == 2 && field.type == WIRE_VARINT)
			claims->epoch = field.value;
		else if (field.number == 3 && field.type == WIRE_BYTES)
			err = wire_take_string(&field, &claims->destination);
		else if (field.number == 4 && field.type == WIRE_VARINT)
			claims->expires_unix_s = field.value;
		if (err)
			return err;
	}
	return got;
}

static int decode_want(struct wire_reader reader, struct gw_page_want *want)
{
	struct wire_field field;
	int got;

	while ((got = wire_next_field(&reader, &field)) > 0) {
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

static int decode_heartbeat(struct wire_reader reader, struct gw_page_heartbeat *heartbeat)
{
	struct wire_field field;
	int got;

	while ((got = wire_next_field(&reader, &field)) > 0) {
		if (field.number == 1 && field.type == WIRE_VARINT)
			heartbeat->sequence = field.value;
	}
	return got;
}

static int decode_region(struct wire_reader reader, struct gw_wire_region *region)
{
	struct wire_field field;
	int got;

	while ((got = wire_next_field(&reader, &field)) > 0) {
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

static int decode_image_region(const struct wire_field *field, struct gw_wire_image *image)
{
	struct gw_wire_region region = {0};
	const int err = decode_region(wire_reader_in(field), &region);

	if (err)
		return err;
	if (image->region_count < GW_PAGE_REGION_COUNT_MAX)
		image->regions[image->region_count] = region;
	/* Counted beyond the array, so that the owner can see that it has not got them all. */
	if (image->region_count < UINT32_MAX)
		image->region_count++;
	return 0;
}

static int decode_image(struct wire_reader reader, struct gw_wire_image *image)
{
	struct wire_field field;
	int got;

	while ((got = wire_next_field(&reader, &field)) > 0) {
		int err = 0;

		if (field.number == 1 && field.type == WIRE_BYTES)
			err = wire_take_string(&field, &image->image_id);
		else if (field.number == 2 && field.type == WIRE_BYTES)
			err = wire_take_string(&field, &image->vm_id);
		else if (field.number == 3 && field.type == WIRE_VARINT)
			image->epoch = field.value;
		else if (field.number == 4 && field.type == WIRE_BYTES)
			err = wire_take_string(&field, &image->boot_id);
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

static int decode_ready(struct wire_reader reader, struct gw_page_ready *ready)
{
	struct wire_field field;
	int got;

	while ((got = wire_next_field(&reader, &field)) > 0) {
		int err = 0;

		if (field.number == 1 && field.type == WIRE_BYTES)
			err = decode_image(wire_reader_in(&field), &ready->image);
		else if (field.number == 2 && field.type == WIRE_VARINT)
			ready->want_max = field.value;
		if (err)
			return err;
	}
	return got;
}

static int decode_pages(struct wire_reader reader, struct gw_pages *pages)
{
	struct wire_field field;
	int got;

	while ((got = wire_next_field(&reader, &field)) > 0) {
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
	struct wire_reader reader = wire_reader_of(data, len);
	struct gw_fetch_request *request = ret_request;
	struct wire_field field;
	int got;

	request->kind = GW_FETCH_REQUEST_NONE;
	while ((got = wire_next_field(&reader, &field)) > 0) {
		int err;

		if (field.type != WIRE_BYTES || field.number < GW_FETCH_REQUEST_HELLO ||
		    field.number > GW_FETCH_REQUEST_HEARTBEAT)
			continue;
		if (request->kind != (enum gw_fetch_request_kind)field.number) {
			memset(request, 0, sizeof(*request));
			request->kind = (enum gw_fetch_request_kind)field.number;
		}
		if (request->kind == GW_FETCH_REQUEST_HELLO)
			err = decode_hello(wire_reader_in(&field), &request->hello);
		else if (request->kind == GW_FETCH_REQUEST_WANT)
			err = decode_want(wire_reader_in(&field), &request->want);
		else
			err = decode_heartbeat(wire_reader_in(&field), &request->heartbeat);
		if (err)
			return err;
	}
	return got;
}

int gw_fetch_response_decode(const uint8_t *data, size_t len,
			     struct gw_fetch_response *ret_response)
{
	struct wire_reader reader = wire_reader_of(data, len);
	struct gw_fetch_response *response = ret_response;
	struct wire_field field;
	int got;

	response->kind = GW_FETCH_RESPONSE_NONE;
	while ((got = wire_next_field(&reader, &field)) > 0) {
		enum gw_fetch_response_kind kind = (enum gw_fetch_response_kind)field.number;
		const bool same = response->kind == kind;
		int err = 0;

		if (field.type != WIRE_BYTES)
			continue;
		if (kind == GW_FETCH_RESPONSE_READY) {
			if (!same)
				memset(&response->ready, 0, sizeof(response->ready));
			err = decode_ready(wire_reader_in(&field), &response->ready);
		} else if (kind == GW_FETCH_RESPONSE_PAGES) {
			if (!same)
				memset(&response->pages, 0, sizeof(response->pages));
			err = decode_pages(wire_reader_in(&field), &response->pages);
		} else if (kind == GW_FETCH_RESPONSE_HEARTBEAT) {
			if (!same)
				memset(&response->heartbeat, 0, sizeof(response->heartbeat));
			err = decode_heartbeat(wire_reader_in(&field), &response->heartbeat);
		} else {
			continue;
		}
		if (err)
			return err;
		response->kind = kind;
	}
	return got;
}

int gw_page_token_decode(const uint8_t *data, size_t len, struct gw_page_token *ret_token)
{
	*ret_token = (struct gw_page_token){0};
	return decode_token(wire_reader_of(data, len), ret_token);
}

int gw_page_claims_decode(const uint8_t *data, size_t len, struct gw_page_claims *ret_claims)
{
	*ret_claims = (struct gw_page_claims){0};
	return decode_claims(wire_reader_of(data, len), ret_claims);
}

int gw_describe_request_decode(const uint8_t *data, size_t len, struct gw_wire_string *ret_image_id)
{
	struct wire_reader reader = wire_reader_of(data, len);
	struct wire_field field;
	int got;

	*ret_image_id = (struct gw_wire_string){0};
	while ((got = wire_next_field(&reader, &field)) > 0) {
		if (field.number == 1 && field.type == WIRE_BYTES &&
		    wire_take_string(&field, ret_image_id))
			return -EBADMSG;
	}
	return got;
}

static int decode_extent(struct wire_reader reader, struct gw_wire_extent *extent)
{
	struct wire_field field;
	int got;

	while ((got = wire_next_field(&reader, &field)) > 0) {
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
	struct wire_reader reader = wire_reader_of(data, len);
	struct gw_wire_extent extent = {0};
	struct wire_field field;
	int got;

	memset(ret_response, 0, sizeof(*ret_response));
	while ((got = wire_next_field(&reader, &field)) > 0) {
		int err = 0;

		if (field.type != WIRE_BYTES)
			continue;
		if (field.number == 1) {
			err = decode_image(wire_reader_in(&field), &ret_response->image);
		} else if (field.number == 2) {
			err = decode_extent(wire_reader_in(&field), &extent);
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
	struct wire_reader reader = wire_reader_of(data + *cursor, len - *cursor);
	struct wire_field field;
	int got;

	while ((got = wire_next_field(&reader, &field)) > 0) {
		if (field.number != 2 || field.type != WIRE_BYTES)
			continue;
		*ret_extent = (struct gw_wire_extent){0};
		got = decode_extent(wire_reader_in(&field), ret_extent);
		if (got < 0)
			return got;
		*cursor = (size_t)(reader.at - data);
		return 1;
	}
	*cursor = len;
	return got;
}
