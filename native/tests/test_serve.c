/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_serve.c - the page server over loopback: every page as it is, each refusal as the proto
 * says, a replaced record in force when put_image returns. Hostile peers: test_serve_hostile.c.
 */
#include "serve_client.h"

#include "serve_lz4.h"

#include <godwit/serve.h>

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>

#define PAGE 4096ul
#define MIB  (1ul << 20)

/* Image offset of the second region: the file has a gap before it. */
#define MEMORY_LEN   (16u * MIB)
#define REGION_0_LEN (6u * MIB)
#define REGION_1_LEN (8u * MIB)
#define IMAGE_LEN    (REGION_0_LEN + REGION_1_LEN)
#define REGION_1_AT  (8u * MIB)

static const struct gw_serve_region regions[] = {
	{.gpa = 0, .size = REGION_0_LEN, .file_offset = 0, .page_size = 4096},
	{.gpa = 1ull << 32, .size = REGION_1_LEN, .file_offset = REGION_1_AT, .page_size = 4096},
};

static uint64_t file_offset(uint64_t offset)
{
	return offset < REGION_0_LEN ? offset : offset - REGION_0_LEN + REGION_1_AT;
}

/* What page `i` of the image is: a hole, allocated zeros, or bytes that tell the page. */
enum page_kind { HOLE, ZEROS, DATA };

static enum page_kind kind_of(uint64_t page)
{
	if (page % 512 >= 300 && page % 512 < 450)
		return HOLE;
	if (page % 16 == 3 || (page % 512 >= 100 && page % 512 < 120))
		return ZEROS;
	return DATA;
}

static void page_bytes(uint64_t page, uint8_t *ret_bytes)
{
	memset(ret_bytes, 0, PAGE);
	if (kind_of(page) != DATA)
		return;
	for (size_t i = 0; i < PAGE; i += 8) {
		const uint64_t word = page * 1000003 + i;

		memcpy(ret_bytes + i, &word, 8);
	}
}

static int new_memory(void)
{
	const int fd = memfd_create("test-serve", MFD_CLOEXEC);
	uint8_t bytes[PAGE];

	CHECK(fd >= 0);
	CHECK_EQ(ftruncate(fd, MEMORY_LEN), 0);
	for (uint64_t page = 0; page < IMAGE_LEN / PAGE; page++) {
		if (kind_of(page) == HOLE)
			continue;
		page_bytes(page, bytes);
		CHECK_EQ(pwrite(fd, bytes, PAGE, (off_t)file_offset(page * PAGE)), PAGE);
	}
	return fd;
}

static struct gw_serve_image record_of(int fd, const char *image_id)
{
	return (struct gw_serve_image){.struct_size = sizeof(struct gw_serve_image),
				       .ram_fd = fd,
				       .image_id = image_id,
				       .vm_id = "vm",
				       .boot_id = "boot",
				       .epoch = 5,
				       .generation = 2,
				       .state = GW_IMAGE_FROZEN,
				       .region_count = 2,
				       .regions = regions};
}

struct fixture {
	struct gw_serve *serve;
	uint32_t port;
	int fd;
};

static struct gw_serve_config config_of(uint32_t heartbeat_ms)
{
	return (struct gw_serve_config){.struct_size = sizeof(struct gw_serve_config),
					.listen_host = "127.0.0.1",
					.connection_count_max = 64,
					.heartbeat_ms = heartbeat_ms};
}

static void put(struct fixture *fixture, uint64_t epoch, uint64_t generation,
		enum gw_image_state state)
{
	struct gw_serve_image record = record_of(fixture->fd, "img");

	record.epoch = epoch;
	record.generation = generation;
	record.state = state;
	CHECK_EQ(gw_serve_put_image(fixture->serve, &record), 0);
}

static void set_up(struct fixture *fixture, uint32_t heartbeat_ms)
{
	const struct gw_serve_config config = config_of(heartbeat_ms);

	fixture->fd = new_memory();
	CHECK_EQ(gw_serve_create(&config, &fixture->serve), 0);
	fixture->port = (uint32_t)gw_serve_port(fixture->serve);
	CHECK(fixture->port > 0);
	put(fixture, 5, 2, GW_IMAGE_FROZEN);
	CHECK_EQ(gw_serve_start(fixture->serve), 0);
}

static void tear_down(struct fixture *fixture)
{
	gw_serve_destroy(fixture->serve);
	close(fixture->fd);
}

static struct gw_serve_stats stats_of(const struct fixture *fixture)
{
	struct gw_serve_stats stats;

	CHECK_EQ(gw_serve_stats(fixture->serve, &stats), 0);
	return stats;
}

static uint64_t blocks_of(int fd)
{
	struct stat file;

	CHECK_EQ(fstat(fd, &file), 0);
	return (uint64_t)file.st_blocks;
}

static void check_content(struct client *client, const struct gw_pages *pages)
{
	uint8_t want[PAGE];

	(void)client;
	for (uint64_t at = 0; at < pages->len; at += PAGE) {
		const uint64_t page = (pages->offset + at) / PAGE;

		page_bytes(page, want);
		if (pages->encoding == GW_PAGE_ENCODING_ZERO)
			CHECK(kind_of(page) != DATA);
		else
			CHECK_EQ(memcmp(pages->data.data + at, want, PAGE), 0);
	}
}

static void every_page_is_served_as_it_is(void)
{
	static const uint64_t lens[] = {PAGE, 3 * PAGE, 16 * PAGE, 17 * PAGE, MIB};
	struct fixture fixture;
	struct client client;

	set_up(&fixture, 0);
	const uint64_t blocks = blocks_of(fixture.fd);

	for (size_t i = 0; i < sizeof(lens) / sizeof(lens[0]); i++) {
		const enum gw_page_lane lane = lens[i] == PAGE ? GW_PAGE_LANE_DEMAND
							       : GW_PAGE_LANE_BULK;

		client_start(&client, fixture.port, "img", 6, lane);
		client.on_pages = check_content;
		client.in_order = true;
		for (uint64_t at = 0; at < IMAGE_LEN; at += lens[i])
			client_want(&client, at,
				    at + lens[i] > IMAGE_LEN ? IMAGE_LEN - at : lens[i], 2);
		CHECK_EQ(gw_grpc_call_half_close(client.call), 0);
		client_expect_end(&client, GW_GRPC_OK, "");
		CHECK_EQ(client.answered_len, IMAGE_LEN);
		CHECK(client.raw_count > 0 && client.zero_count > 0);
		CHECK_EQ(client.last.generation, 2);
		CHECK_EQ(client.last.image_state, GW_IMAGE_FROZEN);
		client_close(&client);
	}
	CHECK_EQ(blocks_of(fixture.fd), blocks);

	const struct gw_serve_stats stats = stats_of(&fixture);

	CHECK_EQ(stats.connection_total, 5);
	CHECK_EQ(stats.demand_page_total + stats.bulk_page_total + stats.zero_page_total,
		 5 * IMAGE_LEN / PAGE);
	CHECK_EQ(stats.sent_bytes_total, (stats.demand_page_total + stats.bulk_page_total) * PAGE);
	CHECK(stats.demand_page_total > 0 && stats.bulk_page_total > 0);
	CHECK_EQ(stats.refused_total, 0);
	tear_down(&fixture);
}

/* Zeros travel without bytes: holes always, others where they are worth a message. */
static void zeros_are_told_apart(void)
{
	struct fixture fixture;
	struct client client;

	set_up(&fixture, 0);
	client_start(&client, fixture.port, "img", 6, GW_PAGE_LANE_DEMAND);
	client_want(&client, 3 * PAGE, PAGE, 2); /* one page of zeros, asked for alone */
	CLIENT_UNTIL(&client, client.pages_count == 1);
	CHECK_EQ(client.last.encoding, GW_PAGE_ENCODING_ZERO);
	client_want(&client, 0, 16 * PAGE, 2); /* the same page among data: not worth it */
	CLIENT_UNTIL(&client, client.pages_count == 2);
	CHECK_EQ(client.last.encoding, GW_PAGE_ENCODING_RAW);
	CHECK_EQ(client.last.len, 16 * PAGE);
	/* Data to 100, zeros to 120, data: with a zero page at 99 that goes with the zeros' run. */
	client.in_order = true;
	client.next_offset = 90 * PAGE;
	client_want(&client, 90 * PAGE, 32 * PAGE, 2);
	CLIENT_UNTIL(&client, client.pages_count == 5);
	CHECK_EQ(client.last.offset, 120 * PAGE);
	CHECK_EQ(client.zero_count, 2);
	client_close(&client);
	tear_down(&fixture);
}

#define SPARSE_LEN (64ull << 30)
#define SPARSE_AT  (40ull << 30)

static void start_sparse(struct client *client, uint32_t port, uint64_t zero_run_max)
{
	const struct gw_fetch_request hello = {.kind = GW_FETCH_REQUEST_HELLO,
					       .hello = {.session_id = client_string("s"),
							 .image_id = client_string("sparse"),
							 .epoch = 6,
							 .lane = GW_PAGE_LANE_BULK,
							 .zero_run_max = zero_run_max}};

	client_open(client, port, 4u << 20);
	client_call(client, GW_PAGE_PATH_FETCH);
	client_send(client, &hello);
	CLIENT_UNTIL(client, client->ready_count == 1);
}

/* What one want of the sparse memory is answered with: ZERO of so many bytes. */
static uint64_t sparse_zeros(struct client *client, uint64_t offset, uint64_t len)
{
	const size_t count = client->pages_count;

	client_want(client, offset, len, 2);
	CLIENT_UNTIL(client, client->pages_count == count + 1);
	CHECK_EQ(client->last.offset, offset);
	CHECK_EQ(client->last.encoding, GW_PAGE_ENCODING_ZERO);
	return client->last.len;
}

/* However long a hole is, it is one message, if the peer takes that; else it ends with its want. */
static void a_run_of_zeros_is_one_message(void)
{
	/* One page of data in 64 GiB, in a second region whose pages are of 2 MiB. */
	static const struct gw_serve_region sparse[] = {
		{.gpa = 0, .size = 8ull << 30, .file_offset = 0, .page_size = 4096},
		{.gpa = 1ull << 40,
		 .size = SPARSE_LEN - (8ull << 30),
		 .file_offset = 8ull << 30,
		 .page_size = 2u << 20},
	};
	const int fd = memfd_create("test-sparse", MFD_CLOEXEC);
	struct gw_serve_image record = record_of(fd, "sparse");
	struct fixture fixture;
	struct client client;

	record.regions = sparse;
	CHECK_EQ(ftruncate(fd, (off_t)SPARSE_LEN), 0);
	CHECK_EQ(pwrite(fd, "x", 1, (off_t)(SPARSE_AT + 5 * PAGE)), 1);
	set_up(&fixture, 0);
	CHECK_EQ(gw_serve_put_image(fixture.serve, &record), 0);

	start_sparse(&client, fixture.port, UINT64_MAX);
	/* Up to the page of the guest that has data, not into it. */
	CHECK_EQ(sparse_zeros(&client, 0, MIB), SPARSE_AT);
	CHECK_EQ(sparse_zeros(&client, SPARSE_AT - 2 * MIB, MIB), 2 * MIB);
	CHECK_EQ(sparse_zeros(&client, SPARSE_AT + MIB, MIB), SPARSE_LEN - SPARSE_AT - MIB);
	CHECK_EQ(sparse_zeros(&client, SPARSE_LEN - MIB, MIB), MIB);
	/* A want that begins with data: that, and what follows, on beyond the want. */
	client_want(&client, SPARSE_AT, MIB, 2);
	CLIENT_UNTIL(&client, client.raw_count == 1 && client.next_offset == SPARSE_LEN);
	CHECK_EQ(client.raw_count, 1);
	/* A short want is read and not looked around. */
	CHECK_EQ(sparse_zeros(&client, 0, PAGE), PAGE);
	client_close(&client);

	start_sparse(&client, fixture.port, 3 * MIB + 1);
	CHECK_EQ(sparse_zeros(&client, 0, MIB), 3 * MIB);
	client_close(&client);

	start_sparse(&client, fixture.port, 0);
	CHECK_EQ(sparse_zeros(&client, 0, MIB), MIB);
	CHECK_EQ(gw_grpc_call_half_close(client.call), 0);
	client_expect_end(&client, GW_GRPC_OK, "");
	client_close(&client);
	CHECK_EQ(blocks_of(fd), PAGE / 512);
	close(fd);
	tear_down(&fixture);
}

/* The whole image `repeat` times; what the stream has packed of it must be the same memory. */
static void read_with_lz4(struct client *client, uint32_t port, enum gw_page_lane lane,
			  size_t repeat)
{
	const struct gw_fetch_request hello = {.kind = GW_FETCH_REQUEST_HELLO,
					       .hello = {.session_id = client_string("s"),
							 .image_id = client_string("img"),
							 .epoch = 6,
							 .lane = lane,
							 .accepts_lz4 = true}};

	client_open(client, port, 4u << 20);
	client->on_pages = check_content;
	client_call(client, GW_PAGE_PATH_FETCH);
	client_send(client, &hello);
	for (size_t i = 0; i < repeat; i++) {
		for (uint64_t at = 0; at < IMAGE_LEN; at += MIB)
			client_want(client, at, MIB, 2);
	}
	CHECK_EQ(gw_grpc_call_half_close(client->call), 0);
	client_expect_end(client, GW_GRPC_OK, "");
	CHECK_EQ(client->answered_len, repeat * IMAGE_LEN);
}

/* Only who says so, only on bulk, and only in the second half of a trial, unless it has won that. */
static void what_is_packed_is_the_same_memory(void)
{
	const size_t trials = 4 * SERVE_LZ4_TRIAL_LEN / IMAGE_LEN + 1;
	struct fixture fixture;
	struct client client;

	set_up(&fixture, 0);
	read_with_lz4(&client, fixture.port, GW_PAGE_LANE_BULK, trials);
	CHECK(client.lz4_count > 0);
	CHECK(client.raw_count > 0);
	CHECK(client.received_len < client.answered_len);
	CHECK_EQ(stats_of(&fixture).sent_bytes_total, client.received_len);
	client_close(&client);
	read_with_lz4(&client, fixture.port, GW_PAGE_LANE_DEMAND, trials);
	CHECK_EQ(client.lz4_count, 0);
	client_close(&client);
	tear_down(&fixture);
}

struct refusal {
	const char *what;
	int status;
	const char *reason;
	struct gw_fetch_request requests[3];
	size_t request_count;
};

#define HELLO(session, image, epoch_, lane_)                          \
	{                                                             \
		.kind = GW_FETCH_REQUEST_HELLO, .hello = {            \
			.session_id = {session, sizeof(session) - 1}, \
			.image_id = {image, sizeof(image) - 1},       \
			.epoch = epoch_,                              \
			.lane = lane_                                 \
		}                                                     \
	}
#define GOOD_HELLO HELLO("s", "img", 6, GW_PAGE_LANE_BULK)
#define WANT(offset_, len_, generation_)                 \
	{                                                \
		.kind = GW_FETCH_REQUEST_WANT, .want = { \
			.offset = offset_,               \
			.len = len_,                     \
			.generation = generation_        \
		}                                        \
	}
#define BEAT                                                                      \
	{                                                                         \
		.kind = GW_FETCH_REQUEST_HEARTBEAT, .heartbeat = {.sequence = 1 } \
	}
#define LONG_ID                                                                    \
	"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" \
	"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"

static const struct refusal refusals[] = {
	{"a want first", GW_GRPC_INVALID_ARGUMENT, "HELLO_MISSING", {WANT(0, PAGE, 2)}, 1},
	{"a heartbeat first", GW_GRPC_INVALID_ARGUMENT, "HELLO_MISSING", {BEAT}, 1},
	{"no message", GW_GRPC_INVALID_ARGUMENT, "HELLO_MISSING", {BEAT}, 0},
	{"a second hello", GW_GRPC_INVALID_ARGUMENT, "HELLO_REPEATED", {GOOD_HELLO, GOOD_HELLO}, 2},
	{"no session",
	 GW_GRPC_INVALID_ARGUMENT,
	 "HELLO_MALFORMED: session_id",
	 {HELLO("", "img", 6, 1)},
	 1},
	{"a session with a space",
	 GW_GRPC_INVALID_ARGUMENT,
	 "HELLO_MALFORMED: session_id",
	 {HELLO("a b", "img", 6, 1)},
	 1},
	{"a long session",
	 GW_GRPC_INVALID_ARGUMENT,
	 "HELLO_MALFORMED: session_id",
	 {HELLO(LONG_ID, "img", 6, 1)},
	 1},
	{"no image",
	 GW_GRPC_INVALID_ARGUMENT,
	 "HELLO_MALFORMED: image_id",
	 {HELLO("s", "", 6, 1)},
	 1},
	{"an image outside",
	 GW_GRPC_INVALID_ARGUMENT,
	 "HELLO_MALFORMED: image_id",
	 {HELLO("s", "../etc", 6, 1)},
	 1},
	{"a long image",
	 GW_GRPC_INVALID_ARGUMENT,
	 "HELLO_MALFORMED: image_id",
	 {HELLO("s", LONG_ID, 6, 1)},
	 1},
	{"no epoch",
	 GW_GRPC_INVALID_ARGUMENT,
	 "HELLO_MALFORMED: epoch",
	 {HELLO("s", "img", 0, 1)},
	 1},
	{"no lane",
	 GW_GRPC_INVALID_ARGUMENT,
	 "HELLO_MALFORMED: lane",
	 {HELLO("s", "img", 6, 0)},
	 1},
	{"a lane of later",
	 GW_GRPC_INVALID_ARGUMENT,
	 "HELLO_MALFORMED: lane",
	 {HELLO("s", "img", 6, 3)},
	 1},
	{"an unknown image", GW_GRPC_NOT_FOUND, "IMAGE_UNKNOWN", {HELLO("s", "img2", 6, 1)}, 1},
	{"the image's epoch",
	 GW_GRPC_FAILED_PRECONDITION,
	 "STALE_EPOCH",
	 {HELLO("s", "img", 5, 1)},
	 1},
	{"an epoch below",
	 GW_GRPC_FAILED_PRECONDITION,
	 "STALE_EPOCH",
	 {HELLO("s", "img", 1, 1)},
	 1},
	{"the last generation",
	 GW_GRPC_FAILED_PRECONDITION,
	 "STALE_GENERATION",
	 {GOOD_HELLO, WANT(0, PAGE, 1)},
	 2},
	{"the next generation",
	 GW_GRPC_FAILED_PRECONDITION,
	 "STALE_GENERATION",
	 {GOOD_HELLO, WANT(0, PAGE, 3)},
	 2},
	{"no generation",
	 GW_GRPC_INVALID_ARGUMENT,
	 "WANT_MALFORMED",
	 {GOOD_HELLO, WANT(0, PAGE, 0)},
	 2},
	{"no length", GW_GRPC_INVALID_ARGUMENT, "WANT_MALFORMED", {GOOD_HELLO, WANT(0, 0, 2)}, 2},
	{"half a page",
	 GW_GRPC_INVALID_ARGUMENT,
	 "WANT_MALFORMED",
	 {GOOD_HELLO, WANT(0, PAGE / 2, 2)},
	 2},
	{"an offset within a page",
	 GW_GRPC_INVALID_ARGUMENT,
	 "WANT_MALFORMED",
	 {GOOD_HELLO, WANT(1, PAGE, 2)},
	 2},
	{"too long",
	 GW_GRPC_INVALID_ARGUMENT,
	 "WANT_MALFORMED",
	 {GOOD_HELLO, WANT(0, MIB + PAGE, 2)},
	 2},
	{"far too long",
	 GW_GRPC_INVALID_ARGUMENT,
	 "WANT_MALFORMED",
	 {GOOD_HELLO, WANT(0, UINT64_MAX - PAGE + 1, 2)},
	 2},
	{"behind the end",
	 GW_GRPC_OUT_OF_RANGE,
	 "WANT_OUT_OF_RANGE",
	 {GOOD_HELLO, WANT(IMAGE_LEN, PAGE, 2)},
	 2},
	{"across the end",
	 GW_GRPC_OUT_OF_RANGE,
	 "WANT_OUT_OF_RANGE",
	 {GOOD_HELLO, WANT(IMAGE_LEN - PAGE, 2 * PAGE, 2)},
	 2},
	{"around the end of numbers",
	 GW_GRPC_OUT_OF_RANGE,
	 "WANT_OUT_OF_RANGE",
	 {GOOD_HELLO, WANT(UINT64_MAX - PAGE + 1, 2 * PAGE, 2)},
	 2},
};

static void each_wrong_request_ends_with_its_status(void)
{
	struct fixture fixture;

	set_up(&fixture, 0);
	for (size_t i = 0; i < sizeof(refusals) / sizeof(refusals[0]); i++) {
		const struct refusal *refusal = &refusals[i];
		struct client client;

		client_open(&client, fixture.port, 1u << 20);
		client_call(&client, GW_PAGE_PATH_FETCH);
		for (size_t k = 0; k < refusal->request_count; k++)
			client_send(&client, &refusal->requests[k]);
		if (refusal->request_count == 0)
			CHECK_EQ(gw_grpc_call_half_close(client.call), 0);
		CLIENT_UNTIL(&client, client.end_count > 0);
		if (client.status != refusal->status)
			fprintf(stderr, "%s\n", refusal->what);
		client_expect_end(&client, refusal->status, refusal->reason);
		CHECK_EQ(client.pages_count, 0);
		/* The connection is as good as before. */
		client.end_count = 0;
		client_call(&client, GW_PAGE_PATH_FETCH);
		client_hello(&client, "img", 6, GW_PAGE_LANE_DEMAND);
		client_want(&client, 0, PAGE, 2);
		CLIENT_UNTIL(&client, client.pages_count == 1);
		client_close(&client);
	}
	CHECK_EQ(stats_of(&fixture).refused_total, sizeof(refusals) / sizeof(refusals[0]));
	tear_down(&fixture);
}

static void what_was_asked_before_an_error_is_answered(void)
{
	struct fixture fixture;
	struct client client;

	set_up(&fixture, 0);
	client_start(&client, fixture.port, "img", 6, GW_PAGE_LANE_BULK);
	client.on_pages = check_content;
	client.in_order = true;
	for (uint64_t at = 0; at < 4 * MIB; at += MIB)
		client_want(&client, at, MIB, 2);
	client_want(&client, 0, PAGE, 1);
	client_want(&client, 0, PAGE, 2);
	client_expect_end(&client, GW_GRPC_FAILED_PRECONDITION, "STALE_GENERATION");
	CHECK_EQ(client.answered_len, 4 * MIB);
	client_close(&client);
	tear_down(&fixture);
}

static void describe(struct client *client, const char *image_id)
{
	const struct gw_wire_string id = client_string(image_id);
	uint8_t data[256];
	const ssize_t len = gw_describe_request_encode(&id, data, sizeof(data));

	client->end_count = 0;
	client_call(client, GW_PAGE_PATH_DESCRIBE_IMAGE);
	gw_grpc_call_set_user(client->call, client);
	CHECK_EQ(gw_grpc_call_send(client->call, NULL, 0, data, (size_t)len, NULL), 0);
	CHECK_EQ(gw_grpc_call_half_close(client->call), 0);
	CLIENT_UNTIL(client, client->end_count > 0);
}

static void describe_tells_the_record_and_where_data_is(void)
{
	struct gw_describe_response response;
	struct gw_wire_extent extent;
	struct fixture fixture;
	struct client client;
	size_t cursor = 0;
	uint64_t page = 0;

	set_up(&fixture, 0);
	client_open(&client, fixture.port, 1u << 20);
	describe(&client, "img");
	CHECK_EQ(client.status, GW_GRPC_OK);
	CHECK_EQ(gw_describe_response_decode(client.describe, client.describe_len, &response), 0);
	CHECK_EQ(response.image.generation, 2);
	CHECK_EQ(response.image.epoch, 5);
	CHECK_EQ(response.image.state, GW_IMAGE_FROZEN);
	CHECK_EQ(response.image.region_count, 2);
	CHECK_EQ(response.image.regions[1].size, REGION_1_LEN);
	while (gw_describe_response_next(client.describe, client.describe_len, &cursor, &extent) >
	       0) {
		for (; page < extent.offset / PAGE; page++)
			CHECK_EQ(kind_of(page), HOLE);
		for (; page < (extent.offset + extent.len) / PAGE; page++)
			CHECK(kind_of(page) != HOLE);
	}
	for (; page < IMAGE_LEN / PAGE; page++)
		CHECK_EQ(kind_of(page), HOLE);
	put(&fixture, 5, 3, GW_IMAGE_LIVE);
	describe(&client, "img");
	CHECK_EQ(gw_describe_response_decode(client.describe, client.describe_len, &response), 0);
	CHECK_EQ(response.image.state, GW_IMAGE_LIVE);
	CHECK_EQ(response.extent_count, 0);
	describe(&client, "no");
	client_expect_end(&client, GW_GRPC_NOT_FOUND, "IMAGE_UNKNOWN");
	describe(&client, "a/b");
	client_expect_end(&client, GW_GRPC_INVALID_ARGUMENT, "IMAGE_ID_MALFORMED");
	describe(&client, "");
	client_expect_end(&client, GW_GRPC_INVALID_ARGUMENT, "IMAGE_ID_MALFORMED");
	client.end_count = 0;
	client_call(&client, "/godwit.page.v1.PageService/Burn");
	client_expect_end(&client, GW_GRPC_UNIMPLEMENTED, "METHOD_UNKNOWN");
	client_close(&client);
	tear_down(&fixture);
}

static void a_replaced_record_is_in_force_at_once(void)
{
	struct fixture fixture;
	struct client client;

	set_up(&fixture, 0);
	client_start(&client, fixture.port, "img", 6, GW_PAGE_LANE_DEMAND);
	client_want(&client, 0, PAGE, 2);
	CLIENT_UNTIL(&client, client.pages_count == 1);
	put(&fixture, 5, 3, GW_IMAGE_LIVE);
	client_want(&client, 0, PAGE, 3);
	CLIENT_UNTIL(&client, client.pages_count == 2);
	CHECK_EQ(client.last.generation, 3);
	CHECK_EQ(client.last.image_state, GW_IMAGE_LIVE);
	put(&fixture, 5, 4, GW_IMAGE_FROZEN);
	CHECK_EQ(gw_serve_image_stream_count(fixture.serve, "img"), 1);
	client_want(&client, 0, PAGE, 3);
	client_expect_end(&client, GW_GRPC_FAILED_PRECONDITION, "STALE_GENERATION");
	client_close(&client);
	/* The guest has come back under a higher epoch: this destination's is not above it now. */
	client_start(&client, fixture.port, "img", 6, GW_PAGE_LANE_DEMAND);
	put(&fixture, 6, 4, GW_IMAGE_FROZEN);
	client_want(&client, 0, PAGE, 4);
	client_expect_end(&client, GW_GRPC_FAILED_PRECONDITION, "STALE_EPOCH");
	client_close(&client);
	tear_down(&fixture);
}

struct putter {
	struct fixture *fixture;
	atomic_bool returned;
};

static void *put_generation_3(void *argument)
{
	struct putter *putter = argument;

	put(putter->fixture, 5, 3, GW_IMAGE_LIVE);
	atomic_store(&putter->returned, true);
	return NULL;
}

/*
 * A message is in the making: read, not yet queued. put_image must not return before it is
 * queued, or a page stamped FROZEN would be made while the guest runs again.
 */
static void put_image_waits_for_the_message(void)
{
	const struct timespec while_wrong = {.tv_nsec = 1000000};
	struct fixture fixture;
	struct putter putter = {.fixture = &fixture};
	struct client client;
	pthread_t thread;

	set_up(&fixture, 0);
	client_start(&client, fixture.port, "img", 6, GW_PAGE_LANE_DEMAND);
	gw_hook_hold("serve.read");
	client_want(&client, 0, PAGE, 2);
	client_want(&client, PAGE, PAGE, 2);
	CHECK_EQ(gw_grpc_flush(client.conn), 0);
	CHECK(gw_hook_wait("serve.read", 1, CLIENT_WAIT_MS));
	gw_hook_hold("serve.put");
	CHECK_EQ(pthread_create(&thread, NULL, put_generation_3, &putter), 0);
	CHECK(gw_hook_wait("serve.put", 1, CLIENT_WAIT_MS));
	gw_hook_release("serve.put");
	/* A time that a wrong put_image would need to get through; a right one never does. */
	for (size_t i = 0; i < 50; i++) {
		CHECK(!atomic_load(&putter.returned));
		nanosleep(&while_wrong, NULL);
	}
	gw_hook_release("serve.read");
	CHECK_EQ(pthread_join(thread, NULL), 0);
	/* The first is stamped as it was read; the second came after, or was read before as well. */
	client_expect_end(&client, GW_GRPC_FAILED_PRECONDITION, "STALE_GENERATION");
	CHECK(client.pages_count >= 1);
	CHECK_EQ(client.last.generation, 2);
	client_close(&client);
	tear_down(&fixture);
}

static void a_removed_image_ends_its_streams(void)
{
	struct fixture fixture;
	struct client idle;
	struct client other;

	set_up(&fixture, 0);
	const struct gw_serve_image record = record_of(fixture.fd, "other");

	CHECK_EQ(gw_serve_put_image(fixture.serve, &record), 0);
	client_start(&idle, fixture.port, "img", 6, GW_PAGE_LANE_DEMAND);
	client_start(&other, fixture.port, "other", 6, GW_PAGE_LANE_DEMAND);
	CHECK_EQ(gw_serve_image_stream_count(fixture.serve, "img"), 1);
	CHECK_EQ(gw_serve_remove_image(fixture.serve, "img"), 0);
	CHECK_EQ(gw_serve_remove_image(fixture.serve, "img"), -ENOENT);
	CHECK_EQ(gw_serve_image_stream_count(fixture.serve, "img"), -ENOENT);
	client_expect_end(&idle, GW_GRPC_NOT_FOUND, "IMAGE_UNKNOWN");
	client_want(&other, 0, PAGE, 2);
	CLIENT_UNTIL(&other, other.pages_count == 1);
	/* It may come again. */
	put(&fixture, 5, 9, GW_IMAGE_FROZEN);
	client_close(&idle);
	client_start(&idle, fixture.port, "img", 6, GW_PAGE_LANE_DEMAND);
	CHECK_EQ(idle.ready_generation, 9);
	client_close(&idle);
	client_close(&other);
	tear_down(&fixture);
}

static void lost_memory_is_data_loss_of_one_image(void)
{
	struct fixture fixture;
	struct client client;
	const int fd = new_memory();

	set_up(&fixture, 0);
	const struct gw_serve_image record = record_of(fd, "cut");

	CHECK_EQ(gw_serve_put_image(fixture.serve, &record), 0);
	client_start(&client, fixture.port, "cut", 6, GW_PAGE_LANE_BULK);
	client_want(&client, 0, MIB, 2);
	CLIENT_UNTIL(&client, client.answered_len == MIB);
	CHECK_EQ(ftruncate(fd, 2 * MIB), 0);
	client_want(&client, MIB, MIB, 2);
	client_want(&client, 2 * MIB, MIB, 2);
	client_expect_end(&client, GW_GRPC_DATA_LOSS, "MEMORY_LOST");
	CHECK_EQ(client.answered_len, 2 * MIB);
	describe(&client, "cut");
	client_expect_end(&client, GW_GRPC_DATA_LOSS, "MEMORY_LOST");
	client_close(&client);
	client_start(&client, fixture.port, "img", 6, GW_PAGE_LANE_BULK);
	client_want(&client, 0, MIB, 2);
	CLIENT_UNTIL(&client, client.answered_len == MIB);
	client_close(&client);
	close(fd);
	tear_down(&fixture);
}

static void no_room_to_read_is_no_data_loss(void)
{
	struct fixture fixture;
	struct client client;

	set_up(&fixture, 0);
	client_start(&client, fixture.port, "img", 6, GW_PAGE_LANE_DEMAND);
	gw_sys_fail_nth(GW_SYS_PREAD, 1, ENOMEM);
	client_want(&client, 0, PAGE, 2);
	client_expect_end(&client, GW_GRPC_UNAVAILABLE, "MEMORY");
	gw_sys_fail_none();
	client_close(&client);
	client_start(&client, fixture.port, "img", 6, GW_PAGE_LANE_DEMAND);
	client_want(&client, 0, PAGE, 2);
	CLIENT_UNTIL(&client, client.pages_count == 1);
	client_close(&client);
	tear_down(&fixture);
}

static void nobody_who_is_answered_gets_heartbeats(void)
{
	struct fixture fixture;
	struct client client;

	set_up(&fixture, 60000);
	client_start(&client, fixture.port, "img", 6, GW_PAGE_LANE_DEMAND);
	for (uint64_t page = 0; page < 20; page++) {
		client_want(&client, page * PAGE, PAGE, 2);
		CLIENT_UNTIL(&client, client.pages_count == page + 1);
	}
	CHECK_EQ(client.heartbeat_count, 0);
	client_close(&client);
	tear_down(&fixture);
}

static void core_is_taken(void *argument)
{
	(void)argument;
	(void)nanosleep(&(struct timespec){.tv_nsec = 2000000}, NULL);
}

static void want_one_by_one(struct fixture *fixture, enum gw_page_lane lane)
{
	struct client client;

	client_start(&client, fixture->port, "img", 6, lane);
	for (uint64_t i = 0; i < 300; i++) {
		client_want(&client, i % (IMAGE_LEN / PAGE) * PAGE, PAGE, 2);
		CLIENT_UNTIL(&client, client.pages_count == i + 1);
	}
	client_close(&client);
}

/*
 * Whoever looks for the next want on a core that others want finds out once, and sleeps for a second. Bulk
 * never looks.
 */
static void a_crowded_host_is_not_looked_away(void)
{
	struct fixture fixture;

	set_up(&fixture, 60000);
	gw_hook_call("serve.yielded", core_is_taken, NULL);
	want_one_by_one(&fixture, GW_PAGE_LANE_BULK);
	CHECK_EQ(gw_hook_reach_count("serve.yielded"), 0);
	const uint64_t begin_ns = gw_sys_now_ns();

	want_one_by_one(&fixture, GW_PAGE_LANE_DEMAND);
	const uint64_t passed_s = (gw_sys_now_ns() - begin_ns) / 1000000000;

	CHECK(gw_hook_reach_count("serve.yielded") <= passed_s + 2);
	gw_hook_call("serve.yielded", NULL, NULL);
	tear_down(&fixture);
}

static void silence_is_answered_with_heartbeats_and_then_given_up(void)
{
	const struct gw_fetch_request beat = BEAT;
	struct fixture fixture;
	struct client client;

	set_up(&fixture, 250);
	client_start(&client, fixture.port, "img", 6, GW_PAGE_LANE_DEMAND);
	/* As long as we answer it goes on: several times the silence that would end it. */
	while (client.heartbeat_count < 5) {
		const size_t before = client.heartbeat_count;

		client_send(&client, &beat);
		CLIENT_UNTIL(&client, client.heartbeat_count > before || client.end_count);
		CHECK_EQ(client.end_count, 0);
	}
	client_expect_end(&client, GW_GRPC_UNAVAILABLE, "PEER_SILENT");
	CHECK(client.heartbeat_count >= 5);
	client_close(&client);
	tear_down(&fixture);
}

static void a_draining_server_finishes_what_is_open(void)
{
	struct fixture fixture;
	struct client client;
	struct client late;

	set_up(&fixture, 0);
	client_start(&client, fixture.port, "img", 6, GW_PAGE_LANE_DEMAND);
	CHECK_EQ(gw_serve_drain(fixture.serve), 0);
	client_want(&client, 0, PAGE, 2);
	CLIENT_UNTIL(&client, client.pages_count == 1);
	/* A new connection, and a new stream on the old one. */
	client_open(&late, fixture.port, 1u << 20);
	client_call(&late, GW_PAGE_PATH_FETCH);
	client_hello(&late, "img", 6, GW_PAGE_LANE_DEMAND);
	client_expect_end(&late, GW_GRPC_UNAVAILABLE, "");
	client_close(&late);
	struct gw_grpc_call *old = client.call;

	client.ready_count = 1;
	const struct gw_grpc_call_options options = {.path = GW_PAGE_PATH_FETCH,
						     .authority = "a:1"};

	CHECK_EQ(gw_grpc_call_open(client.conn, &options, &client.call), 0);
	client_expect_end(&client, GW_GRPC_UNAVAILABLE, "DRAINING");
	client.call = old;
	client_want(&client, 0, PAGE, 2);
	CLIENT_UNTIL(&client, client.pages_count == 2);
	client_close(&client);
	tear_down(&fixture);
}

static void connections_are_bounded(void)
{
	struct gw_serve_config config = config_of(0);
	struct fixture fixture = {.fd = new_memory()};
	struct client clients[3];

	config.connection_count_max = 2;
	CHECK_EQ(gw_serve_create(&config, &fixture.serve), 0);
	fixture.port = (uint32_t)gw_serve_port(fixture.serve);
	put(&fixture, 5, 2, GW_IMAGE_FROZEN);
	CHECK_EQ(gw_serve_start(fixture.serve), 0);
	CHECK_EQ(gw_serve_start(fixture.serve), -EALREADY);
	client_start(&clients[0], fixture.port, "img", 6, GW_PAGE_LANE_DEMAND);
	client_start(&clients[1], fixture.port, "img", 6, GW_PAGE_LANE_BULK);
	client_open(&clients[2], fixture.port, 1u << 20);
	client_call(&clients[2], GW_PAGE_PATH_FETCH);
	client_expect_end(&clients[2], GW_GRPC_UNAVAILABLE, "");
	client_close(&clients[2]);
	client_close(&clients[0]);
	/* A place is free when the server has seen the end. */
	for (bool served = false; !served;) {
		client_open(&clients[0], fixture.port, 1u << 20);
		client_call(&clients[0], GW_PAGE_PATH_FETCH);
		client_hello(&clients[0], "img", 6, GW_PAGE_LANE_DEMAND);
		CLIENT_UNTIL(&clients[0], clients[0].ready_count || clients[0].end_count);
		served = clients[0].ready_count > 0;
		client_close(&clients[0]);
	}
	client_close(&clients[1]);
	tear_down(&fixture);
}

static void destroy_hangs_up_on_everybody(void)
{
	struct fixture fixture;
	struct client idle;
	struct client busy;

	set_up(&fixture, 0);
	client_start(&idle, fixture.port, "img", 6, GW_PAGE_LANE_DEMAND);
	client_start(&busy, fixture.port, "img", 6, GW_PAGE_LANE_BULK);
	for (uint64_t k = 0; k < 1000; k++)
		client_want(&busy, k % 14 * MIB, MIB, 2);
	CLIENT_UNTIL(&busy, busy.pages_count > 0);
	tear_down(&fixture);
	client_expect_end(&idle, GW_GRPC_UNAVAILABLE, "CONNECTION_LOST");
	client_expect_end(&busy, GW_GRPC_UNAVAILABLE, "CONNECTION_LOST");
	client_close(&idle);
	client_close(&busy);
}

struct reader {
	struct fixture *fixture;
	enum gw_page_lane lane;
	uint64_t answered_len;
};

/* Reads the image again and again under whatever generation is in force. */
static void *read_all(void *argument)
{
	struct reader *reader = argument;

	for (size_t round = 0; round < 6; round++) {
		const uint64_t step = reader->lane == GW_PAGE_LANE_DEMAND ? PAGE * 8 : MIB;
		struct client client;

		client_start(&client, reader->fixture->port, "img", 6, reader->lane);
		client.on_pages = check_content;
		for (uint64_t at = 0; at < IMAGE_LEN; at += step)
			client_want(&client, at, step, client.ready_generation);
		CHECK_EQ(gw_grpc_call_half_close(client.call), 0);
		CLIENT_UNTIL(&client, client.end_count > 0);
		CHECK(client.status == GW_GRPC_OK || client.status == GW_GRPC_FAILED_PRECONDITION);
		reader->answered_len += client.answered_len;
		client_close(&client);
	}
	return NULL;
}

/* Many readers, records replaced under them: for TSan, and every byte is right all the same. */
static void records_are_replaced_under_readers(void)
{
	struct reader readers[4];
	pthread_t threads[4];
	struct fixture fixture;

	set_up(&fixture, 0);
	for (size_t i = 0; i < 4; i++) {
		readers[i] = (struct reader){
			.fixture = &fixture,
			.lane = i % 2 ? GW_PAGE_LANE_BULK : GW_PAGE_LANE_DEMAND,
		};
		CHECK_EQ(pthread_create(&threads[i], NULL, read_all, &readers[i]), 0);
	}
	for (uint64_t generation = 3; generation < 40; generation++) {
		put(&fixture, 5, generation, generation % 2 ? GW_IMAGE_LIVE : GW_IMAGE_FROZEN);
		(void)stats_of(&fixture);
		(void)gw_serve_image_stream_count(fixture.serve, "img");
		sched_yield();
	}
	for (size_t i = 0; i < 4; i++)
		CHECK_EQ(pthread_join(threads[i], NULL), 0);
	tear_down(&fixture);
}

static void bad_configs_are_refused(void)
{
	struct gw_serve_config config = config_of(0);
	struct gw_serve *serve = NULL;
	struct gw_serve *second = NULL;

	CHECK_EQ(gw_serve_create(NULL, &serve), -EINVAL);
	config.struct_size = 4;
	CHECK_EQ(gw_serve_create(&config, &serve), -EINVAL);
	config = config_of(0);
	config.listen_host = "localhost";
	CHECK_EQ(gw_serve_create(&config, &serve), -EINVAL);
	config = config_of(0);
	config.listen_port = 70000;
	CHECK_EQ(gw_serve_create(&config, &serve), -EINVAL);
	config = config_of(0);
	config.connection_count_max = 0;
	CHECK_EQ(gw_serve_create(&config, &serve), -EINVAL);
	config.connection_count_max = 1025;
	CHECK_EQ(gw_serve_create(&config, &serve), -EINVAL);
	CHECK(!serve);
	config = config_of(0);
	CHECK_EQ(gw_serve_create(&config, &serve), 0);
	config.listen_port = (uint32_t)gw_serve_port(serve);
	CHECK_EQ(gw_serve_create(&config, &second), -EADDRINUSE);
	CHECK_EQ(gw_serve_put_image(serve, NULL), -EINVAL);
	gw_serve_destroy(serve);
	gw_serve_destroy(NULL);
}

int main(void)
{
	RUN(every_page_is_served_as_it_is);
	RUN(zeros_are_told_apart);
	RUN(a_run_of_zeros_is_one_message);
	RUN(what_is_packed_is_the_same_memory);
	RUN(each_wrong_request_ends_with_its_status);
	RUN(what_was_asked_before_an_error_is_answered);
	RUN(describe_tells_the_record_and_where_data_is);
	RUN(a_replaced_record_is_in_force_at_once);
	RUN(put_image_waits_for_the_message);
	RUN(a_removed_image_ends_its_streams);
	RUN(lost_memory_is_data_loss_of_one_image);
	RUN(no_room_to_read_is_no_data_loss);
	RUN(nobody_who_is_answered_gets_heartbeats);
	RUN(a_crowded_host_is_not_looked_away);
	RUN(silence_is_answered_with_heartbeats_and_then_given_up);
	RUN(a_draining_server_finishes_what_is_open);
	RUN(connections_are_bounded);
	RUN(destroy_hangs_up_on_everybody);
	RUN(records_are_replaced_under_readers);
	RUN(bad_configs_are_refused);
	return EXIT_SUCCESS;
}
