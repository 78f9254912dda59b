/* SPDX-License-Identifier: Apache-2.0 */
/*
 * grpc_pair.h - a client and a server connection in one thread, and what happened to them.
 *
 * Threads    The caller's.
 * Errors     A failed check aborts.
 * Ownership  pair_close frees everything.
 * Units      Bytes.
 * Source     grpc.h.
 *
 * The two ends are joined by a socketpair, or by a relay that passes on a few bytes at a
 * time, so that every boundary falls everywhere.
 */
#ifndef GW_TESTS_GRPC_PAIR_H
#define GW_TESTS_GRPC_PAIR_H

#include "check.h"

#include <godwit/grpc.h>
#include <godwit/sys.h>
#include <godwit/tls.h>

#include <errno.h>
#include <unistd.h>

#define PAIR_END_COUNT_MAX 64
#define PAIR_PATH	   "/godwit.test.v1.Echo/Run"

struct pair_end {
	int status;
	char text[GW_GRPC_STATUS_TEXT_LEN_MAX];
};

/* What one side has been told. */
struct pair_side {
	struct pair *pair;
	struct gw_grpc *conn;
	int err; /* first -errno of the connection */
	struct gw_grpc_call *call;
	size_t call_count, message_count, half_close_count, sent_count, writable_count;
	size_t end_count;
	struct pair_end ends[PAIR_END_COUNT_MAX];
	uint8_t *last;
	size_t last_len;
	/* Called beside the counting; may be NULL. */
	void (*on_call)(struct pair_side *, struct gw_grpc_call *);
	void (*on_message)(struct pair_side *, struct gw_grpc_call *, const uint8_t *, size_t);
	void (*on_half_close)(struct pair_side *, struct gw_grpc_call *);
	void (*on_sent)(struct pair_side *, void *);
	void (*on_writable)(struct pair_side *);
};

struct pair {
	struct pair_side client;
	struct pair_side server;
	uint64_t now_ns;
	/* Relay: what was read on one side and not yet written on the other. */
	int relay_client_fd, relay_server_fd;
	size_t relay_len_max; /* 0 = no relay */
	uint32_t seed;
};

static inline void pair_on_call(void *user, struct gw_grpc_call *call)
{
	struct pair_side *side = user;

	side->call = call;
	side->call_count++;
	if (side->on_call)
		side->on_call(side, call);
}

static inline void pair_on_message(void *user, struct gw_grpc_call *call, const uint8_t *data,
				   size_t len)
{
	struct pair_side *side = user;

	side->message_count++;
	free(side->last);
	side->last = malloc(len ? len : 1);
	CHECK(side->last);
	if (len)
		memcpy(side->last, data, len);
	side->last_len = len;
	if (side->on_message)
		side->on_message(side, call, data, len);
}

static inline void pair_on_half_close(void *user, struct gw_grpc_call *call)
{
	struct pair_side *side = user;

	side->half_close_count++;
	if (side->on_half_close)
		side->on_half_close(side, call);
}

static inline void pair_on_sent(void *user, void *cookie)
{
	struct pair_side *side = user;

	side->sent_count++;
	if (side->on_sent)
		side->on_sent(side, cookie);
}

static inline void pair_on_writable(void *user)
{
	struct pair_side *side = user;

	side->writable_count++;
	if (side->on_writable)
		side->on_writable(side);
}

static inline void pair_on_end(void *user, struct gw_grpc_call *call, int status, const char *text)
{
	struct pair_side *side = user;

	CHECK(side->end_count < PAIR_END_COUNT_MAX);
	side->ends[side->end_count].status = status;
	snprintf(side->ends[side->end_count].text, GW_GRPC_STATUS_TEXT_LEN_MAX, "%s", text);
	side->end_count++;
	if (side->call == call)
		side->call = NULL;
}

static const struct gw_grpc_handler pair_handler = {
	.on_call = pair_on_call,
	.on_message = pair_on_message,
	.on_half_close = pair_on_half_close,
	.on_sent = pair_on_sent,
	.on_writable = pair_on_writable,
	.on_end = pair_on_end,
};

#define PAIR_NAME "pair.node.godwit"

/* Of both ends, while it is set: the connections are encrypted. */
static struct gw_tls_identity *pair_tls;

static inline struct gw_grpc_config pair_config(void *user)
{
	return (struct gw_grpc_config){
		.tls = pair_tls,
		.tls_server_name = PAIR_NAME,
		.handler = &pair_handler,
		.user = user,
		.message_len_max = 4u << 20,
		.window_len = 1u << 20,
		.call_count_max = 16,
		.send_queue_count = 16,
	};
}

/* `client` and `server` are changed by the caller before; user is set here. */
static inline void pair_open(struct pair *pair, struct gw_grpc_config client,
			     struct gw_grpc_config server, size_t relay_len_max)
{
	const int type = SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC;
	int near[2];
	int far[2];

	memset(pair, 0, sizeof(*pair));
	pair->now_ns = 1000;
	pair->seed = 12345;
	pair->client.pair = pair;
	pair->server.pair = pair;
	pair->relay_len_max = relay_len_max;
	CHECK_EQ(socketpair(AF_UNIX, type, 0, near), 0);
	if (relay_len_max) {
		CHECK_EQ(socketpair(AF_UNIX, type, 0, far), 0);
		pair->relay_client_fd = near[1];
		pair->relay_server_fd = far[0];
		near[1] = far[1];
	}
	client.user = &pair->client;
	server.user = &pair->server;
	CHECK_EQ(gw_grpc_client_create(&client, near[0], &pair->client.conn), 0);
	CHECK_EQ(gw_grpc_server_create(&server, near[1], &pair->server.conn), 0);
}

static inline void pair_open_default(struct pair *pair)
{
	pair_open(pair, pair_config(NULL), pair_config(NULL), 0);
}

static inline bool pair_relay(struct pair *pair, int from, int to)
{
	uint8_t bytes[4096];
	size_t len_max;
	ssize_t got;
	struct pollfd room = {.fd = to, .events = POLLOUT};

	/* A writable socket takes 4 KiB whole; a full one must not lose what was read. */
	if (poll(&room, 1, 0) != 1)
		return false;
	pair->seed = pair->seed * 1664525 + 1013904223;
	len_max = 1 + (pair->seed >> 16) % pair->relay_len_max;
	if (len_max > sizeof(bytes))
		len_max = sizeof(bytes);
	got = read(from, bytes, len_max);
	if (got <= 0)
		return false;
	CHECK_EQ(write(to, bytes, (size_t)got), got);
	return true;
}

static inline bool pair_side_step(struct pair_side *side)
{
	struct pollfd fd;
	int err = 0;

	if (!side->conn || side->err)
		return false;
	fd = (struct pollfd){.fd = gw_grpc_fd(side->conn), .events = POLLIN};
	if (gw_grpc_wants_write(side->conn))
		fd.events |= POLLOUT;
	if (poll(&fd, 1, 0) <= 0)
		return false;
	if (fd.revents & (POLLIN | POLLHUP | POLLERR))
		err = gw_grpc_on_readable(side->conn, side->pair->now_ns);
	if (!err && (fd.revents & POLLOUT))
		err = gw_grpc_on_writable(side->conn, side->pair->now_ns);
	side->err = err;
	return true;
}

/* One step of everything; false if nothing moved. */
static inline bool pair_step(struct pair *pair)
{
	bool moved = pair_side_step(&pair->client);

	if (pair->relay_len_max) {
		moved |= pair_relay(pair, pair->relay_client_fd, pair->relay_server_fd);
		moved |= pair_relay(pair, pair->relay_server_fd, pair->relay_client_fd);
	}
	moved |= pair_side_step(&pair->server);
	return moved;
}

/* Until nothing moves any more. */
static inline void pair_run(struct pair *pair)
{
	size_t steps = 0;

	while (pair_step(pair))
		CHECK(++steps < 50000000);
}

static inline struct gw_grpc_call *pair_call(struct pair *pair)
{
	const struct gw_grpc_call_options options = {.path = PAIR_PATH, .authority = "test:1"};
	struct gw_grpc_call *call;

	CHECK_EQ(gw_grpc_call_open(pair->client.conn, &options, &call), 0);
	pair->client.call = call;
	return call;
}

static inline void pair_send_text(struct gw_grpc_call *call, const char *text)
{
	CHECK_EQ(gw_grpc_call_send(call, text, strlen(text), NULL, 0, NULL), 0);
}

static inline bool pair_last_is(const struct pair_side *side, const char *text)
{
	return side->last && side->last_len == strlen(text) &&
	       memcmp(side->last, text, side->last_len) == 0;
}

static inline void pair_close(struct pair *pair)
{
	gw_grpc_destroy(pair->client.conn);
	gw_grpc_destroy(pair->server.conn);
	free(pair->client.last);
	free(pair->server.last);
	if (pair->relay_len_max) {
		close(pair->relay_client_fd);
		close(pair->relay_server_fd);
	}
}

#endif
