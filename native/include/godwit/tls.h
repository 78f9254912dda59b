/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tls.h - mutual TLS 1.3 on a non-blocking socket, driven by the owner's poll loop.
 *
 * Threads    An identity may be used from any thread. A session belongs to one thread.
 * Errors     Functions return a count or 0, or -errno; they never log. Why a session failed is
 *            in gw_tls_reason, in words.
 * Ownership  A session refers to its identity and borrows the fd: closing it is the owner's.
 * Units      Bytes.
 * Source     RFC 8446; RFC 6125 (names); OpenSSL 3: SSL_read_ex(3), BIO_meth_new(3).
 *
 * Certificates are looked at when a connection is made, never while it lives. A key that is pinned
 * stays good whatever its certificate's dates or its authority say: the memory of a guest that has
 * been split between two hosts must go on moving (DESIGN 3.4). A pinned key counts as alarm, see
 * gw_tls_identity_pinned_count.
 */
#ifndef GW_TLS_H
#define GW_TLS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

/* cdef:begin - extracted for cffi by tools/gen_ffi.py; keep it plain C. */

#define GW_TLS_KEY_LEN	      32 /* SHA-256 of the peer's SubjectPublicKeyInfo */
#define GW_TLS_PIN_COUNT_MAX  256
#define GW_TLS_NAME_LEN_MAX   253
#define GW_TLS_REASON_LEN_MAX 192

/* Who this process is, and whom it believes. Shared by sessions. */
struct gw_tls_identity;

struct gw_tls_files {
	const char *certificate_path; /* PEM: own certificate, then intermediate ones */
	const char *key_path;	      /* PEM: its key, without a passphrase */
	const char *authority_path;   /* PEM: certificates that sign peers; one or several */
};

/*
 * Read the files. `ret_reason` (GW_TLS_REASON_LEN_MAX, may be NULL) says what is wrong with them.
 *
 * Returns 0; -EINVAL a path is missing or too long; -ENOENT, -EACCES a file cannot be read;
 * -EBADMSG it is no PEM, or the key is not the certificate's; -ENOMEM.
 */
int gw_tls_identity_create(const struct gw_tls_files *files, char *ret_reason,
			   struct gw_tls_identity **ret_identity);

/*
 * Read the same files again: for sessions from now on. Those that live go on as they are, and
 * sessions remembered for resumption are forgotten. The same errors; after one, nothing has changed.
 */
int gw_tls_identity_reload(struct gw_tls_identity *identity, char *ret_reason);

/* Another reference; each is given back with unref. NULL is a no-op. */
struct gw_tls_identity *gw_tls_identity_ref(struct gw_tls_identity *identity);
void gw_tls_identity_unref(struct gw_tls_identity *identity);

/*
 * Believe this key from now on, whatever is wrong with its certificate, its name excepted. Pinned
 * twice it must be unpinned twice. Returns 0; -ENOSPC there are GW_TLS_PIN_COUNT_MAX.
 */
int gw_tls_identity_pin(struct gw_tls_identity *identity, const uint8_t key[GW_TLS_KEY_LEN]);
/* Returns 0; -ENOENT it is not pinned. */
int gw_tls_identity_unpin(struct gw_tls_identity *identity, const uint8_t key[GW_TLS_KEY_LEN]);
/* How many handshakes would have been refused but for a pin. An operator should know. */
uint64_t gw_tls_identity_pinned_count(const struct gw_tls_identity *identity);

/* cdef:end */

/* The TLS of one connection. */
struct gw_tls;

/*
 * A session on `fd`, which may still be connecting. The handshake is made by the first send or recv.
 * `server_name` is a name that the server's certificate must have (a DNS subject alternative name).
 *
 * Returns 0; -EINVAL the name is empty or too long; -ENOMEM.
 */
int gw_tls_client_create(struct gw_tls_identity *identity, int fd, const char *server_name,
			 struct gw_tls **ret_tls);
int gw_tls_server_create(struct gw_tls_identity *identity, int fd, struct gw_tls **ret_tls);

/* NULL is a no-op. The fd stays open; the peer is told as far as the socket takes it. */
void gw_tls_destroy(struct gw_tls *tls);

/*
 * Send as much of the pieces as there is room for.
 *
 * Returns how many bytes were taken, perhaps fewer than given; -EAGAIN none: wait for the socket
 * (writable if gw_tls_wants_write, else readable: the handshake waits for the peer); -EPROTO the
 * handshake failed, or the peer broke the protocol; -errno of send(2), recv(2).
 */
ssize_t gw_tls_send(struct gw_tls *tls, const struct iovec *pieces, size_t piece_count);

/*
 * Receive up to `len` bytes. Fewer than `len` means that nothing more is here, in the socket or
 * in the session: waiting for the socket is right then, and only then.
 *
 * Returns how many; 0 the peer closed; -EAGAIN none are here; the errors of gw_tls_send.
 */
ssize_t gw_tls_recv(struct gw_tls *tls, void *ret_buffer, size_t len);

/*
 * While held, recv gives out only what has been received already, and does not ask the socket: how an
 * owner that has read enough for once gets at what no poll would tell it of.
 */
void gw_tls_hold_input(struct gw_tls *tls, bool hold);

/* Hand over what the socket did not take. Returns 0; -EAGAIN something is left; -errno. */
int gw_tls_flush(struct gw_tls *tls);
/* True while there are bytes that the socket did not take. */
bool gw_tls_wants_write(const struct gw_tls *tls);

/* True once the peer has proved who it is. A server knows it before the first byte of recv. */
bool gw_tls_is_up(const struct gw_tls *tls);
/* True if the handshake went without certificates, by what was remembered of an earlier one. */
bool gw_tls_is_resumed(const struct gw_tls *tls);
/* True if the peer's certificate has this name. */
bool gw_tls_peer_is(const struct gw_tls *tls, const char *name);
/* The first DNS name of the peer's certificate, NUL-terminated. Returns its length; -ENOENT; -ENOSPC. */
int gw_tls_peer_name(const struct gw_tls *tls, char *ret_name, size_t len);
/* What gw_tls_identity_pin takes. Returns 0; -ENOTCONN the session is not up. */
int gw_tls_peer_key(const struct gw_tls *tls, uint8_t ret_key[GW_TLS_KEY_LEN]);
/* Why the session failed, "" if it has not. Valid as long as the session. */
const char *gw_tls_reason(const struct gw_tls *tls);

#endif /* GW_TLS_H */
