/* SPDX-License-Identifier: Apache-2.0 */
/*
 * peer.h - a page server that does what a test tells it: answers, lies, stalls, refuses, dies.
 *
 * Threads: one of its own; knobs and counts are atomics.
 * Errors: as check.h.
 * Ownership: the memory it serves is the test's and constant while it runs.
 * Units: bytes.
 * Source: page_service.proto. The honest one is serve.h; this one exists to be wrong.
 */
#ifndef GODWIT_TESTS_PEER_H
#define GODWIT_TESTS_PEER_H

#include "check.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <godwit/grpc.h>
#include <godwit/page_lz4.h>
#include <godwit/page_wire.h>
#include <godwit/serve.h>
#include <godwit/sys.h>

#define PEER_CONN_COUNT_MAX 64
#define PEER_HELD_COUNT_MAX 256

enum peer_lie {
	PEER_HONEST,
	PEER_BAD_CRC,
	PEER_LIVE,
	PEER_STALE_GENERATION,
	PEER_SHORT_DATA,
	PEER_WRONG_OFFSET,
	PEER_LONGER_THAN_ASKED,
	PEER_UNKNOWN_ENCODING,
	PEER_NO_BLOCK, /* says that it is packed, where that is not taken, or is not true */
	PEER_ANSWER_TWICE,
	PEER_EMPTY_MESSAGE,
	PEER_NO_MESSAGE,
	PEER_TWO_READIES,
	PEER_HANG_UP,
	PEER_LIE_COUNT,
};

struct peer;

struct peer_conn {
	struct peer *peer;
	struct gw_grpc *conn;
	struct gw_grpc_call *call;
	int32_t lane;
	bool accepts_lz4;
	uint32_t epoll_events;
	bool dead;
	uint32_t held_count;
	struct gw_page_want held[PEER_HELD_COUNT_MAX];
};

struct peer {
	pthread_t thread;
	int listen_fd;
	int epoll_fd;
	int wake_fd;
	uint32_t port;
	const uint8_t *memory;
	uint64_t size;
	_Atomic bool stopping;
	_Atomic int lie;	/* enum peer_lie */
	_Atomic int lie_left;	/* answers that lie; then honest */
	_Atomic int end_status; /* not 0: every hello is answered with this status */
	_Atomic int lane_held;	/* wants of this lane (a bit each) are kept and not answered */
	_Atomic bool mute;	/* says nothing at all */
	_Atomic bool packs;	/* LZ4 to whoever takes it */
	_Atomic uint64_t packed_count;
	_Atomic uint64_t generation;
	_Atomic uint64_t hello_count;
	_Atomic uint64_t want_counts[3]; /* by lane */
	_Atomic uint64_t want_bytes[3];
	_Atomic uint64_t heartbeat_count;
	_Atomic uint64_t first_want_offset; /* of the last demand stream */
	struct peer_conn conns[PEER_CONN_COUNT_MAX];
};

static inline struct gw_wire_string peer_text(const char *text)
{
	return (struct gw_wire_string){.data = text, .len = strlen(text)};
}

static inline void peer_send_ready(struct peer_conn *conn)
{
	static const uint8_t data_none[1];
	struct peer *const peer = conn->peer;
	const struct gw_fetch_response response = {
		.kind = GW_FETCH_RESPONSE_READY,
		.ready = {.image = {.image_id = peer_text("vm"),
				    .vm_id = peer_text("vm"),
				    .boot_id = peer_text("boot"),
				    .epoch = 1,
				    .generation = atomic_load(&peer->generation),
				    .state = GW_IMAGE_FROZEN,
				    .region_count = 1,
				    .regions = {{.size = peer->size, .page_size = 4096}}},
			  .want_max = GW_PAGE_WANT_LEN_MAX},
	};
	uint8_t data[GW_GRPC_HEAD_LEN_MAX];
	const ssize_t len = gw_fetch_response_encode(&response, data, sizeof(data));

	CHECK(len > 0);
	(void)gw_grpc_call_send(conn->call, data, (size_t)len, data_none, 0, NULL);
}

static inline bool peer_is_zero(const uint8_t *data, uint64_t len)
{
	for (uint64_t i = 0; i < len; i++)
		if (data[i] != 0)
			return false;
	return true;
}

static inline int peer_next_lie(struct peer *peer)
{
	const int lie = atomic_load(&peer->lie);

	if (lie == PEER_HONEST || atomic_fetch_sub(&peer->lie_left, 1) <= 0)
		return PEER_HONEST;
	return lie;
}

/* The packed bytes, to be freed when they are sent; NULL if it is not to be, or not worth it. */
static inline uint8_t *peer_pack(struct peer_conn *conn, struct gw_pages *pages)
{
	uint8_t *packed;
	void *state;

	if (!atomic_load(&conn->peer->packs) || !conn->accepts_lz4 ||
	    pages->encoding != GW_PAGE_ENCODING_RAW)
		return NULL;
	packed = malloc(pages->len);
	state = malloc(gw_page_lz4_state_len());
	CHECK(packed && state);
	pages->data.len = gw_page_lz4_pack(state, pages->data.data, pages->len, packed);
	free(state);
	if (pages->data.len == 0) {
		pages->data.len = pages->len;
		free(packed);
		return NULL;
	}
	pages->data.data = packed;
	atomic_fetch_add(&conn->peer->packed_count, 1);
	return packed;
}

static inline void peer_on_sent(void *user, void *cookie)
{
	(void)user;
	free(cookie);
}

static inline void peer_answer(struct peer_conn *conn, const struct gw_page_want *want)
{
	struct peer *const peer = conn->peer;
	const int lie = peer_next_lie(peer);
	uint8_t head[GW_PAGES_HEAD_LEN_MAX];
	struct gw_pages pages = {
		.offset = want->offset,
		.len = want->len,
		.generation = want->generation,
		.encoding = GW_PAGE_ENCODING_RAW,
		.image_state = GW_IMAGE_FROZEN,
		.data = {.data = peer->memory + want->offset, .len = want->len},
	};

	if (want->offset + want->len > peer->size) {
		(void)gw_grpc_call_end(conn->call, GW_GRPC_OUT_OF_RANGE, "want leaves the image");
		return;
	}
	if (peer_is_zero(pages.data.data, pages.data.len)) {
		pages.encoding = GW_PAGE_ENCODING_ZERO;
		pages.data.len = 0;
	}
	if (lie == PEER_LIVE)
		pages.image_state = GW_IMAGE_LIVE;
	if (lie == PEER_STALE_GENERATION)
		pages.generation--;
	if (lie == PEER_WRONG_OFFSET)
		pages.offset = pages.offset >= 4096 ? pages.offset - 4096 : pages.offset + 4096;
	/* Zeros may go on beyond a want of the bulk lane, but not beyond the image. */
	if (lie == PEER_LONGER_THAN_ASKED && pages.encoding == GW_PAGE_ENCODING_ZERO)
		pages.len = peer->size - pages.offset + 4096;
	else if (lie == PEER_LONGER_THAN_ASKED)
		pages.len += 4096;
	if (lie == PEER_SHORT_DATA && pages.data.len > 0)
		pages.data.len -= 4096;
	if (lie == PEER_SHORT_DATA && pages.encoding == GW_PAGE_ENCODING_ZERO)
		pages.len = 0;
	if (lie == PEER_UNKNOWN_ENCODING)
		pages.encoding = 77;
	if (lie == PEER_NO_BLOCK)
		pages.encoding = GW_PAGE_ENCODING_LZ4;
	uint8_t *packed = NULL;

	if (lie == PEER_HONEST || lie == PEER_BAD_CRC) {
		struct gw_pages plain = pages;

		packed = peer_pack(conn, &pages);
		if (packed)
			plain.encoding = pages.encoding = GW_PAGE_ENCODING_LZ4;
		pages.crc32c = gw_pages_crc32c(&plain);
	} else {
		pages.crc32c = gw_pages_crc32c(&pages);
	}
	if (lie == PEER_BAD_CRC)
		pages.crc32c ^= 1U << 13;
	if (lie == PEER_TWO_READIES)
		peer_send_ready(conn);
	if (lie == PEER_HANG_UP) {
		conn->dead = true;
		return;
	}
	if (lie == PEER_EMPTY_MESSAGE || lie == PEER_NO_MESSAGE) {
		static const uint8_t nonsense[] = {0xff, 0xff, 0xff};

		(void)gw_grpc_call_send(conn->call, nonsense,
					lie == PEER_NO_MESSAGE ? sizeof(nonsense) : 0, NULL, 0,
					NULL);
		return;
	}
	const size_t len = gw_pages_encode_head(&pages, head);

	for (int i = 0; i < (lie == PEER_ANSWER_TWICE ? 2 : 1); i++)
		if (gw_grpc_call_send(conn->call, head, len, pages.data.data, pages.data.len,
				      packed))
			free(packed);
}

static inline void peer_on_call(void *user, struct gw_grpc_call *call)
{
	((struct peer_conn *)user)->call = call;
}

static inline void peer_on_message(void *user, struct gw_grpc_call *call, const uint8_t *data,
				   size_t len)
{
	struct peer_conn *const conn = user;
	struct peer *const peer = conn->peer;
	struct gw_fetch_request request;

	CHECK_EQ(gw_fetch_request_decode(data, len, &request), 0);
	if (atomic_load(&peer->mute))
		return;
	if (request.kind == GW_FETCH_REQUEST_HELLO) {
		atomic_fetch_add(&peer->hello_count, 1);
		conn->lane = request.hello.lane;
		conn->accepts_lz4 = request.hello.accepts_lz4;
		if (conn->lane == GW_PAGE_LANE_DEMAND)
			atomic_store(&peer->first_want_offset, UINT64_MAX);
		if (atomic_load(&peer->end_status) != 0)
			(void)gw_grpc_call_end(call, atomic_load(&peer->end_status), "as told");
		else
			peer_send_ready(conn);
	} else if (request.kind == GW_FETCH_REQUEST_HEARTBEAT) {
		atomic_fetch_add(&peer->heartbeat_count, 1);
		const struct gw_fetch_response response = {
			.kind = GW_FETCH_RESPONSE_HEARTBEAT,
			.heartbeat = {.sequence = request.heartbeat.sequence},
		};
		uint8_t bytes[32];
		const ssize_t bytes_len = gw_fetch_response_encode(&response, bytes, sizeof(bytes));

		(void)gw_grpc_call_send(call, bytes, (size_t)bytes_len, NULL, 0, NULL);
	} else {
		uint64_t none = UINT64_MAX;

		atomic_fetch_add(&peer->want_counts[conn->lane], 1);
		atomic_fetch_add(&peer->want_bytes[conn->lane], request.want.len);
		if (conn->lane == GW_PAGE_LANE_DEMAND)
			(void)atomic_compare_exchange_strong(&peer->first_want_offset, &none,
							     request.want.offset);
		if (atomic_load(&peer->lane_held) & 1 << conn->lane) {
			CHECK(conn->held_count < PEER_HELD_COUNT_MAX);
			conn->held[conn->held_count++] = request.want;
		} else {
			peer_answer(conn, &request.want);
		}
	}
}

static inline void peer_on_end(void *user, struct gw_grpc_call *call, int status,
			       const char *message)
{
	struct peer_conn *const conn = user;

	(void)status;
	(void)message;
	if (conn->call == call)
		conn->call = NULL;
}

static const struct gw_grpc_handler peer_handler = {
	.on_call = peer_on_call,
	.on_message = peer_on_message,
	.on_sent = peer_on_sent,
	.on_end = peer_on_end,
};

static inline void peer_drop(struct peer_conn *conn)
{
	gw_grpc_destroy(conn->conn);
	memset(conn, 0, sizeof(*conn));
}

static inline void peer_accept(struct peer *peer)
{
	const struct gw_grpc_config config = {
		.handler = &peer_handler,
		.message_len_max = GW_PAGE_REQUEST_LEN_MAX,
		.window_len = 1U << 20,
		.call_count_max = 4,
		.send_queue_count = 8192,
	};
	const int fd = accept4(peer->listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

	for (uint32_t i = 0; fd >= 0 && i < PEER_CONN_COUNT_MAX; i++) {
		struct peer_conn *const conn = &peer->conns[i];
		struct gw_grpc_config mine = config;

		if (conn->conn)
			continue;
		conn->peer = peer;
		mine.user = conn;
		CHECK_EQ(gw_grpc_server_create(&mine, fd, &conn->conn), 0);
		struct epoll_event event = {.events = EPOLLIN, .data.u32 = i + 2};

		CHECK_EQ(epoll_ctl(peer->epoll_fd, EPOLL_CTL_ADD, fd, &event), 0);
		conn->epoll_events = event.events;
		return;
	}
}

static inline void peer_settle(struct peer *peer, uint32_t i, int err)
{
	struct peer_conn *const conn = &peer->conns[i];

	if (err < 0 || conn->dead) {
		peer_drop(conn);
		return;
	}
	struct epoll_event event = {
		.events = EPOLLIN | (gw_grpc_wants_write(conn->conn) ? EPOLLOUT : 0U),
		.data.u32 = i + 2,
	};

	if (event.events != conn->epoll_events)
		CHECK_EQ(epoll_ctl(peer->epoll_fd, EPOLL_CTL_MOD, gw_grpc_fd(conn->conn), &event),
			 0);
	conn->epoll_events = event.events;
}

static inline void *peer_main(void *argument)
{
	struct peer *const peer = argument;

	while (!atomic_load(&peer->stopping)) {
		struct epoll_event events[16];
		uint64_t count64;
		const int count = epoll_wait(peer->epoll_fd, events, 16, 200);
		const uint64_t now_ns = gw_sys_now_ns();

		for (int k = 0; k < count; k++) {
			const uint32_t tag = events[k].data.u32;

			if (tag == 0) {
				peer_accept(peer);
				continue;
			}
			if (tag == 1) {
				(void)!read(peer->wake_fd, &count64, sizeof(count64));
				continue;
			}
			struct peer_conn *const conn = &peer->conns[tag - 2];
			int err = 0;

			if (!conn->conn)
				continue;
			if (events[k].events & (EPOLLOUT | EPOLLERR | EPOLLHUP))
				err = gw_grpc_on_writable(conn->conn, now_ns);
			if (err == 0 && events[k].events & EPOLLIN)
				err = gw_grpc_on_readable(conn->conn, now_ns);
			peer_settle(peer, tag - 2, err);
		}
		for (uint32_t i = 0; i < PEER_CONN_COUNT_MAX; i++) {
			struct peer_conn *const conn = &peer->conns[i];

			if (!conn->conn || conn->held_count == 0 ||
			    atomic_load(&peer->lane_held) & 1 << conn->lane)
				continue;
			for (uint32_t j = 0; j < conn->held_count && conn->call; j++)
				peer_answer(conn, &conn->held[j]);
			conn->held_count = 0;
			peer_settle(peer, i, gw_grpc_flush(conn->conn));
		}
	}
	for (uint32_t i = 0; i < PEER_CONN_COUNT_MAX; i++)
		peer_drop(&peer->conns[i]);
	return NULL;
}

/* port 0: any. */
static inline struct peer *peer_start(const uint8_t *memory, uint64_t size, uint64_t generation,
				      uint32_t port)
{
	struct peer *const peer = calloc(1, sizeof(*peer));
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
	socklen_t len = sizeof(address);
	const int one = 1;

	CHECK(peer);
	address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	peer->memory = memory;
	peer->size = size;
	atomic_store(&peer->generation, generation);
	peer->listen_fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	CHECK(peer->listen_fd >= 0);
	CHECK_EQ(setsockopt(peer->listen_fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one)), 0);
	CHECK_EQ(bind(peer->listen_fd, (struct sockaddr *)&address, sizeof(address)), 0);
	CHECK_EQ(listen(peer->listen_fd, 64), 0);
	CHECK_EQ(getsockname(peer->listen_fd, (struct sockaddr *)&address, &len), 0);
	peer->port = ntohs(address.sin_port);
	peer->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	peer->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	struct epoll_event event = {.events = EPOLLIN, .data.u32 = 0};

	CHECK_EQ(epoll_ctl(peer->epoll_fd, EPOLL_CTL_ADD, peer->listen_fd, &event), 0);
	event.data.u32 = 1;
	CHECK_EQ(epoll_ctl(peer->epoll_fd, EPOLL_CTL_ADD, peer->wake_fd, &event), 0);
	CHECK_EQ(pthread_create(&peer->thread, NULL, peer_main, peer), 0);
	return peer;
}

static inline void peer_wake(struct peer *peer)
{
	const uint64_t one = 1;

	CHECK_EQ(write(peer->wake_fd, &one, sizeof(one)), sizeof(one));
}

static inline void peer_stop(struct peer *peer)
{
	atomic_store(&peer->stopping, true);
	peer_wake(peer);
	CHECK_EQ(pthread_join(peer->thread, NULL), 0);
	CHECK_EQ(close(peer->listen_fd), 0);
	CHECK_EQ(close(peer->epoll_fd), 0);
	CHECK_EQ(close(peer->wake_fd), 0);
	free(peer);
}

static inline void peer_hold(struct peer *peer, int lanes)
{
	atomic_store(&peer->lane_held, lanes);
	peer_wake(peer);
}

#endif
