/* SPDX-License-Identifier: Apache-2.0 */
/*
 * grpc_receive.c - cuts the DATA of a call into messages.
 *
 * A message that lies whole in one chunk is handed on where it is; any other is
 * gathered in a buffer of exactly its length, which is reused. Most of it is received there to
 * begin with (receive_place, read_once in grpc_conn.c); each byte is copied at most once, whatever
 * sizes the frames have.
 *
 * Threads, Errors, Ownership, Units, Source: see grpc_internal.h.
 */
#include "grpc_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* True while the call still wants messages: a handler may have ended it. */
static bool wants_messages(const struct gw_grpc_call *call)
{
	if (call->reset || call->conn->dead)
		return false;
	return !(call->conn->server && call->half_closed);
}

/* The prefix is whole: judge it before a byte of the message is stored. */
static bool accept_prefix(struct gw_grpc_call *call)
{
	struct grpc_receive *receive = &call->receive;
	const uint8_t *prefix = receive->prefix;
	const uint32_t len = (uint32_t)prefix[1] << 24 | (uint32_t)prefix[2] << 16 |
			     (uint32_t)prefix[3] << 8 | prefix[4];
	char text[96];

	if (prefix[0] == 1) {
		call_fail(call, GW_GRPC_UNIMPLEMENTED,
			  "COMPRESSION_UNSUPPORTED: messages must not be compressed");
		return false;
	}
	if (prefix[0] != 0) {
		call_fail(call, GW_GRPC_INTERNAL,
			  "FRAMING: the first byte of a message is neither 0 nor 1");
		return false;
	}
	if (len > call->conn->config.message_len_max) {
		snprintf(text, sizeof(text), "MESSAGE_TOO_LONG: %u bytes, at most %u are taken",
			 len, call->conn->config.message_len_max);
		call_fail(call, GW_GRPC_RESOURCE_EXHAUSTED, text);
		return false;
	}
	receive->message_len = len;
	receive->len = 0;
	return true;
}

/* Make room for a message of `len` bytes. */
static bool reserve(struct gw_grpc_call *call, size_t len)
{
	struct grpc_receive *receive = &call->receive;
	const size_t rounded =
		(len + GRPC_BUFFER_ALIGN - 1) / GRPC_BUFFER_ALIGN * GRPC_BUFFER_ALIGN;

	if (rounded > receive->buffer_len) {
		/* Not realloc: the old content is a message already handed on. */
		uint8_t *buffer = aligned_alloc(GRPC_BUFFER_ALIGN, rounded);

		if (!buffer) {
			call_fail(call, GW_GRPC_RESOURCE_EXHAUSTED,
				  "MEMORY: no room for a message");
			return false;
		}
		free(receive->buffer);
		receive->buffer = buffer;
		receive->buffer_len = rounded;
	}
	receive->message = receive->buffer + (rounded - len);
	return true;
}

static void deliver(struct gw_grpc_call *call, const uint8_t *data, size_t len)
{
	/* First: the handler may end the call, and what follows starts a new message. */
	call->receive.prefix_len = 0;
	call->receive.len = 0;
	if (call->conn->handler->on_message)
		call->conn->handler->on_message(call->conn->user, call, data, len);
}

static size_t take_prefix(struct grpc_receive *receive, const uint8_t *data, size_t len)
{
	const size_t missing = GRPC_PREFIX_LEN - receive->prefix_len;
	const size_t taken = len < missing ? len : missing;

	memcpy(receive->prefix + receive->prefix_len, data, taken);
	receive->prefix_len += taken;
	return taken;
}

void receive_data(struct gw_grpc_call *call, const uint8_t *data, size_t len)
{
	struct grpc_receive *receive = &call->receive;

	/* The call outlives this loop: it is freed when its stream closes, which the session
	 * reports only after it has handed over the chunk. */
	while (len > 0 && wants_messages(call)) {
		if (receive->prefix_len < GRPC_PREFIX_LEN) {
			const size_t taken = take_prefix(receive, data, len);

			data += taken;
			len -= taken;
			if (receive->prefix_len < GRPC_PREFIX_LEN || !accept_prefix(call))
				return;
			if (receive->message_len == 0) {
				deliver(call, data, 0);
				continue;
			}
		}
		if (receive->len == 0 && len >= receive->message_len) {
			const uint8_t *message = data;
			const size_t message_len = receive->message_len;

			data += message_len;
			len -= message_len;
			deliver(call, message, message_len);
			continue;
		}
		if (receive->len == 0 && !reserve(call, receive->message_len))
			return;

		const size_t missing = receive->message_len - receive->len;
		const size_t taken = len < missing ? len : missing;

		/* In place already, mostly: see receive_place. After padding it may lie a little ahead. */
		if (receive->message + receive->len != data)
			memmove(receive->message + receive->len, data, taken);
		receive->len += taken;
		data += taken;
		len -= taken;
		if (receive->len == receive->message_len)
			deliver(call, receive->message, receive->message_len);
	}
}

size_t receive_place(struct gw_grpc_call *call, size_t len_max, uint8_t **ret_place)
{
	struct grpc_receive *receive = &call->receive;
	size_t missing;

	if (receive->len == 0 || !wants_messages(call))
		return 0;
	missing = receive->message_len - receive->len;
	*ret_place = receive->message + receive->len;
	return missing < len_max ? missing : len_max;
}

bool receive_at_boundary(const struct gw_grpc_call *call)
{
	return call->receive.prefix_len == 0;
}
