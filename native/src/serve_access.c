/* SPDX-License-Identifier: Apache-2.0 */
/*
 * serve_access.c - who may read an image: the peer's name, its token, its epoch.
 *
 * Threads, Errors, Ownership, Units: see serve_internal.h.
 * Source     DESIGN 3.4; docs/design/security.md; page_service.proto; RFC 8032 (Ed25519).
 *
 * Two questions, and only the first knows a clock. Who are you: TLS has answered it, with dates or by
 * a pinned key. May you read this: the certificate's name is the destination's, the token is signed
 * by the orchestrator and speaks of this image, epoch and destination. A peer that has read the image
 * for its epoch, or whose key is in the record of a frozen image, holds a guest that depends on it: its
 * token is not looked at again. A token's date counts as long as the guest runs on this memory:
 * an image is frozen only when its destination has been let in.
 */
#include "serve_internal.h"

#include <godwit/sys.h>

#include <errno.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <stdlib.h>
#include <string.h>

#define NODE_SUFFIX ".node.godwit"
/* What is signed begins with it, so that no other thing that the key signs can be a token. */
#define SIGNED_PREFIX "godwit fetch token v1"

static const struct gw_tls *tls_of(const struct serve_conn *conn)
{
	return gw_grpc_tls(conn->grpc);
}

/* --- who -------------------------------------------------------------------------------------- */

static bool has_suffix(const char *name, size_t len, const char *suffix)
{
	const size_t suffix_len = strlen(suffix);

	return len > suffix_len && memcmp(name + len - suffix_len, suffix, suffix_len) == 0;
}

bool serve_peer_is_node(const struct serve_conn *conn, struct gw_grpc_call *call)
{
	char name[GW_TLS_NAME_LEN_MAX + 1];
	int len;

	if (!conn->serve->tls)
		return true;
	len = gw_tls_peer_name(tls_of(conn), name, sizeof(name));
	if (len > 0 && has_suffix(name, (size_t)len, NODE_SUFFIX))
		return true;
	serve_count(&conn->serve->counters.refused_total, 1);
	gw_grpc_call_end(call, GW_GRPC_PERMISSION_DENIED,
			 "NOT_A_NODE: only a node's certificate reads memory");
	return false;
}

static bool refuse(struct serve_stream *stream, int status, const char *why)
{
	serve_stream_end(stream, status, "%s", why);
	return false;
}

/* --- pins ------------------------------------------------------------------------------------- */

/* With serve->lock held. NULL: this key is not pinned for this slot. */
static struct serve_pin *find_pin(struct serve_slot *slot, const uint8_t *key)
{
	for (size_t i = 0; i < slot->pin_count; i++) {
		if (memcmp(slot->pins[i].key, key, GW_TLS_KEY_LEN) == 0)
			return &slot->pins[i];
	}
	return NULL;
}

static int add_pin(struct gw_serve *serve, struct serve_slot *slot, const uint8_t *key,
		   uint64_t epoch)
{
	struct serve_pin *pin = find_pin(slot, key);
	int err;

	if (pin) {
		pin->epoch = epoch;
		return 0;
	}
	err = gw_tls_identity_pin(serve->tls, key);
	if (err)
		return err;
	/* The oldest gives way: a destination has one key, and rarely another. */
	if (slot->pin_count == SERVE_PIN_COUNT_MAX) {
		(void)gw_tls_identity_unpin(serve->tls, slot->pins[0].key);
		memmove(&slot->pins[0], &slot->pins[1],
			(SERVE_PIN_COUNT_MAX - 1) * sizeof(slot->pins[0]));
		slot->pin_count--;
	}
	pin = &slot->pins[slot->pin_count++];
	memcpy(pin->key, key, GW_TLS_KEY_LEN);
	pin->epoch = epoch;
	return 0;
}

int serve_access_pin(struct gw_serve *serve, struct serve_slot *slot, const struct gw_image *image)
{
	const struct gw_image_access *access = gw_image_access(image);

	if (!serve->tls)
		return 0;
	/* Another destination: what the one before was known by is forgotten. */
	for (size_t i = slot->pin_count; i-- > 0;) {
		if (slot->pins[i].epoch >= access->destination_epoch)
			continue;
		(void)gw_tls_identity_unpin(serve->tls, slot->pins[i].key);
		slot->pins[i] = slot->pins[--slot->pin_count];
	}
	/* While the guest may still run on this memory, nobody depends on its being served. */
	if (!access->has_destination_key || gw_image_record(image)->state != GW_IMAGE_FROZEN)
		return 0;
	return add_pin(serve, slot, access->destination_key, access->destination_epoch);
}

void serve_access_unpin(struct gw_serve *serve, struct serve_slot *slot)
{
	while (slot->pin_count > 0)
		(void)gw_tls_identity_unpin(serve->tls, slot->pins[--slot->pin_count].key);
}

void serve_access_remember(struct serve_stream *stream)
{
	struct gw_serve *serve = stream->conn->serve;
	uint8_t key[GW_TLS_KEY_LEN];
	const struct serve_slot *at;

	if (!serve->tls || gw_tls_peer_key(tls_of(stream->conn), key))
		return;
	pthread_mutex_lock(&serve->lock);
	/* Not of one that has left the table meanwhile: nobody would unpin it. */
	for (at = serve->slots; at && at != stream->slot; at = at->next)
		continue;
	/* -ENOSPC: it is as good as its certificate then. */
	if (at)
		(void)add_pin(serve, stream->slot, key, stream->epoch);
	pthread_mutex_unlock(&serve->lock);
}

static bool is_known(struct serve_stream *stream)
{
	struct gw_serve *serve = stream->conn->serve;
	uint8_t key[GW_TLS_KEY_LEN];
	const struct serve_pin *pin;
	bool known;

	if (gw_tls_peer_key(tls_of(stream->conn), key))
		return false;
	pthread_mutex_lock(&serve->lock);
	pin = find_pin(stream->slot, key);
	known = pin && pin->epoch == stream->epoch;
	pthread_mutex_unlock(&serve->lock);
	return known;
}

/* --- tokens ----------------------------------------------------------------------------------- */

bool serve_access_take(struct serve_stream *stream, const struct gw_page_hello *hello)
{
	if (!stream->conn->serve->tls)
		return true;
	stream->known = is_known(stream);
	if (hello->token.len == 0)
		return true;
	if (hello->token.len > GW_PAGE_TOKEN_LEN_MAX)
		return refuse(stream, GW_GRPC_UNAUTHENTICATED, "TOKEN_INVALID: it is too long");
	stream->token = malloc(hello->token.len);
	if (!stream->token)
		return refuse(stream, GW_GRPC_RESOURCE_EXHAUSTED, "MEMORY: no room for a token");
	memcpy(stream->token, hello->token.data, hello->token.len);
	stream->token_len = hello->token.len;
	return true;
}

static bool is_signed(const struct gw_page_token *token, const uint8_t *public_key)
{
	uint8_t text[sizeof(SIGNED_PREFIX) + GW_PAGE_TOKEN_LEN_MAX];
	EVP_PKEY *key = EVP_PKEY_new_raw_public_key(EVP_PKEY_ED25519, NULL, public_key,
						    GW_SERVE_TOKEN_KEY_LEN);
	EVP_MD_CTX *context = EVP_MD_CTX_new();
	bool good = false;

	memcpy(text, SIGNED_PREFIX, sizeof(SIGNED_PREFIX));
	memcpy(text + sizeof(SIGNED_PREFIX), token->claims.data, token->claims.len);
	if (key && context && EVP_DigestVerifyInit(context, NULL, NULL, NULL, key) == 1)
		good = EVP_DigestVerify(context, token->signature.data, token->signature.len, text,
					sizeof(SIGNED_PREFIX) + token->claims.len) == 1;
	ERR_clear_error();
	EVP_MD_CTX_free(context);
	EVP_PKEY_free(key);
	return good;
}

static bool is_string(const struct gw_wire_string *string, const char *text, size_t len)
{
	return string->len == len && memcmp(string->data, text, len) == 0;
}

/* What a token that is signed says, held against who shows it. */
static bool claims_fit(struct serve_stream *stream, const struct gw_image *image,
		       const struct gw_page_claims *claims)
{
	const struct gw_wire_string *image_id = &gw_image_record(image)->image_id;
	char destination[GW_TLS_NAME_LEN_MAX + 1];

	if (!is_string(&claims->image_id, image_id->data, image_id->len))
		return refuse(stream, GW_GRPC_PERMISSION_DENIED,
			      "TOKEN_WRONG_IMAGE: the token is of another image");
	if (claims->destination.len > GW_TLS_NAME_LEN_MAX || claims->destination.len == 0)
		return refuse(stream, GW_GRPC_UNAUTHENTICATED, "TOKEN_INVALID: no destination");
	memcpy(destination, claims->destination.data, claims->destination.len);
	destination[claims->destination.len] = '\0';
	if (!gw_tls_peer_is(tls_of(stream->conn), destination))
		return refuse(stream, GW_GRPC_PERMISSION_DENIED,
			      "TOKEN_REPLAYED: the token is of another node");
	if (claims->epoch != stream->epoch)
		return refuse(stream, GW_GRPC_PERMISSION_DENIED,
			      "TOKEN_WRONG_EPOCH: the token is of another epoch");
	if (gw_image_record(image)->state == GW_IMAGE_LIVE &&
	    gw_sys_wall_s() > claims->expires_unix_s)
		return refuse(stream, GW_GRPC_UNAUTHENTICATED,
			      "TOKEN_EXPIRED: too late for a first use");
	return true;
}

static bool token_is_good(struct serve_stream *stream, const struct gw_image *image)
{
	struct gw_page_token token;
	struct gw_page_claims claims;

	if (!stream->token)
		return refuse(stream, GW_GRPC_UNAUTHENTICATED,
			      "TOKEN_MISSING: the orchestrator gives one to a destination");
	if (gw_page_token_decode(stream->token, stream->token_len, &token) ||
	    token.claims.len == 0 || token.signature.len == 0 ||
	    !is_signed(&token, gw_image_access(image)->token_key) ||
	    gw_page_claims_decode(token.claims.data, token.claims.len, &claims))
		return refuse(stream, GW_GRPC_UNAUTHENTICATED,
			      "TOKEN_INVALID: the orchestrator has not signed it");
	return claims_fit(stream, image, &claims);
}

bool serve_access_is_granted(struct serve_stream *stream, const struct gw_image *image)
{
	const struct gw_image_access *access = gw_image_access(image);

	if (!stream->conn->serve->tls)
		return true;
	if (access->destination[0] && !gw_tls_peer_is(tls_of(stream->conn), access->destination))
		return refuse(stream, GW_GRPC_PERMISSION_DENIED,
			      "WRONG_DESTINATION: the image is another node's");
	return stream->known || !access->has_token_key || token_is_good(stream, image);
}
