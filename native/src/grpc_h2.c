/* SPDX-License-Identifier: Apache-2.0 */
/*
 * grpc_h2.c - the HTTP/2 session: what nghttp2 calls, and what is submitted to it.
 *
 * Threads, Errors, Ownership, Units: see grpc_internal.h.
 * Source: nghttp2's programmers' guide; RFC 9113; grpc/doc/PROTOCOL-HTTP2.md.
 *
 * Windows: nghttp2 gives received bytes back when told (no_auto_window_update). The
 * connection's are given back at once, so that no call can starve another; a call's
 * unless it is held. Pings and settings are acknowledged by nghttp2, which also ends
 * a session whose peer floods it with either, or with continuations.
 */
#include "grpc_internal.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#define FRAME_HEADER_LEN 9
#define FRAME_LEN_MIN	 16384u
#define FRAME_LEN_MAX	 ((1u << 24) - 1)
/* Longest frame that we send: as long as the peer takes, within what one sendmsg should carry. */
#define SEND_FRAME_LEN_MAX (1024 * 1024 + 4096)

static struct gw_grpc_call *call_of(nghttp2_session *session, int32_t stream_id)
{
	return nghttp2_session_get_stream_user_data(session, stream_id);
}

/* --- out ------------------------------------------------------------------------------------- */

static ssize_t on_send(nghttp2_session *session, const uint8_t *data, size_t len, int flags,
		       void *user)
{
	const size_t taken = conn_list_control(user, data, len);

	(void)session;
	(void)flags;
	return taken ? (ssize_t)taken : NGHTTP2_ERR_WOULDBLOCK;
}

static ssize_t on_read_len(nghttp2_session *session, uint8_t frame_type, int32_t stream_id,
			   int32_t conn_window, int32_t stream_window, uint32_t frame_len_max,
			   void *user)
{
	(void)session;
	(void)frame_type;
	(void)stream_id;
	(void)conn_window;
	(void)stream_window;
	(void)user;
	/* Windows are enforced by the caller. */
	return frame_len_max < SEND_FRAME_LEN_MAX ? (ssize_t)frame_len_max : SEND_FRAME_LEN_MAX;
}

static size_t unframed_len(const struct grpc_message *message)
{
	return message->head_len + message->payload_len - message->sent_len;
}

static int submit_trailers(struct gw_grpc_call *call);

/* How many bytes the next frame of this call can have; they are listed in on_send_data. */
static ssize_t on_read(nghttp2_session *session, int32_t stream_id, uint8_t *buffer, size_t len_max,
		       uint32_t *flags, nghttp2_data_source *source, void *user)
{
	struct gw_grpc_call *call = source->ptr;
	size_t len = 0;
	size_t piece_count = 0;

	(void)session;
	(void)stream_id;
	(void)buffer;
	(void)user;
	for (const struct grpc_message *message = call->queue_first; message && len < len_max;
	     message = message->next) {
		if (piece_count + 2 > FRAME_PIECE_COUNT_MAX)
			break;
		piece_count += 2;
		len += unframed_len(message);
	}
	if (len > 0) {
		*flags |= NGHTTP2_DATA_FLAG_NO_COPY;
		return (ssize_t)(len < len_max ? len : len_max);
	}
	if (!call->half_closed) {
		call->deferred = true;
		return NGHTTP2_ERR_DEFERRED;
	}
	*flags |= NGHTTP2_DATA_FLAG_EOF;
	if (call->conn->server) {
		*flags |= NGHTTP2_DATA_FLAG_NO_END_STREAM;
		return submit_trailers(call);
	}
	return 0;
}

static void take_framed(struct gw_grpc_call *call, struct grpc_message *message)
{
	call->queue_first = message->next;
	if (!call->queue_first)
		call->queue_last = NULL;
	call->queue_count--;
	message_unref(call->conn, message);
}

static int on_send_data(nghttp2_session *session, nghttp2_frame *frame, const uint8_t *frame_header,
			size_t len, nghttp2_data_source *source, void *user)
{
	struct gw_grpc_call *call = source->ptr;
	struct gw_grpc *conn = user;

	(void)session;
	(void)frame; /* never padded: no select_padding callback is set */
	if (!conn_has_room(conn, 1 + FRAME_PIECE_COUNT_MAX, FRAME_HEADER_LEN))
		return NGHTTP2_ERR_WOULDBLOCK;
	conn_list_control(conn, frame_header, FRAME_HEADER_LEN);
	while (len > 0) {
		struct grpc_message *message = call->queue_first;
		const bool in_head = message->sent_len < message->head_len;
		const size_t skipped = in_head ? message->sent_len
					       : message->sent_len - message->head_len;
		const uint8_t *data = in_head ? message->head : message->payload;
		size_t piece_len = (in_head ? message->head_len : message->payload_len) - skipped;

		if (piece_len > len)
			piece_len = len;
		conn_list_piece(conn, message, data + skipped, piece_len);
		message->sent_len += piece_len;
		len -= piece_len;
		if (unframed_len(message) == 0)
			take_framed(call, message);
	}
	return 0;
}

static nghttp2_nv header(const char *name, const char *value, size_t value_len)
{
	return (nghttp2_nv){.name = (uint8_t *)name,
			    .value = (uint8_t *)value,
			    .namelen = strlen(name),
			    .valuelen = value_len,
			    .flags = NGHTTP2_NV_FLAG_NONE};
}

static nghttp2_nv header_text(const char *name, const char *value)
{
	return header(name, value, strlen(value));
}

/* Fill in grpc-status and grpc-message; `text` has room for the encoded message. */
static size_t put_status(const struct gw_grpc_call *call, nghttp2_nv *ret_headers, char number[8],
			 char *text, size_t text_cap)
{
	size_t count = 0;

	snprintf(number, 8, "%d", call->status);
	ret_headers[count++] = header_text("grpc-status", number);
	if (call->status_text[0]) {
		const size_t len = text_encode_message(call->status_text, text, text_cap);

		ret_headers[count++] = header("grpc-message", text, len);
	}
	return count;
}

static int submit_trailers(struct gw_grpc_call *call)
{
	char number[8];
	char text[3 * GW_GRPC_STATUS_TEXT_LEN_MAX];
	nghttp2_nv headers[2];
	const size_t count = put_status(call, headers, number, text, sizeof(text));
	int err;

	if (call->trailers_begun)
		return 0;
	err = nghttp2_submit_trailer(call->conn->session, call->stream_id, headers, count);
	if (err)
		return NGHTTP2_ERR_CALLBACK_FAILURE;
	call->trailers_begun = true;
	return 0;
}

static int errno_of(int h2_error)
{
	if (h2_error == NGHTTP2_ERR_NOMEM)
		return -ENOMEM;
	return h2_error == NGHTTP2_ERR_STREAM_ID_NOT_AVAILABLE ? -ESHUTDOWN : -EINVAL;
}

int h2_submit_response(struct gw_grpc_call *call, bool trailers_only)
{
	char number[8];
	char text[3 * GW_GRPC_STATUS_TEXT_LEN_MAX];
	nghttp2_nv headers[5];
	nghttp2_data_provider provider = {.source.ptr = call, .read_callback = on_read};
	size_t count = 0;
	int err;

	headers[count++] = header_text(":status", "200");
	headers[count++] = header_text("content-type", "application/grpc");
	if (trailers_only)
		count += put_status(call, headers + count, number, text, sizeof(text));
	else
		headers[count++] = header_text("grpc-accept-encoding", "identity");
	err = nghttp2_submit_response(call->conn->session, call->stream_id, headers, count,
				      trailers_only ? NULL : &provider);
	if (err)
		return errno_of(err);
	call->response_begun = true;
	if (trailers_only)
		call->trailers_begun = true;
	return 0;
}

int h2_submit_http_error(struct gw_grpc_call *call, const char *http_status)
{
	const nghttp2_nv headers[] = {header_text(":status", http_status)};
	const int err =
		nghttp2_submit_response(call->conn->session, call->stream_id, headers, 1, NULL);

	call->response_begun = true;
	call->trailers_begun = true;
	return err ? errno_of(err) : 0;
}

int h2_submit_request(struct gw_grpc_call *call, const struct gw_grpc_call_options *options)
{
	nghttp2_nv headers[8 + GW_GRPC_METADATA_COUNT_MAX];
	nghttp2_data_provider provider = {.source.ptr = call, .read_callback = on_read};
	char timeout[16];
	size_t count = 0;
	int32_t stream_id;

	headers[count++] = header_text(":method", "POST");
	headers[count++] = header_text(":scheme", "http");
	headers[count++] = header_text(":path", options->path);
	headers[count++] = header_text(":authority", options->authority);
	headers[count++] = header_text("te", "trailers");
	if (options->timeout_ns) {
		text_encode_timeout(options->timeout_ns, timeout);
		headers[count++] = header_text("grpc-timeout", timeout);
	}
	headers[count++] = header_text("content-type", "application/grpc");
	headers[count++] = header_text("user-agent", "godwit/0.1 nghttp2");
	for (size_t i = 0; i < options->metadata_count; i++)
		headers[count++] =
			header_text(options->metadata[i].name, options->metadata[i].value);
	stream_id =
		nghttp2_submit_request(call->conn->session, NULL, headers, count, &provider, call);
	if (stream_id < 0)
		return errno_of(stream_id);
	call->stream_id = stream_id;
	return 0;
}

void h2_reset(struct gw_grpc_call *call, uint32_t error_code)
{
	if (call->reset)
		return;
	call->reset = true;
	nghttp2_submit_rst_stream(call->conn->session, NGHTTP2_FLAG_NONE, call->stream_id,
				  error_code);
	/* Headers that still wait for a free stream would be dropped only when their turn comes:
	 * the owner need not wait for that, but must not be told from inside its own call. */
	if (!call->conn->server && !call->begun) {
		call->abandoned = true;
		call->conn->abandoned_count++;
	}
}

void h2_finish_abandoned(struct gw_grpc *conn)
{
	while (conn->abandoned_count > 0) {
		struct gw_grpc_call *call = conn->calls;

		while (!call->abandoned)
			call = call->next;
		conn->abandoned_count--;
		nghttp2_session_set_stream_user_data(conn->session, call->stream_id, NULL);
		call_finish(call, call->status, call->status_text);
	}
}

void h2_resume(struct gw_grpc_call *call)
{
	if (!call->deferred)
		return;
	call->deferred = false;
	nghttp2_session_resume_data(call->conn->session, call->stream_id);
}

static int on_frame_sent(nghttp2_session *session, const nghttp2_frame *frame, void *user)
{
	struct gw_grpc *conn = user;
	struct gw_grpc_call *call;

	if (frame->hd.type != NGHTTP2_HEADERS)
		return 0;
	call = call_of(session, frame->hd.stream_id);
	if (!call)
		return 0;
	call->begun = true;
	if (!conn->server || !(frame->hd.flags & NGHTTP2_FLAG_END_STREAM))
		return 0;
	call->status_sent = true;
	/* The client may go on sending to nobody: tell it to stop (RFC 9113 8.1). */
	if (!call->remote_closed)
		h2_reset(call, NGHTTP2_NO_ERROR);
	return 0;
}

/* --- in -------------------------------------------------------------------------------------- */

static int on_begin_headers(nghttp2_session *session, const nghttp2_frame *frame, void *user)
{
	struct gw_grpc *conn = user;
	struct gw_grpc_call *call;

	if (!conn->server || frame->hd.type != NGHTTP2_HEADERS ||
	    frame->headers.cat != NGHTTP2_HCAT_REQUEST)
		return 0;
	call = call_create(conn);
	/* Out of memory: this stream only; nghttp2 resets it with INTERNAL_ERROR. */
	if (!call)
		return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE;
	call->stream_id = frame->hd.stream_id;
	nghttp2_session_set_stream_user_data(session, frame->hd.stream_id, call);
	return 0;
}

static bool name_is(const uint8_t *name, size_t name_len, const char *want)
{
	return name_len == strlen(want) && memcmp(name, want, name_len) == 0;
}

/* Keep one header for the owner; what does not fit the bounds is left out. */
static void keep_metadata(struct gw_grpc_call *call, const uint8_t *name, size_t name_len,
			  const uint8_t *value, size_t value_len)
{
	const size_t at = call->metadata_len;

	if (call->metadata_count == GW_GRPC_METADATA_COUNT_MAX ||
	    name_len + value_len + 2 > sizeof(call->metadata) - at)
		return;
	call->metadata_at[call->metadata_count].name = (uint16_t)at;
	call->metadata_at[call->metadata_count].value = (uint16_t)(at + name_len + 1);
	memcpy(call->metadata + at, name, name_len);
	memcpy(call->metadata + at + name_len + 1, value, value_len);
	call->metadata[at + name_len] = '\0';
	call->metadata[at + name_len + 1 + value_len] = '\0';
	call->metadata_len += name_len + value_len + 2;
	call->metadata_count++;
}

static void server_header(struct gw_grpc_call *call, const uint8_t *name, size_t name_len,
			  const uint8_t *value, size_t value_len)
{
	uint64_t timeout_ns;

	if (name_is(name, name_len, ":path")) {
		/* One that is too long is cut, and so unknown. */
		if (value_len > GW_GRPC_PATH_LEN_MAX)
			value_len = GW_GRPC_PATH_LEN_MAX;
		memcpy(call->path, value, value_len);
		call->path[value_len] = '\0';
	} else if (name_is(name, name_len, ":method")) {
		call->method_ok = name_is(value, value_len, "POST");
	} else if (name_is(name, name_len, "content-type")) {
		call->content_type_ok = text_is_grpc_content_type(value, value_len);
	} else if (name_is(name, name_len, "grpc-timeout")) {
		if (call->deadline_ns)
			return;
		if (text_decode_timeout(value, value_len, &timeout_ns)) {
			call->deadline_ns = call->conn->now_ns + timeout_ns;
			call->conn->deadline_count++;
		} else {
			call->bad_timeout = true;
		}
	} else if (name_len > 0 && name[0] != ':') {
		keep_metadata(call, name, name_len, value, value_len);
	}
}

static void client_header(struct gw_grpc_call *call, const uint8_t *name, size_t name_len,
			  const uint8_t *value, size_t value_len)
{
	if (name_is(name, name_len, ":status")) {
		call->http_status = text_decode_number(value, value_len);
	} else if (name_is(name, name_len, "content-type")) {
		call->content_type_ok = text_is_grpc_content_type(value, value_len);
	} else if (name_is(name, name_len, "grpc-status")) {
		/* What we have found wrong ourselves stands. */
		if (call->reset)
			return;
		call->status = text_decode_number(value, value_len);
		if (call->status < 0 || call->status > GW_GRPC_UNAUTHENTICATED)
			call->status = GW_GRPC_UNKNOWN;
	} else if (name_is(name, name_len, "grpc-message")) {
		if (!call->reset)
			text_decode_message(value, value_len, call->status_text,
					    sizeof(call->status_text));
	}
}

static int on_header(nghttp2_session *session, const nghttp2_frame *frame, const uint8_t *name,
		     size_t name_len, const uint8_t *value, size_t value_len, uint8_t flags,
		     void *user)
{
	struct gw_grpc *conn = user;
	struct gw_grpc_call *call = call_of(session, frame->hd.stream_id);

	(void)flags;
	if (!call || frame->hd.type != NGHTTP2_HEADERS)
		return 0;
	if (!conn->server)
		client_header(call, name, name_len, value, value_len);
	else if (frame->headers.cat == NGHTTP2_HCAT_REQUEST)
		server_header(call, name, name_len, value, value_len);
	return 0;
}

/* Server: the request's headers are whole. */
static void begin_call(struct gw_grpc_call *call)
{
	struct gw_grpc *conn = call->conn;

	if (!call->content_type_ok) {
		/* Not a gRPC client: it would not understand a status in trailers. */
		call->half_closed = true;
		h2_submit_http_error(call, "415");
		return;
	}
	if (!call->method_ok) {
		call->half_closed = true;
		h2_submit_http_error(call, "405");
		return;
	}
	call->announced = true;
	if (conn->handler->on_call)
		conn->handler->on_call(conn->user, call);
	if (call->bad_timeout)
		call_fail(call, GW_GRPC_INTERNAL, "TIMEOUT_MALFORMED: grpc-timeout cannot be read");
}

/* Client: response headers, or trailers. */
static void client_headers_end(struct gw_grpc_call *call, bool end_stream)
{
	char text[64];

	if (call->headers_seen || (call->http_status >= 100 && call->http_status < 200))
		return;
	call->headers_seen = true;
	if (end_stream && call->status >= 0)
		return; /* trailers only, with a status: that is what counts */
	if (call->http_status == 200 && call->content_type_ok)
		return;
	snprintf(text, sizeof(text), "HTTP: status %d, %s", call->http_status,
		 call->content_type_ok ? "gRPC" : "not gRPC");
	call_fail(call,
		  call->http_status == 200 ? GW_GRPC_UNKNOWN : status_of_http(call->http_status),
		  text);
}

static void end_of_requests(struct gw_grpc_call *call)
{
	struct gw_grpc *conn = call->conn;

	if (call->half_closed)
		return; /* ended already: nobody waits for it */
	if (!receive_at_boundary(call))
		call_fail(call, GW_GRPC_INTERNAL, "FRAMING: the stream ended within a message");
	else if (call->announced && conn->handler->on_half_close)
		conn->handler->on_half_close(conn->user, call);
}

static int on_frame_received(nghttp2_session *session, const nghttp2_frame *frame, void *user)
{
	struct gw_grpc *conn = user;
	const bool end_stream = frame->hd.flags & NGHTTP2_FLAG_END_STREAM;
	struct gw_grpc_call *call;

	if (frame->hd.type == NGHTTP2_GOAWAY) {
		conn->draining = true;
		return 0;
	}
	if (frame->hd.type != NGHTTP2_HEADERS && frame->hd.type != NGHTTP2_DATA)
		return 0;
	call = call_of(session, frame->hd.stream_id);
	if (!call)
		return 0;
	if (end_stream)
		call->remote_closed = true;
	if (frame->hd.type == NGHTTP2_HEADERS) {
		if (conn->server && frame->headers.cat == NGHTTP2_HCAT_REQUEST)
			begin_call(call);
		else if (!conn->server)
			client_headers_end(call, end_stream);
	}
	if (!end_stream)
		return 0;
	if (conn->server)
		end_of_requests(call);
	else if (!nghttp2_session_get_stream_local_close(session, frame->hd.stream_id))
		/* The answer is complete; what we have not sent nobody waits for. */
		h2_reset(call, NGHTTP2_NO_ERROR);
	return 0;
}

static int on_chunk(nghttp2_session *session, uint8_t flags, int32_t stream_id, const uint8_t *data,
		    size_t len, void *user)
{
	struct gw_grpc_call *call = call_of(session, stream_id);

	(void)flags;
	(void)user;
	if (nghttp2_session_consume_connection(session, len) == NGHTTP2_ERR_NOMEM)
		return NGHTTP2_ERR_CALLBACK_FAILURE;
	if (!call)
		return 0;
	receive_data(call, data, len);
	if (call->held)
		call->held_len += len;
	else if (nghttp2_session_consume_stream(session, stream_id, len) == NGHTTP2_ERR_NOMEM)
		return NGHTTP2_ERR_CALLBACK_FAILURE;
	return 0;
}

static void finish_client(struct gw_grpc_call *call, uint32_t error_code)
{
	char text[96];

	if (call->status == GW_GRPC_OK && !receive_at_boundary(call)) {
		call_finish(call, GW_GRPC_INTERNAL, "FRAMING: the stream ended within a message");
	} else if (call->status >= 0) {
		call_finish(call, call->status, call->status_text);
	} else if (!call->remote_closed && call->conn->draining) {
		call_finish(call, GW_GRPC_UNAVAILABLE, "GOAWAY: the peer takes no new calls");
	} else if (error_code != NGHTTP2_NO_ERROR) {
		snprintf(text, sizeof(text), "RESET: the stream was reset with %s",
			 nghttp2_http2_strerror(error_code));
		call_finish(call, status_of_reset(error_code), text);
	} else {
		call_finish(call, GW_GRPC_UNKNOWN, "TRAILERS: the stream ended without a status");
	}
}

static void finish_server(struct gw_grpc_call *call, uint32_t error_code)
{
	char text[96];

	/* A deadline is a status that is told by a reset. */
	if (call->status_sent || (call->status == GW_GRPC_DEADLINE_EXCEEDED && call->reset)) {
		call_finish(call, call->status, call->status_text);
		return;
	}
	snprintf(text, sizeof(text), "RESET: the stream was closed with %s",
		 nghttp2_http2_strerror(error_code));
	call_finish(call, GW_GRPC_CANCELLED, text);
}

static int on_stream_close(nghttp2_session *session, int32_t stream_id, uint32_t error_code,
			   void *user)
{
	struct gw_grpc *conn = user;
	struct gw_grpc_call *call = call_of(session, stream_id);

	if (!call)
		return 0;
	nghttp2_session_set_stream_user_data(session, stream_id, NULL);
	if (conn->server)
		finish_server(call, error_code);
	else
		finish_client(call, error_code);
	return 0;
}

/* --- create ---------------------------------------------------------------------------------- */

static void set_callbacks(nghttp2_session_callbacks *callbacks)
{
	nghttp2_session_callbacks_set_send_callback(callbacks, on_send);
	nghttp2_session_callbacks_set_send_data_callback(callbacks, on_send_data);
	nghttp2_session_callbacks_set_data_source_read_length_callback(callbacks, on_read_len);
	nghttp2_session_callbacks_set_on_frame_send_callback(callbacks, on_frame_sent);
	nghttp2_session_callbacks_set_on_begin_headers_callback(callbacks, on_begin_headers);
	nghttp2_session_callbacks_set_on_header_callback(callbacks, on_header);
	nghttp2_session_callbacks_set_on_frame_recv_callback(callbacks, on_frame_received);
	nghttp2_session_callbacks_set_on_data_chunk_recv_callback(callbacks, on_chunk);
	nghttp2_session_callbacks_set_on_stream_close_callback(callbacks, on_stream_close);
}

static int submit_settings(struct gw_grpc *conn)
{
	const uint32_t message_len = conn->config.message_len_max + GRPC_PREFIX_LEN;
	nghttp2_settings_entry settings[4];
	size_t count = 0;
	uint32_t frame_len = message_len;
	int err;

	/* A whole message in one frame, where the peer can: less to parse and to gather. */
	if (frame_len < FRAME_LEN_MIN)
		frame_len = FRAME_LEN_MIN;
	if (frame_len > FRAME_LEN_MAX)
		frame_len = FRAME_LEN_MAX;
	settings[count++] = (nghttp2_settings_entry){NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE,
						     conn->config.window_len};
	settings[count++] = (nghttp2_settings_entry){NGHTTP2_SETTINGS_MAX_FRAME_SIZE, frame_len};
	if (conn->server)
		settings[count++] = (nghttp2_settings_entry){
			NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS, conn->config.call_count_max};
	else
		settings[count++] = (nghttp2_settings_entry){NGHTTP2_SETTINGS_ENABLE_PUSH, 0};
	err = nghttp2_submit_settings(conn->session, NGHTTP2_FLAG_NONE, settings, count);
	if (!err)
		err = nghttp2_session_set_local_window_size(conn->session, NGHTTP2_FLAG_NONE, 0,
							    (int32_t)conn->config.window_len);
	return err ? errno_of(err) : 0;
}

int h2_session_create(struct gw_grpc *conn)
{
	nghttp2_session_callbacks *callbacks = NULL;
	nghttp2_option *option = NULL;
	int err = -ENOMEM;

	if (nghttp2_session_callbacks_new(&callbacks) == 0 && nghttp2_option_new(&option) == 0) {
		int got;

		set_callbacks(callbacks);
		nghttp2_option_set_no_auto_window_update(option, 1);
		if (conn->server)
			got = nghttp2_session_server_new2(&conn->session, callbacks, conn, option);
		else
			got = nghttp2_session_client_new2(&conn->session, callbacks, conn, option);
		err = got ? -ENOMEM : submit_settings(conn);
	}
	nghttp2_option_del(option);
	nghttp2_session_callbacks_del(callbacks);
	return err;
}

void gw_grpc_drain(struct gw_grpc *conn)
{
	if (conn->dead)
		return;
	conn->draining = true;
	nghttp2_submit_goaway(conn->session, NGHTTP2_FLAG_NONE,
			      nghttp2_session_get_last_proc_stream_id(conn->session),
			      NGHTTP2_NO_ERROR, NULL, 0);
}
