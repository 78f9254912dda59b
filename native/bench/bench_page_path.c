/* SPDX-License-Identifier: Apache-2.0 */
/*
 * bench_page_path.c - times the page path and what it stands on, one measurement a command, so that
 * whoever drives it (tests/bench) can take variants in turns.
 *
 *   commands on stdin, for each one line of JSON on stdout:
 *     warm MIB                             first touch of that much memory
 *     serve KIND MIB                       a new source: 0 raw, 1 zero-heavy, 2 text, 3 holes
 *     tcp COUNT | stream MIB               raw TCP: 4 KiB and back; one way
 *     uffd COUNT | copy PAGES MIB          userfaultfd: fault to page; UFFDIO_COPY, PAGES at once
 *     wire COUNT | wire-bulk MIB           our wire, nothing installed
 *     demand BULK THREADS COUNT THINK_US ORDER     faults; BULK: off, or bytes/s (0: no limit);
 *                                          ORDER: 0 far jumps, 1 ascending
 *     bulk CONNECTIONS                     the whole memory, in the background
 *
 * It has a network namespace of its own where it may: octets are counted in one.
 */
#include "bench.h"

#include <net/if.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#define WORD_COUNT_MAX 8

static struct bench_server server;
static char *words[WORD_COUNT_MAX];
static int word_count;

static uint64_t number(int i)
{
	CHECK(i < word_count);
	return strtoull(words[i], NULL, 10);
}

static bool is(const char *name, int count)
{
	if (strcmp(words[0], name) != 0)
		return false;
	CHECK_EQ(word_count, count);
	return true;
}

static void serve(void)
{
	bench_server_stop(&server);
	bench_server_start(&server, (enum bench_kind)number(1), number(2) * MIB);
	printf("\"pid\":%d,\"memory_fd\":%d,\"blocks\":%lu,\"page_port\":%u", (int)server.pid,
	       server.memory_fd, server.block_count, server.page_port);
}

static void demand(void)
{
	const bool bulk = strcmp(words[1], "off") != 0;
	const struct bench_touches touches = {.thread_count = (uint32_t)number(2),
					      .count = (uint32_t)number(3),
					      .think_ns = number(4) * NS_PER_US,
					      .skip_present = true,
					      .in_order = number(5) != 0};

	bench_demand(&server, bulk ? number(1) : UINT64_MAX, &touches);
}

static void obey(void)
{
	printf("{");
	if (is("warm", 2))
		bench_warm(number(1) * MIB);
	else if (is("serve", 3))
		serve();
	else if (is("tls", 2))
		bench_tls(words[1]);
	else if (is("tcp", 2))
		bench_tcp(&server, (uint32_t)number(1));
	else if (is("stream", 2))
		bench_stream(&server, number(1) * MIB);
	else if (is("uffd", 2))
		bench_uffd((uint32_t)number(1));
	else if (is("copy", 3))
		bench_copy((uint32_t)number(1), number(2) * MIB);
	else if (is("wire", 2))
		bench_wire_demand(&server, (uint32_t)number(1));
	else if (is("wire-bulk", 2))
		bench_wire_bulk(&server, number(1) * MIB);
	else if (is("demand", 6))
		demand();
	else if (is("bulk", 2))
		bench_bulk(&server, (uint32_t)number(1));
	else
		CHECK(!"a command");
	printf("}\n");
	fflush(stdout);
}

static bool own_network(void)
{
	struct ifreq request = {.ifr_name = "lo", .ifr_flags = IFF_UP};

	if (unshare(CLONE_NEWNET) != 0)
		return false;
	const int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	CHECK_EQ(ioctl(fd, SIOCSIFFLAGS, &request), 0);
	close(fd);
	return true;
}

int main(void)
{
	char line[256];

	printf("{\"own_network\":%s}\n", own_network() ? "true" : "false");
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin)) {
		char *rest;

		word_count = 0;
		for (char *word = strtok_r(line, " \n", &rest); word && word_count < WORD_COUNT_MAX;
		     word = strtok_r(NULL, " \n", &rest))
			words[word_count++] = word;
		if (word_count > 0)
			obey();
	}
	bench_server_stop(&server);
	return EXIT_SUCCESS;
}
