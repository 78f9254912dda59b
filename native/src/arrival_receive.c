/* SPDX-License-Identifier: Apache-2.0 */
/*
 * arrival_receive.c - what a page server says, judged before anything of it is used.
 *
 * Threads, Errors, Ownership, Units: see arrival_internal.h.
 * Source     page_service.proto; DESIGN 3.3 and 3.4; I10, I11.
 *
 * In this order: the checksum (nothing in a damaged message means anything), the state and the
 * generation (a LIVE or stale page is never final), the shape, and that it is the answer to what was
 * asked. Whatever is wrong takes the connection with it: the pages stay absent and are asked for
 * again on a new one, with a back-off that only good pages end.
 */
#include "arrival_internal.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include <godwit/page_lz4.h>
#include <godwit/serve.h>
#include <godwit/sys.h>

static void damaged(struct arrival_link *link)
{
	link_fail(link, LINK_DAMAGED);
}

/* --- ready ------------------------------------------------------------------------------------ */

static void on_ready(struct arrival_link *link, const struct gw_page_ready *ready)
{
	struct gw_arrival *const arrival = link->arrival;
	const uint64_t wanted_size = arrival->page_count * arrival->page_size;
	const uint64_t step = arrival->page_size < GW_PAGE_WANT_LEN_MAX ? arrival->page_size
									: GW_PAGE_WANT_LEN_MAX;
	uint64_t size = 0;

	if (link->up) {
		arrival_set_reason(arrival, "the server said ready twice");
		damaged(link);
		return;
	}
	if (ready->image.region_count > GW_PAGE_REGION_COUNT_MAX) {
		arrival_set_reason(arrival, "the image has %u regions", ready->image.region_count);
		link_fail(link, LINK_REFUSED);
		return;
	}
	if (ready->image.image_id.len != strlen(arrival->image_id) ||
	    memcmp(ready->image.image_id.data, arrival->image_id, ready->image.image_id.len) != 0) {
		arrival_set_reason(arrival, "not our image: the server gives %.*s, we asked for %s",
				   (int)(ready->image.image_id.len < 64 ? ready->image.image_id.len
									: 64),
				   ready->image.image_id.data, arrival->image_id);
		atomic_store(&arrival->grpc_status, GW_GRPC_FAILED_PRECONDITION);
		link_fail(link, LINK_REFUSED);
		return;
	}
	for (uint32_t i = 0; i < ready->image.region_count; i++)
		size += ready->image.regions[i].size;
	if (size != wanted_size || ready->image.epoch >= arrival->epoch) {
		arrival_set_reason(arrival,
				   "not our image: %" PRIu64 " bytes of epoch %" PRIu64
				   ", the guest has %" PRIu64 " of epoch %" PRIu64,
				   size, ready->image.epoch, wanted_size, arrival->epoch);
		atomic_store(&arrival->grpc_status, GW_GRPC_FAILED_PRECONDITION);
		link_fail(link, LINK_REFUSED);
		return;
	}
	link->want_len_max = ready->want_max < GW_PAGE_WANT_LEN_MAX ? ready->want_max
								    : GW_PAGE_WANT_LEN_MAX;
	link->want_len_max -= link->want_len_max % step;
	if (link->want_len_max == 0) {
		arrival_set_reason(arrival, "the server answers no want of a whole page: %" PRIu64,
				   ready->want_max);
		link_fail(link, LINK_REFUSED);
		return;
	}
	link_set_up(link);
}

/* --- pages ------------------------------------------------------------------------------------ */

static bool is_intact(struct arrival_link *link, const struct gw_pages *pages)
{
	struct gw_arrival *const arrival = link->arrival;
	const uint64_t generation = gw_page_map_generation(arrival->map);

	if (gw_pages_crc32c(pages) != pages->crc32c) {
		gw_page_map_count(arrival->map, GW_COUNT_CHECKSUM_ERROR, 1);
		arrival_set_reason(arrival,
				   "checksum error at offset %" PRIu64
				   ": the page is fetched again on a new connection",
				   pages->offset);
		return false;
	}
	if (pages->image_state != GW_IMAGE_FROZEN || generation == 0 ||
	    pages->generation != generation) {
		gw_page_map_count(arrival->map, GW_COUNT_STALE_MESSAGE, 1);
		arrival_set_reason(arrival,
				   "refused a page of generation %" PRIu64
				   " in state %d: only FROZEN of generation %" PRIu64
				   " is installed",
				   pages->generation, (int)pages->image_state, generation);
		return false;
	}
	return true;
}

/*
 * A packed message as if it had come plain: before its checksum is looked at, which is over the plain bytes.
 * So nothing is believed here but how much room there is.
 */
static bool unpack(struct arrival_link *link, struct gw_pages *pages)
{
	if (pages->encoding != GW_PAGE_ENCODING_LZ4 || !link->plain)
		return true;
	if (gw_page_lz4_unpack(pages, link->plain, GW_PAGE_WANT_LEN_MAX, pages) == 0)
		return true;
	gw_page_map_count(link->arrival->map, GW_COUNT_CHECKSUM_ERROR, 1);
	arrival_set_reason(link->arrival,
			   "packed pages at offset %" PRIu64
			   " cannot be unpacked: they are fetched again on a new connection",
			   pages->offset);
	return false;
}

/* May a run of zeros go on so far beyond its want? To a page of the guest, within the image. */
static bool may_go_beyond(const struct arrival_link *link, const struct gw_pages *pages)
{
	const struct gw_arrival *const arrival = link->arrival;
	const uint64_t size = arrival->page_count * arrival->page_size;

	return pages->encoding == GW_PAGE_ENCODING_ZERO && pages->len <= link->zero_run_max &&
	       pages->len <= size - pages->offset &&
	       (pages->offset + pages->len) % arrival->page_size == 0;
}

/* Does it have the shape of an answer, and is it the one that is due? */
static bool is_due(struct arrival_link *link, const struct gw_pages *pages)
{
	const struct link_want *const want = &link->wants[link->want_first];
	const bool is_zero = pages->encoding == GW_PAGE_ENCODING_ZERO;
	const bool is_lz4 = pages->encoding == GW_PAGE_ENCODING_LZ4 && link->plain;
	const uint64_t data_len = is_zero ? 0 : pages->len;

	if (pages->encoding != GW_PAGE_ENCODING_RAW && !is_zero && !is_lz4)
		arrival_set_reason(link->arrival, "unknown encoding %d", (int)pages->encoding);
	else if (pages->len == 0 || pages->len % 4096 != 0 || pages->data.len != data_len)
		arrival_set_reason(link->arrival, "an answer of %" PRIu64 " bytes that carries %zu",
				   pages->len, pages->data.len);
	else if (link->want_count == 0 || pages->offset != want->offset + want->done ||
		 (pages->len > want->len - want->done && !may_go_beyond(link, pages)))
		arrival_set_reason(link->arrival,
				   "an answer nobody waits for: offset %" PRIu64 ", %" PRIu64
				   " bytes",
				   pages->offset, pages->len);
	else
		return true;
	return false;
}

/* A page of 2 MiB comes in parts, in order, as its wants are. */
static void put_together(struct arrival_link *link, const struct gw_pages *pages)
{
	const uint64_t page_size = link->arrival->page_size;
	const bool is_zero = pages->encoding == GW_PAGE_ENCODING_ZERO;
	uint64_t offset = pages->offset;
	uint64_t at = 0;

	while (at < pages->len) {
		const uint64_t room = page_size - link->page_len;
		const uint64_t len = room < pages->len - at ? room : pages->len - at;

		if (link->page_len == 0)
			link->page_is_zero = true;
		if (is_zero)
			memset(link->page + link->page_len, 0, len);
		else
			memcpy(link->page + link->page_len, pages->data.data + at, len);
		link->page_is_zero = link->page_is_zero && is_zero;
		link->page_len += len;
		at += len;
		offset += len;
		if (link->page_len == page_size) {
			link->page_len = 0;
			link->handler->on_pages(link->owner, offset / page_size - 1, 1,
						link->page_is_zero ? NULL : link->page);
		}
	}
}

/*
 * Zeros beyond a want. What is left of a page of 2 MiB whose first half the want was is left to its second
 * want, which is on its way already.
 */
static void take_beyond(struct arrival_link *link, uint64_t offset, uint64_t len)
{
	const uint64_t page_size = link->arrival->page_size;
	const uint64_t into = offset % page_size;

	if (into > 0) {
		const uint64_t rest = page_size - into;

		if (len <= rest)
			return;
		offset += rest;
		len -= rest;
	}
	if (link->handler->on_zeros_beyond && len >= page_size)
		link->handler->on_zeros_beyond(link->owner, offset / page_size, len / page_size);
}

static void on_pages(struct arrival_link *link, struct gw_pages *pages)
{
	struct gw_arrival *const arrival = link->arrival;
	const size_t received_len = pages->data.len;

	if (!link->up || !unpack(link, pages) || !is_intact(link, pages) || !is_due(link, pages)) {
		damaged(link);
		return;
	}
	struct link_want *const want = &link->wants[link->want_first];
	const uint64_t left = want->len - want->done;
	struct gw_pages part = *pages;

	/* Zeros beyond the want are told apart: nobody has asked for them. */
	if (part.len > left)
		part.len = left;
	want->done += part.len;
	link->in_flight_bytes -= part.len;
	link->progress_ns = gw_grpc_received_ns(link->conn);
	if (want->done == want->len) {
		link->want_first = (link->want_first + 1) % link->want_cap;
		link->want_count--;
	}
	link->failure_count = 0;
	link->good = true;
	gw_page_map_count(arrival->map, GW_COUNT_RECEIVED_BYTES, received_len);
	if (link->page)
		put_together(link, &part);
	else
		link->handler->on_pages(link->owner, part.offset / arrival->page_size,
					part.len / arrival->page_size,
					part.encoding == GW_PAGE_ENCODING_ZERO ? NULL
									       : part.data.data);
	if (pages->len > part.len)
		take_beyond(link, part.offset + part.len, pages->len - part.len);
}

void link_on_message(struct arrival_link *link, const uint8_t *data, size_t len)
{
	struct gw_fetch_response response;

	if (gw_fetch_response_decode(data, len, &response) < 0) {
		arrival_set_reason(link->arrival, "a message that is no FetchResponse");
		damaged(link);
		return;
	}
	switch (response.kind) {
	case GW_FETCH_RESPONSE_READY:
		on_ready(link, &response.ready);
		break;
	case GW_FETCH_RESPONSE_PAGES:
		on_pages(link, &response.pages);
		break;
	case GW_FETCH_RESPONSE_HEARTBEAT:
		break; /* its bytes were the sign of life */
	case GW_FETCH_RESPONSE_NONE:
	default:
		arrival_set_reason(link->arrival, "a message without a body that we know");
		damaged(link);
		break;
	}
}
