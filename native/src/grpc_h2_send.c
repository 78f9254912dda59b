/* SPDX-License-Identifier: Apache-2.0 */
/*
 * grpc_h2_send.c - the HTTP/2 session's way out: frames listed for the socket, requests,
 * responses, trailers and resets submitted.
 *
 * Threads, Errors, Ownership, Units, Source: see grpc_internal.h.
 */
#include "grpc_h2_internal.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#define FRAME_HEADER_LEN 9
/* Longest frame that we send: as long as the peer takes, within what one sendmsg should carry. */
#define SEND_FRAME_LEN_MAX (1024 * 1024 + 4096)

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

int h2_errno_of(int h2_error)
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
		return h2_errno_of(err);
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
	return err ? h2_errno_of(err) : 0;
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
		return h2_errno_of(stream_id);
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
	call = h2_call_of(session, frame->hd.stream_id);
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

void h2_set_send_callbacks(nghttp2_session_callbacks *callbacks)
{
	nghttp2_session_callbacks_set_send_callback(callbacks, on_send);
	nghttp2_session_callbacks_set_send_data_callback(callbacks, on_send_data);
	nghttp2_session_callbacks_set_data_source_read_length_callback(callbacks, on_read_len);
	nghttp2_session_callbacks_set_on_frame_send_callback(callbacks, on_frame_sent);
}
