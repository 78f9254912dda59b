/* SPDX-License-Identifier: Apache-2.0 */
/*
 * page_wire.h - the messages of godwit.page.v1, encoded and decoded by hand.
 *
 * Threads    Pure functions: any thread.
 * Errors     -EBADMSG for bytes that are not a message of the type; -ENOSPC for a
 *            buffer too short. ret_ is undefined then: it is decoded into directly,
 *            a copy of an Image would cost more than the parsing.
 * Ownership  Decoding copies nothing: strings and data are views into the input and
 *            live as long as it does.
 * Units      Bytes.
 * Source     protos/godwit/page/v1/page_service.proto, common/v1/common.proto;
 *            https://protobuf.dev/programming-guides/encoding/.
 *
 * The decoder accepts exactly what a protobuf parser accepts: unknown fields (groups
 * too) and known ones of another wire type are skipped, the last of a scalar wins, the
 * last of a oneof wins (the same member twice is merged), strings are UTF-8, nothing is
 * read past a length. tests/native/test_page_wire_protobuf.py holds it against the real one.
 * It does not judge values: an unset id or an unknown enum is for the engines to refuse.
 *
 * Rejected: nanopb and upb (a generator and a runtime for five messages, and neither
 * gives a payload as a view of the receive buffer without a copy).
 */
#ifndef GW_PAGE_WIRE_H
#define GW_PAGE_WIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* Paths of the two methods. */
#define GW_PAGE_PATH_DESCRIBE_IMAGE "/godwit.page.v1.PageService/DescribeImage"
#define GW_PAGE_PATH_FETCH	    "/godwit.page.v1.PageService/Fetch"

/* Longest want, and so the longest data of a Pages. */
#define GW_PAGE_WANT_LEN_MAX (1u << 20)
/* Longest FetchRequest that makes sense: a hello with every string at its longest, unknown fields. */
#define GW_PAGE_REQUEST_LEN_MAX 4096
/* Head of an encoded FetchResponse with Pages: everything up to the bytes of `data`. */
#define GW_PAGES_HEAD_LEN_MAX 96
/* Longest FetchResponse: a Pages with its head, or a Ready with its regions. */
#define GW_PAGE_RESPONSE_LEN_MAX (GW_PAGE_WANT_LEN_MAX + 8192u)
#define GW_PAGE_REGION_COUNT_MAX 64
#define GW_PAGE_ID_LEN_MAX	 128
/* Longest FetchToken that is looked at. */
#define GW_PAGE_TOKEN_LEN_MAX 1024

/* A view of a string in the input: not NUL-terminated; data may be NULL if len is 0. */
struct gw_wire_string {
	const char *data;
	size_t len;
};

struct gw_wire_bytes {
	const uint8_t *data;
	size_t len;
};

enum gw_page_lane {
	GW_PAGE_LANE_UNSPECIFIED = 0,
	GW_PAGE_LANE_DEMAND = 1,
	GW_PAGE_LANE_BULK = 2,
};

enum gw_page_encoding {
	GW_PAGE_ENCODING_UNSPECIFIED = 0,
	GW_PAGE_ENCODING_RAW = 1,
	GW_PAGE_ENCODING_ZERO = 2,
	GW_PAGE_ENCODING_LZ4 = 3,
};

/* godwit.page.v1.FetchHello */
struct gw_page_hello {
	struct gw_wire_string session_id;
	struct gw_wire_string image_id;
	struct gw_wire_string traceparent;
	uint64_t epoch;
	uint64_t zero_run_max; /* longest ZERO answer; 0 = none beyond its want */
	int32_t lane;	       /* enum gw_page_lane, or what the peer said */
	bool accepts_lz4;
	struct gw_wire_bytes token; /* a FetchToken, not looked into */
};

/* godwit.page.v1.FetchToken */
struct gw_page_token {
	struct gw_wire_bytes claims; /* a FetchClaims: what is signed */
	struct gw_wire_bytes signature;
};

/* godwit.page.v1.FetchClaims */
struct gw_page_claims {
	struct gw_wire_string image_id;
	struct gw_wire_string destination;
	uint64_t epoch;
	uint64_t expires_unix_s;
};

/* godwit.page.v1.Want */
struct gw_page_want {
	uint64_t offset;
	uint64_t len;
	uint64_t generation;
};

/* godwit.page.v1.Heartbeat */
struct gw_page_heartbeat {
	uint64_t sequence;
};

/* godwit.page.v1.FetchRequest */
enum gw_fetch_request_kind {
	GW_FETCH_REQUEST_NONE = 0, /* no body, or one of a later version */
	GW_FETCH_REQUEST_HELLO = 1,
	GW_FETCH_REQUEST_WANT = 2,
	GW_FETCH_REQUEST_HEARTBEAT = 3,
};

struct gw_fetch_request {
	enum gw_fetch_request_kind kind;
	union {
		struct gw_page_hello hello;
		struct gw_page_want want;
		struct gw_page_heartbeat heartbeat;
	};
};

/* godwit.common.v1.Region */
struct gw_wire_region {
	uint64_t gpa;
	uint64_t size;
	uint32_t region_id;
	uint32_t page_size;
};

/* godwit.common.v1.Image. More regions than fit are counted and not kept: compare the count. */
struct gw_wire_image {
	struct gw_wire_string image_id;
	struct gw_wire_string vm_id;
	struct gw_wire_string boot_id;
	uint64_t epoch;
	uint64_t inode;
	uint64_t generation;
	int32_t state; /* enum gw_image_state, or what the peer said */
	uint32_t region_count;
	struct gw_wire_region regions[GW_PAGE_REGION_COUNT_MAX];
};

/* godwit.page.v1.FetchReady */
struct gw_page_ready {
	struct gw_wire_image image;
	uint64_t want_max;
};

/* godwit.page.v1.Pages */
struct gw_pages {
	uint64_t offset;
	uint64_t len;
	uint64_t generation;
	int32_t encoding;    /* enum gw_page_encoding, or what the peer said */
	int32_t image_state; /* enum gw_image_state, or what the peer said */
	uint32_t crc32c;
	struct gw_wire_bytes data;
};

/* godwit.page.v1.FetchResponse */
enum gw_fetch_response_kind {
	GW_FETCH_RESPONSE_NONE = 0,
	GW_FETCH_RESPONSE_READY = 1,
	GW_FETCH_RESPONSE_PAGES = 2,
	GW_FETCH_RESPONSE_HEARTBEAT = 3,
};

struct gw_fetch_response {
	enum gw_fetch_response_kind kind;
	union {
		struct gw_page_ready ready;
		struct gw_pages pages;
		struct gw_page_heartbeat heartbeat;
	};
};

/* godwit.common.v1.Extent */
struct gw_wire_extent {
	uint64_t offset;
	uint64_t len;
};

/* godwit.page.v1.DescribeImageResponse, without its extents: walk them with a cursor. */
struct gw_describe_response {
	struct gw_wire_image image;
	size_t extent_count;
};

/* Decode one message. Return 0; -EBADMSG. */
int gw_fetch_request_decode(const uint8_t *data, size_t len, struct gw_fetch_request *ret_request);
int gw_fetch_response_decode(const uint8_t *data, size_t len,
			     struct gw_fetch_response *ret_response);
int gw_page_token_decode(const uint8_t *data, size_t len, struct gw_page_token *ret_token);
int gw_page_claims_decode(const uint8_t *data, size_t len, struct gw_page_claims *ret_claims);
int gw_describe_request_decode(const uint8_t *data, size_t len,
			       struct gw_wire_string *ret_image_id);
int gw_describe_response_decode(const uint8_t *data, size_t len,
				struct gw_describe_response *ret_response);

/*
 * The next extent of a DescribeImageResponse that gw_describe_response_decode has
 * accepted; `*cursor` starts at 0. Returns 1; 0 at the end.
 */
int gw_describe_response_next(const uint8_t *data, size_t len, size_t *cursor,
			      struct gw_wire_extent *ret_extent);

/* Encode one message. Return its length; -ENOSPC `cap` is too short. */
ssize_t gw_fetch_request_encode(const struct gw_fetch_request *request, uint8_t *ret_data,
				size_t cap);
/* Not for pages: those have no place for their data here. -EINVAL. */
ssize_t gw_fetch_response_encode(const struct gw_fetch_response *response, uint8_t *ret_data,
				 size_t cap);
ssize_t gw_describe_request_encode(const struct gw_wire_string *image_id, uint8_t *ret_data,
				   size_t cap);
ssize_t gw_describe_response_encode(const struct gw_wire_image *image,
				    const struct gw_wire_extent *extents, size_t extent_count,
				    uint8_t *ret_data, size_t cap);

/*
 * The head of a FetchResponse that carries `pages`: head + pages->data is the
 * message; pages->data.data is not read. `ret_head` has GW_PAGES_HEAD_LEN_MAX bytes.
 *
 * Returns the length of the head.
 */
size_t gw_pages_encode_head(const struct gw_pages *pages, uint8_t *ret_head);

/* The CRC-32C of a Pages over its header fields and its data, as the proto says. */
uint32_t gw_pages_crc32c(const struct gw_pages *pages);

#endif /* GW_PAGE_WIRE_H */
