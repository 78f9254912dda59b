/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tls.c - the session of one connection: bytes between the owner, OpenSSL and the socket.
 *
 * Threads, Errors, Ownership, Units, Source: see tls.h.
 *
 * OpenSSL talks to two buffers of ours instead of the socket, so that one recv brings many records
 * and one send takes many: a record of 16 KiB a system call would cost more than its encryption.
 * It also keeps every system call in sys.c, where a test can fail it.
 */
#include "tls_internal.h"

#include <godwit/sys.h>

#include <errno.h>
#include <openssl/err.h>
#include <openssl/x509v3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define RECORD_LEN_MAX 16384ul
/* A record and what TLS puts round it. */
#define RECORD_ROOM (RECORD_LEN_MAX + 512)
#define BUFFER_LEN  262144ul

struct tls_buffer {
	size_t first; /* of the bytes that are there */
	size_t len;   /* end of them */
	uint8_t *data;
};

struct gw_tls {
	SSL *ssl;
	struct gw_tls_identity *identity;
	int fd;
	int dead;     /* -errno once it has failed */
	int error;    /* -errno of the system call that OpenSSL was told of as an error */
	bool closed;  /* the peer sends no more */
	bool held;    /* the socket is not asked */
	bool drained; /* a short read has emptied it: until the next recv */
	struct tls_buffer in;
	struct tls_buffer out;
	char reason[GW_TLS_REASON_LEN_MAX];
	uint8_t record[RECORD_LEN_MAX];
};

static size_t there(const struct tls_buffer *buffer)
{
	return buffer->len - buffer->first;
}

/* --- what OpenSSL takes for the socket ------------------------------------------------------- */

/* Returns 1 there are bytes; 0 the peer closed; -EAGAIN; -errno. */
static int fill(struct gw_tls *tls)
{
	ssize_t got;

	if (there(&tls->in) > 0)
		return 1;
	if (tls->held || tls->drained)
		return -EAGAIN;
	got = gw_sys_recv(tls->fd, tls->in.data, BUFFER_LEN, MSG_DONTWAIT);
	if (got == -EINTR)
		return -EAGAIN;
	if (got <= 0)
		return (int)got;
	tls->in.first = 0;
	tls->in.len = (size_t)got;
	tls->drained = (size_t)got < BUFFER_LEN;
	return 1;
}

static int bio_read(BIO *bio, char *ret_data, size_t len, size_t *ret_len)
{
	struct gw_tls *tls = BIO_get_data(bio);
	const int got = fill(tls);
	size_t taken;

	BIO_clear_retry_flags(bio);
	*ret_len = 0;
	if (got <= 0) {
		if (got == -EAGAIN)
			BIO_set_retry_read(bio);
		else if (got == 0)
			tls->closed = true;
		else
			tls->error = got;
		return 0;
	}
	taken = there(&tls->in) < len ? there(&tls->in) : len;
	memcpy(ret_data, tls->in.data + tls->in.first, taken);
	tls->in.first += taken;
	*ret_len = taken;
	return 1;
}

static int bio_write(BIO *bio, const char *data, size_t len, size_t *ret_len)
{
	struct gw_tls *tls = BIO_get_data(bio);
	const size_t room = BUFFER_LEN - tls->out.len;
	const size_t taken = len < room ? len : room;

	BIO_clear_retry_flags(bio);
	*ret_len = taken;
	if (taken == 0) {
		BIO_set_retry_write(bio);
		return 0;
	}
	memcpy(tls->out.data + tls->out.len, data, taken);
	tls->out.len += taken;
	return 1;
}

static long bio_control(BIO *bio, int command, long number, void *pointer)
{
	const struct gw_tls *tls = BIO_get_data(bio);

	(void)number;
	(void)pointer;
	if (command == BIO_CTRL_FLUSH)
		return 1;
	if (command == BIO_CTRL_EOF)
		return tls->closed;
	return 0;
}

static BIO_METHOD *method;

static void make_method(void)
{
	BIO_METHOD *made = BIO_meth_new(BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, "godwit");

	if (made && BIO_meth_set_read_ex(made, bio_read) &&
	    BIO_meth_set_write_ex(made, bio_write) && BIO_meth_set_ctrl(made, bio_control))
		method = made;
	else
		BIO_meth_free(made);
}

/* Never freed: it lives as long as the process. NULL: no memory. */
static const BIO_METHOD *get_method(void)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;

	pthread_once(&once, make_method);
	return method;
}

/* --- life ------------------------------------------------------------------------------------ */

static void free_session(struct gw_tls *tls)
{
	SSL_free(tls->ssl);
	gw_tls_identity_unref(tls->identity);
	/* Plain text has been in neither, but for `record`. */
	free(tls->in.data);
	free(tls->out.data);
	OPENSSL_cleanse(tls->record, sizeof(tls->record));
	free(tls);
}

static int create(struct gw_tls_identity *identity, int fd, struct gw_tls **ret_tls)
{
	struct gw_tls *tls = calloc(1, sizeof(*tls));
	BIO *bio;

	if (!tls)
		return -ENOMEM;
	tls->identity = gw_tls_identity_ref(identity);
	tls->fd = fd;
	tls->in.data = malloc(BUFFER_LEN);
	tls->out.data = malloc(BUFFER_LEN);
	tls->ssl = tls_identity_session(identity);
	bio = get_method() ? BIO_new(get_method()) : NULL;
	if (!tls->in.data || !tls->out.data || !tls->ssl || !bio) {
		BIO_free(bio);
		free_session(tls);
		return -ENOMEM;
	}
	BIO_set_data(bio, tls);
	BIO_set_init(bio, 1);
	SSL_set_bio(tls->ssl, bio, bio);
	*ret_tls = tls;
	return 0;
}

int gw_tls_client_create(struct gw_tls_identity *identity, int fd, const char *server_name,
			 struct gw_tls **ret_tls)
{
	SSL_SESSION *ticket;
	struct gw_tls *tls;
	int err;

	if (!server_name || !server_name[0] || strlen(server_name) > GW_TLS_NAME_LEN_MAX)
		return -EINVAL;
	err = create(identity, fd, &tls);
	if (err)
		return err;
	SSL_set_connect_state(tls->ssl);
	SSL_set_hostflags(tls->ssl,
			  X509_CHECK_FLAG_NO_WILDCARDS | X509_CHECK_FLAG_NEVER_CHECK_SUBJECT);
	if (SSL_set1_host(tls->ssl, server_name) != 1 ||
	    SSL_set_tlsext_host_name(tls->ssl, server_name) != 1) {
		ERR_clear_error();
		free_session(tls);
		return -ENOMEM;
	}
	ticket = tls_identity_ticket(identity, server_name);
	if (ticket) {
		SSL_set_session(tls->ssl, ticket);
		SSL_SESSION_free(ticket);
	}
	*ret_tls = tls;
	return 0;
}

int gw_tls_server_create(struct gw_tls_identity *identity, int fd, struct gw_tls **ret_tls)
{
	struct gw_tls *tls;
	const int err = create(identity, fd, &tls);

	if (err)
		return err;
	SSL_set_accept_state(tls->ssl);
	*ret_tls = tls;
	return 0;
}

void gw_tls_destroy(struct gw_tls *tls)
{
	if (!tls)
		return;
	if (!tls->dead && SSL_is_init_finished(tls->ssl)) {
		/* close_notify, for a peer that cares; whether it arrives does not matter. */
		SSL_shutdown(tls->ssl);
		(void)gw_tls_flush(tls);
	}
	ERR_clear_error();
	free_session(tls);
}

/* --- bytes ----------------------------------------------------------------------------------- */

static int die(struct gw_tls *tls, int err)
{
	tls->dead = err;
	return err;
}

/* OpenSSL has failed: say why. */
static int die_of_protocol(struct gw_tls *tls)
{
	const long verdict = SSL_get_verify_result(tls->ssl);
	char text[96];

	tls_take_error(text, sizeof(text));
	if (tls->error)
		return die(tls, tls->error);
	if (verdict != X509_V_OK)
		snprintf(tls->reason, sizeof(tls->reason), "the peer's certificate: %s",
			 X509_verify_cert_error_string(verdict));
	else
		snprintf(tls->reason, sizeof(tls->reason), "%s",
			 text[0] ? text : "the peer broke the protocol");
	/* The alert that says so to the peer. */
	(void)gw_tls_flush(tls);
	return die(tls, -EPROTO);
}

int gw_tls_flush(struct gw_tls *tls)
{
	while (there(&tls->out) > 0) {
		const ssize_t sent = gw_sys_send(tls->fd, tls->out.data + tls->out.first,
						 there(&tls->out), MSG_NOSIGNAL | MSG_DONTWAIT);

		/* ENOTCONN: it is still connecting. */
		if (sent == -EAGAIN || sent == -EINTR || sent == -ENOTCONN)
			break;
		if (sent < 0)
			return tls->dead ? tls->dead : die(tls, (int)sent);
		tls->out.first += (size_t)sent;
	}
	if (there(&tls->out) > 0)
		return -EAGAIN;
	tls->out.first = 0;
	tls->out.len = 0;
	return 0;
}

void gw_tls_hold_input(struct gw_tls *tls, bool hold)
{
	tls->held = hold;
}

bool gw_tls_wants_write(const struct gw_tls *tls)
{
	return !tls->dead && there(&tls->out) > 0;
}

/*
 * The next bytes of the pieces, at most a record: in place where one piece has a record's worth,
 * gathered otherwise, so that a frame's header does not become a record of its own.
 */
static const uint8_t *next_record(struct gw_tls *tls, const struct iovec *pieces,
				  size_t piece_count, size_t at, size_t *ret_len)
{
	size_t len = 0;

	for (size_t i = 0; i < piece_count && len < RECORD_LEN_MAX; i++) {
		const uint8_t *data = pieces[i].iov_base;
		size_t left = pieces[i].iov_len;

		if (at >= left) {
			at -= left;
			continue;
		}
		data += at;
		left -= at;
		at = 0;
		if (len == 0 && left >= RECORD_LEN_MAX) {
			*ret_len = RECORD_LEN_MAX;
			return data;
		}
		if (left > RECORD_LEN_MAX - len)
			left = RECORD_LEN_MAX - len;
		memcpy(tls->record + len, data, left);
		len += left;
	}
	*ret_len = len;
	return tls->record;
}

ssize_t gw_tls_send(struct gw_tls *tls, const struct iovec *pieces, size_t piece_count)
{
	size_t sent = 0;
	int err;

	if (tls->dead)
		return tls->dead;
	err = gw_tls_flush(tls);
	if (err && err != -EAGAIN)
		return err;
	/* A record is begun only where it has room, so that OpenSSL never keeps half of one back. */
	while (BUFFER_LEN - tls->out.len >= RECORD_ROOM) {
		size_t len, taken;
		const uint8_t *record = next_record(tls, pieces, piece_count, sent, &len);

		if (len == 0)
			break;
		ERR_clear_error();
		if (SSL_write_ex(tls->ssl, record, len, &taken) != 1) {
			err = SSL_get_error(tls->ssl, 0);
			if (err == SSL_ERROR_WANT_READ || err == SSL_ERROR_WANT_WRITE)
				break;
			return die_of_protocol(tls);
		}
		sent += taken;
	}
	err = gw_tls_flush(tls);
	if (err && err != -EAGAIN)
		return err;
	return sent > 0 ? (ssize_t)sent : -EAGAIN;
}

ssize_t gw_tls_recv(struct gw_tls *tls, void *ret_buffer, size_t len)
{
	size_t received = 0;
	int why = 0;

	if (tls->dead)
		return tls->dead;
	tls->drained = false;
	while (received < len) {
		size_t got;

		ERR_clear_error();
		if (SSL_read_ex(tls->ssl, (uint8_t *)ret_buffer + received, len - received, &got) !=
		    1) {
			why = SSL_get_error(tls->ssl, 0);
			break;
		}
		received += got;
	}
	/* Answers of the handshake, key updates. What is read is given out first: an error comes again. */
	if (why != 0 && why != SSL_ERROR_WANT_READ && why != SSL_ERROR_WANT_WRITE &&
	    received == 0) {
		if (why == SSL_ERROR_ZERO_RETURN || (tls->closed && !tls->error))
			return 0;
		return die_of_protocol(tls);
	}
	why = gw_tls_flush(tls);
	if (received > 0)
		return (ssize_t)received;
	return why && why != -EAGAIN ? why : -EAGAIN;
}

/* --- who it is ------------------------------------------------------------------------------- */

bool gw_tls_is_up(const struct gw_tls *tls)
{
	return SSL_is_init_finished(tls->ssl) && SSL_get0_peer_certificate(tls->ssl) != NULL;
}

bool gw_tls_is_resumed(const struct gw_tls *tls)
{
	return SSL_session_reused(tls->ssl) == 1;
}

bool gw_tls_peer_is(const struct gw_tls *tls, const char *name)
{
	X509 *certificate = gw_tls_is_up(tls) ? SSL_get0_peer_certificate(tls->ssl) : NULL;

	return certificate && name && name[0] &&
	       X509_check_host(certificate, name, 0,
			       X509_CHECK_FLAG_NO_WILDCARDS | X509_CHECK_FLAG_NEVER_CHECK_SUBJECT,
			       NULL) == 1;
}

int gw_tls_peer_name(const struct gw_tls *tls, char *ret_name, size_t len)
{
	const X509 *certificate = gw_tls_is_up(tls) ? SSL_get0_peer_certificate(tls->ssl) : NULL;
	GENERAL_NAMES *names;
	int found = -ENOENT;

	if (!certificate)
		return -ENOENT;
	names = X509_get_ext_d2i(certificate, NID_subject_alt_name, NULL, NULL);
	for (int i = 0; i < sk_GENERAL_NAME_num(names) && found == -ENOENT; i++) {
		const GENERAL_NAME *name = sk_GENERAL_NAME_value(names, i);
		const uint8_t *text;
		size_t text_len;

		if (name->type != GEN_DNS)
			continue;
		text = ASN1_STRING_get0_data(name->d.dNSName);
		text_len = (size_t)ASN1_STRING_length(name->d.dNSName);
		/* A name with a NUL in it is two names, depending on who reads it. */
		if (memchr(text, '\0', text_len))
			continue;
		if (text_len >= len) {
			found = -ENOSPC;
			break;
		}
		memcpy(ret_name, text, text_len);
		ret_name[text_len] = '\0';
		found = (int)text_len;
	}
	GENERAL_NAMES_free(names);
	return found;
}

int gw_tls_peer_key(const struct gw_tls *tls, uint8_t ret_key[GW_TLS_KEY_LEN])
{
	return gw_tls_is_up(tls) ? tls_key_of(SSL_get0_peer_certificate(tls->ssl), ret_key)
				 : -ENOTCONN;
}

const char *gw_tls_reason(const struct gw_tls *tls)
{
	return tls->reason;
}
