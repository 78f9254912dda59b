/* SPDX-License-Identifier: Apache-2.0 */
/*
 * grpc_h2_receive.c - the HTTP/2 session's way in: headers, data and ends of streams, told to
 * calls.
 *
 * Threads, Errors, Ownership, Units, Source: see grpc_internal.h.
 *
 * Windows: nghttp2 gives received bytes back when told (no_auto_window_update). The
 * connection's are given back at once, so that no call can starve another; a call's
 * unless it is held.
 */
#include "grpc_h2_internal.h"

#include <stdio.h>
#include <string.h>

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
	struct gw_grpc_call *call = h2_call_of(session, frame->hd.stream_id);

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
	call = h2_call_of(session, frame->hd.stream_id);
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

static int on_begin_frame(nghttp2_session *session, const nghttp2_frame_hd *frame, void *user)
{
	struct gw_grpc *conn = user;

	(void)session;
	conn->frame_left = frame->type == NGHTTP2_DATA ? frame->length : 0;
	conn->frame_stream_id = frame->stream_id;
	return 0;
}

static int on_chunk(nghttp2_session *session, uint8_t flags, int32_t stream_id, const uint8_t *data,
		    size_t len, void *user)
{
	struct gw_grpc_call *call = h2_call_of(session, stream_id);
	struct gw_grpc *conn = user;

	(void)flags;
	conn->frame_left -= len < conn->frame_left ? len : conn->frame_left;
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
	struct gw_grpc_call *call = h2_call_of(session, stream_id);

	if (!call)
		return 0;
	nghttp2_session_set_stream_user_data(session, stream_id, NULL);
	if (conn->server)
		finish_server(call, error_code);
	else
		finish_client(call, error_code);
	return 0;
}

void h2_set_receive_callbacks(nghttp2_session_callbacks *callbacks)
{
	nghttp2_session_callbacks_set_on_begin_headers_callback(callbacks, on_begin_headers);
	nghttp2_session_callbacks_set_on_begin_frame_callback(callbacks, on_begin_frame);
	nghttp2_session_callbacks_set_on_header_callback(callbacks, on_header);
	nghttp2_session_callbacks_set_on_frame_recv_callback(callbacks, on_frame_received);
	nghttp2_session_callbacks_set_on_data_chunk_recv_callback(callbacks, on_chunk);
	nghttp2_session_callbacks_set_on_stream_close_callback(callbacks, on_stream_close);
}
