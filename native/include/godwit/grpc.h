/* SPDX-License-Identifier: Apache-2.0 */
/*
 * grpc.h - one gRPC connection: real gRPC framing and statuses over HTTP/2 on a
 * non-blocking socket, client or server side, driven by its owner's epoll loop.
 *
 * Threads    A connection belongs to one thread: every call on it and on its calls
 *            is made there. The handler's functions run in that thread, inside
 *            gw_grpc_on_readable, _on_writable, _on_time, _flush and _destroy (on_sent also
 *            inside gw_grpc_call_cancel). They may use every gw_grpc_call_* function and
 *            nothing else on the connection.
 * Errors     0 or -errno. After -errno from on_readable, on_writable, on_time or
 *            flush the connection is dead: its calls have got their on_end; destroy it.
 *            What goes wrong with one call is its status in on_end; others go on.
 * Ownership  create takes the fd, on success only. A call is valid from open (or
 *            on_call) until its on_end returns. A payload given to send belongs to
 *            the connection until on_sent.
 * Units      Bytes; nanoseconds of CLOCK_MONOTONIC.
 * Source     RFC 9113; gRPC over HTTP/2 (grpc/doc/PROTOCOL-HTTP2.md, statuscodes.md);
 *            nghttp2. docs/design/wire.md.
 *
 * How an owner drives it: epoll (level-triggered) on gw_grpc_fd for EPOLLIN, and for
 * EPOLLOUT while gw_grpc_wants_write; readable -> on_readable, writable (or an
 * error) -> on_writable, gw_grpc_deadline_ns passed -> on_time. Sends are queued; on_*
 * flush what their callbacks queued, flush does it for what was queued outside of them.
 */
#ifndef GW_GRPC_H
#define GW_GRPC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Statuses as on the wire. */
enum gw_grpc_status {
	GW_GRPC_OK = 0,
	GW_GRPC_CANCELLED = 1,
	GW_GRPC_UNKNOWN = 2,
	GW_GRPC_INVALID_ARGUMENT = 3,
	GW_GRPC_DEADLINE_EXCEEDED = 4,
	GW_GRPC_NOT_FOUND = 5,
	GW_GRPC_ALREADY_EXISTS = 6,
	GW_GRPC_PERMISSION_DENIED = 7,
	GW_GRPC_RESOURCE_EXHAUSTED = 8,
	GW_GRPC_FAILED_PRECONDITION = 9,
	GW_GRPC_ABORTED = 10,
	GW_GRPC_OUT_OF_RANGE = 11,
	GW_GRPC_UNIMPLEMENTED = 12,
	GW_GRPC_INTERNAL = 13,
	GW_GRPC_UNAVAILABLE = 14,
	GW_GRPC_DATA_LOSS = 15,
	GW_GRPC_UNAUTHENTICATED = 16,
};

/* Longest head of a message that send copies; what is longer goes as payload. */
#define GW_GRPC_HEAD_LEN_MAX	    160
#define GW_GRPC_PATH_LEN_MAX	    128
#define GW_GRPC_METADATA_LEN_MAX    2048 /* names and values of one call, NULs included */
#define GW_GRPC_METADATA_COUNT_MAX  16
#define GW_GRPC_STATUS_TEXT_LEN_MAX 256 /* of grpc-message, NUL included; longer is cut */

struct gw_grpc;	     /* a connection */
struct gw_grpc_call; /* one call on it: an HTTP/2 stream */

/*
 * What the owner is told. `user` is the connection's. A NULL function ignores it.
 *
 * A call's own pointer (gw_grpc_call_set_user) is how an owner finds its record.
 */
struct gw_grpc_handler {
	/* Server: a call came in; path and metadata can be read. Ending it here refuses it. */
	void (*on_call)(void *user, struct gw_grpc_call *call);
	/* One whole message. `data` is valid until the function returns; it may be unaligned. */
	void (*on_message)(void *user, struct gw_grpc_call *call, const uint8_t *data, size_t len);
	/* Server: the client sends no more messages. */
	void (*on_half_close)(void *user, struct gw_grpc_call *call);
	/* The payload sent with `cookie` is needed no more. Once for each that send took, also
	 * when the call or the connection died; possibly after on_end. */
	void (*on_sent)(void *user, void *cookie);
	/* After a send gave -EAGAIN: half of the queue is free again. */
	void (*on_writable)(void *user);
	/* The last word about a call; `call` is freed afterwards. `message` is never NULL.
	 * Server: GW_GRPC_OK only if the status that we sent was handed to the socket or the
	 * window; else CANCELLED (the client went) or UNAVAILABLE (the connection did). */
	void (*on_end)(void *user, struct gw_grpc_call *call, int status, const char *message);
};

struct gw_grpc_config {
	const struct gw_grpc_handler *handler; /* outlives the connection */
	void *user;
	uint32_t message_len_max;  /* of a received message; a longer one ends its call with
				      RESOURCE_EXHAUSTED before it is stored */
	uint32_t window_len;	   /* receive window of the connection and of each call; at least
				      65535, at most 2^31-1: how much a peer may have in flight */
	uint32_t call_count_max;   /* server: calls open at once; the peer is told */
	uint32_t send_queue_count; /* messages queued at once, all calls together; 1..65536 */
	/* Who we are and whom we believe; it is referred to as long as the connection lives. NULL:
	 * plain text. A client names whom it calls (a DNS name of the certificate). */
	struct gw_tls_identity *tls;
	const char *tls_server_name;
	uint32_t read_len; /* most bytes one read(2) takes; 0 = 16 KiB */
};

/*
 * A non-blocking TCP socket on its way to a numeric address (TCP_NODELAY,
 * TCP_USER_TIMEOUT = timeout_ms: bytes unacknowledged for so long kill the connection).
 * Give it to gw_grpc_client_create at once: a refusal comes from on_writable.
 *
 * Returns 0; -EINVAL not numeric; -errno of socket(2), connect(2).
 */
int gw_grpc_connect(const char *host, uint32_t port, uint32_t timeout_ms, int *ret_fd);

/* The same options, for an accepted socket. Returns 0 or -errno. Not for socketpairs. */
int gw_grpc_tune_socket(int fd, uint32_t timeout_ms);

/* Returns 0; -EINVAL; -ENOMEM. `fd` is non-blocking; it may still be connecting. */
int gw_grpc_client_create(const struct gw_grpc_config *config, int fd, struct gw_grpc **ret_conn);
int gw_grpc_server_create(const struct gw_grpc_config *config, int fd, struct gw_grpc **ret_conn);

/* Ends every call (UNAVAILABLE), gives every payload back, closes the fd. NULL is a no-op. */
void gw_grpc_destroy(struct gw_grpc *conn);

int gw_grpc_fd(const struct gw_grpc *conn);
/* The connection's TLS, to ask who the peer is; NULL: plain text. Borrowed. */
const struct gw_tls *gw_grpc_tls(const struct gw_grpc *conn);
/* True while EPOLLOUT is worth waiting for: connecting, or bytes that the socket did not take. */
bool gw_grpc_wants_write(const struct gw_grpc *conn);

/*
 * Read and handle what is there, up to a bounded amount (level-triggered epoll calls
 * again), then flush. `now_ns` is gw_sys_now_ns(), read once per wake-up by the owner.
 *
 * Returns 0; -ECONNRESET the peer closed; -EPROTO it does not speak HTTP/2; -ESHUTDOWN
 * a GOAWAY was exchanged and no calls are left; -ENOMEM; -errno of recv, sendmsg.
 */
int gw_grpc_on_readable(struct gw_grpc *conn, uint64_t now_ns);
/* The socket takes bytes again, or has connected. The same errors, and connect(2)'s. */
int gw_grpc_on_writable(struct gw_grpc *conn, uint64_t now_ns);
/* Send what is queued, as far as the socket and the peer's windows take it. */
int gw_grpc_flush(struct gw_grpc *conn);

/* When on_time has something to do: the earliest deadline of a call; UINT64_MAX = never. */
uint64_t gw_grpc_deadline_ns(const struct gw_grpc *conn);
/* End calls whose deadline has passed: DEADLINE_EXCEEDED. Then flush. */
int gw_grpc_on_time(struct gw_grpc *conn, uint64_t now_ns);

/* When the last bytes came in, of whatever kind: any frame is a sign of life. 0 = none yet. */
uint64_t gw_grpc_received_ns(const struct gw_grpc *conn);
/* True if the peer announced by GOAWAY that it takes no new calls: open a new connection. */
bool gw_grpc_is_draining(const struct gw_grpc *conn);
/* Tell the peer that no new calls are taken (GOAWAY); those open go on. */
void gw_grpc_drain(struct gw_grpc *conn);

struct gw_grpc_metadata {
	const char *name; /* lower case, not binary (-bin) */
	const char *value;
};

struct gw_grpc_call_options {
	const char *path;      /* "/godwit.page.v1.PageService/Fetch" */
	const char *authority; /* "host:port" */
	const struct gw_grpc_metadata *metadata;
	size_t metadata_count; /* up to GW_GRPC_METADATA_COUNT_MAX */
	uint64_t timeout_ns;   /* 0 = none. Sent as grpc-timeout and kept by ourselves */
	uint64_t now_ns;       /* for timeout_ns */
};

/*
 * Client: start a call. Its headers go out with the next flush; more calls than the
 * peer allows at once wait in the session.
 *
 * Returns 0; -EINVAL; -ESHUTDOWN the peer is draining; -ENOMEM.
 */
int gw_grpc_call_open(struct gw_grpc *conn, const struct gw_grpc_call_options *options,
		      struct gw_grpc_call **ret_call);

/*
 * Queue one message: `head_len` bytes that are copied, then `payload_len` bytes that
 * are not: they are read when the socket takes them, until on_sent(cookie). A NULL
 * payload with a cookie is allowed; on_sent is called only if cookie is not NULL.
 *
 * Returns 0; -EAGAIN the queue is full: wait for on_writable; -EPIPE this side has
 * half-closed or ended, or the call is over; -EMSGSIZE head_len is too long.
 */
int gw_grpc_call_send(struct gw_grpc_call *call, const void *head, size_t head_len,
		      const void *payload, size_t payload_len, void *cookie);

/* Messages of this call that are queued and not yet handed to the socket. */
size_t gw_grpc_call_queued_count(const struct gw_grpc_call *call);

/* Client: no more messages from this side. */
int gw_grpc_call_half_close(struct gw_grpc_call *call);

/* Server: end with a status after what is queued. `message` is cut at
 * GW_GRPC_STATUS_TEXT_LEN_MAX. The first end counts; -EPIPE for a later one. */
int gw_grpc_call_end(struct gw_grpc_call *call, int status, const char *message);

/* Reset the stream at once, dropping what is queued; on_end follows with CANCELLED (or, on a
 * server that has ended the call, with the status it gave). Either side. */
void gw_grpc_call_cancel(struct gw_grpc_call *call);

/*
 * While held, received bytes of this call are not given back to the peer's window, so
 * that it can send no more than one window: back-pressure that never stops reading
 * the socket, where the window updates arrive that get us going again.
 */
void gw_grpc_call_hold(struct gw_grpc_call *call, bool hold);

void gw_grpc_call_set_user(struct gw_grpc_call *call, void *user);
void *gw_grpc_call_user(const struct gw_grpc_call *call);
struct gw_grpc *gw_grpc_call_conn(const struct gw_grpc_call *call);
int32_t gw_grpc_call_stream_id(const struct gw_grpc_call *call);

/* Server: what the client sent. metadata gives NULL where there is none. */
const char *gw_grpc_call_path(const struct gw_grpc_call *call);
const char *gw_grpc_call_metadata(const struct gw_grpc_call *call, const char *name);

#endif /* GW_GRPC_H */
