/* SPDX-License-Identifier: Apache-2.0 */
/*
 * grpc_conn.c - a connection: its memory, and its bytes from and to the socket.
 *
 * Threads, Errors, Ownership, Units, Source: see grpc.h.
 *
 * Output: nghttp2 writes frames into a list of pieces until the list is full or it has no more;
 * one sendmsg takes the list; again. The list is never added to while it is partly written
 * to the socket and the socket is full, so what is queued in it is bounded.
 */
#include "grpc_internal.h"

#include <godwit/sys.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define READ_LEN_DEFAULT (16u * 1024)
/* Read in one on_readable: then the owner looks at its other fds. */
#define READ_ROUND_LEN 524288ul
/* What is received into place from so much on; less is as well copied. */
#define PLACE_LEN_MIN 2048u
/* Read beside it: a frame header, a prefix, the head of a message with pages. */
#define NEXT_HEAD_LEN 64u
/* sendmsg calls in one flush: the same. */
#define SEND_COUNT_MAX	     16
#define SEND_QUEUE_COUNT_MAX 65536u
#define WINDOW_LEN_MIN	     65535u

static bool config_is_valid(const struct gw_grpc_config *config, int fd)
{
	return fd >= 0 && config->handler && config->message_len_max > 0 &&
	       config->message_len_max <= INT32_MAX && config->window_len >= WINDOW_LEN_MIN &&
	       config->window_len <= INT32_MAX && config->call_count_max > 0 &&
	       config->send_queue_count > 0 && config->send_queue_count <= SEND_QUEUE_COUNT_MAX;
}

static void free_conn(struct gw_grpc *conn)
{
	gw_tls_destroy(conn->tls);
	nghttp2_session_del(conn->session);
	free(conn->messages);
	free(conn->read_buffer);
	free(conn);
}

static int create_tls(struct gw_grpc *conn, int fd)
{
	const struct gw_grpc_config *config = &conn->config;

	/* A server waits for its client to begin. */
	conn->tls_begun = conn->server;
	if (conn->server)
		return gw_tls_server_create(config->tls, fd, &conn->tls);
	return gw_tls_client_create(config->tls, fd, config->tls_server_name, &conn->tls);
}

static int create(const struct gw_grpc_config *config, int fd, bool server,
		  struct gw_grpc **ret_conn)
{
	struct gw_grpc *conn;
	int err;

	if (!config_is_valid(config, fd))
		return -EINVAL;
	conn = calloc(1, sizeof(*conn));
	if (!conn)
		return -ENOMEM;
	conn->config = *config;
	conn->handler = config->handler;
	conn->user = config->user;
	conn->server = server;
	conn->read_len = config->read_len ? config->read_len : READ_LEN_DEFAULT;
	conn->read_buffer =
		aligned_alloc(GRPC_BUFFER_ALIGN, (conn->read_len + GRPC_BUFFER_ALIGN - 1) /
							 GRPC_BUFFER_ALIGN * GRPC_BUFFER_ALIGN);
	conn->messages = calloc(config->send_queue_count, sizeof(*conn->messages));
	if (!conn->read_buffer || !conn->messages) {
		free_conn(conn);
		return -ENOMEM;
	}
	for (size_t i = config->send_queue_count; i-- > 0;) {
		conn->messages[i].next = conn->free_messages;
		conn->free_messages = &conn->messages[i];
	}
	conn->free_count = config->send_queue_count;
	err = h2_session_create(conn);
	if (!err && config->tls)
		err = create_tls(conn, fd);
	if (err) {
		free_conn(conn);
		return err;
	}
	conn->fd = fd;
	*ret_conn = conn;
	return 0;
}

int gw_grpc_client_create(const struct gw_grpc_config *config, int fd, struct gw_grpc **ret_conn)
{
	return create(config, fd, false, ret_conn);
}

int gw_grpc_server_create(const struct gw_grpc_config *config, int fd, struct gw_grpc **ret_conn)
{
	return create(config, fd, true, ret_conn);
}

static void drop_pieces(struct gw_grpc *conn)
{
	while (conn->piece_first < conn->piece_count) {
		struct grpc_message *owner = conn->piece_owners[conn->piece_first++];

		if (owner)
			message_unref(conn, owner);
	}
	conn->piece_first = 0;
	conn->piece_count = 0;
	conn->control_len = 0;
}

/* The connection is over: every call learns it, every payload goes back. */
static int die(struct gw_grpc *conn, int err, const char *text)
{
	if (conn->dead)
		return conn->dead;
	conn->dead = err;
	while (conn->calls) {
		struct gw_grpc_call *call = conn->calls;

		/* A client's call that failed before its stream could say so keeps its reason; what
		 * a server wanted to answer counts only if it has been sent. */
		if (conn->server ? call->status_sent : call->status >= 0)
			call_finish(call, call->status, call->status_text);
		else
			call_finish(call, GW_GRPC_UNAVAILABLE, text);
	}
	drop_pieces(conn);
	return err;
}

void gw_grpc_destroy(struct gw_grpc *conn)
{
	if (!conn)
		return;
	die(conn, -ECANCELED, "CONNECTION_CLOSED: by this side");
	/* It says goodbye on the fd. */
	gw_tls_destroy(conn->tls);
	conn->tls = NULL;
	gw_sys_close(conn->fd);
	free_conn(conn);
}

int gw_grpc_fd(const struct gw_grpc *conn)
{
	return conn->fd;
}

const struct gw_tls *gw_grpc_tls(const struct gw_grpc *conn)
{
	return conn->tls;
}

bool gw_grpc_wants_write(const struct gw_grpc *conn)
{
	if (conn->dead)
		return false;
	/* A handshake that waits for the peer would find the socket writable again and again. */
	if (conn->tls && (gw_tls_wants_write(conn->tls) || !gw_tls_is_up(conn->tls)))
		return !conn->tls_begun || gw_tls_wants_write(conn->tls);
	return conn->piece_count > 0 || conn->tell_writable || conn->abandoned_count > 0 ||
	       nghttp2_session_want_write(conn->session);
}

uint64_t gw_grpc_received_ns(const struct gw_grpc *conn)
{
	return conn->received_ns;
}

bool gw_grpc_is_draining(const struct gw_grpc *conn)
{
	return conn->draining;
}

/* --- out ------------------------------------------------------------------------------------- */

bool conn_has_room(const struct gw_grpc *conn, size_t piece_count, size_t control_len)
{
	return conn->piece_count + piece_count <= OUT_PIECE_COUNT_MAX &&
	       conn->control_len + control_len <= OUT_CONTROL_LEN_MAX;
}

size_t conn_list_control(struct gw_grpc *conn, const uint8_t *data, size_t len)
{
	uint8_t *at = conn->control + conn->control_len;
	const size_t room = OUT_CONTROL_LEN_MAX - conn->control_len;
	const size_t taken = len < room ? len : room;
	struct iovec *last = NULL;

	if (taken == 0)
		return 0;
	if (conn->piece_count > conn->piece_first && !conn->piece_owners[conn->piece_count - 1])
		last = &conn->pieces[conn->piece_count - 1];
	if (last && (uint8_t *)last->iov_base + last->iov_len == at) {
		last->iov_len += taken;
	} else {
		if (conn->piece_count == OUT_PIECE_COUNT_MAX)
			return 0;
		conn->pieces[conn->piece_count] = (struct iovec){.iov_base = at, .iov_len = taken};
		conn->piece_owners[conn->piece_count++] = NULL;
	}
	memcpy(at, data, taken);
	conn->control_len += taken;
	return taken;
}

void conn_list_piece(struct gw_grpc *conn, struct grpc_message *owner, const uint8_t *data,
		     size_t len)
{
	/* sendmsg reads it only; iovec has no const. */
	conn->pieces[conn->piece_count] = (struct iovec){.iov_base = (void *)data, .iov_len = len};
	conn->piece_owners[conn->piece_count++] = owner;
	owner->ref_count++;
}

/* The socket took `len` bytes of the list. */
static void take_sent(struct gw_grpc *conn, size_t len)
{
	while (len > 0) {
		struct iovec *piece = &conn->pieces[conn->piece_first];
		struct grpc_message *owner = conn->piece_owners[conn->piece_first];

		if (len < piece->iov_len) {
			piece->iov_base = (uint8_t *)piece->iov_base + len;
			piece->iov_len -= len;
			return;
		}
		len -= piece->iov_len;
		conn->piece_first++;
		if (owner)
			message_unref(conn, owner);
	}
	if (conn->piece_first == conn->piece_count) {
		conn->piece_first = 0;
		conn->piece_count = 0;
		conn->control_len = 0;
	}
}

static ssize_t send_some(struct gw_grpc *conn)
{
	const struct msghdr message = {
		.msg_iov = conn->pieces + conn->piece_first,
		.msg_iovlen = conn->piece_count - conn->piece_first,
	};

	if (!conn->tls)
		return gw_sys_sendmsg(conn->fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
	conn->tls_begun = true;
	return gw_tls_send(conn->tls, message.msg_iov, message.msg_iovlen);
}

/* Send from the list. Returns 1 all of it went; 0 the socket is full; -errno. */
static int send_pieces(struct gw_grpc *conn)
{
	const ssize_t sent = send_some(conn);

	if (sent == -EAGAIN || sent == -EINTR)
		return 0;
	if (sent < 0)
		return (int)sent;
	take_sent(conn, (size_t)sent);
	return conn->piece_count == 0;
}

/* Why the connection is lost: TLS knows better, where it was TLS that failed. */
static const char *lost(struct gw_grpc *conn, const char *text)
{
	if (!conn->tls || !gw_tls_reason(conn->tls)[0])
		return text;
	snprintf(conn->tls_text, sizeof(conn->tls_text), "TLS: %s", gw_tls_reason(conn->tls));
	return conn->tls_text;
}

/* What TLS has of before. Returns 0 or -errno. */
static int flush_tls(struct gw_grpc *conn)
{
	const int err = conn->tls ? gw_tls_flush(conn->tls) : 0;

	if (!err || err == -EAGAIN)
		return 0;
	return die(conn, err, lost(conn, "CONNECTION_LOST: while sending"));
}

static int send_queued(struct gw_grpc *conn)
{
	for (int i = 0; i < SEND_COUNT_MAX; i++) {
		int got;

		/* Not while pieces are left: the list would grow while the socket is full. */
		if (conn->piece_count == 0) {
			got = nghttp2_session_send(conn->session);
			if (got == NGHTTP2_ERR_NOMEM)
				return die(conn, -ENOMEM, "MEMORY: HTTP/2 session");
			if (got != 0)
				return die(conn, -EPROTO, "HTTP2: the session failed to send");
		}
		if (conn->piece_count == 0)
			return 0;
		got = send_pieces(conn);
		if (got < 0)
			return die(conn, got, lost(conn, "CONNECTION_LOST: while sending"));
		if (got == 0)
			return 0;
	}
	return 0;
}

static int flush(struct gw_grpc *conn)
{
	int err;

	if (conn->dead)
		return conn->dead;
	h2_finish_abandoned(conn);
	err = flush_tls(conn);
	if (!err)
		err = send_queued(conn);
	if (err)
		return err;
	if (conn->piece_count == 0 && !nghttp2_session_want_read(conn->session) &&
	    !nghttp2_session_want_write(conn->session))
		return conn->draining ? die(conn, -ESHUTDOWN, "GOAWAY: the session has ended")
				      : die(conn, -EPROTO, "HTTP2: the peer broke the protocol");
	return 0;
}

int gw_grpc_flush(struct gw_grpc *conn)
{
	return flush(conn);
}

/* Tell the owner once that there is room, then send what it queued upon that. */
static int flush_and_tell(struct gw_grpc *conn)
{
	int err = flush(conn);

	if (err || !conn->tell_writable)
		return err;
	conn->tell_writable = false;
	if (conn->handler->on_writable)
		conn->handler->on_writable(conn->user);
	return flush(conn);
}

int gw_grpc_on_writable(struct gw_grpc *conn, uint64_t now_ns)
{
	conn->now_ns = now_ns;
	return flush_and_tell(conn);
}

/* --- in -------------------------------------------------------------------------------------- */

/* Give received bytes to the session. Returns 0 or -errno. */
static int handle_received(struct gw_grpc *conn, const uint8_t *data, size_t len)
{
	const ssize_t handled = nghttp2_session_mem_recv(conn->session, data, len);

	if (handled == NGHTTP2_ERR_NOMEM)
		return die(conn, -ENOMEM, "MEMORY: HTTP/2 session");
	/* Less than everything would mean that a callback paused it; none of ours does. */
	if (handled < 0 || (size_t)handled != len)
		return die(conn, -EPROTO, "HTTP2: the peer broke the protocol");
	return 0;
}

/*
 * Where the next bytes belong: what is missing of a message that has begun, as far as its DATA frame
 * goes. They are received there, so that nobody copies them; the session parses them where they lie.
 * A guess that is wrong (padding) costs a copy and nothing else: receive_data moves what is not in place.
 */
static size_t find_place(struct gw_grpc *conn, uint8_t **ret_place)
{
	struct gw_grpc_call *call;

	if (conn->frame_left < PLACE_LEN_MIN)
		return 0;
	call = nghttp2_session_get_stream_user_data(conn->session, conn->frame_stream_id);
	return call ? receive_place(call, conn->frame_left, ret_place) : 0;
}

/* Fill two pieces, the first of which may be empty, from the socket or from what TLS makes of it. */
static ssize_t receive(struct gw_grpc *conn, struct iovec pieces[2])
{
	const struct iovec *last = &pieces[1];
	struct msghdr message = {.msg_iov = pieces, .msg_iovlen = 2};
	ssize_t first = 0, second;

	if (!conn->tls && pieces[0].iov_len == 0)
		return gw_sys_recv(conn->fd, last->iov_base, last->iov_len, MSG_DONTWAIT);
	if (!conn->tls)
		return gw_sys_recvmsg(conn->fd, &message, MSG_DONTWAIT);
	if (pieces[0].iov_len > 0)
		first = gw_tls_recv(conn->tls, pieces[0].iov_base, pieces[0].iov_len);
	if (first < 0 || (size_t)first < pieces[0].iov_len)
		return first;
	second = gw_tls_recv(conn->tls, last->iov_base, last->iov_len);
	/* What is wrong with it is said again to whoever asks next. */
	return second > 0 || first == 0 ? first + second : first;
}

/* Returns how many bytes were handled; 0 none are there; -errno. `ret_full`: there may be more. */
static ssize_t read_once(struct gw_grpc *conn, bool *ret_full)
{
	struct iovec pieces[2] = {{.iov_base = NULL}, {.iov_base = conn->read_buffer}};
	uint8_t *place = NULL;
	const size_t place_len = find_place(conn, &place);
	ssize_t got;
	int err = 0;

	pieces[0] = (struct iovec){.iov_base = place, .iov_len = place_len};
	pieces[1].iov_len = conn->read_len;
	/* Only the next head besides: what follows it belongs into place as well. */
	if (place_len > 0 && conn->read_len > NEXT_HEAD_LEN)
		pieces[1].iov_len = NEXT_HEAD_LEN;
	got = receive(conn, pieces);
	*ret_full = got == (ssize_t)(place_len + pieces[1].iov_len);
	if (got == -EAGAIN || got == -EINTR)
		return 0;
	if (got < 0)
		return die(conn, (int)got, lost(conn, "CONNECTION_LOST: while receiving"));
	if (got == 0)
		return die(conn, -ECONNRESET, "CONNECTION_LOST: the peer closed it");
	conn->received_ns = conn->now_ns;
	if (place_len > 0) {
		const size_t placed = (size_t)got < place_len ? (size_t)got : place_len;

		err = handle_received(conn, place, placed);
		if (!err && (size_t)got > placed)
			err = handle_received(conn, conn->read_buffer, (size_t)got - placed);
	} else {
		err = handle_received(conn, conn->read_buffer, (size_t)got);
	}
	return err ? err : got;
}

int gw_grpc_on_readable(struct gw_grpc *conn, uint64_t now_ns)
{
	if (conn->dead)
		return conn->dead;
	conn->now_ns = now_ns;
	for (size_t len = 0;;) {
		bool full = false;
		ssize_t got;

		/* Enough for once. What TLS has taken from the socket is no poll's to tell of. */
		if (len >= READ_ROUND_LEN && !conn->tls)
			break;
		if (conn->tls)
			gw_tls_hold_input(conn->tls, len >= READ_ROUND_LEN);
		got = read_once(conn, &full);
		if (got < 0)
			return (int)got;
		/* A short read emptied the socket: asking again would cost a call to hear EAGAIN. */
		if (!full)
			break;
		len += (size_t)got;
	}
	return flush_and_tell(conn);
}

/* --- time ------------------------------------------------------------------------------------ */

uint64_t gw_grpc_deadline_ns(const struct gw_grpc *conn)
{
	uint64_t earliest = UINT64_MAX;

	if (conn->dead || conn->deadline_count == 0)
		return earliest;
	for (const struct gw_grpc_call *call = conn->calls; call; call = call->next) {
		if (call->deadline_ns && !call->reset && call->deadline_ns < earliest)
			earliest = call->deadline_ns;
	}
	return earliest;
}

int gw_grpc_on_time(struct gw_grpc *conn, uint64_t now_ns)
{
	if (conn->dead)
		return conn->dead;
	conn->now_ns = now_ns;
	/* Frees no call: a reset is only queued. */
	for (struct gw_grpc_call *call = conn->calls; call; call = call->next) {
		if (!call->deadline_ns || call->reset || call->deadline_ns > now_ns)
			continue;
		/* Both sides know the deadline: a reset says as much as trailers, and cannot be
		 * held up behind messages that the peer does not read. */
		call->trailers_begun = true;
		call_drop_queue(call);
		call_set_status(call, GW_GRPC_DEADLINE_EXCEEDED,
				"DEADLINE: the call took too long");
		h2_reset(call, NGHTTP2_CANCEL);
	}
	return flush_and_tell(conn);
}
