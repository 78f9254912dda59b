/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tls_internal.h - what the files of TLS share.
 *
 * Threads    See tls.h. An identity's fields are guarded by its lock, but for the two counters.
 * Errors     0 or -errno.
 * Ownership  An identity owns its context, a session refers to the one that it was made with.
 * Units      Bytes.
 * Source     tls.h.
 */
#ifndef GW_TLS_INTERNAL_H
#define GW_TLS_INTERNAL_H

#include <godwit/tls.h>

#include <openssl/ssl.h>
#include <openssl/x509.h>
#include <pthread.h>
#include <stdatomic.h>

struct tls_pin {
	uint8_t key[GW_TLS_KEY_LEN];
	uint32_t count;
};

/* What a server gave us to come back with. One a name, the newest. */
#define TLS_TICKET_COUNT_MAX 32

struct tls_ticket {
	char name[GW_TLS_NAME_LEN_MAX + 1];
	SSL_SESSION *session;
};

struct gw_tls_identity {
	/* Guards context, pins and tickets. Held for copies only, never during a handshake; no
	 * callback of OpenSSL runs with it held by its caller. */
	pthread_mutex_t lock;
	SSL_CTX *context;
	size_t pin_count;
	struct tls_pin pins[GW_TLS_PIN_COUNT_MAX];
	size_t ticket_next;
	struct tls_ticket tickets[TLS_TICKET_COUNT_MAX];
	/* relaxed: a count for people. */
	_Atomic uint64_t pinned_count;
	/* Last to leave frees: acq_rel on the way down, so that what others did happens before. */
	atomic_uint ref_count;
	char *certificate_path;
	char *key_path;
	char *authority_path;
};

/* A session of the context in force, with `identity` as its application data. NULL: no memory. */
SSL *tls_identity_session(struct gw_tls_identity *identity);
/* What is remembered for this server; NULL: nothing. The caller frees it. */
SSL_SESSION *tls_identity_ticket(struct gw_tls_identity *identity, const char *name);
/* SHA-256 of the SubjectPublicKeyInfo. Returns 0; -EBADMSG. */
int tls_key_of(const X509 *certificate, uint8_t ret_key[GW_TLS_KEY_LEN]);
/* What OpenSSL says went wrong last in this thread, "" if nothing; the queue is empty then. */
void tls_take_error(char *ret_text, size_t len);

#endif /* GW_TLS_INTERNAL_H */
