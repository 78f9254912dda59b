/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_grpc_hostile.c - the gRPC connection against peers that are wrong, old, or lie: each
 * ends with the status that the gRPC documents name, or with a dead connection, and
 * never with memory touched that is not ours (ASan).
 */
#include "grpc_pair.h"
#include "raw_peer.h"

#include "grpc_internal.h"

#define STEP_COUNT 40

/* One side of ours against a raw peer. */
struct bout {
	struct pair pair;
	struct raw_peer peer;
	struct pair_side *ours;
};

static void open_bout_for(struct bout *bout, bool ours_is_server, uint32_t message_len_max)
{
	struct gw_grpc_config config = pair_config(NULL);
	int fds[2];

	memset(bout, 0, sizeof(*bout));
	CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, fds), 0);
	bout->pair.now_ns = 1000;
	bout->ours = ours_is_server ? &bout->pair.server : &bout->pair.client;
	bout->ours->pair = &bout->pair;
	config.user = bout->ours;
	config.message_len_max = message_len_max;
	if (ours_is_server)
		CHECK_EQ(gw_grpc_server_create(&config, fds[0], &bout->ours->conn), 0);
	else
		CHECK_EQ(gw_grpc_client_create(&config, fds[0], &bout->ours->conn), 0);
	raw_open(&bout->peer, fds[1], !ours_is_server);
}

static void open_bout(struct bout *bout, bool ours_is_server)
{
	open_bout_for(bout, ours_is_server, 1000);
}

static void step(struct bout *bout)
{
	for (int i = 0; i < STEP_COUNT; i++) {
		raw_step(&bout->peer, 0);
		pair_side_step(bout->ours);
	}
}

static void close_bout(struct bout *bout)
{
	gw_grpc_destroy(bout->ours->conn);
	free(bout->ours->last);
	raw_close(&bout->peer);
}

#define GOOD_REQUEST                                                                         \
	{":method", "POST"}, {":scheme", "http"}, {":path", PAIR_PATH}, {":authority", "x"}, \
	{                                                                                    \
		"te", "trailers"                                                             \
	}

/* --- clients that are wrong ------------------------------------------------------------------ */

static const struct {
	const char *what;
	struct raw_header headers[RAW_HEADER_COUNT_MAX];
	uint8_t body[16];
	size_t body_len;
	bool ends;
	const char *answer; /* what its headers contain */
	bool told;	    /* the owner got to know of the call */
} wrong_clients[] = {
	{"nothing wrong",
	 {GOOD_REQUEST, {"content-type", "application/grpc"}},
	 {0, 0, 0, 0, 1, 'x'},
	 6,
	 true,
	 "grpc-status=0",
	 true},
	{"a content type with a subtype",
	 {GOOD_REQUEST, {"content-type", "application/grpc+proto"}},
	 {0, 0, 0, 0, 0},
	 5,
	 true,
	 "grpc-status=0",
	 true},
	{"no content type", {GOOD_REQUEST}, {0}, 5, true, ":status=415", false},
	{"a browser",
	 {GOOD_REQUEST, {"content-type", "application/grpc-web"}},
	 {0},
	 5,
	 true,
	 ":status=415",
	 false},
	{"a form",
	 {GOOD_REQUEST, {"content-type", "text/html"}},
	 {0},
	 5,
	 false,
	 ":status=415",
	 false},
	{"GET",
	 {{":method", "GET"},
	  {":scheme", "http"},
	  {":path", "/"},
	  {":authority", "x"},
	  {"content-type", "application/grpc"}},
	 {0},
	 0,
	 true,
	 ":status=405",
	 false},
	{"a compressed message",
	 {GOOD_REQUEST, {"content-type", "application/grpc"}, {"grpc-encoding", "gzip"}},
	 {1, 0, 0, 0, 1, 'x'},
	 6,
	 false,
	 "grpc-status=12",
	 true},
	{"a flag of later",
	 {GOOD_REQUEST, {"content-type", "application/grpc"}},
	 {2, 0, 0, 0, 1, 'x'},
	 6,
	 false,
	 "grpc-status=13",
	 true},
	{"4 GiB announced",
	 {GOOD_REQUEST, {"content-type", "application/grpc"}},
	 {0, 255, 255, 255, 255, 'x'},
	 6,
	 false,
	 "grpc-status=8",
	 true},
	{"half a prefix",
	 {GOOD_REQUEST, {"content-type", "application/grpc"}},
	 {0, 0},
	 2,
	 true,
	 "grpc-status=13",
	 true},
	{"half a message",
	 {GOOD_REQUEST, {"content-type", "application/grpc"}},
	 {0, 0, 0, 0, 9, 'x'},
	 6,
	 true,
	 "grpc-status=13",
	 true},
	{"a timeout that is none",
	 {GOOD_REQUEST, {"content-type", "application/grpc"}, {"grpc-timeout", "soon"}},
	 {0, 0, 0, 0, 0},
	 5,
	 false,
	 "grpc-status=13",
	 true},
};

static void end_ok(struct pair_side *side, struct gw_grpc_call *call)
{
	(void)side;
	CHECK_EQ(gw_grpc_call_end(call, GW_GRPC_OK, ""), 0);
}

static void wrong_clients_are_answered(void)
{
	for (size_t i = 0; i < sizeof(wrong_clients) / sizeof(wrong_clients[0]); i++) {
		struct bout bout;

		open_bout(&bout, true);
		bout.ours->on_half_close = end_ok;
		raw_request(&bout.peer, wrong_clients[i].headers, wrong_clients[i].body,
			    wrong_clients[i].body_len, wrong_clients[i].ends);
		step(&bout);
		if (!strstr(bout.peer.headers, wrong_clients[i].answer))
			fprintf(stderr, "%s: %s\n", wrong_clients[i].what, bout.peer.headers);
		CHECK(strstr(bout.peer.headers, wrong_clients[i].answer));
		/* The stream is gone on both sides, the connection is not. */
		CHECK_EQ(bout.peer.close_count, 1);
		CHECK_EQ(bout.ours->call_count, wrong_clients[i].told);
		CHECK_EQ(bout.ours->end_count, wrong_clients[i].told);
		CHECK_EQ(bout.ours->err, 0);
		CHECK(!bout.peer.closed);
		close_bout(&bout);
	}
}

static void a_deadline_of_nothing_ends_at_once(void)
{
	static const struct raw_header headers[RAW_HEADER_COUNT_MAX] = {
		GOOD_REQUEST, {"content-type", "application/grpc"}, {"grpc-timeout", "0n"}};
	struct bout bout;

	open_bout(&bout, true);
	raw_request(&bout.peer, headers, NULL, 0, false);
	step(&bout);
	CHECK_EQ(gw_grpc_on_time(bout.ours->conn, bout.pair.now_ns), 0);
	step(&bout);
	CHECK_EQ(bout.ours->end_count, 1);
	CHECK_EQ(bout.ours->ends[0].status, GW_GRPC_DEADLINE_EXCEEDED);
	CHECK_EQ(bout.peer.close_count, 1);
	CHECK_EQ(bout.peer.close_code, NGHTTP2_CANCEL);
	close_bout(&bout);
}

static void metadata_is_bounded(void)
{
	static char long_value[1500];
	struct raw_header headers[RAW_HEADER_COUNT_MAX] = {
		GOOD_REQUEST,	     {"content-type", "application/grpc"},
		{"x-a", long_value}, {"x-b", long_value},
		{"x-c", "fits"},     {":path", long_value},
	};
	struct bout bout;

	memset(long_value, 'v', sizeof(long_value) - 1);
	open_bout(&bout, true);
	raw_request(&bout.peer, headers, NULL, 0, false);
	step(&bout);
	/* A second :path is no HTTP: nghttp2 resets the stream before we hear of it. */
	CHECK_EQ(bout.ours->call_count, 0);
	CHECK_EQ(bout.peer.close_count, 1);
	headers[9].name = NULL;
	raw_request(&bout.peer, headers, NULL, 0, false);
	step(&bout);
	CHECK_EQ(bout.ours->call_count, 1);
	CHECK_EQ(strlen(gw_grpc_call_metadata(bout.ours->call, "x-a")), sizeof(long_value) - 1);
	CHECK(!gw_grpc_call_metadata(bout.ours->call, "x-b"));
	CHECK_EQ(strcmp(gw_grpc_call_metadata(bout.ours->call, "x-c"), "fits"), 0);
	close_bout(&bout);

	struct raw_header long_path[RAW_HEADER_COUNT_MAX] = {GOOD_REQUEST,
							     {"content-type", "application/grpc"}};

	open_bout(&bout, true);
	long_value[0] = '/';
	long_path[2].value = long_value;
	raw_request(&bout.peer, long_path, NULL, 0, false);
	step(&bout);
	CHECK_EQ(strlen(gw_grpc_call_path(bout.ours->call)), GW_GRPC_PATH_LEN_MAX);
	close_bout(&bout);
}

static void a_thousand_streams_are_sixteen(void)
{
	static const struct raw_header headers[RAW_HEADER_COUNT_MAX] = {
		GOOD_REQUEST, {"content-type", "application/grpc"}};
	struct bout bout;

	open_bout(&bout, true);
	/* All at once, before the peer could know of our settings. */
	for (size_t i = 0; i < 1000; i++)
		raw_request(&bout.peer, headers, NULL, 0, false);
	step(&bout);
	CHECK(bout.ours->call_count <= 16);
	close_bout(&bout);
}

/* --- bytes that are no HTTP/2 ---------------------------------------------------------------- */

#define PREFACE	 "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
#define SETTINGS "\0\0\0\4\0\0\0\0\0"

static const struct {
	const char *what;
	const char *bytes;
	size_t len;
	size_t repeat; /* the last `repeat_len` bytes, so often */
	size_t repeat_len;
} garbage[] = {
#define BYTES(string) string, sizeof(string) - 1
	{"zeros", BYTES("\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"), 0, 0},
	{"HTTP/1.1", BYTES("GET / HTTP/1.1\r\nHost: x\r\n\r\n"), 0, 0},
	{"TLS", BYTES("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" PREFACE), 0, 0},
	{"a frame that is not settings", BYTES(PREFACE "\0\0\10\6\0\0\0\0\0\1\2\3\4\5\6\7\10"), 0,
	 0},
	{"a frame of 16 MiB", BYTES(PREFACE SETTINGS "\377\377\377\0\0\0\0\0\1"), 0, 0},
	{"data on stream 0", BYTES(PREFACE SETTINGS "\0\0\1\0\0\0\0\0\0x"), 0, 0},
	{"data on an idle stream", BYTES(PREFACE SETTINGS "\0\0\1\0\0\0\0\0\1x"), 0, 0},
	{"an even stream", BYTES(PREFACE SETTINGS "\0\0\0\1\4\0\0\0\2"), 0, 0},
	{"a continuation of nothing", BYTES(PREFACE SETTINGS "\0\0\0\11\4\0\0\0\1"), 0, 0},
	{"a window of 2^31", BYTES(PREFACE SETTINGS "\0\0\4\10\0\0\0\0\0\177\377\377\377"), 0, 0},
	{"a push", BYTES(PREFACE SETTINGS "\0\0\4\5\4\0\0\0\1\0\0\0\2"), 0, 0},
	{"a broken header block", BYTES(PREFACE SETTINGS "\0\0\2\1\5\0\0\0\1\377\377"), 0, 0},
	{"a flood of pings", BYTES(PREFACE SETTINGS "\0\0\10\6\0\0\0\0\0abcdefgh"), 200000, 17},
	{"a flood of settings", BYTES(PREFACE SETTINGS), 200000, 9},
	{"a flood of empty data", BYTES(PREFACE SETTINGS "\0\0\0\0\0\0\0\0\1"), 1000, 9},
#undef BYTES
};

/* Write without ever reading, as a flood does; false when the other side is gone. */
static bool shove(struct bout *bout, const char *bytes, size_t len)
{
	while (len > 0) {
		const ssize_t sent = send(bout->peer.fd, bytes, len, MSG_NOSIGNAL);

		if (sent < 0 && errno == EAGAIN) {
			if (!pair_side_step(bout->ours))
				return false;
			continue;
		}
		if (sent < 0)
			return false;
		bytes += sent;
		len -= (size_t)sent;
	}
	return !bout->ours->err;
}

static void what_is_no_http2_kills_its_connection_only(void)
{
	for (size_t i = 0; i < sizeof(garbage) / sizeof(garbage[0]); i++) {
		const char *tail = garbage[i].bytes + garbage[i].len - garbage[i].repeat_len;
		bool open = true;
		struct bout bout;

		open_bout(&bout, true);
		open = shove(&bout, garbage[i].bytes, garbage[i].len);
		for (size_t k = 0; open && k < garbage[i].repeat; k++)
			open = shove(&bout, tail, garbage[i].repeat_len);
		for (int k = 0; k < STEP_COUNT; k++)
			pair_side_step(bout.ours);
		/* The reader of our goaway. */
		if (!bout.ours->err) {
			char drop[4096];

			while (read(bout.peer.fd, drop, sizeof(drop)) > 0)
				pair_side_step(bout.ours);
			for (int k = 0; k < STEP_COUNT; k++)
				pair_side_step(bout.ours);
		}
		if (bout.ours->err != -EPROTO)
			fprintf(stderr, "%s\n", garbage[i].what);
		CHECK_EQ(bout.ours->err, -EPROTO);
		CHECK_EQ(bout.ours->call_count, bout.ours->end_count);
		close_bout(&bout);
	}
}

/* Streams opened and reset as fast as can be: the memory stays that of a few. */
static void rapid_resets_are_survived(void)
{
	static const struct raw_header headers[RAW_HEADER_COUNT_MAX] = {
		GOOD_REQUEST, {"content-type", "application/grpc"}};
	struct bout bout;

	open_bout(&bout, true);
	step(&bout);
	for (size_t i = 0; i < 60 && !bout.peer.closed && !bout.ours->err; i++) {
		const int32_t stream_id = raw_request(&bout.peer, headers, NULL, 0, false);

		nghttp2_session_send(bout.peer.session);
		nghttp2_submit_rst_stream(bout.peer.session, 0, stream_id, NGHTTP2_CANCEL);
		step(&bout);
		CHECK_EQ(bout.ours->call_count, bout.ours->end_count);
	}
	CHECK_EQ(bout.ours->end_count, 60);
	CHECK_EQ(bout.ours->ends[59].status, GW_GRPC_CANCELLED);
	close_bout(&bout);
}

/* --- servers that are wrong ------------------------------------------------------------------ */

#define OK_HEADERS                                         \
	{                                                  \
		{":status", "200"},                        \
		{                                          \
			"content-type", "application/grpc" \
		}                                          \
	}

static const struct {
	const char *what;
	struct raw_header headers[4];
	uint8_t body[16];
	size_t body_len;
	bool ends;
	struct raw_header trailers[4];
	int status;
	const char *text;
	size_t message_count;
} wrong_servers[] = {
	{"nothing wrong",
	 OK_HEADERS,
	 {0, 0, 0, 0, 1, 'x'},
	 6,
	 false,
	 {{"grpc-status", "0"}},
	 GW_GRPC_OK,
	 "",
	 1},
	{"an error in trailers",
	 OK_HEADERS,
	 {0},
	 0,
	 false,
	 {{"grpc-status", "9"}, {"grpc-message", "a%20b%zz%"}},
	 GW_GRPC_FAILED_PRECONDITION,
	 "a b%zz%",
	 0},
	{"trailers only",
	 {{":status", "200"},
	  {"content-type", "application/grpc"},
	  {"grpc-status", "14"},
	  {"grpc-message", "tab%09"}},
	 {0},
	 0,
	 true,
	 {{NULL}},
	 GW_GRPC_UNAVAILABLE,
	 "tab?",
	 0},
	{"no status", OK_HEADERS, {0}, 0, false, {{"x", "y"}}, GW_GRPC_UNKNOWN, "TRAILERS", 0},
	{"a status that is none",
	 OK_HEADERS,
	 {0},
	 0,
	 false,
	 {{"grpc-status", "x"}},
	 GW_GRPC_UNKNOWN,
	 "",
	 0},
	{"a status of later",
	 OK_HEADERS,
	 {0},
	 0,
	 false,
	 {{"grpc-status", "99"}},
	 GW_GRPC_UNKNOWN,
	 "",
	 0},
	{"the end without trailers",
	 OK_HEADERS,
	 {0, 0, 0, 0, 1, 'x'},
	 6,
	 true,
	 {{NULL}},
	 GW_GRPC_UNKNOWN,
	 "TRAILERS",
	 1},
	{"half a message and OK",
	 OK_HEADERS,
	 {0, 0, 0, 0, 2, 'x'},
	 6,
	 false,
	 {{"grpc-status", "0"}},
	 GW_GRPC_INTERNAL,
	 "FRAMING",
	 0},
	{"a compressed message",
	 OK_HEADERS,
	 {1, 0, 0, 0, 1, 'x'},
	 6,
	 false,
	 {{"grpc-status", "0"}},
	 GW_GRPC_UNIMPLEMENTED,
	 "COMPRESSION",
	 0},
	{"a message too long",
	 OK_HEADERS,
	 {0, 0, 0, 4, 1, 'x'},
	 6,
	 false,
	 {{"grpc-status", "0"}},
	 GW_GRPC_RESOURCE_EXHAUSTED,
	 "MESSAGE_TOO_LONG",
	 0},
	{"404", {{":status", "404"}}, {0}, 0, true, {{NULL}}, GW_GRPC_UNIMPLEMENTED, "HTTP", 0},
	{"503", {{":status", "503"}}, {'x'}, 1, true, {{NULL}}, GW_GRPC_UNAVAILABLE, "HTTP", 0},
	{"401", {{":status", "401"}}, {0}, 0, true, {{NULL}}, GW_GRPC_UNAUTHENTICATED, "HTTP", 0},
	{"a web page",
	 {{":status", "200"}, {"content-type", "text/html"}},
	 {'<', 'h'},
	 2,
	 true,
	 {{NULL}},
	 GW_GRPC_UNKNOWN,
	 "HTTP",
	 0},
};

static void wrong_servers_are_told_apart(void)
{
	for (size_t i = 0; i < sizeof(wrong_servers) / sizeof(wrong_servers[0]); i++) {
		const bool has_trailers = wrong_servers[i].trailers[0].name;
		struct raw_header headers[5] = {{NULL}};
		struct bout bout;

		memcpy(headers, wrong_servers[i].headers, sizeof(wrong_servers[i].headers));
		open_bout(&bout, false);
		pair_call(&bout.pair);
		step(&bout);
		CHECK(bout.peer.request_id > 0);
		raw_respond(&bout.peer, headers, wrong_servers[i].body, wrong_servers[i].body_len,
			    wrong_servers[i].ends, has_trailers ? wrong_servers[i].trailers : NULL);
		step(&bout);
		if (bout.ours->end_count != 1 ||
		    bout.ours->ends[0].status != wrong_servers[i].status)
			fprintf(stderr, "%s: %s\n", wrong_servers[i].what, bout.ours->ends[0].text);
		CHECK_EQ(bout.ours->end_count, 1);
		CHECK_EQ(bout.ours->ends[0].status, wrong_servers[i].status);
		CHECK_EQ(strncmp(bout.ours->ends[0].text, wrong_servers[i].text,
				 strlen(wrong_servers[i].text)),
			 0);
		CHECK_EQ(bout.ours->message_count, wrong_servers[i].message_count);
		CHECK_EQ(bout.ours->err, 0);
		close_bout(&bout);
	}
}

static void resets_are_mapped(void)
{
	static const struct {
		uint32_t code;
		int status;
	} cases[] = {
		{NGHTTP2_NO_ERROR, GW_GRPC_UNKNOWN},
		{NGHTTP2_PROTOCOL_ERROR, GW_GRPC_INTERNAL},
		{NGHTTP2_REFUSED_STREAM, GW_GRPC_UNAVAILABLE},
		{NGHTTP2_CANCEL, GW_GRPC_CANCELLED},
		{NGHTTP2_ENHANCE_YOUR_CALM, GW_GRPC_RESOURCE_EXHAUSTED},
		{NGHTTP2_INADEQUATE_SECURITY, GW_GRPC_PERMISSION_DENIED},
		{12345, GW_GRPC_INTERNAL},
	};

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct bout bout;

		open_bout(&bout, false);
		pair_call(&bout.pair);
		step(&bout);
		nghttp2_submit_rst_stream(bout.peer.session, 0, bout.peer.request_id,
					  cases[i].code);
		step(&bout);
		CHECK_EQ(bout.ours->end_count, 1);
		CHECK_EQ(bout.ours->ends[0].status, cases[i].status);
		close_bout(&bout);
	}
}

/* --- texts ----------------------------------------------------------------------------------- */

static void timeouts_are_read_and_written(void)
{
	static const struct {
		const char *text;
		bool good;
		uint64_t ns;
	} cases[] = {
		{"1n", true, 1},
		{"5u", true, 5000},
		{"7m", true, 7000000},
		{"2S", true, 2000000000},
		{"3M", true, 180000000000},
		{"1H", true, 3600000000000},
		{"99999999H", true, UINT64_MAX / 2},
		{"100000000n", false, 0},
		{"", false, 0},
		{"S", false, 0},
		{"1", false, 0},
		{"-1S", false, 0},
		{"1.5S", false, 0},
		{"1s", false, 0},
	};
	static const uint64_t times[] = {1,	    99999998,	    99999999,
					 123456789, 86400000000000, UINT64_MAX};

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		uint64_t ns = 0;

		CHECK_EQ(text_decode_timeout((const uint8_t *)cases[i].text, strlen(cases[i].text),
					     &ns),
			 cases[i].good);
		CHECK(ns == cases[i].ns);
	}
	for (size_t i = 0; i < sizeof(times) / sizeof(times[0]); i++) {
		char text[16];
		uint64_t ns;

		CHECK(text_encode_timeout(times[i], text) < sizeof(text));
		CHECK(text_decode_timeout((const uint8_t *)text, strlen(text), &ns));
		/* Never less than asked, and at most a part in 10^4 more. */
		CHECK(ns >= times[i] || ns == UINT64_MAX / 2);
		CHECK(ns - times[i] <= times[i] / 10000 + 1 || ns == UINT64_MAX / 2);
	}
}

static void messages_are_percent_encoded_within_bounds(void)
{
	char text[8];

	CHECK_EQ(text_encode_message("a%b", text, sizeof(text)), 5);
	CHECK_EQ(strcmp(text, "a%25b"), 0);
	/* An escape is whole or absent. */
	CHECK_EQ(text_encode_message("abc%%", text, sizeof(text)), 6);
	CHECK_EQ(strcmp(text, "abc%25"), 0);
	CHECK_EQ(text_encode_message("abcdefghij", text, sizeof(text)), 7);
	text_decode_message((const uint8_t *)"%41%e2%82%ac%", 13, text, sizeof(text));
	CHECK_EQ(strcmp(text, "A\xe2\x82\xac%"), 0);
	text_decode_message((const uint8_t *)"abcdefghij", 10, text, sizeof(text));
	CHECK_EQ(strcmp(text, "abcdefg"), 0);
}

/* --- padding --------------------------------------------------------------------------------- */

/* A message is received into place; padding lands there, too, and must not stay. */
static void padded_frames_make_whole_messages(void)
{
	static const struct raw_header headers[] = {
		GOOD_REQUEST, {"content-type", "application/grpc"}, {NULL, NULL}};
	static const size_t lens[] = {100, 16379, 16384, 200000, 700001};
	static uint8_t body[5 + 700001];

	for (size_t i = 0; i < sizeof(lens) / sizeof(lens[0]); i++) {
		const size_t len = lens[i];
		struct bout bout;

		for (size_t k = 0; k < len; k++)
			body[5 + k] = (uint8_t)(k * 2654435761u >> 24);
		for (size_t k = 0; k < 4; k++)
			body[1 + k] = (uint8_t)(len >> (24 - 8 * k));
		open_bout_for(&bout, true, 1u << 20);
		bout.ours->on_half_close = end_ok;
		bout.peer.pads = true;
		(void)raw_request(&bout.peer, headers, body, 5 + len, true);
		for (int k = 0; k < 400 && bout.ours->half_close_count == 0; k++)
			step(&bout);
		CHECK_EQ(bout.ours->half_close_count, 1);
		CHECK_EQ(bout.ours->message_count, 1);
		CHECK_EQ(bout.ours->last_len, len);
		CHECK_EQ(memcmp(bout.ours->last, body + 5, len), 0);
		close_bout(&bout);
	}
}

/* --- wounded streams ------------------------------------------------------------------------- */

/* The bytes that a client of ours sends for a few calls. */
static size_t record_client(uint8_t *ret_bytes, size_t cap)
{
	struct gw_grpc_config config = pair_config(NULL);
	struct pair pair = {.now_ns = 1};
	size_t len = 0;
	int fds[2];
	ssize_t got;

	CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, fds), 0);
	pair.client.pair = &pair;
	config.user = &pair.client;
	CHECK_EQ(gw_grpc_client_create(&config, fds[0], &pair.client.conn), 0);
	for (size_t i = 0; i < 3; i++) {
		struct gw_grpc_call *call = pair_call(&pair);

		pair_send_text(call, "a message");
		pair_send_text(call, "");
		pair_send_text(call, "another message, of another length");
		CHECK_EQ(gw_grpc_call_half_close(call), 0);
	}
	CHECK_EQ(gw_grpc_flush(pair.client.conn), 0);
	while ((got = read(fds[1], ret_bytes + len, cap - len)) > 0)
		len += (size_t)got;
	gw_grpc_destroy(pair.client.conn);
	close(fds[1]);
	return len;
}

static void wounded_streams_are_survived(void)
{
	uint8_t whole[8192];
	uint8_t bytes[8192];
	const size_t len = record_client(whole, sizeof(whole));
	uint32_t seed = 7;

	CHECK(len > 100);
	for (size_t round = 0; round < 4000; round++) {
		struct bout bout;

		memcpy(bytes, whole, len);
		for (size_t i = 0; i < 1 + round % 3; i++) {
			seed = seed * 1664525 + 1013904223;
			bytes[24 + (seed >> 8) % (len - 24)] = (uint8_t)(seed >> 24);
		}
		open_bout(&bout, true);
		bout.ours->on_half_close = end_ok;
		(void)shove(&bout, (const char *)bytes, len);
		for (int k = 0; k < 4; k++)
			pair_side_step(bout.ours);
		close_bout(&bout);
	}
}

int main(void)
{
	RUN(wrong_clients_are_answered);
	RUN(a_deadline_of_nothing_ends_at_once);
	RUN(metadata_is_bounded);
	RUN(a_thousand_streams_are_sixteen);
	RUN(what_is_no_http2_kills_its_connection_only);
	RUN(rapid_resets_are_survived);
	RUN(wrong_servers_are_told_apart);
	RUN(resets_are_mapped);
	RUN(timeouts_are_read_and_written);
	RUN(messages_are_percent_encoded_within_bounds);
	RUN(padded_frames_make_whole_messages);
	RUN(wounded_streams_are_survived);
	return EXIT_SUCCESS;
}
