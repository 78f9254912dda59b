/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_wire_memory.c - each allocation of the wire failed in turn, nghttp2's as well: a call or a
 * connection may be lost, each call is ended once, each payload given back, and nothing
 * crashes. Not under a sanitizer: those have allocators of their own.
 */
#include "grpc_pair.h"
#include "serve_client.h"

#include <godwit/serve.h>

#include <sched.h>
#include <stdatomic.h>
#include <sys/mman.h>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)

int main(void)
{
	return CHECK_SKIPPED;
}

#else

/* Replaced for every library of the process; glibc's own names for what is behind. */
#define REPLACED __attribute__((visibility("default")))
void *__libc_malloc(size_t len);
void *__libc_calloc(size_t count, size_t len);
void *__libc_realloc(void *data, size_t len);
void *__libc_memalign(size_t align, size_t len);

static atomic_bool armed;
static atomic_bool in_main_too;
static atomic_uint_fast64_t left_count;
static atomic_bool failed;
static _Thread_local bool is_main;

static bool must_fail(void)
{
	if (!atomic_load(&armed) || (is_main && !atomic_load(&in_main_too)))
		return false;
	if (atomic_fetch_sub(&left_count, 1) != 1)
		return false;
	atomic_store(&failed, true);
	errno = ENOMEM;
	return true;
}

REPLACED void *malloc(size_t len)
{
	return must_fail() ? NULL : __libc_malloc(len);
}

REPLACED void *calloc(size_t count, size_t len)
{
	return must_fail() ? NULL : __libc_calloc(count, len);
}

REPLACED void *realloc(void *data, size_t len)
{
	return must_fail() ? NULL : __libc_realloc(data, len);
}

REPLACED void *aligned_alloc(size_t align, size_t len)
{
	return must_fail() ? NULL : __libc_memalign(align, len);
}

static void arm(uint64_t nth, bool main_too)
{
	atomic_store(&left_count, nth);
	atomic_store(&failed, false);
	atomic_store(&in_main_too, main_too);
	atomic_store(&armed, true);
}

static bool disarm(void)
{
	atomic_store(&armed, false);
	return atomic_load(&failed);
}

/* --- a connection ---------------------------------------------------------------------------- */

static uint8_t payload[200000];
static size_t taken_count;

static void answer(struct pair_side *side, struct gw_grpc_call *call, const uint8_t *data,
		   size_t len)
{
	(void)side;
	(void)data;
	(void)len;
	if (gw_grpc_call_send(call, "head", 4, payload, sizeof(payload), payload) == 0)
		taken_count++;
}

static void end_ok(struct pair_side *side, struct gw_grpc_call *call)
{
	(void)side;
	(void)gw_grpc_call_end(call, GW_GRPC_OK, "fine");
}

/* Messages are copied by the side's test double with malloc: not ours to fail. */
static void count_only(void *user, struct gw_grpc_call *call, const uint8_t *data, size_t len)
{
	struct pair_side *side = user;

	side->message_count++;
	if (side->on_message)
		side->on_message(side, call, data, len);
}

static const struct gw_grpc_handler handler = {
	.on_call = pair_on_call,
	.on_message = count_only,
	.on_half_close = pair_on_half_close,
	.on_sent = pair_on_sent,
	.on_end = pair_on_end,
};

/* The pair of grpc_pair.h, opened with failures allowed; false if it could not be. */
static bool open_pair(struct pair *pair)
{
	struct gw_grpc_config client = pair_config(&pair->client);
	struct gw_grpc_config server = pair_config(&pair->server);
	int fds[2];

	client.handler = &handler;
	server.handler = &handler;
	memset(pair, 0, sizeof(*pair));
	pair->now_ns = 1000;
	pair->client.pair = pair;
	pair->server.pair = pair;
	pair->server.on_message = answer;
	pair->server.on_half_close = end_ok;
	CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, fds), 0);
	if (gw_grpc_client_create(&client, fds[0], &pair->client.conn)) {
		close(fds[0]);
		close(fds[1]);
		return false;
	}
	if (gw_grpc_server_create(&server, fds[1], &pair->server.conn)) {
		gw_grpc_destroy(pair->client.conn);
		close(fds[1]);
		return false;
	}
	return true;
}

static void each_allocation_of_a_connection_fails_once(void)
{
	const struct gw_grpc_call_options options = {.path = PAIR_PATH, .authority = "m:1"};
	bool any = true;
	uint64_t nth;

	for (nth = 1; any; nth++) {
		struct gw_grpc_call *call;
		struct pair pair;
		bool opened = false;

		taken_count = 0;
		arm(nth, true);
		if (open_pair(&pair)) {
			if (gw_grpc_call_open(pair.client.conn, &options, &call) == 0) {
				opened = true;
				if (gw_grpc_call_send(call, "hello", 5, payload, sizeof(payload),
						      payload) == 0)
					taken_count++;
				(void)gw_grpc_call_half_close(call);
			}
			pair_run(&pair);
			any = disarm();
			/* A side that died hangs up; the other hears of it. */
			if (pair.client.err) {
				gw_grpc_destroy(pair.client.conn);
				pair.client.conn = NULL;
			}
			if (pair.server.err) {
				gw_grpc_destroy(pair.server.conn);
				pair.server.conn = NULL;
			}
			pair_run(&pair);
			gw_grpc_destroy(pair.client.conn);
			gw_grpc_destroy(pair.server.conn);
			CHECK_EQ(pair.client.end_count, opened);
			CHECK_EQ(pair.server.end_count, pair.server.call_count);
			CHECK_EQ(pair.client.sent_count + pair.server.sent_count, taken_count);
			if (!any)
				CHECK_EQ(pair.client.ends[0].status, GW_GRPC_OK);
			free(pair.client.last);
			free(pair.server.last);
		} else {
			any = disarm();
			CHECK(any);
		}
	}
	/* It did fail something: nghttp2 alone allocates more often than this. */
	CHECK(nth > 20);
}

/* --- the page server ------------------------------------------------------------------------- */

#define MEMORY_LEN (4ul << 20)

static bool try_page(uint32_t port)
{
	const struct gw_grpc_call_options options = {.path = GW_PAGE_PATH_FETCH,
						     .authority = "m:1"};
	struct client client = {.status = -1};
	const struct gw_grpc_config config = {.handler = &client_handler,
					      .user = &client,
					      .message_len_max = 4u << 20,
					      .window_len = 1u << 20,
					      .call_count_max = 1,
					      .send_queue_count = 16};
	int fd;

	CHECK_EQ(gw_grpc_connect("127.0.0.1", port, 5000, &fd), 0);
	CHECK_EQ(gw_grpc_client_create(&config, fd, &client.conn), 0);
	CHECK_EQ(gw_grpc_call_open(client.conn, &options, &client.call), 0);
	client_hello(&client, "img", 2, GW_PAGE_LANE_BULK);
	client_want(&client, 0, 1ul << 20, 1);
	CHECK_EQ(gw_grpc_call_half_close(client.call), 0);
	CLIENT_UNTIL(&client, client.end_count > 0);
	client_close(&client);
	return client.status == GW_GRPC_OK;
}

static void each_allocation_of_the_server_costs_one_connection_at_most(void)
{
	static const struct gw_serve_region region = {.size = MEMORY_LEN, .page_size = 4096};
	const struct gw_serve_config config = {.struct_size = sizeof(config),
					       .listen_host = "127.0.0.1",
					       .connection_count_max = 16};
	struct gw_serve_image image = {.struct_size = sizeof(image),
				       .ram_fd = memfd_create("memory", MFD_CLOEXEC),
				       .image_id = "img",
				       .epoch = 1,
				       .generation = 1,
				       .state = GW_IMAGE_FROZEN,
				       .region_count = 1,
				       .regions = &region};
	struct gw_serve *serve;
	size_t lost_count = 0;
	bool any = true;

	CHECK_EQ(ftruncate(image.ram_fd, (off_t)MEMORY_LEN), 0);
	CHECK_EQ(pwrite(image.ram_fd, "data", 4, 0), 4);
	/* What the caller's own thread allocates is told at once. */
	for (uint64_t nth = 1; any; nth++) {
		arm(nth, true);
		const int err = gw_serve_create(&config, &serve);

		any = disarm();
		if (any)
			CHECK(err == -ENOMEM || err == -EAGAIN);
		else
			CHECK_EQ(err, 0);
	}
	any = true;
	for (uint64_t nth = 1; any; nth++) {
		arm(nth, true);
		const int err = gw_serve_put_image(serve, &image);

		any = disarm();
		CHECK_EQ(err, any ? -ENOMEM : 0);
	}
	CHECK_EQ(gw_serve_start(serve), 0);
	any = true;
	for (uint64_t nth = 1; any; nth++) {
		arm(nth, false);
		lost_count += !try_page((uint32_t)gw_serve_port(serve));
		any = disarm();
		CHECK(try_page((uint32_t)gw_serve_port(serve)));
	}
	CHECK(lost_count > 10);
	gw_serve_destroy(serve);
	close(image.ram_fd);
}

int main(void)
{
	is_main = true;
	RUN(each_allocation_of_a_connection_fails_once);
	RUN(each_allocation_of_the_server_costs_one_connection_at_most);
	return EXIT_SUCCESS;
}

#endif
