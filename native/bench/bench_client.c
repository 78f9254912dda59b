/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Our wire alone: a client that checks every message as the engine does, and installs nothing.
 * See bench.h.
 */
#include "bench.h"

#include <poll.h>

#include <godwit/grpc.h>
#include <godwit/page_wire.h>
#include <godwit/sys.h>

#define WINDOW_LEN	 (16u << 20)
#define SEND_QUEUE_COUNT 64u
#define CONNECT_MS	 5000u
#define SILENCE_MS	 10000

struct client {
	struct gw_grpc *conn;
	struct gw_grpc_call *call;
	bool ready;
	uint64_t received_len;
};

static void on_message(void *user, struct gw_grpc_call *call, const uint8_t *data, size_t len)
{
	struct client *const client = user;
	struct gw_fetch_response response;

	(void)call;
	CHECK_EQ(gw_fetch_response_decode(data, len, &response), 0);
	if (response.kind == GW_FETCH_RESPONSE_READY)
		client->ready = true;
	if (response.kind != GW_FETCH_RESPONSE_PAGES)
		return;
	CHECK_EQ(gw_pages_crc32c(&response.pages), response.pages.crc32c);
	client->received_len += response.pages.len;
}

static const struct gw_grpc_handler handler = {.on_message = on_message};

static void step(struct client *client)
{
	struct pollfd fd = {.fd = gw_grpc_fd(client->conn), .events = POLLIN};

	if (gw_grpc_wants_write(client->conn))
		fd.events |= POLLOUT;
	CHECK(gw_sys_poll(&fd, 1, SILENCE_MS) == 1);
	if (fd.revents & POLLIN)
		CHECK_EQ(gw_grpc_on_readable(client->conn, gw_sys_now_ns()), 0);
	if (fd.revents & POLLOUT)
		CHECK_EQ(gw_grpc_on_writable(client->conn, gw_sys_now_ns()), 0);
}

static void send_request(struct client *client, const struct gw_fetch_request *request)
{
	uint8_t data[256];
	const ssize_t len = gw_fetch_request_encode(request, data, sizeof(data));

	CHECK_EQ(gw_grpc_call_send(client->call, data, (size_t)len, NULL, 0, NULL), 0);
	CHECK_EQ(gw_grpc_flush(client->conn), 0);
}

static void client_open(struct client *client, const struct bench_server *server,
			enum gw_page_lane lane)
{
	const struct gw_grpc_config config = {.handler = &handler,
					      .user = client,
					      .message_len_max = GW_PAGE_RESPONSE_LEN_MAX,
					      .window_len = WINDOW_LEN,
					      .call_count_max = 1,
					      .send_queue_count = SEND_QUEUE_COUNT};
	const struct gw_grpc_call_options options = {.path = GW_PAGE_PATH_FETCH,
						     .authority = "bench:1"};
	const struct gw_fetch_request hello = {.kind = GW_FETCH_REQUEST_HELLO,
					       .hello = {.session_id = {"bench", 5},
							 .image_id = {"bench", 5},
							 .epoch = 2,
							 .lane = lane}};
	int fd;

	*client = (struct client){0};
	CHECK_EQ(gw_grpc_connect("127.0.0.1", server->page_port, CONNECT_MS, &fd), 0);
	CHECK_EQ(gw_grpc_client_create(&config, fd, &client->conn), 0);
	CHECK_EQ(gw_grpc_call_open(client->conn, &options, &client->call), 0);
	send_request(client, &hello);
	while (!client->ready)
		step(client);
}

static void want(struct client *client, uint64_t offset, uint64_t len)
{
	const struct gw_fetch_request request = {
		.kind = GW_FETCH_REQUEST_WANT,
		.want = {.offset = offset, .len = len, .generation = BENCH_GENERATION}};

	send_request(client, &request);
}

void bench_wire_demand(const struct bench_server *server, uint32_t count)
{
	uint64_t *const samples = calloc(count, sizeof(*samples));
	struct client client;

	CHECK(samples);
	client_open(&client, server, GW_PAGE_LANE_DEMAND);
	for (uint32_t i = 0; i < count; i++) {
		const uint64_t begin_ns = gw_sys_now_ns();

		want(&client, i * 2654435761ul % (server->len / PAGE) * PAGE, PAGE);
		while (client.received_len < (i + 1) * PAGE)
			step(&client);
		samples[i] = gw_sys_now_ns() - begin_ns;
	}
	bench_print_samples(samples, count);
	gw_grpc_destroy(client.conn);
	free(samples);
}

void bench_wire_bulk(const struct bench_server *server, uint64_t len)
{
	struct client client;
	uint64_t asked = 0;

	client_open(&client, server, GW_PAGE_LANE_BULK);
	const uint64_t begin_ns = gw_sys_now_ns();

	while (client.received_len < len) {
		while (asked < len && asked < client.received_len + BENCH_WINDOW_COUNT * MIB) {
			want(&client, asked % server->len, MIB);
			asked += MIB;
		}
		step(&client);
	}
	bench_print_rate(len, gw_sys_now_ns() - begin_ns);
	gw_grpc_destroy(client.conn);
}
