/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_page_wire.c - the codec against itself and against bytes that lie. That it agrees with
 * protobuf is tests/native/test_page_wire_protobuf.py's to show.
 */
#include "check.h"

#include <godwit/crc32c.h>
#include <godwit/page_wire.h>

#include <errno.h>

static struct gw_wire_string text(const char *string)
{
	return (struct gw_wire_string){.data = string, .len = strlen(string)};
}

static bool text_is(const struct gw_wire_string *string, const char *want)
{
	return string->len == strlen(want) && memcmp(string->data, want, string->len) == 0;
}

static void requests_round_trip(void)
{
	const struct gw_fetch_request hello = {.kind = GW_FETCH_REQUEST_HELLO,
					       .hello = {.session_id = text("s-1"),
							 .image_id = text("vm.7"),
							 .traceparent = text("00-ab-cd-01"),
							 .epoch = UINT64_MAX,
							 .zero_run_max = 1ull << 40,
							 .lane = GW_PAGE_LANE_BULK,
							 .accepts_lz4 = true}};
	const struct gw_fetch_request want = {
		.kind = GW_FETCH_REQUEST_WANT,
		.want = {.offset = 1ull << 40, .len = 1u << 20, .generation = 3}};
	const struct gw_fetch_request beat = {.kind = GW_FETCH_REQUEST_HEARTBEAT,
					      .heartbeat = {.sequence = 129}};
	struct gw_fetch_request got;
	uint8_t data[256];
	ssize_t len;

	len = gw_fetch_request_encode(&hello, data, sizeof(data));
	CHECK(len > 0);
	CHECK_EQ(gw_fetch_request_decode(data, (size_t)len, &got), 0);
	CHECK_EQ(got.kind, GW_FETCH_REQUEST_HELLO);
	CHECK(text_is(&got.hello.session_id, "s-1"));
	CHECK(text_is(&got.hello.image_id, "vm.7"));
	CHECK(text_is(&got.hello.traceparent, "00-ab-cd-01"));
	CHECK(got.hello.epoch == UINT64_MAX && got.hello.lane == GW_PAGE_LANE_BULK);
	CHECK(got.hello.zero_run_max == 1ull << 40 && got.hello.accepts_lz4);

	len = gw_fetch_request_encode(&want, data, sizeof(data));
	CHECK_EQ(gw_fetch_request_decode(data, (size_t)len, &got), 0);
	CHECK_EQ(got.kind, GW_FETCH_REQUEST_WANT);
	CHECK(got.want.offset == 1ull << 40 && got.want.len == 1u << 20);
	CHECK_EQ(got.want.generation, 3);

	len = gw_fetch_request_encode(&beat, data, sizeof(data));
	CHECK_EQ(gw_fetch_request_decode(data, (size_t)len, &got), 0);
	CHECK_EQ(got.kind, GW_FETCH_REQUEST_HEARTBEAT);
	CHECK_EQ(got.heartbeat.sequence, 129);
}

static struct gw_wire_image example_image(void)
{
	return (struct gw_wire_image){
		.image_id = text("img"),
		.vm_id = text("vm"),
		.boot_id = text("boot"),
		.epoch = 5,
		.inode = 77,
		.generation = 9,
		.state = 2,
		.region_count = 2,
		.regions = {{.region_id = 0, .gpa = 0, .size = 1u << 30, .page_size = 4096},
			    {.region_id = 1,
			     .gpa = 1ull << 32,
			     .size = 1u << 21,
			     .page_size = 1u << 21}},
	};
}

static void check_example_image(const struct gw_wire_image *image)
{
	CHECK(text_is(&image->image_id, "img"));
	CHECK(text_is(&image->vm_id, "vm"));
	CHECK(text_is(&image->boot_id, "boot"));
	CHECK_EQ(image->epoch, 5);
	CHECK_EQ(image->inode, 77);
	CHECK_EQ(image->generation, 9);
	CHECK_EQ(image->state, 2);
	CHECK_EQ(image->region_count, 2);
	CHECK_EQ(image->regions[0].size, 1u << 30);
	CHECK_EQ(image->regions[1].region_id, 1);
	CHECK(image->regions[1].gpa == 1ull << 32);
	CHECK_EQ(image->regions[1].page_size, 1u << 21);
}

static void responses_round_trip(void)
{
	static const struct gw_wire_extent extents[] = {{0, 4096}, {1u << 20, 8192}};
	const struct gw_fetch_response ready = {.kind = GW_FETCH_RESPONSE_READY,
						.ready = {.image = example_image(),
							  .want_max = 1u << 20}};
	const struct gw_wire_image image = example_image();
	struct gw_describe_response describe;
	struct gw_fetch_response got;
	struct gw_wire_extent extent;
	struct gw_wire_string id = text("img");
	size_t cursor = 0;
	uint8_t data[1024];
	ssize_t len;

	len = gw_fetch_response_encode(&ready, data, sizeof(data));
	CHECK(len > 0);
	CHECK_EQ(gw_fetch_response_decode(data, (size_t)len, &got), 0);
	CHECK_EQ(got.kind, GW_FETCH_RESPONSE_READY);
	CHECK_EQ(got.ready.want_max, 1u << 20);
	check_example_image(&got.ready.image);

	len = gw_describe_response_encode(&image, extents, 2, data, sizeof(data));
	CHECK(len > 0);
	CHECK_EQ(gw_describe_response_decode(data, (size_t)len, &describe), 0);
	check_example_image(&describe.image);
	CHECK_EQ(describe.extent_count, 2);
	for (size_t i = 0; i < 2; i++) {
		CHECK_EQ(gw_describe_response_next(data, (size_t)len, &cursor, &extent), 1);
		CHECK(extent.offset == extents[i].offset && extent.len == extents[i].len);
	}
	CHECK_EQ(gw_describe_response_next(data, (size_t)len, &cursor, &extent), 0);
	CHECK_EQ(gw_describe_response_next(data, (size_t)len, &cursor, &extent), 0);

	len = gw_describe_request_encode(&id, data, sizeof(data));
	CHECK_EQ(gw_describe_request_decode(data, (size_t)len, &id), 0);
	CHECK(text_is(&id, "img"));
	CHECK((const uint8_t *)id.data > data && (const uint8_t *)id.data < data + len);
}

static void pages_are_a_head_and_then_their_data(void)
{
	static uint8_t message[GW_PAGES_HEAD_LEN_MAX + 8192];
	static uint8_t page[8192];
	struct gw_pages pages = {.offset = 12288,
				 .len = sizeof(page),
				 .generation = 4,
				 .encoding = GW_PAGE_ENCODING_RAW,
				 .image_state = 2,
				 .data = {page, sizeof(page)}};
	struct gw_fetch_response got;
	size_t len;

	for (size_t i = 0; i < sizeof(page); i++)
		page[i] = (uint8_t)(i * 13);
	pages.crc32c = gw_pages_crc32c(&pages);
	len = gw_pages_encode_head(&pages, message);
	memcpy(message + len, page, sizeof(page));
	CHECK_EQ(gw_fetch_response_decode(message, len + sizeof(page), &got), 0);
	CHECK_EQ(got.kind, GW_FETCH_RESPONSE_PAGES);
	CHECK_EQ(got.pages.offset, pages.offset);
	CHECK_EQ(got.pages.len, pages.len);
	CHECK(got.pages.data.data == message + len);
	CHECK_EQ(got.pages.data.len, sizeof(page));
	CHECK_EQ(got.pages.crc32c, pages.crc32c);
	CHECK_EQ(gw_pages_crc32c(&got.pages), pages.crc32c);
	message[len + 5000] ^= 1;
	CHECK(gw_pages_crc32c(&got.pages) != pages.crc32c);
	message[len + 5000] ^= 1;
	got.pages.generation++;
	CHECK(gw_pages_crc32c(&got.pages) != pages.crc32c);

	/* Every field at its longest, and none but the run. */
	memset(&pages, 0xff, offsetof(struct gw_pages, data));
	pages.data = (struct gw_wire_bytes){NULL, SIZE_MAX / 2};
	CHECK(gw_pages_encode_head(&pages, message) <= GW_PAGES_HEAD_LEN_MAX);
	pages = (struct gw_pages){.len = 4096, .encoding = GW_PAGE_ENCODING_ZERO};
	len = gw_pages_encode_head(&pages, message);
	CHECK_EQ(gw_fetch_response_decode(message, len, &got), 0);
	CHECK_EQ(got.pages.data.len, 0);
}

/* The header of the CRC, spelt out once by hand. */
static void the_crc_covers_the_header_as_the_proto_says(void)
{
	static const uint8_t header[32] = {0x00, 0x10, 0, 0, 0, 0, 0, 0, /* offset 4096 */
					   0x00, 0x20, 0, 0, 0, 0, 0, 0, /* len 8192 */
					   0x07, 0,    0, 0, 0, 0, 0, 0, /* generation 7 */
					   0x02, 0,    0, 0,		 /* encoding ZERO */
					   0x01, 0,    0, 0};		 /* image_state LIVE */
	const struct gw_pages pages = {.offset = 4096,
				       .len = 8192,
				       .generation = 7,
				       .encoding = GW_PAGE_ENCODING_ZERO,
				       .image_state = 1};

	CHECK_EQ(gw_pages_crc32c(&pages), gw_crc32c(0, header, sizeof(header)));
}

/* Bytes of a FetchRequest, what they are, and what a want then says. */
static const struct {
	const char *what;
	uint8_t data[24];
	uint8_t len;
	int err;
	uint8_t kind;
	uint64_t offset;
} requests[] = {
	{"nothing", {0}, 0, 0, GW_FETCH_REQUEST_NONE, 0},
	{"an empty want", {0x12, 0}, 2, 0, GW_FETCH_REQUEST_WANT, 0},
	{"a want", {0x12, 2, 0x08, 5}, 4, 0, GW_FETCH_REQUEST_WANT, 5},
	{"a scalar twice: the last", {0x12, 4, 0x08, 5, 0x08, 6}, 6, 0, GW_FETCH_REQUEST_WANT, 6},
	{"a want twice: merged",
	 {0x12, 2, 0x08, 5, 0x12, 2, 0x10, 9},
	 8,
	 0,
	 GW_FETCH_REQUEST_WANT,
	 5},
	{"another member in between: the last only",
	 {0x12, 2, 0x08, 5, 0x1a, 0, 0x12, 2, 0x10, 9},
	 10,
	 0,
	 GW_FETCH_REQUEST_WANT,
	 0},
	{"an unknown field", {0x12, 2, 0x08, 5, 0x78, 1}, 6, 0, GW_FETCH_REQUEST_WANT, 5},
	{"an unknown body", {0x22, 1, 0xff}, 3, 0, GW_FETCH_REQUEST_NONE, 0},
	{"a body of another wire type", {0x10, 1}, 2, 0, GW_FETCH_REQUEST_NONE, 0},
	{"an offset of another wire type", {0x12, 6, 0x0d, 1, 2, 3, 4, 0x38}, 8, -EBADMSG, 0, 0},
	{"a skipped fixed32 offset", {0x12, 5, 0x0d, 1, 2, 3, 4}, 7, 0, GW_FETCH_REQUEST_WANT, 0},
	{"a skipped fixed64", {0x21, 1, 2, 3, 4, 5, 6, 7, 8}, 9, 0, GW_FETCH_REQUEST_NONE, 0},
	{"an unknown group", {0x23, 0x08, 1, 0x24, 0x12, 0}, 6, 0, GW_FETCH_REQUEST_WANT, 0},
	{"groups in groups", {0x23, 0x2b, 0x2c, 0x24}, 4, 0, GW_FETCH_REQUEST_NONE, 0},
	{"groups that cross", {0x23, 0x2b, 0x24, 0x2c}, 4, -EBADMSG, 0, 0},
	{"a group without end", {0x23, 0x08, 1}, 3, -EBADMSG, 0, 0},
	{"an end without group", {0x24}, 1, -EBADMSG, 0, 0},
	{"ten bytes of varint",
	 {0x12, 11, 0x08, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01},
	 13,
	 0,
	 GW_FETCH_REQUEST_WANT,
	 UINT64_MAX},
	{"eleven bytes of varint",
	 {0x12, 12, 0x08, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x00},
	 14,
	 -EBADMSG,
	 0,
	 0},
	{"a varint cut short", {0x12, 2, 0x08, 0x80}, 4, -EBADMSG, 0, 0},
	{"a length beyond the end", {0x12, 3, 0x08, 5}, 4, -EBADMSG, 0, 0},
	{"a length of 2^64-1",
	 {0x12, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01},
	 11,
	 -EBADMSG,
	 0,
	 0},
	{"field number 0", {0x02, 0}, 2, -EBADMSG, 0, 0},
	{"wire type 6", {0x16, 0}, 2, -EBADMSG, 0, 0},
	{"wire type 7", {0x17, 0}, 2, -EBADMSG, 0, 0},
	{"a tag of more than 32 bits", {0x80, 0x80, 0x80, 0x80, 0x10, 0}, 6, -EBADMSG, 0, 0},
	{"a string that is not UTF-8", {0x0a, 3, 0x0a, 1, 0xff}, 5, -EBADMSG, 0, 0},
	{"an overlong slash", {0x0a, 4, 0x0a, 2, 0xc0, 0xaf}, 6, -EBADMSG, 0, 0},
	{"a surrogate", {0x0a, 5, 0x0a, 3, 0xed, 0xa0, 0x80}, 7, -EBADMSG, 0, 0},
	{"a UTF-8 sequence cut short", {0x0a, 4, 0x0a, 2, 0xe2, 0x82}, 6, -EBADMSG, 0, 0},
	{"the highest code point",
	 {0x0a, 6, 0x0a, 4, 0xf4, 0x8f, 0xbf, 0xbf},
	 8,
	 0,
	 GW_FETCH_REQUEST_HELLO,
	 0},
	{"one above it", {0x0a, 6, 0x0a, 4, 0xf4, 0x90, 0x80, 0x80}, 8, -EBADMSG, 0, 0},
};

static void malformed_requests_are_told_from_odd_ones(void)
{
	for (size_t i = 0; i < sizeof(requests) / sizeof(requests[0]); i++) {
		/* On the heap and of the very length, so that one byte too far is seen. */
		uint8_t *data = malloc(requests[i].len ? requests[i].len : 1);
		struct gw_fetch_request got;
		int err;

		CHECK(data);
		memcpy(data, requests[i].data, requests[i].len);
		err = gw_fetch_request_decode(data, requests[i].len, &got);
		if (err != requests[i].err || (!err && got.kind != requests[i].kind))
			fprintf(stderr, "%s\n", requests[i].what);
		CHECK_EQ(err, requests[i].err);
		if (!err)
			CHECK_EQ(got.kind, requests[i].kind);
		if (!err && got.kind == GW_FETCH_REQUEST_WANT)
			CHECK(got.want.offset == requests[i].offset);
		free(data);
	}
}

static void deep_groups_end(void)
{
	uint8_t data[400];
	struct gw_fetch_request got;

	memset(data, 0x23, 100);
	memset(data + 100, 0x24, 100);
	CHECK_EQ(gw_fetch_request_decode(data, 200, &got), 0);
	memset(data, 0x23, 101);
	memset(data + 101, 0x24, 101);
	CHECK_EQ(gw_fetch_request_decode(data, 202, &got), -EBADMSG);
}

static void more_regions_than_fit_are_counted_only(void)
{
	uint8_t data[512] = {0x0a, 0, 0};
	struct gw_fetch_response got;
	size_t len = 0;

	/* FetchResponse { ready { image { 70 x region {} } } }, lengths patched below. */
	data[len++] = 0x0a;
	len += 2;
	data[len++] = 0x0a;
	len += 2;
	for (size_t i = 0; i < GW_PAGE_REGION_COUNT_MAX + 6; i++) {
		data[len++] = 0x42;
		data[len++] = 0;
	}
	data[4] = (uint8_t)(0x80 | ((len - 6) & 0x7f));
	data[5] = (uint8_t)((len - 6) >> 7);
	data[1] = (uint8_t)(0x80 | ((len - 3) & 0x7f));
	data[2] = (uint8_t)((len - 3) >> 7);
	CHECK_EQ(gw_fetch_response_decode(data, len, &got), 0);
	CHECK_EQ(got.kind, GW_FETCH_RESPONSE_READY);
	CHECK_EQ(got.ready.image.region_count, GW_PAGE_REGION_COUNT_MAX + 6);
}

static void short_buffers_are_refused(void)
{
	const struct gw_fetch_request hello = {
		.kind = GW_FETCH_REQUEST_HELLO,
		.hello = {.session_id = text("session"), .image_id = text("image"), .epoch = 300}};
	const struct gw_fetch_request none = {.kind = GW_FETCH_REQUEST_NONE};
	const struct gw_fetch_response pages = {.kind = GW_FETCH_RESPONSE_PAGES};
	uint8_t data[64];
	const ssize_t len = gw_fetch_request_encode(&hello, data, sizeof(data));

	CHECK(len > 0);
	for (size_t cap = 0; cap < (size_t)len; cap++)
		CHECK_EQ(gw_fetch_request_encode(&hello, data, cap), -ENOSPC);
	CHECK_EQ(gw_fetch_request_encode(&hello, data, (size_t)len), len);
	CHECK_EQ(gw_fetch_request_encode(&none, data, sizeof(data)), -EINVAL);
	CHECK_EQ(gw_fetch_response_encode(&pages, data, sizeof(data)), -EINVAL);
}

/* Every cut and many wounds of valid messages: any answer but a read out of bounds. */
static void wounded_messages_are_survived(void)
{
	const struct gw_fetch_response ready = {.kind = GW_FETCH_RESPONSE_READY,
						.ready = {.image = example_image(),
							  .want_max = 1u << 20}};
	uint32_t seed = 42;
	uint8_t whole[256];
	const ssize_t whole_len = gw_fetch_response_encode(&ready, whole, sizeof(whole));

	CHECK(whole_len > 0);
	for (size_t round = 0; round < 200000; round++) {
		const size_t len = round < (size_t)whole_len ? round : (size_t)whole_len;
		uint8_t *data = malloc(len ? len : 1);
		struct gw_fetch_response response;
		struct gw_describe_response describe;
		struct gw_fetch_request request;
		struct gw_wire_extent extent;
		struct gw_wire_string id;
		size_t cursor = 0;

		CHECK(data);
		memcpy(data, whole, len);
		for (size_t i = 0; round >= (size_t)whole_len && i < 1 + round % 4; i++) {
			seed = seed * 1664525 + 1013904223;
			data[(seed >> 8) % len] = (uint8_t)(seed >> 24);
		}
		(void)gw_fetch_response_decode(data, len, &response);
		(void)gw_fetch_request_decode(data, len, &request);
		(void)gw_describe_request_decode(data, len, &id);
		if (gw_describe_response_decode(data, len, &describe) == 0) {
			size_t count = 0;

			while (gw_describe_response_next(data, len, &cursor, &extent) == 1)
				count++;
			CHECK_EQ(count, describe.extent_count);
		}
		free(data);
	}
}

int main(void)
{
	RUN(requests_round_trip);
	RUN(responses_round_trip);
	RUN(pages_are_a_head_and_then_their_data);
	RUN(the_crc_covers_the_header_as_the_proto_says);
	RUN(malformed_requests_are_told_from_odd_ones);
	RUN(deep_groups_end);
	RUN(more_regions_than_fit_are_counted_only);
	RUN(short_buffers_are_refused);
	RUN(wounded_messages_are_survived);
	return EXIT_SUCCESS;
}
