/* SPDX-License-Identifier: Apache-2.0 */
/*
 * raw_peer.h - an HTTP/2 peer that says whatever a test wants, well-formed or not.
 *
 * Threads    The caller's.
 * Errors     A failed check aborts; what the other side does wrong is recorded.
 * Ownership  raw_close frees everything.
 * Units      Bytes.
 * Source     nghttp2, with its own checks of messages off.
 */
#ifndef GW_TESTS_RAW_PEER_H
#define GW_TESTS_RAW_PEER_H

#include "check.h"

#include <errno.h>
#include <nghttp2/nghttp2.h>
#include <poll.h>
#include <stdint.h>
#include <sys/socket.h>
#include <unistd.h>

struct raw_header {
	const char *name;
	const char *value;
};

#define RAW_HEADER_COUNT_MAX 12

struct raw_peer {
	nghttp2_session *session;
	int fd;
	bool closed; /* the other side closed, or broke the protocol */
	/* Of the last stream: "name=value;" of each header, data, how it was closed. */
	char headers[2048];
	uint8_t data[65536];
	size_t data_len;
	size_t close_count;
	uint32_t close_code;
	int32_t request_id; /* server: the stream that was opened last */
	bool goaway;
	/* What is being sent. */
	const uint8_t *body;
	size_t body_len;
	bool body_ends;
	bool pads; /* frames of DATA, each by another length */
	uint32_t seed;
	const struct raw_header *trailers;
};

static inline ssize_t raw_send(nghttp2_session *session, const uint8_t *data, size_t len, int flags,
			       void *user)
{
	struct raw_peer *peer = user;
	const ssize_t sent = send(peer->fd, data, len, MSG_NOSIGNAL);

	(void)session;
	(void)flags;
	if (sent >= 0)
		return sent;
	return errno == EAGAIN ? NGHTTP2_ERR_WOULDBLOCK : NGHTTP2_ERR_CALLBACK_FAILURE;
}

static inline nghttp2_nv raw_nv(const struct raw_header *header)
{
	return (nghttp2_nv){.name = (uint8_t *)header->name,
			    .value = (uint8_t *)header->value,
			    .namelen = strlen(header->name),
			    .valuelen = strlen(header->value)};
}

static inline size_t raw_nvs(const struct raw_header *headers, nghttp2_nv *ret_nvs)
{
	size_t count = 0;

	while (headers && count < RAW_HEADER_COUNT_MAX && headers[count].name) {
		ret_nvs[count] = raw_nv(&headers[count]);
		count++;
	}
	return count;
}

static inline ssize_t raw_read(nghttp2_session *session, int32_t stream_id, uint8_t *buffer,
			       size_t len_max, uint32_t *flags, nghttp2_data_source *source,
			       void *user)
{
	struct raw_peer *peer = user;
	const size_t len = peer->body_len < len_max ? peer->body_len : len_max;

	(void)source;
	if (len)
		memcpy(buffer, peer->body, len);
	peer->body += len;
	peer->body_len -= len;
	if (peer->body_len > 0)
		return (ssize_t)len;
	if (peer->trailers) {
		nghttp2_nv nvs[RAW_HEADER_COUNT_MAX];

		*flags |= NGHTTP2_DATA_FLAG_EOF | NGHTTP2_DATA_FLAG_NO_END_STREAM;
		nghttp2_submit_trailer(session, stream_id, nvs, raw_nvs(peer->trailers, nvs));
		peer->trailers = NULL;
	} else if (peer->body_ends) {
		*flags |= NGHTTP2_DATA_FLAG_EOF;
	} else if (len == 0) {
		return NGHTTP2_ERR_DEFERRED;
	}
	return (ssize_t)len;
}

static inline ssize_t raw_pad(nghttp2_session *session, const nghttp2_frame *frame, size_t len_max,
			      void *user)
{
	struct raw_peer *peer = user;
	size_t len = frame->hd.length;

	(void)session;
	if (!peer->pads || frame->hd.type != NGHTTP2_DATA)
		return (ssize_t)len;
	peer->seed = peer->seed * 1664525 + 1013904223;
	len += (peer->seed >> 16) % 256;
	return (ssize_t)(len < len_max ? len : len_max);
}

static inline int raw_on_header(nghttp2_session *session, const nghttp2_frame *frame,
				const uint8_t *name, size_t name_len, const uint8_t *value,
				size_t value_len, uint8_t flags, void *user)
{
	struct raw_peer *peer = user;
	const size_t at = strlen(peer->headers);

	(void)session;
	(void)frame;
	(void)flags;
	snprintf(peer->headers + at, sizeof(peer->headers) - at, "%.*s=%.*s;", (int)name_len, name,
		 (int)value_len, value);
	return 0;
}

static inline int raw_on_begin(nghttp2_session *session, const nghttp2_frame *frame, void *user)
{
	struct raw_peer *peer = user;

	(void)session;
	peer->request_id = frame->hd.stream_id;
	return 0;
}

static inline int raw_on_chunk(nghttp2_session *session, uint8_t flags, int32_t stream_id,
			       const uint8_t *data, size_t len, void *user)
{
	struct raw_peer *peer = user;

	(void)session;
	(void)flags;
	(void)stream_id;
	if (len > sizeof(peer->data) - peer->data_len)
		len = sizeof(peer->data) - peer->data_len;
	memcpy(peer->data + peer->data_len, data, len);
	peer->data_len += len;
	return 0;
}

static inline int raw_on_frame(nghttp2_session *session, const nghttp2_frame *frame, void *user)
{
	struct raw_peer *peer = user;

	(void)session;
	peer->goaway |= frame->hd.type == NGHTTP2_GOAWAY;
	return 0;
}

static inline int raw_on_close(nghttp2_session *session, int32_t stream_id, uint32_t error_code,
			       void *user)
{
	struct raw_peer *peer = user;

	(void)session;
	(void)stream_id;
	peer->close_count++;
	peer->close_code = error_code;
	return 0;
}

static inline void raw_open(struct raw_peer *peer, int fd, bool server)
{
	nghttp2_session_callbacks *callbacks;
	nghttp2_option *option;

	memset(peer, 0, sizeof(*peer));
	peer->fd = fd;
	CHECK_EQ(nghttp2_session_callbacks_new(&callbacks), 0);
	CHECK_EQ(nghttp2_option_new(&option), 0);
	nghttp2_option_set_no_http_messaging(option, 1);
	nghttp2_session_callbacks_set_send_callback(callbacks, raw_send);
	nghttp2_session_callbacks_set_select_padding_callback(callbacks, raw_pad);
	nghttp2_session_callbacks_set_on_header_callback(callbacks, raw_on_header);
	nghttp2_session_callbacks_set_on_begin_headers_callback(callbacks, raw_on_begin);
	nghttp2_session_callbacks_set_on_data_chunk_recv_callback(callbacks, raw_on_chunk);
	nghttp2_session_callbacks_set_on_frame_recv_callback(callbacks, raw_on_frame);
	nghttp2_session_callbacks_set_on_stream_close_callback(callbacks, raw_on_close);
	if (server)
		CHECK_EQ(nghttp2_session_server_new2(&peer->session, callbacks, peer, option), 0);
	else
		CHECK_EQ(nghttp2_session_client_new2(&peer->session, callbacks, peer, option), 0);
	nghttp2_option_del(option);
	nghttp2_session_callbacks_del(callbacks);
	CHECK_EQ(nghttp2_submit_settings(peer->session, 0, NULL, 0), 0);
}

/* Client: one request. `ends`: END_STREAM after the body. Returns the stream. */
static inline int32_t raw_request(struct raw_peer *peer, const struct raw_header *headers,
				  const uint8_t *body, size_t body_len, bool ends)
{
	nghttp2_data_provider provider = {.read_callback = raw_read};
	nghttp2_nv nvs[RAW_HEADER_COUNT_MAX];
	const size_t count = raw_nvs(headers, nvs);
	int32_t stream_id;

	peer->headers[0] = '\0';
	peer->data_len = 0;
	peer->close_count = 0;
	peer->body = body;
	peer->body_len = body_len;
	peer->body_ends = ends;
	stream_id = nghttp2_submit_request(peer->session, NULL, nvs, count, &provider, NULL);
	CHECK(stream_id > 0);
	return stream_id;
}

/* Server: the response to the stream opened last. */
static inline void raw_respond(struct raw_peer *peer, const struct raw_header *headers,
			       const uint8_t *body, size_t body_len, bool ends,
			       const struct raw_header *trailers)
{
	nghttp2_data_provider provider = {.read_callback = raw_read};
	nghttp2_nv nvs[RAW_HEADER_COUNT_MAX];
	const size_t count = raw_nvs(headers, nvs);

	peer->body = body;
	peer->body_len = body_len;
	peer->body_ends = ends;
	peer->trailers = trailers;
	CHECK_EQ(nghttp2_submit_response(peer->session, peer->request_id, nvs, count,
					 body || trailers || !ends ? &provider : NULL),
		 0);
}

/* Send what is queued, take what is there. */
static inline void raw_step(struct raw_peer *peer, int timeout_ms)
{
	struct pollfd fd = {.fd = peer->fd, .events = POLLIN};
	uint8_t bytes[16384];
	ssize_t got;

	if (peer->closed)
		return;
	if (nghttp2_session_send(peer->session))
		peer->closed = true;
	if (poll(&fd, 1, timeout_ms) != 1)
		return;
	got = recv(peer->fd, bytes, sizeof(bytes), MSG_DONTWAIT);
	if (got == 0 || (got < 0 && errno != EAGAIN) ||
	    (got > 0 && nghttp2_session_mem_recv(peer->session, bytes, (size_t)got) < 0))
		peer->closed = true;
	if (nghttp2_session_send(peer->session))
		peer->closed = true;
}

static inline void raw_close(struct raw_peer *peer)
{
	nghttp2_session_del(peer->session);
	close(peer->fd);
}

#endif
