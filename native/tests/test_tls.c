/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_tls.c - mutual TLS: who is believed and who is not, that every byte arrives whatever the
 * socket does, and that a pinned key outlives its certificate.
 */
#include "check.h"
#include "tls_certs.h"

#include <godwit/sys.h>

#include <errno.h>
#include <openssl/ssl.h>
#include <pthread.h>
#include <sys/socket.h>

#define SERVER "a.node.godwit"
#define CLIENT "b.node.godwit"

struct ends {
	int fds[2];
	struct gw_tls *client;
	struct gw_tls *server;
};

static struct certs_authority authority;
static struct certs_party server_party;
static struct certs_party client_party;
static uint8_t client_key[GW_TLS_KEY_LEN];

static struct ends connect_ends(struct gw_tls_identity *client, struct gw_tls_identity *server)
{
	struct ends ends;

	CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends.fds), 0);
	CHECK_EQ(gw_tls_client_create(client, ends.fds[0], SERVER, &ends.client), 0);
	CHECK_EQ(gw_tls_server_create(server, ends.fds[1], &ends.server), 0);
	return ends;
}

static void close_ends(struct ends *ends)
{
	gw_tls_destroy(ends->client);
	gw_tls_destroy(ends->server);
	close(ends->fds[0]);
	close(ends->fds[1]);
}

/* One byte each way. Returns the first error of either end, client's first; 0 both are up. */
static int shake(const struct ends *ends)
{
	const struct iovec piece = {.iov_base = "x", .iov_len = 1};
	bool said[2] = {false, false}, heard[2] = {false, false};
	struct gw_tls *tls[2] = {ends->client, ends->server};
	int errs[2] = {0, 0};

	for (int round = 0; round < 50 && !(heard[0] && heard[1]); round++) {
		for (int i = 0; i < 2; i++) {
			char byte = 0;
			ssize_t got;

			if (errs[i])
				continue;
			if (!said[i]) {
				got = gw_tls_send(tls[i], &piece, 1);
				said[i] = got == 1;
				if (got < 0 && got != -EAGAIN)
					errs[i] = (int)got;
			}
			got = errs[i] ? -EAGAIN : gw_tls_recv(tls[i], &byte, 1);
			heard[i] |= got == 1 && byte == 'x';
			if (got == 0 || (got < 0 && got != -EAGAIN))
				errs[i] = got == 0 ? -ECONNRESET : (int)got;
		}
	}
	if (errs[0] || errs[1])
		return errs[0] ? errs[0] : errs[1];
	return heard[0] && heard[1] ? 0 : -ETIMEDOUT;
}

/* Hands over what is under way, e.g. the ticket that a server sends behind its handshake. */
static void settle(const struct ends *ends)
{
	char byte;

	for (int i = 0; i < 4; i++) {
		CHECK_EQ(gw_tls_recv(ends->client, &byte, 1), -EAGAIN);
		CHECK_EQ(gw_tls_recv(ends->server, &byte, 1), -EAGAIN);
	}
}

/* Both know who the other is, by name and by key. */
static void both_are_known(void)
{
	struct gw_tls_identity *client = certs_identity(&client_party);
	struct gw_tls_identity *server = certs_identity(&server_party);
	struct ends ends = connect_ends(client, server);
	char name[GW_TLS_NAME_LEN_MAX + 1];
	uint8_t key[GW_TLS_KEY_LEN];

	CHECK(!gw_tls_is_up(ends.server));
	CHECK_EQ(gw_tls_peer_key(ends.server, key), -ENOTCONN);
	CHECK_EQ(gw_tls_peer_name(ends.server, name, sizeof(name)), -ENOENT);
	CHECK(!gw_tls_peer_is(ends.server, CLIENT));
	CHECK_EQ(shake(&ends), 0);
	CHECK(gw_tls_is_up(ends.client) && gw_tls_is_up(ends.server));
	CHECK(gw_tls_peer_is(ends.server, CLIENT));
	CHECK(!gw_tls_peer_is(ends.server, SERVER));
	CHECK(!gw_tls_peer_is(ends.server, ""));
	CHECK(gw_tls_peer_is(ends.client, SERVER));
	CHECK_EQ(gw_tls_peer_name(ends.server, name, sizeof(name)), (int)strlen(CLIENT));
	CHECK(strcmp(name, CLIENT) == 0);
	CHECK_EQ(gw_tls_peer_name(ends.server, name, 5), -ENOSPC);
	CHECK_EQ(gw_tls_peer_key(ends.server, key), 0);
	CHECK(memcmp(key, client_key, sizeof(key)) == 0);
	/* An orderly end is an end, not an error. */
	gw_tls_destroy(ends.client);
	ends.client = NULL;
	CHECK_EQ(gw_tls_recv(ends.server, name, 1), 0);
	close_ends(&ends);
	gw_tls_identity_unref(client);
	gw_tls_identity_unref(server);
}

/* What a client with these files gets from the server, and whether somebody said why. */
static int outcome(const struct certs_party *party, struct gw_tls_identity *server)
{
	struct gw_tls_identity *client = certs_identity(party);
	struct ends ends = connect_ends(client, server);
	const int err = shake(&ends);

	if (err == -EPROTO)
		CHECK(gw_tls_reason(ends.client)[0] || gw_tls_reason(ends.server)[0]);
	CHECK(!err || !gw_tls_is_up(ends.server));
	close_ends(&ends);
	gw_tls_identity_unref(client);
	return err;
}

static void strangers_are_refused(void)
{
	struct certs_authority other = certs_make_authority("another authority");
	struct gw_tls_identity *server = certs_identity(&server_party);
	struct certs_party party;

	party = certs_make_party(&other, "DNS:" CLIENT, -1, 30, NULL);
	certs_write_authority(&party, authority.certificate);
	CHECK_EQ(outcome(&party, server), -EPROTO);
	certs_remove_party(&party);

	/* It does not believe the server. */
	party = certs_make_party(&authority, "DNS:" CLIENT, -1, 30, NULL);
	certs_write_authority(&party, other.certificate);
	CHECK_EQ(outcome(&party, server), -EPROTO);
	certs_remove_party(&party);

	party = certs_make_party(&authority, "DNS:" CLIENT, -30, -1, NULL);
	CHECK_EQ(outcome(&party, server), -EPROTO);
	certs_remove_party(&party);

	party = certs_make_party(&authority, "DNS:" CLIENT, 1, 30, NULL);
	CHECK_EQ(outcome(&party, server), -EPROTO);
	certs_remove_party(&party);

	CHECK_EQ(outcome(&client_party, server), 0);
	gw_tls_identity_unref(server);
	certs_free_authority(&other);
}

/* A server whose name is not the one asked for, a wildcard included. */
static void another_server_is_refused(void)
{
	static const char *const names[] = {"DNS:c.node.godwit", "DNS:*.node.godwit", NULL};
	struct gw_tls_identity *client = certs_identity(&client_party);

	for (size_t i = 0; i < 3; i++) {
		uint8_t key[GW_TLS_KEY_LEN];
		struct certs_party party = certs_make_party(&authority, names[i], -1, 30, key);
		struct gw_tls_identity *server = certs_identity(&party);
		struct ends ends = connect_ends(client, server);

		/* Not even pinned: a key speaks for its own name. */
		CHECK_EQ(gw_tls_identity_pin(client, key), 0);
		CHECK_EQ(shake(&ends), -EPROTO);
		CHECK_EQ(gw_tls_identity_unpin(client, key), 0);
		close_ends(&ends);
		gw_tls_identity_unref(server);
		certs_remove_party(&party);
	}
	CHECK_EQ(gw_tls_identity_pinned_count(client), 0);
	gw_tls_identity_unref(client);
}

/* Dates and authority do not matter for a pinned key, on either side, and it is counted. */
static void a_pinned_key_outlives_its_certificate(void)
{
	struct certs_authority other = certs_make_authority("the next authority");
	struct gw_tls_identity *server = certs_identity(&server_party);
	uint8_t key[GW_TLS_KEY_LEN];
	struct certs_party party = certs_make_party(&authority, "DNS:" CLIENT, -30, -1, key);

	CHECK_EQ(gw_tls_identity_pin(server, key), 0);
	CHECK_EQ(gw_tls_identity_pin(server, key), 0);
	CHECK_EQ(outcome(&party, server), 0);
	CHECK(gw_tls_identity_pinned_count(server) > 0);
	CHECK_EQ(gw_tls_identity_unpin(server, key), 0);
	CHECK_EQ(outcome(&party, server), 0);
	CHECK_EQ(gw_tls_identity_unpin(server, key), 0);
	CHECK_EQ(gw_tls_identity_unpin(server, key), -ENOENT);
	CHECK_EQ(outcome(&party, server), -EPROTO);
	certs_remove_party(&party);

	/* Signed by an authority that the server has not heard of. */
	party = certs_make_party(&other, "DNS:" CLIENT, -1, 30, key);
	certs_write_authority(&party, authority.certificate);
	CHECK_EQ(outcome(&party, server), -EPROTO);
	CHECK_EQ(gw_tls_identity_pin(server, key), 0);
	CHECK_EQ(outcome(&party, server), 0);
	certs_remove_party(&party);
	gw_tls_identity_unref(server);
	certs_free_authority(&other);
}

static void pins_are_bounded(void)
{
	struct gw_tls_identity *identity = certs_identity(&server_party);
	uint8_t key[GW_TLS_KEY_LEN] = {0};

	for (int i = 0; i < GW_TLS_PIN_COUNT_MAX; i++) {
		key[0] = (uint8_t)i;
		CHECK_EQ(gw_tls_identity_pin(identity, key), 0);
	}
	key[1] = 1;
	CHECK_EQ(gw_tls_identity_pin(identity, key), -ENOSPC);
	key[1] = 0;
	CHECK_EQ(gw_tls_identity_pin(identity, key), 0);
	gw_tls_identity_unref(identity);
}

/* New files count for new sessions; those that live go on; bad files change nothing. */
static void files_are_read_again(void)
{
	struct gw_tls_identity *client = certs_identity(&client_party);
	struct certs_party party = certs_make_party(&authority, "DNS:" SERVER, -1, 30, NULL);
	struct certs_party next = certs_make_party(&authority, "DNS:" SERVER, -1, 30, NULL);
	struct gw_tls_identity *server = certs_identity(&party);
	struct ends before = connect_ends(client, server);
	struct ends after;
	uint8_t old_key[GW_TLS_KEY_LEN], new_key[GW_TLS_KEY_LEN];
	char reason[GW_TLS_REASON_LEN_MAX];

	CHECK_EQ(shake(&before), 0);
	CHECK_EQ(rename(next.certificate_path, party.certificate_path), 0);
	/* The key is not there yet: half of a rotation is no reason to lose what we have. */
	CHECK_EQ(gw_tls_identity_reload(server, reason), -EBADMSG);
	CHECK(strstr(reason, "key"));
	after = connect_ends(client, server);
	CHECK_EQ(shake(&after), 0);
	close_ends(&after);
	CHECK_EQ(rename(next.key_path, party.key_path), 0);
	CHECK_EQ(gw_tls_identity_reload(server, reason), 0);
	after = connect_ends(client, server);
	CHECK_EQ(shake(&after), 0);
	CHECK_EQ(shake(&before), 0);
	CHECK_EQ(gw_tls_peer_key(before.client, old_key), 0);
	CHECK_EQ(gw_tls_peer_key(after.client, new_key), 0);
	CHECK(memcmp(old_key, new_key, sizeof(old_key)) != 0);
	close_ends(&before);
	close_ends(&after);
	CHECK_EQ(unlink(party.authority_path), 0);
	CHECK_EQ(gw_tls_identity_reload(server, reason), -ENOENT);
	CHECK(strstr(reason, "ca.pem"));
	gw_tls_identity_unref(client);
	gw_tls_identity_unref(server);
	certs_remove_party(&party);
	certs_remove_party(&next);
}

static void bad_files_are_named(void)
{
	struct certs_party party = certs_make_party(&authority, "DNS:" SERVER, -1, 30, NULL);
	struct gw_tls_files files = {.certificate_path = party.key_path,
				     .key_path = party.key_path,
				     .authority_path = party.authority_path};
	struct gw_tls_identity *identity;
	char reason[GW_TLS_REASON_LEN_MAX];

	CHECK_EQ(gw_tls_identity_create(&files, reason, &identity), -EBADMSG);
	CHECK(strstr(reason, "certificate"));
	files.certificate_path = server_party.certificate_path;
	CHECK_EQ(gw_tls_identity_create(&files, reason, &identity), -EBADMSG);
	CHECK(strstr(reason, "key"));
	files.certificate_path = party.certificate_path;
	files.authority_path = party.key_path;
	CHECK_EQ(gw_tls_identity_create(&files, reason, &identity), -EBADMSG);
	CHECK(strstr(reason, "authority"));
	files.authority_path = "";
	CHECK_EQ(gw_tls_identity_create(&files, NULL, &identity), -EINVAL);
	certs_remove_party(&party);
}

static void a_session_is_resumed(void)
{
	struct gw_tls_identity *client = certs_identity(&client_party);
	struct gw_tls_identity *server = certs_identity(&server_party);
	struct ends ends = connect_ends(client, server);
	uint8_t key[GW_TLS_KEY_LEN];

	CHECK_EQ(shake(&ends), 0);
	settle(&ends);
	CHECK(!gw_tls_is_resumed(ends.client));
	close_ends(&ends);
	ends = connect_ends(client, server);
	CHECK_EQ(shake(&ends), 0);
	CHECK(gw_tls_is_resumed(ends.client) && gw_tls_is_resumed(ends.server));
	/* Who it is, is known all the same. */
	CHECK(gw_tls_peer_is(ends.server, CLIENT));
	CHECK_EQ(gw_tls_peer_key(ends.server, key), 0);
	CHECK(memcmp(key, client_key, sizeof(key)) == 0);
	close_ends(&ends);
	/* Not across a reload: what was believed then may not be believed now. */
	CHECK_EQ(gw_tls_identity_reload(server, NULL), 0);
	ends = connect_ends(client, server);
	CHECK_EQ(shake(&ends), 0);
	CHECK(!gw_tls_is_resumed(ends.server));
	close_ends(&ends);
	gw_tls_identity_unref(client);
	gw_tls_identity_unref(server);
}

static uint32_t random_state = 7;

static uint32_t next_random(void)
{
	random_state = random_state * 1664525U + 1013904223U;
	return random_state >> 8;
}

/* Megabytes in pieces of all sizes through a socket that takes little at a time. */
static void every_byte_arrives(void)
{
	enum { LEN = 3 << 20, PIECE_COUNT = 7 };
	struct gw_tls_identity *client = certs_identity(&client_party);
	struct gw_tls_identity *server = certs_identity(&server_party);
	struct ends ends = connect_ends(client, server);
	uint8_t *sent = malloc(LEN), *received = malloc(LEN + 1);
	size_t sent_len = 0, received_len = 0, waited = 0;
	const int small = 4096;

	CHECK_EQ(setsockopt(ends.fds[0], SOL_SOCKET, SO_SNDBUF, &small, sizeof(small)), 0);
	for (size_t i = 0; i < LEN; i++)
		sent[i] = (uint8_t)next_random();
	while (received_len < LEN) {
		struct iovec pieces[PIECE_COUNT];
		size_t at = sent_len, want;
		ssize_t got;

		for (int i = 0; i < PIECE_COUNT; i++) {
			size_t len = next_random() % (i % 2 ? 40000 : 20);

			len = len < LEN - at ? len : LEN - at;
			pieces[i] = (struct iovec){.iov_base = sent + at, .iov_len = len};
			at += len;
		}
		got = gw_tls_send(ends.client, pieces, PIECE_COUNT);
		CHECK(got > 0 || got == -EAGAIN);
		sent_len += got > 0 ? (size_t)got : 0;
		waited += gw_tls_wants_write(ends.client);
		want = next_random() % 100000 + 1;
		want = want < LEN + 1 - received_len ? want : LEN + 1 - received_len;
		got = gw_tls_recv(ends.server, received + received_len, want);
		CHECK(got > 0 || got == -EAGAIN);
		received_len += got > 0 ? (size_t)got : 0;
	}
	CHECK_EQ(received_len, LEN);
	CHECK(memcmp(sent, received, LEN) == 0);
	CHECK(waited > 0);
	free(sent);
	free(received);
	close_ends(&ends);
	gw_tls_identity_unref(client);
	gw_tls_identity_unref(server);
}

/* Fewer bytes than asked for: then nothing is left where poll would not see it. */
static void a_short_read_has_emptied_it(void)
{
	struct gw_tls_identity *client = certs_identity(&client_party);
	struct gw_tls_identity *server = certs_identity(&server_party);
	struct ends ends = connect_ends(client, server);
	static uint8_t data[60000], buffer[1 << 20];
	const struct iovec piece = {.iov_base = data, .iov_len = sizeof(data)};

	CHECK_EQ(shake(&ends), 0);
	CHECK_EQ(gw_tls_send(ends.client, &piece, 1), (ssize_t)sizeof(data));
	CHECK_EQ(gw_tls_recv(ends.server, buffer, sizeof(buffer)), (ssize_t)sizeof(data));
	CHECK_EQ(gw_tls_recv(ends.server, buffer, 1), -EAGAIN);
	close_ends(&ends);
	gw_tls_identity_unref(client);
	gw_tls_identity_unref(server);
}

/* Plain text, a cut, a flipped bit, an old version, another protocol inside: an end with a reason. */
static void a_broken_peer_is_an_error(void)
{
	struct gw_tls_identity *client = certs_identity(&client_party);
	struct gw_tls_identity *server = certs_identity(&server_party);
	static const char http[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
	struct ends ends = connect_ends(client, server);
	const struct iovec piece = {.iov_base = "hello", .iov_len = 5};
	uint8_t bytes[512];
	ssize_t len;

	CHECK_EQ(write(ends.fds[0], http, sizeof(http) - 1), (ssize_t)sizeof(http) - 1);
	CHECK_EQ(gw_tls_recv(ends.server, bytes, sizeof(bytes)), -EPROTO);
	CHECK(gw_tls_reason(ends.server)[0]);
	/* Dead stays dead. */
	CHECK_EQ(gw_tls_recv(ends.server, bytes, sizeof(bytes)), -EPROTO);
	CHECK_EQ(gw_tls_send(ends.server, &piece, 1), -EPROTO);
	CHECK(!gw_tls_wants_write(ends.server));
	close_ends(&ends);

	ends = connect_ends(client, server);
	CHECK_EQ(shake(&ends), 0);
	settle(&ends);
	CHECK_EQ(gw_tls_send(ends.client, &piece, 1), 5);
	len = read(ends.fds[1], bytes, sizeof(bytes));
	CHECK(len > 5);
	bytes[len - 1] ^= 1;
	CHECK_EQ(write(ends.fds[0], bytes, (size_t)len), len);
	CHECK_EQ(gw_tls_recv(ends.server, bytes, sizeof(bytes)), -EPROTO);
	close_ends(&ends);

	ends = connect_ends(client, server);
	CHECK_EQ(gw_tls_send(ends.client, &piece, 1), -EAGAIN);
	CHECK_EQ(shutdown(ends.fds[0], SHUT_WR), 0);
	for (int i = 0; i < 3 && (len = gw_tls_recv(ends.server, bytes, 1)) == -EAGAIN;)
		i++;
	CHECK_EQ(len, 0);
	close_ends(&ends);
	gw_tls_identity_unref(client);
	gw_tls_identity_unref(server);
}

/* A client of OpenSSL's own, so that it can be an odd one. Returns 1 if it gets through. */
static int odd_client(struct gw_tls_identity *server, int version, const uint8_t *alpn,
		      unsigned int alpn_len, bool with_certificate)
{
	SSL_CTX *context = SSL_CTX_new(TLS_client_method());
	struct gw_tls *tls;
	int fds[2], got = 0;
	uint8_t byte;
	SSL *ssl;

	CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, fds), 0);
	SSL_CTX_set_max_proto_version(context, version);
	if (with_certificate) {
		CHECK_EQ(SSL_CTX_use_certificate_chain_file(context, client_party.certificate_path),
			 1);
		CHECK_EQ(SSL_CTX_use_PrivateKey_file(context, client_party.key_path,
						     SSL_FILETYPE_PEM),
			 1);
	}
	ssl = SSL_new(context);
	if (alpn)
		SSL_set_alpn_protos(ssl, alpn, alpn_len);
	SSL_set_fd(ssl, fds[0]);
	CHECK_EQ(gw_tls_server_create(server, fds[1], &tls), 0);
	for (int i = 0; i < 20 && got != 1; i++) {
		(void)SSL_connect(ssl);
		if (SSL_is_init_finished(ssl))
			(void)SSL_write(ssl, "x", 1);
		got = (int)gw_tls_recv(tls, &byte, 1);
		if (got == -EPROTO || got == 0)
			break;
	}
	gw_tls_destroy(tls);
	SSL_free(ssl);
	SSL_CTX_free(context);
	close(fds[0]);
	close(fds[1]);
	return got;
}

static void only_tls13_h2_and_a_certificate(void)
{
	static const uint8_t h2[] = {2, 'h', '2'},
			     http11[] = {8, 'h', 't', 't', 'p', '/', '1', '.', '1'};
	struct gw_tls_identity *server = certs_identity(&server_party);

	CHECK_EQ(odd_client(server, TLS1_3_VERSION, h2, sizeof(h2), true), 1);
	CHECK_EQ(odd_client(server, TLS1_2_VERSION, h2, sizeof(h2), true), -EPROTO);
	CHECK_EQ(odd_client(server, TLS1_3_VERSION, http11, sizeof(http11), true), -EPROTO);
	CHECK_EQ(odd_client(server, TLS1_3_VERSION, h2, sizeof(h2), false), -EPROTO);
	gw_tls_identity_unref(server);
}

#ifdef GW_TEST_HOOKS
static void a_failing_socket_is_reported(void)
{
	static const int errs[] = {EPIPE, ECONNRESET, ETIMEDOUT, ENOBUFS};
	struct gw_tls_identity *client = certs_identity(&client_party);
	struct gw_tls_identity *server = certs_identity(&server_party);
	const struct iovec piece = {.iov_base = "hello", .iov_len = 5};

	for (size_t i = 0; i < sizeof(errs) / sizeof(errs[0]); i++) {
		struct ends ends = connect_ends(client, server);
		char byte;

		CHECK_EQ(shake(&ends), 0);
		settle(&ends);
		gw_sys_fail_nth(GW_SYS_SEND, 1, errs[i]);
		CHECK_EQ(gw_tls_send(ends.client, &piece, 1), -errs[i]);
		gw_sys_fail_nth(GW_SYS_RECV, 1, errs[i]);
		CHECK_EQ(gw_tls_recv(ends.server, &byte, 1), -errs[i]);
		gw_sys_fail_none();
		close_ends(&ends);
	}
	/* Interrupted, and full: nothing is lost. */
	for (int i = 0; i < 2; i++) {
		struct ends ends = connect_ends(client, server);
		char bytes[8];

		CHECK_EQ(shake(&ends), 0);
		settle(&ends);
		gw_sys_fail_nth(GW_SYS_SEND, 1, i ? EAGAIN : EINTR);
		CHECK_EQ(gw_tls_send(ends.client, &piece, 1), 5);
		CHECK(gw_tls_wants_write(ends.client));
		CHECK_EQ(gw_tls_flush(ends.client), 0);
		gw_sys_fail_nth(GW_SYS_RECV, 1, i ? EAGAIN : EINTR);
		CHECK_EQ(gw_tls_recv(ends.server, bytes, sizeof(bytes)), -EAGAIN);
		CHECK_EQ(gw_tls_recv(ends.server, bytes, sizeof(bytes)), 5);
		gw_sys_fail_none();
		close_ends(&ends);
	}
	gw_tls_identity_unref(client);
	gw_tls_identity_unref(server);
}
#endif

struct shared {
	struct gw_tls_identity *client;
	struct gw_tls_identity *server;
	atomic_bool stop;
};

static void *shake_again_and_again(void *argument)
{
	struct shared *shared = argument;

	for (int i = 0; i < 30; i++) {
		struct ends ends = connect_ends(shared->client, shared->server);

		CHECK_EQ(shake(&ends), 0);
		close_ends(&ends);
	}
	return NULL;
}

static void *change_again_and_again(void *argument)
{
	struct shared *shared = argument;

	while (!atomic_load(&shared->stop)) {
		CHECK_EQ(gw_tls_identity_pin(shared->server, client_key), 0);
		CHECK_EQ(gw_tls_identity_reload(shared->server, NULL), 0);
		CHECK_EQ(gw_tls_identity_reload(shared->client, NULL), 0);
		CHECK_EQ(gw_tls_identity_unpin(shared->server, client_key), 0);
	}
	return NULL;
}

/* Sessions in several threads while files are read again and keys pinned. */
static void threads_share_an_identity(void)
{
	struct shared shared = {.client = certs_identity(&client_party),
				.server = certs_identity(&server_party)};
	pthread_t threads[3];

	for (int i = 0; i < 2; i++)
		CHECK_EQ(pthread_create(&threads[i], NULL, shake_again_and_again, &shared), 0);
	CHECK_EQ(pthread_create(&threads[2], NULL, change_again_and_again, &shared), 0);
	for (int i = 0; i < 2; i++)
		CHECK_EQ(pthread_join(threads[i], NULL), 0);
	atomic_store(&shared.stop, true);
	CHECK_EQ(pthread_join(threads[2], NULL), 0);
	gw_tls_identity_unref(shared.client);
	gw_tls_identity_unref(shared.server);
}

int main(void)
{
	authority = certs_make_authority("the authority");
	server_party = certs_make_party(&authority, "DNS:" SERVER, -1, 30, NULL);
	client_party = certs_make_party(&authority, "URI:x:y,DNS:" CLIENT, -1, 30, client_key);
	RUN(both_are_known);
	RUN(strangers_are_refused);
	RUN(another_server_is_refused);
	RUN(a_pinned_key_outlives_its_certificate);
	RUN(pins_are_bounded);
	RUN(files_are_read_again);
	RUN(bad_files_are_named);
	RUN(a_session_is_resumed);
	RUN(every_byte_arrives);
	RUN(a_short_read_has_emptied_it);
	RUN(a_broken_peer_is_an_error);
	RUN(only_tls13_h2_and_a_certificate);
#ifdef GW_TEST_HOOKS
	RUN(a_failing_socket_is_reported);
#endif
	RUN(threads_share_an_identity);
	certs_remove_party(&server_party);
	certs_remove_party(&client_party);
	certs_free_authority(&authority);
	return 0;
}
