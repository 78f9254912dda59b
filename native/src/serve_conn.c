/* SPDX-License-Identifier: Apache-2.0 */
/*
 * serve_conn.c - one connection of the page server and the thread that serves it.
 *
 * Threads    The connection's own. Its two fds are polled rather than epolled: one call a
 *            wake-up, whether or not the socket is full. Where a guest waits for it, it looks
 *            before it sleeps (spin.h).
 * Errors, Ownership, Units, Source: see serve_internal.h.
 */
#include "serve_internal.h"

#include <godwit/sys.h>

#include <errno.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>

/* A connection without a call is closed after so long: it holds a thread. */
#define IDLE_NS (10ull * 1000 * 1000 * 1000)
/* Rounds of queueing and sending before the socket is read again. */
#define PUMP_COUNT_MAX	 8
#define SEND_QUEUE_COUNT 256
#define WINDOW_LEN	 65535
#define READ_LEN	 (16u * 1024)
#define NS_PER_MS	 1000000u

void serve_wake(int wake_fd)
{
	const uint64_t one = 1;

	/* Full means that it is awake. */
	(void)gw_sys_write(wake_fd, &one, sizeof(one));
}

/* --- streams --------------------------------------------------------------------------------- */

void serve_stream_release(struct serve_stream *stream)
{
	if (!stream->slot)
		return;
	atomic_fetch_sub_explicit(&stream->slot->stream_count, 1, memory_order_relaxed);
	serve_count(&stream->conn->serve->counters.stream_count, (uint64_t)-1);
	stream->conn->fetch_count--;
	serve_slot_unref(stream->slot);
	stream->slot = NULL;
}

void serve_stream_end(struct serve_stream *stream, int status, const char *format, ...)
{
	char text[GW_GRPC_STATUS_TEXT_LEN_MAX];
	va_list arguments;

	if (stream->state == SERVE_ENDED)
		return;
	va_start(arguments, format);
	/* False alarm of clang-tidy 14 where it is given several files at once. */
	vsnprintf(text, sizeof(text), format, arguments); // NOLINT(clang-analyzer-valist.*)
	va_end(arguments);
	stream->state = SERVE_ENDED;
	stream->want_count = 0;
	serve_stream_release(stream);
	if (status != GW_GRPC_OK)
		serve_count(&stream->conn->serve->counters.refused_total, 1);
	gw_grpc_call_end(stream->call, status, text);
}

int serve_send_block(struct serve_stream *stream, const void *data, size_t len)
{
	struct serve_cookie *cookie;
	int err;

	if (len <= GW_GRPC_HEAD_LEN_MAX)
		return gw_grpc_call_send(stream->call, data, len, NULL, 0, NULL);
	cookie = malloc(sizeof(*cookie) + len);
	if (!cookie)
		return -ENOMEM;
	cookie->buffer = NULL;
	memcpy(cookie + 1, data, len);
	err = gw_grpc_call_send(stream->call, NULL, 0, cookie + 1, len, cookie);
	if (err)
		free(cookie);
	return err;
}

static void on_sent(void *user, void *argument)
{
	struct serve_cookie *cookie = argument;
	struct serve_buffer *buffer = cookie->buffer;

	(void)user;
	if (!buffer) {
		free(cookie);
		return;
	}
	if (--buffer->unsent_count == 0)
		buffer->used_len = 0;
}

/* --- the handler ----------------------------------------------------------------------------- */

static void on_call(void *user, struct gw_grpc_call *call)
{
	struct serve_conn *conn = user;
	const char *path = gw_grpc_call_path(call);
	struct serve_stream *stream;
	enum serve_stream_kind kind;

	if (strcmp(path, GW_PAGE_PATH_FETCH) == 0)
		kind = SERVE_STREAM_FETCH;
	else if (strcmp(path, GW_PAGE_PATH_DESCRIBE_IMAGE) == 0)
		kind = SERVE_STREAM_DESCRIBE;
	else
		kind = 0;
	if (!kind || atomic_load_explicit(&conn->serve->draining, memory_order_relaxed)) {
		serve_count(&conn->serve->counters.refused_total, 1);
		gw_grpc_call_end(call, kind ? GW_GRPC_UNAVAILABLE : GW_GRPC_UNIMPLEMENTED,
				 kind ? "DRAINING: this server takes no new streams"
				      : "METHOD_UNKNOWN: only PageService is served here");
		return;
	}
	if (!serve_peer_is_node(conn, call))
		return;
	stream = calloc(1, sizeof(*stream));
	if (!stream) {
		gw_grpc_call_end(call, GW_GRPC_RESOURCE_EXHAUSTED, "MEMORY: no room for a stream");
		return;
	}
	stream->conn = conn;
	stream->call = call;
	stream->kind = kind;
	stream->state = SERVE_HELLO_DUE;
	stream->next = conn->streams;
	if (conn->streams)
		conn->streams->prev = stream;
	conn->streams = stream;
	gw_grpc_call_set_user(call, stream);
}

static void on_message(void *user, struct gw_grpc_call *call, const uint8_t *data, size_t len)
{
	struct serve_stream *stream = gw_grpc_call_user(call);

	(void)user;
	if (!stream || stream->state == SERVE_ENDED)
		return;
	if (stream->kind == SERVE_STREAM_FETCH)
		serve_fetch_message(stream, data, len);
	else
		serve_describe_message(stream, data, len);
}

static void on_half_close(void *user, struct gw_grpc_call *call)
{
	struct serve_stream *stream = gw_grpc_call_user(call);

	(void)user;
	if (!stream || stream->state == SERVE_ENDED)
		return;
	stream->half_closed = true;
	if (stream->kind == SERVE_STREAM_DESCRIBE)
		serve_describe_answer(stream);
}

static void on_end(void *user, struct gw_grpc_call *call, int status, const char *message)
{
	struct serve_conn *conn = user;
	struct serve_stream *stream = gw_grpc_call_user(call);

	(void)message;
	if (!stream)
		return;
	/* The layer below refused it: a message too long, a compressed one, a deadline. */
	if (stream->state != SERVE_ENDED && status != GW_GRPC_CANCELLED &&
	    status != GW_GRPC_UNAVAILABLE)
		serve_count(&conn->serve->counters.refused_total, 1);
	serve_stream_release(stream);
	if (stream->prev)
		stream->prev->next = stream->next;
	else
		conn->streams = stream->next;
	if (stream->next)
		stream->next->prev = stream->prev;
	serve_lz4_free(&stream->lz4);
	free(stream->wants);
	free(stream->token);
	free(stream);
	/* A connection is idle from its last call on. */
	conn->life_ns = conn->now_ns;
}

static const struct gw_grpc_handler handler = {
	.on_call = on_call,
	.on_message = on_message,
	.on_half_close = on_half_close,
	.on_sent = on_sent,
	.on_end = on_end,
};

/* --- the thread ------------------------------------------------------------------------------ */

/*
 * Queue a piece of every stream, as the buffers hold them. True if any were. Another stream comes first
 * each time: one that always has something to send must not keep the buffers from the others.
 */
static bool pump(struct serve_conn *conn)
{
	struct serve_stream *first = conn->streams;
	bool queued = false;

	if (!first)
		return false;
	for (size_t i = conn->turn++ % SERVE_CALL_COUNT_MAX; i > 0 && first->next; i--)
		first = first->next;
	/* Ends no stream's life: that happens in on_end, which runs within gw_grpc_on_*. */
	for (struct serve_stream *stream = first; stream; stream = stream->next) {
		if (stream->kind == SERVE_STREAM_FETCH)
			queued |= serve_fetch_pump(stream);
	}
	for (struct serve_stream *stream = conn->streams; stream != first; stream = stream->next) {
		if (stream->kind == SERVE_STREAM_FETCH)
			queued |= serve_fetch_pump(stream);
	}
	return queued;
}

/* Answer and send until nothing moves, or it is time to read again. */
static int pump_and_flush(struct serve_conn *conn, bool *ret_more)
{
	for (int i = 0; i < PUMP_COUNT_MAX; i++) {
		const bool queued = pump(conn);
		const int err = gw_grpc_flush(conn->grpc);

		*ret_more = queued;
		if (err || !queued)
			return err;
	}
	return 0;
}

static uint64_t last_life_ns(const struct serve_conn *conn)
{
	const uint64_t received_ns = gw_grpc_received_ns(conn->grpc);

	return received_ns > conn->life_ns ? received_ns : conn->life_ns;
}

/* When the peer is given up if nothing comes: silence in a Fetch, or nothing to do at all. */
static uint64_t give_up_ns(const struct serve_conn *conn)
{
	if (conn->fetch_count > 0)
		return last_life_ns(conn) + SERVE_SILENCE_HEARTBEATS * conn->serve->heartbeat_ns;
	return last_life_ns(conn) + IDLE_NS;
}

static bool is_readable(int fd)
{
	struct pollfd poll_fd = {.fd = fd, .events = POLLIN};

	return gw_sys_poll(&poll_fd, 1, 0) == 1;
}

/*
 * Every byte counts as life, a WINDOW_UPDATE of a client that only reads as well: so a plain
 * gRPC client that takes a long answer need not send heartbeats meanwhile. Whether anything
 * has come is looked at once more: it may be this thread that was stopped for seconds.
 */
static bool is_given_up(struct serve_conn *conn)
{
	if (conn->now_ns < give_up_ns(conn) || is_readable(conn->fd))
		return false;
	for (struct serve_stream *stream = conn->streams; stream; stream = stream->next)
		serve_stream_end(stream, GW_GRPC_UNAVAILABLE, "PEER_SILENT: no sign of life");
	return true;
}

/* Heartbeats and deadlines. Returns when to come again. */
static uint64_t tick(struct serve_conn *conn, int *ret_err)
{
	uint64_t next_ns = give_up_ns(conn);
	uint64_t due_ns;

	for (struct serve_stream *stream = conn->streams; stream; stream = stream->next) {
		due_ns = stream->kind == SERVE_STREAM_FETCH ? serve_fetch_tick(stream) : UINT64_MAX;
		next_ns = due_ns < next_ns ? due_ns : next_ns;
	}
	*ret_err = gw_grpc_on_time(conn->grpc, conn->now_ns);
	due_ns = gw_grpc_deadline_ns(conn->grpc);
	return due_ns < next_ns ? due_ns : next_ns;
}

static int timeout_ms(uint64_t now_ns, uint64_t next_ns)
{
	if (next_ns <= now_ns)
		return 0;
	/* Rounded up: a millisecond late rather than awake for nothing. */
	const uint64_t ms = (next_ns - now_ns + NS_PER_MS - 1) / NS_PER_MS;

	return ms > 60000 ? 60000 : (int)ms;
}

static void recheck_images(struct serve_conn *conn)
{
	uint64_t count;

	(void)gw_sys_read(conn->wake_fd, &count, sizeof(count));
	for (struct serve_stream *stream = conn->streams; stream; stream = stream->next) {
		if (stream->kind == SERVE_STREAM_FETCH)
			serve_fetch_recheck(stream);
	}
}

static int handle(struct serve_conn *conn, short socket_events, bool *ret_more)
{
	int err = 0;

	if (socket_events & (POLLIN | POLLHUP | POLLERR))
		err = gw_grpc_on_readable(conn->grpc, conn->now_ns);
	if (!err && (socket_events & POLLOUT))
		err = gw_grpc_on_writable(conn->grpc, conn->now_ns);
	return err ? err : pump_and_flush(conn, ret_more);
}

static bool serves_demand(const struct serve_conn *conn)
{
	for (const struct serve_stream *stream = conn->streams; stream; stream = stream->next) {
		if (stream->kind == SERVE_STREAM_FETCH && stream->lane == GW_PAGE_LANE_DEMAND)
			return true;
	}
	return false;
}

/* Bulk never looks: nobody waits for it, and its wants come in heaps. */
static bool may_spin(const struct serve_conn *conn)
{
	return spin_may(&conn->spin, conn->now_ns) && serves_demand(conn) &&
	       !gw_grpc_wants_write(conn->grpc);
}

/*
 * Read without asking whether there is anything. True: there was, or the connection is over. What wake_fd
 * tells can wait: whether the image is there still is asked for each answer.
 */
static bool spin(struct serve_conn *conn, int *ret_err)
{
	const uint64_t end_ns = conn->now_ns + conn->spin.look_ns;
	bool pays = true;

	while (pays && conn->now_ns < end_ns) {
		const uint64_t begin_ns = gw_sys_now_ns();

		(void)sched_yield();
		GW_HOOK("serve.yielded");
		conn->now_ns = gw_sys_now_ns();
		pays = spin_yielded(&conn->spin, begin_ns, conn->now_ns);
		*ret_err = gw_grpc_on_readable(conn->grpc, conn->now_ns);
		if (*ret_err || gw_grpc_received_ns(conn->grpc) == conn->now_ns)
			return true;
	}
	return false;
}

static void run(struct serve_conn *conn)
{
	bool more = true;
	int err = 0;

	while (!err && !atomic_load_explicit(&conn->serve->stopping, memory_order_acquire)) {
		struct pollfd fds[2] = {{.fd = conn->fd, .events = POLLIN},
					{.fd = conn->wake_fd, .events = POLLIN}};
		uint64_t begin_ns;
		uint64_t next_ns;
		int got;

		conn->now_ns = gw_sys_now_ns();
		begin_ns = conn->now_ns;
		if (is_given_up(conn)) {
			(void)gw_grpc_flush(conn->grpc);
			return;
		}
		next_ns = tick(conn, &err);
		if (err)
			return;
		if (!more && may_spin(conn) && spin(conn, &err)) {
			spin_learn(&conn->spin, conn->now_ns - begin_ns);
			err = err ? err : pump_and_flush(conn, &more);
			continue;
		}
		if (gw_grpc_wants_write(conn->grpc))
			fds[0].events |= POLLOUT;
		got = gw_sys_poll(fds, 2, more ? 0 : timeout_ms(conn->now_ns, next_ns));
		if (got < 0 && got != -EINTR)
			return;
		more = false;
		conn->now_ns = gw_sys_now_ns();
		spin_learn(&conn->spin, conn->now_ns - begin_ns);
		if (got > 0 && fds[1].revents)
			recheck_images(conn);
		err = handle(conn, got > 0 ? fds[0].revents : 0, &more);
	}
}

static int create_grpc(struct serve_conn *conn)
{
	const struct gw_grpc_config config = {
		.handler = &handler,
		.user = conn,
		.message_len_max = GW_PAGE_REQUEST_LEN_MAX,
		.window_len = WINDOW_LEN,
		.call_count_max = SERVE_CALL_COUNT_MAX,
		.send_queue_count = SEND_QUEUE_COUNT,
		.read_len = READ_LEN,
		.tls = conn->serve->tls,
	};

	return gw_grpc_server_create(&config, conn->fd, &conn->grpc);
}

static void *conn_thread(void *argument)
{
	struct serve_conn *conn = argument;
	struct gw_serve *serve = conn->serve;

	pthread_setname_np(pthread_self(), "gw-serve");
	if (create_grpc(conn) == 0)
		run(conn);
	else
		gw_sys_close(conn->fd);
	/* Here, not in free: the peer should see the end now, and streams let go of their images. */
	gw_grpc_destroy(conn->grpc);
	conn->grpc = NULL;
	/* Release: all of the above happens before the join that follows. */
	atomic_store_explicit(&conn->done, true, memory_order_release);
	/* The server outlives its connections: destroy joins them before it closes wake_fd. */
	serve_wake(serve->wake_fd);
	return NULL;
}

void serve_conn_free(struct serve_conn *conn)
{
	for (size_t i = 0; i < SERVE_BUFFER_COUNT; i++) {
		if (conn->buffers[i].data)
			gw_sys_munmap(conn->buffers[i].data, SERVE_BUFFER_LEN);
	}
	if (conn->wake_fd >= 0)
		gw_sys_close(conn->wake_fd);
	free(conn);
}

static int create_buffers(struct serve_conn *conn)
{
	for (size_t i = 0; i < SERVE_BUFFER_COUNT; i++) {
		void *data;
		const int err = gw_sys_mmap(NULL, SERVE_BUFFER_LEN, PROT_READ | PROT_WRITE,
					    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0, &data);

		if (err)
			return err;
		conn->buffers[i].data = data;
		conn->buffers[i].cookie.buffer = &conn->buffers[i];
	}
	return 0;
}

int serve_conn_start(struct gw_serve *serve, int fd, struct serve_conn **ret_conn)
{
	struct serve_conn *conn = calloc(1, sizeof(*conn));
	int err;

	if (!conn)
		return -ENOMEM;
	conn->serve = serve;
	conn->fd = fd;
	conn->life_ns = gw_sys_now_ns();
	conn->now_ns = conn->life_ns;
	conn->wake_fd = gw_sys_eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	err = conn->wake_fd < 0 ? conn->wake_fd : create_buffers(conn);
	if (!err)
		err = -pthread_create(&conn->thread, NULL, conn_thread, conn);
	if (err) {
		serve_conn_free(conn);
		return err;
	}
	*ret_conn = conn;
	return 0;
}
