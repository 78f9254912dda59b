/* SPDX-License-Identifier: Apache-2.0 */
/*
 * page_wire_main.c - the page codec for tests/native/test_page_wire_protobuf.py: a line
 * "TYPE HEX" on stdin is decoded and encoded again: "ok HEX", or "malformed".
 */
#include "check.h"

#include <godwit/page_wire.h>

#include <errno.h>
#include <stdint.h>

#define LEN_MAX (1u << 20)

static ssize_t again_request(const uint8_t *data, size_t len, uint8_t *ret_data)
{
	struct gw_fetch_request request;
	const int err = gw_fetch_request_decode(data, len, &request);

	if (err || request.kind == GW_FETCH_REQUEST_NONE)
		return err;
	return gw_fetch_request_encode(&request, ret_data, LEN_MAX);
}

static ssize_t again_response(const uint8_t *data, size_t len, uint8_t *ret_data)
{
	struct gw_fetch_response response;
	const int err = gw_fetch_response_decode(data, len, &response);
	size_t head_len;

	if (err || response.kind == GW_FETCH_RESPONSE_NONE)
		return err;
	if (response.kind != GW_FETCH_RESPONSE_PAGES)
		return gw_fetch_response_encode(&response, ret_data, LEN_MAX);
	head_len = gw_pages_encode_head(&response.pages, ret_data);
	if (response.pages.data.len)
		memcpy(ret_data + head_len, response.pages.data.data, response.pages.data.len);
	return (ssize_t)(head_len + response.pages.data.len);
}

static ssize_t again_describe_request(const uint8_t *data, size_t len, uint8_t *ret_data)
{
	struct gw_wire_string image_id;
	const int err = gw_describe_request_decode(data, len, &image_id);

	return err ? err : gw_describe_request_encode(&image_id, ret_data, LEN_MAX);
}

static ssize_t again_describe_response(const uint8_t *data, size_t len, uint8_t *ret_data)
{
	struct gw_describe_response response;
	struct gw_wire_extent *extents;
	const int err = gw_describe_response_decode(data, len, &response);
	size_t cursor = 0;
	size_t count = 0;
	ssize_t got;

	if (err)
		return err;
	extents = calloc(response.extent_count + 1, sizeof(*extents));
	CHECK(extents);
	while (gw_describe_response_next(data, len, &cursor, &extents[count]) == 1)
		count++;
	CHECK_EQ(count, response.extent_count);
	got = gw_describe_response_encode(&response.image, extents, count, ret_data, LEN_MAX);
	free(extents);
	return got;
}

/* Pages "offset len generation encoding state hex(data)": what gw_pages_crc32c says. */
static void say_crc(const uint8_t *data, size_t len)
{
	struct gw_fetch_response response;

	CHECK_EQ(gw_fetch_response_decode(data, len, &response), 0);
	CHECK_EQ(response.kind, GW_FETCH_RESPONSE_PAGES);
	printf("crc %u\n", gw_pages_crc32c(&response.pages));
}

static size_t unhex(const char *hex, uint8_t *ret_data)
{
	size_t len = 0;

	for (; hex[0] && hex[1] && hex[0] != '\n'; hex += 2) {
		const char digits[3] = {hex[0], hex[1], '\0'};

		ret_data[len++] = (uint8_t)strtoul(digits, NULL, 16);
	}
	return len;
}

static const struct {
	const char *type;
	ssize_t (*again)(const uint8_t *, size_t, uint8_t *);
} types[] = {
	{"request", again_request},
	{"response", again_response},
	{"describe_request", again_describe_request},
	{"describe_response", again_describe_response},
};

static void answer(const char *type, const uint8_t *data, size_t len, uint8_t *scratch)
{
	for (size_t i = 0; i < sizeof(types) / sizeof(types[0]); i++) {
		ssize_t got;

		if (strcmp(types[i].type, type) != 0)
			continue;
		got = types[i].again(data, len, scratch);
		if (got < 0) {
			printf(got == -EBADMSG ? "malformed\n" : "failed\n");
			return;
		}
		printf("ok ");
		for (ssize_t k = 0; k < got; k++)
			printf("%02x", scratch[k]);
		printf("\n");
		return;
	}
	CHECK_EQ(strcmp(type, "crc"), 0);
	say_crc(data, len);
}

int main(void)
{
	char *line = NULL;
	size_t cap = 0;
	uint8_t *scratch = malloc(LEN_MAX);

	CHECK(scratch);
	while (getline(&line, &cap, stdin) > 0) {
		char *hex = strchr(line, ' ');
		uint8_t *data;
		size_t len;

		CHECK(hex);
		*hex++ = '\0';
		/* Of the very length, so that ASan sees a byte too far. */
		data = malloc(strlen(hex) / 2 + 1);
		CHECK(data);
		len = unhex(hex, data);
		data = realloc(data, len ? len : 1);
		CHECK(data);
		answer(line, data, len, scratch);
		fflush(stdout);
		free(data);
	}
	free(line);
	free(scratch);
	return EXIT_SUCCESS;
}
