/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_serve_access.c - a page server with TLS: who reads an image, and that nobody who has begun to
 * read one is ever stopped by a date.
 */
#include "serve_client.h"
#include "tls_certs.h"

#include <godwit/serve.h>

#include <string.h>
#include <sys/mman.h>

#define PAGE   4096u
#define SOURCE "a.node.godwit"
#define TO     "b.node.godwit"
#define OTHER  "c.node.godwit"
#define EPOCH  7u
/* Long past, and not soon. */
#define PAST   1000u
#define FUTURE 99999999999u

static struct certs_authority authority;
static struct certs_party source_party, to_party, other_party, person_party, expired_party;
static uint8_t to_key[GW_TLS_KEY_LEN], expired_key[GW_TLS_KEY_LEN];
static EVP_PKEY *signer, *stranger;
static uint8_t signer_key[GW_SERVE_TOKEN_KEY_LEN];

/* --- tokens ---------------------------------------------------------------------------------- */

struct token {
	size_t len;
	uint8_t data[GW_PAGE_TOKEN_LEN_MAX];
};

static size_t put_varint(uint8_t *at, uint64_t value)
{
	size_t len = 0;

	do {
		at[len] = (uint8_t)(value & 0x7f) | (value > 0x7f ? 0x80 : 0);
		value >>= 7;
		len++;
	} while (value);
	return len;
}

static size_t put_bytes(uint8_t *at, uint8_t number, const void *data, size_t len)
{
	size_t at_len = 1;

	at[0] = (uint8_t)(number << 3 | 2);
	at_len += put_varint(at + 1, len);
	memcpy(at + at_len, data, len);
	return at_len + len;
}

static struct token make_token(EVP_PKEY *key, const char *image_id, uint64_t epoch,
			       const char *destination, uint64_t expires)
{
	static const char prefix[] = "godwit fetch token v1";
	uint8_t text[512];
	uint8_t *claims = text + sizeof(prefix);
	uint8_t signature[64];
	size_t len, signature_len = sizeof(signature);
	EVP_MD_CTX *context = EVP_MD_CTX_new();
	struct token token = {0};

	memcpy(text, prefix, sizeof(prefix));
	len = put_bytes(claims, 1, image_id, strlen(image_id));
	claims[len++] = 2 << 3;
	len += put_varint(claims + len, epoch);
	len += put_bytes(claims + len, 3, destination, strlen(destination));
	claims[len++] = 4 << 3;
	len += put_varint(claims + len, expires);
	CHECK_EQ(EVP_DigestSignInit(context, NULL, NULL, NULL, key), 1);
	CHECK_EQ(EVP_DigestSign(context, signature, &signature_len, text, sizeof(prefix) + len), 1);
	EVP_MD_CTX_free(context);
	token.len = put_bytes(token.data, 1, claims, len);
	token.len += put_bytes(token.data + token.len, 2, signature, signature_len);
	return token;
}

static struct token good_token(void)
{
	return make_token(signer, "image", EPOCH, TO, FUTURE);
}

/* --- a server --------------------------------------------------------------------------------- */

struct fixture {
	struct gw_serve *serve;
	struct gw_tls_identity *identity;
	uint32_t port;
	int fd;
};

static int put(struct fixture *fixture, uint32_t state, uint64_t destination_epoch,
	       const uint8_t *destination_key)
{
	const struct gw_serve_region region = {.size = PAGE, .page_size = PAGE};
	const struct gw_serve_image image = {
		.struct_size = sizeof(image),
		.ram_fd = fixture->fd,
		.image_id = "image",
		.epoch = 1,
		.generation = 1,
		.state = state,
		.region_count = 1,
		.regions = &region,
		.destination = TO,
		.destination_epoch = destination_epoch,
		.destination_key = destination_key,
		.token_key = signer_key,
	};

	return gw_serve_put_image(fixture->serve, &image);
}

static struct fixture set_up(void)
{
	struct fixture fixture = {.identity = certs_identity(&source_party)};
	const struct gw_serve_config config = {.struct_size = sizeof(config),
					       .listen_host = "127.0.0.1",
					       .connection_count_max = 8,
					       .tls = fixture.identity};

	fixture.fd = gw_sys_memfd_create("memory", MFD_CLOEXEC);
	CHECK_EQ(gw_sys_ftruncate(fixture.fd, PAGE), 0);
	CHECK_EQ(gw_serve_create(&config, &fixture.serve), 0);
	fixture.port = (uint32_t)gw_serve_port(fixture.serve);
	CHECK_EQ(put(&fixture, GW_IMAGE_LIVE, EPOCH, NULL), 0);
	CHECK_EQ(gw_serve_start(fixture.serve), 0);
	return fixture;
}

static void tear_down(struct fixture *fixture)
{
	gw_serve_destroy(fixture->serve);
	gw_tls_identity_unref(fixture->identity);
	gw_sys_close(fixture->fd);
}

/* --- a peer ----------------------------------------------------------------------------------- */

static void say_hello(struct client *client, uint64_t epoch, const struct token *token)
{
	static uint8_t data[GW_PAGE_REQUEST_LEN_MAX];
	struct gw_fetch_request request = {.kind = GW_FETCH_REQUEST_HELLO,
					   .hello = {.session_id = client_string("s"),
						     .image_id = client_string("image"),
						     .epoch = epoch,
						     .lane = GW_PAGE_LANE_DEMAND}};
	ssize_t len;

	if (token)
		request.hello.token =
			(struct gw_wire_bytes){.data = token->data, .len = token->len};
	len = gw_fetch_request_encode(&request, data, sizeof(data));
	CHECK(len > 0);
	CHECK_EQ(gw_grpc_call_send(client->call, NULL, 0, data, (size_t)len, client), 0);
}

/* What a Fetch comes to: "" it is let in; else why not, up to the colon. */
static const char *fetch(const struct fixture *fixture, const struct certs_party *party,
			 uint64_t epoch, const struct token *token)
{
	static char reason[GW_GRPC_STATUS_TEXT_LEN_MAX];
	struct gw_tls_identity *identity = certs_identity(party);
	static struct client client;

	client_open_as(&client, fixture->port, 65535, identity, SOURCE);
	client_call(&client, GW_PAGE_PATH_FETCH);
	say_hello(&client, epoch, token);
	CLIENT_UNTIL(&client, client.ready_count || client.end_count);
	snprintf(reason, sizeof(reason), "%s", client.ready_count ? "" : client.text);
	if (strchr(reason, ':'))
		*strchr(reason, ':') = '\0';
	client_close(&client);
	gw_tls_identity_unref(identity);
	return reason;
}

static void expect(const struct fixture *fixture, const struct certs_party *party, uint64_t epoch,
		   const struct token *token, const char *reason)
{
	const char *got = fetch(fixture, party, epoch, token);

	if (strcmp(got, reason) != 0)
		fprintf(stderr, "%s, not %s\n", got, reason);
	CHECK(strcmp(got, reason) == 0);
}

/* --- who reads it ------------------------------------------------------------------------------ */

static void only_the_destination_reads_with_its_token(void)
{
	struct fixture fixture = set_up();
	const struct token good = good_token();
	struct token bad;

	expect(&fixture, &to_party, EPOCH, NULL, "TOKEN_MISSING");
	bad = make_token(stranger, "image", EPOCH, TO, FUTURE);
	expect(&fixture, &to_party, EPOCH, &bad, "TOKEN_INVALID");
	bad = good;
	bad.data[4] ^= 1;
	expect(&fixture, &to_party, EPOCH, &bad, "TOKEN_INVALID");
	for (size_t len = 1; len < good.len; len += 7) {
		bad = good;
		bad.len = len;
		expect(&fixture, &to_party, EPOCH, &bad, "TOKEN_INVALID");
	}
	bad = (struct token){.len = sizeof(bad.data)};
	expect(&fixture, &to_party, EPOCH, &bad, "TOKEN_INVALID");
	bad = make_token(signer, "image-2", EPOCH, TO, FUTURE);
	expect(&fixture, &to_party, EPOCH, &bad, "TOKEN_WRONG_IMAGE");
	bad = make_token(signer, "image", EPOCH, "", FUTURE);
	expect(&fixture, &to_party, EPOCH, &bad, "TOKEN_INVALID");
	bad = make_token(signer, "image", EPOCH, OTHER, FUTURE);
	expect(&fixture, &to_party, EPOCH, &bad, "TOKEN_REPLAYED");
	bad = make_token(signer, "image", EPOCH + 1, TO, FUTURE);
	expect(&fixture, &to_party, EPOCH, &bad, "TOKEN_WRONG_EPOCH");
	bad = make_token(signer, "image", EPOCH, TO, PAST);
	expect(&fixture, &to_party, EPOCH, &bad, "TOKEN_EXPIRED");
	/* The token of somebody else, and somebody who is no node. */
	expect(&fixture, &other_party, EPOCH, &good, "WRONG_DESTINATION");
	expect(&fixture, &person_party, EPOCH, &good, "NOT_A_NODE");
	expect(&fixture, &to_party, EPOCH, &good, "");
	tear_down(&fixture);
}

/* Replayed by its own node after the guest has gone on to be moved under a newer epoch. */
static void an_old_epoch_is_refused(void)
{
	struct fixture fixture = set_up();
	const struct token good = good_token();

	expect(&fixture, &to_party, EPOCH, &good, "");
	CHECK_EQ(put(&fixture, GW_IMAGE_LIVE, EPOCH + 2, NULL), 0);
	expect(&fixture, &to_party, EPOCH, &good, "STALE_EPOCH");
	tear_down(&fixture);
}

/* What lies where is told to nobody else either. */
static void describe_is_for_the_destination(void)
{
	struct fixture fixture = set_up();
	const struct certs_party *parties[] = {&other_party, &to_party};
	static struct client client;

	for (size_t i = 0; i < 2; i++) {
		struct gw_tls_identity *identity = certs_identity(parties[i]);
		const struct gw_wire_string id = client_string("image");
		uint8_t data[64];
		ssize_t len = gw_describe_request_encode(&id, data, sizeof(data));

		client_open_as(&client, fixture.port, 65535, identity, SOURCE);
		client_call(&client, GW_PAGE_PATH_DESCRIBE_IMAGE);
		gw_grpc_call_set_user(client.call, &client);
		CHECK_EQ(gw_grpc_call_send(client.call, data, (size_t)len, NULL, 0, NULL), 0);
		CHECK_EQ(gw_grpc_call_half_close(client.call), 0);
		client_expect_end(&client, i == 0 ? GW_GRPC_PERMISSION_DENIED : GW_GRPC_OK,
				  i == 0 ? "WRONG_DESTINATION" : "");
		client_close(&client);
		gw_tls_identity_unref(identity);
	}
	tear_down(&fixture);
}

/* --- dates ------------------------------------------------------------------------------------- */

/* A token's date: for the first stream alone, and for none once the source is frozen for this key. */
static void who_has_read_may_read_on(void)
{
	struct fixture fixture = set_up();
	const struct token good = good_token();
	const struct token late = make_token(signer, "image", EPOCH, TO, PAST);
	const struct token next = make_token(signer, "image", EPOCH + 1, TO, PAST);

	expect(&fixture, &to_party, EPOCH, &late, "TOKEN_EXPIRED");
	expect(&fixture, &to_party, EPOCH, &good, "");
	expect(&fixture, &to_party, EPOCH, &late, "");
	/* For this epoch: another one is a first use again. */
	expect(&fixture, &to_party, EPOCH + 1, &next, "TOKEN_EXPIRED");
	tear_down(&fixture);
	/* A server that was started again has seen nobody: the record says who depends on it. */
	fixture = set_up();
	CHECK_EQ(put(&fixture, GW_IMAGE_LIVE, EPOCH, to_key), 0);
	expect(&fixture, &to_party, EPOCH, &late, "TOKEN_EXPIRED");
	CHECK_EQ(put(&fixture, GW_IMAGE_FROZEN, EPOCH, to_key), 0);
	expect(&fixture, &to_party, EPOCH, &late, "");
	/* Whoever signs may have another key by now. */
	expect(&fixture, &to_party, EPOCH, NULL, "");
	tear_down(&fixture);
	/* Its own key may be another one as well: a token that is right is enough, however old. */
	fixture = set_up();
	CHECK_EQ(put(&fixture, GW_IMAGE_FROZEN, EPOCH, expired_key), 0);
	expect(&fixture, &to_party, EPOCH, NULL, "TOKEN_MISSING");
	expect(&fixture, &to_party, EPOCH, &late, "");
	tear_down(&fixture);
}

/* A certificate's: the key in the record of a frozen image is good as long as the image is served. */
static void a_frozen_image_is_served_to_its_pinned_key(void)
{
	struct fixture fixture = set_up();
	const struct token good = good_token();

	expect(&fixture, &expired_party, EPOCH, &good, "TLS");
	CHECK_EQ(put(&fixture, GW_IMAGE_LIVE, EPOCH, expired_key), 0);
	expect(&fixture, &expired_party, EPOCH, &good, "TLS");
	CHECK_EQ(put(&fixture, GW_IMAGE_FROZEN, EPOCH, expired_key), 0);
	CHECK_EQ(gw_tls_identity_pinned_count(fixture.identity), 0);
	expect(&fixture, &expired_party, EPOCH, &good, "");
	CHECK(gw_tls_identity_pinned_count(fixture.identity) > 0);
	/* Another destination's image: the pin of the one before goes. */
	CHECK_EQ(put(&fixture, GW_IMAGE_FROZEN, EPOCH + 1, to_key), 0);
	expect(&fixture, &expired_party, EPOCH, &good, "TLS");
	CHECK_EQ(put(&fixture, GW_IMAGE_FROZEN, EPOCH + 1, expired_key), 0);
	CHECK_EQ(gw_serve_remove_image(fixture.serve, "image"), 0);
	expect(&fixture, &expired_party, EPOCH, &good, "TLS");
	tear_down(&fixture);
}

/* As many keys as there is room for, and one more: told, and the record is not in force. */
static void pins_are_bounded(void)
{
	struct fixture fixture = set_up();
	uint8_t key[GW_TLS_KEY_LEN] = {0};

	for (unsigned int i = 0; i < GW_TLS_PIN_COUNT_MAX; i++) {
		memcpy(key, &i, sizeof(i));
		CHECK_EQ(gw_tls_identity_pin(fixture.identity, key), 0);
	}
	CHECK_EQ(put(&fixture, GW_IMAGE_FROZEN, EPOCH, to_key), -ENOSPC);
	CHECK_EQ(gw_tls_identity_unpin(fixture.identity, key), 0);
	CHECK_EQ(put(&fixture, GW_IMAGE_FROZEN, EPOCH, to_key), 0);
	CHECK_EQ(put(&fixture, GW_IMAGE_FROZEN, EPOCH, to_key), 0);
	CHECK_EQ(gw_serve_remove_image(fixture.serve, "image"), 0);
	CHECK_EQ(gw_tls_identity_unpin(fixture.identity, to_key), -ENOENT);
	tear_down(&fixture);
}

static void plaintext_is_not_understood(void)
{
	struct fixture fixture = set_up();
	static struct client client;

	client_open(&client, fixture.port, 65535);
	client_call(&client, GW_PAGE_PATH_FETCH);
	client_hello(&client, "image", EPOCH, GW_PAGE_LANE_DEMAND);
	CLIENT_UNTIL(&client, client.end_count > 0);
	CHECK_EQ(client.ready_count, 0);
	CHECK_EQ(client.status, GW_GRPC_UNAVAILABLE);
	client_close(&client);
	tear_down(&fixture);
}

int main(void)
{
	size_t len = sizeof(signer_key);

	authority = certs_make_authority("authority");
	source_party = certs_make_party(&authority, "DNS:" SOURCE, -1, 30, NULL);
	to_party = certs_make_party(&authority, "DNS:" TO, -1, 30, to_key);
	other_party = certs_make_party(&authority, "DNS:" OTHER, -1, 30, NULL);
	person_party = certs_make_party(&authority, "DNS:p.admin.godwit", -1, 30, NULL);
	expired_party = certs_make_party(&authority, "DNS:" TO, -30, -1, expired_key);
	signer = EVP_PKEY_Q_keygen(NULL, NULL, "ED25519");
	stranger = EVP_PKEY_Q_keygen(NULL, NULL, "ED25519");
	CHECK_EQ(EVP_PKEY_get_raw_public_key(signer, signer_key, &len), 1);
	RUN(only_the_destination_reads_with_its_token);
	RUN(an_old_epoch_is_refused);
	RUN(describe_is_for_the_destination);
	RUN(who_has_read_may_read_on);
	RUN(a_frozen_image_is_served_to_its_pinned_key);
	RUN(pins_are_bounded);
	RUN(plaintext_is_not_understood);
	EVP_PKEY_free(signer);
	EVP_PKEY_free(stranger);
	certs_remove_party(&source_party);
	certs_remove_party(&to_party);
	certs_remove_party(&other_party);
	certs_remove_party(&person_party);
	certs_remove_party(&expired_party);
	certs_free_authority(&authority);
	return 0;
}
