/* SPDX-License-Identifier: Apache-2.0 */
/*
 * bench_wire.c - pages over loopback: our client and our page server against raw TCP, in turns within
 * one run, so that a noisy machine is noisy for both.
 *
 *   bench_wire [ROUNDS [CASES]]     default 10, all; each round: 2000 wants of 4 KiB, 400 of 1 MiB
 *
 * CASES is a string of digits, see the table of cases. "cpu" is what both ends together took, kernel
 * included: it depends less on what else the machine does than the time.
 *
 * Ours does what it does in earnest: reads the memory, sums it, frames it; the client checks the
 * sum. Raw TCP writes from a mapping what 24 bytes ask for, and checks nothing; nor does it pay for the
 * first touch of a page of memory, as its mapping is the one that the memory was made with.
 */
#include "check.h"

#include <arpa/inet.h>
#include <godwit/grpc.h>
#include <godwit/page_wire.h>
#include <godwit/serve.h>
#include <godwit/sys.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE	    4096ul
#define MIB	    (1ul << 20)
#define MEMORY_LEN  (256 * MIB)
#define SMALL_COUNT 2000u
#define LARGE_COUNT 400u
#define ROUND_MAX   100u
#define IN_FLIGHT   4u

struct samples {
	uint64_t *ns;
	size_t count;
	uint64_t total_ns;
	uint64_t cpu_ns;
};

static int by_value(const void *a, const void *b)
{
	const uint64_t x = *(const uint64_t *)a;
	const uint64_t y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

static double quantile_us(const struct samples *samples, double quantile)
{
	const size_t at = (size_t)((double)samples->count * quantile);

	return (double)samples->ns[at < samples->count ? at : samples->count - 1] / 1000;
}

static void say(const char *what, struct samples *samples, size_t len)
{
	qsort(samples->ns, samples->count, sizeof(*samples->ns), by_value);
	printf("%-26s n=%-6zu p50 %7.1f us  p99 %7.1f us  p99.9 %7.1f us  %5.0f MB/s  cpu %4.0f "
	       "us\n",
	       what, samples->count, quantile_us(samples, 0.5), quantile_us(samples, 0.99),
	       quantile_us(samples, 0.999),
	       (double)(samples->count * len) * 1000 / (double)samples->total_ns,
	       (double)samples->cpu_ns / 1000 / (double)samples->count);
}

static uint64_t offset_of(size_t i, size_t len)
{
	return i * 2654435761ul % (MEMORY_LEN / len) * len;
}

/* --- raw TCP --------------------------------------------------------------------------------- */

struct raw_request {
	uint64_t offset, len, generation;
};

static bool read_all(int fd, void *data, size_t len)
{
	uint8_t *at = data;

	while (len > 0) {
		const ssize_t got = recv(fd, at, len, 0);

		if (got <= 0)
			return false;
		at += got;
		len -= (size_t)got;
	}
	return true;
}

static void write_all(int fd, const void *data, size_t len)
{
	const uint8_t *at = data;

	while (len > 0) {
		const ssize_t sent = send(fd, at, len, MSG_NOSIGNAL);

		if (sent <= 0)
			return;
		at += sent;
		len -= (size_t)sent;
	}
}

struct raw_server {
	int listen_fd;
	const uint8_t *memory;
};

static void *raw_thread(void *argument)
{
	const struct raw_server *server = argument;
	const int fd = accept(server->listen_fd, NULL, NULL);
	const int one = 1;
	struct raw_request request;

	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	while (read_all(fd, &request, sizeof(request)))
		write_all(fd, server->memory + request.offset, request.len);
	close(fd);
	return NULL;
}

static int raw_connect(struct raw_server *server)
{
	struct sockaddr_in address = {.sin_family = AF_INET,
				      .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	socklen_t len = sizeof(address);
	const int fd = socket(AF_INET, SOCK_STREAM, 0);
	const int one = 1;

	server->listen_fd = socket(AF_INET, SOCK_STREAM, 0);
	CHECK_EQ(bind(server->listen_fd, (struct sockaddr *)&address, len), 0);
	CHECK_EQ(listen(server->listen_fd, 1), 0);
	CHECK_EQ(getsockname(server->listen_fd, (struct sockaddr *)&address, &len), 0);
	CHECK_EQ(connect(fd, (struct sockaddr *)&address, len), 0);
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	return fd;
}

static void raw_round(int fd, size_t len, size_t count, size_t in_flight, uint8_t *buffer,
		      struct samples *samples)
{
	const uint64_t begin_ns = gw_sys_now_ns();
	uint64_t last_ns = begin_ns;
	size_t asked = 0;

	for (size_t i = 0; i < count; i++) {
		for (; asked < count && asked < i + in_flight; asked++) {
			const struct raw_request request = {offset_of(asked, len), len, 1};

			write_all(fd, &request, sizeof(request));
		}
		CHECK(read_all(fd, buffer, len));
		const uint64_t now_ns = gw_sys_now_ns();

		samples->ns[samples->count++] = now_ns - last_ns;
		last_ns = now_ns;
	}
	samples->total_ns += last_ns - begin_ns;
}

/* --- ours ------------------------------------------------------------------------------------ */

struct page_client {
	struct gw_grpc *conn;
	struct gw_grpc_call *call;
	bool ready;
	uint64_t received_len;
};

static void on_message(void *user, struct gw_grpc_call *call, const uint8_t *data, size_t len)
{
	struct page_client *client = user;
	struct gw_fetch_response response;

	(void)call;
	CHECK_EQ(gw_fetch_response_decode(data, len, &response), 0);
	if (response.kind == GW_FETCH_RESPONSE_READY)
		client->ready = true;
	if (response.kind != GW_FETCH_RESPONSE_PAGES)
		return;
	CHECK_EQ(gw_pages_crc32c(&response.pages), response.pages.crc32c);
	client->received_len += response.pages.len;
}

static const struct gw_grpc_handler handler = {.on_message = on_message};

static void step(struct page_client *client)
{
	struct pollfd fd = {.fd = gw_grpc_fd(client->conn), .events = POLLIN};

	if (gw_grpc_wants_write(client->conn))
		fd.events |= POLLOUT;
	CHECK(poll(&fd, 1, 10000) == 1);
	if (fd.revents & POLLIN)
		CHECK_EQ(gw_grpc_on_readable(client->conn, gw_sys_now_ns()), 0);
	if (fd.revents & POLLOUT)
		CHECK_EQ(gw_grpc_on_writable(client->conn, gw_sys_now_ns()), 0);
}

static void send_request(struct page_client *client, const struct gw_fetch_request *request)
{
	uint8_t data[256];
	const ssize_t len = gw_fetch_request_encode(request, data, sizeof(data));

	CHECK_EQ(gw_grpc_call_send(client->call, data, (size_t)len, NULL, 0, NULL), 0);
	CHECK_EQ(gw_grpc_flush(client->conn), 0);
}

static void open_client(struct page_client *client, uint32_t port, enum gw_page_lane lane)
{
	const struct gw_grpc_config config = {.handler = &handler,
					      .user = client,
					      .message_len_max = GW_PAGE_RESPONSE_LEN_MAX,
					      .window_len = 16u << 20,
					      .call_count_max = 1,
					      .send_queue_count = 64};
	const struct gw_grpc_call_options options = {.path = GW_PAGE_PATH_FETCH,
						     .authority = "b:1"};
	const struct gw_fetch_request hello = {.kind = GW_FETCH_REQUEST_HELLO,
					       .hello = {.session_id = {"bench", 5},
							 .image_id = {"img", 3},
							 .epoch = 2,
							 .lane = lane}};
	int fd;

	*client = (struct page_client){0};
	CHECK_EQ(gw_grpc_connect("127.0.0.1", port, 5000, &fd), 0);
	CHECK_EQ(gw_grpc_client_create(&config, fd, &client->conn), 0);
	CHECK_EQ(gw_grpc_call_open(client->conn, &options, &client->call), 0);
	send_request(client, &hello);
	while (!client->ready)
		step(client);
}

static void our_round(struct page_client *client, size_t len, size_t count, size_t in_flight,
		      struct samples *samples)
{
	const uint64_t begin_ns = gw_sys_now_ns();
	const uint64_t begin_len = client->received_len;
	uint64_t last_ns = begin_ns;
	size_t asked = 0;

	for (size_t i = 0; i < count; i++) {
		for (; asked < count && asked < i + in_flight; asked++) {
			const struct gw_fetch_request want = {
				.kind = GW_FETCH_REQUEST_WANT,
				.want = {.offset = offset_of(asked, len),
					 .len = len,
					 .generation = 1}};

			send_request(client, &want);
		}
		while (client->received_len < begin_len + (i + 1) * len)
			step(client);
		const uint64_t now_ns = gw_sys_now_ns();

		samples->ns[samples->count++] = now_ns - last_ns;
		last_ns = now_ns;
	}
	samples->total_ns += last_ns - begin_ns;
}

static struct gw_serve *open_server(int fd)
{
	static const struct gw_serve_region region = {.size = MEMORY_LEN, .page_size = 4096};
	const struct gw_serve_config config = {
		.struct_size = sizeof(config),
		.listen_host = "127.0.0.1",
		.connection_count_max = 8,
		/* Each stands still while the others are measured. */
		.heartbeat_ms = 60000};
	const struct gw_serve_image image = {.struct_size = sizeof(image),
					     .ram_fd = fd,
					     .image_id = "img",
					     .vm_id = "vm",
					     .boot_id = "boot",
					     .epoch = 1,
					     .generation = 1,
					     .state = GW_IMAGE_FROZEN,
					     .region_count = 1,
					     .regions = &region};
	struct gw_serve *serve;

	CHECK_EQ(gw_serve_create(&config, &serve), 0);
	CHECK_EQ(gw_serve_put_image(serve, &image), 0);
	CHECK_EQ(gw_serve_start(serve), 0);
	return serve;
}

/* --- cases ----------------------------------------------------------------------------------- */

#define CLIENT_COUNT 3 /* of demand, and two of bulk */

struct bench {
	int raw_fd;
	uint8_t *buffer;
	struct page_client clients[CLIENT_COUNT];
};

struct bench_case {
	const char *what;
	size_t len, count, in_flight;
	size_t connections; /* 0 = raw TCP */
	bool beside_bulk;   /* both bulk lanes run without a limit meanwhile */
};

static const struct bench_case cases[] = {
	{"4 KiB, raw TCP", PAGE, SMALL_COUNT, 1, 0, false},
	{"4 KiB, page server", PAGE, SMALL_COUNT, 1, 1, false},
	{"1 MiB, raw TCP", MIB, LARGE_COUNT, 1, 0, false},
	{"1 MiB, page server", MIB, LARGE_COUNT, 1, 1, false},
	{"1 MiB x 4, raw TCP", MIB, LARGE_COUNT, IN_FLIGHT, 0, false},
	{"1 MiB x 4, page server", MIB, LARGE_COUNT, IN_FLIGHT, 1, false},
	{"1 MiB x 4, on two lanes", MIB, LARGE_COUNT, IN_FLIGHT, 2, false},
	{"4 KiB, beside bulk", PAGE, SMALL_COUNT, 1, 1, true},
};

#define CASE_COUNT (sizeof(cases) / sizeof(cases[0]))

struct lane_work {
	struct page_client *client;
	size_t len, count, in_flight;
	struct samples samples;
};

static void *lane_thread(void *argument)
{
	struct lane_work *work = argument;

	our_round(work->client, work->len, work->count, work->in_flight, &work->samples);
	return NULL;
}

/* Each lane its half, in a thread of its own, as the agent does it. */
static void lanes_round(struct bench *bench, const struct bench_case *which,
			struct samples *samples)
{
	const size_t half = which->count / 2;
	const uint64_t begin_ns = gw_sys_now_ns();
	struct lane_work works[2];
	pthread_t thread;

	for (size_t i = 0; i < 2; i++)
		works[i] = (struct lane_work){
			.client = &bench->clients[1 + i],
			.len = which->len,
			.count = half,
			.in_flight = which->in_flight,
			.samples = {.ns = samples->ns + samples->count + i * half}};
	CHECK_EQ(pthread_create(&thread, NULL, lane_thread, &works[1]), 0);
	lane_thread(&works[0]);
	pthread_join(thread, NULL);
	samples->count += 2 * half;
	samples->total_ns += gw_sys_now_ns() - begin_ns;
}

struct noise {
	struct page_client *client;
	atomic_bool *stop;
};

static void *noise_thread(void *argument)
{
	const struct noise *noise = argument;
	struct samples samples = {.ns = calloc(IN_FLIGHT, sizeof(uint64_t))};

	CHECK(samples.ns);
	while (!atomic_load(noise->stop)) {
		samples.count = 0;
		our_round(noise->client, MIB, IN_FLIGHT, IN_FLIGHT, &samples);
	}
	free(samples.ns);
	return NULL;
}

static void beside_bulk_round(struct bench *bench, const struct bench_case *which,
			      struct samples *samples)
{
	atomic_bool stop = false;
	struct noise noises[2];
	pthread_t threads[2];

	for (size_t i = 0; i < 2; i++) {
		noises[i] = (struct noise){.client = &bench->clients[1 + i], .stop = &stop};
		CHECK_EQ(pthread_create(&threads[i], NULL, noise_thread, &noises[i]), 0);
	}
	our_round(&bench->clients[0], which->len, which->count, which->in_flight, samples);
	atomic_store(&stop, true);
	for (size_t i = 0; i < 2; i++)
		pthread_join(threads[i], NULL);
}

static uint64_t cpu_now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void run_case(struct bench *bench, const struct bench_case *which, struct samples *samples)
{
	const uint64_t begin_ns = cpu_now_ns();

	if (which->beside_bulk)
		beside_bulk_round(bench, which, samples);
	else if (which->connections == 0)
		raw_round(bench->raw_fd, which->len, which->count, which->in_flight, bench->buffer,
			  samples);
	else if (which->connections == 1)
		our_round(&bench->clients[which->len == PAGE ? 0 : 1], which->len, which->count,
			  which->in_flight, samples);
	else
		lanes_round(bench, which, samples);
	samples->cpu_ns += cpu_now_ns() - begin_ns;
}

static uint8_t *new_memory(int fd)
{
	uint8_t *memory;

	CHECK_EQ(ftruncate(fd, (off_t)MEMORY_LEN), 0);
	memory = mmap(NULL, MEMORY_LEN, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	CHECK(memory != MAP_FAILED);
	for (uint64_t at = 0; at < MEMORY_LEN; at += 8) {
		const uint64_t word = at * 0x9E3779B97F4A7C15ul + 1;

		memcpy(memory + at, &word, 8);
	}
	return memory;
}

int main(int argc, char **argv)
{
	const size_t round_count = argc > 1 ? strtoul(argv[1], NULL, 10) : 10;
	const char *wanted = argc > 2 ? argv[2] : "01234567";
	const int fd = memfd_create("bench", MFD_CLOEXEC);
	struct samples samples[CASE_COUNT];
	struct bench bench;
	struct raw_server raw;
	struct gw_serve *serve;
	pthread_t thread;

	CHECK(round_count > 0 && round_count <= ROUND_MAX);
	raw.memory = new_memory(fd);
	bench.buffer = aligned_alloc(PAGE, MIB);
	CHECK(bench.buffer);
	memset(bench.buffer, 1, MIB);
	for (size_t i = 0; i < CASE_COUNT; i++) {
		samples[i] = (struct samples){
			.ns = calloc(round_count * cases[i].count, sizeof(uint64_t))};
		CHECK(samples[i].ns);
	}
	serve = open_server(fd);
	bench.raw_fd = raw_connect(&raw);
	CHECK_EQ(pthread_create(&thread, NULL, raw_thread, &raw), 0);
	for (size_t i = 0; i < CLIENT_COUNT; i++)
		open_client(&bench.clients[i], (uint32_t)gw_serve_port(serve),
			    i == 0 ? GW_PAGE_LANE_DEMAND : GW_PAGE_LANE_BULK);

	for (size_t i = 0; i < round_count; i++) {
		for (size_t k = 0; k < CASE_COUNT; k++)
			if (strchr(wanted, '0' + (int)k))
				run_case(&bench, &cases[k], &samples[k]);
	}
	for (size_t k = 0; k < CASE_COUNT; k++)
		if (samples[k].count > 0)
			say(cases[k].what, &samples[k], cases[k].len);

	close(bench.raw_fd);
	pthread_join(thread, NULL);
	for (size_t i = 0; i < CLIENT_COUNT; i++)
		gw_grpc_destroy(bench.clients[i].conn);
	gw_serve_destroy(serve);
	return EXIT_SUCCESS;
}
