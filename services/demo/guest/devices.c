// SPDX-License-Identifier: Apache-2.0
/*
 * The guest's devices at work: a disk written and read back, a peer pinged.
 *
 * Threads	None; each runs in a process of its own, so that neither waits for the other.
 * Errors	Counted and reported on the console, never fatal.
 * Ownership	Everything lives until the guest is switched off.
 * Units	Blocks are 64 KiB, made of 16 checkable pages. Times in ns.
 * Source	RFC 792 (echo), open(2) on O_DIRECT.
 */
#define _GNU_SOURCE
#include "guest.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/ip.h>
#include <netinet/ip_icmp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
	DISK_BLOCK_BYTES = 65536,
	DISK_PERIOD_NS = 10000000,
	DISK_ROUNDS_PER_FLUSH = 64,
	NET_PERIOD_NS = 100000000,
	NET_TIMEOUT_MS = 500,
	REPORT_NS = 500000000,
	PING_ID = 0x4757,
};

static void disk_round(int fd, uint32_t *written, uint64_t *block, uint64_t slot,
		       uint32_t generation, uint64_t *ret_bad, uint64_t *ret_errors)
{
	off_t offset = (off_t)slot * DISK_BLOCK_BYTES;
	uint64_t pages = DISK_BLOCK_BYTES / PAGE_BYTES;

	/* Before the write: what an earlier round left, perhaps on another node. After it: itself. */
	for (int pass = 0; pass < 2; pass++) {
		bool wrong = false;

		if (written[slot]) {
			if (pread(fd, block, DISK_BLOCK_BYTES, offset) != DISK_BLOCK_BYTES)
				++*ret_errors;
			for (uint64_t i = 0; i < pages; i++)
				wrong |= !page_holds(block + i * PAGE_WORDS, slot * pages + i,
						     written[slot]);
			*ret_bad += wrong;
		}
		if (pass == 1)
			break;
		for (uint64_t i = 0; i < pages; i++)
			page_fill(block + i * PAGE_WORDS, slot * pages + i, generation);
		if (pwrite(fd, block, DISK_BLOCK_BYTES, offset) != DISK_BLOCK_BYTES)
			++*ret_errors;
		if (generation % DISK_ROUNDS_PER_FLUSH == 0 && fdatasync(fd) != 0)
			++*ret_errors;
		written[slot] = generation;
		/* The read must not be satisfied by what the write left in this buffer. */
		memset(block, 0, DISK_BLOCK_BYTES);
	}
}

void disk_run(const char *name)
{
	char path[64];
	int fd;
	off_t size;
	uint64_t bad = 0, errors = 0, random = 0x6469736b;
	int64_t reported = now_ns();

	snprintf(path, sizeof(path), "/dev/%s", name);
	fd = open(path, O_RDWR | O_DIRECT | O_CLOEXEC);
	size = fd < 0 ? 0 : lseek(fd, 0, SEEK_END);
	if (size < DISK_BLOCK_BYTES) {
		say("INIT no disk %s: %s\n", path, strerror(errno));
		return;
	}

	uint64_t slots = (uint64_t)size / DISK_BLOCK_BYTES;
	uint32_t *written = calloc(slots, sizeof(*written));
	uint64_t *block = aligned_alloc(PAGE_BYTES, DISK_BLOCK_BYTES);

	if (!written || !block) {
		free(written);
		free(block);
		return;
	}
	say("DISK n=0 bad=0 err=0\n");
	for (uint32_t n = 1;; n++) {
		int64_t start = now_ns();

		disk_round(fd, written, block, random_next(&random) % slots, n, &bad, &errors);
		if (start - reported >= REPORT_NS) {
			reported = start;
			say("DISK n=%u bad=%lu err=%lu\n", n, bad, errors);
		}
		sleep_until(start + DISK_PERIOD_NS);
	}
}

static uint16_t icmp_checksum(const struct icmphdr *message)
{
	uint16_t words[sizeof(*message) / 2];
	uint32_t sum = 0;

	memcpy(words, message, sizeof(words));
	for (size_t i = 0; i < sizeof(words) / 2; i++)
		sum += words[i];
	sum = (sum >> 16) + (sum & 0xffff);
	return (uint16_t) ~(sum + (sum >> 16));
}

static bool net_ping(int fd, const struct sockaddr_in *peer, uint16_t sequence)
{
	struct icmphdr request = {.type = ICMP_ECHO};
	int64_t deadline = now_ns() + NET_TIMEOUT_MS * 1000000L;

	request.un.echo.id = htons(PING_ID);
	request.un.echo.sequence = htons(sequence);
	request.checksum = icmp_checksum(&request);
	if (sendto(fd, &request, sizeof(request), 0, (const struct sockaddr *)peer,
		   sizeof(*peer)) != sizeof(request))
		return false;
	for (;;) {
		struct pollfd waiting = {.fd = fd, .events = POLLIN};
		int64_t left_ms = (deadline - now_ns()) / 1000000;
		unsigned char packet[256];
		struct icmphdr reply;
		ssize_t length;

		if (left_ms <= 0 || poll(&waiting, 1, (int)left_ms) <= 0)
			return false;
		length = recv(fd, packet, sizeof(packet), 0);
		if (length < (ssize_t)(sizeof(struct iphdr) + sizeof(reply)))
			continue;
		memcpy(&reply, packet + (size_t)(packet[0] & 15) * 4, sizeof(reply));
		if (reply.type == ICMP_ECHOREPLY && reply.un.echo.id == request.un.echo.id &&
		    reply.un.echo.sequence == request.un.echo.sequence)
			return true;
	}
}

void net_run(const char *address)
{
	struct sockaddr_in peer = {.sin_family = AF_INET};
	int fd = socket(AF_INET, SOCK_RAW | SOCK_CLOEXEC, IPPROTO_ICMP);
	uint64_t answered = 0;
	int64_t reported = now_ns();

	if (fd < 0 || inet_pton(AF_INET, address, &peer.sin_addr) != 1) {
		say("INIT no ping to %s\n", address);
		return;
	}
	for (uint64_t sent = 1;; sent++) {
		int64_t start = now_ns();

		answered += net_ping(fd, &peer, (uint16_t)sent);
		if (start - reported >= REPORT_NS) {
			reported = start;
			say("NET sent=%lu ok=%lu lost=%lu\n", sent, answered, sent - answered);
		}
		sleep_until(start + NET_PERIOD_NS);
	}
}
