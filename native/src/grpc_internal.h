/* SPDX-License-Identifier: Apache-2.0 */
/*
 * grpc_internal.h - what the files of the gRPC connection share.
 *
 * Threads    The connection's own thread; nothing here is locked.
 * Errors     0 or -errno.
 * Ownership  A connection owns its calls, its messages and its nghttp2 session.
 * Units      Bytes; nanoseconds of CLOCK_MONOTONIC.
 * Source     grpc.h.
 *
 * grpc_conn.c moves bytes between the socket and the session, grpc_h2*.c is what the session
 * calls back, grpc_call.c is what owners call, grpc_receive.c cuts bytes into messages.
 *
 * A message on its way out: queued in its call (grpc_call.c) -> the session asks for DATA
 * and is told how much there is (h2_read) -> it hands us the frame header, and we list the
 * pieces (h2_send_data) -> sendmsg takes them (conn_flush). The bytes of a payload are
 * touched by nobody but sendmsg. A message is given back when no queue and no listed piece
 * refers to it: a stream may be reset while a frame of it is half written, and the rest of
 * that frame must still come from somewhere.
 */
#ifndef GW_GRPC_INTERNAL_H
#define GW_GRPC_INTERNAL_H

#include <godwit/grpc.h>
#include <godwit/tls.h>

#include <nghttp2/nghttp2.h>
#include <sys/uio.h>

#define GRPC_PREFIX_LEN 5

/* Pieces listed for one sendmsg: a 1 MiB message in 16 KiB frames is 64 frames of two. */
#define OUT_PIECE_COUNT_MAX 256
/* Pieces that one DATA frame may have, beside its header. */
#define FRAME_PIECE_COUNT_MAX 16
/* Frame headers and whole control frames between two sendmsg. */
#define OUT_CONTROL_LEN_MAX 32768ul

/* One queued message: the head is ours, the payload the owner's. */
struct grpc_message {
	struct grpc_message *next;
	const uint8_t *payload;
	size_t payload_len;
	size_t head_len;
	size_t sent_len; /* of head + payload, how much is in frames */
	void *cookie;
	uint32_t ref_count; /* the queue, and each listed piece */
	uint8_t head[GRPC_PREFIX_LEN + GW_GRPC_HEAD_LEN_MAX];
};

/* Copies go fast between aligned buffers, and badly wrong between some others: see grpc_receive.c. */
#define GRPC_BUFFER_ALIGN 4096u

/* Cuts DATA into messages. */
struct grpc_receive {
	uint8_t prefix[GRPC_PREFIX_LEN];
	size_t prefix_len;  /* of the prefix, how much is here */
	size_t message_len; /* valid once the prefix is whole */
	size_t len;	    /* of the message, how much is gathered at `message` */
	uint8_t *message;   /* in `buffer` */
	uint8_t *buffer;    /* kept from message to message */
	size_t buffer_len;
};

struct gw_grpc_call {
	struct gw_grpc *conn;
	struct gw_grpc_call *prev;
	struct gw_grpc_call *next;
	void *user;
	int32_t stream_id;
	uint64_t deadline_ns; /* 0 = none */

	struct grpc_message *queue_first;
	struct grpc_message *queue_last;
	size_t queue_count;
	size_t held_len; /* received and not given back to the peer's window */

	struct grpc_receive receive;

	bool announced; /* server: on_call was called, so on_end will be */
	bool held;
	bool deferred;	  /* the session waits to be told that there is data */
	bool half_closed; /* this side queues no more messages (client: half-close, server: end) */
	bool remote_closed;  /* the peer sends no more */
	bool response_begun; /* server: the response headers are submitted */
	bool trailers_begun; /* server: the trailers are submitted */
	bool status_sent;    /* server: and handed over */
	bool headers_seen;   /* client: response headers are complete */
	bool reset;	     /* this side has reset the stream */
	bool begun;	     /* client: the request headers are out */
	bool abandoned;	     /* client: reset before they were: see h2_reset */
	bool bad_timeout;    /* server: grpc-timeout could not be read */

	/* What on_end will say; -1 = nothing known yet. On a server: what the trailers say. */
	int status;
	char status_text[GW_GRPC_STATUS_TEXT_LEN_MAX];
	/* Client: as received. */
	int http_status;
	bool content_type_ok;
	/* Server: as received. */
	bool method_ok;
	char path[GW_GRPC_PATH_LEN_MAX + 1];
	size_t metadata_count;
	size_t metadata_len;
	struct {
		uint16_t name, value; /* offsets into metadata */
	} metadata_at[GW_GRPC_METADATA_COUNT_MAX];
	char metadata[GW_GRPC_METADATA_LEN_MAX];
};

struct gw_grpc {
	struct gw_grpc_config config;
	const struct gw_grpc_handler *handler;
	void *user;
	nghttp2_session *session;
	int fd;
	struct gw_tls *tls; /* NULL: plain text */
	bool tls_begun;	    /* the handshake has been begun: what it waits for, it says itself */
	char tls_text[GW_GRPC_STATUS_TEXT_LEN_MAX]; /* why it failed */
	int dead;				    /* -errno once the connection is over */
	bool server;
	bool draining;
	bool starved;	    /* a send was refused: on_writable is owed */
	bool tell_writable; /* and may be called now */
	uint64_t now_ns;
	uint64_t received_ns;
	struct gw_grpc_call *calls;
	size_t call_count;
	size_t deadline_count;
	size_t abandoned_count;

	struct grpc_message *messages; /* send_queue_count of them */
	struct grpc_message *free_messages;
	size_t free_count;

	/* Pieces that wait for sendmsg: [piece_first, piece_count). */
	size_t piece_first;
	size_t piece_count;
	struct iovec pieces[OUT_PIECE_COUNT_MAX];
	struct grpc_message *piece_owners[OUT_PIECE_COUNT_MAX]; /* NULL: in `control` */
	size_t control_len;
	uint8_t control[OUT_CONTROL_LEN_MAX];

	/* Of the DATA frame that is being received: how much is still to come, its padding included. */
	size_t frame_left;
	int32_t frame_stream_id;
	uint8_t *read_buffer;
	size_t read_len;
};

/* grpc_h2*.c */
int h2_session_create(struct gw_grpc *conn);
int h2_submit_request(struct gw_grpc_call *call, const struct gw_grpc_call_options *options);
int h2_submit_response(struct gw_grpc_call *call, bool trailers_only);
int h2_submit_http_error(struct gw_grpc_call *call, const char *http_status);
void h2_reset(struct gw_grpc_call *call, uint32_t error_code);
/* on_end for calls that were reset before they began. */
void h2_finish_abandoned(struct gw_grpc *conn);
void h2_resume(struct gw_grpc_call *call);

/* grpc_call.c */
struct gw_grpc_call *call_create(struct gw_grpc *conn);
/* Take the call out, give its messages back, say on_end, free it. */
void call_finish(struct gw_grpc_call *call, int status, const char *text);
/* End a call from our side because of what the peer did: a server answers, a client resets. */
void call_fail(struct gw_grpc_call *call, int status, const char *text);
void call_set_status(struct gw_grpc_call *call, int status, const char *text);
void message_unref(struct gw_grpc *conn, struct grpc_message *message);
void call_drop_queue(struct gw_grpc_call *call);

/* grpc_receive.c: received bytes of a call; calls on_message. */
void receive_data(struct gw_grpc_call *call, const uint8_t *data, size_t len);
/* Where the next `len_max` bytes of the call are wanted, as part of a message that has begun: how many
 * of them, and the place; 0 = nowhere in particular. */
size_t receive_place(struct gw_grpc_call *call, size_t len_max, uint8_t **ret_place);
/* False if the stream ended within a message. */
bool receive_at_boundary(const struct gw_grpc_call *call);

/* grpc_conn.c: list bytes for the next sendmsg; return how many were taken. */
size_t conn_list_control(struct gw_grpc *conn, const uint8_t *data, size_t len);
bool conn_has_room(const struct gw_grpc *conn, size_t piece_count, size_t control_len);
void conn_list_piece(struct gw_grpc *conn, struct grpc_message *owner, const uint8_t *data,
		     size_t len);

/* grpc_text.c */
/* grpc-message: percent-encode into `ret_text` (NUL-terminated, cut to fit); returns its length. */
size_t text_encode_message(const char *message, char *ret_text, size_t cap);
/* Decode in the same way; malformed escapes stay as they are. */
void text_decode_message(const uint8_t *value, size_t len, char *ret_text, size_t cap);
/* Decimal of at most four digits; -1 if it is none. */
int text_decode_number(const uint8_t *value, size_t len);
/* grpc-timeout. Returns false if malformed. */
bool text_decode_timeout(const uint8_t *value, size_t len, uint64_t *ret_timeout_ns);
size_t text_encode_timeout(uint64_t timeout_ns, char ret_text[16]);
/* application/grpc, application/grpc+proto, parameters; not application/grpc-web. */
bool text_is_grpc_content_type(const uint8_t *value, size_t len);
int status_of_http(int http_status);
int status_of_reset(uint32_t error_code);

#endif /* GW_GRPC_INTERNAL_H */
