/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tls_identity.c - certificates, keys that are pinned, sessions that can be resumed.
 *
 * Threads, Errors, Ownership, Units: see tls.h.
 * Source: RFC 8446; SSL_CTX_set_verify(3), SSL_CTX_sess_set_new_cb(3).
 */
#include "tls_internal.h"

#include <errno.h>
#include <openssl/err.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define PATH_LEN_MAX 4095
/* Hardware does AES; ChaCha is for machines without. */
#define SUITES "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256"
#define GROUPS "X25519:P-256"
/* A link that was lost is back within this, or a handshake more does not matter. */
#define RESUME_S 3600

static const uint8_t alpn[] = {2, 'h', '2'};
static const uint8_t session_context[] = "godwit";

void tls_take_error(char *ret_text, size_t len)
{
	const unsigned long code = ERR_peek_last_error();
	const char *text = code ? ERR_reason_error_string(code) : NULL;

	snprintf(ret_text, len, "%s", text ? text : "");
	ERR_clear_error();
}

/* "what: why", or what alone. */
static void say(char *ret_reason, const char *what)
{
	char why[96];

	tls_take_error(why, sizeof(why));
	if (ret_reason)
		snprintf(ret_reason, GW_TLS_REASON_LEN_MAX, "%s%s%s", what, why[0] ? ": " : "",
			 why);
}

int tls_key_of(const X509 *certificate, uint8_t ret_key[GW_TLS_KEY_LEN])
{
	uint8_t *der = NULL;
	unsigned int len = 0;
	const int der_len = i2d_X509_PUBKEY(X509_get_X509_PUBKEY(certificate), &der);
	int done;

	if (der_len <= 0)
		return -EBADMSG;
	done = EVP_Digest(der, (size_t)der_len, ret_key, &len, EVP_sha256(), NULL);
	OPENSSL_free(der);
	return done == 1 && len == GW_TLS_KEY_LEN ? 0 : -EBADMSG;
}

/* --- pins ------------------------------------------------------------------------------------ */

/* With the lock held. NULL: it is not pinned. */
static struct tls_pin *find_pin(struct gw_tls_identity *identity, const uint8_t *key)
{
	for (size_t i = 0; i < identity->pin_count; i++) {
		if (memcmp(identity->pins[i].key, key, GW_TLS_KEY_LEN) == 0)
			return &identity->pins[i];
	}
	return NULL;
}

int gw_tls_identity_pin(struct gw_tls_identity *identity, const uint8_t key[GW_TLS_KEY_LEN])
{
	struct tls_pin *pin;
	int err = 0;

	pthread_mutex_lock(&identity->lock);
	pin = find_pin(identity, key);
	if (pin) {
		pin->count++;
	} else if (identity->pin_count == GW_TLS_PIN_COUNT_MAX) {
		err = -ENOSPC;
	} else {
		pin = &identity->pins[identity->pin_count++];
		memcpy(pin->key, key, GW_TLS_KEY_LEN);
		pin->count = 1;
	}
	pthread_mutex_unlock(&identity->lock);
	return err;
}

int gw_tls_identity_unpin(struct gw_tls_identity *identity, const uint8_t key[GW_TLS_KEY_LEN])
{
	struct tls_pin *pin;

	pthread_mutex_lock(&identity->lock);
	pin = find_pin(identity, key);
	if (pin && --pin->count == 0)
		*pin = identity->pins[--identity->pin_count];
	pthread_mutex_unlock(&identity->lock);
	return pin ? 0 : -ENOENT;
}

uint64_t gw_tls_identity_pinned_count(const struct gw_tls_identity *identity)
{
	return atomic_load_explicit(&identity->pinned_count, memory_order_relaxed);
}

static bool is_pinned(struct gw_tls_identity *identity, const X509 *certificate)
{
	uint8_t key[GW_TLS_KEY_LEN];
	bool found;

	if (!certificate || tls_key_of(certificate, key))
		return false;
	pthread_mutex_lock(&identity->lock);
	found = find_pin(identity, key) != NULL;
	pthread_mutex_unlock(&identity->lock);
	return found;
}

/*
 * Asked for each fault of a chain. The handshake proves later that the peer has the key, so for a
 * pinned one nothing is left to ask of dates and signatures. Its name is: a node's key does not
 * speak for another node.
 */
static int verify(int good, X509_STORE_CTX *store)
{
	SSL *ssl = X509_STORE_CTX_get_ex_data(store, SSL_get_ex_data_X509_STORE_CTX_idx());
	struct gw_tls_identity *identity = SSL_get_app_data(ssl);

	if (good)
		return 1;
	if (X509_STORE_CTX_get_error(store) == X509_V_ERR_HOSTNAME_MISMATCH)
		return 0;
	if (!is_pinned(identity, X509_STORE_CTX_get0_cert(store)))
		return 0;
	atomic_fetch_add_explicit(&identity->pinned_count, 1, memory_order_relaxed);
	X509_STORE_CTX_set_error(store, X509_V_OK);
	return 1;
}

/* --- sessions that can be resumed ------------------------------------------------------------ */

/* A server gave us a ticket. Returns 1 if it is kept. */
static int remember(SSL *ssl, SSL_SESSION *session)
{
	struct gw_tls_identity *identity = SSL_get_app_data(ssl);
	const char *name = SSL_get_servername(ssl, TLSEXT_NAMETYPE_host_name);
	struct tls_ticket *ticket = NULL;
	int kept = 0;

	if (SSL_is_server(ssl) || !name || strlen(name) > GW_TLS_NAME_LEN_MAX)
		return 0;
	pthread_mutex_lock(&identity->lock);
	/* Of a context that a reload has replaced: it would bring back what was given up. */
	if (SSL_get_SSL_CTX(ssl) == identity->context) {
		for (size_t i = 0; i < TLS_TICKET_COUNT_MAX && !ticket; i++) {
			if (strcmp(identity->tickets[i].name, name) == 0)
				ticket = &identity->tickets[i];
		}
		if (!ticket) {
			ticket = &identity->tickets[identity->ticket_next];
			identity->ticket_next = (identity->ticket_next + 1) % TLS_TICKET_COUNT_MAX;
		}
		SSL_SESSION_free(ticket->session);
		snprintf(ticket->name, sizeof(ticket->name), "%s", name);
		ticket->session = session;
		kept = 1;
	}
	pthread_mutex_unlock(&identity->lock);
	return kept;
}

SSL_SESSION *tls_identity_ticket(struct gw_tls_identity *identity, const char *name)
{
	SSL_SESSION *session = NULL;

	pthread_mutex_lock(&identity->lock);
	for (size_t i = 0; i < TLS_TICKET_COUNT_MAX && !session; i++) {
		if (identity->tickets[i].session && strcmp(identity->tickets[i].name, name) == 0) {
			session = identity->tickets[i].session;
			SSL_SESSION_up_ref(session);
		}
	}
	pthread_mutex_unlock(&identity->lock);
	return session;
}

/* With the lock held, or by the last owner. */
static void forget_tickets(struct gw_tls_identity *identity)
{
	for (size_t i = 0; i < TLS_TICKET_COUNT_MAX; i++) {
		SSL_SESSION_free(identity->tickets[i].session);
		identity->tickets[i] = (struct tls_ticket){.session = NULL};
	}
}

/* --- the context ----------------------------------------------------------------------------- */

/* gRPC is HTTP/2: a peer that offers anything else is refused. */
static int choose_alpn(SSL *ssl, const uint8_t **ret_chosen, uint8_t *ret_len,
		       const uint8_t *offered, unsigned int offered_len, void *argument)
{
	uint8_t *chosen = NULL;

	(void)ssl;
	(void)argument;
	if (SSL_select_next_proto(&chosen, ret_len, alpn, sizeof(alpn), offered, offered_len) !=
	    OPENSSL_NPN_NEGOTIATED)
		return SSL_TLSEXT_ERR_ALERT_FATAL;
	*ret_chosen = chosen;
	return SSL_TLSEXT_ERR_OK;
}

/* Returns 0; -errno with the reason. access(2) first: OpenSSL does not say which file, nor why. */
static int load_files(const struct gw_tls_identity *identity, SSL_CTX *context, char *ret_reason)
{
	const char *paths[] = {identity->certificate_path, identity->key_path,
			       identity->authority_path};

	for (size_t i = 0; i < sizeof(paths) / sizeof(paths[0]); i++) {
		if (access(paths[i], R_OK) == 0)
			continue;
		const int err = errno;

		if (ret_reason)
			snprintf(ret_reason, GW_TLS_REASON_LEN_MAX, "%.100s: %s", paths[i],
				 strerror(err));
		return -err;
	}
	if (SSL_CTX_use_certificate_chain_file(context, identity->certificate_path) != 1) {
		say(ret_reason, "the certificate's file is no PEM certificate");
		return -EBADMSG;
	}
	if (SSL_CTX_use_PrivateKey_file(context, identity->key_path, SSL_FILETYPE_PEM) != 1 ||
	    SSL_CTX_check_private_key(context) != 1) {
		say(ret_reason, "the key's file is no PEM key, or not the certificate's");
		return -EBADMSG;
	}
	if (SSL_CTX_load_verify_file(context, identity->authority_path) != 1) {
		say(ret_reason, "the authority's file has no PEM certificate");
		return -EBADMSG;
	}
	return 0;
}

static bool configure(SSL_CTX *context)
{
	SSL_CTX_set_options(context, SSL_OP_IGNORE_UNEXPECTED_EOF | SSL_OP_NO_COMPRESSION);
	SSL_CTX_set_mode(context,
			 SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
	SSL_CTX_set_verify(context, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, verify);
	SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_CLIENT | SSL_SESS_CACHE_SERVER |
							SSL_SESS_CACHE_NO_INTERNAL);
	SSL_CTX_sess_set_new_cb(context, remember);
	SSL_CTX_set_timeout(context, RESUME_S);
	SSL_CTX_set_alpn_select_cb(context, choose_alpn, NULL);
	return SSL_CTX_set_min_proto_version(context, TLS1_3_VERSION) == 1 &&
	       SSL_CTX_set_ciphersuites(context, SUITES) == 1 &&
	       SSL_CTX_set1_groups_list(context, GROUPS) == 1 &&
	       SSL_CTX_set_num_tickets(context, 1) == 1 &&
	       SSL_CTX_set_session_id_context(context, session_context,
					      sizeof(session_context) - 1) == 1 &&
	       SSL_CTX_set_alpn_protos(context, alpn, sizeof(alpn)) == 0;
}

static int make_context(const struct gw_tls_identity *identity, char *ret_reason,
			SSL_CTX **ret_context)
{
	SSL_CTX *context;
	int err;

	ERR_clear_error();
	context = SSL_CTX_new(TLS_method());
	if (!context || !configure(context)) {
		say(ret_reason, "TLS 1.3 cannot be had from this OpenSSL");
		SSL_CTX_free(context);
		return -ENOMEM;
	}
	err = load_files(identity, context, ret_reason);
	if (err) {
		SSL_CTX_free(context);
		return err;
	}
	*ret_context = context;
	return 0;
}

SSL *tls_identity_session(struct gw_tls_identity *identity)
{
	SSL_CTX *context;
	SSL *ssl;

	pthread_mutex_lock(&identity->lock);
	context = identity->context;
	SSL_CTX_up_ref(context);
	pthread_mutex_unlock(&identity->lock);
	ssl = SSL_new(context);
	SSL_CTX_free(context);
	if (ssl)
		SSL_set_app_data(ssl, identity);
	return ssl;
}

/* --- life ------------------------------------------------------------------------------------ */

static bool is_path(const char *path)
{
	return path && path[0] && strlen(path) <= PATH_LEN_MAX;
}

static void destroy(struct gw_tls_identity *identity)
{
	forget_tickets(identity);
	SSL_CTX_free(identity->context);
	pthread_mutex_destroy(&identity->lock);
	free(identity->certificate_path);
	free(identity->key_path);
	free(identity->authority_path);
	free(identity);
}

int gw_tls_identity_create(const struct gw_tls_files *files, char *ret_reason,
			   struct gw_tls_identity **ret_identity)
{
	struct gw_tls_identity *identity;
	int err = -ENOMEM;

	if (!is_path(files->certificate_path) || !is_path(files->key_path) ||
	    !is_path(files->authority_path))
		return -EINVAL;
	identity = calloc(1, sizeof(*identity));
	if (!identity)
		return -ENOMEM;
	pthread_mutex_init(&identity->lock, NULL);
	atomic_init(&identity->ref_count, 1);
	identity->certificate_path = strdup(files->certificate_path);
	identity->key_path = strdup(files->key_path);
	identity->authority_path = strdup(files->authority_path);
	if (identity->certificate_path && identity->key_path && identity->authority_path)
		err = make_context(identity, ret_reason, &identity->context);
	if (err) {
		destroy(identity);
		return err;
	}
	*ret_identity = identity;
	return 0;
}

int gw_tls_identity_reload(struct gw_tls_identity *identity, char *ret_reason)
{
	SSL_CTX *context;
	SSL_CTX *old;
	int err;

	err = make_context(identity, ret_reason, &context);
	if (err)
		return err;
	pthread_mutex_lock(&identity->lock);
	old = identity->context;
	identity->context = context;
	forget_tickets(identity);
	pthread_mutex_unlock(&identity->lock);
	SSL_CTX_free(old);
	return 0;
}

struct gw_tls_identity *gw_tls_identity_ref(struct gw_tls_identity *identity)
{
	/* relaxed: who refers to it has a reference already. */
	if (identity)
		atomic_fetch_add_explicit(&identity->ref_count, 1, memory_order_relaxed);
	return identity;
}

void gw_tls_identity_unref(struct gw_tls_identity *identity)
{
	if (identity &&
	    atomic_fetch_sub_explicit(&identity->ref_count, 1, memory_order_acq_rel) == 1)
		destroy(identity);
}
