/* SPDX-License-Identifier: Apache-2.0 */
/* The whole page path: a guest's fault to its page, and bulk until nothing is absent. See bench.h. */
#include "bench.h"

#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

#include <godwit/page_map.h>
#include <godwit/sandbox.h>
#include <godwit/sys.h>

#define DEADLINE_NS UINT64_C(60000000000)
/* As many as an agent has by default. */
#define BULK_COUNT 2
#define LOOK_NS	   200000L
#define LOOK_MS	   1000
/* Bulk is at work, and past what it does in its first moments only, once so much has come. */
#define BULK_BEGUN_BYTES (8 * MIB)

static struct gw_arrival_status status_of(const struct gw_arrival *arrival)
{
	struct gw_arrival_status status;

	CHECK_EQ(gw_arrival_status(arrival, &status), 0);
	return status;
}

static void check_sound(const struct gw_arrival_status *status)
{
	if (status->violation_count || status->checksum_error_count || status->reconnect_count)
		fprintf(stderr, "phase %u: %s\n", status->phase, status->reason);
	CHECK_EQ(status->violation_count, 0);
	CHECK_EQ(status->checksum_error_count, 0);
	CHECK_EQ(status->reconnect_count, 0);
}

static void check_time(uint64_t begin_ns, const struct gw_arrival_status *status)
{
	if (gw_sys_now_ns() - begin_ns > DEADLINE_NS)
		fprintf(stderr, "phase %u, %" PRIu64 " absent: %s\n", status->phase,
			status->absent_count, status->reason);
	CHECK(gw_sys_now_ns() - begin_ns <= DEADLINE_NS);
}

/* Woken by its eventfd: to look again and again would cost a core that the engine needs. */
static void wait_phase(const struct gw_arrival *arrival, uint32_t phase)
{
	const uint64_t begin_ns = gw_sys_now_ns();
	struct pollfd poll_fd = {.fd = gw_arrival_wait_fd(arrival), .events = POLLIN};
	struct gw_arrival_status status = status_of(arrival);
	uint64_t count;

	while (status.phase != phase) {
		if (gw_sys_poll(&poll_fd, 1, LOOK_MS) > 0)
			CHECK(gw_sys_read(poll_fd.fd, &count, sizeof(count)) > 0);
		check_time(begin_ns, &status);
		status = status_of(arrival);
	}
}

static const char *map_path(void)
{
	static char path[64];

	(void)snprintf(path, sizeof(path), "/dev/shm/gw-bench-map-%d", (int)getpid());
	return path;
}

static struct gw_arrival *arrival_start(const struct bench_server *server,
					const struct bench_guest *guest, uint32_t bulk_count,
					uint64_t rate)
{
	const struct gw_arrival_region region = {.host_addr = guest->address, .len = guest->len};
	const struct gw_arrival_config config = {
		.struct_size = sizeof(config),
		.sandbox = GW_SANDBOX_ENFORCE,
		.page_size = PAGE,
		.epoch = 2,
		.page_map_path = map_path(),
		.session_id = "bench",
		.image_id = "bench",
		.page_host = "127.0.0.1",
		.traceparent = "",
		.page_port = server->page_port,
		.uffds = &guest->uffd,
		.uffd_count = 1,
		.exit_channel_fd = -1,
		.exit_doorbell_fd = -1,
		.ram_fd = guest->ram_fd,
		.install_method = GW_INSTALL_COPY,
		.bulk_connection_count = bulk_count,
		.bulk_bytes_per_s_max = rate,
		.regions = &region,
		.region_count = 1,
		.tls = bench_identity("b"),
		.page_server_name = "a.node.godwit",
	};
	struct gw_arrival *arrival = NULL;

	CHECK_EQ(gw_arrival_create(&config, &arrival), 0);
	gw_tls_identity_unref(config.tls);
	CHECK_EQ(gw_arrival_start(arrival), 0);
	wait_phase(arrival, GW_ARRIVAL_ARMED);
	CHECK_EQ(gw_arrival_open_gate(arrival, BENCH_GENERATION), 0);
	return arrival;
}

static void arrival_end(struct gw_arrival *arrival)
{
	gw_arrival_destroy(arrival);
	CHECK_EQ(gw_page_map_unlink(map_path()), 0);
}

static uint64_t bulk_bytes(const struct gw_arrival_status *status)
{
	return status->bulk_page_count * PAGE;
}

/* With a limit, a tenth of a second's worth: less than the burst it begins with would be no limit. */
static void wait_bulk_begun(const struct gw_arrival *arrival, uint64_t rate)
{
	const uint64_t wanted = rate && rate / 10 < BULK_BEGUN_BYTES ? rate / 10 : BULK_BEGUN_BYTES;
	const uint64_t begin_ns = gw_sys_now_ns();
	struct gw_arrival_status status = status_of(arrival);

	while (bulk_bytes(&status) < wanted && status.phase != GW_ARRIVAL_COMPLETE) {
		check_time(begin_ns, &status);
		(void)nanosleep(&(struct timespec){.tv_nsec = LOOK_NS}, NULL);
		status = status_of(arrival);
	}
}

static void print_touches(const struct bench_guest *guest)
{
	const struct bench_share *const share = guest->share;
	bool first = true;

	printf("\"ns\":[");
	for (uint32_t thread = 0; thread < share->touches.thread_count; thread++)
		for (uint32_t i = 0; i < share->sample_count[thread]; i++, first = false)
			printf("%s%" PRIu64, first ? "" : ",", share->samples[thread][i]);
	printf("],\"elapsed_ns\":%" PRIu64, share->end_ns - share->begin_ns);
}

void bench_demand(const struct bench_server *server, uint64_t bulk,
		  const struct bench_touches *touches)
{
	struct bench_guest guest;
	struct gw_arrival_status before;

	bench_guest_start(&guest, server->kind, server->len);
	struct gw_arrival *const arrival =
		arrival_start(server, &guest, BULK_COUNT, bulk == UINT64_MAX ? 0 : bulk);

	if (bulk != UINT64_MAX) {
		CHECK_EQ(gw_arrival_start_bulk(arrival), 0);
		wait_bulk_begun(arrival, bulk);
	}
	before = status_of(arrival);
	bench_guest_touch(&guest, touches);
	bench_guest_wait(&guest);
	const struct gw_arrival_status status = status_of(arrival);

	check_sound(&status);
	CHECK(status.demand_page_count > before.demand_page_count);
	print_touches(&guest);
	printf(",\"bulk_bytes\":%" PRIu64 ",\"demand_pages\":%" PRIu64 ",\"absent_pages\":%" PRIu64,
	       bulk_bytes(&status) - bulk_bytes(&before),
	       status.demand_page_count - before.demand_page_count, status.absent_count);
	arrival_end(arrival);
	bench_guest_stop(&guest);
}

/* --- bulk ------------------------------------------------------------------------------------- */

/* A field of /proc/self/status, KiB. */
static uint64_t own_kib(const char *name)
{
	FILE *const file = fopen("/proc/self/status", "re");
	const size_t len = strlen(name);
	uint64_t value = 0;
	char line[128];

	CHECK(file);
	while (fgets(line, sizeof(line), file))
		if (strncmp(line, name, len) == 0)
			value = strtoull(line + len, NULL, 10);
	CHECK_EQ(fclose(file), 0);
	return value;
}

static void reset_peak(void)
{
	const int fd = gw_sys_open("/proc/self/clear_refs", O_WRONLY | O_CLOEXEC, 0);

	/* 5: the peak of the resident set begins anew. */
	CHECK(fd >= 0);
	CHECK_EQ(gw_sys_write(fd, "5", 1), 1);
	CHECK_EQ(gw_sys_close(fd), 0);
}

/* Bytes that came in through IP here: everything of this network namespace. */
static uint64_t octets_in(void)
{
	FILE *const file = fopen("/proc/self/net/netstat", "re");
	char names[4096];
	char values[4096];
	uint64_t found = 0;

	CHECK(file);
	while (fgets(names, sizeof(names), file) && fgets(values, sizeof(values), file)) {
		char *name_rest;
		char *value_rest;
		const char *name = strtok_r(names, " \n", &name_rest);
		const char *value = strtok_r(values, " \n", &value_rest);

		for (; name && value; name = strtok_r(NULL, " \n", &name_rest),
				      value = strtok_r(NULL, " \n", &value_rest))
			if (strcmp(name, "InOctets") == 0)
				found = strtoull(value, NULL, 10);
	}
	CHECK_EQ(fclose(file), 0);
	return found;
}

static uint64_t blocks_of(int fd)
{
	struct stat found;

	CHECK_EQ(gw_sys_fstat(fd, &found), 0);
	return (uint64_t)found.st_blocks;
}

void bench_bulk(const struct bench_server *server, uint32_t connection_count)
{
	const uint64_t source_blocks = bench_server_blocks(server);
	const uint64_t octets = octets_in();
	struct bench_guest guest;

	bench_guest_start(&guest, server->kind, server->len);
	const uint64_t resident_kib = own_kib("VmRSS:");

	reset_peak();
	struct gw_arrival *const arrival = arrival_start(server, &guest, connection_count, 0);
	const uint64_t begin_ns = gw_sys_now_ns();

	CHECK_EQ(gw_arrival_start_bulk(arrival), 0);
	wait_phase(arrival, GW_ARRIVAL_COMPLETE);
	const uint64_t elapsed_ns = gw_sys_now_ns() - begin_ns;
	const struct gw_arrival_status status = status_of(arrival);

	check_sound(&status);
	CHECK_EQ(status.absent_count, 0);
	bench_print_rate(server->len, elapsed_ns);
	printf(",\"received_bytes\":%" PRIu64 ",\"wire_bytes\":%" PRIu64
	       ",\"source_blocks\":[%" PRIu64 ",%" PRIu64 "],\"guest_blocks\":%" PRIu64
	       ",\"memory_kib\":%" PRIu64,
	       status.received_bytes, octets_in() - octets, source_blocks,
	       bench_server_blocks(server), blocks_of(guest.ram_fd),
	       own_kib("VmHWM:") - resident_kib);
	arrival_end(arrival);
	bench_guest_stop(&guest);
}
