/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_sweep_calls.c - what is made, asked and taken away in one thread: each system call of it fails
 * once with each errno that it can give. The errno comes out, nothing is left, and a second try does it.
 */
#include "guest.h"
#include "sweep.h"

#include <sys/mman.h>

#include <godwit/arrival.h>
#include <godwit/exits.h>
#include <godwit/install.h>
#include <godwit/page_map.h>
#include <godwit/serve.h>
#include <godwit/uffd.h>

#define PAGE_COUNT UINT64_C(64)
#define WRONG	   (-1000)

static char map_path[64];

static bool exists(const char *suffix)
{
	char name[128];

	(void)snprintf(name, sizeof(name), "%s%s", map_path, suffix);
	return access(name, F_OK) == 0;
}

/* By other calls than the ones that are failed. */
static void remove_map(void)
{
	static const char *const suffixes[] = {"", ".bitmap", ".new"};
	char name[128];

	for (size_t i = 0; i < sizeof(suffixes) / sizeof(suffixes[0]); i++) {
		(void)snprintf(name, sizeof(name), "%s%s", map_path, suffixes[i]);
		(void)unlink(name);
	}
}

/* --- page map --------------------------------------------------------------------------------- */

static const struct gw_page_map_identity identity = {
	.epoch = 2,
	.page_count = PAGE_COUNT,
	.page_size = PAGE,
	.install_method = GW_INSTALL_COPY,
	.image_id = "vm",
};

static int page_map_act(void *user)
{
	struct gw_page_map *map = NULL;
	int err = gw_page_map_create(map_path, &identity, &map);

	(void)user;
	if (err < 0)
		goto out;
	(void)gw_page_map_move(map, 3, GW_PAGE_ABSENT, GW_PAGE_REQUESTED_BULK);
	gw_page_map_destroy(map);
	map = NULL;
	err = gw_page_map_adopt(map_path, &identity, &map);
	/* Whatever failed, what was said is remembered. */
	if (!exists("") || (err == 0 && gw_page_map_get(map, 3) != GW_PAGE_REQUESTED_BULK))
		err = WRONG;
	gw_page_map_destroy(map);
	if (err == 0)
		err = gw_page_map_unlink(map_path);
out:
	/* No map, no files, but for the one whose unlink failed. */
	if (err == 0 && (exists("") || exists(".bitmap") || exists(".new")))
		err = WRONG;
	remove_map();
	return err;
}

static void page_map(void)
{
	sweep_all(SWEEP_PAGE_MAP, page_map_act, NULL, NULL);
}

/* --- userfaultfd ------------------------------------------------------------------------------ */

static int uffd_act(void *user)
{
	uint8_t *const memory = user;
	int err;
	const int uffd = gw_uffd_open(GW_UFFD_FEATURE_MISSING_SHMEM, NULL);

	if (uffd < 0)
		return uffd;
	err = gw_uffd_is_uffd(uffd);
	err = err < 0 ? err : err == 1 ? 0 : WRONG;
	if (err == 0)
		err = gw_uffd_register(uffd, (uintptr_t)memory, PAGE_COUNT * PAGE,
				       UFFDIO_REGISTER_MODE_MISSING, NULL);
	if (err == 0)
		err = gw_uffd_wake(uffd, (uintptr_t)memory, PAGE);
	if (err == 0)
		err = gw_uffd_unregister(uffd, (uintptr_t)memory, PAGE_COUNT * PAGE);
	(void)gw_sys_close(uffd);
	return err;
}

static void userfaultfd(void)
{
	struct guest guest = guest_create(PAGE_COUNT, 0, 0);

	sweep_all(SWEEP_UFFD, uffd_act, guest.memory, NULL);
	guest_destroy(&guest);
}

static int probe_act(void *user)
{
	uint64_t features = 0;
	const int err = gw_uffd_probe(&features);

	(void)user;
	/* What could not be tried counts as not there; what is not there is never said to be. */
	if (err == 0 && (features & ~*(const uint64_t *)user) != 0)
		return WRONG;
	return err;
}

static void probe(void)
{
	uint64_t features = 0;

	CHECK_EQ(gw_uffd_probe(&features), 0);
	sweep_all(SWEEP_PROBE, probe_act, &features, NULL);
}

/* --- arrival ---------------------------------------------------------------------------------- */

static int create_arrival(const struct guest *guest, uint32_t method, bool adopt,
			  struct gw_arrival **ret_arrival)
{
	const struct gw_arrival_region region = {.host_addr = guest_address(guest, 0),
						 .len = PAGE_COUNT * PAGE};
	const struct gw_arrival_config config = {
		.struct_size = sizeof(config),
		.page_size = PAGE,
		.epoch = 2,
		.page_map_path = map_path,
		.session_id = "session",
		.image_id = "vm",
		.page_host = "127.0.0.1",
		.traceparent = "",
		.page_port = 1,
		.uffds = &guest->uffd,
		.uffd_count = 1,
		.exit_channel_fd = -1,
		.exit_doorbell_fd = -1,
		.ram_fd = guest->ram_fd,
		.install_method = method,
		.bulk_connection_count = 2,
		.adopt = adopt,
		.regions = &region,
		.region_count = 1,
	};

	return gw_arrival_create(&config, ret_arrival);
}

static int arrival_create_act(void *user)
{
	struct gw_arrival *arrival = NULL;
	const int err = create_arrival(user, GW_INSTALL_COPY, false, &arrival);
	/* Files of one that was not made would be memory that nobody counts. */
	const bool left = exists("") || exists(".bitmap") || exists(".new");

	gw_arrival_destroy(arrival);
	remove_map();
	return err < 0 && (arrival || left) ? WRONG : err;
}

/* An unlink that fails is asked for by an earlier failure only. */
static void arrival_create(void)
{
	struct guest guest = guest_create(PAGE_COUNT, GW_UFFD_FEATURE_MISSING_SHMEM,
					  UFFDIO_REGISTER_MODE_MISSING);

	sweep_all(SWEEP_ARRIVAL_CREATE, arrival_create_act, &guest, NULL);
	guest_destroy(&guest);
}

struct adoption {
	struct guest guest;
	uint8_t states[PAGE_COUNT]; /* as a dead engine has left them */
	uint8_t wanted[PAGE_COUNT]; /* as they are to be read */
};

/* What an engine leaves that died in the middle: by CONTINUE, which has the most states. */
static void leave_map(struct adoption *adoption)
{
	static const struct {
		uint8_t state;
		bool data;
		uint8_t wanted;
	} rows[] = {
		{GW_PAGE_ABSENT, false, GW_PAGE_ABSENT},
		{GW_PAGE_REQUESTED_DEMAND, false, GW_PAGE_ABSENT},
		{GW_PAGE_INSTALLING, false, GW_PAGE_ABSENT},
		{GW_PAGE_INSTALLING, true, GW_PAGE_ABSENT},
		{GW_PAGE_FILLED, true, GW_PAGE_PRESENT},
		{GW_PAGE_PRESENT, true, GW_PAGE_PRESENT},
		{GW_PAGE_REQUESTED_BULK, false, GW_PAGE_ABSENT},
		{GW_PAGE_ZERO, false, GW_PAGE_ZERO},
	};
	const size_t row_count = sizeof(rows) / sizeof(rows[0]);
	struct gw_page_map_identity mine = identity;
	struct gw_page_map *map = NULL;
	uint8_t bytes[PAGE];

	mine.install_method = GW_INSTALL_CONTINUE;
	remove_map();
	CHECK_EQ(gw_page_map_create(map_path, &mine, &map), 0);
	for (uint64_t page = 0; page < PAGE_COUNT; page++) {
		const size_t row = page % row_count;
		/* The legal ways to each state. */
		static const uint8_t ways[GW_PAGE_STATE_COUNT][4] = {
			[GW_PAGE_REQUESTED_BULK] = {GW_PAGE_REQUESTED_BULK},
			[GW_PAGE_REQUESTED_DEMAND] = {GW_PAGE_REQUESTED_DEMAND},
			[GW_PAGE_INSTALLING] = {GW_PAGE_REQUESTED_BULK, GW_PAGE_INSTALLING},
			[GW_PAGE_FILLED] = {GW_PAGE_REQUESTED_BULK, GW_PAGE_INSTALLING,
					    GW_PAGE_FILLED},
			[GW_PAGE_PRESENT] = {GW_PAGE_REQUESTED_BULK, GW_PAGE_INSTALLING,
					     GW_PAGE_PRESENT},
			[GW_PAGE_ZERO] = {GW_PAGE_REQUESTED_BULK, GW_PAGE_ZERO},
		};
		uint8_t at = GW_PAGE_ABSENT;

		for (size_t i = 0; i < 4 && ways[rows[row].state][i]; i++) {
			CHECK(gw_page_map_move(map, page, at, ways[rows[row].state][i]));
			at = ways[rows[row].state][i];
		}
		guest_pattern(page, bytes);
		if (rows[row].data)
			CHECK_EQ(pwrite(adoption->guest.ram_fd, bytes, PAGE, (off_t)(page * PAGE)),
				 PAGE);
		else
			CHECK_EQ(fallocate(adoption->guest.ram_fd,
					   FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
					   (off_t)(page * PAGE), (off_t)PAGE),
				 0);
		adoption->wanted[page] = rows[row].wanted;
	}
	gw_page_map_destroy(map);
}

/* Not by the calls that are failed. */
static bool has_data(const struct guest *guest, uint64_t page)
{
	return lseek(guest->ram_fd, (off_t)(page * PAGE), SEEK_DATA) == (off_t)(page * PAGE);
}

static bool adopted_right(const struct adoption *adoption, const struct gw_arrival *arrival)
{
	uint8_t bitmap[PAGE_COUNT / 8];

	CHECK_EQ(gw_arrival_bitmap(arrival, bitmap, sizeof(bitmap)), sizeof(bitmap));
	for (uint64_t page = 0; page < PAGE_COUNT; page++) {
		const bool absent = adoption->wanted[page] == GW_PAGE_ABSENT;

		if (gw_arrival_page_state(arrival, page * PAGE) != adoption->wanted[page] ||
		    (bitmap[page / 8] >> page % 8 & 1) != absent ||
		    has_data(&adoption->guest, page) !=
			    (adoption->wanted[page] == GW_PAGE_PRESENT)) {
			fprintf(stderr, "page %lu is %d, not %u\n", page,
				gw_arrival_page_state(arrival, page * PAGE),
				adoption->wanted[page]);
			return false;
		}
	}
	return true;
}

/* A first attempt, in which something may fail; and then, on what that left, another. */
static int arrival_adopt_act(void *user)
{
	struct adoption *const adoption = user;
	struct gw_arrival *arrival = NULL;

	const int err = create_arrival(&adoption->guest, GW_INSTALL_CONTINUE, true, &arrival);

	if (err < 0) {
		if (arrival || !exists("") || !exists(".bitmap"))
			return WRONG;
		/* Once armed, once failed: this one goes through, and finds nothing spoilt. */
		if (create_arrival(&adoption->guest, GW_INSTALL_CONTINUE, true, &arrival) != 0)
			return WRONG;
	}
	const bool right = adopted_right(adoption, arrival);

	gw_arrival_destroy(arrival);
	return right ? err : WRONG;
}

static int adopt_and_leave(void *user)
{
	const int result = arrival_adopt_act(user);

	/* For the next one; its calls are not those of this scenario. */
	leave_map(user);
	return result;
}

/* Only what the adoption itself calls is counted: the rest is the test's. */
static void arrival_adopt(void)
{
	struct adoption adoption = {0};
	struct sweep sweep;

	adoption.guest = guest_create(PAGE_COUNT,
				      GW_UFFD_FEATURE_MISSING_SHMEM | GW_UFFD_FEATURE_MINOR_SHMEM,
				      UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR);
	leave_map(&adoption);
	sweep_count_begin(&sweep, SWEEP_ARRIVAL_ADOPT);
	CHECK_EQ(arrival_adopt_act(&adoption), 0);
	sweep_count_end(&sweep);
	sweep_check_declared(&sweep, NULL);
	leave_map(&adoption);
	const int fd_count = sweep_fd_count();

	for (const enum gw_sys_call *call = sweep.scenario->calls; *call; call++) {
		for (size_t e = 0; sweep_errors[*call][e]; e++) {
			const int err = sweep_errors[*call][e];

			for (uint64_t nth = 1; nth <= sweep.call_counts[*call]; nth++) {
				sweep_say(*call, nth, err);
				sweep_arm(*call, nth, err);
				const int result = arrival_adopt_act(&adoption);
				const bool failed = gw_sys_failed();

				gw_sys_fail_none();
				leave_map(&adoption);
				const bool truthful = result == 0 || result == -err ||
						      (err == ENOSPC && result == -ENOMEM) ||
						      (err == ENOENT && result == -ENXIO);

				if (!truthful)
					fprintf(stderr, "%s %lu %s gives %d\n", gw_sys_name(*call),
						nth, sweep_error_name(err), result);
				CHECK(truthful);
				sweep.failed_counts[*call][e] += failed;
				sweep.failed_count += failed;
				CHECK_EQ(sweep_fd_count(), fd_count);
			}
		}
	}
	sweep_check_whole(&sweep);
	CHECK_EQ(adopt_and_leave(&adoption), 0);
	remove_map();
	guest_destroy(&adoption.guest);
}

/* --- page server ------------------------------------------------------------------------------ */

static int serve_act(void *user)
{
	const int ram_fd = *(const int *)user;
	const struct gw_serve_config config = {.struct_size = sizeof(config),
					       .listen_host = "127.0.0.1",
					       .connection_count_max = 4};
	const struct gw_serve_region region = {.size = PAGE_COUNT * PAGE, .page_size = PAGE};
	struct gw_serve_image image = {
		.struct_size = sizeof(image),
		.ram_fd = ram_fd,
		.image_id = "vm",
		.vm_id = "vm",
		.boot_id = "boot",
		.epoch = 1,
		.generation = 1,
		.state = GW_IMAGE_LIVE,
		.region_count = 1,
		.regions = &region,
	};
	struct gw_serve *serve = NULL;
	int err = gw_serve_create(&config, &serve);

	if (err < 0)
		return serve ? WRONG : err;
	err = gw_serve_put_image(serve, &image);
	if (err == 0) {
		image.generation = 2;
		image.state = GW_IMAGE_FROZEN;
		err = gw_serve_put_image(serve, &image);
		/* A reload that failed leaves the record that was in force. */
		if (gw_serve_image_stream_count(serve, "vm") != 0)
			err = WRONG;
	}
	if (err == 0)
		err = gw_serve_remove_image(serve, "vm");
	gw_serve_destroy(serve);
	return err;
}

static void page_server(void)
{
	int ram_fd = gw_sys_memfd_create("ram", MFD_CLOEXEC);

	CHECK(ram_fd >= 0);
	CHECK_EQ(gw_sys_ftruncate(ram_fd, (off_t)(PAGE_COUNT * PAGE)), 0);
	sweep_all(SWEEP_SERVE_CREATE, serve_act, &ram_fd, NULL);
	CHECK_EQ(gw_sys_close(ram_fd), 0);
}

/* --- exit channel ----------------------------------------------------------------------------- */

struct exit_fixture {
	int fd;
	struct gw_bitmap own;
	uint64_t words[1];
};

static int exits_act(void *user)
{
	const struct exit_fixture *const fixture = user;
	struct gw_exits *exits = NULL;
	const int err = gw_exits_attach(fixture->fd, PAGE, &fixture->own, &exits);

	if (err < 0)
		return exits ? WRONG : err;
	gw_exits_detach(exits);
	return 0;
}

static void exits(void)
{
	const struct gw_exit_header header = {
		.magic = GW_EXIT_MAGIC,
		.version = GW_EXIT_VERSION,
		.header_len = GW_EXIT_HEADER_LEN,
		.total_len = GW_EXIT_HEADER_LEN + 2 * PAGE,
		.page_size = PAGE,
		.vcpu_count = 2,
		.page_count = PAGE_COUNT,
		.bitmap_offset = GW_EXIT_HEADER_LEN,
		.vcpus_offset = GW_EXIT_HEADER_LEN + PAGE,
	};
	struct exit_fixture fixture = {0};

	gw_bitmap_init(&fixture.own, fixture.words, PAGE_COUNT);
	gw_bitmap_mark_absent(&fixture.own, 0, PAGE_COUNT);
	fixture.fd = memfd_create("channel", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	CHECK(fixture.fd >= 0);
	CHECK_EQ(ftruncate(fixture.fd, (off_t)header.total_len), 0);
	CHECK_EQ(pwrite(fixture.fd, &header, sizeof(header), 0), sizeof(header));
	CHECK_EQ(fcntl(fixture.fd, F_ADD_SEALS, F_SEAL_SHRINK), 0);
	sweep_all(SWEEP_EXITS, exits_act, &fixture, NULL);
	CHECK_EQ(close(fixture.fd), 0);
}

int main(int argc, char **argv)
{
	uint64_t features = 0;

	(void)snprintf(map_path, sizeof(map_path), "/dev/shm/gw-test-sweep-%d", (int)getpid());
#define RUN_IF(function)                                    \
	do {                                                \
		if (argc < 2 || strstr(#function, argv[1])) \
			RUN(function);                      \
	} while (0)
	RUN_IF(page_map);
	RUN_IF(page_server);
	RUN_IF(exits);
	guest_need_uffd();
	CHECK_EQ(gw_uffd_probe(&features), 0);
	check_need(features & GW_UFFD_FEATURE_MINOR_SHMEM, "minor-shmem",
		   "a kernel of 5.14 or later");
	RUN_IF(userfaultfd);
	RUN_IF(probe);
	RUN_IF(arrival_create);
	RUN_IF(arrival_adopt);
	return EXIT_SUCCESS;
}
