/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fetch_main.c - a page client driven by lines on stdin, for tests/native:
 *   fetch_main PORT OUTPUT_PATH
 * stdin:   hello IMAGE EPOCH LANE | want OFFSET LEN GENERATION | beat | half-close | cancel |
 *          describe IMAGE | timeout MS (of the next call)
 * stdout:  ready GENERATION STATE WANT_MAX REGION_COUNT | beat N | end STATUS TEXT | gone ERRNO |
 *          pages OFFSET LEN ENCODING GENERATION STATE ok|bad | image GENERATION EXTENT_COUNT LEN
 * The bytes of pages whose checksum is right are written to the output at their offset.
 */
#include "serve_client.h"

#include <fcntl.h>
#include <inttypes.h>

#define WINDOW_LEN (16u << 20)

struct fetch {
	struct gw_grpc *conn;
	struct gw_grpc_call *call;
	const char *authority;
	uint64_t timeout_ns;
	uint64_t beat;
	int output_fd;
};

static void say_pages(struct fetch *fetch, const struct gw_pages *pages)
{
	const bool good = gw_pages_crc32c(pages) == pages->crc32c;

	if (good && pages->data.len)
		CHECK_EQ(pwrite(fetch->output_fd, pages->data.data, pages->data.len,
				(off_t)pages->offset),
			 (ssize_t)pages->data.len);
	printf("pages %" PRIu64 " %" PRIu64 " %d %" PRIu64 " %d %s\n", pages->offset, pages->len,
	       pages->encoding, pages->generation, pages->image_state, good ? "ok" : "bad");
}

static void say_image(const uint8_t *data, size_t len)
{
	struct gw_describe_response response;
	struct gw_wire_extent extent;
	uint64_t extent_len = 0;
	size_t cursor = 0;

	CHECK_EQ(gw_describe_response_decode(data, len, &response), 0);
	while (gw_describe_response_next(data, len, &cursor, &extent) == 1)
		extent_len += extent.len;
	printf("image %" PRIu64 " %zu %" PRIu64 "\n", response.image.generation,
	       response.extent_count, extent_len);
}

static void on_message(void *user, struct gw_grpc_call *call, const uint8_t *data, size_t len)
{
	struct gw_fetch_response response;
	struct fetch *fetch = user;

	if (gw_grpc_call_user(call)) {
		say_image(data, len);
		return;
	}
	if (gw_fetch_response_decode(data, len, &response)) {
		printf("malformed\n");
		return;
	}
	if (response.kind == GW_FETCH_RESPONSE_PAGES)
		say_pages(fetch, &response.pages);
	else if (response.kind == GW_FETCH_RESPONSE_READY)
		printf("ready %" PRIu64 " %d %" PRIu64 " %u\n", response.ready.image.generation,
		       response.ready.image.state, response.ready.want_max,
		       response.ready.image.region_count);
	else
		printf("beat %" PRIu64 "\n", response.heartbeat.sequence);
}

static void on_end(void *user, struct gw_grpc_call *call, int status, const char *message)
{
	struct fetch *fetch = user;

	printf("end %d %s\n", status, message);
	if (fetch->call == call)
		fetch->call = NULL;
}

static const struct gw_grpc_handler handler = {.on_message = on_message, .on_end = on_end};

static void open_call(struct fetch *fetch, const char *path)
{
	const struct gw_grpc_metadata metadata[] = {{"traceparent", "00-01-02-01"}};
	const struct gw_grpc_call_options options = {.path = path,
						     .authority = fetch->authority,
						     .metadata = metadata,
						     .metadata_count = 1,
						     .timeout_ns = fetch->timeout_ns,
						     .now_ns = gw_sys_now_ns()};

	CHECK_EQ(gw_grpc_call_open(fetch->conn, &options, &fetch->call), 0);
	fetch->timeout_ns = 0;
}

static void send_request(struct fetch *fetch, const struct gw_fetch_request *request)
{
	uint8_t data[GW_PAGE_REQUEST_LEN_MAX];
	const ssize_t len = gw_fetch_request_encode(request, data, sizeof(data));

	if (fetch->call)
		CHECK_EQ(gw_grpc_call_send(fetch->call, data, (size_t)len, NULL, 0, NULL), 0);
}

static void describe(struct fetch *fetch, const char *image_id)
{
	const struct gw_wire_string id = client_string(image_id);
	uint8_t data[GW_GRPC_HEAD_LEN_MAX];
	const ssize_t len = gw_describe_request_encode(&id, data, sizeof(data));

	open_call(fetch, GW_PAGE_PATH_DESCRIBE_IMAGE);
	gw_grpc_call_set_user(fetch->call, fetch);
	CHECK_EQ(gw_grpc_call_send(fetch->call, data, (size_t)len, NULL, 0, NULL), 0);
	CHECK_EQ(gw_grpc_call_half_close(fetch->call), 0);
}

static void obey(struct fetch *fetch, char *line)
{
	struct gw_fetch_request request = {0};
	char word[160];

	if (sscanf(line, "hello %159s %" SCNu64 " %d", word, &request.hello.epoch,
		   &request.hello.lane) == 3) {
		request.kind = GW_FETCH_REQUEST_HELLO;
		request.hello.image_id = client_string(word);
		request.hello.session_id = client_string("fetch_main");
		open_call(fetch, GW_PAGE_PATH_FETCH);
		send_request(fetch, &request);
	} else if (sscanf(line, "want %" SCNu64 " %" SCNu64 " %" SCNu64, &request.want.offset,
			  &request.want.len, &request.want.generation) == 3) {
		request.kind = GW_FETCH_REQUEST_WANT;
		send_request(fetch, &request);
	} else if (strncmp(line, "beat", 4) == 0) {
		request.kind = GW_FETCH_REQUEST_HEARTBEAT;
		request.heartbeat.sequence = ++fetch->beat;
		send_request(fetch, &request);
	} else if (strncmp(line, "half-close", 10) == 0) {
		if (fetch->call)
			CHECK_EQ(gw_grpc_call_half_close(fetch->call), 0);
	} else if (strncmp(line, "cancel", 6) == 0) {
		if (fetch->call)
			gw_grpc_call_cancel(fetch->call);
	} else if (sscanf(line, "describe %159s", word) == 1) {
		describe(fetch, word);
	} else if (sscanf(line, "timeout %" SCNu64, &fetch->timeout_ns) == 1) {
		fetch->timeout_ns *= 1000000;
	} else {
		CHECK(!"a known command");
	}
}

/* stdin is read without stdio, so that poll tells the truth about it. */
static bool read_lines(struct fetch *fetch)
{
	static char lines[65536];
	static size_t len;
	const ssize_t got = read(STDIN_FILENO, lines + len, sizeof(lines) - 1 - len);
	char *at = lines;
	char *end;

	if (got <= 0)
		return false;
	len += (size_t)got;
	lines[len] = '\0';
	while ((end = strchr(at, '\n'))) {
		*end = '\0';
		obey(fetch, at);
		at = end + 1;
	}
	len -= (size_t)(at - lines);
	memmove(lines, at, len);
	return true;
}

static int wait_ms(const struct fetch *fetch)
{
	const uint64_t deadline_ns = gw_grpc_deadline_ns(fetch->conn);
	const uint64_t now_ns = gw_sys_now_ns();

	if (deadline_ns == UINT64_MAX)
		return -1;
	return deadline_ns <= now_ns ? 0 : (int)((deadline_ns - now_ns) / 1000000) + 1;
}

int main(int argc, char **argv)
{
	struct fetch fetch = {0};
	const struct gw_grpc_config config = {.handler = &handler,
					      .user = &fetch,
					      .message_len_max = GW_PAGE_RESPONSE_LEN_MAX,
					      .window_len = WINDOW_LEN,
					      .call_count_max = 1,
					      .send_queue_count = 4096};
	char authority[32];
	int err = 0;
	int fd;

	CHECK_EQ(argc, 3);
	setvbuf(stdout, NULL, _IOLBF, 0);
	fetch.output_fd = open(argv[2], O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
	CHECK(fetch.output_fd >= 0);
	snprintf(authority, sizeof(authority), "127.0.0.1:%s", argv[1]);
	fetch.authority = authority;
	CHECK_EQ(gw_grpc_connect("127.0.0.1", (uint32_t)strtoul(argv[1], NULL, 10), 5000, &fd), 0);
	CHECK_EQ(gw_grpc_client_create(&config, fd, &fetch.conn), 0);
	while (!err) {
		struct pollfd fds[2] = {{.fd = fd, .events = POLLIN},
					{.fd = STDIN_FILENO, .events = POLLIN}};

		if (gw_grpc_wants_write(fetch.conn))
			fds[0].events |= POLLOUT;
		CHECK(poll(fds, 2, wait_ms(&fetch)) >= 0);
		if (fds[1].revents && !read_lines(&fetch))
			break;
		if (fds[0].revents & (POLLIN | POLLHUP | POLLERR))
			err = gw_grpc_on_readable(fetch.conn, gw_sys_now_ns());
		if (!err && (fds[0].revents & POLLOUT))
			err = gw_grpc_on_writable(fetch.conn, gw_sys_now_ns());
		if (!err)
			err = gw_grpc_on_time(fetch.conn, gw_sys_now_ns());
	}
	if (err)
		printf("gone %d\n", -err);
	gw_grpc_destroy(fetch.conn);
	close(fetch.output_fd);
	return EXIT_SUCCESS;
}
