/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_arrival_hold.c - how long the guest is held: measured here by the clock of who waits, and
 * told by the engine; and memory that is full for a while.
 */
#include "guest.h"
#include "peer.h"

#include <sched.h>
#include <sys/mount.h>
#include <time.h>

#include <godwit/arrival.h>
#include <godwit/page_map.h>
#include <godwit/sandbox.h>

#define PAGE_COUNT ((uint64_t)256)
#define GENERATION ((uint64_t)5)

static uint8_t *source;
static char map_path[64];

static struct gw_arrival *arrival_of(const struct guest *guest, uint32_t port, bool adopt)
{
	const struct gw_arrival_region region = {
		.host_addr = guest_address(guest, 0),
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
		.traceparent = "",
		.page_port = port,
		.uffds = &guest->uffd,
		.uffd_count = 1,
		.exit_channel_fd = -1,
		.exit_doorbell_fd = -1,
		.ram_fd = guest->ram_fd,
		.install_method = GW_INSTALL_COPY,
		.bulk_connection_count = 1,
		.adopt = adopt,
		.regions = &region,
		.region_count = 1,
	};
	struct gw_arrival *arrival = NULL;

	CHECK_EQ(gw_arrival_create(&config, &arrival), 0);
	return arrival;
}

static struct guest guest_of(void)
{
	return guest_create(PAGE_COUNT,
			    GW_UFFD_FEATURE_EVENT_REMOVE | GW_UFFD_FEATURE_MISSING_SHMEM,
			    UFFDIO_REGISTER_MODE_MISSING);
}

static struct gw_arrival_status status_of(const struct gw_arrival *arrival)
{
	struct gw_arrival_status status;

	CHECK_EQ(gw_arrival_status(arrival, &status), 0);
	return status;
}

#define WAIT_UNTIL(condition)                                                          \
	do {                                                                           \
		const uint64_t deadline_ns_ = gw_sys_now_ns() + UINT64_C(90000000000); \
		while (!(condition)) {                                                 \
			CHECK(gw_sys_now_ns() < deadline_ns_);                         \
			(void)nanosleep(&(struct timespec){.tv_nsec = 500000}, NULL);  \
		}                                                                      \
	} while (0)

/* The guest runs; bulk is so slow that it brings nothing of interest. */
static struct gw_arrival *run_slowly(const struct guest *guest, uint32_t port, bool adopt)
{
	struct gw_arrival *const arrival = arrival_of(guest, port, adopt);

	CHECK_EQ(gw_arrival_set_bulk_rate(arrival, 1), 0);
	CHECK_EQ(gw_arrival_start(arrival), 0);
	WAIT_UNTIL(adopt || status_of(arrival).phase == GW_ARRIVAL_ARMED);
	CHECK_EQ(gw_arrival_open_gate(arrival, GENERATION), 0);
	CHECK_EQ(gw_arrival_start_bulk(arrival), 0);
	return arrival;
}

/* The server goes; a fault later somebody waits; the server returns. */
static void a_hold_is_from_the_first_wait_to_its_page(void)
{
	struct guest guest = guest_of();
	struct peer *peer = peer_start(source, PAGE_COUNT * PAGE, GENERATION, 0);
	struct gw_arrival *const arrival = run_slowly(&guest, peer->port, false);
	const uint32_t port = peer->port;
	struct toucher toucher;

	toucher_start(&toucher, &guest, 1);
	CHECK_EQ(toucher_join(&toucher), first_word(1));
	/* An ordinary fetch holds nobody. */
	CHECK_EQ(status_of(arrival).hold_count, 0);
	CHECK_EQ(status_of(arrival).hold_now.cause, 0);
	peer_stop(peer);
	WAIT_UNTIL(status_of(arrival).hold_now.cause == GW_HOLD_PAGE_SERVER);
	/* Nobody waits: an outage, and nobody is held by it. */
	WAIT_UNTIL(status_of(arrival).hold_now.outage_ns > 30000000);
	CHECK_EQ(status_of(arrival).hold_now.held_ns, 0);
	const uint64_t touched_ns = gw_sys_now_ns();

	toucher_start(&toucher, &guest, 200);
	WAIT_UNTIL(status_of(arrival).held_fault_count == 1);
	const uint64_t waits_ns = gw_sys_now_ns();

	WAIT_UNTIL(status_of(arrival).hold_now.held_ns > 50000000);
	const uint64_t seen_ns = status_of(arrival).hold_now.held_ns;
	const uint64_t returns_ns = gw_sys_now_ns();

	peer = peer_start(source, PAGE_COUNT * PAGE, GENERATION, port);
	CHECK_EQ(toucher_join(&toucher), first_word(200));
	WAIT_UNTIL(status_of(arrival).hold_count == 1);
	const uint64_t told_ns = gw_sys_now_ns();
	const struct gw_arrival_status status = status_of(arrival);

	CHECK_EQ(status.holds[0].cause, GW_HOLD_PAGE_SERVER);
	CHECK(status.holds[0].held_ns >= seen_ns);
	CHECK(status.holds[0].held_ns >= returns_ns - waits_ns);
	CHECK(status.holds[0].held_ns <= told_ns - touched_ns);
	CHECK(status.holds[0].outage_ns > status.holds[0].held_ns);
	CHECK_EQ(status.held_total_ns, status.holds[0].held_ns);
	CHECK_EQ(status.hold_now.cause, 0);
	gw_arrival_destroy(arrival);
	peer_stop(peer);
	guest_destroy(&guest);
	CHECK_EQ(gw_page_map_unlink(map_path), 0);
}

/* It waits already when the link goes: held from then on. */
static void a_wait_from_before_counts_from_the_loss(void)
{
	struct guest guest = guest_of();
	struct peer *peer = peer_start(source, PAGE_COUNT * PAGE, GENERATION, 0);
	struct gw_arrival *const arrival = run_slowly(&guest, peer->port, false);
	const uint32_t port = peer->port;
	struct toucher toucher;

	peer_hold(peer, 1 << GW_PAGE_LANE_DEMAND);
	toucher_start(&toucher, &guest, 200);
	WAIT_UNTIL(atomic_load(&peer->want_counts[GW_PAGE_LANE_DEMAND]) == 1);
	CHECK_EQ(status_of(arrival).hold_now.cause, 0);
	peer_stop(peer);
	WAIT_UNTIL(status_of(arrival).hold_now.held_ns > 20000000);
	const struct gw_hold now = status_of(arrival).hold_now;

	CHECK_EQ(now.held_ns, now.outage_ns);
	peer = peer_start(source, PAGE_COUNT * PAGE, GENERATION, port);
	CHECK_EQ(toucher_join(&toucher), first_word(200));
	WAIT_UNTIL(status_of(arrival).hold_count == 1);
	CHECK(status_of(arrival).holds[0].held_ns >= now.held_ns);
	gw_arrival_destroy(arrival);
	peer_stop(peer);
	guest_destroy(&guest);
	CHECK_EQ(gw_page_map_unlink(map_path), 0);
}

/* The engine is killed while somebody waits; its successor knows for how long nobody was there. */
static void an_absence_of_the_engine_is_a_hold(void)
{
	struct guest guest = guest_of();
	struct toucher toucher;
	uint32_t port = 0;
	int pair[2];
	char byte = 0;

	CHECK_EQ(pipe(pair), 0);
	const struct guest_life life = guest_fork_life(&port);

	if (life.pid == 0) {
		struct gw_arrival *const arrival = run_slowly(&guest, port, false);

		WAIT_UNTIL(status_of(arrival).phase == GW_ARRIVAL_FETCHING);
		/* Its turns go on, so that the last one is not long ago. */
		(void)nanosleep(&(struct timespec){.tv_nsec = 300000000}, NULL);
		CHECK_EQ(write(pair[1], "r", 1), 1);
		for (;;)
			pause();
	}
	struct peer *const peer = peer_start(source, PAGE_COUNT * PAGE, GENERATION, 0);

	guest_start_life(&life, peer->port);
	CHECK_EQ(read(pair[0], &byte, 1), 1);
	CHECK_EQ(kill(life.pid, SIGKILL), 0);
	(void)guest_wait_life(&life);
	const uint64_t dead_ns = gw_sys_now_ns();

	toucher_start(&toucher, &guest, 200);
	(void)nanosleep(&(struct timespec){.tv_nsec = 200000000}, NULL);
	const uint64_t returns_ns = gw_sys_now_ns();
	struct gw_arrival *const arrival = run_slowly(&guest, peer->port, true);

	CHECK_EQ(toucher_join(&toucher), first_word(200));
	WAIT_UNTIL(status_of(arrival).hold_count == 1);
	const struct gw_hold hold = status_of(arrival).holds[0];

	CHECK_EQ(hold.cause, GW_HOLD_AGENT_RESTART);
	/* From the last sign of life: no less than the absence. */
	CHECK(hold.held_ns >= returns_ns - dead_ns);
	CHECK(hold.held_ns <= hold.outage_ns);
	/* The next successor does not lose it, and a map of a release that told nothing is taken too. */
	gw_arrival_destroy(arrival);
	struct gw_arrival *next = run_slowly(&guest, peer->port, true);

	WAIT_UNTIL(status_of(next).hold_count == 2);
	CHECK_EQ(status_of(next).holds[0].held_ns, hold.held_ns);
	CHECK_EQ(status_of(next).holds[1].held_ns, 0);
	CHECK_EQ(status_of(next).held_total_ns, hold.held_ns);
	gw_arrival_destroy(next);
	const int fd = open(map_path, O_RDWR | O_CLOEXEC);
	static const uint8_t zeros[4096 - 320];

	CHECK(fd >= 0);
	CHECK_EQ(pwrite(fd, zeros, sizeof(zeros), 320), (ssize_t)sizeof(zeros));
	next = run_slowly(&guest, peer->port, true);
	toucher_start(&toucher, &guest, 100);
	CHECK_EQ(toucher_join(&toucher), first_word(100));
	gw_arrival_destroy(next);
	/* One of a later release is refused, and stays as it is. */
	const uint32_t version = 2;

	CHECK_EQ(pwrite(fd, &version, sizeof(version), 8), (ssize_t)sizeof(version));
	const struct gw_page_map_identity identity = {
		.epoch = 2,
		.page_count = PAGE_COUNT,
		.page_size = PAGE,
		.install_method = GW_INSTALL_COPY,
		.image_id = "vm",
	};
	struct gw_page_map *map = NULL;

	CHECK_EQ(gw_page_map_adopt(map_path, &identity, &map), -EPROTONOSUPPORT);
	CHECK_EQ(close(fd), 0);
	peer_stop(peer);
	guest_destroy(&guest);
	CHECK_EQ(gw_page_map_unlink(map_path), 0);
}

/* A real tmpfs that is too small, in a mount namespace of its own. */
static struct guest guest_on_small_tmpfs(const char *directory, size_t room_len, char *ret_ballast)
{
	char options[64];
	char path[96];
	void *address = NULL;
	struct guest guest = {.page_count = PAGE_COUNT};
	int fd;

	CHECK_EQ(unshare(CLONE_NEWNS), 0);
	CHECK_EQ(mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL), 0);
	CHECK(mkdir(directory, 0700) == 0 || errno == EEXIST);
	(void)snprintf(options, sizeof(options), "size=%zu,huge=never",
		       (size_t)PAGE_COUNT * PAGE + 64 * PAGE);
	CHECK_EQ(mount("tmpfs", directory, "tmpfs", 0, options), 0);
	/* Something else takes the room; its end gives it back. */
	(void)snprintf(ret_ballast, 96, "%s/ballast", directory);
	fd = open(ret_ballast, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	CHECK(fd >= 0);
	CHECK_EQ(posix_fallocate(fd, 0, (off_t)(PAGE_COUNT * PAGE + 64 * PAGE - room_len)), 0);
	CHECK_EQ(close(fd), 0);
	(void)snprintf(path, sizeof(path), "%s/ram", directory);
	guest.ram_fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	CHECK(guest.ram_fd >= 0);
	CHECK_EQ(ftruncate(guest.ram_fd, (off_t)(PAGE_COUNT * PAGE)), 0);
	CHECK_EQ(gw_sys_mmap(NULL, PAGE_COUNT * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED,
			     guest.ram_fd, 0, &address),
		 0);
	guest.memory = address;
	guest.uffd =
		gw_uffd_open(GW_UFFD_FEATURE_EVENT_REMOVE | GW_UFFD_FEATURE_MISSING_SHMEM, NULL);
	CHECK(guest.uffd >= 0);
	CHECK_EQ(gw_uffd_register(guest.uffd, (uintptr_t)address, PAGE_COUNT * PAGE,
				  UFFDIO_REGISTER_MODE_MISSING, NULL),
		 0);
	return guest;
}

/* No room for a page: said so, tried again, and it goes on by itself when there is room. */
static void no_memory_is_waited_out(void)
{
	char directory[64];
	char ballast[96];
	struct toucher toucher;

	if (geteuid() != 0) {
		check_need(false, "root", "run as root: it mounts a small tmpfs");
		return;
	}
	(void)snprintf(directory, sizeof(directory), "/tmp/gw-test-hold-%d", (int)getpid());
	struct guest guest = guest_on_small_tmpfs(directory, 8 * PAGE, ballast);
	struct peer *const peer = peer_start(source, PAGE_COUNT * PAGE, GENERATION, 0);
	struct gw_arrival *const arrival = arrival_of(&guest, peer->port, false);

	CHECK_EQ(gw_arrival_start(arrival), 0);
	WAIT_UNTIL(status_of(arrival).phase == GW_ARRIVAL_ARMED);
	CHECK_EQ(gw_arrival_open_gate(arrival, GENERATION), 0);
	CHECK_EQ(gw_arrival_start_bulk(arrival), 0);
	WAIT_UNTIL(status_of(arrival).phase == GW_ARRIVAL_NO_MEMORY);
	CHECK(strstr(status_of(arrival).reason, "no room") != NULL);
	toucher_start(&toucher, &guest, PAGE_COUNT - 1);
	WAIT_UNTIL(status_of(arrival).hold_now.held_ns > 0);
	CHECK_EQ(status_of(arrival).hold_now.cause, GW_HOLD_NO_MEMORY);
	/* Tried again, a page at a time: what is fetched for nothing stays little. */
	const uint64_t fetched = status_of(arrival).received_bytes;

	WAIT_UNTIL(status_of(arrival).hold_now.held_ns > UINT64_C(700000000));
	CHECK(!atomic_load(&toucher.done));
	CHECK(status_of(arrival).received_bytes > fetched);
	CHECK(status_of(arrival).received_bytes - fetched < 200 * PAGE);
	CHECK_EQ(status_of(arrival).violation_count, 0);
	CHECK_EQ(unlink(ballast), 0);
	CHECK_EQ(toucher_join(&toucher), first_word(PAGE_COUNT - 1));
	WAIT_UNTIL(status_of(arrival).phase == GW_ARRIVAL_COMPLETE);
	CHECK_EQ(status_of(arrival).hold_count, 1);
	CHECK_EQ(status_of(arrival).holds[0].cause, GW_HOLD_NO_MEMORY);
	CHECK(status_of(arrival).holds[0].held_ns > UINT64_C(700000000));
	for (uint64_t page = 0; page < PAGE_COUNT; page++)
		CHECK(guest_has_pattern(guest.memory, page));
	gw_arrival_destroy(arrival);
	peer_stop(peer);
	guest_destroy(&guest);
	CHECK_EQ(gw_page_map_unlink(map_path), 0);
	CHECK_EQ(umount2(directory, MNT_DETACH), 0);
	CHECK_EQ(rmdir(directory), 0);
}

int main(int argc, char **argv)
{
	guest_need_uffd();
	(void)snprintf(map_path, sizeof(map_path), "/dev/shm/gw-test-hold-%d", (int)getpid());
	guest_left_path = map_path;
	source = mmap(NULL, PAGE_COUNT * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
		      -1, 0);
	CHECK(source != MAP_FAILED);
	for (uint64_t page = 0; page < PAGE_COUNT; page++)
		guest_pattern(page, source + page * PAGE);
#define RUN_IF(function)                                    \
	do {                                                \
		if (argc < 2 || strstr(#function, argv[1])) \
			RUN_FORKED(function);               \
	} while (0)
	RUN_IF(a_hold_is_from_the_first_wait_to_its_page);
	RUN_IF(a_wait_from_before_counts_from_the_loss);
	RUN_IF(an_absence_of_the_engine_is_a_hold);
	RUN_IF(no_memory_is_waited_out);
	return EXIT_SUCCESS;
}
