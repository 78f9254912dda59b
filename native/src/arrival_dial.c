/* SPDX-License-Identifier: Apache-2.0 */
/*
 * arrival_dial.c - a connection asked for again and again, until one of the attempts is there.
 *
 * Threads, Errors, Ownership, Units: see arrival_internal.h: a dial belongs to its link's thread.
 * Source     tcp(7), RFC 6298: a lost SYN is sent again after 1, 3, 7, 15 s.
 *
 * Into a network that drops everything one attempt would sleep through the link's return, in the
 * gaps of its own back-off: 8 s of them after a cut of half a minute, while vCPUs wait. So there are
 * several, ARRIVAL_DIAL_NS apart, each with a first SYN of its own, and the first to be there
 * counts. Rejected: to give an attempt up after that time. A path that is slow, or full of our own
 * bulk, may need longer for a handshake, and would never have one.
 */
#include "arrival_internal.h"

#include <errno.h>
#include <poll.h>

#include <godwit/sys.h>

/* As long as an attempt lives: what the silence of a peer may last. */
#define DIAL_TIMEOUT_MS ((uint32_t)(ARRIVAL_SILENCE_NS_MAX / 1000000))

_Static_assert(ARRIVAL_DIAL_COUNT_MAX *ARRIVAL_DIAL_NS >= ARRIVAL_SILENCE_NS_MAX,
	       "an attempt that is pushed out has had its time");

static void drop(struct arrival_dial *dial, uint32_t index)
{
	/* Closing takes it out of the epoll set: nobody else has the descriptor. */
	(void)gw_sys_close(dial->fds[index]);
	dial->count--;
	for (uint32_t i = index; i < dial->count; i++)
		dial->fds[i] = dial->fds[i + 1];
}

void dial_stop(struct arrival_dial *dial)
{
	while (dial->count > 0)
		drop(dial, dial->count - 1);
}

int dial_more(struct arrival_dial *dial, const char *host, uint32_t port, int epoll_fd,
	      uint32_t epoll_tag)
{
	struct epoll_event event = {.events = EPOLLOUT, .data.u32 = epoll_tag};
	int fd = -1;
	int err = gw_grpc_connect(host, port, DIAL_TIMEOUT_MS, &fd);

	if (err < 0)
		return err;
	err = gw_sys_epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event);
	if (err < 0) {
		(void)gw_sys_close(fd);
		return err;
	}
	if (dial->count == ARRIVAL_DIAL_COUNT_MAX)
		drop(dial, 0);
	dial->fds[dial->count++] = fd;
	return 0;
}

/* 1 connected; 0 on its way; -errno. */
static int look(int fd)
{
	struct pollfd poll_fd = {.fd = fd, .events = POLLOUT};
	int error = 0;
	socklen_t len = sizeof(error);
	int got = gw_sys_poll(&poll_fd, 1, 0);

	if (got <= 0)
		return got == -EINTR ? 0 : got;
	got = gw_sys_getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &len);
	if (got < 0)
		return got;
	return error ? -error : 1;
}

int dial_take(struct arrival_dial *dial, int *ret_fd)
{
	int err = 0;

	for (uint32_t i = 0; i < dial->count;) {
		const int fd = dial->fds[i];
		const int got = look(fd);

		if (got == 0) {
			i++;
			continue;
		}
		if (got > 0) {
			dial->fds[i] = dial->fds[--dial->count];
			dial_stop(dial);
			*ret_fd = fd;
			return 1;
		}
		err = got;
		drop(dial, i);
	}
	/* While others are on their way nothing has failed. */
	return dial->count > 0 ? 0 : err;
}
