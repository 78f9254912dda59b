/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_arrival_dial.c - attempts to connect: the first that is there counts, whichever it is.
 *
 * A listener whose queue is full drops SYNs without a word, as a network that is cut.
 */
#include "check.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "arrival_internal.h"

#define TAG		 7U
#define WAIT_MS		 60000
#define FILLER_COUNT_MAX 16

static int epoll_fd;

static int listener_open(uint32_t *ret_port)
{
	struct sockaddr_in address = {.sin_family = AF_INET,
				      .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	socklen_t len = sizeof(address);
	const int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

	CHECK(fd >= 0);
	CHECK_EQ(bind(fd, (struct sockaddr *)&address, len), 0);
	CHECK_EQ(getsockname(fd, (struct sockaddr *)&address, &len), 0);
	*ret_port = ntohs(address.sin_port);
	return fd;
}

static bool is_connected(int fd)
{
	struct pollfd poll_fd = {.fd = fd, .events = POLLOUT};

	return poll(&poll_fd, 1, 100) == 1;
}

/* Connections until one hangs. */
static uint32_t fill(uint32_t port, int fds[FILLER_COUNT_MAX])
{
	for (uint32_t i = 0; i < FILLER_COUNT_MAX; i++) {
		CHECK_EQ(gw_grpc_connect("127.0.0.1", port, 60000, &fds[i]), 0);
		if (!is_connected(fds[i]))
			return i + 1;
	}
	CHECK(!"the listener's queue has no end");
	return 0;
}

static int more(struct arrival_dial *dial, uint32_t port)
{
	return dial_more(dial, "127.0.0.1", port, epoll_fd, TAG);
}

static int taken_within(struct arrival_dial *dial, int *ret_fd)
{
	struct epoll_event event;
	int got = dial_take(dial, ret_fd);

	while (got == 0) {
		CHECK(epoll_wait(epoll_fd, &event, 1, WAIT_MS) > 0);
		CHECK_EQ(event.data.u32, TAG);
		got = dial_take(dial, ret_fd);
	}
	return got;
}

static void a_newer_attempt_overtakes_those_that_hang(void)
{
	struct arrival_dial dial = {.count = 0};
	int fillers[FILLER_COUNT_MAX];
	uint32_t port;
	int fd = -1;
	int accepted;
	const int listener = listener_open(&port);

	CHECK_EQ(listen(listener, 0), 0);
	const uint32_t filler_count = fill(port, fillers);

	for (int i = 0; i < 3; i++)
		CHECK_EQ(more(&dial, port), 0);
	CHECK_EQ(dial_take(&dial, &fd), 0);
	CHECK_EQ(dial.count, 3);
	CHECK_EQ(fd, -1);
	/* The network is back: there is room, and those that hang will know in a second or three. */
	CHECK_EQ(listen(listener, 64), 0);
	while ((accepted = accept(listener, NULL, NULL)) >= 0)
		CHECK_EQ(close(accepted), 0);
	CHECK_EQ(more(&dial, port), 0);
	const int newest = dial.fds[3];

	CHECK_EQ(taken_within(&dial, &fd), 1);
	CHECK_EQ(fd, newest);
	CHECK_EQ(dial.count, 0);
	CHECK(is_connected(fd));
	CHECK_EQ(close(fd), 0);
	for (uint32_t i = 0; i < filler_count; i++)
		CHECK_EQ(close(fillers[i]), 0);
	CHECK_EQ(close(listener), 0);
}

static void the_oldest_makes_room(void)
{
	struct arrival_dial dial = {.count = 0};
	int fillers[FILLER_COUNT_MAX];
	uint32_t port;
	const int listener = listener_open(&port);

	CHECK_EQ(listen(listener, 0), 0);
	const uint32_t filler_count = fill(port, fillers);

	for (uint32_t i = 0; i < ARRIVAL_DIAL_COUNT_MAX; i++)
		CHECK_EQ(more(&dial, port), 0);
	const int second = dial.fds[1];

	CHECK_EQ(more(&dial, port), 0);
	CHECK_EQ(dial.count, ARRIVAL_DIAL_COUNT_MAX);
	CHECK_EQ(dial.fds[0], second);
	dial_stop(&dial);
	CHECK_EQ(dial.count, 0);
	for (uint32_t i = 0; i < filler_count; i++)
		CHECK_EQ(close(fillers[i]), 0);
	CHECK_EQ(close(listener), 0);
}

static void a_refusal_is_told_when_nothing_else_is_on_its_way(void)
{
	struct arrival_dial dial = {.count = 0};
	uint32_t port;
	int fd = -1;
	const int closed = listener_open(&port); /* bound, so that nobody else has it; deaf */
	int err = more(&dial, port);

	if (err == 0)
		err = taken_within(&dial, &fd);
	CHECK_EQ(err, -ECONNREFUSED);
	CHECK_EQ(dial.count, 0);
	CHECK_EQ(dial_take(&dial, &fd), 0);
	CHECK_EQ(close(closed), 0);
}

int main(void)
{
	epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	CHECK(epoll_fd >= 0);
	RUN(a_newer_attempt_overtakes_those_that_hang);
	RUN(the_oldest_makes_room);
	RUN(a_refusal_is_told_when_nothing_else_is_on_its_way);
	return 0;
}
