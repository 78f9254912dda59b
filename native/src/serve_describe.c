/* SPDX-License-Identifier: Apache-2.0 */
/*
 * serve_describe.c - DescribeImage: what an image is, and where it has data.
 *
 * Threads, Errors, Ownership, Units, Source: see serve_internal.h.
 *
 * Made from one record without the slot's lock: it says which generation it speaks of,
 * and looking for the holes of a large memory takes too long to hold up put_image. It runs in
 * its connection's thread: clients ask before they open a lane, not beside one.
 */
#include "serve_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* Enough to be exact about most guests; what is more broken up is told more coarsely. Keeps the
 * answer below the 4 MiB that gRPC clients take by default. */
#define EXTENT_COUNT_MAX 65536u
/* Longest encoding of an extent: two varints of 10 with tags, tag and length. */
#define EXTENT_LEN_MAX 24u
#define RECORD_LEN_MAX 4096u

void serve_describe_message(struct serve_stream *stream, const uint8_t *data, size_t len)
{
	struct gw_wire_string id;

	if (stream->asked) {
		serve_stream_end(stream, GW_GRPC_INVALID_ARGUMENT,
				 "MESSAGE_REPEATED: DescribeImage takes one request");
		return;
	}
	if (gw_describe_request_decode(data, len, &id)) {
		serve_stream_end(stream, GW_GRPC_INVALID_ARGUMENT,
				 "MESSAGE_MALFORMED: not a DescribeImageRequest");
		return;
	}
	if (!gw_id_is_valid(id.data, id.len, GW_PAGE_ID_LEN_MAX)) {
		serve_stream_end(stream, GW_GRPC_INVALID_ARGUMENT,
				 "IMAGE_ID_MALFORMED: image_id is not 1..128 of [A-Za-z0-9._-]");
		return;
	}
	memcpy(stream->image_id, id.data, id.len);
	stream->asked = true;
}

static struct gw_image *image_of(struct serve_stream *stream)
{
	struct serve_slot *slot =
		serve_slot_get(stream->conn->serve, stream->image_id, strlen(stream->image_id));
	struct gw_image *image = NULL;

	if (slot) {
		pthread_rwlock_rdlock(&slot->lock);
		image = slot->image;
		if (image)
			gw_image_ref(image);
		pthread_rwlock_unlock(&slot->lock);
		serve_slot_unref(slot);
	}
	return image;
}

static void answer(struct serve_stream *stream, const struct gw_image *image,
		   const struct gw_wire_extent *extents, size_t extent_count)
{
	const size_t cap = RECORD_LEN_MAX + extent_count * EXTENT_LEN_MAX;
	uint8_t *data = malloc(cap);
	ssize_t len = -ENOMEM;

	if (data)
		len = gw_describe_response_encode(gw_image_record(image), extents, extent_count,
						  data, cap);
	if (len < 0 || serve_send_block(stream, data, (size_t)len))
		serve_stream_end(stream, GW_GRPC_RESOURCE_EXHAUSTED, "MEMORY: no room to answer");
	else
		serve_stream_end(stream, GW_GRPC_OK, "%s", "");
	free(data);
}

void serve_describe_answer(struct serve_stream *stream)
{
	struct gw_wire_extent *extents = NULL;
	struct gw_image *image;
	int64_t count = 0;

	if (!stream->asked) {
		serve_stream_end(stream, GW_GRPC_INVALID_ARGUMENT,
				 "MESSAGE_MISSING: the stream ended without a request");
		return;
	}
	image = image_of(stream);
	if (!image) {
		serve_stream_end(stream, GW_GRPC_NOT_FOUND, "IMAGE_UNKNOWN: %s is not served here",
				 stream->image_id);
		return;
	}
	if (stream->conn->serve->tls && gw_image_access(image)->destination[0] &&
	    !gw_tls_peer_is(gw_grpc_tls(stream->conn->grpc), gw_image_access(image)->destination)) {
		serve_stream_end(stream, GW_GRPC_PERMISSION_DENIED,
				 "WRONG_DESTINATION: %s is another node's", stream->image_id);
		gw_image_unref(image);
		return;
	}
	/* While the guest runs it would be stale before it arrived. */
	if (gw_image_record(image)->state == GW_IMAGE_FROZEN)
		count = gw_image_extents(image, EXTENT_COUNT_MAX, &extents);
	if (count == -ENODATA)
		serve_stream_end(stream, GW_GRPC_DATA_LOSS,
				 "MEMORY_LOST: the memory of %s cannot be read any more",
				 stream->image_id);
	else if (count < 0)
		serve_stream_end(stream, GW_GRPC_RESOURCE_EXHAUSTED, "MEMORY: no room to look");
	else
		answer(stream, image, extents, (size_t)count);
	free(extents);
	gw_image_unref(image);
}
