/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fuzz_page_wire.c - the decoders of godwit.page.v1 read nothing beyond their input, and what they
 * have understood survives being encoded and decoded again.
 */
#include "fuzz.h"

#include <godwit/page_wire.h>

#define ENCODED_LEN_MAX 65536u

static uint8_t first[ENCODED_LEN_MAX], second[ENCODED_LEN_MAX];

static void touch(const void *data, size_t len)
{
	const uint8_t *bytes = data;
	volatile uint8_t sum = 0;

	for (size_t i = 0; i < len; i++)
		sum = (uint8_t)(sum ^ bytes[i]);
}

static void touch_image(const struct gw_wire_image *image)
{
	touch(image->image_id.data, image->image_id.len);
	touch(image->vm_id.data, image->vm_id.len);
	touch(image->boot_id.data, image->boot_id.len);
}

static void fuzz_token(const uint8_t *data, size_t len)
{
	struct gw_page_token token;
	struct gw_page_claims claims;

	if (gw_page_token_decode(data, len, &token))
		return;
	touch(token.signature.data, token.signature.len);
	if (gw_page_claims_decode(token.claims.data, token.claims.len, &claims))
		return;
	touch(claims.image_id.data, claims.image_id.len);
	touch(claims.destination.data, claims.destination.len);
}

static void fuzz_request(const uint8_t *data, size_t len)
{
	struct gw_fetch_request request, again;
	ssize_t first_len, second_len;

	if (gw_fetch_request_decode(data, len, &request))
		return;
	if (request.kind == GW_FETCH_REQUEST_HELLO) {
		touch(request.hello.session_id.data, request.hello.session_id.len);
		touch(request.hello.image_id.data, request.hello.image_id.len);
		touch(request.hello.traceparent.data, request.hello.traceparent.len);
		fuzz_token(request.hello.token.data, request.hello.token.len);
	}
	first_len = gw_fetch_request_encode(&request, first, sizeof(first));
	if (first_len < 0)
		return;
	FUZZ_CHECK(gw_fetch_request_decode(first, (size_t)first_len, &again) == 0);
	FUZZ_CHECK(again.kind == request.kind);
	second_len = gw_fetch_request_encode(&again, second, sizeof(second));
	FUZZ_CHECK(second_len == first_len && memcmp(first, second, (size_t)first_len) == 0);
}

static void fuzz_pages(const struct gw_pages *pages)
{
	struct gw_fetch_response again;
	size_t head_len;

	(void)gw_pages_crc32c(pages);
	touch(pages->data.data, pages->data.len);
	if (pages->data.len > ENCODED_LEN_MAX - GW_PAGES_HEAD_LEN_MAX)
		return;
	head_len = gw_pages_encode_head(pages, first);
	FUZZ_CHECK(head_len <= GW_PAGES_HEAD_LEN_MAX);
	if (pages->data.len)
		memcpy(first + head_len, pages->data.data, pages->data.len);
	FUZZ_CHECK(gw_fetch_response_decode(first, head_len + pages->data.len, &again) == 0);
	FUZZ_CHECK(again.kind == GW_FETCH_RESPONSE_PAGES);
	FUZZ_CHECK(again.pages.offset == pages->offset && again.pages.len == pages->len &&
		   again.pages.generation == pages->generation &&
		   again.pages.encoding == pages->encoding &&
		   again.pages.image_state == pages->image_state &&
		   again.pages.crc32c == pages->crc32c && again.pages.data.len == pages->data.len);
}

static void fuzz_response(const uint8_t *data, size_t len)
{
	struct gw_fetch_response response, again;
	ssize_t first_len, second_len;

	if (gw_fetch_response_decode(data, len, &response))
		return;
	if (response.kind == GW_FETCH_RESPONSE_PAGES) {
		fuzz_pages(&response.pages);
		return;
	}
	if (response.kind == GW_FETCH_RESPONSE_READY) {
		touch_image(&response.ready.image);
		/* Those that do not fit are counted and not kept: they cannot be encoded again. */
		if (response.ready.image.region_count > GW_PAGE_REGION_COUNT_MAX)
			return;
	}
	first_len = gw_fetch_response_encode(&response, first, sizeof(first));
	if (first_len < 0)
		return;
	FUZZ_CHECK(gw_fetch_response_decode(first, (size_t)first_len, &again) == 0);
	FUZZ_CHECK(again.kind == response.kind);
	second_len = gw_fetch_response_encode(&again, second, sizeof(second));
	FUZZ_CHECK(second_len == first_len && memcmp(first, second, (size_t)first_len) == 0);
}

static void fuzz_describe(const uint8_t *data, size_t len)
{
	struct gw_describe_response response;
	struct gw_wire_string image_id;
	struct gw_wire_extent extent;
	size_t cursor = 0, count = 0;

	if (gw_describe_request_decode(data, len, &image_id) == 0)
		touch(image_id.data, image_id.len);
	if (gw_describe_response_decode(data, len, &response))
		return;
	touch_image(&response.image);
	while (gw_describe_response_next(data, len, &cursor, &extent) == 1)
		count++;
	FUZZ_CHECK(count == response.extent_count);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
	fuzz_request(data, len);
	fuzz_response(data, len);
	fuzz_describe(data, len);
	return 0;
}
