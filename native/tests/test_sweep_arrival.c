/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_sweep_arrival.c - a guest arrives from the page server that ships, by faults and in bulk, while
 * one system call of either side fails, with each errno that it can give. It arrives whole; or it is
 * held, with a phase and a reason that say why, where the kernel said that the memory is not ours any
 * more. No page is ever wrong, none is zero that was not, nothing is left behind.
 */
#include "guest.h"
#include "sweep.h"

#include <time.h>

#include <godwit/arrival.h>
#include <godwit/page_map.h>
#include <godwit/serve.h>

#define PAGE_COUNT	  UINT64_C(96)
#define GENERATION	  UINT64_C(9)
#define VCPU_COUNT	  2
#define BULK_BEGUN_NS_MAX UINT64_C(20000000)

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define PLACE_COUNT 2 /* slow there, and what is failed is the same */
#else
#define PLACE_COUNT 6
#endif
#define RETRY_COUNT 20

static char map_path[64];
static uint32_t method;
static int source_fd;
static uint8_t *source;

static bool is_hole(uint64_t page)
{
	return page % 16 >= 12;
}

static void make_source(void)
{
	void *address = NULL;

	source_fd = memfd_create("source", MFD_CLOEXEC);
	CHECK(source_fd >= 0);
	CHECK_EQ(ftruncate(source_fd, (off_t)(PAGE_COUNT * PAGE)), 0);
	address = mmap(NULL, PAGE_COUNT * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, source_fd, 0);
	CHECK(address != MAP_FAILED);
	source = address;
	for (uint64_t page = 0; page < PAGE_COUNT; page++)
		if (!is_hole(page))
			guest_pattern(page, source + page * PAGE);
}

/* --- the bench -------------------------------------------------------------------------------- */

struct vcpu {
	pthread_t thread;
	struct bench *bench;
	uint64_t first;
};

struct bench {
	struct guest guest;
	struct gw_serve *serve;
	struct gw_arrival *arrival;
	struct vcpu vcpus[VCPU_COUNT];
	_Atomic uint32_t done_count; /* vCPUs that have seen all of it */
	_Atomic bool
		let_go; /* its userfaultfd is taken off: what is absent reads zero from now on */
};

static void *vcpu_main(void *argument)
{
	const struct vcpu *const vcpu = argument;
	struct bench *const bench = vcpu->bench;

	for (uint64_t i = 0; i < PAGE_COUNT; i++) {
		const uint64_t page = (vcpu->first + i * 7) % PAGE_COUNT;
		const bool right =
			memcmp(bench->guest.memory + page * PAGE, source + page * PAGE, PAGE) == 0;

		CHECK(right || atomic_load(&bench->let_go));
	}
	atomic_fetch_add(&bench->done_count, 1);
	return NULL;
}

static void serve_image(struct bench *bench)
{
	const struct gw_serve_config config = {
		.struct_size = sizeof(config),
		.listen_host = "127.0.0.1",
		.connection_count_max = 16,
	};
	const struct gw_serve_region region = {.size = PAGE_COUNT * PAGE, .page_size = PAGE};
	const struct gw_serve_image image = {
		.struct_size = sizeof(image),
		.ram_fd = source_fd,
		.image_id = "vm",
		.vm_id = "vm",
		.boot_id = "boot",
		.epoch = 1,
		.generation = GENERATION,
		.state = GW_IMAGE_FROZEN,
		.region_count = 1,
		.regions = &region,
	};

	CHECK_EQ(gw_serve_create(&config, &bench->serve), 0);
	CHECK_EQ(gw_serve_put_image(bench->serve, &image), 0);
	CHECK_EQ(gw_serve_start(bench->serve), 0);
}

static void create_arrival(struct bench *bench)
{
	const struct gw_arrival_region region = {
		.host_addr = guest_address(&bench->guest, 0),
		.len = PAGE_COUNT * PAGE,
	};
	const struct gw_arrival_config config = {
		.struct_size = sizeof(config),
		.page_size = PAGE,
		.epoch = 2,
		.page_map_path = map_path,
		.session_id = "session",
		.image_id = "vm",
		.page_host = "127.0.0.1",
		.traceparent = "",
		.page_port = (uint32_t)gw_serve_port(bench->serve),
		.uffds = &bench->guest.uffd,
		.uffd_count = 1,
		.exit_channel_fd = -1,
		.exit_doorbell_fd = -1,
		.ram_fd = bench->guest.ram_fd,
		.install_method = method,
		.bulk_connection_count = 1,
		.regions = &region,
		.region_count = 1,
	};

	CHECK_EQ(gw_arrival_create(&config, &bench->arrival), 0);
}

static void bench_create(struct bench *bench)
{
	const bool by_continue = method == GW_INSTALL_CONTINUE;

	memset(bench, 0, sizeof(*bench));
	bench->guest = guest_create(PAGE_COUNT,
				    GW_UFFD_FEATURE_EVENT_REMOVE | GW_UFFD_FEATURE_MISSING_SHMEM |
					    (by_continue ? GW_UFFD_FEATURE_MINOR_SHMEM : 0),
				    UFFDIO_REGISTER_MODE_MISSING |
					    (by_continue ? UFFDIO_REGISTER_MODE_MINOR : 0));
	serve_image(bench);
	create_arrival(bench);
}

static struct gw_arrival_status status_of(const struct bench *bench)
{
	struct gw_arrival_status status;

	CHECK_EQ(gw_arrival_status(bench->arrival, &status), 0);
	return status;
}

/* --- what must be so -------------------------------------------------------------------------- */

/* Whatever happened: what the guest can see is the source's, and what is absent has no content. */
static void check_pages(const struct bench *bench, bool whole)
{
	uint8_t bitmap[PAGE_COUNT / 8];
	uint8_t bytes[PAGE];

	CHECK_EQ(gw_arrival_bitmap(bench->arrival, bitmap, sizeof(bitmap)), sizeof(bitmap));
	for (uint64_t page = 0; page < PAGE_COUNT; page++) {
		const int state = gw_arrival_page_state(bench->arrival, page * PAGE);
		const bool absent = bitmap[page / 8] >> page % 8 & 1;
		const bool has_data = lseek(bench->guest.ram_fd, (off_t)(page * PAGE), SEEK_DATA) ==
				      (off_t)(page * PAGE);

		CHECK(!whole || !absent);
		CHECK(absent || state == GW_PAGE_PRESENT || state == GW_PAGE_ZERO);
		/* Zero only if the source said zero. */
		CHECK(absent || state != GW_PAGE_ZERO || is_hole(page));
		if (!has_data)
			continue;
		CHECK_EQ(pread(bench->guest.ram_fd, bytes, PAGE, (off_t)(page * PAGE)), PAGE);
		CHECK_EQ(memcmp(bytes, source + page * PAGE, PAGE), 0);
	}
}

/* Phases in which the engine does nothing more by itself. */
static bool is_stuck(uint32_t phase)
{
	return phase == GW_ARRIVAL_COMPLETE || phase == GW_ARRIVAL_VIOLATION ||
	       phase == GW_ARRIVAL_ENDED || phase == GW_ARRIVAL_REFUSED;
}

static uint32_t wait_stuck(const struct bench *bench)
{
	const uint64_t deadline_ns = gw_sys_now_ns() + UINT64_C(1000000) * TIMEOUT_MS;

	while (!is_stuck(status_of(bench).phase)) {
		if (gw_sys_now_ns() > deadline_ns) {
			const struct gw_arrival_status status = status_of(bench);

			fprintf(stderr, "phase %u absent %lu held %lu: %s\n", status.phase,
				status.absent_count, status.held_fault_count, status.reason);
			for (uint64_t page = 0; page < PAGE_COUNT; page++)
				if (!gw_page_state_is_final((uint8_t)gw_arrival_page_state(
					    bench->arrival, page * PAGE)))
					fprintf(stderr, "page %lu is in state %d\n", page,
						gw_arrival_page_state(bench->arrival, page * PAGE));
			CHECK(!"it comes to no end");
		}
		(void)nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
	}
	return status_of(bench).phase;
}

/* Of a VM that goes on: ioctls that say that the memory is not ours hold it, others do not. */
static bool may_hold(enum gw_sys_call call, int err, uint32_t phase)
{
	if (call != GW_SYS_IOCTL)
		return false;
	if (phase == GW_ARRIVAL_VIOLATION)
		return err == EEXIST || err == ENOENT;
	return phase == GW_ARRIVAL_ENDED && err == ESRCH;
}

/* While faults are hot bulk hardly asks: first something of it, unless that is what fails. */
static void wait_bulk_begun(const struct bench *bench)
{
	const uint64_t end_ns = gw_sys_now_ns() + BULK_BEGUN_NS_MAX;

	while (status_of(bench).bulk_page_count == 0 && gw_sys_now_ns() < end_ns)
		(void)nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
}

static void run(struct bench *bench)
{
	CHECK_EQ(gw_arrival_start(bench->arrival), 0);
	CHECK_EQ(gw_arrival_open_gate(bench->arrival, GENERATION), 0);
	CHECK_EQ(gw_arrival_start_bulk(bench->arrival), 0);
	wait_bulk_begun(bench);
	for (uint64_t i = 0; i < VCPU_COUNT; i++) {
		bench->vcpus[i] = (struct vcpu){.bench = bench, .first = i * 31};
		CHECK_EQ(pthread_create(&bench->vcpus[i].thread, NULL, vcpu_main, &bench->vcpus[i]),
			 0);
	}
}

/* Refused for lack of data that there is: told the same server again, it goes on. */
static uint32_t settle_phase(struct bench *bench, enum gw_sys_call call, int err)
{
	uint32_t phase = wait_stuck(bench);

	if (phase != GW_ARRIVAL_REFUSED)
		return phase;
	CHECK(call == GW_SYS_PREAD || call == GW_SYS_LSEEK);
	CHECK(strstr(status_of(bench).reason, "MEMORY_LOST"));
	CHECK(err != ENOMEM); /* it passes: nobody has to be told anything */
	check_pages(bench, false);
	CHECK_EQ(gw_arrival_set_page_server(bench->arrival, "127.0.0.1",
					    (uint32_t)gw_serve_port(bench->serve)),
		 0);
	while (status_of(bench).phase == GW_ARRIVAL_REFUSED)
		(void)nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
	return wait_stuck(bench);
}

static void tear_down(struct bench *bench)
{
	for (int i = 0; i < VCPU_COUNT; i++)
		CHECK_EQ(pthread_join(bench->vcpus[i].thread, NULL), 0);
	gw_arrival_destroy(bench->arrival);
	CHECK_EQ(gw_page_map_unlink(map_path), 0);
	gw_serve_destroy(bench->serve);
	guest_destroy(&bench->guest);
}

/* One arrival with one failure. True if it happened. */
static bool arrive(enum gw_sys_call call, uint64_t nth, int err)
{
	static struct bench bench;

	bench_create(&bench);
	if (err)
		sweep_arm(call, nth, err);
	run(&bench);
	uint32_t phase = settle_phase(&bench, call, err);

	/* A fault that is late for the last page may yet meet the failure. */
	while (phase == GW_ARRIVAL_COMPLETE && atomic_load(&bench.done_count) < VCPU_COUNT) {
		(void)nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
		phase = status_of(&bench).phase;
	}
	const bool failed = gw_sys_failed() && err;

	gw_sys_fail_none();
	const int finished = gw_arrival_finish(bench.arrival);

	/* And its event may be read when its vCPU has long gone on. */
	if (finished == -EBUSY)
		phase = status_of(&bench).phase;
	if (phase != GW_ARRIVAL_COMPLETE)
		fprintf(stderr, "    %s %lu %s: phase %u, %s\n", gw_sys_name(call), nth,
			sweep_error_name(err), phase, status_of(&bench).reason);
	CHECK(phase == GW_ARRIVAL_COMPLETE || may_hold(call, err, phase));
	check_pages(&bench, phase == GW_ARRIVAL_COMPLETE);
	if (phase == GW_ARRIVAL_COMPLETE) {
		CHECK(status_of(&bench).violation_count == 0 ||
		      may_hold(call, err, GW_ARRIVAL_VIOLATION));
		CHECK_EQ(finished, 0);
	} else {
		CHECK(status_of(&bench).reason[0] != '\0');
		CHECK_EQ(finished, -EBUSY);
		/* Held it stays; only so that the test can end is it let go. */
		atomic_store(&bench.let_go, true);
		CHECK_EQ(gw_uffd_unregister(bench.guest.uffd, guest_address(&bench.guest, 0),
					    PAGE_COUNT * PAGE),
			 0);
	}
	tear_down(&bench);
	return failed;
}

/* --- the sweep -------------------------------------------------------------------------------- */

/* The first, the last, and some between: what happens in the middle is the same all along. */
static uint64_t place(uint64_t count, uint64_t i)
{
	if (count <= PLACE_COUNT)
		return i + 1;
	return i < PLACE_COUNT / 2 ? i + 1 : 1 + count * (i - PLACE_COUNT / 2 + 1) / PLACE_COUNT;
}

/* Fail one call. Threads and timing decide whether a run makes it at all. */
static bool fail_once(struct sweep *sweep, enum gw_sys_call call, uint64_t nth, size_t e)
{
	sweep_say(call, nth, sweep_errors[call][e]);
	const bool failed = arrive(call, nth, sweep_errors[call][e]);

	sweep->failed_counts[call][e] += failed;
	sweep->failed_count += failed;
	return failed;
}

static void sweep_arrivals(enum sweep_id id)
{
	/* Made when it is prepared and taken away, which test_sweep_calls.c fails. */
	static const enum gw_sys_call around[] = {
		GW_SYS_OPEN,	     GW_SYS_CLOSE,     GW_SYS_DUP,	    GW_SYS_FCNTL,
		GW_SYS_FSTAT,	     GW_SYS_FTRUNCATE, GW_SYS_FALLOCATE,    GW_SYS_RENAME,
		GW_SYS_UNLINK,	     GW_SYS_READLINK,  GW_SYS_MEMFD_CREATE, GW_SYS_MUNMAP,
		GW_SYS_EPOLL_CREATE, GW_SYS_BIND,      GW_SYS_LISTEN,	    GW_SYS_GETSOCKNAME,
		GW_SYS_LSEEK,	     GW_SYS_ANY,
	};
	struct sweep sweep;

	(void)arrive(GW_SYS_ANY, 0, 0);
	const int fd_count = sweep_fd_count();

	sweep_count_begin(&sweep, id);
	(void)arrive(GW_SYS_ANY, 0, 0);
	sweep_count_end(&sweep);
	if (id == SWEEP_ARRIVAL_COPY)
		sweep_check_declared(&sweep, around);
	for (const enum gw_sys_call *call = sweep.scenario->calls; *call; call++) {
		const uint64_t count = sweep.call_counts[*call];
		const uint64_t place_count = count < PLACE_COUNT ? count : PLACE_COUNT;

		for (size_t e = 0; sweep_errors[*call][e]; e++) {
			for (uint64_t i = 0; i < place_count; i++) {
				(void)fail_once(&sweep, *call, place(count, i), e);
				CHECK_EQ(sweep_fd_count(), fd_count);
#ifndef __SANITIZE_THREAD__ /* it has threads of its own */
				sweep_check_threads(3 /* ., .. and this one */);
#endif
			}
			/* A call that only some runs make was made in none of these. */
			for (int i = 0; i < RETRY_COUNT && sweep.failed_counts[*call][e] == 0; i++)
				(void)fail_once(&sweep, *call, 1, e);
		}
	}
	sweep_check_whole(&sweep);
}

static void by_copy(void)
{
	method = GW_INSTALL_COPY;
	sweep_arrivals(SWEEP_ARRIVAL_COPY);
}

static void by_continue(void)
{
	method = GW_INSTALL_CONTINUE;
	sweep_arrivals(SWEEP_ARRIVAL_CONTINUE);
}

int main(int argc, char **argv)
{
	uint64_t features = 0;

	guest_need_uffd();
	CHECK_EQ(gw_uffd_probe(&features), 0);
	(void)snprintf(map_path, sizeof(map_path), "/dev/shm/gw-test-sweep-arrival-%d",
		       (int)getpid());
	guest_left_path = map_path;
	make_source();
	/* In shards, so that two run at once: ctest gives the name. */
	if (argc < 2 || strcmp(argv[1], "copy") == 0)
		RUN_FORKED(by_copy);
	if (argc < 2 || strcmp(argv[1], "continue") == 0) {
		check_need(features & GW_UFFD_FEATURE_MINOR_SHMEM, "minor-shmem",
			   "a kernel of 5.14 or later");
		RUN_FORKED(by_continue);
	}
	return EXIT_SUCCESS;
}
