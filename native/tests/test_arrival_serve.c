/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_arrival_serve.c - both halves together: the engine fetches from the page server that ships.
 *
 * With an argument it only measures: fault latency with and without bulk, and how fast a guest fills.
 */
#include "guest.h"

#include <sched.h>
#include <time.h>

#include <godwit/arrival.h>
#include <godwit/page_map.h>
#include <godwit/sandbox.h>
#include <godwit/serve.h>

#define PAGE_COUNT	  ((uint64_t)16384)
#define SPARSE_PAGE_COUNT ((uint64_t)2 << 20) /* 8 GiB */
#define GENERATION	  ((uint64_t)9)

static char map_path[64];
static int source_fd;
static uint8_t *source;
static bool measuring;
static uint64_t page_count = PAGE_COUNT;
static struct gw_pacer *pacer; /* NULL: none is shared */
static uint32_t pacer_weight;

struct bench {
	struct guest guest;
	struct gw_serve *serve;
	struct gw_arrival *arrival;
};

/* A third of the source is holes, in runs; the rest has its pattern. */
static bool is_hole(uint64_t page)
{
	return page / 256 % 3 == 1;
}

static void make_source(void)
{
	void *address = NULL;

	source_fd = gw_sys_memfd_create("source", MFD_CLOEXEC);
	CHECK_EQ(gw_sys_ftruncate(source_fd, (off_t)(PAGE_COUNT * PAGE)), 0);
	CHECK_EQ(gw_sys_mmap(NULL, PAGE_COUNT * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, source_fd,
			     0, &address),
		 0);
	source = address;
	for (uint64_t page = 0; page < PAGE_COUNT; page++)
		if (!is_hole(page))
			guest_pattern(page, source + page * PAGE);
}

static int put_image(struct gw_serve *serve, uint64_t generation, uint32_t state)
{
	const struct gw_serve_region region = {.size = page_count * PAGE, .page_size = PAGE};
	const struct gw_serve_image image = {
		.struct_size = sizeof(image),
		.ram_fd = source_fd,
		.image_id = "vm",
		.vm_id = "vm",
		.boot_id = "boot",
		.epoch = 1,
		.generation = generation,
		.state = state,
		.region_count = 1,
		.regions = &region,
	};

	return gw_serve_put_image(serve, &image);
}

static struct gw_serve *serve_start(uint32_t port, uint64_t generation, uint32_t state)
{
	const struct gw_serve_config config = {
		.struct_size = sizeof(config),
		.listen_port = port,
		.listen_host = "127.0.0.1",
		.connection_count_max = 32,
	};
	struct gw_serve *serve = NULL;

	CHECK_EQ(gw_serve_create(&config, &serve), 0);
	if (generation > 0)
		CHECK_EQ(put_image(serve, generation, state), 0);
	CHECK_EQ(gw_serve_start(serve), 0);
	return serve;
}

static struct bench bench_create(uint32_t bulk_count, uint32_t state)
{
	struct bench bench = {
		.guest = guest_create(page_count,
				      GW_UFFD_FEATURE_MISSING_SHMEM | GW_UFFD_FEATURE_EVENT_REMOVE,
				      UFFDIO_REGISTER_MODE_MISSING),
		.serve = serve_start(0, GENERATION, state),
	};
	const struct gw_arrival_region region = {
		.host_addr = guest_address(&bench.guest, 0),
		.len = page_count * PAGE,
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
		.traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
		.page_port = (uint32_t)gw_serve_port(bench.serve),
		.uffds = &bench.guest.uffd,
		.uffd_count = 1,
		.exit_channel_fd = -1,
		.exit_doorbell_fd = -1,
		.ram_fd = bench.guest.ram_fd,
		.install_method = GW_INSTALL_COPY,
		.bulk_connection_count = bulk_count,
		.regions = &region,
		.region_count = 1,
	};

	CHECK_EQ(gw_arrival_create(&config, &bench.arrival), 0);
	if (pacer)
		CHECK_EQ(gw_arrival_share(bench.arrival, pacer, pacer_weight), 0);
	CHECK_EQ(gw_arrival_start(bench.arrival), 0);
	return bench;
}

static void bench_destroy(struct bench *bench)
{
	gw_arrival_destroy(bench->arrival);
	CHECK_EQ(gw_page_map_unlink(map_path), 0);
	gw_serve_destroy(bench->serve);
	guest_destroy(&bench->guest);
}

static struct gw_arrival_status status_of(const struct gw_arrival *arrival)
{
	struct gw_arrival_status status;

	CHECK_EQ(gw_arrival_status(arrival, &status), 0);
	return status;
}

static void wait_phase(const struct gw_arrival *arrival, uint32_t phase)
{
	const uint64_t deadline_ns = gw_sys_now_ns() + UINT64_C(1000000) * TIMEOUT_MS;

	while (status_of(arrival).phase != phase) {
		const struct gw_arrival_status status = status_of(arrival);

		if (gw_sys_now_ns() > deadline_ns)
			fprintf(stderr, "phase %u, not %u: %s\n", status.phase, phase,
				status.reason);
		CHECK(gw_sys_now_ns() < deadline_ns);
		(void)nanosleep(&(struct timespec){.tv_nsec = 200000}, NULL);
	}
}

static void check_whole(const struct bench *bench)
{
	const struct gw_arrival_status status = status_of(bench->arrival);

	CHECK_EQ(status.violation_count, 0);
	CHECK_EQ(status.checksum_error_count, 0);
	CHECK_EQ(status.demand_page_count + status.bulk_page_count + status.zero_page_count,
		 PAGE_COUNT);
	CHECK_EQ(memcmp(bench->guest.memory, source, PAGE_COUNT * PAGE), 0);
}

/* Touches `count` pages far apart, one after the other. */
static void touch_many(const struct guest *guest, uint64_t count)
{
	uint64_t page = 7;

	for (uint64_t i = 0; i < count; i++) {
		CHECK_EQ(memcmp(guest->memory + page * PAGE, source + page * PAGE, PAGE), 0);
		page = (page * 5 + 4099) % PAGE_COUNT;
	}
}

static void report(const char *what, const struct gw_arrival_status *status)
{
	fprintf(stderr, "    %-22s n %6lu p50 %6.1f us p99 %7.1f us p99.9 %7.1f us max %8.1f us\n",
		what, status->fault_latency.sample_count,
		(double)status->fault_latency.p50_ns / 1e3,
		(double)status->fault_latency.p99_ns / 1e3,
		(double)status->fault_latency.p999_ns / 1e3,
		(double)status->fault_latency.max_ns / 1e3);
}

static void faults_alone(void)
{
	struct bench bench = bench_create(1, GW_IMAGE_FROZEN);

	wait_phase(bench.arrival, GW_ARRIVAL_ARMED);
	CHECK_EQ(gw_arrival_open_gate(bench.arrival, GENERATION), 0);
	touch_many(&bench.guest, measuring ? 8000 : 1000);
	const struct gw_arrival_status status = status_of(bench.arrival);

	report("faults alone", &status);
	CHECK(status.demand_page_count > 0);
	CHECK_EQ(status.bulk_page_count, 0);
	bench_destroy(&bench);
}

static void *touch_main(void *argument)
{
	touch_many(argument, PAGE_COUNT);
	return NULL;
}

static void faults_beside_bulk(void)
{
	struct bench bench = bench_create(2, GW_IMAGE_FROZEN);
	pthread_t thread;

	wait_phase(bench.arrival, GW_ARRIVAL_ARMED);
	CHECK_EQ(gw_arrival_open_gate(bench.arrival, GENERATION), 0);
	CHECK_EQ(pthread_create(&thread, NULL, touch_main, &bench.guest), 0);
	CHECK_EQ(gw_arrival_start_bulk(bench.arrival), 0);
	wait_phase(bench.arrival, GW_ARRIVAL_COMPLETE);
	CHECK_EQ(pthread_join(thread, NULL), 0);
	const struct gw_arrival_status status = status_of(bench.arrival);

	report("faults beside bulk", &status);
	check_whole(&bench);
	CHECK_EQ(gw_arrival_finish(bench.arrival), 0);
	bench_destroy(&bench);
}

static void bulk_alone(void)
{
	struct bench bench = bench_create(1, GW_IMAGE_FROZEN);
	struct gw_serve_stats stats;
	struct stat stat;

	wait_phase(bench.arrival, GW_ARRIVAL_ARMED);
	const uint64_t begin_ns = gw_sys_now_ns();

	CHECK_EQ(gw_arrival_open_gate(bench.arrival, GENERATION), 0);
	CHECK_EQ(gw_arrival_start_bulk(bench.arrival), 0);
	wait_phase(bench.arrival, GW_ARRIVAL_COMPLETE);
	fprintf(stderr, "    bulk alone             %.0f MB/s of guest memory\n",
		(double)(PAGE_COUNT * PAGE) * 1e3 / (double)(gw_sys_now_ns() - begin_ns));
	/* Holes stay holes: neither side has grown. */
	CHECK_EQ(fstat(bench.guest.ram_fd, &stat), 0);
	uint64_t data_count = 0;

	for (uint64_t page = 0; page < PAGE_COUNT; page++)
		data_count += !is_hole(page);
	CHECK_EQ(stat.st_blocks, data_count * 8);
	CHECK_EQ(status_of(bench.arrival).zero_page_count, PAGE_COUNT - data_count);
	/* A page moved once. */
	CHECK_EQ(gw_serve_stats(bench.serve, &stats), 0);
	CHECK_EQ(stats.bulk_page_total, data_count);
	CHECK_EQ(status_of(bench.arrival).received_bytes, data_count * PAGE);
	check_whole(&bench);
	bench_destroy(&bench);
}

/* 8 GiB of which three pages are data: the zeros cost some messages, and memory on neither side. */
static void a_guest_of_zeros_is_whole_at_once(void)
{
	static const uint64_t data_pages[] = {70000, 70001, SPARSE_PAGE_COUNT - 1};
	struct gw_serve_stats stats;
	struct stat stat;

	page_count = SPARSE_PAGE_COUNT;
	source_fd = gw_sys_memfd_create("sparse", MFD_CLOEXEC);
	CHECK_EQ(gw_sys_ftruncate(source_fd, (off_t)(SPARSE_PAGE_COUNT * PAGE)), 0);
	for (size_t i = 0; i < 3; i++)
		CHECK_EQ(pwrite(source_fd, source, PAGE, (off_t)(data_pages[i] * PAGE)), PAGE);
	struct bench bench = bench_create(2, GW_IMAGE_FROZEN);
	struct toucher toucher;

	wait_phase(bench.arrival, GW_ARRIVAL_ARMED);
	toucher_start(&toucher, &bench.guest, 1000000);
	const uint64_t begin_ns = gw_sys_now_ns();

	CHECK_EQ(gw_arrival_open_gate(bench.arrival, GENERATION), 0);
	CHECK_EQ(gw_arrival_start_bulk(bench.arrival), 0);
	wait_phase(bench.arrival, GW_ARRIVAL_COMPLETE);
	fprintf(stderr, "    8 GiB of zeros in %.0f ms\n",
		(double)(gw_sys_now_ns() - begin_ns) / 1e6);
	CHECK_EQ(toucher_join(&toucher), 0);
	const struct gw_arrival_status status = status_of(bench.arrival);

	CHECK_EQ(status.violation_count, 0);
	CHECK_EQ(status.demand_page_count + status.bulk_page_count + status.zero_page_count,
		 SPARSE_PAGE_COUNT);
	CHECK(status.zero_page_count >= SPARSE_PAGE_COUNT - 3 - 1);
	for (size_t i = 0; i < 3; i++)
		CHECK_EQ(memcmp(bench.guest.memory + data_pages[i] * PAGE, source, PAGE), 0);
	/* Data comes in whole wants at worst; the toucher has one page more. */
	CHECK(status.received_bytes <= 8 * (UINT64_C(1) << 20));
	CHECK_EQ(fstat(bench.guest.ram_fd, &stat), 0);
	CHECK(stat.st_blocks <= 5 * 8L);
	CHECK_EQ(gw_serve_stats(bench.serve, &stats), 0);
	CHECK(stats.want_total < 200);
	bench_destroy(&bench);
}

#define SHARED_RATE	  (UINT64_C(16) << 20)
#define SHARED_PAGE_COUNT 1536U /* half a second's worth of three quarters */

/* Two guests, weights 3 and 1: what each gets, and all of it for the one that is left. */
static void guests_share_bandwidth_by_weight(void)
{
	struct bench benches[2];
	char first_path[sizeof(map_path)];

	CHECK_EQ(gw_pacer_create(SHARED_RATE, &pacer), 0);
	pacer_weight = 3;
	benches[0] = bench_create(2, GW_IMAGE_FROZEN);
	memcpy(first_path, map_path, sizeof(first_path));
	map_path[strlen(map_path) - 1] ^= 1;
	pacer_weight = 1;
	benches[1] = bench_create(2, GW_IMAGE_FROZEN);
	CHECK_EQ(gw_arrival_share(benches[1].arrival, pacer, 1), -EALREADY);
	for (int i = 0; i < 2; i++) {
		wait_phase(benches[i].arrival, GW_ARRIVAL_ARMED);
		CHECK_EQ(gw_arrival_open_gate(benches[i].arrival, GENERATION), 0);
	}
	for (int i = 0; i < 2; i++)
		CHECK_EQ(gw_arrival_start_bulk(benches[i].arrival), 0);
	while (status_of(benches[0].arrival).bulk_page_count < SHARED_PAGE_COUNT)
		(void)nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
	const uint64_t more = status_of(benches[0].arrival).bulk_page_count;
	const uint64_t less = status_of(benches[1].arrival).bulk_page_count;

	fprintf(stderr, "    weights 3 and 1: %lu and %lu pages\n", more, less);
	CHECK(more >= less * 2 && more <= less * 5);
	/* Members outlive its creator, and the one that is left has no limit when there is none. */
	gw_pacer_set_rate(pacer, 0);
	gw_pacer_destroy(pacer);
	wait_phase(benches[1].arrival, GW_ARRIVAL_COMPLETE);
	check_whole(&benches[1]);
	bench_destroy(&benches[1]);
	memcpy(map_path, first_path, sizeof(first_path));
	wait_phase(benches[0].arrival, GW_ARRIVAL_COMPLETE);
	check_whole(&benches[0]);
	bench_destroy(&benches[0]);
}

/* While LIVE nothing is installed; frozen under a new generation it is. */
static void a_live_image_is_not_installed(void)
{
	struct bench bench = bench_create(1, GW_IMAGE_LIVE);
	struct toucher toucher;

	wait_phase(bench.arrival, GW_ARRIVAL_ARMED);
	toucher_start(&toucher, &bench.guest, 3);
	/* The gate is opened too early, at the generation that the live image has. */
	CHECK_EQ(gw_arrival_open_gate(bench.arrival, GENERATION), 0);
	while (!strstr(status_of(bench.arrival).reason, "only FROZEN"))
		sched_yield();
	CHECK(!guest_cache_has(&bench.guest, 3));
	CHECK_EQ(put_image(bench.serve, GENERATION, GW_IMAGE_FROZEN), 0);
	CHECK_EQ(toucher_join(&toucher), first_word(3));
	bench_destroy(&bench);
}

/* The source was thawed and frozen again: what it has now is not what this guest was given. */
static void another_generation_is_refused(void)
{
	struct bench bench = bench_create(1, GW_IMAGE_FROZEN);
	struct toucher toucher;

	wait_phase(bench.arrival, GW_ARRIVAL_ARMED);
	CHECK_EQ(put_image(bench.serve, GENERATION + 1, GW_IMAGE_FROZEN), 0);
	CHECK_EQ(gw_arrival_open_gate(bench.arrival, GENERATION), 0);
	toucher_start(&toucher, &bench.guest, 3);
	wait_phase(bench.arrival, GW_ARRIVAL_REFUSED);
	CHECK(strstr(status_of(bench.arrival).reason, "STALE_GENERATION"));
	CHECK_EQ(status_of(bench.arrival).absent_count, PAGE_COUNT);
	/* The toucher waits for ever, as it should: its memory stays until this process ends. */
	gw_arrival_destroy(bench.arrival);
	CHECK_EQ(gw_page_map_unlink(map_path), 0);
	gw_serve_destroy(bench.serve);
}

/* Destroyed and made again on its port, first without the image: the engine waits it out. */
static void a_server_restarted_without_its_image_yet(void)
{
	struct bench bench = bench_create(2, GW_IMAGE_FROZEN);
	const uint32_t port = (uint32_t)gw_serve_port(bench.serve);
	struct toucher toucher;

	wait_phase(bench.arrival, GW_ARRIVAL_ARMED);
	CHECK_EQ(gw_arrival_open_gate(bench.arrival, GENERATION), 0);
	touch_many(&bench.guest, 50);
	gw_serve_destroy(bench.serve);
	toucher_start(&toucher, &bench.guest, 16000);
	wait_phase(bench.arrival, GW_ARRIVAL_LINK_LOST);
	bench.serve = serve_start(port, 0, 0);
	wait_phase(bench.arrival, GW_ARRIVAL_REFUSED);
	CHECK_EQ(put_image(bench.serve, GENERATION, GW_IMAGE_FROZEN), 0);
	CHECK_EQ(toucher_join(&toucher), is_hole(16000) ? 0 : first_word(16000));
	CHECK_EQ(gw_arrival_start_bulk(bench.arrival), 0);
	wait_phase(bench.arrival, GW_ARRIVAL_COMPLETE);
	check_whole(&bench);
	bench_destroy(&bench);
}

int main(int argc, char **argv)
{
	(void)argv;
	guest_need_uffd();
	measuring = argc > 1;
	(void)snprintf(map_path, sizeof(map_path), "/dev/shm/gw-test-both-%d", (int)getpid());
	guest_left_path = map_path;
	make_source();
	for (int i = 0; measuring && i < 3; i++) {
		RUN_FORKED(faults_alone);
		RUN_FORKED(faults_beside_bulk);
		RUN_FORKED(bulk_alone);
	}
	if (measuring)
		return EXIT_SUCCESS;
	RUN_FORKED(faults_alone);
	RUN_FORKED(faults_beside_bulk);
	RUN_FORKED(bulk_alone);
	RUN_FORKED(a_guest_of_zeros_is_whole_at_once);
	RUN_FORKED(guests_share_bandwidth_by_weight);
	RUN_FORKED(a_live_image_is_not_installed);
	RUN_FORKED(another_generation_is_refused);
	RUN_FORKED(a_server_restarted_without_its_image_yet);
	return EXIT_SUCCESS;
}
