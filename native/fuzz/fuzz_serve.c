/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fuzz_serve.c - a connection of the page server against a client that says anything, in any order, while
 * images come and go: pages are those of the image, in whole pages and with their checksum, nothing
 * comes before ready, and what was opened is let go of.
 *
 * Input: steps of one connection. The HTTP/2 below it is honest: fuzz_grpc.c is about that.
 */
#include "fuzz.h"

/* NOLINTNEXTLINE(bugprone-suspicious-include): its own functions are called */
#include "../src/serve_conn.c"

#include <godwit/page_lz4.h>

#include <sys/socket.h>
#include <unistd.h>

#define CALL_COUNT	4u
#define STEP_COUNT	48
#define PAGE_COUNT	32u
#define MEMORY_LEN	(PAGE_COUNT * (size_t)GW_IMAGE_PAGE_LEN)
#define MESSAGE_LEN_MAX 512u

/* --- the server -------------------------------------------------------------------------------- */

static uint8_t memory[MEMORY_LEN];
static int memory_fd = -1;
static struct gw_serve *serve;
/* The buffers of a connection cost a megabyte: the next input's takes them over. */
static struct serve_buffer buffers[SERVE_BUFFER_COUNT];

static void put_image(uint64_t generation, bool frozen)
{
	const struct gw_serve_region regions[2] = {{.size = MEMORY_LEN / 2, .page_size = 4096},
						   {.gpa = MEMORY_LEN,
						    .size = MEMORY_LEN / 2,
						    .file_offset = MEMORY_LEN / 2,
						    .page_size = 4096}};
	const struct gw_serve_image record = {
		.struct_size = sizeof(record),
		.ram_fd = memory_fd,
		.image_id = "image",
		.vm_id = "vm",
		.boot_id = "boot",
		.epoch = 1,
		.generation = generation,
		.state = frozen ? GW_IMAGE_FROZEN : GW_IMAGE_LIVE,
		.region_count = 2,
		.regions = regions,
	};

	FUZZ_CHECK(gw_serve_put_image(serve, &record) == 0);
}

static void set_up(void)
{
	const struct gw_serve_config config = {.struct_size = sizeof(config),
					       .listen_host = "127.0.0.1",
					       .connection_count_max = 1};

	if (serve)
		return;
	memory_fd = gw_sys_memfd_create("fuzz", MFD_CLOEXEC);
	FUZZ_CHECK(memory_fd >= 0 && ftruncate(memory_fd, (off_t)MEMORY_LEN) == 0);
	/* Pages that can be told apart, with holes of one, four and eight, and one of zeros. */
	for (size_t i = 0; i < PAGE_COUNT; i++) {
		uint8_t *page = memory + i * GW_IMAGE_PAGE_LEN;

		if (i == 3 || (i >= 8 && i < 12) || i >= 24)
			continue;
		if (i != 5)
			memset(page, (int)i + 1, GW_IMAGE_PAGE_LEN);
		if (i % 2)
			page[17] = 0xa5;
		FUZZ_CHECK(pwrite(memory_fd, page, GW_IMAGE_PAGE_LEN,
				  (off_t)(i * GW_IMAGE_PAGE_LEN)) == (ssize_t)GW_IMAGE_PAGE_LEN);
	}
	/* Its thread is never started: connections are made and turned here. */
	FUZZ_CHECK(gw_serve_create(&config, &serve) == 0);
}

/* --- the client -------------------------------------------------------------------------------- */

struct talk {
	struct gw_grpc_call *call; /* NULL: none, or it has ended */
	bool fetches, ready;
};

struct client {
	struct gw_grpc *grpc;
	struct talk talks[CALL_COUNT];
	size_t opened_count, ended_count;
};

static void check_pages(const struct gw_pages *pages)
{
	static uint8_t plain[GW_PAGE_WANT_LEN_MAX];
	struct gw_pages unpacked = *pages;

	FUZZ_CHECK(pages->len > 0 && pages->len % GW_IMAGE_PAGE_LEN == 0);
	FUZZ_CHECK(pages->offset <= MEMORY_LEN && pages->len <= MEMORY_LEN - pages->offset);
	if (pages->encoding == GW_PAGE_ENCODING_LZ4)
		FUZZ_CHECK(gw_page_lz4_unpack(pages, plain, sizeof(plain), &unpacked) == 0);
	FUZZ_CHECK(gw_pages_crc32c(&unpacked) == unpacked.crc32c);
	if (unpacked.encoding == GW_PAGE_ENCODING_ZERO)
		FUZZ_CHECK(gw_bytes_are_zero(memory + pages->offset, pages->len));
	else
		FUZZ_CHECK(unpacked.data.len == pages->len &&
			   memcmp(unpacked.data.data, memory + pages->offset, pages->len) == 0);
}

static void on_answer(void *user, struct gw_grpc_call *call, const uint8_t *data, size_t len)
{
	struct talk *talk = gw_grpc_call_user(call);
	struct gw_describe_response described;
	struct gw_fetch_response response;

	(void)user;
	if (!talk->fetches) {
		FUZZ_CHECK(gw_describe_response_decode(data, len, &described) == 0);
		return;
	}
	FUZZ_CHECK(gw_fetch_response_decode(data, len, &response) == 0);
	FUZZ_CHECK(talk->ready == (response.kind != GW_FETCH_RESPONSE_READY));
	talk->ready = true;
	if (response.kind == GW_FETCH_RESPONSE_PAGES)
		check_pages(&response.pages);
}

static void on_over(void *user, struct gw_grpc_call *call, int status, const char *message)
{
	struct client *client = user;
	struct talk *talk = gw_grpc_call_user(call);

	/* Each refusal of the server has its reason. */
	FUZZ_CHECK(status == GW_GRPC_OK || status == GW_GRPC_CANCELLED || strchr(message, ':') ||
		   message[0]);
	client->ended_count++;
	if (talk)
		talk->call = NULL;
}

static void on_given_back(void *user, void *cookie)
{
	(void)user;
	free(cookie);
}

static const struct gw_grpc_handler client_handler = {
	.on_message = on_answer, .on_sent = on_given_back, .on_end = on_over};

static void open_call(struct client *client, struct talk *talk, uint8_t what)
{
	static const char *const paths[] = {GW_PAGE_PATH_FETCH, GW_PAGE_PATH_DESCRIBE_IMAGE,
					    "/godwit.page.v1.PageService/Other", "/"};
	const struct gw_grpc_call_options options = {.path = paths[what & 3], .authority = "a:1"};

	if (talk->call || gw_grpc_call_open(client->grpc, &options, &talk->call))
		return;
	client->opened_count++;
	talk->fetches = (what & 3) == 0;
	talk->ready = false;
	gw_grpc_call_set_user(talk->call, talk);
}

static void send_bytes(struct talk *talk, const uint8_t *data, size_t len)
{
	uint8_t *copy;

	if (!talk->call)
		return;
	copy = malloc(len + 1);
	FUZZ_CHECK(copy);
	memcpy(copy, data, len);
	/* Nothing of no length is given back. */
	if (len == 0 || gw_grpc_call_send(talk->call, NULL, 0, copy, len, copy))
		free(copy);
}

/* A hello or a want as they ought to be, but for what the input says of their fields. */
static void send_request(struct talk *talk, uint8_t what, struct fuzz_input *input)
{
	uint8_t data[MESSAGE_LEN_MAX];
	struct gw_fetch_request request = {.kind = GW_FETCH_REQUEST_WANT};
	ssize_t len;

	if (what & 1) {
		request.kind = GW_FETCH_REQUEST_HELLO;
		request.hello = (struct gw_page_hello){
			.session_id = {.data = "s", .len = 1},
			.image_id = {.data = "image", .len = 5},
			.epoch = what & 0x10 ? fuzz_take_u64(input) : 9,
			.zero_run_max = what & 8 ? fuzz_take_u64(input) : 0,
			.lane = what & 2 ? GW_PAGE_LANE_BULK : GW_PAGE_LANE_DEMAND,
			.accepts_lz4 = (what & 4) != 0};
	} else {
		request.want.generation = fuzz_take_u8(input) % 4 + 1;
		request.want.offset = GW_IMAGE_PAGE_LEN * fuzz_take_u8(input);
		request.want.len = GW_IMAGE_PAGE_LEN * (fuzz_take_u8(input) % 64);
		if (what & 2)
			request.want.offset ^= fuzz_take_u64(input);
		if (what & 4)
			request.want.len ^= fuzz_take_u64(input);
	}
	len = gw_fetch_request_encode(&request, data, sizeof(data));
	if (len > 0)
		send_bytes(talk, data, (size_t)len);
}

/* --- one connection ---------------------------------------------------------------------------- */

static struct serve_conn *open_conn(int fd, uint64_t now_ns)
{
	struct serve_conn *conn = calloc(1, sizeof(*conn));

	FUZZ_CHECK(conn);
	conn->serve = serve;
	conn->fd = fd;
	conn->life_ns = now_ns;
	conn->now_ns = now_ns;
	if (!buffers[0].data) {
		FUZZ_CHECK(create_buffers(conn) == 0);
		for (size_t i = 0; i < SERVE_BUFFER_COUNT; i++)
			buffers[i].data = conn->buffers[i].data;
	}
	for (size_t i = 0; i < SERVE_BUFFER_COUNT; i++) {
		conn->buffers[i].data = buffers[i].data;
		conn->buffers[i].cookie.buffer = &conn->buffers[i];
	}
	FUZZ_CHECK(create_grpc(conn) == 0);
	return conn;
}

/* What the connection's thread does, and the client's, until neither has anything to say. */
static int turn(struct serve_conn *conn, struct client *client)
{
	bool more = true;
	int err = 0;

	for (int i = 0; i < 64 && !err; i++) {
		(void)gw_grpc_flush(client->grpc);
		more = false;
		err = handle(conn, POLLIN | POLLOUT, &more);
		if (!err)
			err = gw_grpc_on_readable(client->grpc, conn->now_ns);
		if (!more && !is_readable(conn->fd) && !is_readable(gw_grpc_fd(client->grpc)))
			break;
	}
	return err;
}

static void step(struct serve_conn *conn, struct client *client, struct fuzz_input *input)
{
	const uint8_t what = fuzz_take_u8(input);
	const uint8_t more = fuzz_take_u8(input);
	struct talk *talk = &client->talks[(what >> 4) % CALL_COUNT];
	uint8_t bytes[MESSAGE_LEN_MAX];
	size_t len;

	switch (what & 7) {
	case 0:
		open_call(client, talk, more);
		break;
	case 1:
	case 2:
		open_call(client, talk, 0);
		send_request(talk, more, input);
		break;
	case 3:
		len = more;
		fuzz_take(input, bytes, len);
		send_bytes(talk, bytes, len);
		break;
	case 4:
		if (talk->call)
			(void)gw_grpc_call_half_close(talk->call);
		break;
	case 5:
		if (talk->call)
			gw_grpc_call_cancel(talk->call);
		break;
	case 6:
		conn->now_ns += more * 100000000ull;
		break;
	default:
		if (more == 0)
			(void)gw_serve_remove_image(serve, "image");
		else
			put_image(more % 4 + 1, (more & 4) != 0);
		for (struct serve_stream *stream = conn->streams; stream; stream = stream->next) {
			if (stream->kind == SERVE_STREAM_FETCH)
				serve_fetch_recheck(stream);
		}
		break;
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
	struct fuzz_input input = {.data = data, .len = len};
	struct client client = {0};
	const struct gw_grpc_config config = {
		.handler = &client_handler,
		.user = &client,
		.message_len_max = 4u << 20,
		.window_len = 4u << 20,
		.call_count_max = CALL_COUNT,
		.send_queue_count = 64,
	};
	struct gw_serve_stats stats;
	struct serve_conn *conn;
	int fds[2];
	int err = 0;

	set_up();
	put_image(1, true);
	FUZZ_CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, fds) == 0);
	conn = open_conn(fds[0], 1);
	FUZZ_CHECK(gw_grpc_client_create(&config, fds[1], &client.grpc) == 0);
	for (int i = 0; i < STEP_COUNT && !err && input.len > 0; i++) {
		step(conn, &client, &input);
		if (is_given_up(conn))
			break;
		(void)tick(conn, &err);
		if (!err)
			err = turn(conn, &client);
	}
	/* An honest HTTP/2 client has done nothing that ends a connection. */
	FUZZ_CHECK(err == 0);
	gw_grpc_destroy(conn->grpc);
	FUZZ_CHECK(!conn->streams && conn->fetch_count == 0);
	free(conn);
	gw_grpc_destroy(client.grpc);
	FUZZ_CHECK(client.ended_count == client.opened_count);
	FUZZ_CHECK(gw_serve_stats(serve, &stats) == 0 && stats.stream_count == 0);
	return 0;
}
