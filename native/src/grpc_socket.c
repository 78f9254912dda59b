/* SPDX-License-Identifier: Apache-2.0 */
/*
 * grpc_socket.c - sockets as the wire wants them.
 *
 * Threads, Errors, Ownership, Units: see grpc.h.
 * Source: tcp(7).
 */
#include "grpc_socket.h"

#include <godwit/grpc.h>
#include <godwit/sys.h>

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <string.h>

int socket_address(const char *host, uint32_t port, struct sockaddr_storage *ret_address,
		   socklen_t *ret_len)
{
	struct sockaddr_in v4 = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
	struct sockaddr_in6 v6 = {.sin6_family = AF_INET6, .sin6_port = htons((uint16_t)port)};

	if (!host || port > UINT16_MAX)
		return -EINVAL;
	if (inet_pton(AF_INET, host, &v4.sin_addr) == 1) {
		memcpy(ret_address, &v4, sizeof(v4));
		*ret_len = sizeof(v4);
		return 0;
	}
	if (inet_pton(AF_INET6, host, &v6.sin6_addr) == 1) {
		memcpy(ret_address, &v6, sizeof(v6));
		*ret_len = sizeof(v6);
		return 0;
	}
	return -EINVAL;
}

/* linux/tcp.h of 6.15; older headers do not have it. */
#ifndef TCP_RTO_MAX_MS
#define TCP_RTO_MAX_MS 44
#endif
#define RTO_MAX_MS 1000u

int gw_grpc_tune_socket(int fd, uint32_t timeout_ms)
{
	const int one = 1;
	const uint32_t rto_max_ms = RTO_MAX_MS;
	int err;

	/*
	 * After a cut the connection goes on with the next retransmission: within a second, not
	 * after 1.6 s or 3.2 s. A hint: kernels before 6.15 have only the other one, which keeps a
	 * stream of few segments at its first time-out for six of them.
	 */
	(void)gw_sys_setsockopt(fd, IPPROTO_TCP, TCP_RTO_MAX_MS, &rto_max_ms, sizeof(rto_max_ms));
	(void)gw_sys_setsockopt(fd, IPPROTO_TCP, TCP_THIN_LINEAR_TIMEOUTS, &one, sizeof(one));

	/* A page must not wait for the next one to fill a segment. */
	err = gw_sys_setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	if (err)
		return err;
	return gw_sys_setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &timeout_ms,
				 sizeof(timeout_ms));
}

int gw_grpc_connect(const char *host, uint32_t port, uint32_t timeout_ms, int *ret_fd)
{
	struct sockaddr_storage address;
	socklen_t len;
	int fd;
	int err;

	if (port == 0)
		return -EINVAL;
	err = socket_address(host, port, &address, &len);
	if (err)
		return err;
	fd = gw_sys_socket(address.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return fd;
	err = gw_grpc_tune_socket(fd, timeout_ms);
	if (!err)
		err = gw_sys_connect(fd, (struct sockaddr *)&address, len);
	if (err && err != -EINPROGRESS && err != -EINTR) {
		gw_sys_close(fd);
		return err;
	}
	*ret_fd = fd;
	return 0;
}
