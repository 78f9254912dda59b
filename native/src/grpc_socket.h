/* SPDX-License-Identifier: Apache-2.0 */
/*
 * grpc_socket.h - numeric addresses.
 *
 * Threads    Pure.
 * Errors     0; -EINVAL.
 * Ownership  None.
 * Units      Port in host order.
 * Source     inet_pton(3).
 */
#ifndef GW_GRPC_SOCKET_H
#define GW_GRPC_SOCKET_H

#include <stdint.h>
#include <sys/socket.h>

/* IPv4 or IPv6, numeric; names are resolved by nobody on the page path. */
int socket_address(const char *host, uint32_t port, struct sockaddr_storage *ret_address,
		   socklen_t *ret_len);

#endif /* GW_GRPC_SOCKET_H */
