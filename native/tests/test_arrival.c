/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_arrival.c - the engine on real faulting memory, against a page server that obeys and one that
 * does not: whatever happens, a page is the source's or it is absent.
 */
#include "guest.h"
#include "peer.h"

#include <dirent.h>
#include <sched.h>
#include <time.h>

#include <godwit/arrival.h>
#include <godwit/page_map.h>
#include <godwit/sandbox.h>

#define PAGE_COUNT ((uint64_t)2048)
#define GENERATION ((uint64_t)5)

static uint32_t method = GW_INSTALL_COPY;
static uint32_t bulk_count = 2;
static uint8_t *source; /* the source's memory; each eighth page is zero */
static char map_path[64];

struct bench {
	struct guest guest;
	struct peer *peer;
	struct gw_arrival *arrival;
};

static bool is_zero_page(uint64_t page)
{
	return page % 8 == 3 || (page >= 1024 && page < 1200);
}

static void fill_source(void)
{
	source = mmap(NULL, PAGE_COUNT * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
		      -1, 0);
	CHECK(source != MAP_FAILED);
	for (uint64_t page = 0; page < PAGE_COUNT; page++)
		if (!is_zero_page(page))
			guest_pattern(page, source + page * PAGE);
}

static struct gw_arrival_config config_of(const struct guest *guest, uint32_t port,
					  const struct gw_arrival_region *region, bool adopt)
{
	return (struct gw_arrival_config){
		.struct_size = sizeof(struct gw_arrival_config),
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
		.install_method = method,
		.bulk_connection_count = bulk_count,
		.adopt = adopt,
		.regions = region,
		.region_count = 1,
	};
}

static struct gw_arrival_region region_of(const struct guest *guest)
{
	return (struct gw_arrival_region){
		.host_addr = guest_address(guest, 0),
		.len = PAGE_COUNT * PAGE,
	};
}

static struct gw_arrival *arrival_of(const struct guest *guest, uint32_t port, bool adopt)
{
	const struct gw_arrival_region region = region_of(guest);
	const struct gw_arrival_config config = config_of(guest, port, &region, adopt);
	struct gw_arrival *arrival = NULL;

	CHECK_EQ(gw_arrival_create(&config, &arrival), 0);
	return arrival;
}

static struct guest guest_of_method(void)
{
	return guest_create(PAGE_COUNT,
			    GW_UFFD_FEATURE_EVENT_REMOVE | GW_UFFD_FEATURE_MISSING_SHMEM |
				    (method == GW_INSTALL_CONTINUE ? GW_UFFD_FEATURE_MINOR_SHMEM
								   : 0),
			    method == GW_INSTALL_CONTINUE
				    ? UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR
				    : UFFDIO_REGISTER_MODE_MISSING);
}

/* Started, the gate closed. */
static struct bench bench_closed(void)
{
	struct bench bench = {.guest = guest_of_method()};

	bench.peer = peer_start(source, PAGE_COUNT * PAGE, GENERATION, 0);
	bench.arrival = arrival_of(&bench.guest, bench.peer->port, false);
	CHECK_EQ(gw_arrival_start(bench.arrival), 0);
	return bench;
}

static struct bench bench_open(void)
{
	struct bench bench = bench_closed();

	CHECK_EQ(gw_arrival_open_gate(bench.arrival, GENERATION), 0);
	return bench;
}

static void bench_close(struct bench *bench)
{
	gw_arrival_destroy(bench->arrival);
	(void)gw_page_map_unlink(map_path);
	if (bench->peer)
		peer_stop(bench->peer);
	guest_destroy(&bench->guest);
}

static struct gw_arrival_status status_of(const struct gw_arrival *arrival)
{
	struct gw_arrival_status status;

	CHECK_EQ(gw_arrival_status(arrival, &status), 0);
	return status;
}

static void nap(void)
{
	(void)nanosleep(&(struct timespec){.tv_nsec = 500000}, NULL);
}

/* Wait until `condition` holds; say where it stands if it never does. */
#define WAIT_UNTIL(arrival_, condition)                                                         \
	do {                                                                                    \
		const uint64_t deadline_ns_ = gw_sys_now_ns() + UINT64_C(1000000) * TIMEOUT_MS; \
		while (!(condition)) {                                                          \
			if (gw_sys_now_ns() > deadline_ns_) {                                   \
				print_status(arrival_);                                         \
				CHECK(!"time-out: " #condition);                                \
			}                                                                       \
			nap();                                                                  \
		}                                                                               \
	} while (0)

static void print_status(const struct gw_arrival *arrival)
{
	const struct gw_arrival_status status = status_of(arrival);

	fprintf(stderr,
		"phase %u absent %lu demand %lu bulk %lu zero %lu held %lu faults %lu crc %lu "
		"reconnect %lu violation %lu grpc %d: %s\n",
		status.phase, status.absent_count, status.demand_page_count, status.bulk_page_count,
		status.zero_page_count, status.held_fault_count, status.fault_count,
		status.checksum_error_count, status.reconnect_count, status.violation_count,
		status.grpc_status, status.reason);
}

static void wait_phase(const struct gw_arrival *arrival, uint32_t phase)
{
	WAIT_UNTIL(arrival, status_of(arrival).phase == phase);
}

static bool page_is_right(const struct guest *guest, uint64_t page)
{
	return memcmp(guest->memory + page * PAGE, source + page * PAGE, PAGE) == 0;
}

static void check_whole(const struct bench *bench)
{
	const struct gw_arrival_status status = status_of(bench->arrival);

	CHECK_EQ(status.phase, GW_ARRIVAL_COMPLETE);
	CHECK_EQ(status.absent_count, 0);
	CHECK_EQ(status.bulk_done, 1);
	CHECK_EQ(status.violation_count, 0);
	CHECK_EQ(status.demand_page_count + status.bulk_page_count + status.zero_page_count +
			 status.removed_page_count,
		 PAGE_COUNT);
	for (uint64_t page = 0; page < PAGE_COUNT; page++)
		CHECK(page_is_right(&bench->guest, page));
}

/* A vCPU: touches every page in an order of its own, checks it, and sometimes writes to it. */
struct vcpu {
	pthread_t thread;
	const struct guest *guest;
	uint64_t seed;
	_Atomic uint64_t checked_count;
};

static void *vcpu_main(void *argument)
{
	struct vcpu *const vcpu = argument;
	uint64_t page = vcpu->seed % PAGE_COUNT;

	for (uint64_t i = 0; i < PAGE_COUNT; i++) {
		CHECK(page_is_right(vcpu->guest, page));
		atomic_fetch_add(&vcpu->checked_count, 1);
		page = (page * 5 + 1 + vcpu->seed * 2) % PAGE_COUNT; /* a full cycle of 2048 */
	}
	return NULL;
}

static void faults_and_bulk_make_the_guest_whole(void)
{
	struct bench bench = bench_open();
	struct vcpu vcpus[3];
	uint8_t bitmap[PAGE_COUNT / 8];

	CHECK_EQ(gw_arrival_bitmap(bench.arrival, bitmap, sizeof(bitmap) - 1), -ENOSPC);
	CHECK_EQ(gw_arrival_bitmap(bench.arrival, bitmap, sizeof(bitmap)), sizeof(bitmap));
	CHECK_EQ(bitmap[0], 0xff);
	CHECK_EQ(gw_arrival_finish(bench.arrival), -EBUSY);
	for (uint64_t i = 0; i < 3; i++) {
		vcpus[i] = (struct vcpu){.guest = &bench.guest, .seed = i * 7 + 1};
		CHECK_EQ(pthread_create(&vcpus[i].thread, NULL, vcpu_main, &vcpus[i]), 0);
	}
	WAIT_UNTIL(bench.arrival, status_of(bench.arrival).demand_page_count > 20);
	CHECK_EQ(gw_arrival_start_bulk(bench.arrival), 0);
	for (int i = 0; i < 3; i++)
		CHECK_EQ(pthread_join(vcpus[i].thread, NULL), 0);
	wait_phase(bench.arrival, GW_ARRIVAL_COMPLETE);
	check_whole(&bench);
	const struct gw_arrival_status status = status_of(bench.arrival);

	CHECK(status.demand_page_count > 20);
	CHECK(status.bulk_page_count > 0);
	CHECK(status.fault_latency.sample_count >= status.demand_page_count);
	CHECK_EQ(status.held_fault_count, 0);
	CHECK_EQ(gw_arrival_bitmap(bench.arrival, bitmap, sizeof(bitmap)), sizeof(bitmap));
	for (size_t i = 0; i < sizeof(bitmap); i++)
		CHECK_EQ(bitmap[i], 0);
	CHECK_EQ(gw_arrival_page_state(bench.arrival, PAGE_COUNT * PAGE), -ENOENT);
	fprintf(stderr, "    demand %lu bulk %lu zero %lu, fault p50 %lu us p99 %lu us\n",
		status.demand_page_count, status.bulk_page_count, status.zero_page_count,
		status.fault_latency.p50_ns / 1000, status.fault_latency.p99_ns / 1000);
	/* Nobody is needed any more. */
	CHECK_EQ(gw_arrival_finish(bench.arrival), 0);
	bench_close(&bench);
}

static void bulk_alone_leaves_zeros_as_holes(void)
{
	struct bench bench = bench_open();
	uint64_t zero_count = 0;

	CHECK_EQ(gw_arrival_start_bulk(bench.arrival), 0);
	wait_phase(bench.arrival, GW_ARRIVAL_COMPLETE);
	/* Runs that are zero throughout come without bytes; single pages inside a run with them. */
	for (uint64_t page = 0; page < PAGE_COUNT; page++) {
		const int state = gw_arrival_page_state(bench.arrival, page * PAGE);

		CHECK(state == GW_PAGE_PRESENT || state == GW_PAGE_ZERO);
		CHECK_EQ(guest_cache_has(&bench.guest, page), state == GW_PAGE_PRESENT);
		zero_count += state == GW_PAGE_ZERO;
	}
	CHECK_EQ(status_of(bench.arrival).zero_page_count, zero_count);
	check_whole(&bench);
	bench_close(&bench);
}

/* Before the gate: everything is up, a fault is held, nothing is asked for. */
static void a_closed_gate_holds_faults(void)
{
	struct bench bench = bench_closed();
	struct toucher touchers[3];
	uint64_t rings = 0;

	wait_phase(bench.arrival, GW_ARRIVAL_ARMED);
	CHECK_EQ(gw_arrival_start_bulk(bench.arrival), -EAGAIN);
	CHECK_EQ(gw_arrival_generation(bench.arrival), 0);
	toucher_start(&touchers[0], &bench.guest, 77);
	toucher_start(&touchers[1], &bench.guest, 77);
	toucher_start(&touchers[2], &bench.guest, 500);
	WAIT_UNTIL(bench.arrival, status_of(bench.arrival).fault_count == 3);
	/* A fault is counted a moment before it is held. */
	WAIT_UNTIL(bench.arrival, status_of(bench.arrival).held_fault_count == 2);
	CHECK_EQ(atomic_load(&bench.peer->want_counts[GW_PAGE_LANE_DEMAND]), 0);
	CHECK_EQ(read(gw_arrival_wait_fd(bench.arrival), &rings, sizeof(rings)), sizeof(rings));
	CHECK_EQ(gw_arrival_open_gate(bench.arrival, 0), -EINVAL);
	CHECK_EQ(gw_arrival_open_gate(bench.arrival, GENERATION), 0);
	CHECK_EQ(gw_arrival_open_gate(bench.arrival, GENERATION), 0);
	CHECK_EQ(gw_arrival_open_gate(bench.arrival, GENERATION + 1), -EALREADY);
	CHECK_EQ(toucher_join(&touchers[0]), first_word(77));
	CHECK_EQ(toucher_join(&touchers[1]), first_word(77));
	CHECK_EQ(toucher_join(&touchers[2]), first_word(500));
	/* A second waiter is never a second request. */
	CHECK_EQ(atomic_load(&bench.peer->want_counts[GW_PAGE_LANE_DEMAND]), 2);
	wait_phase(bench.arrival, GW_ARRIVAL_FETCHING);
	bench_close(&bench);
}

/* Bulk has asked for everything and gets no answer: faults are answered all the same. */
static void a_stalled_bulk_never_delays_demand(void)
{
	struct bench bench = bench_open();
	struct vcpu vcpu = {.guest = &bench.guest, .seed = 3};

	peer_hold(bench.peer, 1 << GW_PAGE_LANE_BULK);
	CHECK_EQ(gw_arrival_start_bulk(bench.arrival), 0);
	/* One a lane: the window opens with answers. */
	WAIT_UNTIL(bench.arrival,
		   atomic_load(&bench.peer->want_counts[GW_PAGE_LANE_BULK]) >= bulk_count);
	CHECK_EQ(pthread_create(&vcpu.thread, NULL, vcpu_main, &vcpu), 0);
	CHECK_EQ(pthread_join(vcpu.thread, NULL), 0);
	wait_phase(bench.arrival, GW_ARRIVAL_COMPLETE);
	check_whole(&bench);
	CHECK_EQ(status_of(bench.arrival).bulk_page_count, 0);
	bench_close(&bench);
}

/* Both lanes ask for a page; demand wins, the guest writes to it; then the bulk answer comes. */
static void a_late_bulk_answer_does_not_undo_the_guests_stores(void)
{
	struct bench bench = bench_open();
	const uint64_t page = 20; /* in the first step of a lane */

	peer_hold(bench.peer, 1 << GW_PAGE_LANE_BULK);
	CHECK_EQ(gw_arrival_start_bulk(bench.arrival), 0);
	WAIT_UNTIL(bench.arrival,
		   gw_arrival_page_state(bench.arrival, page * PAGE) == GW_PAGE_REQUESTED_BULK);
	CHECK(page_is_right(&bench.guest, page)); /* faults */
	bench.guest.memory[page * PAGE] ^= 0xff;
	peer_hold(bench.peer, 0);
	wait_phase(bench.arrival, GW_ARRIVAL_COMPLETE);
	CHECK(!page_is_right(&bench.guest, page));
	bench.guest.memory[page * PAGE] ^= 0xff;
	check_whole(&bench);
	bench_close(&bench);
}

/* Bulk has asked, and its want is not even sent, when somebody touches the page: demand answers. */
static void a_fault_on_what_bulk_has_just_asked_for(void)
{
	struct bench bench = bench_open();
	struct toucher toucher;
	uint64_t page = 0;

	gw_hook_hold("bulk.asked");
	CHECK_EQ(gw_arrival_start_bulk(bench.arrival), 0);
	CHECK(gw_hook_wait("bulk.asked", 1, TIMEOUT_MS));
	while (is_zero_page(page) ||
	       gw_arrival_page_state(bench.arrival, page * PAGE) != GW_PAGE_REQUESTED_BULK)
		CHECK(++page < PAGE_COUNT);
	toucher_start(&toucher, &bench.guest, page);
	CHECK_EQ(toucher_join(&toucher), first_word(page));
	bench.guest.memory[page * PAGE] ^= 0xff;
	gw_hook_release("bulk.asked");
	wait_phase(bench.arrival, GW_ARRIVAL_COMPLETE);
	/* The answer to bulk's want came too, and was dropped. */
	CHECK(!page_is_right(&bench.guest, page));
	bench.guest.memory[page * PAGE] ^= 0xff;
	check_whole(&bench);
	bench_close(&bench);
}

/* I10, I11: the first answers are wrong, each in one way; afterwards the server is honest. */
static void a_lie_is_never_installed(enum peer_lie lie)
{
	struct bench bench = bench_closed();
	struct toucher toucher;
	const uint64_t page = 200;

	atomic_store(&bench.peer->lie_left, 1000000);
	atomic_store(&bench.peer->lie, (int)lie);
	CHECK_EQ(gw_arrival_open_gate(bench.arrival, GENERATION), 0);
	toucher_start(&toucher, &bench.guest, page);
	/* Lied to at least twice: it goes down and asks again by itself. */
	WAIT_UNTIL(bench.arrival, atomic_load(&bench.peer->lie_left) < 1000000 - 2);
	CHECK(!atomic_load(&toucher.done) || lie == PEER_ANSWER_TWICE);
	if (lie != PEER_ANSWER_TWICE)
		CHECK(!guest_cache_has(&bench.guest, page));
	CHECK_EQ(status_of(bench.arrival).violation_count, 0);
	if (lie == PEER_BAD_CRC)
		CHECK(status_of(bench.arrival).checksum_error_count > 0);
	atomic_store(&bench.peer->lie, PEER_HONEST);
	CHECK_EQ(toucher_join(&toucher), first_word(page));
	atomic_store(&bench.peer->lie_left, 3);
	atomic_store(&bench.peer->lie, (int)lie);
	CHECK_EQ(gw_arrival_start_bulk(bench.arrival), 0);
	wait_phase(bench.arrival, GW_ARRIVAL_COMPLETE);
	check_whole(&bench);
	CHECK(status_of(bench.arrival).reconnect_count > 0);
	bench_close(&bench);
}

/* Answered twice: the first is right and installed; the second is nobody's, and goes down. */
static void an_answer_that_nobody_waits_for_is_dropped(void)
{
	struct bench bench = bench_closed();
	struct toucher toucher;

	atomic_store(&bench.peer->lie_left, 1);
	atomic_store(&bench.peer->lie, PEER_ANSWER_TWICE);
	CHECK_EQ(gw_arrival_open_gate(bench.arrival, GENERATION), 0);
	toucher_start(&toucher, &bench.guest, 9);
	CHECK_EQ(toucher_join(&toucher), first_word(9));
	WAIT_UNTIL(bench.arrival, status_of(bench.arrival).reconnect_count == 1);
	CHECK_EQ(gw_arrival_start_bulk(bench.arrival), 0);
	wait_phase(bench.arrival, GW_ARRIVAL_COMPLETE);
	check_whole(&bench);
	bench_close(&bench);
}

static void no_lie_is_ever_installed(void)
{
	for (enum peer_lie lie = PEER_BAD_CRC; lie < PEER_LIE_COUNT; lie++) {
		if (lie == PEER_ANSWER_TWICE)
			continue;
		fprintf(stderr, "    lie %d\n", (int)lie);
		a_lie_is_never_installed(lie);
	}
}

/* Bulk takes packed pages, demand never; one whose plain bytes have another checksum is fetched again. */
static void packed_pages_make_the_guest_whole(void)
{
	struct bench bench = bench_closed();
	struct toucher toucher;

	atomic_store(&bench.peer->packs, true);
	CHECK_EQ(gw_arrival_open_gate(bench.arrival, GENERATION), 0);
	toucher_start(&toucher, &bench.guest, 9);
	CHECK_EQ(toucher_join(&toucher), first_word(9));
	CHECK_EQ(atomic_load(&bench.peer->packed_count), 0);
	atomic_store(&bench.peer->lie_left, 3);
	atomic_store(&bench.peer->lie, PEER_BAD_CRC);
	CHECK_EQ(gw_arrival_start_bulk(bench.arrival), 0);
	wait_phase(bench.arrival, GW_ARRIVAL_COMPLETE);
	check_whole(&bench);
	CHECK(atomic_load(&bench.peer->packed_count) > 0);
	CHECK(status_of(bench.arrival).checksum_error_count > 0);
	bench_close(&bench);
}

/* The server dies with faults outstanding and comes back on its port. */
static void a_server_that_dies_and_returns(void)
{
	struct bench bench = bench_open();
	const uint32_t port = bench.peer->port;
	struct toucher touchers[2];

	toucher_start(&touchers[0], &bench.guest, 1);
	CHECK_EQ(toucher_join(&touchers[0]), first_word(1));
	/* Before it dies it has wants of both lanes that it has not answered. */
	peer_hold(bench.peer, 1 << GW_PAGE_LANE_BULK | 1 << GW_PAGE_LANE_DEMAND);
	CHECK_EQ(gw_arrival_start_bulk(bench.arrival), 0);
	toucher_start(&touchers[0], &bench.guest, 1900);
	WAIT_UNTIL(bench.arrival,
		   atomic_load(&bench.peer->want_counts[GW_PAGE_LANE_DEMAND]) == 2 &&
			   atomic_load(&bench.peer->want_counts[GW_PAGE_LANE_BULK]) > 0);
	peer_stop(bench.peer);
	wait_phase(bench.arrival, GW_ARRIVAL_LINK_LOST);
	toucher_start(&touchers[1], &bench.guest, 1904);
	WAIT_UNTIL(bench.arrival, status_of(bench.arrival).held_fault_count == 2);
	CHECK(status_of(bench.arrival).link_lost_ns > 0);
	bench.peer = peer_start(source, PAGE_COUNT * PAGE, GENERATION, port);
	CHECK_EQ(toucher_join(&touchers[0]), first_word(1900));
	CHECK_EQ(toucher_join(&touchers[1]), first_word(1904));
	wait_phase(bench.arrival, GW_ARRIVAL_COMPLETE);
	check_whole(&bench);
	CHECK(status_of(bench.arrival).reconnect_count >= 1);
	CHECK_EQ(status_of(bench.arrival).link_lost_ns, 0);
	bench_close(&bench);
}

static void another_server_is_named(void)
{
	struct bench bench = bench_open();
	struct toucher toucher;
	struct peer *const other = peer_start(source, PAGE_COUNT * PAGE, GENERATION, 0);

	peer_hold(bench.peer, 1 << GW_PAGE_LANE_DEMAND);
	toucher_start(&toucher, &bench.guest, 33);
	WAIT_UNTIL(bench.arrival, atomic_load(&bench.peer->want_counts[GW_PAGE_LANE_DEMAND]) == 1);
	CHECK_EQ(gw_arrival_set_page_server(bench.arrival, "", 1), -EINVAL);
	CHECK_EQ(gw_arrival_set_page_server(bench.arrival, "127.0.0.1", 0), -EINVAL);
	CHECK_EQ(gw_arrival_set_page_server(bench.arrival, "127.0.0.1", other->port), 0);
	CHECK_EQ(toucher_join(&toucher), first_word(33));
	CHECK_EQ(gw_arrival_start_bulk(bench.arrival), 0);
	wait_phase(bench.arrival, GW_ARRIVAL_COMPLETE);
	check_whole(&bench);
	CHECK_EQ(atomic_load(&bench.peer->want_counts[GW_PAGE_LANE_BULK]), 0);
	peer_stop(other);
	bench_close(&bench);
}

/* Statuses of the stream: which are waited out and which are final until somebody says where. */
static void refusals_of_the_server(void)
{
	static const struct {
		int status;
		uint32_t phase;
		bool final;
	} rows[] = {
		{GW_GRPC_UNAVAILABLE, GW_ARRIVAL_LINK_LOST, false},
		{GW_GRPC_INTERNAL, GW_ARRIVAL_LINK_LOST, false},
		{GW_GRPC_NOT_FOUND, GW_ARRIVAL_REFUSED, false},
		{GW_GRPC_FAILED_PRECONDITION, GW_ARRIVAL_REFUSED, true},
		{GW_GRPC_OUT_OF_RANGE, GW_ARRIVAL_REFUSED, true},
		{GW_GRPC_DATA_LOSS, GW_ARRIVAL_REFUSED, true},
		{GW_GRPC_INVALID_ARGUMENT, GW_ARRIVAL_REFUSED, true},
	};

	for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
		struct bench bench = bench_closed();
		struct toucher toucher;

		fprintf(stderr, "    status %d\n", rows[i].status);
		wait_phase(bench.arrival, GW_ARRIVAL_ARMED);
		atomic_store(&bench.peer->end_status, rows[i].status);
		CHECK_EQ(gw_arrival_open_gate(bench.arrival, GENERATION), 0);
		CHECK_EQ(gw_arrival_set_page_server(bench.arrival, "127.0.0.1", bench.peer->port),
			 0);
		WAIT_UNTIL(bench.arrival, status_of(bench.arrival).grpc_status == rows[i].status);
		wait_phase(bench.arrival, rows[i].phase);
		CHECK(strstr(status_of(bench.arrival).reason, "as told"));
		toucher_start(&toucher, &bench.guest, 5);
		WAIT_UNTIL(bench.arrival, status_of(bench.arrival).held_fault_count == 1);
		atomic_store(&bench.peer->end_status, 0);
		if (rows[i].final) {
			/* Every lane, before the gate and now. */
			WAIT_UNTIL(bench.arrival, atomic_load(&bench.peer->hello_count) ==
							  2 * ((uint64_t)bulk_count + 1));
			const uint64_t hello_count = atomic_load(&bench.peer->hello_count);

			/* That nothing comes can only be watched for a while. */
			(void)nanosleep(&(struct timespec){.tv_nsec = 100000000}, NULL);
			CHECK_EQ(atomic_load(&bench.peer->hello_count), hello_count);
			CHECK_EQ(gw_arrival_set_page_server(bench.arrival, "127.0.0.1",
							    bench.peer->port),
				 0);
		}
		CHECK_EQ(toucher_join(&toucher), first_word(5));
		wait_phase(bench.arrival, GW_ARRIVAL_FETCHING);
		bench_close(&bench);
	}
}

static void another_size_is_not_our_image(void)
{
	struct bench bench = {.guest = guest_of_method()};

	bench.peer = peer_start(source, PAGE_COUNT * PAGE / 2, GENERATION, 0);
	bench.arrival = arrival_of(&bench.guest, bench.peer->port, false);
	CHECK_EQ(gw_arrival_start(bench.arrival), 0);
	wait_phase(bench.arrival, GW_ARRIVAL_REFUSED);
	CHECK(strstr(status_of(bench.arrival).reason, "not our image"));
	bench_close(&bench);
}

/* Connected, and then nothing: heartbeats go out, and after three seconds of silence it is given up. */
static void a_silent_server_is_given_up(void)
{
	struct bench bench = bench_open();
	struct toucher toucher;

	WAIT_UNTIL(bench.arrival, atomic_load(&bench.peer->heartbeat_count) > 0);
	atomic_store(&bench.peer->mute, true);
	toucher_start(&toucher, &bench.guest, 8);
	wait_phase(bench.arrival, GW_ARRIVAL_LINK_LOST);
	CHECK(strstr(status_of(bench.arrival).reason, "silent"));
	atomic_store(&bench.peer->mute, false);
	CHECK_EQ(toucher_join(&toucher), first_word(8));
	bench_close(&bench);
}

/* --- death and adoption ----------------------------------------------------------------------- */

enum { LIFE_COUNT = 42 };

/* An engine in a process of its own. */
static _Noreturn void live(const struct guest *guest, uint32_t port, bool adopts,
			   atomic_bool *whole)
{
	struct gw_arrival *const arrival = arrival_of(guest, port, adopts);

	CHECK_EQ(gw_arrival_start(arrival), 0);
	CHECK_EQ(gw_arrival_open_gate(arrival, GENERATION), 0);
	/* Slowly, so that it takes several lives. */
	CHECK_EQ(gw_arrival_set_bulk_rate(arrival, 4U << 20), 0);
	CHECK_EQ(gw_arrival_start_bulk(arrival), 0);
	wait_phase(arrival, GW_ARRIVAL_COMPLETE);
	CHECK_EQ(status_of(arrival).violation_count, 0);
	atomic_store(whole, true);
	/* Only a kill ends it: nothing is put in order. */
	for (;;)
		pause();
}

static void fork_lives(const struct guest *guest, struct guest_life lives[LIFE_COUNT],
		       atomic_bool *whole)
{
	uint32_t port = 0;

	for (int i = 0; i < LIFE_COUNT; i++) {
		lives[i] = guest_fork_life(&port);
		if (lives[i].pid == 0)
			live(guest, port, i > 0, whole);
	}
}

static void end_life(const struct guest_life *life)
{
	CHECK_EQ(kill(life->pid, SIGKILL), 0);
	const int status = guest_wait_life(life);

	CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
}

/* The engine is killed in the middle; a successor goes on where it was. */
static void an_engine_killed_at_any_time_is_adopted(void)
{
	struct bench bench = {.guest = guest_of_method()};
	struct guest_life lives[LIFE_COUNT];
	struct vcpu vcpus[2];
	int life_count = 0;
	atomic_bool *const whole = mmap(NULL, sizeof(*whole), PROT_READ | PROT_WRITE,
					MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	CHECK(whole != MAP_FAILED);
	fork_lives(&bench.guest, lives, whole);
	bench.peer = peer_start(source, PAGE_COUNT * PAGE, GENERATION, 0);
	for (uint64_t i = 0; i < 2; i++) {
		vcpus[i] = (struct vcpu){.guest = &bench.guest, .seed = i * 5 + 2};
		CHECK_EQ(pthread_create(&vcpus[i].thread, NULL, vcpu_main, &vcpus[i]), 0);
	}
	while (!atomic_load(whole) && life_count < LIFE_COUNT) {
		const uint64_t checked = atomic_load(&vcpus[0].checked_count);
		const struct guest_life *const life = &lives[life_count++];

		guest_start_life(life, bench.peer->port);
		/* Until some more pages were touched, or it is whole; the last one until it is whole. */
		while (!atomic_load(whole) &&
		       (life_count == LIFE_COUNT ||
			atomic_load(&vcpus[0].checked_count) < checked + 60)) {
			CHECK_EQ(waitpid(life->pid, NULL, WNOHANG), 0);
			nap();
		}
		end_life(life);
	}
	CHECK(atomic_load(whole));
	fprintf(stderr, "    %d lives\n", life_count);
	CHECK(life_count > 2);
	for (int i = life_count; i < LIFE_COUNT; i++)
		end_life(&lives[i]);
	CHECK_EQ(munmap(whole, sizeof(*whole)), 0);
	bench.arrival = arrival_of(&bench.guest, bench.peer->port, true);
	CHECK_EQ(gw_arrival_generation(bench.arrival), GENERATION);
	CHECK_EQ(status_of(bench.arrival).phase, GW_ARRIVAL_COMPLETE);
	/* Late faults of the vCPUs are still ours to answer. */
	CHECK_EQ(gw_arrival_start(bench.arrival), 0);
	for (int i = 0; i < 2; i++)
		CHECK_EQ(pthread_join(vcpus[i].thread, NULL), 0);
	check_whole(&bench);
	CHECK_EQ(gw_arrival_finish(bench.arrival), 0);
	bench_close(&bench);
}

static void what_cannot_be_created(void)
{
	struct guest guest = guest_of_method();
	const struct gw_arrival_region region = region_of(&guest);
	struct gw_arrival_config config = config_of(&guest, 1, &region, false);
	struct gw_arrival *arrival = NULL;

#define REFUSED(field, value, err)                                  \
	do {                                                        \
		struct gw_arrival_config wrong = config;            \
		wrong.field = value;                                \
		CHECK_EQ(gw_arrival_create(&wrong, &arrival), err); \
		CHECK(access(map_path, F_OK) != 0);                 \
	} while (0)

	REFUSED(struct_size, 8, -EINVAL);
	REFUSED(page_size, 8192, -EINVAL);
	REFUSED(epoch, 0, -EINVAL);
	REFUSED(page_port, 0, -EINVAL);
	REFUSED(page_port, 70000, -EINVAL);
	REFUSED(image_id, "", -EINVAL);
	REFUSED(session_id, NULL, -EINVAL);
	REFUSED(bulk_connection_count, 0, -EINVAL);
	REFUSED(bulk_connection_count, 9, -EINVAL);
	REFUSED(region_count, 0, -EINVAL);
	REFUSED(install_method, 4, -EINVAL);
	REFUSED(install_method, GW_INSTALL_WRITE, -EINVAL);
	REFUSED(uffds, &guest.ram_fd, -EINVAL);
	REFUSED(uffd_count, 0, -EINVAL);
	REFUSED(uffd_count, 17, -EINVAL);
	REFUSED(exit_channel_fd, guest.ram_fd, -EINVAL);
	REFUSED(adopt, 1, -ENOENT);
	REFUSED(page_map_path, "/nowhere/map", -ENOENT);
	/* Memory that is not empty is not the guest's. */
	CHECK_EQ(gw_sys_pwrite(guest.ram_fd, "x", 1, 0), 1);
	CHECK_EQ(gw_arrival_create(&config, &arrival), -ENOTEMPTY);
	CHECK(access(map_path, F_OK) != 0);
	CHECK_EQ(gw_sys_fallocate(guest.ram_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0,
				  (off_t)PAGE),
		 0);
	CHECK_EQ(gw_arrival_create(&config, &arrival), 0);
	gw_arrival_destroy(arrival);
	arrival = NULL;
	/* There is a map now: a second new one would forget what is installed. */
	CHECK_EQ(gw_arrival_create(&config, &arrival), -EEXIST);
	config.adopt = 1;
	config.epoch = 3;
	CHECK_EQ(gw_arrival_create(&config, &arrival), -ESTALE);
	config.epoch = 2;
	CHECK_EQ(gw_sys_pwrite(guest.ram_fd, "x", 1, 0), 1);
	CHECK_EQ(gw_arrival_create(&config, &arrival), -ENOTEMPTY);
	CHECK(!arrival);
	gw_arrival_destroy(NULL);
	CHECK_EQ(gw_page_map_unlink(map_path), 0);
	guest_destroy(&guest);
}

static int open_fd_count(void)
{
	DIR *const dir = opendir("/proc/self/fd");
	int count = 0;

	CHECK(dir);
	while (readdir(dir))
		count++;
	CHECK_EQ(closedir(dir), 0);
	return count;
}

static void a_failing_call_in_create_leaves_nothing(void)
{
	struct guest guest = guest_of_method();
	const struct gw_arrival_region region = region_of(&guest);
	const struct gw_arrival_config config = config_of(&guest, 1, &region, false);
	const int fd_count = open_fd_count();

	for (uint64_t nth = 1;; nth++) {
		struct gw_arrival *arrival = NULL;

		gw_sys_fail_nth(GW_SYS_ANY, nth, EIO);
		const int err = gw_arrival_create(&config, &arrival);
		const bool failed = gw_sys_failed();

		gw_sys_fail_none();
		CHECK_EQ(err == 0, arrival != NULL);
		CHECK(err == 0 || err == -EIO || err == -EINVAL);
		CHECK_EQ(access(map_path, F_OK) == 0, err == 0);
		gw_arrival_destroy(arrival);
		(void)gw_page_map_unlink(map_path);
		CHECK_EQ(open_fd_count(), fd_count);
		if (!failed)
			break;
	}
	guest_destroy(&guest);
}

#ifdef __SANITIZE_THREAD__
#define FAILURE_STEP 4 /* slow there, and what is failed is the same */
#else
#define FAILURE_STEP 1
#endif

/* Any call fails once, anywhere in the engine, while a guest arrives: it arrives whole. */
static void a_failing_call_anywhere_is_survived(void)
{
	int failed_count = 0;

	for (uint64_t nth = 1; nth < 400; nth += nth < 120 ? FAILURE_STEP : 23) {
		struct bench bench = bench_closed();
		struct vcpu vcpu = {.guest = &bench.guest, .seed = nth};

		wait_phase(bench.arrival, GW_ARRIVAL_ARMED);
		gw_sys_fail_nth(GW_SYS_ANY, nth, EIO);
		CHECK_EQ(gw_arrival_open_gate(bench.arrival, GENERATION), 0);
		CHECK_EQ(pthread_create(&vcpu.thread, NULL, vcpu_main, &vcpu), 0);
		CHECK_EQ(gw_arrival_start_bulk(bench.arrival), 0);
		wait_phase(bench.arrival, GW_ARRIVAL_COMPLETE);
		failed_count += gw_sys_failed();
		gw_sys_fail_none();
		CHECK_EQ(pthread_join(vcpu.thread, NULL), 0);
		check_whole(&bench);
		bench_close(&bench);
	}
	fprintf(stderr, "    %d failures survived\n", failed_count);
	CHECK(failed_count > 20);
}

/* --- the guest's own doings ------------------------------------------------------------------- */

/* Touched beside us (here: through the file): held, and nothing is installed any more. */
static void a_touched_page_is_a_violation_and_holds_the_guest(void)
{
	struct bench bench = bench_closed();
	uint64_t present_count;

	wait_phase(bench.arrival, GW_ARRIVAL_ARMED);
	CHECK_EQ(gw_sys_pwrite(bench.guest.ram_fd, "x", 1, 600 * (off_t)PAGE), 1);
	CHECK_EQ(gw_arrival_open_gate(bench.arrival, GENERATION), 0);
	CHECK_EQ(gw_arrival_start_bulk(bench.arrival), 0);
	wait_phase(bench.arrival, GW_ARRIVAL_VIOLATION);
	CHECK(status_of(bench.arrival).violation_count > 0);
	CHECK(gw_arrival_page_state(bench.arrival, 600 * PAGE) != GW_PAGE_PRESENT);
	/* Installs under way when it happened may end; then nothing moves. */
	(void)nanosleep(&(struct timespec){.tv_nsec = 50000000}, NULL);
	present_count = status_of(bench.arrival).absent_count;
	(void)nanosleep(&(struct timespec){.tv_nsec = 50000000}, NULL);
	CHECK_EQ(status_of(bench.arrival).absent_count, present_count);
	bench_close(&bench);
}

struct advice {
	uint8_t *at;
	size_t len;
};

static void *give_back(void *argument)
{
	const struct advice *const advice = argument;

	CHECK_EQ(madvise(advice->at, advice->len, MADV_REMOVE), 0);
	return NULL;
}

/* A balloon: pages present and absent are given back while bulk runs. */
static void what_is_given_back_reads_zero(void)
{
	struct bench bench = bench_open();
	struct advice present = {bench.guest.memory + 8 * PAGE, 4 * PAGE};
	struct advice absent = {bench.guest.memory + 1500 * PAGE, 40 * PAGE};

	for (uint64_t page = 8; page < 12; page++)
		CHECK(page_is_right(&bench.guest, page));
	CHECK(!give_back(&present));
	CHECK(!give_back(&absent));
	/* madvise returns when the event is read, a moment before it is acted on. */
	WAIT_UNTIL(bench.arrival, status_of(bench.arrival).removed_page_count >= 40);
	CHECK_EQ(gw_arrival_start_bulk(bench.arrival), 0);
	wait_phase(bench.arrival, GW_ARRIVAL_COMPLETE);
	WAIT_UNTIL(bench.arrival, status_of(bench.arrival).removed_page_count == 44);
	CHECK_EQ(gw_arrival_page_state(bench.arrival, 9 * PAGE), GW_PAGE_REMOVED);
	for (uint64_t page = 0; page < PAGE_COUNT; page++) {
		const bool given = (page >= 8 && page < 12) || (page >= 1500 && page < 1540);

		if (given)
			CHECK_EQ(*(volatile uint64_t *)(void *)(bench.guest.memory + page * PAGE),
				 0);
		else
			CHECK(page_is_right(&bench.guest, page));
	}
	CHECK_EQ(status_of(bench.arrival).violation_count, 0);
	bench_close(&bench);
}

struct storm {
	pthread_t thread;
	const struct guest *guest;
	_Atomic bool stop;
};

/* MADV_DONTNEED of shared memory, all the time: each holds back every install until it is read. */
static void *dontneed_storm(void *argument)
{
	struct storm *const storm = argument;

	for (uint64_t i = 0; !atomic_load(&storm->stop); i++)
		CHECK_EQ(madvise(storm->guest->memory + i % 16 * PAGE, PAGE, MADV_DONTNEED), 0);
	return NULL;
}

static void events_that_hold_installs_back_are_no_livelock(void)
{
	struct bench bench = bench_open();
	struct vcpu vcpu = {.guest = &bench.guest, .seed = 11};
	struct storm storm = {.guest = &bench.guest};

	for (uint64_t page = 0; page < 16; page++)
		CHECK(page_is_right(&bench.guest, page));
	CHECK_EQ(pthread_create(&storm.thread, NULL, dontneed_storm, &storm), 0);
	CHECK_EQ(gw_arrival_start_bulk(bench.arrival), 0);
	CHECK_EQ(pthread_create(&vcpu.thread, NULL, vcpu_main, &vcpu), 0);
	/* Both lanes get on while it blows. All of the memory would take a minute. */
	WAIT_UNTIL(bench.arrival, status_of(bench.arrival).absent_count < PAGE_COUNT - 200);
	atomic_store(&storm.stop, true);
	CHECK_EQ(pthread_join(storm.thread, NULL), 0);
	CHECK_EQ(pthread_join(vcpu.thread, NULL), 0);
	wait_phase(bench.arrival, GW_ARRIVAL_COMPLETE);
	check_whole(&bench);
	CHECK_EQ(status_of(bench.arrival).removed_page_count, 0);
	bench_close(&bench);
}

/* The guest's process dies: ENDED, not an error to repeat for ever. */
static void a_guest_that_ends_ends_the_arrival(void)
{
	struct bench bench = {0};
	uint64_t message[3];
	int pair[2];
	int status = 0;

	CHECK_EQ(gw_sys_socketpair(AF_UNIX, SOCK_STREAM, 0, pair), 0);
	const pid_t pid = fork();

	CHECK(pid >= 0);
	if (pid == 0) {
		const struct guest guest = guest_of_method();

		message[0] = (uint64_t)guest.uffd;
		message[1] = (uint64_t)guest.ram_fd;
		message[2] = guest_address(&guest, 0);
		CHECK_EQ(write(pair[1], message, sizeof(message)), sizeof(message));
		for (;;)
			pause();
	}
	CHECK_EQ(read(pair[0], message, sizeof(message)), sizeof(message));
	const int pidfd = gw_sys_pidfd_open(pid, 0);
	struct guest guest = {
		.uffd = gw_sys_pidfd_getfd(pidfd, (int)message[0], 0),
		.ram_fd = gw_sys_pidfd_getfd(pidfd, (int)message[1], 0),
		.memory = (uint8_t *)(uintptr_t)message[2], /* NOLINT: another process's */
		.page_count = PAGE_COUNT,
	};

	bench.peer = peer_start(source, PAGE_COUNT * PAGE, GENERATION, 0);
	bench.arrival = arrival_of(&guest, bench.peer->port, false);
	CHECK_EQ(gw_arrival_start(bench.arrival), 0);
	CHECK_EQ(gw_arrival_open_gate(bench.arrival, GENERATION), 0);
	CHECK_EQ(gw_arrival_set_bulk_rate(bench.arrival, 1U << 20), 0);
	CHECK_EQ(gw_arrival_start_bulk(bench.arrival), 0);
	WAIT_UNTIL(bench.arrival, status_of(bench.arrival).bulk_page_count > 0);
	CHECK_EQ(kill(pid, SIGKILL), 0);
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	CHECK_EQ(gw_arrival_set_bulk_rate(bench.arrival, 0), 0);
	wait_phase(bench.arrival, GW_ARRIVAL_ENDED);
	CHECK_EQ(status_of(bench.arrival).violation_count, 0);
	gw_arrival_destroy(bench.arrival);
	CHECK_EQ(gw_page_map_unlink(map_path), 0);
	peer_stop(bench.peer);
}

/* --- pace ------------------------------------------------------------------------------------- */

/* A limit of a page a second lets next to nothing through, demand goes on, and lifting it is at once. */
static void the_limit_is_bulks_alone(void)
{
	struct bench bench = bench_open();
	struct toucher toucher;

	CHECK_EQ(gw_arrival_set_bulk_rate(bench.arrival, PAGE), 0);
	CHECK_EQ(gw_arrival_start_bulk(bench.arrival), 0);
	for (uint64_t page = 40; page < 300; page += 10) {
		toucher_start(&toucher, &bench.guest, page);
		CHECK_EQ(toucher_join(&toucher), is_zero_page(page) ? 0 : first_word(page));
	}
	CHECK(status_of(bench.arrival).bulk_page_count < 64);
	CHECK_EQ(status_of(bench.arrival).bulk_done, 0);
	CHECK_EQ(gw_arrival_set_bulk_rate(bench.arrival, 0), 0);
	wait_phase(bench.arrival, GW_ARRIVAL_COMPLETE);
	check_whole(&bench);
	bench_close(&bench);
}

static void core_is_taken(void *argument)
{
	(void)argument;
	(void)nanosleep(&(struct timespec){.tv_nsec = 2000000}, NULL);
}

/*
 * Whoever yields its core to others that want it gets it back milliseconds later: the thread that serves
 * faults finds out once, and sleeps instead, for a second.
 */
static void a_crowded_host_is_not_looked_away(void)
{
	struct bench bench = bench_open();
	struct vcpu vcpu = {.guest = &bench.guest, .seed = 3};

	gw_hook_call("demand.yielded", core_is_taken, NULL);
	const uint64_t begin_ns = gw_sys_now_ns();

	CHECK_EQ(pthread_create(&vcpu.thread, NULL, vcpu_main, &vcpu), 0);
	CHECK_EQ(pthread_join(vcpu.thread, NULL), 0);
	const uint64_t passed_s = (gw_sys_now_ns() - begin_ns) / 1000000000;

	CHECK(gw_hook_reach_count("demand.yielded") <= passed_s + 2);
	gw_hook_call("demand.yielded", NULL, NULL);
	bench_close(&bench);
}

static void many_waiters_at_once(void)
{
	enum { WAITER_COUNT = 200 };
	static struct toucher touchers[WAITER_COUNT];
	struct bench bench = bench_closed();

	for (uint64_t i = 0; i < WAITER_COUNT; i++)
		toucher_start(&touchers[i], &bench.guest, i * 10);
	WAIT_UNTIL(bench.arrival, status_of(bench.arrival).held_fault_count == WAITER_COUNT);
	CHECK_EQ(gw_arrival_open_gate(bench.arrival, GENERATION), 0);
	for (uint64_t i = 0; i < WAITER_COUNT; i++)
		CHECK_EQ(toucher_join(&touchers[i]), is_zero_page(i * 10) ? 0 : first_word(i * 10));
	/* Woken first, forgotten then. */
	WAIT_UNTIL(bench.arrival, status_of(bench.arrival).held_fault_count == 0);
	bench_close(&bench);
}

static void start_twice_and_destroy_early(void)
{
	struct bench bench = bench_closed();

	CHECK_EQ(gw_arrival_start(bench.arrival), -EALREADY);
	bench_close(&bench);
	/* Never started. */
	bench = (struct bench){.guest = guest_of_method()};
	bench.arrival = arrival_of(&bench.guest, 1, false);
	bench_close(&bench);
	/* With nobody there. */
	bench = (struct bench){.guest = guest_of_method()};
	bench.arrival = arrival_of(&bench.guest, 1, false);
	CHECK_EQ(gw_arrival_start(bench.arrival), 0);
	WAIT_UNTIL(bench.arrival, status_of(bench.arrival).reason[0] != '\0');
	CHECK_EQ(status_of(bench.arrival).phase, GW_ARRIVAL_CONNECTING);
	bench_close(&bench);
}

int main(int argc, char **argv)
{
	uint64_t features = 0;

	guest_need_uffd();
	CHECK_EQ(gw_uffd_probe(&features), 0);
	(void)snprintf(map_path, sizeof(map_path), "/dev/shm/gw-test-arrival-%d", (int)getpid());
	guest_left_path = map_path;
	fill_source();
#define RUN_IF(function)                                    \
	do {                                                \
		if (argc < 2 || strstr(#function, argv[1])) \
			RUN_FORKED(function);               \
	} while (0)
	for (method = GW_INSTALL_COPY; method <= GW_INSTALL_CONTINUE; method++) {
		if (method == GW_INSTALL_CONTINUE && !(features & GW_UFFD_FEATURE_MINOR_SHMEM)) {
			check_need(false, "minor-shmem", "a kernel of 5.14 or later");
			continue;
		}
		fprintf(stderr, "%s\n", method == GW_INSTALL_COPY ? "copy" : "continue");
		RUN_IF(faults_and_bulk_make_the_guest_whole);
		RUN_IF(bulk_alone_leaves_zeros_as_holes);
		RUN_IF(a_closed_gate_holds_faults);
		RUN_IF(a_stalled_bulk_never_delays_demand);
		RUN_IF(a_late_bulk_answer_does_not_undo_the_guests_stores);
		RUN_IF(a_fault_on_what_bulk_has_just_asked_for);
		RUN_IF(an_engine_killed_at_any_time_is_adopted);
		RUN_IF(a_touched_page_is_a_violation_and_holds_the_guest);
		RUN_IF(what_is_given_back_reads_zero);
		RUN_IF(events_that_hold_installs_back_are_no_livelock);
		RUN_IF(a_guest_that_ends_ends_the_arrival);
	}
	/* What does not depend on how a page is put in place. */
	method = GW_INSTALL_COPY;
	RUN_IF(no_lie_is_ever_installed);
	RUN_IF(packed_pages_make_the_guest_whole);
	RUN_IF(an_answer_that_nobody_waits_for_is_dropped);
	RUN_IF(a_server_that_dies_and_returns);
	RUN_IF(another_server_is_named);
	RUN_IF(refusals_of_the_server);
	RUN_IF(another_size_is_not_our_image);
	RUN_IF(a_silent_server_is_given_up);
	RUN_IF(what_cannot_be_created);
	RUN_IF(a_failing_call_in_create_leaves_nothing);
	RUN_IF(a_failing_call_anywhere_is_survived);
	RUN_IF(the_limit_is_bulks_alone);
	RUN_IF(a_crowded_host_is_not_looked_away);
	RUN_IF(many_waiters_at_once);
	RUN_IF(start_twice_and_destroy_early);
	return EXIT_SUCCESS;
}
