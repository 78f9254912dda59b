/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_arrival_hostile.c - the arrival engine against page servers that break gRPC, HTTP/2 or TCP. What
 * the guest touches stays absent, the engine says why and comes again; an honest server makes the guest
 * whole. Servers that speak gRPC and lie about pages: test_arrival.c, peer.h.
 */
#include "guest.h"
#include "peer.h"
#include "raw_peer.h"

#include <fcntl.h>
#include <netinet/tcp.h>
#include <time.h>

#include <godwit/arrival.h>
#include <godwit/page_map.h>
#include <godwit/sandbox.h>

#define PAGE_COUNT  UINT64_C(64)
#define GENERATION  UINT64_C(5)
#define TOUCHED	    UINT64_C(21)
#define PREFIX_LEN  5
#define STATUS_LAST 16

static uint8_t source[PAGE_COUNT * 4096];

/* What the server does. At the hello, or with the answer to the first want. */
enum act {
	AT_HELLO_TRAILERS_ONLY, /* with `status` */
	AT_HELLO_BABBLE,
	AT_HELLO_HEADER_FLOOD,
	AT_HELLO_OTHER_IMAGE,
	AT_HELLO_EPOCH_OF_OURS,
	AT_HELLO_NO_WANT_ALLOWED,
	AT_WANT_HALF_AND_END,
	AT_WANT_HALF_AND_CLOSE,
	AT_WANT_LENGTH_GIANT,
	AT_WANT_LENGTH_SHORT,
	AT_WANT_COMPRESSED,
	AT_WANT_FLAG_ODD,
	AT_WANT_END_OK,
	AT_WANT_END_BARE,
	AT_WANT_RESET,
	AT_WANT_GOAWAY,
	AT_WANT_TCP_RESET,
	AT_WANT_PING_FLOOD,
	AT_WANT_UNASKED,
	AT_WANT_ZERO_OF_TRUE_SUM,
	AT_WANT_ZERO_OF_OWN_SUM, /* the lie that no checksum shows */
	AT_WANT_SLOW,
	AT_WANT_NEVER, /* answers heartbeats, and no want */
};

struct hostile {
	pthread_t thread;
	int listen_fd;
	uint32_t port;
	enum act act;
	const char *status;
	_Atomic bool stop;
	_Atomic int act_count;
	_Atomic int conn_count;
};

struct hostile_conn {
	struct hostile *hostile;
	struct raw_peer peer;
	size_t parsed_len;
	bool said_hello;
	bool acted;
	uint8_t bytes[16384]; /* what is being said */
	size_t len;
	size_t slow_left;
};

static const struct raw_header response_headers[] = {
	{":status", "200"}, {"content-type", "application/grpc"}, {NULL, NULL}};
static const struct raw_header trailers_ok[] = {{"grpc-status", "0"}, {NULL, NULL}};

/* --- what it says ----------------------------------------------------------------------------- */

static void put_prefix(uint8_t *at, uint8_t flag, uint32_t len)
{
	at[0] = flag;
	for (int i = 0; i < 4; i++)
		at[1 + i] = (uint8_t)(len >> (24 - 8 * i));
}

static void say_message(struct hostile_conn *conn, uint8_t flag, uint32_t said_len,
			const uint8_t *head, size_t head_len, const uint8_t *data, size_t data_len)
{
	CHECK(conn->len + PREFIX_LEN + head_len + data_len <= sizeof(conn->bytes));
	put_prefix(conn->bytes + conn->len, flag, said_len);
	memcpy(conn->bytes + conn->len + PREFIX_LEN, head, head_len);
	if (data_len)
		memcpy(conn->bytes + conn->len + PREFIX_LEN + head_len, data, data_len);
	conn->len += PREFIX_LEN + head_len + data_len;
}

static void say_ready(struct hostile_conn *conn)
{
	const enum act act = conn->hostile->act;
	const struct gw_fetch_response response = {
		.kind = GW_FETCH_RESPONSE_READY,
		.ready = {.image = {.image_id =
					    peer_text(act == AT_HELLO_OTHER_IMAGE ? "vn" : "vm"),
				    .vm_id = peer_text("vm"),
				    .boot_id = peer_text("boot"),
				    .epoch = act == AT_HELLO_EPOCH_OF_OURS ? 2 : 1,
				    .generation = GENERATION,
				    .state = GW_IMAGE_FROZEN,
				    .region_count = 1,
				    .regions = {{.size = PAGE_COUNT * PAGE, .page_size = 4096}}},
			  .want_max = act == AT_HELLO_NO_WANT_ALLOWED ? 4095
								      : GW_PAGE_WANT_LEN_MAX},
	};
	uint8_t data[GW_GRPC_HEAD_LEN_MAX];
	const ssize_t len = gw_fetch_response_encode(&response, data, sizeof(data));

	CHECK(len > 0);
	say_message(conn, 0, (uint32_t)len, data, (size_t)len, NULL, 0);
}

static void say_heartbeat(struct hostile_conn *conn)
{
	const struct gw_fetch_response response = {.kind = GW_FETCH_RESPONSE_HEARTBEAT,
						   .heartbeat = {.sequence = 1}};
	uint8_t data[32];
	const ssize_t len = gw_fetch_response_encode(&response, data, sizeof(data));

	CHECK(len > 0);
	say_message(conn, 0, (uint32_t)len, data, (size_t)len, NULL, 0);
}

/* The answer to a want of a page, as the act has it. */
static void say_page(struct hostile_conn *conn, const struct gw_page_want *want)
{
	const enum act act = conn->hostile->act;
	uint64_t offset = want->offset;
	uint8_t head[GW_PAGES_HEAD_LEN_MAX];
	uint8_t flag = 0;

	if (act == AT_WANT_UNASKED)
		offset = offset >= PAGE ? offset - PAGE : offset + PAGE;
	struct gw_pages pages = {
		.offset = offset,
		.len = PAGE,
		.generation = want->generation,
		.encoding = GW_PAGE_ENCODING_RAW,
		.image_state = GW_IMAGE_FROZEN,
		.data = {.data = source + offset, .len = PAGE},
	};

	if (act == AT_WANT_ZERO_OF_TRUE_SUM)
		pages.crc32c = gw_pages_crc32c(&pages);
	if (act == AT_WANT_ZERO_OF_TRUE_SUM || act == AT_WANT_ZERO_OF_OWN_SUM) {
		pages.encoding = GW_PAGE_ENCODING_ZERO;
		pages.data.len = 0;
	}
	if (act != AT_WANT_ZERO_OF_TRUE_SUM)
		pages.crc32c = gw_pages_crc32c(&pages);
	const size_t head_len = gw_pages_encode_head(&pages, head);
	uint32_t said_len = (uint32_t)(head_len + pages.data.len);

	if (act == AT_WANT_COMPRESSED)
		flag = 1;
	if (act == AT_WANT_FLAG_ODD)
		flag = 7;
	if (act == AT_WANT_LENGTH_GIANT)
		said_len = UINT32_MAX;
	if (act == AT_WANT_LENGTH_SHORT)
		said_len -= 100;
	say_message(conn, flag, said_len, head, head_len, pages.data.data, pages.data.len);
}

/* Hand what was said to the stream. */
static void send_said(struct hostile_conn *conn, size_t len)
{
	conn->peer.body = conn->bytes;
	conn->peer.body_len = len;
	(void)nghttp2_session_resume_data(conn->peer.session, conn->peer.request_id);
	for (int i = 0; i < 100 && conn->peer.body_len > 0 && !conn->peer.closed; i++)
		raw_step(&conn->peer, 1);
	conn->len = 0;
}

static void end_bare(struct hostile_conn *conn, const struct raw_header *trailers)
{
	conn->peer.trailers = trailers;
	conn->peer.body_ends = true;
	(void)nghttp2_session_resume_data(conn->peer.session, conn->peer.request_id);
}

static void flood_headers(struct hostile_conn *conn)
{
	enum { HEADER_COUNT = 600 };
	static const char value[] =
		"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
		"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
	char names[HEADER_COUNT][16];
	nghttp2_nv nvs[HEADER_COUNT + 1];

	nvs[0] = raw_nv(&response_headers[0]);
	for (int i = 0; i < HEADER_COUNT; i++) {
		(void)snprintf(names[i], sizeof(names[i]), "x-flood-%d", i);
		nvs[i + 1] = raw_nv(&(struct raw_header){names[i], value});
	}
	(void)nghttp2_submit_headers(conn->peer.session, 0, conn->peer.request_id, NULL, nvs,
				     HEADER_COUNT + 1, NULL);
}

static void reset_tcp(struct hostile_conn *conn)
{
	const struct linger now = {.l_onoff = 1};

	(void)setsockopt(conn->peer.fd, SOL_SOCKET, SO_LINGER, &now, sizeof(now));
	conn->peer.closed = true;
}

/* --- what it does ----------------------------------------------------------------------------- */

static void on_hello(struct hostile_conn *conn)
{
	struct raw_peer *const peer = &conn->peer;
	const struct raw_header trailers_only[] = {{":status", "200"},
						   {"content-type", "application/grpc"},
						   {"grpc-status", conn->hostile->status},
						   {"grpc-message", "as told"},
						   {NULL, NULL}};

	switch (conn->hostile->act) {
	case AT_HELLO_TRAILERS_ONLY:
		raw_respond(peer, trailers_only, NULL, 0, true, NULL);
		break;
	case AT_HELLO_BABBLE:
		(void)!send(peer->fd, "SSH-2.0-OpenSSH_9.2p1 Debian\r\n", 30, MSG_NOSIGNAL);
		break;
	case AT_HELLO_HEADER_FLOOD:
		flood_headers(conn);
		break;
	default:
		say_ready(conn);
		raw_respond(peer, response_headers, conn->bytes, conn->len, false, NULL);
		for (int i = 0; i < 100 && peer->body_len > 0 && !peer->closed; i++)
			raw_step(peer, 1);
		conn->len = 0;
		if (conn->hostile->act > AT_HELLO_NO_WANT_ALLOWED)
			return;
		break;
	}
	atomic_fetch_add(&conn->hostile->act_count, 1);
}

static void on_want(struct hostile_conn *conn, const struct gw_page_want *want)
{
	struct raw_peer *const peer = &conn->peer;

	if (conn->hostile->act <= AT_HELLO_NO_WANT_ALLOWED)
		return;
	/* One lie a connection; it is ended by it. Zeros are told as often as they are asked for. */
	if (conn->acted && conn->hostile->act != AT_WANT_ZERO_OF_OWN_SUM)
		return;
	conn->acted = true;
	if (conn->hostile->act != AT_WANT_NEVER)
		say_page(conn, want);
	const size_t half = conn->len / 2;

	switch (conn->hostile->act) {
	case AT_WANT_HALF_AND_END:
		send_said(conn, half);
		end_bare(conn, trailers_ok);
		break;
	case AT_WANT_HALF_AND_CLOSE:
		send_said(conn, half);
		peer->closed = true;
		break;
	case AT_WANT_END_OK:
		end_bare(conn, trailers_ok);
		break;
	case AT_WANT_END_BARE:
		end_bare(conn, NULL);
		break;
	case AT_WANT_RESET:
		send_said(conn, half);
		(void)nghttp2_submit_rst_stream(peer->session, 0, peer->request_id,
						NGHTTP2_ENHANCE_YOUR_CALM);
		break;
	case AT_WANT_GOAWAY:
		send_said(conn, half);
		(void)nghttp2_session_terminate_session(peer->session, NGHTTP2_INTERNAL_ERROR);
		break;
	case AT_WANT_TCP_RESET:
		send_said(conn, half);
		reset_tcp(conn);
		break;
	case AT_WANT_PING_FLOOD:
		for (int i = 0; i < 20000 && !peer->closed; i++) {
			(void)nghttp2_submit_ping(peer->session, 0, NULL);
			(void)nghttp2_session_send(peer->session);
		}
		peer->closed = true;
		break;
	case AT_WANT_SLOW:
		conn->slow_left = conn->len;
		break;
	case AT_WANT_NEVER:
		break;
	default:
		send_said(conn, conn->len);
		break;
	}
	/* What was not sent is not said. */
	conn->len = 0;
	atomic_fetch_add(&conn->hostile->act_count, 1);
}

/* The client's messages, as they are whole. */
static void parse(struct hostile_conn *conn)
{
	struct raw_peer *const peer = &conn->peer;

	while (peer->data_len - conn->parsed_len >= PREFIX_LEN) {
		const uint8_t *const at = peer->data + conn->parsed_len;
		const uint32_t len = (uint32_t)at[1] << 24 | (uint32_t)at[2] << 16 |
				     (uint32_t)at[3] << 8 | at[4];
		struct gw_fetch_request request;

		if (peer->data_len - conn->parsed_len < PREFIX_LEN + len)
			return;
		conn->parsed_len += PREFIX_LEN + len;
		if (gw_fetch_request_decode(at + PREFIX_LEN, len, &request) != 0)
			continue;
		if (request.kind == GW_FETCH_REQUEST_HELLO) {
			on_hello(conn);
		} else if (request.kind == GW_FETCH_REQUEST_WANT) {
			on_want(conn, &request.want);
		} else if (conn->slow_left == 0 && conn->hostile->act > AT_HELLO_NO_WANT_ALLOWED) {
			say_heartbeat(conn);
			send_said(conn, conn->len);
		}
	}
}

static void *conn_main(void *argument)
{
	struct hostile_conn *const conn = argument;
	struct hostile *const hostile = conn->hostile;
	const uint8_t *slow_at = conn->bytes;
	uint64_t slow_ns = 0;

	while (!conn->peer.closed && !atomic_load(&hostile->stop)) {
		raw_step(&conn->peer, 5);
		parse(conn);
		/* A byte each 200 ms: never silent, and never done. */
		if (conn->slow_left > 0 && gw_sys_now_ns() > slow_ns) {
			conn->peer.body = slow_at++;
			conn->peer.body_len = 1;
			conn->slow_left--;
			slow_ns = gw_sys_now_ns() + 200000000;
			(void)nghttp2_session_resume_data(conn->peer.session,
							  conn->peer.request_id);
		}
	}
	raw_close(&conn->peer);
	free(conn);
	atomic_fetch_sub(&hostile->conn_count, 1);
	return NULL;
}

static void *hostile_main(void *argument)
{
	struct hostile *const hostile = argument;

	while (!atomic_load(&hostile->stop)) {
		struct pollfd poll_fd = {.fd = hostile->listen_fd, .events = POLLIN};
		struct hostile_conn *conn;
		pthread_t thread;

		if (poll(&poll_fd, 1, 20) != 1)
			continue;
		const int fd = accept4(hostile->listen_fd, NULL, NULL, SOCK_CLOEXEC);

		if (fd < 0)
			continue;
		conn = calloc(1, sizeof(*conn));
		CHECK(conn);
		conn->hostile = hostile;
		raw_open(&conn->peer, fd, true);
		/* What it says itself may break the rules; its sends may block at most so long. */
		const struct timeval limit = {.tv_sec = 5};

		CHECK_EQ(setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit)), 0);
		atomic_fetch_add(&hostile->conn_count, 1);
		CHECK_EQ(pthread_create(&thread, NULL, conn_main, conn), 0);
		CHECK_EQ(pthread_detach(thread), 0);
	}
	while (atomic_load(&hostile->conn_count) > 0)
		(void)poll(NULL, 0, 2);
	return NULL;
}

static void hostile_start(struct hostile *hostile, enum act act, const char *status)
{
	struct sockaddr_in address = {.sin_family = AF_INET};
	socklen_t len = sizeof(address);

	memset(hostile, 0, sizeof(*hostile));
	hostile->act = act;
	hostile->status = status;
	address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	hostile->listen_fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	CHECK_EQ(bind(hostile->listen_fd, (struct sockaddr *)&address, sizeof(address)), 0);
	CHECK_EQ(listen(hostile->listen_fd, 16), 0);
	CHECK_EQ(getsockname(hostile->listen_fd, (struct sockaddr *)&address, &len), 0);
	hostile->port = ntohs(address.sin_port);
	CHECK_EQ(pthread_create(&hostile->thread, NULL, hostile_main, hostile), 0);
}

static void hostile_stop(struct hostile *hostile)
{
	atomic_store(&hostile->stop, true);
	CHECK_EQ(pthread_join(hostile->thread, NULL), 0);
	CHECK_EQ(close(hostile->listen_fd), 0);
}

/* --- the guest -------------------------------------------------------------------------------- */

struct bench {
	char map_path[64];
	struct guest guest;
	struct hostile hostile;
	struct gw_arrival *arrival;
	struct toucher toucher;
};

static struct gw_arrival_status status_of(const struct bench *bench)
{
	struct gw_arrival_status status;

	CHECK_EQ(gw_arrival_status(bench->arrival, &status), 0);
	return status;
}

#define WAIT_UNTIL(bench_, condition)                                                           \
	do {                                                                                    \
		const uint64_t deadline_ns_ = gw_sys_now_ns() + UINT64_C(1000000) * TIMEOUT_MS; \
		while (!(condition)) {                                                          \
			if (gw_sys_now_ns() > deadline_ns_)                                     \
				fprintf(stderr, "phase %u: %s\n", status_of(bench_).phase,      \
					status_of(bench_).reason);                              \
			CHECK(gw_sys_now_ns() < deadline_ns_);                                  \
			(void)poll(NULL, 0, 1);                                                 \
		}                                                                               \
	} while (0)

/* Before a hostile server, the gate open, somebody waiting for a page. */
static void bench_open(struct bench *bench, enum act act, const char *status)
{
	bench->guest = guest_create(PAGE_COUNT,
				    GW_UFFD_FEATURE_MISSING_SHMEM | GW_UFFD_FEATURE_EVENT_REMOVE,
				    UFFDIO_REGISTER_MODE_MISSING);
	hostile_start(&bench->hostile, act, status);
	(void)snprintf(bench->map_path, sizeof(bench->map_path), "/dev/shm/gw-test-hostile-%d-%d",
		       (int)getpid(), (int)act);
	const struct gw_arrival_region region = {.host_addr = guest_address(&bench->guest, 0),
						 .len = PAGE_COUNT * PAGE};
	const struct gw_arrival_config config = {
		.struct_size = sizeof(config),
		.sandbox = GW_SANDBOX_ENFORCE,
		.page_size = PAGE,
		.epoch = 2,
		.page_map_path = bench->map_path,
		.session_id = "session",
		.image_id = "vm",
		.page_host = "127.0.0.1",
		.traceparent = "",
		.page_port = bench->hostile.port,
		.uffds = &bench->guest.uffd,
		.uffd_count = 1,
		.exit_channel_fd = -1,
		.exit_doorbell_fd = -1,
		.ram_fd = bench->guest.ram_fd,
		.install_method = GW_INSTALL_COPY,
		.bulk_connection_count = 1,
		.regions = &region,
		.region_count = 1,
	};

	CHECK_EQ(gw_arrival_create(&config, &bench->arrival), 0);
	CHECK_EQ(gw_arrival_start(bench->arrival), 0);
	CHECK_EQ(gw_arrival_open_gate(bench->arrival, GENERATION), 0);
	toucher_start(&bench->toucher, &bench->guest, TOUCHED);
}

/* Nothing came of it: all is absent, who waits waits. */
static void check_absent(struct bench *bench)
{
	CHECK(!atomic_load(&bench->toucher.done));
	for (uint64_t page = 0; page < PAGE_COUNT; page++)
		CHECK(!guest_cache_has(&bench->guest, page));
	CHECK_EQ(status_of(bench).absent_count, PAGE_COUNT);
	CHECK_EQ(status_of(bench).violation_count, 0);
	CHECK(status_of(bench).reason[0] != '\0');
}

/* An honest server is named: the guest becomes whole. */
static void recover(struct bench *bench)
{
	struct peer *const honest = peer_start(source, PAGE_COUNT * PAGE, GENERATION, 0);

	CHECK_EQ(gw_arrival_set_page_server(bench->arrival, "127.0.0.1", honest->port), 0);
	CHECK_EQ(toucher_join(&bench->toucher), first_word(TOUCHED));
	CHECK_EQ(gw_arrival_start_bulk(bench->arrival), 0);
	WAIT_UNTIL(bench, status_of(bench).phase == GW_ARRIVAL_COMPLETE);
	CHECK_EQ(memcmp(bench->guest.memory, source, PAGE_COUNT * PAGE), 0);
	CHECK_EQ(status_of(bench).violation_count, 0);
	CHECK_EQ(gw_arrival_finish(bench->arrival), 0);
	peer_stop(honest);
}

static void bench_close(struct bench *bench)
{
	gw_arrival_destroy(bench->arrival);
	CHECK_EQ(gw_page_map_unlink(bench->map_path), 0);
	hostile_stop(&bench->hostile);
	guest_destroy(&bench->guest);
}

/* --- tests ------------------------------------------------------------------------------------ */

/* Asked again by itself, on a new connection, and lied to again. */
static void broken_answers_install_nothing(void)
{
	static const enum act acts[] = {
		AT_HELLO_BABBLE,	AT_HELLO_HEADER_FLOOD, AT_WANT_HALF_AND_END,
		AT_WANT_HALF_AND_CLOSE, AT_WANT_LENGTH_GIANT,  AT_WANT_LENGTH_SHORT,
		AT_WANT_FLAG_ODD,	AT_WANT_END_OK,	       AT_WANT_END_BARE,
		AT_WANT_RESET,		AT_WANT_GOAWAY,	       AT_WANT_TCP_RESET,
		AT_WANT_PING_FLOOD,	AT_WANT_UNASKED,       AT_WANT_ZERO_OF_TRUE_SUM,
	};
	static struct bench bench;

	for (size_t i = 0; i < sizeof(acts) / sizeof(acts[0]); i++) {
		/* Their stream stays open: silence ends it, after three seconds. */
		const bool is_waited_out = acts[i] == AT_HELLO_HEADER_FLOOD ||
					   acts[i] == AT_WANT_GOAWAY;

		fprintf(stderr, "    act %d\n", (int)acts[i]);
		bench_open(&bench, acts[i], "0");
		WAIT_UNTIL(&bench,
			   atomic_load(&bench.hostile.act_count) >= (is_waited_out ? 1 : 3));
		WAIT_UNTIL(&bench, status_of(&bench).reason[0] != '\0');
		check_absent(&bench);
		CHECK(status_of(&bench).phase != GW_ARRIVAL_REFUSED);
		CHECK(acts[i] != AT_WANT_ZERO_OF_TRUE_SUM ||
		      status_of(&bench).checksum_error_count > 0);
		fprintf(stderr, "      %s\n", status_of(&bench).reason);
		recover(&bench);
		bench_close(&bench);
	}
}

/* Not this image, or not this protocol: not asked again until a server is named. */
static void what_is_not_ours_is_refused(void)
{
	static const struct {
		enum act act;
		const char *reason;
	} rows[] = {
		{AT_HELLO_OTHER_IMAGE, "not our image: the server gives vn"},
		{AT_HELLO_EPOCH_OF_OURS, "not our image"},
		{AT_HELLO_NO_WANT_ALLOWED, "no want of a whole page"},
		{AT_WANT_COMPRESSED, "status 12"},
	};
	static struct bench bench;

	for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
		fprintf(stderr, "    act %d\n", (int)rows[i].act);
		bench_open(&bench, rows[i].act, "0");
		WAIT_UNTIL(&bench, status_of(&bench).phase == GW_ARRIVAL_REFUSED);
		check_absent(&bench);
		CHECK(strstr(status_of(&bench).reason, rows[i].reason));
		recover(&bench);
		bench_close(&bench);
	}
}

/* The answer is its trailers, with every status there is and some that are none. */
static void each_status_without_a_stream(void)
{
	static const char *const final[] = {"3", "5", "7", "9", "11", "12", "15", "16"};
	static const char *const others[] = {"0",  "1",	 "2",  "4",  "6",  "8", "10",
					     "13", "14", "17", "99", "-1", "x", ""};
	static struct bench bench;

	for (size_t i = 0; i < sizeof(final) / sizeof(final[0]); i++) {
		bench_open(&bench, AT_HELLO_TRAILERS_ONLY, final[i]);
		WAIT_UNTIL(&bench, status_of(&bench).phase == GW_ARRIVAL_REFUSED);
		CHECK_EQ(status_of(&bench).grpc_status, strtol(final[i], NULL, 10));
		CHECK(strstr(status_of(&bench).reason, "as told"));
		check_absent(&bench);
		recover(&bench);
		bench_close(&bench);
	}
	for (size_t i = 0; i < sizeof(others) / sizeof(others[0]); i++) {
		bench_open(&bench, AT_HELLO_TRAILERS_ONLY, others[i]);
		WAIT_UNTIL(&bench, atomic_load(&bench.hostile.act_count) >= 3 &&
					   status_of(&bench).reason[0] != '\0');
		CHECK(status_of(&bench).phase != GW_ARRIVAL_REFUSED);
		check_absent(&bench);
		recover(&bench);
		bench_close(&bench);
	}
}

/* It is never silent, so that silence does not tell: what tells is that no page becomes whole. */
static void a_server_that_drips_or_stalls_is_given_up(void)
{
	static const enum act acts[2] = {AT_WANT_SLOW, AT_WANT_NEVER};
	static struct bench benches[2];

	/* Side by side: it takes seconds. */
	for (size_t i = 0; i < 2; i++)
		bench_open(&benches[i], acts[i], "0");
	for (size_t i = 0; i < 2; i++) {
		WAIT_UNTIL(&benches[i], strstr(status_of(&benches[i]).reason, "answered no want"));
		check_absent(&benches[i]);
		/* It is asked again, by itself. */
		WAIT_UNTIL(&benches[i], atomic_load(&benches[i].hostile.act_count) >= 2);
		check_absent(&benches[i]);
		recover(&benches[i]);
		bench_close(&benches[i]);
	}
}

/*
 * The limit of what a checksum can show: a source that says zero, and sums what it says, is believed.
 * It is in docs/failures.md, and this is its proof.
 */
static void zeros_with_a_sum_of_their_own_are_believed(void)
{
	static struct bench bench;

	bench_open(&bench, AT_WANT_ZERO_OF_OWN_SUM, "0");
	CHECK_EQ(toucher_join(&bench.toucher), 0);
	CHECK(first_word(TOUCHED) != 0);
	CHECK_EQ(status_of(&bench).checksum_error_count, 0);
	bench_close(&bench);
}

int main(int argc, char **argv)
{
	guest_need_uffd();
	for (uint64_t page = 0; page < PAGE_COUNT; page++)
		guest_pattern(page, source + page * PAGE);
#define RUN_IF(function)                                    \
	do {                                                \
		if (argc < 2 || strstr(#function, argv[1])) \
			RUN_FORKED(function);               \
	} while (0)
	RUN_IF(broken_answers_install_nothing);
	RUN_IF(what_is_not_ours_is_refused);
	RUN_IF(each_status_without_a_stream);
	RUN_IF(a_server_that_drips_or_stalls_is_given_up);
	RUN_IF(zeros_with_a_sum_of_their_own_are_believed);
	return EXIT_SUCCESS;
}
