/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tls_certs.h - certificates for tests, made on the spot.
 *
 * Threads    Any.
 * Errors     A failure ends the test.
 * Ownership  The caller owns what it gets; files lie in a directory that the test removes.
 * Units      Days.
 * Source     RFC 5280.
 */
#ifndef GODWIT_TESTS_TLS_CERTS_H
#define GODWIT_TESTS_TLS_CERTS_H

#include "check.h"

#include <godwit/tls.h>

#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/x509v3.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

struct certs_authority {
	EVP_PKEY *key;
	X509 *certificate;
};

/* A directory of one party: cert.pem, key.pem, ca.pem. */
struct certs_party {
	char directory[64];
	char certificate_path[96];
	char key_path[96];
	char authority_path[96];
};

static inline void certs_add_extension(X509 *certificate, X509 *issuer, int nid, const char *value)
{
	X509V3_CTX context;
	X509_EXTENSION *extension;

	X509V3_set_ctx(&context, issuer, certificate, NULL, NULL, 0);
	extension = X509V3_EXT_conf_nid(NULL, &context, nid, value);
	CHECK(extension);
	CHECK_EQ(X509_add_ext(certificate, extension, -1), 1);
	X509_EXTENSION_free(extension);
}

/* `from` and `to`: days from now. */
static inline X509 *certs_sign(EVP_PKEY *key, const char *common_name,
			       const struct certs_authority *by, const char *alternative_names,
			       long from, long to)
{
	static long serial = 1;
	X509 *certificate = X509_new();
	X509_NAME *name;

	CHECK(certificate);
	CHECK_EQ(X509_set_version(certificate, X509_VERSION_3), 1);
	ASN1_INTEGER_set(X509_get_serialNumber(certificate), serial++);
	X509_gmtime_adj(X509_getm_notBefore(certificate), from * 86400);
	X509_gmtime_adj(X509_getm_notAfter(certificate), to * 86400);
	CHECK_EQ(X509_set_pubkey(certificate, key), 1);
	name = X509_get_subject_name(certificate);
	X509_NAME_add_entry_by_txt(name, "CN", MBSTRING_ASC, (const uint8_t *)common_name, -1, -1,
				   0);
	CHECK_EQ(X509_set_issuer_name(certificate,
				      by ? X509_get_subject_name(by->certificate) : name),
		 1);
	certs_add_extension(certificate, by ? by->certificate : certificate, NID_basic_constraints,
			    by ? "critical,CA:FALSE" : "critical,CA:TRUE");
	if (alternative_names)
		certs_add_extension(certificate, by->certificate, NID_subject_alt_name,
				    alternative_names);
	CHECK(X509_sign(certificate, by ? by->key : key, EVP_sha256()) > 0);
	return certificate;
}

static inline struct certs_authority certs_make_authority(const char *name)
{
	struct certs_authority made = {.key = EVP_EC_gen("P-256")};

	CHECK(made.key);
	made.certificate = certs_sign(made.key, name, NULL, NULL, -1, 365);
	return made;
}

static inline void certs_free_authority(struct certs_authority *authority)
{
	EVP_PKEY_free(authority->key);
	X509_free(authority->certificate);
}

static inline struct certs_party certs_make_directory(void)
{
	struct certs_party party;

	snprintf(party.directory, sizeof(party.directory), "/tmp/godwit-tls-XXXXXX");
	CHECK(mkdtemp(party.directory));
	snprintf(party.certificate_path, sizeof(party.certificate_path), "%s/cert.pem",
		 party.directory);
	snprintf(party.key_path, sizeof(party.key_path), "%s/key.pem", party.directory);
	snprintf(party.authority_path, sizeof(party.authority_path), "%s/ca.pem", party.directory);
	return party;
}

static inline void certs_write_authority(const struct certs_party *party, const X509 *certificate)
{
	FILE *file = fopen(party->authority_path, "we");

	CHECK(file);
	CHECK_EQ(PEM_write_X509(file, certificate), 1);
	fclose(file);
}

static inline void certs_write(const struct certs_party *party, EVP_PKEY *key, X509 *certificate)
{
	FILE *file = fopen(party->certificate_path, "we");

	CHECK(file);
	CHECK_EQ(PEM_write_X509(file, certificate), 1);
	fclose(file);
	file = fopen(party->key_path, "we");
	CHECK(file);
	CHECK_EQ(PEM_write_PrivateKey(file, key, NULL, NULL, 0, NULL, NULL), 1);
	fclose(file);
}

/* A party with a key of its own; `ret_key` may be NULL. */
static inline struct certs_party certs_make_party(const struct certs_authority *authority,
						  const char *alternative_names, long from, long to,
						  uint8_t ret_key[GW_TLS_KEY_LEN])
{
	struct certs_party party = certs_make_directory();
	EVP_PKEY *key = EVP_EC_gen("P-256");
	X509 *certificate = certs_sign(key, "test", authority, alternative_names, from, to);
	uint8_t *der = NULL;
	int der_len;

	certs_write(&party, key, certificate);
	certs_write_authority(&party, authority->certificate);
	if (ret_key) {
		der_len = i2d_PUBKEY(key, &der);
		CHECK(der_len > 0);
		CHECK_EQ(EVP_Digest(der, (size_t)der_len, ret_key, NULL, EVP_sha256(), NULL), 1);
		OPENSSL_free(der);
	}
	X509_free(certificate);
	EVP_PKEY_free(key);
	return party;
}

/* Another certificate for the key that the party has. */
static inline void certs_renew(const struct certs_party *party,
			       const struct certs_authority *authority,
			       const char *alternative_names, long from, long to)
{
	FILE *file = fopen(party->key_path, "re");
	EVP_PKEY *key;
	X509 *certificate;

	CHECK(file);
	key = PEM_read_PrivateKey(file, NULL, NULL, NULL);
	CHECK(key);
	fclose(file);
	certificate = certs_sign(key, "test", authority, alternative_names, from, to);
	certs_write(party, key, certificate);
	X509_free(certificate);
	EVP_PKEY_free(key);
}

static inline void certs_remove_party(const struct certs_party *party)
{
	unlink(party->certificate_path);
	unlink(party->key_path);
	unlink(party->authority_path);
	rmdir(party->directory);
}

static inline struct gw_tls_identity *certs_identity(const struct certs_party *party)
{
	const struct gw_tls_files files = {.certificate_path = party->certificate_path,
					   .key_path = party->key_path,
					   .authority_path = party->authority_path};
	struct gw_tls_identity *identity;
	char reason[GW_TLS_REASON_LEN_MAX] = "";
	const int err = gw_tls_identity_create(&files, reason, &identity);

	if (err)
		fprintf(stderr, "identity: %s\n", reason);
	CHECK_EQ(err, 0);
	return identity;
}

#endif /* GODWIT_TESTS_TLS_CERTS_H */
