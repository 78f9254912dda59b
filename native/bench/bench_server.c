/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The source of a benchmark: one memory, served by the page server and by raw TCP, in a process of
 * its own. Raw TCP answers {offset, len} with the bytes, written from a mapping: what sockets give
 * who neither checks nor frames. See bench.h.
 */
#include "bench.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <godwit/serve.h>
#include <godwit/sys.h>

#define CONNECTION_COUNT_MAX 32u

struct raw_request {
	uint64_t offset, len;
};

struct source {
	int fd;
	uint8_t *memory;
	uint64_t len;
	int listen_fd;
};

struct answer {
	uint32_t page_port, raw_port;
	int32_t memory_fd;
	uint32_t reserved;
};

static void make_memory(struct source *source, enum bench_kind kind)
{
	void *memory = NULL;

	source->fd = gw_sys_memfd_create("source", MFD_CLOEXEC);
	CHECK(source->fd >= 0);
	CHECK_EQ(gw_sys_ftruncate(source->fd, (off_t)source->len), 0);
	CHECK_EQ(gw_sys_mmap(NULL, source->len, PROT_READ | PROT_WRITE, MAP_SHARED, source->fd, 0,
			     &memory),
		 0);
	source->memory = memory;
	for (uint64_t page = 0; page < source->len / PAGE; page++)
		(void)bench_page_fill(kind, page, source->memory + page * PAGE);
}

static bool send_all(int fd, const uint8_t *data, uint64_t len)
{
	while (len > 0) {
		const ssize_t sent = send(fd, data, len < MIB ? len : MIB, MSG_NOSIGNAL);

		if (sent <= 0)
			return false;
		data += sent;
		len -= (uint64_t)sent;
	}
	return true;
}

static bool answer_raw(const struct source *source, int fd)
{
	struct raw_request request;

	if (recv(fd, &request, sizeof(request), MSG_WAITALL) != sizeof(request))
		return false;
	while (request.len > 0) {
		const uint64_t offset = request.offset % source->len;
		const uint64_t rest = source->len - offset;
		const uint64_t len = request.len < rest ? request.len : rest;

		if (!send_all(fd, source->memory + offset, len))
			return false;
		request.offset += len;
		request.len -= len;
	}
	return true;
}

static void *raw_main(void *argument)
{
	const struct source *const source = argument;
	const int one = 1;

	for (;;) {
		const int fd = accept(source->listen_fd, NULL, NULL);

		CHECK(fd >= 0);
		CHECK_EQ(setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)), 0);
		while (answer_raw(source, fd))
			;
		close(fd);
	}
	return NULL;
}

static uint32_t raw_listen(struct source *source)
{
	struct sockaddr_in address = {.sin_family = AF_INET,
				      .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	socklen_t len = sizeof(address);
	pthread_t thread;

	source->listen_fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	CHECK_EQ(bind(source->listen_fd, (struct sockaddr *)&address, len), 0);
	CHECK_EQ(listen(source->listen_fd, 1), 0);
	CHECK_EQ(getsockname(source->listen_fd, (struct sockaddr *)&address, &len), 0);
	CHECK_EQ(pthread_create(&thread, NULL, raw_main, source), 0);
	return ntohs(address.sin_port);
}

static uint32_t page_listen(const struct source *source)
{
	const struct gw_serve_region region = {.size = source->len, .page_size = PAGE};
	const struct gw_serve_config config = {.struct_size = sizeof(config),
					       .listen_host = "127.0.0.1",
					       .connection_count_max = CONNECTION_COUNT_MAX,
					       .tls = bench_identity("a")};
	const struct gw_serve_image image = {.struct_size = sizeof(image),
					     .ram_fd = source->fd,
					     .image_id = "bench",
					     .vm_id = "bench",
					     .boot_id = "bench",
					     .epoch = 1,
					     .generation = BENCH_GENERATION,
					     .state = GW_IMAGE_FROZEN,
					     .region_count = 1,
					     .regions = &region};
	struct gw_serve *serve;

	CHECK_EQ(gw_serve_create(&config, &serve), 0);
	CHECK_EQ(gw_serve_put_image(serve, &image), 0);
	CHECK_EQ(gw_serve_start(serve), 0);
	return (uint32_t)gw_serve_port(serve);
}

static _Noreturn void server_main(enum bench_kind kind, uint64_t len, int control_fd)
{
	static struct source source;
	struct answer answer;
	char byte;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	source.len = len;
	make_memory(&source, kind);
	answer = (struct answer){.page_port = page_listen(&source),
				 .raw_port = raw_listen(&source),
				 .memory_fd = source.fd};
	CHECK_EQ(send(control_fd, &answer, sizeof(answer), 0), sizeof(answer));
	(void)recv(control_fd, &byte, 1, 0);
	_exit(EXIT_SUCCESS);
}

void bench_server_start(struct bench_server *server, enum bench_kind kind, uint64_t len)
{
	struct answer answer;
	int fds[2];

	CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
	*server = (struct bench_server){.kind = kind, .len = len, .control_fd = fds[0]};
	server->pid = fork();
	CHECK(server->pid >= 0);
	if (server->pid == 0) {
		close(fds[0]);
		server_main(kind, len, fds[1]);
	}
	close(fds[1]);
	CHECK_EQ(recv(server->control_fd, &answer, sizeof(answer), MSG_WAITALL), sizeof(answer));
	server->page_port = answer.page_port;
	server->raw_port = answer.raw_port;
	server->memory_fd = answer.memory_fd;
	server->block_count = bench_server_blocks(server);
}

uint64_t bench_server_blocks(const struct bench_server *server)
{
	struct stat found;
	char path[64];

	(void)snprintf(path, sizeof(path), "/proc/%d/fd/%d", (int)server->pid, server->memory_fd);
	CHECK_EQ(stat(path, &found), 0);
	return (uint64_t)found.st_blocks;
}

void bench_server_stop(struct bench_server *server)
{
	int status = -1;

	if (server->pid == 0)
		return;
	close(server->control_fd);
	CHECK_EQ(waitpid(server->pid, &status, 0), server->pid);
	CHECK_EQ(status, 0);
	server->pid = 0;
}
