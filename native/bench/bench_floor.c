/* SPDX-License-Identifier: Apache-2.0 */
/* The floor: raw TCP, and userfaultfd without a network. See bench.h. */
#include "bench.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <godwit/sys.h>
#include <godwit/uffd.h>

#define EVENT_COUNT 16u

/* --- raw TCP ---------------------------------------------------------------------------------- */

static int raw_connect(const struct bench_server *server)
{
	const struct sockaddr_in address = {.sin_family = AF_INET,
					    .sin_port = htons((uint16_t)server->raw_port),
					    .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	const int one = 1;

	CHECK_EQ(connect(fd, (const struct sockaddr *)&address, sizeof(address)), 0);
	CHECK_EQ(setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)), 0);
	return fd;
}

static void raw_ask(int fd, uint64_t offset, uint64_t len)
{
	const uint64_t request[2] = {offset, len};

	CHECK_EQ(send(fd, request, sizeof(request), MSG_NOSIGNAL), sizeof(request));
}

static uint64_t page_at(const struct bench_server *server, uint64_t i)
{
	return i * 2654435761ul % (server->len / PAGE);
}

static uint8_t *new_buffer(size_t len)
{
	uint8_t *const buffer = aligned_alloc(PAGE, len);

	CHECK(buffer);
	memset(buffer, 1, len);
	return buffer;
}

void bench_tcp(const struct bench_server *server, uint32_t count)
{
	uint64_t *const samples = calloc(count, sizeof(*samples));
	uint8_t *const buffer = new_buffer(PAGE);
	const int fd = raw_connect(server);

	CHECK(samples);
	for (uint32_t i = 0; i < count; i++) {
		const uint64_t begin_ns = gw_sys_now_ns();
		uint64_t word;

		raw_ask(fd, page_at(server, i) * PAGE, PAGE);
		CHECK_EQ(recv(fd, buffer, PAGE, MSG_WAITALL), PAGE);
		samples[i] = gw_sys_now_ns() - begin_ns;
		memcpy(&word, buffer, sizeof(word));
		CHECK(word == bench_page_word(server->kind, page_at(server, i)));
	}
	bench_print_samples(samples, count);
	close(fd);
	free(buffer);
	free(samples);
}

void bench_stream(const struct bench_server *server, uint64_t len)
{
	uint8_t *const buffer = new_buffer(MIB);
	const int fd = raw_connect(server);
	const uint64_t begin_ns = gw_sys_now_ns();

	raw_ask(fd, 0, len);
	for (uint64_t done = 0; done < len;) {
		const ssize_t got = recv(fd, buffer, MIB, 0);

		CHECK(got > 0);
		done += (uint64_t)got;
	}
	bench_print_rate(len, gw_sys_now_ns() - begin_ns);
	close(fd);
	free(buffer);
}

/* --- userfaultfd ------------------------------------------------------------------------------ */

static void answer(const struct bench_guest *guest, uint8_t *page, const struct uffd_msg *event)
{
	const uint64_t address = event->arg.pagefault.address & ~(PAGE - 1);
	const uint64_t number = (address - guest->address) / PAGE;
	const uint64_t word = bench_page_word(BENCH_RAW, number);
	uint64_t done = 0;

	CHECK_EQ(event->event, UFFD_EVENT_PAGEFAULT);
	memcpy(page, &word, sizeof(word));
	CHECK_EQ(gw_uffd_copy(guest->uffd, address, page, PAGE, &done), GW_UFFD_DONE);
	CHECK_EQ(gw_uffd_wake(guest->uffd, address, PAGE), 0);
}

/* A guest's fault answered at once with what lies ready: sleep, read, copy, wake. */
void bench_uffd(uint32_t count)
{
	const struct bench_touches touches = {.thread_count = 1, .count = count};
	uint8_t *const page = new_buffer(PAGE);
	struct uffd_msg events[EVENT_COUNT];
	struct bench_guest guest;

	bench_guest_start(&guest, BENCH_RAW, count * PAGE);
	bench_guest_touch(&guest, &touches);
	for (uint32_t answered = 0; answered < count;) {
		struct pollfd poll_fd = {.fd = guest.uffd, .events = POLLIN};

		CHECK(gw_sys_poll(&poll_fd, 1, -1) >= 0);
		const int event_count = gw_uffd_read(guest.uffd, events, EVENT_COUNT);

		CHECK(event_count >= 0);
		for (int i = 0; i < event_count; i++, answered++)
			answer(&guest, page, &events[i]);
	}
	bench_guest_wait(&guest);
	bench_print_samples(guest.share->samples[0], count);
	bench_guest_stop(&guest);
	free(page);
}

/* Nobody waits: how fast pages can be put in place at all. */
void bench_copy(uint32_t batch_page_count, uint64_t len)
{
	const uint64_t batch_len = batch_page_count * PAGE;
	uint8_t *const source = new_buffer(batch_len);
	struct bench_guest guest;

	CHECK(batch_len > 0 && len % batch_len == 0);
	bench_guest_start(&guest, BENCH_RAW, len);
	const uint64_t begin_ns = gw_sys_now_ns();

	for (uint64_t at = 0; at < len; at += batch_len) {
		uint64_t done = 0;

		CHECK_EQ(gw_uffd_copy(guest.uffd, guest.address + at, source, batch_len, &done),
			 GW_UFFD_DONE);
	}
	bench_print_rate(len, gw_sys_now_ns() - begin_ns);
	bench_guest_stop(&guest);
	free(source);
}
