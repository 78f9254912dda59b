/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_grpc.c - the gRPC connection against itself: messages whole and in order whatever the
 * frames look like, payloads given back exactly once, windows and queues bounded, each end
 * of a call told once with the right status. The peers that are not ours: test_grpc_hostile.c,
 * tests/native/test_page_server_interop.py.
 */
#include "grpc_pair.h"
#include "tls_certs.h"

#include <sys/socket.h>

static void echo_message(struct pair_side *side, struct gw_grpc_call *call, const uint8_t *data,
			 size_t len)
{
	(void)side;
	if (len <= GW_GRPC_HEAD_LEN_MAX)
		CHECK_EQ(gw_grpc_call_send(call, data, len, NULL, 0, NULL), 0);
}

static void end_ok(struct pair_side *side, struct gw_grpc_call *call)
{
	(void)side;
	CHECK_EQ(gw_grpc_call_end(call, GW_GRPC_OK, ""), 0);
}

static void unary_call_carries_path_metadata_and_status(void)
{
	const struct gw_grpc_metadata metadata[] = {{"traceparent", "00-aa-bb-01"}, {"x-k", ""}};
	const struct gw_grpc_call_options options = {
		.path = PAIR_PATH, .authority = "h:1", .metadata = metadata, .metadata_count = 2};
	struct gw_grpc_call *call;
	struct pair pair;

	pair_open_default(&pair);
	pair.server.on_message = echo_message;
	pair.server.on_half_close = end_ok;
	CHECK_EQ(gw_grpc_call_open(pair.client.conn, &options, &call), 0);
	pair_send_text(call, "ping");
	/* Before the server ends, look at what came in. */
	pair.server.on_half_close = NULL;
	CHECK_EQ(gw_grpc_call_half_close(call), 0);
	CHECK_EQ(gw_grpc_call_half_close(call), -EPIPE);
	CHECK_EQ(gw_grpc_call_send(call, "x", 1, NULL, 0, NULL), -EPIPE);
	pair_run(&pair);
	CHECK_EQ(pair.server.call_count, 1);
	CHECK_EQ(pair.server.half_close_count, 1);
	CHECK_EQ(strcmp(gw_grpc_call_path(pair.server.call), PAIR_PATH), 0);
	CHECK_EQ(strcmp(gw_grpc_call_metadata(pair.server.call, "traceparent"), "00-aa-bb-01"), 0);
	CHECK_EQ(strcmp(gw_grpc_call_metadata(pair.server.call, "x-k"), ""), 0);
	CHECK_EQ(strcmp(gw_grpc_call_metadata(pair.server.call, "te"), "trailers"), 0);
	CHECK(!gw_grpc_call_metadata(pair.server.call, "x-none"));
	CHECK(pair_last_is(&pair.client, "ping"));
	CHECK_EQ(pair.client.end_count, 0);
	CHECK_EQ(gw_grpc_call_end(pair.server.call, GW_GRPC_OK, ""), 0);
	CHECK_EQ(gw_grpc_call_end(pair.server.call, GW_GRPC_ABORTED, "late"), -EPIPE);
	CHECK_EQ(gw_grpc_flush(pair.server.conn), 0);
	pair_run(&pair);
	CHECK_EQ(pair.client.end_count, 1);
	CHECK_EQ(pair.client.ends[0].status, GW_GRPC_OK);
	CHECK_EQ(pair.server.end_count, 1);
	CHECK_EQ(pair.server.ends[0].status, GW_GRPC_OK);
	CHECK(gw_grpc_received_ns(pair.client.conn) == pair.now_ns);
	pair_close(&pair);
}

static void statuses_and_texts_arrive_unharmed(void)
{
	static const struct {
		int status;
		const char *text;
		bool after_message;
	} cases[] = {
		{GW_GRPC_NOT_FOUND, "IMAGE_UNKNOWN: no such image", false},
		{GW_GRPC_FAILED_PRECONDITION, "STALE_GENERATION: 3, not 4", true},
		{GW_GRPC_DATA_LOSS, "100 % lost: \xc3\xbc \xe2\x82\xac", true},
		{GW_GRPC_UNAUTHENTICATED, "", false},
		{GW_GRPC_OK, "all is well", true},
		{GW_GRPC_UNIMPLEMENTED, "%41%", false},
	};

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct gw_grpc_call *call;
		struct pair pair;

		pair_open_default(&pair);
		call = pair_call(&pair);
		pair_send_text(call, "?");
		pair_run(&pair);
		if (cases[i].after_message)
			pair_send_text(pair.server.call, "first this");
		CHECK_EQ(gw_grpc_call_end(pair.server.call, cases[i].status, cases[i].text), 0);
		pair_run(&pair);
		CHECK_EQ(pair.client.message_count, cases[i].after_message);
		CHECK_EQ(pair.client.end_count, 1);
		CHECK_EQ(pair.client.ends[0].status, cases[i].status);
		CHECK_EQ(strcmp(pair.client.ends[0].text, cases[i].text), 0);
		/* The client had not half-closed: the server gave it up, and is rid of it too. */
		CHECK_EQ(pair.server.end_count, 1);
		CHECK_EQ(pair.server.ends[0].status, cases[i].status);
		CHECK(!pair.client.err && !pair.server.err);
		pair_close(&pair);
	}
}

static uint8_t pattern(size_t message, size_t i)
{
	return (uint8_t)(message * 31 + i * 7 + (i >> 8));
}

/* A head and a payload that together are `len` bytes of the pattern. */
static void send_pattern(struct gw_grpc_call *call, size_t message, size_t len)
{
	const size_t head_len = len < 37 ? len / 2 : 37;
	uint8_t *data = malloc(len ? len : 1);

	CHECK(data);
	for (size_t i = 0; i < len; i++)
		data[i] = pattern(message, i);
	CHECK_EQ(gw_grpc_call_send(call, data, head_len, data + head_len, len - head_len, data), 0);
}

static void free_sent(struct pair_side *side, void *cookie)
{
	(void)side;
	free(cookie);
}

static const size_t message_lens[] = {0,     1,	    4,	   5,	 16383, 16384,	16385,
				      65535, 65536, 70000, 4096, 0,	300000, (1u << 20) + 60};
#define MESSAGE_COUNT (sizeof(message_lens) / sizeof(message_lens[0]))

static void check_pattern(struct pair_side *side, struct gw_grpc_call *call, const uint8_t *data,
			  size_t len)
{
	const size_t message = side->message_count - 1;

	(void)call;
	CHECK(message < MESSAGE_COUNT);
	CHECK_EQ(len, message_lens[message]);
	for (size_t i = 0; i < len; i++)
		CHECK_EQ(data[i], pattern(message, i));
}

static void messages_are_whole_whatever_the_frames(void)
{
	static const struct {
		uint32_t window_len;
		uint32_t read_len;
		size_t relay_len_max;
	} cases[] = {
		{16u << 20, 0, 0},	  {65535, 0, 0},	  {65535, 13, 0},
		{1u << 20, 16384 + 9, 0}, {16u << 20, 100, 4096}, {65535, 4096, 777},
		{100000, 0, 4096},
	};

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct gw_grpc_config client = pair_config(NULL);
		struct gw_grpc_config server = pair_config(NULL);
		struct gw_grpc_call *call;
		struct pair pair;

		client.window_len = cases[i].window_len;
		server.window_len = cases[i].window_len;
		client.read_len = cases[i].read_len;
		server.read_len = cases[i].read_len;
		pair_open(&pair, client, server, cases[i].relay_len_max);
		pair.client.on_message = check_pattern;
		pair.server.on_message = check_pattern;
		pair.client.on_sent = free_sent;
		pair.server.on_sent = free_sent;
		pair.server.on_half_close = end_ok;
		call = pair_call(&pair);
		pair_run(&pair);
		CHECK_EQ(pair.server.call_count, 1);
		for (size_t k = 0; k < MESSAGE_COUNT; k++) {
			send_pattern(call, k, message_lens[k]);
			send_pattern(pair.server.call, k, message_lens[k]);
		}
		CHECK_EQ(gw_grpc_call_half_close(call), 0);
		pair_run(&pair);
		CHECK_EQ(pair.client.message_count, MESSAGE_COUNT);
		CHECK_EQ(pair.server.message_count, MESSAGE_COUNT);
		CHECK_EQ(pair.client.sent_count, MESSAGE_COUNT);
		CHECK_EQ(pair.server.sent_count, MESSAGE_COUNT);
		CHECK_EQ(pair.client.end_count, 1);
		CHECK_EQ(pair.client.ends[0].status, GW_GRPC_OK);
		CHECK_EQ(pair.server.ends[0].status, GW_GRPC_OK);
		pair_close(&pair);
	}
}

static void long_messages_are_refused_before_they_are_stored(void)
{
	for (int at_server = 0; at_server < 2; at_server++) {
		struct gw_grpc_config client = pair_config(NULL);
		struct gw_grpc_config server = pair_config(NULL);
		struct pair_side *teller;
		struct gw_grpc_call *call;
		struct pair pair;

		if (at_server)
			server.message_len_max = 1000;
		else
			client.message_len_max = 1000;
		pair_open(&pair, client, server, 0);
		pair.client.on_sent = free_sent;
		pair.server.on_sent = free_sent;
		call = pair_call(&pair);
		pair_run(&pair);
		send_pattern(at_server ? call : pair.server.call, 0, 1000);
		send_pattern(at_server ? call : pair.server.call, 1, 1001);
		send_pattern(at_server ? call : pair.server.call, 2, 10);
		pair_run(&pair);
		teller = at_server ? &pair.server : &pair.client;
		CHECK_EQ(teller->message_count, 1);
		CHECK_EQ(teller->last_len, 1000);
		CHECK_EQ(pair.client.ends[0].status, GW_GRPC_RESOURCE_EXHAUSTED);
		CHECK(strstr(pair.client.ends[0].text, "MESSAGE_TOO_LONG"));
		/* A client that gives up says CANCEL; a server says why. */
		CHECK_EQ(pair.server.ends[0].status,
			 at_server ? GW_GRPC_RESOURCE_EXHAUSTED : GW_GRPC_CANCELLED);
		CHECK_EQ(pair.client.sent_count + pair.server.sent_count, 3);
		/* The connection lives on. */
		pair.server.on_message = echo_message;
		pair_send_text(pair_call(&pair), "again");
		pair_run(&pair);
		CHECK(pair_last_is(&pair.client, "again"));
		pair_close(&pair);
	}
}

static void cancel_ends_both_sides_and_gives_payloads_back(void)
{
	for (int by_server = 0; by_server < 2; by_server++) {
		struct gw_grpc_call *call;
		struct pair pair;

		pair_open_default(&pair);
		pair.client.on_sent = free_sent;
		pair.server.on_sent = free_sent;
		call = pair_call(&pair);
		pair_run(&pair);
		/* More than window and socket take: it is cut in the middle of a message. */
		for (size_t k = 0; k < 8; k++) {
			send_pattern(call, k, 1u << 20);
			send_pattern(pair.server.call, k, 1u << 20);
		}
		CHECK_EQ(gw_grpc_flush(pair.client.conn), 0);
		CHECK_EQ(gw_grpc_flush(pair.server.conn), 0);
		gw_grpc_call_cancel(by_server ? pair.server.call : call);
		gw_grpc_call_cancel(by_server ? pair.server.call : call);
		CHECK_EQ(gw_grpc_call_send(by_server ? pair.server.call : call, "x", 1, NULL, 0,
					   NULL),
			 -EPIPE);
		pair_run(&pair);
		CHECK_EQ(pair.client.end_count, 1);
		CHECK_EQ(pair.server.end_count, 1);
		CHECK_EQ(pair.client.ends[0].status, GW_GRPC_CANCELLED);
		CHECK_EQ(pair.server.ends[0].status, GW_GRPC_CANCELLED);
		CHECK_EQ(pair.client.sent_count, 8);
		CHECK_EQ(pair.server.sent_count, 8);
		/* The cut message has not broken the framing of the connection. */
		pair.server.on_message = echo_message;
		pair_send_text(pair_call(&pair), "still here");
		pair_run(&pair);
		CHECK(pair_last_is(&pair.client, "still here"));
		pair_close(&pair);
	}
}

static void deadlines_are_kept_by_both_sides(void)
{
	const struct gw_grpc_call_options options = {
		.path = PAIR_PATH, .authority = "h:1", .timeout_ns = 5000000, .now_ns = 1000};
	struct gw_grpc_call *call;
	struct pair pair;

	for (int at_server = 0; at_server < 2; at_server++) {
		struct pair_side *first;

		pair_open_default(&pair);
		first = at_server ? &pair.server : &pair.client;
		CHECK(gw_grpc_deadline_ns(first->conn) == UINT64_MAX);
		CHECK_EQ(gw_grpc_call_open(pair.client.conn, &options, &call), 0);
		pair_run(&pair);
		CHECK_EQ(gw_grpc_deadline_ns(first->conn), 5001000);
		CHECK_EQ(gw_grpc_on_time(first->conn, 5000999), 0);
		CHECK_EQ(first->end_count, 0);
		CHECK_EQ(gw_grpc_on_time(first->conn, 5001000), 0);
		CHECK_EQ(first->end_count, 1);
		CHECK_EQ(first->ends[0].status, GW_GRPC_DEADLINE_EXCEEDED);
		CHECK(gw_grpc_deadline_ns(first->conn) == UINT64_MAX);
		pair_run(&pair);
		CHECK_EQ(pair.client.end_count, 1);
		CHECK_EQ(pair.server.end_count, 1);
		pair_close(&pair);
	}
}

static void send_queue_is_bounded_and_tells_when_it_has_room(void)
{
	struct gw_grpc_config config = pair_config(NULL);
	struct gw_grpc_call *call;
	struct pair pair;
	size_t queued = 0;
	int err;

	config.window_len = 65535;
	pair_open(&pair, config, config, 0);
	pair.client.on_sent = free_sent;
	call = pair_call(&pair);
	pair_run(&pair);
	gw_grpc_call_hold(pair.server.call, true);
	do {
		uint8_t *payload = calloc(1, 32768);

		err = gw_grpc_call_send(call, NULL, 0, payload, 32768, payload);
		if (err)
			free(payload);
		else
			queued++;
		CHECK_EQ(gw_grpc_flush(pair.client.conn), 0);
		pair_run(&pair);
	} while (!err && queued < 1000);
	CHECK_EQ(err, -EAGAIN);
	/* One message is in the window; the next is begun; the queue holds 16. */
	CHECK(queued >= 16 && queued <= 19);
	CHECK_EQ(pair.server.message_count, 1);
	CHECK_EQ(pair.client.writable_count, 0);
	CHECK(gw_grpc_call_queued_count(call) > 0);
	/* Nothing moves while it is held; the moment it is not, everything does. */
	gw_grpc_call_hold(pair.server.call, false);
	pair_run(&pair);
	CHECK_EQ(pair.server.message_count, queued);
	CHECK_EQ(pair.client.writable_count, 1);
	CHECK_EQ(gw_grpc_call_queued_count(call), 0);
	pair_close(&pair);
}

static void a_held_call_does_not_hold_others(void)
{
	struct gw_grpc_config config = pair_config(NULL);
	struct gw_grpc_call *held;
	struct pair pair;

	config.window_len = 65535;
	pair_open(&pair, config, config, 0);
	pair.client.on_sent = free_sent;
	held = pair_call(&pair);
	pair_run(&pair);
	gw_grpc_call_hold(pair.server.call, true);
	for (size_t k = 0; k < 4; k++)
		send_pattern(held, k, 100000);
	pair_run(&pair);
	CHECK_EQ(pair.server.message_count, 0);
	pair.server.on_message = echo_message;
	pair_send_text(pair_call(&pair), "through");
	pair_run(&pair);
	CHECK(pair_last_is(&pair.client, "through"));
	pair_close(&pair);
}

static void goaway_refuses_new_calls_and_keeps_old_ones(void)
{
	const struct gw_grpc_call_options options = {.path = PAIR_PATH, .authority = "h:1"};
	struct gw_grpc_call *call;
	struct gw_grpc_call *late;
	struct pair pair;

	pair_open_default(&pair);
	pair.server.on_message = echo_message;
	pair.server.on_half_close = end_ok;
	call = pair_call(&pair);
	pair_run(&pair);
	/* Opened before the client can know, arriving after the server has said so. */
	gw_grpc_drain(pair.server.conn);
	CHECK_EQ(gw_grpc_call_open(pair.client.conn, &options, &late), 0);
	pair_run(&pair);
	CHECK(gw_grpc_is_draining(pair.client.conn));
	CHECK_EQ(pair.client.end_count, 1);
	CHECK_EQ(pair.client.ends[0].status, GW_GRPC_UNAVAILABLE);
	CHECK_EQ(gw_grpc_call_open(pair.client.conn, &options, &late), -ESHUTDOWN);
	pair_send_text(call, "old one");
	CHECK_EQ(gw_grpc_call_half_close(call), 0);
	pair_run(&pair);
	CHECK(pair_last_is(&pair.client, "old one"));
	CHECK_EQ(pair.client.end_count, 2);
	CHECK_EQ(pair.client.ends[1].status, GW_GRPC_OK);
	CHECK_EQ(pair.client.err, -ESHUTDOWN);
	pair_close(&pair);
}

static void a_lost_connection_ends_every_call_once(void)
{
	struct gw_grpc_call *call;
	struct pair pair;

	pair_open_default(&pair);
	pair.client.on_sent = free_sent;
	pair.server.on_sent = free_sent;
	for (size_t i = 0; i < 3; i++)
		call = pair_call(&pair);
	pair_run(&pair);
	for (size_t k = 0; k < 8; k++)
		send_pattern(call, k, 1u << 20);
	CHECK_EQ(gw_grpc_flush(pair.client.conn), 0);
	gw_grpc_destroy(pair.server.conn);
	pair.server.conn = NULL;
	CHECK_EQ(pair.server.end_count, 3);
	CHECK_EQ(pair.server.ends[0].status, GW_GRPC_UNAVAILABLE);
	pair_run(&pair);
	CHECK(pair.client.err == -ECONNRESET || pair.client.err == -EPIPE);
	CHECK_EQ(pair.client.end_count, 3);
	CHECK_EQ(pair.client.ends[2].status, GW_GRPC_UNAVAILABLE);
	CHECK_EQ(pair.client.sent_count, 8);
	CHECK_EQ(gw_grpc_on_readable(pair.client.conn, 0), pair.client.err);
	CHECK_EQ(gw_grpc_on_writable(pair.client.conn, 0), pair.client.err);
	CHECK(!gw_grpc_wants_write(pair.client.conn));
	pair_close(&pair);
}

static void destroy_gives_payloads_back(void)
{
	struct pair pair;

	pair_open_default(&pair);
	pair.client.on_sent = free_sent;
	send_pattern(pair_call(&pair), 0, 1u << 20);
	pair_run(&pair);
	for (size_t k = 0; k < 4; k++)
		send_pattern(pair.client.call, 0, 1u << 20);
	CHECK_EQ(gw_grpc_flush(pair.client.conn), 0);
	gw_grpc_destroy(pair.client.conn);
	CHECK_EQ(pair.client.sent_count, 5);
	CHECK_EQ(pair.client.end_count, 1);
	pair.client.conn = NULL;
	pair_close(&pair);
	gw_grpc_destroy(NULL);
}

static void more_calls_than_allowed_wait(void)
{
	struct pair pair;

	pair_open_default(&pair);
	pair.server.on_half_close = end_ok;
	pair_run(&pair); /* settings: 16 at once */
	for (size_t i = 0; i < 40; i++)
		CHECK_EQ(gw_grpc_call_half_close(pair_call(&pair)), 0);
	pair_run(&pair);
	CHECK_EQ(pair.server.call_count, 40);
	CHECK_EQ(pair.client.end_count, 40);
	for (size_t i = 0; i < 40; i++)
		CHECK_EQ(pair.client.ends[i].status, GW_GRPC_OK);
	pair_close(&pair);
}

static void a_waiting_call_can_be_cancelled(void)
{
	struct gw_grpc_call *call = NULL;
	struct pair pair;

	pair_open_default(&pair);
	pair_run(&pair);
	for (size_t i = 0; i < 17; i++)
		call = pair_call(&pair);
	pair_run(&pair);
	CHECK_EQ(pair.server.call_count, 16);
	pair_send_text(call, "never sent");
	gw_grpc_call_cancel(call);
	pair_run(&pair);
	CHECK_EQ(pair.client.end_count, 1);
	CHECK_EQ(pair.client.ends[0].status, GW_GRPC_CANCELLED);
	/* Its place in the session's queue is found empty when its turn comes. */
	pair_call(&pair);
	CHECK_EQ(gw_grpc_call_end(pair.server.call, GW_GRPC_OK, ""), 0);
	pair_run(&pair);
	CHECK_EQ(pair.client.end_count, 2);
	CHECK_EQ(pair.server.call_count, 17);
	CHECK_EQ(pair.server.message_count, 0);
	pair_close(&pair);
}

static void bad_configs_are_refused(void)
{
	struct gw_grpc_config config = pair_config(NULL);
	struct gw_grpc *conn = NULL;
	int fd = -1;

	CHECK_EQ(gw_grpc_client_create(&config, -1, &conn), -EINVAL);
	config.window_len = 1000;
	CHECK_EQ(gw_grpc_client_create(&config, 0, &conn), -EINVAL);
	config = pair_config(NULL);
	config.message_len_max = UINT32_MAX;
	CHECK_EQ(gw_grpc_server_create(&config, 0, &conn), -EINVAL);
	config = pair_config(NULL);
	config.send_queue_count = 0;
	CHECK_EQ(gw_grpc_server_create(&config, 0, &conn), -EINVAL);
	CHECK(!conn);
	CHECK_EQ(gw_grpc_connect("localhost", 1, 1000, &fd), -EINVAL);
	CHECK_EQ(gw_grpc_connect("127.0.0.1", 0, 1000, &fd), -EINVAL);
	CHECK_EQ(gw_grpc_connect("127.0.0.1", 65536, 1000, &fd), -EINVAL);
	CHECK_EQ(fd, -1);
}

/* Nobody listens on a port that was just bound and closed: the refusal is the connection's. */
static void a_refused_connect_ends_its_calls(void)
{
	struct sockaddr_storage address = {0};
	struct sockaddr *at = (struct sockaddr *)&address;
	socklen_t len = sizeof(address);
	struct gw_grpc_config config;
	struct pollfd poll_fd;
	struct pair pair = {.now_ns = 1};
	int fd = socket(AF_INET, SOCK_STREAM, 0);
	uint16_t port;

	address.ss_family = AF_INET;
	CHECK_EQ(bind(fd, at, 16), 0);
	CHECK_EQ(getsockname(fd, at, &len), 0);
	memcpy(&port, at->sa_data, 2);
	close(fd);
	CHECK_EQ(gw_grpc_connect("127.0.0.1", __builtin_bswap16(port), 1000, &fd), 0);
	pair.client.pair = &pair;
	config = pair_config(&pair.client);
	CHECK_EQ(gw_grpc_client_create(&config, fd, &pair.client.conn), 0);
	pair_call(&pair);
	CHECK(gw_grpc_wants_write(pair.client.conn));
	poll_fd = (struct pollfd){.fd = fd, .events = POLLOUT};
	CHECK_EQ(poll(&poll_fd, 1, -1), 1);
	CHECK_EQ(gw_grpc_on_writable(pair.client.conn, 1), -ECONNREFUSED);
	CHECK_EQ(pair.client.end_count, 1);
	CHECK_EQ(pair.client.ends[0].status, GW_GRPC_UNAVAILABLE);
	gw_grpc_destroy(pair.client.conn);
}

/* Each call that the connection makes, failed in turn: one end per call, nothing lost or doubled. */
static void every_failing_system_call_is_survived(void)
{
	static const struct {
		enum gw_sys_call call;
		int err;
	} cases[] = {
		{GW_SYS_RECV, ECONNRESET},    {GW_SYS_RECV, EAGAIN},	{GW_SYS_RECV, EINTR},
		{GW_SYS_RECVMSG, ECONNRESET}, {GW_SYS_RECVMSG, EAGAIN}, {GW_SYS_RECVMSG, EINTR},
		{GW_SYS_SENDMSG, EPIPE},      {GW_SYS_SENDMSG, EAGAIN}, {GW_SYS_SENDMSG, EINTR},
		{GW_SYS_SENDMSG, ENOMEM},
	};

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		bool failed = true;

		for (uint64_t nth = 1; failed; nth++) {
			const bool harmless = cases[i].err == EAGAIN || cases[i].err == EINTR;
			struct gw_grpc_call *call;
			struct pair pair;

			pair_open_default(&pair);
			pair.client.on_sent = free_sent;
			pair.server.on_message = echo_message;
			pair.server.on_half_close = end_ok;
			gw_sys_fail_nth(cases[i].call, nth, cases[i].err);
			call = pair_call(&pair);
			send_pattern(call, 0, 100000);
			pair_send_text(call, "end");
			CHECK_EQ(gw_grpc_call_half_close(call), 0);
			pair_run(&pair);
			failed = gw_sys_failed();
			gw_sys_fail_none();
			/* The other side learns of a death by the end of the stream. */
			if (pair.client.err && pair.server.conn) {
				gw_grpc_destroy(pair.client.conn);
				pair.client.conn = NULL;
			} else if (pair.server.err) {
				gw_grpc_destroy(pair.server.conn);
				pair.server.conn = NULL;
			}
			pair_run(&pair);
			CHECK_EQ(pair.client.end_count, 1);
			CHECK_EQ(pair.client.sent_count, 1);
			CHECK(pair.server.end_count == pair.server.call_count);
			if (harmless || !failed) {
				CHECK_EQ(pair.client.ends[0].status, GW_GRPC_OK);
				CHECK(pair_last_is(&pair.client, "end"));
			}
			pair_close(&pair);
		}
	}
}

static void run_all(void)
{
	RUN(unary_call_carries_path_metadata_and_status);
	RUN(statuses_and_texts_arrive_unharmed);
	RUN(messages_are_whole_whatever_the_frames);
	RUN(long_messages_are_refused_before_they_are_stored);
	RUN(cancel_ends_both_sides_and_gives_payloads_back);
	RUN(deadlines_are_kept_by_both_sides);
	RUN(send_queue_is_bounded_and_tells_when_it_has_room);
	RUN(a_held_call_does_not_hold_others);
	RUN(goaway_refuses_new_calls_and_keeps_old_ones);
	RUN(a_lost_connection_ends_every_call_once);
	RUN(destroy_gives_payloads_back);
	RUN(more_calls_than_allowed_wait);
	RUN(a_waiting_call_can_be_cancelled);
	RUN(bad_configs_are_refused);
	RUN(a_refused_connect_ends_its_calls);
	RUN(every_failing_system_call_is_survived);
}

/* Who is not believed is told why, and so is the owner. */
static void a_stranger_is_told_why(void)
{
	struct certs_authority other = certs_make_authority("another authority");
	struct certs_party party = certs_make_party(&other, "DNS:" PAIR_NAME, -1, 30, NULL);
	struct gw_tls_identity *stranger = certs_identity(&party);
	struct gw_grpc_config client = pair_config(NULL);
	struct pair pair;

	client.tls = stranger;
	pair_open(&pair, client, pair_config(NULL), 0);
	(void)pair_call(&pair);
	pair_run(&pair);
	CHECK_EQ(pair.client.err, -EPROTO);
	CHECK_EQ(pair.client.end_count, 1);
	CHECK_EQ(pair.client.ends[0].status, GW_GRPC_UNAVAILABLE);
	CHECK(strstr(pair.client.ends[0].text, "TLS: the peer's certificate"));
	CHECK_EQ(pair.server.call_count, 0);
	pair_close(&pair);
	gw_tls_identity_unref(stranger);
	certs_remove_party(&party);
	certs_free_authority(&other);
}

/* A plain client at a server that wants TLS, and the other way round: no call comes through. */
static void plain_and_encrypted_do_not_mix(void)
{
	for (int i = 0; i < 2; i++) {
		struct gw_grpc_config client = pair_config(NULL), server = pair_config(NULL);
		struct pair pair;

		*(i ? &client.tls : &server.tls) = NULL;
		pair_open(&pair, client, server, 0);
		(void)pair_call(&pair);
		pair_run(&pair);
		CHECK(pair.client.err || pair.server.err);
		CHECK_EQ(pair.server.call_count, 0);
		pair_close(&pair);
	}
}

/* Who the peer is, is known when its call comes in. */
static void check_peer(struct pair_side *side, struct gw_grpc_call *call)
{
	CHECK(gw_grpc_call_conn(call) == side->conn);
	CHECK(gw_tls_peer_is(gw_grpc_tls(side->conn), PAIR_NAME));
	gw_grpc_call_end(call, GW_GRPC_OK, "");
}

static void the_peer_is_known_to_a_call(void)
{
	struct pair pair;

	pair_open_default(&pair);
	pair.server.on_call = check_peer;
	(void)pair_call(&pair);
	pair_run(&pair);
	CHECK_EQ(pair.server.call_count, 1);
	CHECK_EQ(pair.client.ends[0].status, GW_GRPC_OK);
	pair_close(&pair);
}

int main(void)
{
	struct certs_authority authority = certs_make_authority("the authority");
	struct certs_party party = certs_make_party(&authority, "DNS:" PAIR_NAME, -1, 30, NULL);

	run_all();
	fprintf(stderr, "encrypted:\n");
	pair_tls = certs_identity(&party);
	run_all();
	RUN(a_stranger_is_told_why);
	RUN(plain_and_encrypted_do_not_mix);
	RUN(the_peer_is_known_to_a_call);
	gw_tls_identity_unref(pair_tls);
	certs_remove_party(&party);
	certs_free_authority(&authority);
	return EXIT_SUCCESS;
}
