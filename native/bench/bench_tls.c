/* SPDX-License-Identifier: Apache-2.0 */
/* Certificates for both ends, or none: then it is plaintext. See bench.h. */
#include "bench.h"

#include <stdio.h>

#define PATH_LEN_MAX 512

static char directory[PATH_LEN_MAX];

void bench_tls(const char *path)
{
	CHECK((size_t)snprintf(directory, sizeof(directory), "%s", path) < sizeof(directory));
}

struct gw_tls_identity *bench_identity(const char *node)
{
	char paths[3][PATH_LEN_MAX + 64];
	const char *const names[3] = {"tls.crt", "tls.key", "ca.crt"};
	char reason[GW_TLS_REASON_LEN_MAX] = "";
	struct gw_tls_identity *identity = NULL;

	if (!directory[0])
		return NULL;
	for (size_t i = 0; i < 3; i++)
		(void)snprintf(paths[i], sizeof(paths[i]), "%s/%s/%s", directory, node, names[i]);
	const struct gw_tls_files files = {
		.certificate_path = paths[0], .key_path = paths[1], .authority_path = paths[2]};
	const int err = gw_tls_identity_create(&files, reason, &identity);

	if (err)
		fprintf(stderr, "%s: %s\n", directory, reason);
	CHECK_EQ(err, 0);
	return identity;
}
