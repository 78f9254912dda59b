/* SPDX-License-Identifier: Apache-2.0 */
/*
 * serve_internal.h - what the files of the page server share.
 *
 * Threads    The accepting thread (serve.c), one thread a connection (serve_conn.c,
 *            serve_fetch.c, serve_describe.c), and callers of serve.h.
 * Errors     0 or -errno.
 * Ownership  See each struct.
 * Units      Bytes; nanoseconds of CLOCK_MONOTONIC.
 * Source     serve.h; page_service.proto; docs/design/wire.md.
 *
 * Locks, in the order in which they are taken:
 *   gw_serve.lock      the table of slots, the list of connections. Never held while waiting
 *                      for a connection's thread.
 *   serve_slot.lock    the record in force under one id; see there.
 * Counters are relaxed atomics: they are told, nothing is decided by them.
 */
#ifndef GW_SERVE_INTERNAL_H
#define GW_SERVE_INTERNAL_H

#include <godwit/grpc.h>
#include <godwit/image.h>
#include <godwit/serve.h>

#include "serve_lz4.h"
#include "spin.h"

#include <pthread.h>
#include <stdatomic.h>

/* Streams at once on one connection: one is the rule, a few harm nobody. */
#define SERVE_CALL_COUNT_MAX 16
/*
 * A want is answered in pieces of so much, each read, summed and given to the socket before the next is
 * read: whole wants at a time made the two ends take turns. Each piece wakes the peer, which costs processor
 * time: 128 KiB took 755 us a MiB of both ends together, 512 KiB 620, 1 MiB 535 (busy machine of two cores).
 */
#define SERVE_PIECE_LEN (512ul * 1024)
/* Memory that a connection's answers lie in until the socket has taken them. */
#define SERVE_BUFFER_COUNT 2
#define SERVE_BUFFER_LEN   SERVE_PIECE_LEN
/* Give up a peer that has been silent for so many heartbeats. */
#define SERVE_SILENCE_HEARTBEATS 3

/*
 * What is served under one id. Its record is replaced, never changed.
 *
 * Guarantee of put_image: "no message stamped with the old record will be started any
 * more". A message is made under `lock` held for reading, from looking up the record until its
 * bytes are copied, summed and queued; put_image swaps the record under `lock` held for
 * writing. So when put_image has the lock no message is being made, and every later one sees the
 * new record. What was queued before holds bytes read before: its memory is not read
 * again. Writers are preferred, so put_image waits for the messages in the making (1 MiB at
 * most each) and not for a gap between them. test_serve.c: put_image_waits_for_the_message.
 * Rejected: RCU (put_image would have to wait for a grace period all the same), a mutex (bulk
 * would hold up demand on the same image).
 */
/* Keys that one image pins: its record's, and those of streams that were let in. */
#define SERVE_PIN_COUNT_MAX 4

struct serve_pin {
	uint8_t key[GW_TLS_KEY_LEN];
	uint64_t epoch; /* of the destination that it was for */
};

struct serve_slot {
	struct serve_slot *next;
	/* gw_serve.lock: pinned in the server's identity as long as the slot is in the table. */
	size_t pin_count;
	struct serve_pin pins[SERVE_PIN_COUNT_MAX];
	pthread_rwlock_t lock;
	struct gw_image *image;	 /* NULL once removed */
	atomic_size_t ref_count; /* the table's, and each stream's */
	atomic_size_t stream_count;
	char image_id[GW_PAGE_ID_LEN_MAX + 1];
};

struct serve_counters {
	atomic_uint_fast64_t connection_count, connection_total, stream_count;
	atomic_uint_fast64_t demand_page_total, bulk_page_total, zero_page_total;
	atomic_uint_fast64_t sent_bytes_total, want_total, refused_total;
};

struct gw_serve {
	pthread_mutex_t lock;
	struct serve_slot *slots;
	struct serve_conn *conns;
	size_t conn_count;
	atomic_bool draining;
	atomic_bool stopping;
	struct serve_counters counters;
	pthread_t thread;
	bool thread_started;
	int listen_fd;
	int epoll_fd;
	int wake_fd;
	uint32_t port;
	uint32_t connection_count_max;
	uint64_t heartbeat_ns;
	struct gw_tls_identity *tls; /* NULL: plaintext */
};

/* What on_sent gives back: a message's bytes in a buffer, or a block of their own. */
struct serve_cookie {
	struct serve_buffer *buffer; /* NULL: the cookie is followed by the bytes, and freed */
};

/* Answers lie in it one after the other; it starts anew when all are sent. */
struct serve_buffer {
	struct serve_cookie cookie; /* of every message in it */
	uint8_t *data;		    /* SERVE_BUFFER_LEN, page aligned; NULL until needed */
	size_t used_len;
	size_t unsent_count;
};

/* One connection. Owned by its thread; `next`, `wake_fd` and `done` are the accepting thread's. */
struct serve_conn {
	struct gw_serve *serve;
	struct serve_conn *next;
	pthread_t thread;
	atomic_bool done; /* the thread has nothing left to do but to be joined */
	int fd;
	int wake_fd;
	struct gw_grpc *grpc;
	struct serve_stream *streams;
	size_t fetch_count; /* streams that have said hello */
	size_t turn;	    /* which stream comes first: see pump */
	uint64_t now_ns;
	struct spin spin; /* of one that serves demand */
	uint64_t life_ns; /* last sign of life that is not the peer's bytes: accepted, hello */
	struct serve_buffer buffers[SERVE_BUFFER_COUNT];
};

enum serve_stream_kind {
	SERVE_STREAM_FETCH = 1,
	SERVE_STREAM_DESCRIBE = 2,
};

enum serve_stream_state {
	SERVE_HELLO_DUE = 1, /* nothing has been said */
	SERVE_READY_DUE = 2, /* hello is accepted, ready is not queued yet */
	SERVE_OPEN = 3,
	SERVE_ENDED = 4, /* its status is queued; only on_end is still to come */
};

/* One call. */
struct serve_stream {
	struct serve_conn *conn;
	struct serve_stream *prev;
	struct serve_stream *next;
	struct gw_grpc_call *call;
	enum serve_stream_kind kind;
	enum serve_stream_state state;
	bool half_closed;
	bool held;
	bool known; /* this peer has read this image for this epoch before */
	int32_t lane;
	uint64_t epoch;
	uint64_t zero_run_max; /* as in the hello; 0 = an older peer */
	struct serve_slot *slot;
	uint64_t sent_ns; /* when something was last queued: heartbeats follow silence */
	uint64_t heartbeat_sequence;
	/* Wants not yet answered, a ring. The first may be answered in part. */
	struct gw_page_want *wants;
	size_t want_cap;
	size_t want_first;
	size_t want_count;
	uint64_t want_done_len;
	struct serve_lz4 lz4;
	size_t queued_len; /* page bytes in this turn */
	size_t token_len;
	uint8_t *token; /* of the hello, until it is let in; NULL: none */
	/* DescribeImage: what was asked for. */
	bool asked;
	char image_id[GW_PAGE_ID_LEN_MAX + 1];
};

/* serve.c */
/* A reference to the slot of an id; NULL if there is none. */
struct serve_slot *serve_slot_get(struct gw_serve *serve, const char *image_id, size_t len);
void serve_slot_unref(struct serve_slot *slot);

/* serve_conn.c */
/* Take the fd and start the thread. Returns 0 or -errno; the fd is the caller's on failure. */
int serve_conn_start(struct gw_serve *serve, int fd, struct serve_conn **ret_conn);
void serve_conn_free(struct serve_conn *conn);
void serve_wake(int wake_fd);
/* End a stream with a status; "REASON: words", printf-style. */
void serve_stream_end(struct serve_stream *stream, int status, const char *format, ...)
	__attribute__((format(printf, 3, 4)));
/* Let go of the slot. */
void serve_stream_release(struct serve_stream *stream);
/* Queue a message of bytes of its own. 0; -EAGAIN; -ENOMEM; -EPIPE. */
int serve_send_block(struct serve_stream *stream, const void *data, size_t len);

/* serve_fetch.c */
void serve_fetch_message(struct serve_stream *stream, const uint8_t *data, size_t len);
/* Queue what can be queued of one stream. True if anything was. */
bool serve_fetch_pump(struct serve_stream *stream);
/* A heartbeat if it has been silent for long enough. Returns when the next is due. */
uint64_t serve_fetch_tick(struct serve_stream *stream);
/* The image may have gone: end if so. */
void serve_fetch_recheck(struct serve_stream *stream);

/* serve_access.c */
/* False, and the call is ended, if the peer is no node. */
bool serve_peer_is_node(const struct serve_conn *conn, struct gw_grpc_call *call);
/* Keep the hello's token, and remember whether the peer is known. False: the stream is ended. */
bool serve_access_take(struct serve_stream *stream, const struct gw_page_hello *hello);
/* With the slot's lock held: false, and the stream is ended, if this peer may not read the image. */
bool serve_access_is_granted(struct serve_stream *stream, const struct gw_image *image);
/* The stream is let in: its peer is known from now on. Without the slot's lock. */
void serve_access_remember(struct serve_stream *stream);
/* With serve->lock held: pin what the record that comes into force says. 0; -ENOSPC. */
int serve_access_pin(struct gw_serve *serve, struct serve_slot *slot, const struct gw_image *image);
/* With serve->lock held: the slot leaves the table. */
void serve_access_unpin(struct gw_serve *serve, struct serve_slot *slot);

/* serve_describe.c */
void serve_describe_message(struct serve_stream *stream, const uint8_t *data, size_t len);
void serve_describe_answer(struct serve_stream *stream);

static inline void serve_count(atomic_uint_fast64_t *counter, uint64_t by)
{
	atomic_fetch_add_explicit(counter, by, memory_order_relaxed);
}

#endif /* GW_SERVE_INTERNAL_H */
