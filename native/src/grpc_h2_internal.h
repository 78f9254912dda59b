/* SPDX-License-Identifier: Apache-2.0 */
/*
 * grpc_h2_internal.h - what the three files of the HTTP/2 session share.
 *
 * Threads, Errors, Ownership, Units, Source: see grpc_internal.h.
 */
#ifndef GW_GRPC_H2_INTERNAL_H
#define GW_GRPC_H2_INTERNAL_H

#include "grpc_internal.h"

/* The call of a stream, NULL where it has none (any more). */
static inline struct gw_grpc_call *h2_call_of(nghttp2_session *session, int32_t stream_id)
{
	return nghttp2_session_get_stream_user_data(session, stream_id);
}

/* nghttp2's error as an errno. */
int h2_errno_of(int h2_error);
void h2_set_send_callbacks(nghttp2_session_callbacks *callbacks);
void h2_set_receive_callbacks(nghttp2_session_callbacks *callbacks);

#endif /* GW_GRPC_H2_INTERNAL_H */
