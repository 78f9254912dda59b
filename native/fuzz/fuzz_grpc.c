/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fuzz_grpc.c - a gRPC connection, either side, against a peer that sends anything: every call is
 * ended once, every payload is given back once, and a dead connection stays dead.
 *
 * Input: a byte of switches, then chunks: a length byte (times 16, plus 1), then so many bytes.
 */
#include "fuzz.h"

#include <godwit/grpc.h>
#include <godwit/sys.h>

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#define CALL_COUNT_MAX 4
#define ANSWER_LEN     3000

enum fuzz_switch {
	SERVER = 1 << 0,
	PREFACE = 1 << 1, /* what a client says first, so that the input need not find it */
	HOLD = 1 << 2,
	ANSWER = 1 << 3,
};

struct fuzz_side {
	uint8_t switches;
	size_t call_count, end_count;
	size_t payload_count; /* given to the connection and not given back */
};

static void answer(struct fuzz_side *side, struct gw_grpc_call *call)
{
	uint8_t *payload;

	if (!(side->switches & ANSWER))
		return;
	payload = calloc(1, ANSWER_LEN);
	FUZZ_CHECK(payload);
	if (gw_grpc_call_send(call, "head", 4, payload, ANSWER_LEN, payload) == 0)
		side->payload_count++;
	else
		free(payload);
}

static void on_call(void *user, struct gw_grpc_call *call)
{
	struct fuzz_side *side = user;

	side->call_count++;
	FUZZ_CHECK(strlen(gw_grpc_call_path(call)) <= GW_GRPC_PATH_LEN_MAX);
	(void)gw_grpc_call_metadata(call, "authorization");
	gw_grpc_call_hold(call, (side->switches & HOLD) != 0);
}

static void on_message(void *user, struct gw_grpc_call *call, const uint8_t *data, size_t len)
{
	volatile uint8_t sum = 0;

	for (size_t i = 0; i < len; i++)
		sum = (uint8_t)(sum ^ data[i]);
	if (len && data[0] == 'c') {
		gw_grpc_call_cancel(call);
		return;
	}
	answer(user, call);
	if (len && data[0] == 'h')
		gw_grpc_call_hold(call, true);
}

static void on_half_close(void *user, struct gw_grpc_call *call)
{
	answer(user, call);
	gw_grpc_call_end(call, GW_GRPC_OK, "100 %");
}

static void on_sent(void *user, void *cookie)
{
	struct fuzz_side *side = user;

	FUZZ_CHECK(side->payload_count > 0);
	side->payload_count--;
	free(cookie);
}

static void on_end(void *user, struct gw_grpc_call *call, int status, const char *message)
{
	struct fuzz_side *side = user;

	(void)call;
	FUZZ_CHECK(status >= 0 && message);
	side->end_count++;
	FUZZ_CHECK(side->end_count <= side->call_count);
}

static const struct gw_grpc_handler handler = {
	.on_call = on_call,
	.on_message = on_message,
	.on_half_close = on_half_close,
	.on_sent = on_sent,
	.on_end = on_end,
};

static void open_calls(struct fuzz_side *side, struct gw_grpc *conn)
{
	const struct gw_grpc_call_options options = {
		.path = "/godwit.page.v1.PageService/Fetch",
		.authority = "a:1",
		.timeout_ns = 1000000,
		.now_ns = 1,
	};

	for (int i = 0; i < 2; i++) {
		struct gw_grpc_call *call;

		FUZZ_CHECK(gw_grpc_call_open(conn, &options, &call) == 0);
		side->call_count++;
		answer(side, call);
	}
}

/* Returns -errno once the connection is dead. */
static int feed(struct gw_grpc *conn, int fd, const uint8_t *data, size_t len, uint64_t now_ns)
{
	uint8_t answer_bytes[65536];
	int err;

	if (len && write(fd, data, len) < 0)
		return -EPIPE;
	err = gw_grpc_on_readable(conn, now_ns);
	if (!err && gw_grpc_wants_write(conn))
		err = gw_grpc_on_writable(conn, now_ns);
	while (read(fd, answer_bytes, sizeof(answer_bytes)) > 0)
		continue;
	return err;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
	static const char preface[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0";
	struct fuzz_input input = {.data = data, .len = len};
	struct fuzz_side side = {.switches = fuzz_take_u8(&input)};
	const struct gw_grpc_config config = {
		.handler = &handler,
		.user = &side,
		.message_len_max = 4096,
		.window_len = 65535,
		.call_count_max = CALL_COUNT_MAX,
		.send_queue_count = 8,
		.read_len = 4096,
	};
	const bool server = (side.switches & SERVER) != 0;
	uint64_t now_ns = 1;
	struct gw_grpc *conn;
	int fds[2];
	int err;

	FUZZ_CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, fds) == 0);
	err = server ? gw_grpc_server_create(&config, fds[0], &conn)
		     : gw_grpc_client_create(&config, fds[0], &conn);
	FUZZ_CHECK(err == 0);
	if (!server)
		open_calls(&side, conn);
	if (side.switches & PREFACE)
		err = feed(conn, fds[1], (const uint8_t *)preface + (server ? 0 : 24),
			   sizeof(preface) - 1 - (server ? 0 : 24), now_ns);
	while (!err && input.len > 0) {
		const size_t wanted = 16u * fuzz_take_u8(&input) + 1;
		const size_t chunk_len = wanted < input.len ? wanted : input.len;

		now_ns += 100000;
		err = feed(conn, fds[1], input.data, chunk_len, now_ns);
		input.data += chunk_len;
		input.len -= chunk_len;
		if (!err && gw_grpc_deadline_ns(conn) <= now_ns)
			err = gw_grpc_on_time(conn, now_ns);
	}
	if (err) {
		/* Dead stays dead, and every call has heard of it. */
		FUZZ_CHECK(gw_grpc_on_readable(conn, now_ns) == err);
		FUZZ_CHECK(gw_grpc_flush(conn) == err);
		FUZZ_CHECK(side.end_count == side.call_count);
	}
	gw_grpc_destroy(conn);
	close(fds[1]);
	FUZZ_CHECK(side.end_count == side.call_count);
	FUZZ_CHECK(side.payload_count == 0);
	return 0;
}
