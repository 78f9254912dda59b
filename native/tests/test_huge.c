/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_huge.c - pages of 2 MiB, on hugetlbfs: two wants a page, no ZEROPAGE, no SEEK_DATA.
 *
 * Threads, Errors, Ownership, Units, Source: see guest.h and peer.h.
 */
#include "guest.h"
#include "peer.h"

#include <sched.h>
#include <time.h>

#include <godwit/arrival.h>
#include <godwit/page_map.h>
#include <godwit/sandbox.h>

#define HUGE	   ((size_t)2 << 20)
#define PAGE_COUNT ((uint64_t)8)
#define GENERATION ((uint64_t)3)
#define ZERO_PAGE  5U

static uint32_t method = GW_INSTALL_COPY;
static char map_path[64];
static uint8_t *source;

static uint64_t meminfo(const char *name)
{
	uint64_t value = 0;
	char line[128];
	FILE *const file = fopen("/proc/meminfo", "re");

	CHECK(file);
	while (fgets(line, sizeof(line), file))
		if (strncmp(line, name, strlen(name)) == 0)
			value = strtoull(line + strlen(name), NULL, 10);
	CHECK_EQ(fclose(file), 0);
	return value;
}

static bool reserve(const char *count)
{
	FILE *const file = fopen("/proc/sys/vm/nr_hugepages", "we");

	return file && fputs(count, file) >= 0 && fclose(file) == 0;
}

static pid_t reserver;

static void give_back(void)
{
	if (getpid() == reserver)
		(void)reserve("0");
}

/* Where nobody has reserved any, some are for the time of the test: 32 MiB, by root. */
static void need_huge_pages(void)
{
	reserver = getpid();
	if (meminfo("HugePages_Total:") == 0 && reserve("16"))
		CHECK_EQ(atexit(give_back), 0);
	check_need(meminfo("HugePages_Free:") >= PAGE_COUNT, "hugetlb",
		   "reserve huge pages of 2 MiB: sysctl vm.nr_hugepages=16");
}

static struct guest guest_huge(void)
{
	struct guest guest = {.page_count = PAGE_COUNT};
	void *address = NULL;
	const bool minor = method == GW_INSTALL_CONTINUE;

	guest.ram_fd = gw_sys_memfd_create("huge", MFD_CLOEXEC | MFD_HUGETLB);
	CHECK(guest.ram_fd >= 0);
	CHECK_EQ(gw_sys_ftruncate(guest.ram_fd, (off_t)(PAGE_COUNT * HUGE)), 0);
	CHECK_EQ(gw_sys_mmap(NULL, PAGE_COUNT * HUGE, PROT_READ | PROT_WRITE, MAP_SHARED,
			     guest.ram_fd, 0, &address),
		 0);
	guest.memory = address;
	guest.uffd = gw_uffd_open(GW_UFFD_FEATURE_MISSING_HUGETLBFS | GW_UFFD_FEATURE_EVENT_REMOVE |
					  (minor ? GW_UFFD_FEATURE_MINOR_HUGETLBFS : 0),
				  NULL);
	CHECK(guest.uffd >= 0);
	CHECK_EQ(gw_uffd_register(guest.uffd, (uintptr_t)address, PAGE_COUNT * HUGE,
				  UFFDIO_REGISTER_MODE_MISSING |
					  (minor ? UFFDIO_REGISTER_MODE_MINOR : 0),
				  NULL),
		 0);
	return guest;
}

static struct gw_arrival *arrival_of(const struct guest *guest, uint32_t port, bool adopt)
{
	const struct gw_arrival_region region = {
		.host_addr = (uintptr_t)guest->memory,
		.len = PAGE_COUNT * HUGE,
	};
	const struct gw_arrival_config config = {
		.struct_size = sizeof(config),
		.sandbox = GW_SANDBOX_ENFORCE,
		.page_size = HUGE,
		.epoch = 2,
		.page_map_path = map_path,
		.session_id = "session",
		.image_id = "vm",
		.page_host = "127.0.0.1",
		.page_port = port,
		.uffds = &guest->uffd,
		.uffd_count = 1,
		.exit_channel_fd = -1,
		.exit_doorbell_fd = -1,
		.ram_fd = guest->ram_fd,
		.install_method = method,
		.bulk_connection_count = 1,
		.adopt = adopt,
		.regions = &region,
		.region_count = 1,
	};
	struct gw_arrival *arrival = NULL;

	CHECK_EQ(gw_arrival_create(&config, &arrival), 0);
	return arrival;
}

static uint32_t phase_of(const struct gw_arrival *arrival)
{
	struct gw_arrival_status status;

	CHECK_EQ(gw_arrival_status(arrival, &status), 0);
	return status.phase;
}

static void wait_phase(const struct gw_arrival *arrival, uint32_t phase)
{
	const uint64_t deadline_ns = gw_sys_now_ns() + UINT64_C(1000000) * TIMEOUT_MS;

	while (phase_of(arrival) != phase) {
		CHECK(gw_sys_now_ns() < deadline_ns);
		(void)nanosleep(&(struct timespec){.tv_nsec = 500000}, NULL);
	}
}

static bool page_is_right(const struct guest *guest, uint64_t page)
{
	return memcmp(guest->memory + page * HUGE, source + page * HUGE, HUGE) == 0;
}

static void guest_close(struct guest *guest)
{
	CHECK_EQ(munmap(guest->memory, PAGE_COUNT * HUGE), 0);
	CHECK_EQ(close(guest->ram_fd), 0);
	CHECK_EQ(close(guest->uffd), 0);
}

static void a_guest_of_huge_pages_becomes_whole(void)
{
	struct guest guest = guest_huge();
	struct peer *const peer = peer_start(source, PAGE_COUNT * HUGE, GENERATION, 0);
	struct gw_arrival *const arrival = arrival_of(&guest, peer->port, false);
	struct gw_arrival_status status;

	CHECK_EQ(gw_arrival_start(arrival), 0);
	CHECK_EQ(gw_arrival_open_gate(arrival, GENERATION), 0);
	CHECK(page_is_right(&guest, 3));
	/* Zero throughout: it is copied, as there is no ZEROPAGE. */
	CHECK(page_is_right(&guest, ZERO_PAGE));
	CHECK_EQ(gw_arrival_start_bulk(arrival), 0);
	wait_phase(arrival, GW_ARRIVAL_COMPLETE);
	for (uint64_t page = 0; page < PAGE_COUNT; page++)
		CHECK(page_is_right(&guest, page));
	CHECK_EQ(gw_arrival_status(arrival, &status), 0);
	CHECK_EQ(status.demand_page_count + status.bulk_page_count + status.zero_page_count,
		 PAGE_COUNT);
	CHECK_EQ(status.violation_count, 0);
	CHECK_EQ(gw_arrival_finish(arrival), 0);
	gw_arrival_destroy(arrival);
	CHECK_EQ(gw_page_map_unlink(map_path), 0);
	peer_stop(peer);
	guest_close(&guest);
}

static void die(void *argument)
{
	(void)argument;
	_exit(137);
}

/* As test_adopt.c, where it matters: CONTINUE is the probe, and must not show a half-filled page. */
static void adoption_after_a_kill_at(const char *point)
{
	struct guest guest = guest_huge();
	uint32_t port = 0;

	fprintf(stderr, "    %s\n", point);
	const struct guest_life life = guest_fork_life(&port);

	if (life.pid == 0) {
		struct gw_arrival *const arrival = arrival_of(&guest, port, false);

		gw_hook_call(point, die, NULL);
		CHECK_EQ(gw_arrival_start(arrival), 0);
		CHECK_EQ(gw_arrival_open_gate(arrival, GENERATION), 0);
		CHECK_EQ(gw_arrival_start_bulk(arrival), 0);
		for (;;)
			pause();
	}
	struct peer *const peer = peer_start(source, PAGE_COUNT * HUGE, GENERATION, 0);

	guest_start_life(&life, peer->port);
	CHECK_EQ(WEXITSTATUS(guest_wait_life(&life)), 137);
	struct gw_arrival *const arrival = arrival_of(&guest, peer->port, true);

	CHECK_EQ(gw_arrival_start(arrival), 0);
	CHECK_EQ(gw_arrival_start_bulk(arrival), 0);
	for (uint64_t page = 0; page < PAGE_COUNT; page++)
		CHECK(page_is_right(&guest, page));
	wait_phase(arrival, GW_ARRIVAL_COMPLETE);
	gw_arrival_destroy(arrival);
	CHECK_EQ(gw_page_map_unlink(map_path), 0);
	peer_stop(peer);
	guest_close(&guest);
}

static void adoption_after_a_kill_at_each_step(void)
{
	adoption_after_a_kill_at("install.claimed");
	adoption_after_a_kill_at("install.copied");
	if (method == GW_INSTALL_CONTINUE)
		adoption_after_a_kill_at("install.filled");
	adoption_after_a_kill_at("install.present");
	adoption_after_a_kill_at("install.published");
}

int main(void)
{
	guest_need_uffd();
	need_huge_pages();
	(void)snprintf(map_path, sizeof(map_path), "/dev/shm/gw-test-huge-%d", (int)getpid());
	guest_left_path = map_path;
	source = mmap(NULL, PAGE_COUNT * HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
		      -1, 0);
	CHECK(source != MAP_FAILED);
	for (uint64_t i = 0; i < PAGE_COUNT * HUGE / PAGE; i++)
		if (i * PAGE / HUGE != ZERO_PAGE)
			guest_pattern(i, source + i * PAGE);
	for (method = GW_INSTALL_COPY; method <= GW_INSTALL_CONTINUE; method++) {
		fprintf(stderr, "%s\n", method == GW_INSTALL_COPY ? "copy" : "continue");
		RUN_FORKED(a_guest_of_huge_pages_becomes_whole);
		RUN_FORKED(adoption_after_a_kill_at_each_step);
	}
	return EXIT_SUCCESS;
}
