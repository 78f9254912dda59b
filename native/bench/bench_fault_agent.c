/* SPDX-License-Identifier: Apache-2.0 */
/*
 * bench_fault_agent.c - the least that can answer a VMM's faults: takes one hand-off
 * (docs/exit-channel.md), copies each page that is asked for out of a file on the same machine, and
 * goes when the VMM does. No network, no page states: what is left is the price of the mechanism.
 *
 *   bench_fault_agent SOCKET SOURCE_FILE [SPIN_US]
 *
 * One thread a userfaultfd, one for the exit channel. tests/bench/faults.py drives it.
 */
#include "check.h"

#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <godwit/exits.h>
#include <godwit/sys.h>
#include <godwit/uffd.h>

#define PAGE		  4096ul
#define FD_COUNT_MAX	  24
#define MAPPING_COUNT_MAX 64
#define MESSAGE_LEN_MAX	  65536
#define EVENT_COUNT	  16u
#define REQUEST_COUNT	  16u
#define NS_PER_US	  1000u

struct mapping {
	uint64_t host_addr, len, offset;
	int uffd; /* -1: none, written to the file */
};

struct agent {
	const uint8_t *source;
	uint64_t len;
	int memory_fd, channel_fd, doorbell_fd;
	uint32_t uffd_count;
	int uffds[FD_COUNT_MAX];
	uint32_t mapping_count;
	struct mapping mappings[MAPPING_COUNT_MAX];
	struct gw_bitmap own;
	struct gw_exits *exits;
	uint64_t spin_ns;
};

struct uffd_thread {
	struct agent *agent;
	int uffd;
};

/* --- the hand-off ------------------------------------------------------------------------------ */

static uint64_t number_after(const char *text, const char *name)
{
	const char *const at = strstr(text, name);

	CHECK(at);
	return strtoull(at + strlen(name) + strspn(at + strlen(name), "\": "), NULL, 10);
}

static void read_fds(struct agent *agent, const char *text, const int *fds)
{
	const char *at = strstr(text, "\"fds\"");

	CHECK(at);
	at = strchr(at, '[') + 1;
	for (int i = 0; *at != ']'; i++) {
		at += strspn(at, ", ");
		if (strncmp(at, "\"memory\"", 8) == 0)
			agent->memory_fd = fds[i];
		else if (strncmp(at, "\"channel\"", 9) == 0)
			agent->channel_fd = fds[i];
		else if (strncmp(at, "\"doorbell\"", 10) == 0)
			agent->doorbell_fd = fds[i];
		else
			agent->uffds[agent->uffd_count++] = fds[i];
		at = strchr(at + 1, '"') + 1;
	}
}

static void read_mappings(struct agent *agent, const char *text)
{
	const char *at = strstr(text, "\"mappings\"");

	CHECK(at);
	while ((at = strchr(at, '{'))) {
		char one[512];
		struct mapping *const mapping = &agent->mappings[agent->mapping_count++];
		const size_t len = strcspn(at, "}");

		CHECK(agent->mapping_count <= MAPPING_COUNT_MAX && len < sizeof(one));
		memcpy(one, at, len);
		one[len] = '\0';
		mapping->host_addr = number_after(one, "base_host_virt_addr");
		mapping->len = number_after(one, "\"size\"");
		mapping->offset = number_after(one, "\"offset\"");
		mapping->uffd =
			strstr(one, "\"uffd\"") ? agent->uffds[number_after(one, "\"uffd\"")] : -1;
		at += len;
	}
}

static int receive(struct agent *agent, const char *path)
{
	static char text[MESSAGE_LEN_MAX];
	char control[CMSG_SPACE(FD_COUNT_MAX * sizeof(int))];
	struct iovec iov = {.iov_base = text, .iov_len = sizeof(text) - 1};
	struct msghdr message = {
		.msg_iov = &iov,
		.msg_iovlen = 1,
		.msg_control = control,
		.msg_controllen = sizeof(control),
	};
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int fds[FD_COUNT_MAX];
	const int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	snprintf(address.sun_path, sizeof(address.sun_path), "%s", path);
	CHECK_EQ(bind(listener, (struct sockaddr *)&address, sizeof(address)), 0);
	CHECK_EQ(listen(listener, 1), 0);
	puts("listening");
	fflush(stdout);
	const int connection = accept4(listener, NULL, NULL, SOCK_CLOEXEC);

	CHECK(connection >= 0);
	const ssize_t len = recvmsg(connection, &message, MSG_CMSG_CLOEXEC);

	CHECK(len > 0 && text[len - 1] == '\n');
	text[len] = '\0';
	struct cmsghdr *const header = CMSG_FIRSTHDR(&message);

	CHECK(header && header->cmsg_type == SCM_RIGHTS);
	memcpy(fds, CMSG_DATA(header), header->cmsg_len - CMSG_LEN(0));
	read_fds(agent, text, fds);
	read_mappings(agent, text);
	return connection;
}

/* --- answers ------------------------------------------------------------------------------------ */

static void install(struct agent *agent, const struct mapping *mapping, uint64_t page)
{
	const uint64_t offset = page * PAGE;
	uint64_t done = 0;

	if (mapping->uffd < 0) {
		if (gw_bitmap_is_absent(&agent->own, page))
			CHECK_EQ(pwrite(agent->memory_fd, agent->source + offset, PAGE,
					(off_t)offset),
				 PAGE);
	} else {
		const uint64_t address = mapping->host_addr + offset - mapping->offset;
		const int outcome =
			gw_uffd_copy(mapping->uffd, address, agent->source + offset, PAGE, &done);

		CHECK(outcome == GW_UFFD_DONE || outcome == GW_UFFD_EXISTS);
		CHECK_EQ(gw_uffd_wake(mapping->uffd, address, PAGE), 0);
	}
	(void)gw_bitmap_publish(&agent->own, page, 1);
	if (agent->exits)
		gw_exits_publish(agent->exits, page, 1);
}

static void install_page(struct agent *agent, uint64_t page)
{
	for (uint32_t i = 0; i < agent->mapping_count; i++)
		if (page * PAGE - agent->mappings[i].offset < agent->mappings[i].len)
			install(agent, &agent->mappings[i], page);
}

static void *uffd_main(void *argument)
{
	const struct uffd_thread *const thread = argument;
	struct agent *const agent = thread->agent;
	struct pollfd poll_fd = {.fd = thread->uffd, .events = POLLIN};
	struct uffd_msg events[EVENT_COUNT];

	for (;;) {
		CHECK(gw_sys_poll(&poll_fd, 1, -1) >= 0);
		const int count = gw_uffd_read(thread->uffd, events, EVENT_COUNT);

		CHECK(count >= 0);
		for (int i = 0; i < count; i++) {
			const uint64_t address = events[i].arg.pagefault.address;

			for (uint32_t j = 0; j < agent->mapping_count; j++) {
				const struct mapping *const mapping = &agent->mappings[j];
				const uint64_t distance = address - mapping->host_addr;

				if (distance < mapping->len)
					install(agent, mapping,
						(mapping->offset + distance) / PAGE);
			}
		}
	}
	return NULL;
}

/* Requests, looking for a while before it sleeps. */
static uint32_t take(struct agent *agent, struct gw_exit_request *ret_requests)
{
	struct pollfd poll_fd = {.fd = agent->doorbell_fd, .events = POLLIN};
	const uint64_t start_ns = gw_sys_now_ns();
	uint64_t rings;
	uint32_t count;

	do {
		count = gw_exits_take(agent->exits, ret_requests, REQUEST_COUNT);
	} while (count == 0 && gw_sys_now_ns() - start_ns < agent->spin_ns);
	if (count > 0 || !gw_exits_sleep(agent->exits))
		return count;
	CHECK(gw_sys_poll(&poll_fd, 1, -1) >= 0);
	gw_exits_awake(agent->exits);
	(void)gw_sys_read(agent->doorbell_fd, &rings, sizeof(rings));
	return 0;
}

static void *exits_main(void *argument)
{
	struct agent *const agent = argument;
	struct gw_exit_request requests[REQUEST_COUNT];

	for (;;) {
		const uint32_t count = take(agent, requests);

		for (uint32_t i = 0; i < count; i++)
			install_page(agent, requests[i].page);
	}
	return NULL;
}

int main(int argc, char **argv)
{
	static struct agent agent = {.memory_fd = -1, .channel_fd = -1, .doorbell_fd = -1};
	static struct uffd_thread threads[FD_COUNT_MAX];
	struct stat stat;
	pthread_t thread;
	char byte;

	CHECK(argc == 3 || argc == 4);
	const int source_fd = open(argv[2], O_RDONLY | O_CLOEXEC);

	CHECK_EQ(fstat(source_fd, &stat), 0);
	agent.len = (uint64_t)stat.st_size;
	agent.source = mmap(NULL, agent.len, PROT_READ, MAP_SHARED | MAP_POPULATE, source_fd, 0);
	CHECK(agent.source != MAP_FAILED);
	agent.spin_ns = argc == 4 ? strtoull(argv[3], NULL, 10) * NS_PER_US : 0;
	const int connection = receive(&agent, argv[1]);
	void *const words = calloc(1, gw_bitmap_len(agent.len / PAGE));

	CHECK(words);
	gw_bitmap_init(&agent.own, words, agent.len / PAGE);
	gw_bitmap_mark_absent(&agent.own, 0, agent.len / PAGE);
	if (agent.channel_fd >= 0)
		CHECK_EQ(gw_exits_attach(agent.channel_fd, PAGE, &agent.own, &agent.exits), 0);
	for (uint32_t i = 0; i < agent.uffd_count; i++) {
		threads[i] = (struct uffd_thread){.agent = &agent, .uffd = agent.uffds[i]};
		CHECK_EQ(pthread_create(&thread, NULL, uffd_main, &threads[i]), 0);
	}
	if (agent.exits)
		CHECK_EQ(pthread_create(&thread, NULL, exits_main, &agent), 0);
	/* Until the VMM goes. */
	while (recv(connection, &byte, 1, 0) > 0)
		;
	return 0;
}
