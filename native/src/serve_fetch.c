/* SPDX-License-Identifier: Apache-2.0 */
/*
 * serve_fetch.c - one Fetch stream: hello, wants, pages.
 *
 * Threads, Errors, Ownership, Units: see serve_internal.h.
 * Source: page_service.proto, which says what each refusal is.
 *
 * Wants go into a ring as they come and are judged when their turn comes, so that an
 * error ends the stream after everything asked before it was answered. A client that
 * asks faster than it reads is held by its window: see WANT_HOLD_COUNT.
 */
#include "serve_internal.h"

#include <godwit/page_lz4.h>
#include <godwit/sys.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

#define SESSION_ID_LEN_MAX 64

/* From so many waiting wants on the client's window is not opened again, until half are done. */
#define WANT_HOLD_COUNT 512
/* What a window of wants of the shortest encoding adds to that, and more. */
#define WANT_COUNT_MAX	 16384
#define WANT_COUNT_FIRST 64

/* A want up to this long is read without asking first whether it is a hole: a pread of a hole costs
 * less than the lseek, whose lock other threads of the image contend for. */
#define SEEK_LEN_MIN 65536ul
/* Zeros within an answer become a message of their own from this length on: shorter ones cost more
 * as a message than as bytes. A want that is zero throughout always does. */
#define ZERO_RUN_LEN_MIN 16384ul
/* Touched before the first page is waited for: a first touch costs more than the answer. */
#define DEMAND_BUFFER_LEN 65536ul

/* --- hello ----------------------------------------------------------------------------------- */

static void touch_buffers(struct serve_conn *conn, int32_t lane)
{
	const size_t len = lane == GW_PAGE_LANE_DEMAND ? DEMAND_BUFFER_LEN : SERVE_BUFFER_LEN;

	/* Best effort: an old kernel says EINVAL, and the first answers are slower. */
	for (size_t i = 0; i < SERVE_BUFFER_COUNT; i++)
		(void)gw_sys_madvise(conn->buffers[i].data, len, MADV_POPULATE_WRITE);
}

/* False, and the stream is ended, if a field of the hello is not what the proto asks for. */
static bool hello_is_valid(struct serve_stream *stream, const struct gw_page_hello *hello)
{
	const char *wrong = NULL;

	if (!gw_id_is_valid(hello->session_id.data, hello->session_id.len, SESSION_ID_LEN_MAX))
		wrong = "session_id is not 1..64 of [A-Za-z0-9._-]";
	else if (!gw_id_is_valid(hello->image_id.data, hello->image_id.len, GW_PAGE_ID_LEN_MAX))
		wrong = "image_id is not 1..128 of [A-Za-z0-9._-]";
	else if (hello->epoch == 0)
		wrong = "epoch is unset";
	else if (hello->lane != GW_PAGE_LANE_DEMAND && hello->lane != GW_PAGE_LANE_BULK)
		wrong = "lane is neither demand nor bulk";
	if (wrong)
		serve_stream_end(stream, GW_GRPC_INVALID_ARGUMENT, "HELLO_MALFORMED: %s", wrong);
	return !wrong;
}

/* With the slot's lock held: false, and the stream is ended, if it may not read the image (now). */
static bool may_read(struct serve_stream *stream, const struct gw_image *image)
{
	if (!image) {
		serve_stream_end(stream, GW_GRPC_NOT_FOUND,
				 "IMAGE_UNKNOWN: the image is no longer served here");
		return false;
	}
	if (stream->epoch < gw_image_access(image)->destination_epoch) {
		serve_stream_end(stream, GW_GRPC_FAILED_PRECONDITION,
				 "STALE_EPOCH: epoch %llu is older than the destination's, %llu",
				 (unsigned long long)stream->epoch,
				 (unsigned long long)gw_image_access(image)->destination_epoch);
		return false;
	}
	if (stream->epoch <= gw_image_record(image)->epoch) {
		serve_stream_end(stream, GW_GRPC_FAILED_PRECONDITION,
				 "STALE_EPOCH: epoch %llu is not above the image's %llu",
				 (unsigned long long)stream->epoch,
				 (unsigned long long)gw_image_record(image)->epoch);
		return false;
	}
	return true;
}

static void say_hello(struct serve_stream *stream, const struct gw_page_hello *hello)
{
	struct serve_conn *conn = stream->conn;

	if (!hello_is_valid(stream, hello))
		return;
	stream->slot = serve_slot_get(conn->serve, hello->image_id.data, hello->image_id.len);
	if (!stream->slot) {
		serve_stream_end(stream, GW_GRPC_NOT_FOUND,
				 "IMAGE_UNKNOWN: %.*s is not served here", (int)hello->image_id.len,
				 hello->image_id.data);
		return;
	}
	atomic_fetch_add_explicit(&stream->slot->stream_count, 1, memory_order_relaxed);
	serve_count(&conn->serve->counters.stream_count, 1);
	conn->fetch_count++;
	conn->life_ns = conn->now_ns;
	stream->epoch = hello->epoch;
	stream->lane = hello->lane;
	if (!serve_access_take(stream, hello))
		return;
	stream->zero_run_max = hello->zero_run_max;
	/* Without memory for it the stream goes on unpacked. */
	if (hello->accepts_lz4 && hello->lane == GW_PAGE_LANE_BULK)
		(void)serve_lz4_create(&stream->lz4);
	stream->state = SERVE_READY_DUE;
	touch_buffers(conn, hello->lane);
}

/* --- requests -------------------------------------------------------------------------------- */

static bool grow_wants(struct serve_stream *stream)
{
	const size_t cap = stream->want_cap ? stream->want_cap * 2 : WANT_COUNT_FIRST;
	struct gw_page_want *wants;

	if (cap > WANT_COUNT_MAX)
		return false;
	wants = calloc(cap, sizeof(*wants));
	if (!wants)
		return false;
	for (size_t i = 0; i < stream->want_count; i++)
		wants[i] = stream->wants[(stream->want_first + i) % stream->want_cap];
	free(stream->wants);
	stream->wants = wants;
	stream->want_cap = cap;
	stream->want_first = 0;
	return true;
}

static void hold(struct serve_stream *stream, bool held)
{
	if (stream->held == held)
		return;
	stream->held = held;
	gw_grpc_call_hold(stream->call, held);
}

static void take_want(struct serve_stream *stream, const struct gw_page_want *want)
{
	if (stream->want_count == stream->want_cap && !grow_wants(stream)) {
		serve_stream_end(stream, GW_GRPC_RESOURCE_EXHAUSTED,
				 "WANTS_TOO_MANY: %zu are waiting", stream->want_count);
		return;
	}
	stream->wants[(stream->want_first + stream->want_count++) % stream->want_cap] = *want;
	serve_count(&stream->conn->serve->counters.want_total, 1);
	if (stream->want_count >= WANT_HOLD_COUNT)
		hold(stream, true);
}

void serve_fetch_message(struct serve_stream *stream, const uint8_t *data, size_t len)
{
	struct gw_fetch_request request;

	if (gw_fetch_request_decode(data, len, &request)) {
		serve_stream_end(stream, GW_GRPC_INVALID_ARGUMENT,
				 "MESSAGE_MALFORMED: not a FetchRequest");
		return;
	}
	if (stream->state == SERVE_HELLO_DUE && request.kind != GW_FETCH_REQUEST_HELLO) {
		serve_stream_end(stream, GW_GRPC_INVALID_ARGUMENT,
				 "HELLO_MISSING: the first message must carry hello");
		return;
	}
	switch (request.kind) {
	case GW_FETCH_REQUEST_HELLO:
		if (stream->state == SERVE_HELLO_DUE)
			say_hello(stream, &request.hello);
		else
			serve_stream_end(stream, GW_GRPC_INVALID_ARGUMENT,
					 "HELLO_REPEATED: only the first message carries hello");
		break;
	case GW_FETCH_REQUEST_WANT:
		take_want(stream, &request.want);
		break;
	case GW_FETCH_REQUEST_HEARTBEAT:
		break; /* its bytes were the sign of life */
	default:
		serve_stream_end(stream, GW_GRPC_INVALID_ARGUMENT,
				 "BODY_UNSET: no hello, want or heartbeat");
		break;
	}
}

/* --- answers --------------------------------------------------------------------------------- */

enum outcome {
	QUEUED = 1,  /* something was queued; go on */
	BLOCKED = 2, /* no room: after on_sent or on_writable */
	ENDED = 3,   /* the stream is over */
};

static enum outcome outcome_of(int err)
{
	if (err == 0)
		return QUEUED;
	return err == -EAGAIN ? BLOCKED : ENDED;
}

static enum outcome send_ready(struct serve_stream *stream, const struct gw_image *image)
{
	/* Ids of 128 and 64 regions of at most 29 bytes each. */
	uint8_t data[4096];
	const struct gw_fetch_response response = {.kind = GW_FETCH_RESPONSE_READY,
						   .ready = {.image = *gw_image_record(image),
							     .want_max = GW_PAGE_WANT_LEN_MAX}};
	const ssize_t len = gw_fetch_response_encode(&response, data, sizeof(data));
	enum outcome outcome;

	if (len < 0) {
		serve_stream_end(stream, GW_GRPC_INTERNAL, "ENCODING: ready does not fit");
		return ENDED;
	}
	outcome = outcome_of(serve_send_block(stream, data, (size_t)len));
	if (outcome == QUEUED) {
		stream->state = SERVE_OPEN;
		stream->sent_ns = stream->conn->now_ns;
	}
	return outcome;
}

/* False, and the stream is ended, if the want is not one that this image can answer. */
static bool want_is_valid(struct serve_stream *stream, const struct gw_page_want *want,
			  const struct gw_image *image)
{
	const uint64_t generation = gw_image_record(image)->generation;
	const uint64_t size = gw_image_size(image);

	if (want->offset % GW_IMAGE_PAGE_LEN || want->len % GW_IMAGE_PAGE_LEN || want->len == 0 ||
	    want->len > GW_PAGE_WANT_LEN_MAX || want->generation == 0) {
		serve_stream_end(stream, GW_GRPC_INVALID_ARGUMENT,
				 "WANT_MALFORMED: offset %llu, len %llu, generation %llu",
				 (unsigned long long)want->offset, (unsigned long long)want->len,
				 (unsigned long long)want->generation);
		return false;
	}
	if (want->generation != generation) {
		serve_stream_end(stream, GW_GRPC_FAILED_PRECONDITION,
				 "STALE_GENERATION: %llu is wanted, the image has %llu",
				 (unsigned long long)want->generation,
				 (unsigned long long)generation);
		return false;
	}
	if (want->offset > size || want->len > size - want->offset) {
		serve_stream_end(stream, GW_GRPC_OUT_OF_RANGE,
				 "WANT_OUT_OF_RANGE: offset %llu, len %llu, the image has %llu",
				 (unsigned long long)want->offset, (unsigned long long)want->len,
				 (unsigned long long)size);
		return false;
	}
	return true;
}

static enum outcome send_pages(struct serve_stream *stream, struct gw_pages *pages,
			       struct serve_buffer *buffer)
{
	struct serve_counters *counters = &stream->conn->serve->counters;
	const uint64_t page_count = pages->len / GW_IMAGE_PAGE_LEN;
	uint8_t head[GW_PAGES_HEAD_LEN_MAX];
	size_t head_len;
	int err;

	/* Of what is packed it was taken before. */
	if (pages->encoding != GW_PAGE_ENCODING_LZ4)
		pages->crc32c = gw_pages_crc32c(pages);
	head_len = gw_pages_encode_head(pages, head);
	err = gw_grpc_call_send(stream->call, head, head_len, pages->data.data, pages->data.len,
				buffer ? &buffer->cookie : NULL);
	if (err)
		return outcome_of(err);
	if (buffer)
		buffer->unsent_count++;
	stream->sent_ns = stream->conn->now_ns;
	stream->want_done_len += pages->len;
	/* A run of zeros may go on beyond its want, which is answered then. */
	if (stream->want_done_len > stream->wants[stream->want_first].len)
		stream->want_done_len = stream->wants[stream->want_first].len;
	stream->queued_len += buffer ? pages->len : 0;
	serve_count(&counters->sent_bytes_total, pages->data.len);
	if (!buffer)
		serve_count(&counters->zero_page_total, page_count);
	else if (stream->lane == GW_PAGE_LANE_DEMAND)
		serve_count(&counters->demand_page_total, page_count);
	else
		serve_count(&counters->bulk_page_total, page_count);
	return QUEUED;
}

static struct gw_pages pages_of(const struct gw_image *image, uint64_t offset, uint64_t len)
{
	const struct gw_wire_image *record = gw_image_record(image);

	return (struct gw_pages){.offset = offset,
				 .len = len,
				 .generation = record->generation,
				 .image_state = record->state,
				 .encoding = GW_PAGE_ENCODING_ZERO};
}

/* Zeros from `data` on, in whole pages, counted up to `len_max`. */
static size_t zero_len(const uint8_t *data, size_t len_max)
{
	size_t len = 0;

	while (len < len_max && gw_bytes_are_zero(data + len, GW_IMAGE_PAGE_LEN))
		len += GW_IMAGE_PAGE_LEN;
	return len;
}

/* The longest piece from `data` on that is sent as one message, and how. */
static size_t next_piece(const uint8_t *data, size_t len, bool *ret_zero)
{
	size_t at = zero_len(data, len);

	*ret_zero = at == len || at >= ZERO_RUN_LEN_MIN;
	if (*ret_zero)
		return at;
	while (at < len) {
		const size_t rest = len - at;
		const size_t zeros =
			zero_len(data + at, rest < ZERO_RUN_LEN_MIN ? rest : ZERO_RUN_LEN_MIN);

		if (zeros >= ZERO_RUN_LEN_MIN)
			break;
		at += zeros ? zeros : GW_IMAGE_PAGE_LEN;
	}
	return at;
}

static struct serve_buffer *reserve(struct serve_conn *conn, size_t len)
{
	for (size_t i = 0; i < SERVE_BUFFER_COUNT; i++) {
		struct serve_buffer *buffer = &conn->buffers[i];

		if (SERVE_BUFFER_LEN - buffer->used_len >= len)
			return buffer;
	}
	return NULL;
}

/* RAW or, where it pays, LZ4: then the packed bytes take the place of the plain ones in the buffer. */
static void encode(struct serve_stream *stream, bool packing, uint8_t *data, struct gw_pages *pages)
{
	size_t packed_len = 0;

	pages->encoding = GW_PAGE_ENCODING_RAW;
	pages->data = (struct gw_wire_bytes){.data = data, .len = pages->len};
	if (packing)
		packed_len =
			gw_page_lz4_pack(stream->lz4.state, data, pages->len, stream->lz4.packed);
	if (packed_len == 0)
		return;
	pages->encoding = GW_PAGE_ENCODING_LZ4;
	pages->crc32c = gw_pages_crc32c(pages);
	memcpy(data, stream->lz4.packed, packed_len);
	pages->data.len = packed_len;
}

/* True if the rest of this want or another one is still to be answered. */
static bool is_waited_for(const struct serve_stream *stream)
{
	return stream->want_count > 1 ||
	       stream->want_done_len < stream->wants[stream->want_first].len;
}

/* False, and the stream is ended. What passes is told as such: the guest waits, and is asked for again. */
static bool read_memory(struct serve_stream *stream, const struct gw_image *image, uint64_t offset,
			uint8_t *ret_data, size_t len)
{
	const int err = gw_image_read(image, offset, ret_data, len);

	if (err == -ENOMEM)
		serve_stream_end(stream, GW_GRPC_UNAVAILABLE,
				 "MEMORY: no room to read the memory at offset %llu",
				 (unsigned long long)offset);
	else if (err)
		serve_stream_end(stream, GW_GRPC_DATA_LOSS,
				 "MEMORY_LOST: the memory at offset %llu cannot be read any more",
				 (unsigned long long)offset);
	return err == 0;
}

/* Read [offset, offset + len) and queue it, zeros apart. */
static enum outcome send_data(struct serve_stream *stream, const struct gw_image *image,
			      uint64_t offset, size_t len)
{
	struct serve_buffer *buffer = reserve(stream->conn, len);
	enum outcome outcome = QUEUED;
	bool packing = false;
	size_t plain_len = 0;
	uint8_t *data;
	size_t at = 0;
	bool zero;

	if (!buffer)
		return BLOCKED;
	if (stream->lz4.state)
		packing = serve_lz4_begin(&stream->lz4, gw_sys_now_ns());
	data = buffer->data + buffer->used_len;
	if (!read_memory(stream, image, offset, data, len))
		return ENDED;
	GW_HOOK("serve.read");
	while (at < len && outcome == QUEUED) {
		const size_t piece = next_piece(data + at, len - at, &zero);
		struct gw_pages pages = pages_of(image, offset + at, piece);

		if (!zero) {
			encode(stream, packing, data + at, &pages);
			plain_len += piece;
		}
		outcome = send_pages(stream, &pages, zero ? NULL : buffer);
		at += piece;
	}
	if (stream->lz4.state)
		serve_lz4_end(&stream->lz4, plain_len, is_waited_for(stream));
	if (buffer->unsent_count > 0)
		buffer->used_len += len;
	return outcome;
}

/*
 * The hole at `offset`: within the want, or beyond it where the peer takes that: 8 GiB without a page
 * are then one message. A run that leaves its want ends at a page of the guest, so that none is told in part.
 */
static uint64_t hole_len(const struct serve_stream *stream, const struct gw_image *image,
			 uint64_t offset, uint64_t len)
{
	const uint64_t left = gw_image_size(image) - offset;
	uint64_t len_max = stream->zero_run_max < left ? stream->zero_run_max : left;
	int64_t hole;

	len_max -= len_max % GW_IMAGE_PAGE_LEN;
	hole = gw_image_hole_len(image, offset, len_max > len ? len_max : len);
	/* -ENODATA is told by the read that follows. */
	if (hole < 0)
		return 0;
	if ((uint64_t)hole <= len)
		return (uint64_t)hole;
	len_max = gw_image_page_begin(image, offset + (uint64_t)hole) - offset;
	return len_max > len ? len_max : len;
}

/* With the slot's lock held, so that the record cannot change until the message is queued. */
static enum outcome answer_locked(struct serve_stream *stream)
{
	const struct gw_image *image = stream->slot->image;
	const struct gw_page_want *want;
	uint64_t offset;
	uint64_t len;

	if (!may_read(stream, image))
		return ENDED;
	if (stream->state == SERVE_READY_DUE)
		return serve_access_is_granted(stream, image) ? send_ready(stream, image) : ENDED;
	/* Again for each part: the record may have been replaced in between. */
	want = &stream->wants[stream->want_first];
	if (!want_is_valid(stream, want, image))
		return ENDED;
	offset = want->offset + stream->want_done_len;
	len = want->len - stream->want_done_len;
	if (len > SEEK_LEN_MIN) {
		const uint64_t hole = hole_len(stream, image, offset, len);

		if (hole > 0) {
			struct gw_pages pages = pages_of(image, offset, hole);

			return send_pages(stream, &pages, NULL);
		}
	}
	return send_data(stream, image, offset, len < SERVE_PIECE_LEN ? len : SERVE_PIECE_LEN);
}

static enum outcome answer(struct serve_stream *stream)
{
	struct serve_slot *slot = stream->slot;
	const bool was_due = stream->state == SERVE_READY_DUE;
	enum outcome outcome;

	/* answer_locked may end the stream, which lets go of the slot: not of its lock. */
	atomic_fetch_add_explicit(&slot->ref_count, 1, memory_order_relaxed);
	pthread_rwlock_rdlock(&slot->lock);
	outcome = answer_locked(stream);
	pthread_rwlock_unlock(&slot->lock);
	if (was_due && stream->state == SERVE_OPEN)
		serve_access_remember(stream);
	serve_slot_unref(slot);
	return outcome;
}

bool serve_fetch_pump(struct serve_stream *stream)
{
	bool queued = false;

	stream->queued_len = 0;
	while (stream->state == SERVE_READY_DUE ||
	       (stream->state == SERVE_OPEN && stream->want_count > 0)) {
		if (stream->queued_len >= SERVE_PIECE_LEN || answer(stream) != QUEUED)
			return queued;
		queued = true;
		/* Not 0 == 0: a want of nothing is refused when its turn comes. */
		if (stream->want_done_len > 0 &&
		    stream->want_done_len == stream->wants[stream->want_first].len) {
			stream->want_done_len = 0;
			stream->want_first = (stream->want_first + 1) % stream->want_cap;
			stream->want_count--;
		}
		if (stream->want_count < WANT_HOLD_COUNT / 2)
			hold(stream, false);
	}
	if (stream->half_closed && stream->state == SERVE_OPEN)
		serve_stream_end(stream, GW_GRPC_OK, "%s", "");
	else if (stream->half_closed && stream->state == SERVE_HELLO_DUE)
		serve_stream_end(stream, GW_GRPC_INVALID_ARGUMENT,
				 "HELLO_MISSING: the stream ended without a message");
	return queued;
}

/* --- time, change ---------------------------------------------------------------------------- */

uint64_t serve_fetch_tick(struct serve_stream *stream)
{
	const uint64_t now_ns = stream->conn->now_ns;
	const uint64_t heartbeat_ns = stream->conn->serve->heartbeat_ns;
	struct gw_fetch_response response = {.kind = GW_FETCH_RESPONSE_HEARTBEAT};
	uint8_t data[32];
	ssize_t len;

	if (stream->state != SERVE_OPEN)
		return UINT64_MAX;
	/* What is queued will be heard of when the peer reads; a heartbeat would only queue up. */
	if (gw_grpc_call_queued_count(stream->call) > 0)
		return UINT64_MAX;
	if (now_ns < stream->sent_ns + heartbeat_ns)
		return stream->sent_ns + heartbeat_ns;
	response.heartbeat.sequence = stream->heartbeat_sequence + 1;
	len = gw_fetch_response_encode(&response, data, sizeof(data));
	if (len > 0 && gw_grpc_call_send(stream->call, data, (size_t)len, NULL, 0, NULL) == 0) {
		stream->heartbeat_sequence++;
		stream->sent_ns = now_ns;
	}
	return now_ns + heartbeat_ns;
}

void serve_fetch_recheck(struct serve_stream *stream)
{
	struct serve_slot *slot = stream->slot;

	if (!slot || stream->state == SERVE_ENDED)
		return;
	atomic_fetch_add_explicit(&slot->ref_count, 1, memory_order_relaxed);
	pthread_rwlock_rdlock(&slot->lock);
	(void)may_read(stream, slot->image);
	pthread_rwlock_unlock(&slot->lock);
	serve_slot_unref(slot);
}
