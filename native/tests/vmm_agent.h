/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vmm_agent.h - the other side of vmm.h, small: an agent written from docs/exit-channel.md alone, and
 * a VMM's memory around the library.
 *
 * Threads: an agent is one thread's; publish and take may be different ones.
 * Errors: a failed check ends the process.
 * Ownership: rigs and agents belong to the test. The agent calls libc, not sys.h: what a test fails
 *            there is the library's.
 * Units: pages of 4096.
 * Source: docs/exit-channel.md.
 */
#ifndef GODWIT_TESTS_VMM_AGENT_H
#define GODWIT_TESTS_VMM_AGENT_H

#include "guest.h"

#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <semaphore.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/un.h>

#include <godwit/exit_channel.h>
#include <godwit/vmm.h>

#include "vmm_internal.h"

#define DEADLINE_MS 60000
#define GPA_BASE    UINT64_C(0x100000000)

/* --- the VMM ---------------------------------------------------------------------------------- */

struct rig {
	char dir[64];
	char path[100];
	int ram_fd;
	uint64_t page_count;
	uint8_t *window;
	uint8_t *guest; /* the same as window for some backends */
	struct gw_vmm_region regions[2];
	struct gw_vmm_config config;
	struct gw_vmm *vmm;
	sem_t completed;
	_Atomic uint32_t complete_count;
};

static inline void rig_on_complete(void *opaque)
{
	struct rig *const rig = opaque;

	atomic_fetch_add(&rig->complete_count, 1);
	CHECK_EQ(sem_post(&rig->completed), 0);
}

/* Everything but the library: two regions, the second half of the image above GPA_BASE. */
static inline void rig_prepare(struct rig *rig, enum gw_vmm_backend backend, uint64_t page_count,
			       uint32_t vcpu_count)
{
	const bool twice = backend == GW_VMM_EXIT_EMULATION || backend == GW_VMM_EXIT_SIGSEGV;
	const uint64_t half = page_count / 2 * PAGE;

	memset(rig, 0, sizeof(*rig));
	(void)snprintf(rig->dir, sizeof(rig->dir), "/tmp/godwit-test-vmm-XXXXXX");
	CHECK(mkdtemp(rig->dir));
	(void)snprintf(rig->path, sizeof(rig->path), "%s/agent", rig->dir);
	rig->page_count = page_count;
	rig->ram_fd = memfd_create("rig", MFD_CLOEXEC);
	CHECK(rig->ram_fd >= 0);
	CHECK_EQ(ftruncate(rig->ram_fd, (off_t)(page_count * PAGE)), 0);
	rig->window =
		mmap(NULL, page_count * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, rig->ram_fd, 0);
	CHECK(rig->window != MAP_FAILED);
	rig->guest = twice ? mmap(NULL, page_count * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED,
				  rig->ram_fd, 0)
			   : rig->window;
	CHECK(rig->guest != MAP_FAILED);
	for (uint32_t i = 0; i < 2; i++)
		rig->regions[i] = (struct gw_vmm_region){
			.gpa = i * GPA_BASE,
			.len = i == 0 ? half : page_count * PAGE - half,
			.offset = i * half,
			.host_addr = (uintptr_t)rig->window + i * half,
			.guest_addr = (uintptr_t)rig->guest + i * half,
		};
	CHECK_EQ(sem_init(&rig->completed, 0, 0), 0);
	rig->config = (struct gw_vmm_config){
		.struct_size = sizeof(struct gw_vmm_config),
		.page_size = PAGE,
		.vcpu_count = vcpu_count,
		.backend = backend,
		.uffd_count = 1,
		.ram_fd = rig->ram_fd,
		.vmm_name = "rig",
		.why = "a \"test\"\n",
		.regions = rig->regions,
		.region_count = 2,
		.on_complete = rig_on_complete,
		.opaque = rig,
	};
}

static inline void rig_create(struct rig *rig, enum gw_vmm_backend backend, uint64_t page_count,
			      uint32_t vcpu_count)
{
	rig_prepare(rig, backend, page_count, vcpu_count);
	CHECK_EQ(gw_vmm_create(&rig->config, &rig->vmm), 0);
	/* No wake that was lost is made up for: it hangs the test instead. */
	rig->vmm->wait_ns_max = 0;
}

static inline void rig_destroy(struct rig *rig)
{
	gw_vmm_destroy(rig->vmm);
	if (rig->guest != rig->window)
		CHECK_EQ(munmap(rig->guest, rig->page_count * PAGE), 0);
	CHECK_EQ(munmap(rig->window, rig->page_count * PAGE), 0);
	CHECK_EQ(close(rig->ram_fd), 0);
	(void)unlink(rig->path);
	CHECK_EQ(rmdir(rig->dir), 0);
	CHECK_EQ(sem_destroy(&rig->completed), 0);
}

static inline uint64_t rig_gpa(const struct rig *rig, uint64_t page)
{
	const uint64_t half = rig->page_count / 2;

	return page < half ? page * PAGE : GPA_BASE + (page - half) * PAGE;
}

static inline int rig_fault(const struct rig *rig, uint32_t vcpu, uint64_t page)
{
	const uint64_t gpa = rig_gpa(rig, page) + 8;

	return gw_vmm_fault(rig->vmm, vcpu, &gpa, 1, GW_EXIT_WRITE);
}

/* A vCPU's thread that faults on some pages. */
struct faulter {
	pthread_t thread;
	const struct rig *rig;
	uint32_t vcpu;
	uint64_t gpas[GW_EXIT_WAIT_COUNT];
	uint32_t count;
	int result;
};

static inline void *faulter_main(void *argument)
{
	struct faulter *const faulter = argument;

	faulter->result = gw_vmm_fault(faulter->rig->vmm, faulter->vcpu, faulter->gpas,
				       faulter->count, GW_EXIT_WRITE);
	return NULL;
}

static inline void faulter_start(struct faulter *faulter, const struct rig *rig, uint32_t vcpu,
				 uint64_t page, uint32_t count)
{
	faulter->rig = rig;
	faulter->vcpu = vcpu;
	faulter->count = count;
	for (uint32_t i = 0; i < count; i++)
		faulter->gpas[i] = rig_gpa(rig, page + i);
	CHECK_EQ(pthread_create(&faulter->thread, NULL, faulter_main, faulter), 0);
}

static inline int faulter_join(struct faulter *faulter)
{
	CHECK_EQ(pthread_join(faulter->thread, NULL), 0);
	return faulter->result;
}

/* --- the agent -------------------------------------------------------------------------------- */

struct agent {
	int listen_fd;
	int fd;
	char message[GW_VMM_MESSAGE_LEN_MAX];
	size_t message_len;
	int fds[GW_VMM_FD_COUNT_MAX];
	uint32_t fd_count;
	int memory_fd;
	int channel_fd;
	int doorbell_fd;
	int uffds[GW_VMM_UFFD_COUNT_MAX];
	uint32_t uffd_count;
	struct gw_exit_header *header;
	size_t channel_len;
	_Atomic uint64_t *words;
	struct gw_exit_vcpu *rings;
};

static inline void agent_listen(struct agent *agent, const char *path)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};

	memset(agent, 0, sizeof(*agent));
	agent->fd = -1;
	(void)snprintf(address.sun_path, sizeof(address.sun_path), "%s", path);
	agent->listen_fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	CHECK(agent->listen_fd >= 0);
	(void)unlink(path);
	CHECK_EQ(bind(agent->listen_fd, (struct sockaddr *)&address, sizeof(address)), 0);
	CHECK_EQ(listen(agent->listen_fd, 4), 0);
}

static inline void agent_wait_readable(int fd)
{
	struct pollfd poll_fd = {.fd = fd, .events = POLLIN};

	CHECK_EQ(poll(&poll_fd, 1, DEADLINE_MS), 1);
}

static inline void agent_take_fds(struct agent *agent, struct msghdr *header)
{
	struct cmsghdr *const control = CMSG_FIRSTHDR(header);

	CHECK((header->msg_flags & MSG_CTRUNC) == 0);
	if (!control)
		return;
	CHECK_EQ(control->cmsg_type, SCM_RIGHTS);
	CHECK_EQ(agent->fd_count, 0); /* with one message */
	agent->fd_count = (uint32_t)((control->cmsg_len - CMSG_LEN(0)) / sizeof(int));
	memcpy(agent->fds, CMSG_DATA(control), agent->fd_count * sizeof(int));
}

/* Up to and with the newline; what is behind it stays in the socket. */
static inline void agent_read_message(struct agent *agent)
{
	do {
		struct iovec iov = {.iov_base = agent->message + agent->message_len, .iov_len = 1};
		union {
			struct cmsghdr header;
			char room[CMSG_SPACE(GW_VMM_FD_COUNT_MAX * sizeof(int))];
		} control;
		struct msghdr header = {
			.msg_iov = &iov,
			.msg_iovlen = 1,
			.msg_control = &control,
			.msg_controllen = sizeof(control),
		};

		agent_wait_readable(agent->fd);
		CHECK_EQ(recvmsg(agent->fd, &header, MSG_CMSG_CLOEXEC), 1);
		agent_take_fds(agent, &header);
		CHECK(agent->message_len < sizeof(agent->message) - 1);
	} while (agent->message[agent->message_len++] != '\n');
	agent->message[agent->message_len] = '\0';
}

static inline void agent_map_channel(struct agent *agent)
{
	struct stat stat;

	CHECK_EQ(fstat(agent->channel_fd, &stat), 0);
	CHECK_EQ(fcntl(agent->channel_fd, F_GET_SEALS), F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
	agent->channel_len = (size_t)stat.st_size;
	void *const at = mmap(NULL, agent->channel_len, PROT_READ | PROT_WRITE, MAP_SHARED,
			      agent->channel_fd, 0);

	CHECK(at != MAP_FAILED);
	agent->header = at;
	CHECK_EQ(agent->header->magic, GW_EXIT_MAGIC);
	CHECK_EQ(agent->header->version, 1);
	CHECK_EQ(agent->header->header_len, 4096);
	CHECK_EQ(agent->header->total_len, stat.st_size);
	CHECK_EQ(agent->header->page_size, 4096);
	CHECK_EQ(agent->header->bitmap_offset % 4096, 0);
	CHECK_EQ(agent->header->vcpus_offset % 4096, 0);
	agent->words = (_Atomic uint64_t *)(void *)((char *)at + agent->header->bitmap_offset);
	agent->rings = (struct gw_exit_vcpu *)(void *)((char *)at + agent->header->vcpus_offset);
}

/* What each descriptor is, says the message's "fds", in order. */
static inline void agent_sort_fds(struct agent *agent)
{
	const char *at = strstr(agent->message, "\"fds\": [");
	uint32_t i = 0;

	CHECK(at);
	agent->channel_fd = -1;
	for (at = strchr(at, '['); *at != ']'; i++) {
		const char *const name = strchr(at, '"') + 1;

		CHECK(i < agent->fd_count);
		if (strncmp(name, "memory\"", 7) == 0)
			agent->memory_fd = agent->fds[i];
		else if (strncmp(name, "channel\"", 8) == 0)
			agent->channel_fd = agent->fds[i];
		else if (strncmp(name, "doorbell\"", 9) == 0)
			agent->doorbell_fd = agent->fds[i];
		else if (strncmp(name, "uffd\"", 5) == 0)
			agent->uffds[agent->uffd_count++] = agent->fds[i];
		else
			CHECK(!"a descriptor of the protocol");
		at = strchr(name, '"') + 1;
	}
	CHECK_EQ(i, agent->fd_count);
}

static inline void agent_accept(struct agent *agent)
{
	agent_wait_readable(agent->listen_fd);
	agent->fd = accept4(agent->listen_fd, NULL, NULL, SOCK_CLOEXEC);
	CHECK(agent->fd >= 0);
	agent->message_len = 0;
	agent->fd_count = 0;
	agent->uffd_count = 0;
	agent_read_message(agent);
	agent_sort_fds(agent);
	if (agent->channel_fd >= 0)
		agent_map_channel(agent);
}

/* As an agent's death does. The listening socket stays. */
static inline void agent_hang_up(struct agent *agent)
{
	if (agent->fd < 0)
		return;
	if (agent->channel_fd >= 0)
		CHECK_EQ(munmap(agent->header, agent->channel_len), 0);
	for (uint32_t i = 0; i < agent->fd_count; i++)
		CHECK_EQ(close(agent->fds[i]), 0);
	CHECK_EQ(close(agent->fd), 0);
	agent->fd = -1;
}

static inline void agent_close(struct agent *agent)
{
	agent_hang_up(agent);
	CHECK_EQ(close(agent->listen_fd), 0);
}

static inline void agent_say(const struct agent *agent, const char *line)
{
	CHECK_EQ(send(agent->fd, line, strlen(line), MSG_NOSIGNAL), (ssize_t)strlen(line));
}

static inline void agent_expect(const struct agent *agent, const char *line)
{
	char got[128] = {0};
	size_t len = 0;

	while (len < strlen(line)) {
		agent_wait_readable(agent->fd);
		const ssize_t part = recv(agent->fd, got + len, strlen(line) - len, 0);

		CHECK(part > 0);
		len += (size_t)part;
	}
	CHECK(strcmp(got, line) == 0);
}

/* The next request of a ring; it must come. */
static inline struct gw_exit_request agent_take(const struct agent *agent, uint32_t vcpu)
{
	struct gw_exit_vcpu *const ring = &agent->rings[vcpu];
	const uint32_t tail = atomic_load(&ring->request_tail);

	/* Bounded by the child's alarm. */
	while (atomic_load_explicit(&ring->request_head, memory_order_acquire) == tail)
		(void)sched_yield();
	const struct gw_exit_request request = ring->requests[tail % GW_EXIT_REQUEST_COUNT];

	atomic_store_explicit(&ring->request_tail, tail + 1, memory_order_release);
	return request;
}

static inline uint32_t agent_untaken(const struct agent *agent, uint32_t vcpu)
{
	return atomic_load(&agent->rings[vcpu].request_head) -
	       atomic_load(&agent->rings[vcpu].request_tail);
}

static inline long agent_futex_wake(const struct agent *agent, uint32_t vcpu)
{
	return syscall(SYS_futex, &agent->rings[vcpu].wake_count, FUTEX_WAKE, INT_MAX, NULL, NULL,
		       0);
}

/* The vCPU is in the kernel. Wakes it for that, for nothing: it looks, and sleeps again. */
static inline void agent_wait_asleep(const struct agent *agent, uint32_t vcpu)
{
	while (agent_futex_wake(agent, vcpu) == 0)
		(void)sched_yield();
}

static inline bool agent_is_waited_for(const struct gw_exit_vcpu *ring, uint64_t page)
{
	if (atomic_load(&ring->waiting) == 0)
		return false;
	for (uint32_t i = 0; i < GW_EXIT_WAIT_COUNT; i++)
		if (atomic_load(&ring->wait_pages[i]) == page)
			return true;
	return false;
}

/* Section 3, the agent's step 4; the fences are sequentially consistent operations. */
static inline void agent_publish(const struct agent *agent, uint64_t page)
{
	atomic_fetch_and(&agent->words[page / 64], ~(UINT64_C(1) << (page % 64)));
	for (uint32_t i = 0; i < agent->header->vcpu_count; i++)
		if (agent_is_waited_for(&agent->rings[i], page)) {
			atomic_fetch_add(&agent->rings[i].wake_count, 1);
			(void)agent_futex_wake(agent, i);
		}
}

static inline void agent_publish_all(const struct agent *agent)
{
	for (uint64_t page = 0; page < agent->header->page_count; page++)
		agent_publish(agent, page);
}

static inline void agent_repost(const struct agent *agent)
{
	atomic_fetch_add(&agent->header->repost_count, 1);
	for (uint32_t i = 0; i < agent->header->vcpu_count; i++) {
		atomic_fetch_add(&agent->rings[i].wake_count, 1);
		(void)agent_futex_wake(agent, i);
	}
}

/* Content by the memory file; what exit-sigsegv does. */
static inline void agent_write_page(const struct agent *agent, uint64_t page)
{
	uint8_t bytes[PAGE];

	guest_pattern(page, bytes);
	CHECK_EQ(pwrite(agent->memory_fd, bytes, PAGE, (off_t)(page * PAGE)), (ssize_t)PAGE);
}

/* Number `index` (from 0) that follows `name` in the message. */
static inline uint64_t agent_number(const struct agent *agent, const char *name, uint32_t index)
{
	char wanted[64];
	const char *at = agent->message;

	(void)snprintf(wanted, sizeof(wanted), "\"%s\": ", name);
	for (uint32_t i = 0; i <= index; i++) {
		at = strstr(at, wanted);
		CHECK(at);
		at += strlen(wanted);
	}
	return strtoull(at, NULL, 10);
}

static inline uint32_t agent_mapping_count(const struct agent *agent)
{
	uint32_t count = 0;

	for (const char *at = agent->message; (at = strstr(at, "base_host_virt_addr")); at++)
		count++;
	return count;
}

/* Content by the userfaultfd that the message names for the page. Wakes who blocks. */
static inline void agent_copy_page(const struct agent *agent, uint64_t page)
{
	uint8_t bytes[PAGE];

	guest_pattern(page, bytes);
	for (uint32_t i = 0; i < agent_mapping_count(agent); i++) {
		const uint64_t offset = agent_number(agent, "offset", i);
		struct uffdio_copy copy = {
			.dst = agent_number(agent, "base_host_virt_addr", i) + page * PAGE - offset,
			.src = (uintptr_t)bytes,
			.len = PAGE,
		};

		if (page * PAGE - offset >= agent_number(agent, "size", i))
			continue;
		CHECK_EQ(ioctl(agent->uffds[agent_number(agent, "uffd", i)], UFFDIO_COPY, &copy),
			 0);
		return;
	}
	CHECK(!"the page is in a mapping");
}

/* --- both ------------------------------------------------------------------------------------- */

static inline void rig_connect(struct rig *rig, struct agent *agent)
{
	agent_listen(agent, rig->path);
	CHECK_EQ(gw_vmm_connect(rig->vmm, rig->path), 0);
	agent_accept(agent);
}

static inline void rig_wait_complete(struct rig *rig)
{
	struct timespec until;

	CHECK_EQ(clock_gettime(CLOCK_REALTIME, &until), 0);
	until.tv_sec += DEADLINE_MS / 1000;
	CHECK_EQ(sem_timedwait(&rig->completed, &until), 0);
}

static inline int open_fd_count(void)
{
	int count = 0;

	for (int fd = 0; fd < 256; fd++)
		count += fcntl(fd, F_GETFD) >= 0;
	return count;
}

#endif
