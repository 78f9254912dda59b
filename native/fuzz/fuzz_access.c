/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fuzz_access.c - who may read an image: tokens of any bytes, shown by peers of any name and key, to
 * records that come and go. Nobody is let in whom the table of docs/design/security.md keeps out, no key
 * is taken for one that has read the image, and every pin is given back.
 *
 * Input: steps. A step is a record of the image, or a stream: who shows it, its epoch, and a token
 * that is signed here, or is taken from the input as it stands.
 *
 * TLS has said who the peer is before this code is asked: its answers are played here, the names and keys
 * by number. The signature is a real one.
 */
#include "fuzz.h"

#include "../src/serve_internal.h"

#include <errno.h>
#include <openssl/evp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE	      4096u
#define NODE_COUNT    3u
#define KEY_COUNT     8u
#define STEP_COUNT    24
#define SIGNED_PREFIX "godwit fetch token v1"

static const char *const nodes[NODE_COUNT] = {"a.node.godwit", "b.node.godwit", "b.admin.godwit"};

/* --- what TLS, the clock and the connection say ------------------------------------------------ */

static uint32_t peer_node, peer_key;
static bool peer_up;
static uint64_t wall_s;
static size_t pin_counts[KEY_COUNT];
static size_t refused_count, ended_calls;
static char refused_text[GW_GRPC_STATUS_TEXT_LEN_MAX];

static uint8_t *key_of(uint32_t number)
{
	static uint8_t key[GW_TLS_KEY_LEN];

	memset(key, (int)number + 1, sizeof(key));
	return key;
}

static uint32_t number_of(const uint8_t *key)
{
	FUZZ_CHECK(key[0] >= 1 && key[0] <= KEY_COUNT);
	return key[0] - 1u;
}

static const struct gw_tls *play_tls(const struct gw_grpc *grpc)
{
	(void)grpc;
	return NULL;
}

static bool play_peer_is(const struct gw_tls *tls, const char *name)
{
	(void)tls;
	FUZZ_CHECK(strlen(name) <= GW_TLS_NAME_LEN_MAX);
	return peer_up && strcmp(name, nodes[peer_node]) == 0;
}

static int play_peer_name(const struct gw_tls *tls, char *ret_name, size_t len)
{
	(void)tls;
	FUZZ_CHECK(len > strlen(nodes[peer_node]));
	if (!peer_up)
		return -ENOENT;
	memcpy(ret_name, nodes[peer_node], strlen(nodes[peer_node]) + 1);
	return (int)strlen(nodes[peer_node]);
}

static int play_peer_key(const struct gw_tls *tls, uint8_t *ret_key)
{
	(void)tls;
	if (!peer_up)
		return -ENOTCONN;
	memcpy(ret_key, key_of(peer_key), GW_TLS_KEY_LEN);
	return 0;
}

static int play_pin(struct gw_tls_identity *identity, const uint8_t *key)
{
	(void)identity;
	pin_counts[number_of(key)]++;
	return 0;
}

static int play_unpin(struct gw_tls_identity *identity, const uint8_t *key)
{
	(void)identity;
	FUZZ_CHECK(pin_counts[number_of(key)] > 0);
	pin_counts[number_of(key)]--;
	return 0;
}

static uint64_t play_wall_s(void)
{
	return wall_s;
}

static void play_call_end(struct gw_grpc_call *call, int status, const char *message)
{
	(void)call;
	FUZZ_CHECK(status != GW_GRPC_OK && message[0]);
	ended_calls++;
}

static __attribute__((format(printf, 3, 4))) void
play_stream_end(struct serve_stream *stream, int status, const char *format, ...)
{
	va_list arguments;

	(void)stream;
	va_start(arguments, format);
	/* NOLINTNEXTLINE(clang-analyzer-valist.Uninitialized): said when files are checked together. */
	vsnprintf(refused_text, sizeof(refused_text), format, arguments);
	va_end(arguments);
	FUZZ_CHECK(status != GW_GRPC_OK && strchr(refused_text, ':'));
	refused_count++;
}

#define gw_grpc_tls	      play_tls
#define gw_tls_peer_is	      play_peer_is
#define gw_tls_peer_name      play_peer_name
#define gw_tls_peer_key	      play_peer_key
#define gw_tls_identity_pin   play_pin
#define gw_tls_identity_unpin play_unpin
#define gw_sys_wall_s	      play_wall_s
#define gw_grpc_call_end      play_call_end
#define serve_stream_end      play_stream_end
/* NOLINTNEXTLINE(bugprone-suspicious-include): with the world around it played */
#include "../src/serve_access.c"

/* --- the model --------------------------------------------------------------------------------- */

/* The record in force, and what has been promised to whom: epoch by key, 0 nothing. */
struct model {
	bool frozen, has_token_key;
	int destination; /* -1: any node */
	uint64_t destination_epoch;
	uint64_t promised[KEY_COUNT];
};

/* A token of which is known what it says. */
struct shown {
	bool true_signature, raw;
	bool right_image;
	uint32_t destination;
	uint64_t epoch, expires;
	size_t len;
	uint8_t data[2 * GW_PAGE_TOKEN_LEN_MAX];
};

static EVP_PKEY *signers[2]; /* the orchestrator's, a stranger's */
static uint8_t signer_key[GW_SERVE_TOKEN_KEY_LEN];

static void make_signers(void)
{
	size_t len = sizeof(signer_key);

	for (int i = 0; i < 2 && !signers[i]; i++) {
		const uint8_t seed[32] = {(uint8_t)(i + 1)};

		signers[i] = EVP_PKEY_new_raw_private_key(EVP_PKEY_ED25519, NULL, seed, 32);
		FUZZ_CHECK(signers[i]);
	}
	FUZZ_CHECK(EVP_PKEY_get_raw_public_key(signers[0], signer_key, &len) == 1);
}

static size_t put_varint(uint8_t *at, uint64_t value)
{
	size_t len = 0;

	do {
		at[len++] = (uint8_t)((value & 0x7f) | (value > 0x7f ? 0x80 : 0));
		value >>= 7;
	} while (value);
	return len;
}

static size_t put_number(uint8_t *at, uint8_t field, uint64_t value)
{
	at[0] = (uint8_t)(field << 3);
	return 1 + put_varint(at + 1, value);
}

static size_t put_bytes(uint8_t *at, uint8_t field, const void *data, size_t len)
{
	size_t at_len = 1;

	at[0] = (uint8_t)(field << 3 | 2);
	at_len += put_varint(at + 1, len);
	memcpy(at + at_len, data, len);
	return at_len + len;
}

/* `claims`, signed by a key, as a token. */
static void sign(struct shown *token, EVP_PKEY *key, const uint8_t *claims, size_t len)
{
	uint8_t text[sizeof(SIGNED_PREFIX) + GW_PAGE_TOKEN_LEN_MAX] = SIGNED_PREFIX;
	uint8_t signature[64];
	size_t signature_len = sizeof(signature);
	EVP_MD_CTX *context = EVP_MD_CTX_new();

	memcpy(text + sizeof(SIGNED_PREFIX), claims, len);
	FUZZ_CHECK(context && EVP_DigestSignInit(context, NULL, NULL, NULL, key) == 1);
	FUZZ_CHECK(EVP_DigestSign(context, signature, &signature_len, text,
				  sizeof(SIGNED_PREFIX) + len) == 1);
	EVP_MD_CTX_free(context);
	token->len = put_bytes(token->data, 1, claims, len);
	token->len += put_bytes(token->data + token->len, 2, signature, signature_len);
}

enum token_kind { NONE, GOOD_FORM, SIGNED_BYTES, ANY_BYTES };

static struct shown take_token(struct fuzz_input *input)
{
	const uint8_t what = fuzz_take_u8(input);
	struct shown token = {.raw = true};
	uint8_t claims[512];
	size_t len;

	switch ((enum token_kind)(what & 3)) {
	case NONE:
		break;
	case GOOD_FORM:
		token.raw = false;
		token.true_signature = !(what & 4);
		token.right_image = !(what & 8);
		token.destination = (what >> 4) % NODE_COUNT;
		token.epoch = fuzz_take_u8(input) % 8;
		token.expires = fuzz_take_u8(input);
		len = put_bytes(claims, 1, token.right_image ? "image" : "other", 5);
		len += put_number(claims + len, 2, token.epoch);
		len += put_bytes(claims + len, 3, nodes[token.destination],
				 strlen(nodes[token.destination]));
		len += put_number(claims + len, 4, token.expires);
		sign(&token, signers[token.true_signature ? 0 : 1], claims, len);
		break;
	case SIGNED_BYTES: /* an orchestrator that says anything */
		token.true_signature = true;
		len = fuzz_take_u8(input);
		fuzz_take(input, claims, len);
		sign(&token, signers[0], claims, len);
		break;
	case ANY_BYTES:
		token.len = fuzz_take_u16(input) % (GW_PAGE_TOKEN_LEN_MAX + 64);
		fuzz_take(input, token.data, token.len);
		break;
	}
	return token;
}

/* --- steps ------------------------------------------------------------------------------------- */

struct ground {
	struct gw_serve serve;
	struct serve_slot slot;
	struct serve_conn conn;
	struct model model;
};

static int memory_fd(void)
{
	static int fd = -1;

	if (fd < 0) {
		fd = memfd_create("fuzz", MFD_CLOEXEC);
		FUZZ_CHECK(fd >= 0 && ftruncate(fd, PAGE) == 0);
	}
	return fd;
}

static void put_record(struct ground *ground, struct fuzz_input *input)
{
	const struct gw_serve_region region = {.size = PAGE, .page_size = PAGE};
	const uint8_t what = fuzz_take_u8(input);
	const uint8_t who = fuzz_take_u8(input);
	const uint32_t key = (uint32_t)(who >> 4) % KEY_COUNT;
	struct model *model = &ground->model;
	struct gw_image *image;
	struct gw_serve_image record = {
		.struct_size = sizeof(record),
		.ram_fd = memory_fd(),
		.image_id = "image",
		.epoch = 1,
		.generation = 1,
		.region_count = 1,
		.regions = &region,
	};

	model->frozen = (what & 1) != 0;
	model->has_token_key = (what & 2) != 0;
	model->destination = (int)(who & 3) - 1;
	model->destination_epoch = (what >> 4) % 8;
	record.state = model->frozen ? GW_IMAGE_FROZEN : GW_IMAGE_LIVE;
	record.destination = model->destination < 0 ? "" : nodes[model->destination];
	record.destination_epoch = model->destination_epoch;
	record.token_key = model->has_token_key ? signer_key : NULL;
	record.destination_key = what & 4 ? key_of(key) : NULL;
	FUZZ_CHECK(gw_image_create(&record, &image) == 0);
	FUZZ_CHECK(serve_access_pin(&ground->serve, &ground->slot, image) == 0);
	gw_image_unref(ground->slot.image);
	ground->slot.image = image;
	for (size_t i = 0; i < KEY_COUNT; i++) {
		if (model->promised[i] < model->destination_epoch)
			model->promised[i] = 0;
	}
	if (model->frozen && (what & 4))
		model->promised[key] = model->destination_epoch;
}

/* Whether the token alone lets this peer in. Only of one whose words are known. */
static bool lets_in(const struct model *model, const struct shown *token, uint64_t epoch)
{
	return token->true_signature && token->right_image && peer_up &&
	       token->destination == peer_node && token->epoch == epoch &&
	       (model->frozen || wall_s <= token->expires);
}

static void open_stream(struct ground *ground, struct fuzz_input *input)
{
	const uint8_t who = fuzz_take_u8(input);
	const struct gw_serve *serve = &ground->serve;
	const struct model *model = &ground->model;
	struct serve_stream stream = {.conn = &ground->conn, .slot = &ground->slot};
	struct gw_page_hello hello = {0};
	struct shown token;
	bool taken, granted = false, is_destination;

	peer_node = (who & 3) % NODE_COUNT;
	peer_key = (who >> 2) % KEY_COUNT;
	peer_up = !(who & 0x80);
	wall_s = fuzz_take_u8(input);
	stream.epoch = fuzz_take_u8(input) % 8;
	token = take_token(input);
	/* Exactly as long as it is, so that a read behind it is seen. */
	hello.token.data = memcpy(malloc(token.len + 1), token.data, token.len);
	hello.token.len = token.len;

	ended_calls = 0;
	FUZZ_CHECK(serve_peer_is_node(&ground->conn, NULL) ==
		   (!serve->tls || (peer_up && peer_node < 2)));
	refused_count = 0;
	taken = serve_access_take(&stream, &hello);
	if (taken)
		granted = serve_access_is_granted(&stream, ground->slot.image);
	/* A refusal is told once, and nothing else is. */
	FUZZ_CHECK(refused_count == (granted ? 0u : 1u));
	FUZZ_CHECK(!(stream.known) || ground->model.promised[peer_key] == stream.epoch);
	is_destination = peer_up && model->destination == (int)peer_node;
	if (granted)
		FUZZ_CHECK(model->destination < 0 || is_destination);
	if (granted && !stream.known && model->has_token_key) {
		FUZZ_CHECK(token.true_signature);
		FUZZ_CHECK(token.raw || lets_in(model, &token, stream.epoch));
	}
	/* And whoever has all that it takes is let in: a guest may wait for it. */
	if (taken && (model->destination < 0 || is_destination) &&
	    (stream.known || !model->has_token_key ||
	     (!token.raw && lets_in(model, &token, stream.epoch))))
		FUZZ_CHECK(granted);
	if (granted && peer_up) {
		serve_access_remember(&stream);
		ground->model.promised[peer_key] = stream.epoch;
	}
	free(stream.token);
	free((void *)(uintptr_t)hello.token.data);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
	static uint8_t identity; /* not NULL: TLS is spoken; what it says is played */
	struct fuzz_input input = {.data = data, .len = len};
	struct ground ground = {.serve = {.lock = PTHREAD_MUTEX_INITIALIZER}};

	make_signers();
	ground.serve.tls = (struct gw_tls_identity *)(void *)&identity;
	ground.serve.slots = &ground.slot;
	ground.conn.serve = &ground.serve;
	put_record(&ground, &input);
	for (int i = 0; i < STEP_COUNT && input.len > 0; i++) {
		if (fuzz_take_u8(&input) & 1)
			open_stream(&ground, &input);
		else
			put_record(&ground, &input);
		FUZZ_CHECK(ground.slot.pin_count <= SERVE_PIN_COUNT_MAX);
	}
	serve_access_unpin(&ground.serve, &ground.slot);
	for (size_t i = 0; i < KEY_COUNT; i++)
		FUZZ_CHECK(pin_counts[i] == 0);
	gw_image_unref(ground.slot.image);
	return 0;
}
