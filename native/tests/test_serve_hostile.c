/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_serve_hostile.c - the page server against peers that flood, stall, vanish or babble, and
 * against a kernel that refuses: each is bounded, and the next honest client is served.
 */
#include "raw_peer.h"
#include "serve_client.h"

#include <arpa/inet.h>
#include <godwit/serve.h>
#include <netinet/in.h>
#include <sched.h>
#include <sys/mman.h>

#define PAGE	   4096ul
#define MIB	   (1ul << 20)
#define MEMORY_LEN (64u * MIB)

struct fixture {
	struct gw_serve *serve;
	uint32_t port;
	int fd;
};

static void set_up(struct fixture *fixture, uint32_t heartbeat_ms)
{
	static const struct gw_serve_region region = {.size = MEMORY_LEN, .page_size = 4096};
	const struct gw_serve_config config = {.struct_size = sizeof(config),
					       .listen_host = "127.0.0.1",
					       .connection_count_max = 16,
					       .heartbeat_ms = heartbeat_ms};
	struct gw_serve_image record = {.struct_size = sizeof(record),
					.image_id = "img",
					.vm_id = "vm",
					.boot_id = "boot",
					.epoch = 1,
					.generation = 1,
					.state = GW_IMAGE_FROZEN,
					.region_count = 1,
					.regions = &region};
	uint8_t page[PAGE];

	fixture->fd = memfd_create("test-serve", MFD_CLOEXEC);
	CHECK_EQ(ftruncate(fixture->fd, MEMORY_LEN), 0);
	for (uint64_t at = 0; at < MEMORY_LEN; at += PAGE) {
		memset(page, (int)(1 + at / PAGE % 255), sizeof(page));
		CHECK_EQ(pwrite(fixture->fd, page, PAGE, (off_t)at), PAGE);
	}
	CHECK_EQ(gw_serve_create(&config, &fixture->serve), 0);
	fixture->port = (uint32_t)gw_serve_port(fixture->serve);
	record.ram_fd = fixture->fd;
	CHECK_EQ(gw_serve_put_image(fixture->serve, &record), 0);
	CHECK_EQ(gw_serve_start(fixture->serve), 0);
}

static void tear_down(struct fixture *fixture)
{
	gw_serve_destroy(fixture->serve);
	close(fixture->fd);
}

static struct gw_serve_stats stats_of(const struct fixture *fixture)
{
	struct gw_serve_stats stats;

	CHECK_EQ(gw_serve_stats(fixture->serve, &stats), 0);
	return stats;
}

static int raw_socket(const struct fixture *fixture)
{
	const struct sockaddr_in address = {.sin_family = AF_INET,
					    .sin_port = htons((uint16_t)fixture->port),
					    .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	CHECK(fd >= 0);
	CHECK_EQ(connect(fd, (const struct sockaddr *)&address, sizeof(address)), 0);
	return fd;
}

static void is_served(const struct fixture *fixture)
{
	struct client client;

	client_start(&client, fixture->port, "img", 2, GW_PAGE_LANE_DEMAND);
	client_want(&client, 5 * PAGE, PAGE, 1);
	CLIENT_UNTIL(&client, client.pages_count == 1);
	client_close(&client);
}

/* Wait for what another thread does; each look is a real look. */
#define UNTIL(condition)                                                         \
	do {                                                                     \
		const uint64_t until_ns_ = gw_sys_now_ns() + 60ull * 1000000000; \
		while (!(condition)) {                                           \
			CHECK(gw_sys_now_ns() < until_ns_);                      \
			sched_yield();                                           \
		}                                                                \
	} while (0)

static void babble_is_hung_up_on(void)
{
	static const char *const babble[] = {
		"GET / HTTP/1.1\r\n\r\n", "\x16\x03\x01\x02\x00",
		"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nxxxxxxxxxxxxxxxxxxxxxxx"};
	struct fixture fixture;
	char answer[4096];

	set_up(&fixture, 0);
	for (size_t i = 0; i < sizeof(babble) / sizeof(babble[0]); i++) {
		const int fd = raw_socket(&fixture);
		ssize_t got;

		CHECK_EQ(send(fd, babble[i], strlen(babble[i]), MSG_NOSIGNAL),
			 (ssize_t)strlen(babble[i]));
		do {
			got = recv(fd, answer, sizeof(answer), 0);
		} while (got > 0);
		close(fd);
	}
	is_served(&fixture);
	UNTIL(stats_of(&fixture).connection_count == 0);
	tear_down(&fixture);
}

static void messages_that_are_none_end_their_stream(void)
{
	static uint8_t long_message[GW_PAGE_REQUEST_LEN_MAX + 1];
	static const struct {
		const void *data;
		size_t len;
		int status;
		const char *reason;
	} cases[] = {
		{"\xff\xff\xff", 3, GW_GRPC_INVALID_ARGUMENT, "MESSAGE_MALFORMED"},
		{"\x0a\x05\x0a", 3, GW_GRPC_INVALID_ARGUMENT, "MESSAGE_MALFORMED"},
		{"", 0, GW_GRPC_INVALID_ARGUMENT, "BODY_UNSET"},
		{"\x22\x00", 2, GW_GRPC_INVALID_ARGUMENT, "BODY_UNSET"},
		{long_message, sizeof(long_message), GW_GRPC_RESOURCE_EXHAUSTED,
		 "MESSAGE_TOO_LONG"},
	};
	struct fixture fixture;

	set_up(&fixture, 0);
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct client client;

		client_start(&client, fixture.port, "img", 2, GW_PAGE_LANE_DEMAND);
		CHECK_EQ(gw_grpc_call_send(client.call, NULL, 0, cases[i].data, cases[i].len, NULL),
			 0);
		client_expect_end(&client, cases[i].status, cases[i].reason);
		client_close(&client);
	}
	CHECK_EQ(stats_of(&fixture).refused_total, sizeof(cases) / sizeof(cases[0]));
	is_served(&fixture);
	tear_down(&fixture);
}

/* A client that asks for everything and reads nothing costs two buffers and a socket's worth. */
static void a_reader_that_does_not_read_is_bounded_and_given_up(void)
{
	struct fixture fixture;
	struct client stalled;

	set_up(&fixture, 250);
	client_start(&stalled, fixture.port, "img", 2, GW_PAGE_LANE_BULK);
	for (uint64_t at = 0; at < 16; at++)
		for (uint64_t k = 0; k < 64; k++)
			client_want(&stalled, k * MIB, MIB, 1);
	/* Sent, and never read from again. */
	CHECK_EQ(gw_grpc_flush(stalled.conn), 0);
	is_served(&fixture);
	UNTIL(stats_of(&fixture).connection_count == 0);
	/* The client's window of 4 MiB, the buffers, and what is read before it shows. */
	CHECK(stats_of(&fixture).sent_bytes_total < 16 * MIB);
	CHECK_EQ(stats_of(&fixture).stream_count, 0);
	client_close(&stalled);
	tear_down(&fixture);
}

/* Far more wants than the ring holds open the window for: held back, and none is lost. */
static void a_flood_of_wants_is_answered_in_order(void)
{
	struct fixture fixture;
	struct client client;

	set_up(&fixture, 0);
	client_start(&client, fixture.port, "img", 2, GW_PAGE_LANE_DEMAND);
	client.in_order = true;
	for (uint64_t at = 0; at < MEMORY_LEN; at += PAGE)
		client_want(&client, at, PAGE, 1);
	CHECK_EQ(gw_grpc_call_half_close(client.call), 0);
	client_expect_end(&client, GW_GRPC_OK, "");
	CHECK_EQ(client.pages_count, MEMORY_LEN / PAGE);
	CHECK_EQ(stats_of(&fixture).want_total, MEMORY_LEN / PAGE);
	client_close(&client);
	tear_down(&fixture);
}

static void clients_vanish_at_any_moment(void)
{
	struct fixture fixture;

	set_up(&fixture, 0);
	for (size_t i = 0; i < 60; i++) {
		struct client client;

		client_open(&client, fixture.port, 1u << 20);
		client_call(&client, GW_PAGE_PATH_FETCH);
		client_hello(&client, "img", 2, GW_PAGE_LANE_BULK);
		for (uint64_t k = 0; k < 20; k++)
			client_want(&client, k * MIB, MIB, 1);
		for (size_t k = 0; k < i; k++)
			(void)client_step(&client, 1);
		client_close(&client);
	}
	UNTIL(stats_of(&fixture).connection_count == 0);
	CHECK_EQ(stats_of(&fixture).stream_count, 0);
	CHECK_EQ(gw_serve_image_stream_count(fixture.serve, "img"), 0);
	is_served(&fixture);
	tear_down(&fixture);
}

static void a_thousand_streams_are_sixteen(void)
{
	static const struct raw_header headers[RAW_HEADER_COUNT_MAX] = {
		{":method", "POST"},
		{":scheme", "http"},
		{":path", GW_PAGE_PATH_FETCH},
		{":authority", "x"},
		{"content-type", "application/grpc"}};
	/* A hello for "img" and a want of a page, both framed. */
	static const uint8_t body[] = {0, 0,   0,    0,	  14,	0x0a, 12,   0x0a, 1, 's', 0x12,
				       3, 'i', 'm',  'g', 0x18, 2,    0x20, 1,	  0, 0,	  0,
				       0, 7,   0x12, 5,	  0x10, 0x80, 0x20, 0x18, 1};
	struct fixture fixture;
	struct raw_peer peer;

	set_up(&fixture, 0);
	raw_open(&peer, raw_socket(&fixture), false);
	for (size_t i = 0; i < 1000; i++)
		raw_request(&peer, headers, i == 0 ? body : NULL, i == 0 ? sizeof(body) : 0, false);
	/* The body goes to whichever stream asks first. */
	peer.body = body;
	peer.body_len = sizeof(body);
	for (size_t i = 0; i < 200 && !peer.closed; i++)
		raw_step(&peer, 1);
	CHECK(stats_of(&fixture).stream_count <= 16);
	is_served(&fixture);
	raw_close(&peer);
	UNTIL(stats_of(&fixture).connection_count == 0);
	tear_down(&fixture);
}

static void describing_and_fetching_share_a_connection(void)
{
	const struct gw_wire_string id = client_string("img");
	uint8_t data[64];
	const ssize_t len = gw_describe_request_encode(&id, data, sizeof(data));
	struct fixture fixture;
	struct client client;

	set_up(&fixture, 0);
	client_start(&client, fixture.port, "img", 2, GW_PAGE_LANE_BULK);
	for (uint64_t k = 0; k < 32; k++)
		client_want(&client, k * MIB, MIB, 1);
	struct gw_grpc_call *fetch = client.call;
	const struct gw_grpc_call_options options = {.path = GW_PAGE_PATH_DESCRIBE_IMAGE,
						     .authority = "x:1"};

	CHECK_EQ(gw_grpc_call_open(client.conn, &options, &client.call), 0);
	gw_grpc_call_set_user(client.call, &client);
	CHECK_EQ(gw_grpc_call_send(client.call, data, (size_t)len, NULL, 0, NULL), 0);
	CHECK_EQ(gw_grpc_call_half_close(client.call), 0);
	client_expect_end(&client, GW_GRPC_OK, "");
	CHECK(client.describe_len > 0);
	client.call = fetch;
	CLIENT_UNTIL(&client, client.answered_len == 32ull * MIB);
	client_close(&client);
	tear_down(&fixture);
}

/* One page, by a client that takes a failure as it comes. */
static bool try_page(const struct fixture *fixture)
{
	const struct gw_grpc_call_options options = {.path = GW_PAGE_PATH_FETCH,
						     .authority = "x:1"};
	struct client client = {.status = -1};
	const struct gw_grpc_config config = {.handler = &client_handler,
					      .user = &client,
					      .message_len_max = 4u << 20,
					      .window_len = 1u << 20,
					      .call_count_max = 1,
					      .send_queue_count = 16};
	bool got = false;
	int fd;

	if (gw_grpc_connect("127.0.0.1", fixture->port, 5000, &fd))
		return false;
	CHECK_EQ(gw_grpc_client_create(&config, fd, &client.conn), 0);
	if (gw_grpc_call_open(client.conn, &options, &client.call) == 0) {
		client_hello(&client, "img", 2, GW_PAGE_LANE_DEMAND);
		client_want(&client, 5 * PAGE, PAGE, 1);
		while (!client.err && !client.end_count && !got) {
			CHECK(client_step(&client, CLIENT_WAIT_MS));
			got = client.pages_count == 1;
		}
	}
	client_close(&client);
	return got;
}

/* A kernel that says no, at every place where it can: this client may suffer, the next must not. */
static void every_failing_system_call_costs_one_connection_at_most(void)
{
	static const struct {
		enum gw_sys_call call;
		int err;
	} cases[] = {
		{GW_SYS_ACCEPT, EMFILE},    {GW_SYS_ACCEPT, ECONNABORTED},
		{GW_SYS_EVENTFD, EMFILE},   {GW_SYS_MMAP, ENOMEM},
		{GW_SYS_MADVISE, EINVAL},   {GW_SYS_SETSOCKOPT, EINVAL},
		{GW_SYS_POLL, EINTR},	    {GW_SYS_POLL, ENOMEM},
		{GW_SYS_RECV, ECONNRESET},  {GW_SYS_RECV, EINTR},
		{GW_SYS_SENDMSG, EPIPE},    {GW_SYS_SENDMSG, EAGAIN},
		{GW_SYS_PREAD, EIO},	    {GW_SYS_PREAD, EINTR},
		{GW_SYS_EPOLL_WAIT, EINTR}, {GW_SYS_EPOLL_CTL, ENOMEM},
	};
	struct fixture fixture;

	set_up(&fixture, 0);
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		for (uint64_t nth = 1; nth <= 4; nth++) {
			gw_sys_fail_nth(cases[i].call, nth, cases[i].err);
			(void)try_page(&fixture);
			gw_sys_fail_none();
			CHECK(try_page(&fixture));
		}
	}
	UNTIL(stats_of(&fixture).connection_count == 0);
	tear_down(&fixture);
}

static void creation_fails_cleanly(void)
{
	static const enum gw_sys_call calls[] = {
		GW_SYS_SOCKET,	    GW_SYS_SETSOCKOPT, GW_SYS_BIND,	    GW_SYS_LISTEN,
		GW_SYS_GETSOCKNAME, GW_SYS_EVENTFD,    GW_SYS_EPOLL_CREATE, GW_SYS_EPOLL_CTL,
	};
	const struct gw_serve_config config = {.struct_size = sizeof(config),
					       .listen_host = "127.0.0.1",
					       .connection_count_max = 1};

	for (size_t i = 0; i < sizeof(calls) / sizeof(calls[0]); i++) {
		struct gw_serve *serve = NULL;

		gw_sys_fail_nth(calls[i], 1, ENOBUFS);
		CHECK_EQ(gw_serve_create(&config, &serve), -ENOBUFS);
		CHECK(!serve);
	}
	gw_sys_fail_none();
}

int main(void)
{
	RUN(babble_is_hung_up_on);
	RUN(messages_that_are_none_end_their_stream);
	RUN(a_reader_that_does_not_read_is_bounded_and_given_up);
	RUN(a_flood_of_wants_is_answered_in_order);
	RUN(clients_vanish_at_any_moment);
	RUN(a_thousand_streams_are_sixteen);
	RUN(describing_and_fetching_share_a_connection);
	RUN(every_failing_system_call_costs_one_connection_at_most);
	RUN(creation_fails_cleanly);
	return EXIT_SUCCESS;
}
