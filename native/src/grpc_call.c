/* SPDX-License-Identifier: Apache-2.0 */
/*
 * grpc_call.c - calls: their queue of messages, their status, their end.
 *
 * Threads, Errors, Ownership, Units, Source: see grpc.h.
 */
#include "grpc_internal.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct gw_grpc_call *call_create(struct gw_grpc *conn)
{
	struct gw_grpc_call *call = calloc(1, sizeof(*call));

	if (!call)
		return NULL;
	call->conn = conn;
	call->status = -1;
	call->next = conn->calls;
	if (conn->calls)
		conn->calls->prev = call;
	conn->calls = call;
	conn->call_count++;
	return call;
}

static void free_call(struct gw_grpc_call *call)
{
	struct gw_grpc *conn = call->conn;

	if (call->prev)
		call->prev->next = call->next;
	else
		conn->calls = call->next;
	if (call->next)
		call->next->prev = call->prev;
	conn->call_count--;
	if (call->deadline_ns)
		conn->deadline_count--;
	free(call->receive.buffer);
	free(call);
}

void message_unref(struct gw_grpc *conn, struct grpc_message *message)
{
	void *cookie = message->cookie;

	if (--message->ref_count > 0)
		return;
	message->cookie = NULL;
	message->next = conn->free_messages;
	conn->free_messages = message;
	conn->free_count++;
	if (conn->starved && conn->free_count * 2 >= conn->config.send_queue_count) {
		conn->starved = false;
		conn->tell_writable = true;
	}
	if (cookie && conn->handler->on_sent)
		conn->handler->on_sent(conn->user, cookie);
}

void call_drop_queue(struct gw_grpc_call *call)
{
	/* No more from now on, also not by an on_sent that is called below. */
	call->half_closed = true;
	while (call->queue_first) {
		struct grpc_message *message = call->queue_first;

		call->queue_first = message->next;
		if (!call->queue_first)
			call->queue_last = NULL;
		call->queue_count--;
		message_unref(call->conn, message);
	}
}

void call_finish(struct gw_grpc_call *call, int status, const char *text)
{
	struct gw_grpc *conn = call->conn;

	call->reset = true;
	call_drop_queue(call);
	if ((!conn->server || call->announced) && conn->handler->on_end)
		conn->handler->on_end(conn->user, call, status, text);
	free_call(call);
}

void call_set_status(struct gw_grpc_call *call, int status, const char *text)
{
	call->status = status;
	snprintf(call->status_text, sizeof(call->status_text), "%s", text ? text : "");
}

void call_fail(struct gw_grpc_call *call, int status, const char *text)
{
	if (call->conn->server) {
		gw_grpc_call_end(call, status, text);
		return;
	}
	if (call->reset)
		return;
	call_set_status(call, status, text);
	call_drop_queue(call);
	h2_reset(call, NGHTTP2_CANCEL);
}

/* --- what owners call ------------------------------------------------------------------------ */

int gw_grpc_call_open(struct gw_grpc *conn, const struct gw_grpc_call_options *options,
		      struct gw_grpc_call **ret_call)
{
	struct gw_grpc_call *call;
	int err;

	if (conn->server || !options->path || !options->authority ||
	    options->metadata_count > GW_GRPC_METADATA_COUNT_MAX)
		return -EINVAL;
	if (conn->dead || conn->draining)
		return -ESHUTDOWN;
	call = call_create(conn);
	if (!call)
		return -ENOMEM;
	err = h2_submit_request(call, options);
	if (err) {
		free_call(call);
		return err;
	}
	if (options->timeout_ns) {
		call->deadline_ns = options->now_ns + options->timeout_ns;
		conn->deadline_count++;
	}
	*ret_call = call;
	return 0;
}

static void fill(struct grpc_message *message, const void *head, size_t head_len,
		 const void *payload, size_t payload_len)
{
	const size_t len = head_len + payload_len;

	message->head[0] = 0;
	message->head[1] = (uint8_t)(len >> 24);
	message->head[2] = (uint8_t)(len >> 16);
	message->head[3] = (uint8_t)(len >> 8);
	message->head[4] = (uint8_t)len;
	if (head_len)
		memcpy(message->head + GRPC_PREFIX_LEN, head, head_len);
	message->head_len = GRPC_PREFIX_LEN + head_len;
	message->payload = payload;
	message->payload_len = payload_len;
	message->sent_len = 0;
}

static void enqueue(struct gw_grpc_call *call, struct grpc_message *message)
{
	message->next = NULL;
	if (call->queue_last)
		call->queue_last->next = message;
	else
		call->queue_first = message;
	call->queue_last = message;
	call->queue_count++;
}

int gw_grpc_call_send(struct gw_grpc_call *call, const void *head, size_t head_len,
		      const void *payload, size_t payload_len, void *cookie)
{
	struct gw_grpc *conn = call->conn;
	struct grpc_message *message = conn->free_messages;

	if (head_len > GW_GRPC_HEAD_LEN_MAX || payload_len > UINT32_MAX - GW_GRPC_HEAD_LEN_MAX)
		return -EMSGSIZE;
	if (conn->dead || call->half_closed || call->reset)
		return -EPIPE;
	if (!message) {
		conn->starved = true;
		return -EAGAIN;
	}
	if (conn->server && !call->response_begun) {
		const int err = h2_submit_response(call, false);

		if (err)
			return err;
	}
	conn->free_messages = message->next;
	conn->free_count--;
	fill(message, head, head_len, payload, payload_len);
	message->cookie = cookie;
	message->ref_count = 1;
	enqueue(call, message);
	h2_resume(call);
	return 0;
}

size_t gw_grpc_call_queued_count(const struct gw_grpc_call *call)
{
	return call->queue_count;
}

int gw_grpc_call_half_close(struct gw_grpc_call *call)
{
	if (call->conn->server)
		return -EINVAL;
	if (call->conn->dead || call->half_closed || call->reset)
		return -EPIPE;
	call->half_closed = true;
	h2_resume(call);
	return 0;
}

int gw_grpc_call_end(struct gw_grpc_call *call, int status, const char *message)
{
	if (!call->conn->server)
		return -EINVAL;
	if (call->conn->dead || call->half_closed || call->reset)
		return -EPIPE;
	call_set_status(call, status, message);
	call->half_closed = true;
	/* Held bytes of a call that nobody reads any more would only keep the peer waiting. */
	gw_grpc_call_hold(call, false);
	if (!call->response_begun)
		return h2_submit_response(call, true);
	h2_resume(call);
	return 0;
}

void gw_grpc_call_cancel(struct gw_grpc_call *call)
{
	if (call->conn->dead || call->reset)
		return;
	if (!call->conn->server)
		call_set_status(call, GW_GRPC_CANCELLED, "CANCELLED: by this side");
	call_drop_queue(call);
	h2_reset(call, NGHTTP2_CANCEL);
}

void gw_grpc_call_hold(struct gw_grpc_call *call, bool hold)
{
	if (call->held == hold || call->conn->dead)
		return;
	call->held = hold;
	if (!hold && call->held_len) {
		nghttp2_session_consume_stream(call->conn->session, call->stream_id,
					       call->held_len);
		call->held_len = 0;
	}
}

void gw_grpc_call_set_user(struct gw_grpc_call *call, void *user)
{
	call->user = user;
}

void *gw_grpc_call_user(const struct gw_grpc_call *call)
{
	return call->user;
}

struct gw_grpc *gw_grpc_call_conn(const struct gw_grpc_call *call)
{
	return call->conn;
}

int32_t gw_grpc_call_stream_id(const struct gw_grpc_call *call)
{
	return call->stream_id;
}

const char *gw_grpc_call_path(const struct gw_grpc_call *call)
{
	return call->path;
}

const char *gw_grpc_call_metadata(const struct gw_grpc_call *call, const char *name)
{
	for (size_t i = 0; i < call->metadata_count; i++) {
		if (strcmp(call->metadata + call->metadata_at[i].name, name) == 0)
			return call->metadata + call->metadata_at[i].value;
	}
	return NULL;
}
