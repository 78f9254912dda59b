/* SPDX-License-Identifier: Apache-2.0 */
/*
 * serve_client.h - a page client for tests: one connection, calls, and what they were told.
 *
 * Threads    One client, one thread; several clients may run at once.
 * Errors     A failed check aborts; a wait that takes longer than CLIENT_WAIT_MS as well.
 * Ownership  client_close frees everything.
 * Units      Bytes.
 * Source     grpc.h, page_wire.h.
 */
#ifndef GW_TESTS_SERVE_CLIENT_H
#define GW_TESTS_SERVE_CLIENT_H

#include "check.h"

#include <godwit/grpc.h>
#include <godwit/page_lz4.h>
#include <godwit/page_wire.h>
#include <godwit/sys.h>

#include <errno.h>
#include <unistd.h>

#define CLIENT_WAIT_MS 60000

struct client {
	struct gw_grpc *conn;
	struct gw_grpc_call *call; /* the last one opened, NULL once it ended */
	int err;
	int status; /* of the last call that ended; -1 = none has */
	char text[GW_GRPC_STATUS_TEXT_LEN_MAX];
	size_t end_count, ready_count, pages_count, heartbeat_count, raw_count, zero_count;
	size_t lz4_count;
	uint64_t received_len; /* bytes of data, as on the wire */
	uint64_t answered_len;
	uint64_t next_offset; /* where the next pages must begin */
	struct gw_pages last;
	uint64_t ready_generation;
	size_t describe_len;
	uint8_t *describe;
	/* Told of each Pages, checksum and order already checked. May be NULL. */
	void (*on_pages)(struct client *, const struct gw_pages *);
	void *user;
	bool in_order;	/* check next_offset */
	bool read_only; /* send no heartbeats: the default */
	uint8_t plain[GW_PAGE_WANT_LEN_MAX];
};

static inline void client_message(void *user, struct gw_grpc_call *call, const uint8_t *data,
				  size_t len)
{
	struct client *client = user;
	struct gw_fetch_response response;

	(void)call;
	if (gw_grpc_call_user(call)) { /* DescribeImage */
		free(client->describe);
		client->describe = malloc(len ? len : 1);
		CHECK(client->describe);
		memcpy(client->describe, data, len);
		client->describe_len = len;
		return;
	}
	CHECK_EQ(gw_fetch_response_decode(data, len, &response), 0);
	switch (response.kind) {
	case GW_FETCH_RESPONSE_READY:
		CHECK_EQ(client->ready_count++, 0);
		CHECK_EQ(response.ready.want_max, GW_PAGE_WANT_LEN_MAX);
		client->ready_generation = response.ready.image.generation;
		break;
	case GW_FETCH_RESPONSE_PAGES:
		CHECK_EQ(client->ready_count, 1);
		client->received_len += response.pages.data.len;
		if (response.pages.encoding == GW_PAGE_ENCODING_LZ4) {
			CHECK_EQ(gw_page_lz4_unpack(&response.pages, client->plain,
						    sizeof(client->plain), &response.pages),
				 0);
			client->lz4_count++;
		}
		CHECK_EQ(gw_pages_crc32c(&response.pages), response.pages.crc32c);
		if (client->in_order)
			CHECK_EQ(response.pages.offset, client->next_offset);
		client->next_offset = response.pages.offset + response.pages.len;
		client->answered_len += response.pages.len;
		client->pages_count++;
		if (response.pages.encoding == GW_PAGE_ENCODING_LZ4) {
			CHECK_EQ(response.pages.data.len, response.pages.len);
		} else if (response.pages.encoding == GW_PAGE_ENCODING_RAW) {
			CHECK_EQ(response.pages.data.len, response.pages.len);
			client->raw_count++;
		} else {
			CHECK_EQ(response.pages.encoding, GW_PAGE_ENCODING_ZERO);
			CHECK_EQ(response.pages.data.len, 0);
			client->zero_count++;
		}
		client->last = response.pages;
		if (client->on_pages)
			client->on_pages(client, &response.pages);
		break;
	case GW_FETCH_RESPONSE_HEARTBEAT:
		CHECK_EQ(client->ready_count, 1);
		CHECK_EQ(response.heartbeat.sequence, ++client->heartbeat_count);
		break;
	default:
		CHECK(!"a response with a body");
	}
}

static inline void client_end(void *user, struct gw_grpc_call *call, int status, const char *text)
{
	struct client *client = user;

	client->status = status;
	snprintf(client->text, sizeof(client->text), "%s", text);
	client->end_count++;
	if (client->call == call)
		client->call = NULL;
}

static const struct gw_grpc_handler client_handler = {
	.on_message = client_message,
	.on_end = client_end,
};

/* With `tls` as somebody, to a server of that name. */
static inline void client_open_as(struct client *client, uint32_t port, uint32_t window_len,
				  struct gw_tls_identity *tls, const char *server_name)
{
	const struct gw_grpc_config config = {
		.tls = tls,
		.tls_server_name = server_name,
		.handler = &client_handler,
		.user = client,
		.message_len_max = 4u << 20,
		.window_len = window_len,
		.call_count_max = 1,
		.send_queue_count = 20000,
	};
	int fd;

	memset(client, 0, sizeof(*client));
	client->status = -1;
	CHECK_EQ(gw_grpc_connect("127.0.0.1", port, 5000, &fd), 0);
	CHECK_EQ(gw_grpc_client_create(&config, fd, &client->conn), 0);
}

static inline void client_open(struct client *client, uint32_t port, uint32_t window_len)
{
	client_open_as(client, port, window_len, NULL, NULL);
}

/* One round of poll; false when nothing happened within timeout_ms. */
static inline bool client_step(struct client *client, int timeout_ms)
{
	struct pollfd fd = {.fd = gw_grpc_fd(client->conn), .events = POLLIN};
	int err = 0;

	if (client->err)
		return false;
	if (gw_grpc_wants_write(client->conn))
		fd.events |= POLLOUT;
	if (poll(&fd, 1, timeout_ms) <= 0)
		return false;
	if (fd.revents & (POLLIN | POLLHUP | POLLERR))
		err = gw_grpc_on_readable(client->conn, gw_sys_now_ns());
	if (!err && (fd.revents & POLLOUT))
		err = gw_grpc_on_writable(client->conn, gw_sys_now_ns());
	client->err = err;
	return true;
}

/* Step until `condition` holds or the connection is over. */
#define CLIENT_UNTIL(client, condition)                                                      \
	do {                                                                                 \
		CHECK(gw_grpc_flush((client)->conn) == (client)->err || (client)->err == 0); \
		while (!(condition) && !(client)->err)                                       \
			CHECK(client_step(client, CLIENT_WAIT_MS));                          \
	} while (0)

static inline void client_call(struct client *client, const char *path)
{
	const struct gw_grpc_call_options options = {.path = path, .authority = "test:1"};

	CHECK_EQ(gw_grpc_call_open(client->conn, &options, &client->call), 0);
	client->ready_count = 0;
	client->heartbeat_count = 0;
}

static inline void client_send(struct client *client, const struct gw_fetch_request *request)
{
	uint8_t data[GW_PAGE_REQUEST_LEN_MAX];
	const ssize_t len = gw_fetch_request_encode(request, data, sizeof(data));

	CHECK(len > 0);
	CHECK_EQ(gw_grpc_call_send(client->call, data, (size_t)len, NULL, 0, NULL), 0);
}

static inline struct gw_wire_string client_string(const char *string)
{
	return (struct gw_wire_string){.data = string, .len = string ? strlen(string) : 0};
}

static inline void client_hello(struct client *client, const char *image_id, uint64_t epoch,
				enum gw_page_lane lane)
{
	const struct gw_fetch_request request = {.kind = GW_FETCH_REQUEST_HELLO,
						 .hello = {.session_id = client_string("s"),
							   .image_id = client_string(image_id),
							   .epoch = epoch,
							   .lane = lane}};

	client_send(client, &request);
}

static inline void client_want(struct client *client, uint64_t offset, uint64_t len,
			       uint64_t generation)
{
	const struct gw_fetch_request request = {
		.kind = GW_FETCH_REQUEST_WANT,
		.want = {.offset = offset, .len = len, .generation = generation}};

	client_send(client, &request);
}

/* Connect, say hello, wait for ready. */
static inline void client_start(struct client *client, uint32_t port, const char *image_id,
				uint64_t epoch, enum gw_page_lane lane)
{
	client_open(client, port, 4u << 20);
	client_call(client, GW_PAGE_PATH_FETCH);
	client_hello(client, image_id, epoch, lane);
	CLIENT_UNTIL(client, client->ready_count || client->end_count);
	CHECK_EQ(client->ready_count, 1);
}

static inline void client_expect_end(struct client *client, int status, const char *reason)
{
	CLIENT_UNTIL(client, client->end_count > 0);
	if (client->status != status || strncmp(client->text, reason, strlen(reason)) != 0)
		fprintf(stderr, "%d %s\n", client->status, client->text);
	CHECK_EQ(client->status, status);
	CHECK_EQ(strncmp(client->text, reason, strlen(reason)), 0);
}

static inline void client_close(struct client *client)
{
	gw_grpc_destroy(client->conn);
	free(client->describe);
	client->describe = NULL;
}

#endif
