/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fuzz_tls.c - what anybody can send to a TLS listener before it knows him, and what somebody on the way
 * can do to those who know each other: whole records, halves, others, fewer, more.
 *
 * Two ends of ours, and between them the input: it lets bytes through, changes them, leaves some out,
 * puts some in. Nothing arrives but what was sent, in its order; nobody is up whom the authority does
 * not know; who has failed stays failed.
 *
 * Input: a byte of switches, then steps.
 */
#include "fuzz.h"

#include "../tests/tls_certs.h"

#include <errno.h>
#include <sys/socket.h>

#define SERVER_NAME "a.node.godwit"
#define CLIENT_NAME "b.node.godwit"
#define HELD_LEN    65536u
#define SENT_LEN    65536u
#define STEP_COUNT  64

enum fuzz_switch {
	STRANGER = 1 << 0, /* the client's certificate is another authority's */
	RESUMED = 1 << 1,  /* they have met before */
	NOBODY = 1 << 2,   /* the client is no TLS at all: the input is what it sends */
};

/* One end of ours, and the socket from which the input takes what it sends. */
struct end {
	struct gw_tls *tls;
	int fd; /* the session's */
	int wire;
	int err; /* why it is over */
	size_t held_len;
	uint8_t held[HELD_LEN]; /* on its way from this end */
	size_t sent_len;
	uint8_t sent[SENT_LEN];
	size_t received_len;
};

static struct certs_authority authority, other_authority;
static struct certs_party server_party, client_party, stranger_party;
static struct gw_tls_identity *server_identity;

static void remove_parties(void)
{
	certs_remove_party(&server_party);
	certs_remove_party(&client_party);
	certs_remove_party(&stranger_party);
}

static void set_up(void)
{
	if (server_identity)
		return;
	authority = certs_make_authority("godwit");
	other_authority = certs_make_authority("other");
	server_party = certs_make_party(&authority, "DNS:" SERVER_NAME, -1, 365, NULL);
	client_party = certs_make_party(&authority, "DNS:" CLIENT_NAME, -1, 365, NULL);
	stranger_party = certs_make_party(&other_authority, "DNS:" CLIENT_NAME, -1, 365, NULL);
	/* He believes the server, so that it is the server that has to say no. */
	certs_write_authority(&stranger_party, authority.certificate);
	server_identity = certs_identity(&server_party);
	FUZZ_CHECK(atexit(remove_parties) == 0);
}

/* A client's, by whether it is the stranger's: made anew once it may remember a server. */
static struct gw_tls_identity *client_identities[2];

static struct gw_tls_identity *take_identity(bool stranger)
{
	struct gw_tls_identity **at = &client_identities[stranger];

	if (!*at)
		*at = certs_identity(stranger ? &stranger_party : &client_party);
	return *at;
}

static void give_back(bool stranger, bool remembers)
{
	if (!remembers)
		return;
	gw_tls_identity_unref(client_identities[stranger]);
	client_identities[stranger] = NULL;
}

/* --- the two ends ------------------------------------------------------------------------------ */

static void open_pair(struct gw_tls_identity *client_identity, struct end *client,
		      struct end *server)
{
	int fds[2];

	memset(client, 0, sizeof(*client));
	memset(server, 0, sizeof(*server));
	FUZZ_CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, fds) == 0);
	client->fd = fds[0];
	client->wire = fds[1];
	FUZZ_CHECK(gw_tls_client_create(client_identity, fds[0], SERVER_NAME, &client->tls) == 0);
	FUZZ_CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, fds) == 0);
	server->fd = fds[0];
	server->wire = fds[1];
	FUZZ_CHECK(gw_tls_server_create(server_identity, fds[0], &server->tls) == 0);
}

static void close_end(struct end *end)
{
	gw_tls_destroy(end->tls);
	close(end->fd);
	close(end->wire);
}

/* Read what has come, check that it was sent, and take what this end sends. */
static void turn(struct end *end, const struct end *peer)
{
	uint8_t data[4096];
	ssize_t got;

	if (!end->err) {
		while ((got = gw_tls_recv(end->tls, data, sizeof(data))) > 0) {
			FUZZ_CHECK(gw_tls_is_up(end->tls));
			FUZZ_CHECK(peer && end->received_len + (size_t)got <= peer->sent_len);
			FUZZ_CHECK(memcmp(data, peer->sent + end->received_len, (size_t)got) == 0);
			end->received_len += (size_t)got;
		}
		end->err = got == 0 ? -ECONNRESET : got == -EAGAIN ? 0 : (int)got;
	} else if (end->err == -EPROTO) {
		FUZZ_CHECK(gw_tls_recv(end->tls, data, sizeof(data)) == -EPROTO);
		FUZZ_CHECK(strlen(gw_tls_reason(end->tls)) > 0);
		FUZZ_CHECK(!gw_tls_wants_write(end->tls));
	}
	while (end->held_len < HELD_LEN &&
	       (got = read(end->wire, end->held + end->held_len, HELD_LEN - end->held_len)) > 0)
		end->held_len += (size_t)got;
}

static void send_some(struct end *end, size_t len)
{
	struct iovec piece = {.iov_base = end->sent + end->sent_len, .iov_len = len};
	ssize_t sent;

	if (end->err || len > SENT_LEN - end->sent_len)
		return;
	for (size_t i = 0; i < len; i++)
		end->sent[end->sent_len + i] = (uint8_t)(end->sent_len + i * 7);
	sent = gw_tls_send(end->tls, &piece, 1);
	FUZZ_CHECK(sent < 0 || (size_t)sent <= len);
	if (sent > 0)
		end->sent_len += (size_t)sent;
	else if (sent != -EAGAIN)
		end->err = (int)sent;
}

/* --- on the way -------------------------------------------------------------------------------- */

static void pass(struct end *from, const struct end *to, size_t len)
{
	ssize_t passed;

	len = len < from->held_len ? len : from->held_len;
	passed = len ? send(to->wire, from->held, len, MSG_NOSIGNAL) : 0;
	if (passed <= 0)
		return;
	from->held_len -= (size_t)passed;
	memmove(from->held, from->held + passed, from->held_len);
}

static void put_in(struct end *from, struct fuzz_input *input)
{
	uint8_t extra[256];
	const size_t len = fuzz_take_u8(input);

	fuzz_take(input, extra, len);
	if (len > HELD_LEN - from->held_len)
		return;
	memmove(from->held + len, from->held, from->held_len);
	memcpy(from->held, extra, len);
	from->held_len += len;
}

static void leave_out(struct end *from, size_t len)
{
	len = len < from->held_len ? len : from->held_len;
	from->held_len -= len;
	memmove(from->held, from->held + len, from->held_len);
}

static void step(struct end *from, const struct end *to, uint8_t what, struct fuzz_input *input)
{
	const uint16_t number = fuzz_take_u16(input);

	switch ((what >> 1) & 7) {
	case 0:
	case 1:
		pass(from, to, HELD_LEN);
		break;
	case 2:
		pass(from, to, number);
		break;
	case 3:
		if (from->held_len > 0)
			from->held[number % from->held_len] ^= what >> 4 ? what >> 4 : 1;
		break;
	case 4:
		put_in(from, input);
		break;
	case 5:
		leave_out(from, number);
		break;
	case 6:
		send_some(from, number);
		break;
	default:
		shutdown(to->wire, SHUT_WR);
		break;
	}
}

/* They have met: the handshake that follows can go without certificates. */
static void meet(struct gw_tls_identity *client_identity, struct end *client, struct end *server)
{
	open_pair(client_identity, client, server);
	for (int i = 0; i < 6; i++) {
		turn(client, server);
		pass(client, server, HELD_LEN);
		turn(server, client);
		pass(server, client, HELD_LEN);
	}
	close_end(client);
	close_end(server);
}

/* Nobody has a certificate here: a listener that hears only what the input says is never up. */
static void hear_nobody(struct end *server, struct fuzz_input *input)
{
	while (input->len > 0) {
		const size_t wanted = 16u * fuzz_take_u8(input) + 1;
		const size_t len = wanted < input->len ? wanted : input->len;

		if (send(server->wire, input->data, len, MSG_NOSIGNAL) < 0)
			break;
		input->data += len;
		input->len -= len;
		turn(server, NULL);
		server->held_len = 0;
		FUZZ_CHECK(!gw_tls_is_up(server->tls) && server->received_len == 0);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
	static struct end client, server;
	struct fuzz_input input = {.data = data, .len = len};
	const uint8_t switches = fuzz_take_u8(&input);
	struct gw_tls_identity *client_identity;
	bool was_up;

	set_up();
	client_identity = take_identity((switches & STRANGER) != 0);
	if ((switches & RESUMED) && !(switches & NOBODY))
		meet(client_identity, &client, &server);
	open_pair(client_identity, &client, &server);
	if (switches & NOBODY)
		hear_nobody(&server, &input);
	for (int i = 0; i < STEP_COUNT && !(switches & NOBODY) && input.len > 0; i++) {
		const uint8_t what = fuzz_take_u8(&input);

		turn(&client, &server);
		turn(&server, &client);
		step(what & 1 ? &server : &client, what & 1 ? &client : &server, what, &input);
		turn(&client, &server);
		turn(&server, &client);
		if (switches & STRANGER)
			FUZZ_CHECK(!gw_tls_is_up(server.tls) && server.received_len == 0);
	}
	was_up = gw_tls_is_up(client.tls);
	close_end(&client);
	close_end(&server);
	give_back((switches & STRANGER) != 0, was_up || (switches & RESUMED));
	return 0;
}
