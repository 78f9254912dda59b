/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_arrival_tls.c - both halves with TLS: who is not the source's page server is not asked, and a
 * guest that has begun to arrive arrives, whatever becomes of keys and certificates meanwhile.
 */
#include "guest.h"
#include "tls_certs.h"

#include <godwit/arrival.h>
#include <godwit/page_map.h>
#include <godwit/sandbox.h>
#include <godwit/serve.h>

#include <time.h>

#define PAGE_COUNT ((uint64_t)2048)
#define GENERATION ((uint64_t)3)
#define SOURCE	   "a.node.godwit"
#define TO	   "b.node.godwit"

static char map_path[64];
static int source_fd;
static struct certs_authority authority;
static struct certs_party source_party, to_party;
static struct gw_tls_identity *source_identity, *to_identity;
static uint8_t source_key[GW_TLS_KEY_LEN], to_key[GW_TLS_KEY_LEN];

struct move {
	struct guest guest;
	struct gw_serve *serve;
	struct gw_arrival *arrival;
};

static struct gw_serve *serve_start(uint32_t port)
{
	const struct gw_serve_region region = {.size = PAGE_COUNT * PAGE, .page_size = PAGE};
	const struct gw_serve_image image = {
		.struct_size = sizeof(image),
		.ram_fd = source_fd,
		.image_id = "vm",
		.epoch = 1,
		.generation = GENERATION,
		.state = GW_IMAGE_FROZEN,
		.region_count = 1,
		.regions = &region,
		.destination = TO,
		.destination_epoch = 2,
		.destination_key = to_key,
	};
	const struct gw_serve_config config = {
		.struct_size = sizeof(config),
		.listen_port = port,
		.listen_host = "127.0.0.1",
		.connection_count_max = 8,
		.tls = source_identity,
	};
	struct gw_serve *serve = NULL;

	CHECK_EQ(gw_serve_create(&config, &serve), 0);
	CHECK_EQ(gw_serve_put_image(serve, &image), 0);
	CHECK_EQ(gw_serve_start(serve), 0);
	return serve;
}

static struct move start(const char *page_server_name)
{
	struct move move = {
		.guest = guest_create(PAGE_COUNT,
				      GW_UFFD_FEATURE_MISSING_SHMEM | GW_UFFD_FEATURE_EVENT_REMOVE,
				      UFFDIO_REGISTER_MODE_MISSING),
		.serve = serve_start(0),
	};
	const struct gw_arrival_region region = {
		.host_addr = guest_address(&move.guest, 0),
		.len = PAGE_COUNT * PAGE,
	};
	const struct gw_arrival_config config = {
		.struct_size = sizeof(config),
		.sandbox = GW_SANDBOX_ENFORCE,
		.page_size = PAGE,
		.epoch = 2,
		.page_map_path = map_path,
		.session_id = "session",
		.image_id = "vm",
		.page_host = "127.0.0.1",
		.page_port = (uint32_t)gw_serve_port(move.serve),
		.uffds = &move.guest.uffd,
		.uffd_count = 1,
		.exit_channel_fd = -1,
		.exit_doorbell_fd = -1,
		.ram_fd = move.guest.ram_fd,
		.install_method = GW_INSTALL_COPY,
		.bulk_connection_count = 1,
		.regions = &region,
		.region_count = 1,
		.tls = to_identity,
		.page_server_name = page_server_name,
	};

	CHECK_EQ(gw_arrival_create(&config, &move.arrival), 0);
	CHECK_EQ(gw_arrival_start(move.arrival), 0);
	return move;
}

static void end(struct move *move)
{
	gw_arrival_destroy(move->arrival);
	CHECK_EQ(gw_page_map_unlink(map_path), 0);
	gw_serve_destroy(move->serve);
	guest_destroy(&move->guest);
}

static struct gw_arrival_status status_of(const struct move *move)
{
	struct gw_arrival_status status;

	CHECK_EQ(gw_arrival_status(move->arrival, &status), 0);
	return status;
}

#define UNTIL(move, condition)                                                                  \
	do {                                                                                    \
		const uint64_t deadline_ns = gw_sys_now_ns() + UINT64_C(1000000) * TIMEOUT_MS;  \
		struct gw_arrival_status status = status_of(move);                              \
		while (!(condition)) {                                                          \
			if (gw_sys_now_ns() > deadline_ns)                                      \
				fprintf(stderr, "phase %u: %s\n", status.phase, status.reason); \
			CHECK(gw_sys_now_ns() < deadline_ns);                                   \
			(void)nanosleep(&(struct timespec){.tv_nsec = 200000}, NULL);           \
			status = status_of(move);                                               \
		}                                                                               \
	} while (0)

static void touch(const struct move *move, uint64_t first, uint64_t end_page)
{
	for (uint64_t page = first; page < end_page; page++)
		CHECK(guest_has_pattern(move->guest.memory, page));
}

/* What is left comes, and every page is right. */
static void finish(const struct move *move)
{
	CHECK_EQ(gw_arrival_start_bulk(move->arrival), 0);
	UNTIL(move, status.phase == GW_ARRIVAL_COMPLETE);
	touch(move, 0, PAGE_COUNT);
	CHECK_EQ(status_of(move).violation_count, 0);
	CHECK_EQ(status_of(move).checksum_error_count, 0);
}

/* Another key and another certificate in the files, and both ends told to read them. */
static void rotate(const struct certs_party *party, struct gw_tls_identity *identity,
		   const struct certs_authority *by, const char *name, long from, long to)
{
	char reason[GW_TLS_REASON_LEN_MAX];
	EVP_PKEY *key = EVP_EC_gen("P-256");
	X509 *certificate = certs_sign(key, "test", by, name, from, to);

	certs_write(party, key, certificate);
	X509_free(certificate);
	EVP_PKEY_free(key);
	CHECK_EQ(gw_tls_identity_reload(identity, reason), 0);
}

static void restart_server(struct move *move)
{
	const uint32_t port = (uint32_t)gw_serve_port(move->serve);

	gw_serve_destroy(move->serve);
	move->serve = serve_start(port);
}

static void set_up(void)
{
	authority = certs_make_authority("authority");
	source_party = certs_make_party(&authority, "DNS:" SOURCE, -1, 30, source_key);
	to_party = certs_make_party(&authority, "DNS:" TO, -1, 30, to_key);
	source_identity = certs_identity(&source_party);
	to_identity = certs_identity(&to_party);
}

static void tear_down(void)
{
	gw_tls_identity_unref(source_identity);
	gw_tls_identity_unref(to_identity);
	certs_remove_party(&source_party);
	certs_remove_party(&to_party);
	certs_free_authority(&authority);
}

static void a_guest_arrives_by_tls(void)
{
	uint8_t key[GW_TLS_KEY_LEN];
	struct move move;

	set_up();
	move = start(SOURCE);
	UNTIL(&move, status.phase == GW_ARRIVAL_ARMED);
	CHECK_EQ(gw_arrival_page_server_key(move.arrival, key), 0);
	CHECK_EQ(memcmp(key, source_key, sizeof(key)), 0);
	CHECK_EQ(gw_arrival_open_gate(move.arrival, GENERATION), 0);
	touch(&move, 0, 64);
	finish(&move);
	end(&move);
	tear_down();
}

/* Memory is asked of nobody else, and it is said why. */
static void another_node_is_not_asked(void)
{
	uint8_t key[GW_TLS_KEY_LEN];
	struct move move;

	set_up();
	move = start("c.node.godwit");
	UNTIL(&move, strstr(status.reason, "TLS: ") && status.phase == GW_ARRIVAL_CONNECTING);
	CHECK_EQ(gw_arrival_page_server_key(move.arrival, key), -ENOENT);
	CHECK_EQ(status_of(&move).received_bytes, 0);
	end(&move);
	tear_down();
}

/* Every key and certificate of both nodes is another one after half of the memory. */
static void keys_are_rotated_in_the_middle(void)
{
	uint8_t before[GW_TLS_KEY_LEN], after[GW_TLS_KEY_LEN];
	struct move move;

	set_up();
	move = start(SOURCE);
	UNTIL(&move, status.phase == GW_ARRIVAL_ARMED);
	CHECK_EQ(gw_arrival_page_server_key(move.arrival, before), 0);
	CHECK_EQ(gw_arrival_open_gate(move.arrival, GENERATION), 0);
	touch(&move, 0, 64);
	rotate(&source_party, source_identity, &authority, "DNS:" SOURCE, -1, 30);
	rotate(&to_party, to_identity, &authority, "DNS:" TO, -1, 30);
	/* The connections that live do not mind. */
	touch(&move, 64, 128);
	CHECK_EQ(status_of(&move).reconnect_count, 0);
	restart_server(&move);
	touch(&move, 128, 192);
	CHECK(status_of(&move).reconnect_count > 0);
	CHECK_EQ(gw_arrival_page_server_key(move.arrival, after), 0);
	CHECK(memcmp(before, after, sizeof(before)) != 0);
	finish(&move);
	end(&move);
	tear_down();
}

/* The same keys in certificates of long ago, by an authority that nobody knows: pins hold. */
static void certificates_fail_in_the_middle(void)
{
	char reason[GW_TLS_REASON_LEN_MAX];
	struct move move;

	set_up();
	move = start(SOURCE);
	UNTIL(&move, status.phase == GW_ARRIVAL_ARMED);
	CHECK_EQ(gw_arrival_open_gate(move.arrival, GENERATION), 0);
	touch(&move, 0, 64);
	CHECK_EQ(gw_tls_identity_pin(to_identity, source_key), 0);
	certs_renew(&source_party, &authority, "DNS:" SOURCE, -30, -1);
	certs_renew(&to_party, &authority, "DNS:" TO, -30, -1);
	CHECK_EQ(gw_tls_identity_reload(source_identity, reason), 0);
	CHECK_EQ(gw_tls_identity_reload(to_identity, reason), 0);
	restart_server(&move);
	touch(&move, 64, 128);
	CHECK(gw_tls_identity_pinned_count(source_identity) > 0);
	CHECK(gw_tls_identity_pinned_count(to_identity) > 0);
	finish(&move);
	end(&move);
	tear_down();
}

static void bad_configs_are_refused(void)
{
	struct gw_arrival *arrival = NULL;
	const uint8_t token[1] = {0};
	struct guest guest;
	struct gw_arrival_region region;

	set_up();
	guest = guest_create(PAGE_COUNT, GW_UFFD_FEATURE_MISSING_SHMEM,
			     UFFDIO_REGISTER_MODE_MISSING);
	region = (struct gw_arrival_region){.host_addr = guest_address(&guest, 0),
					    .len = PAGE_COUNT * PAGE};
	struct gw_arrival_config config = {
		.struct_size = sizeof(config),
		.sandbox = GW_SANDBOX_ENFORCE,
		.page_size = PAGE,
		.epoch = 2,
		.page_map_path = map_path,
		.session_id = "session",
		.image_id = "vm",
		.page_host = "127.0.0.1",
		.page_port = 1,
		.uffds = &guest.uffd,
		.uffd_count = 1,
		.exit_channel_fd = -1,
		.exit_doorbell_fd = -1,
		.ram_fd = guest.ram_fd,
		.install_method = GW_INSTALL_COPY,
		.bulk_connection_count = 1,
		.regions = &region,
		.region_count = 1,
		.tls = to_identity,
	};

	/* A server that may have any name is no server that one knows. */
	CHECK_EQ(gw_arrival_create(&config, &arrival), -EINVAL);
	config.page_server_name = "";
	CHECK_EQ(gw_arrival_create(&config, &arrival), -EINVAL);
	config.page_server_name = SOURCE;
	config.token_len = 1;
	CHECK_EQ(gw_arrival_create(&config, &arrival), -EINVAL);
	config.token = token;
	config.token_len = GW_ARRIVAL_TOKEN_LEN_MAX + 1;
	CHECK_EQ(gw_arrival_create(&config, &arrival), -EINVAL);
	config.token_len = 1;
	CHECK_EQ(gw_arrival_create(&config, &arrival), 0);
	CHECK_EQ(gw_arrival_set_token(arrival, token, GW_ARRIVAL_TOKEN_LEN_MAX + 1), -EINVAL);
	CHECK_EQ(gw_arrival_set_token(arrival, NULL, 1), -EINVAL);
	CHECK_EQ(gw_arrival_set_token(arrival, NULL, 0), 0);
	gw_arrival_destroy(arrival);
	CHECK_EQ(gw_page_map_unlink(map_path), 0);
	guest_destroy(&guest);
	tear_down();
}

int main(void)
{
	uint8_t page_bytes[PAGE];

	guest_need_uffd();
	(void)snprintf(map_path, sizeof(map_path), "/dev/shm/gw-test-tls-%d", (int)getpid());
	guest_left_path = map_path;
	source_fd = gw_sys_memfd_create("source", MFD_CLOEXEC);
	CHECK_EQ(gw_sys_ftruncate(source_fd, (off_t)(PAGE_COUNT * PAGE)), 0);
	for (uint64_t page = 0; page < PAGE_COUNT; page++) {
		guest_pattern(page, page_bytes);
		CHECK_EQ(pwrite(source_fd, page_bytes, PAGE, (off_t)(page * PAGE)), PAGE);
	}
	RUN_FORKED(a_guest_arrives_by_tls);
	RUN_FORKED(another_node_is_not_asked);
	RUN_FORKED(keys_are_rotated_in_the_middle);
	RUN_FORKED(certificates_fail_in_the_middle);
	RUN_FORKED(bad_configs_are_refused);
	return EXIT_SUCCESS;
}
