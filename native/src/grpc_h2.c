/* SPDX-License-Identifier: Apache-2.0 */
/*
 * grpc_h2.c - the HTTP/2 session: its making and its settings. What goes out is in
 * grpc_h2_send.c, what comes in in grpc_h2_receive.c.
 *
 * Threads, Errors, Ownership, Units: see grpc_internal.h.
 * Source: nghttp2's programmers' guide; RFC 9113; grpc/doc/PROTOCOL-HTTP2.md.
 *
 * Pings and settings are acknowledged by nghttp2, which also ends a session whose peer
 * floods it with either, or with continuations.
 */
#include "grpc_h2_internal.h"

#include <errno.h>

#define FRAME_LEN_MIN 16384u
#define FRAME_LEN_MAX ((1u << 24) - 1)

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
	return err ? h2_errno_of(err) : 0;
}

int h2_session_create(struct gw_grpc *conn)
{
	nghttp2_session_callbacks *callbacks = NULL;
	nghttp2_option *option = NULL;
	int err = -ENOMEM;

	if (nghttp2_session_callbacks_new(&callbacks) == 0 && nghttp2_option_new(&option) == 0) {
		int got;

		h2_set_send_callbacks(callbacks);
		h2_set_receive_callbacks(callbacks);
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
