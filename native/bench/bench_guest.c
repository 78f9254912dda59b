/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The guest of a benchmark: a process with absent memory and threads that touch it, as vCPUs would.
 * Each touch is timed from inside, so that the wake-up counts; and looked at: a wrong page ends
 * the run. See bench.h.
 */
#include "bench.h"

#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <godwit/sys.h>
#include <godwit/uffd.h>

/* A prime: multiplied by it, page numbers jump about and each comes once. */
#define JUMP 2654435761ul

struct toucher {
	pthread_t thread;
	struct bench_share *share;
	const uint8_t *memory;
	uint64_t page_count;
	uint32_t index;
};

static uint64_t page_of(const struct toucher *toucher, uint64_t i)
{
	const struct bench_touches *const touches = &toucher->share->touches;

	if (touches->in_order)
		return toucher->page_count / touches->thread_count * toucher->index + i;
	return (i * touches->thread_count + toucher->index + 1) * JUMP % toucher->page_count;
}

static bool is_present(const uint8_t *page)
{
	unsigned char residency = 0;

	CHECK_EQ(mincore((void *)(uintptr_t)page, PAGE, &residency), 0);
	return residency & 1;
}

static void *toucher_main(void *argument)
{
	const struct toucher *const toucher = argument;
	struct bench_share *const share = toucher->share;
	const struct bench_touches *const touches = &share->touches;
	const uint64_t turn_count = toucher->page_count / touches->thread_count;
	uint64_t *const samples = share->samples[toucher->index];
	uint32_t count = 0;

	for (uint64_t i = 0; i < turn_count && count < touches->count; i++) {
		const uint64_t page = page_of(toucher, i);
		const uint8_t *const at = toucher->memory + page * PAGE;

		if (touches->skip_present && is_present(at))
			continue;
		const uint64_t begin_ns = gw_sys_now_ns();
		const uint64_t word = *(const volatile uint64_t *)(const void *)at;

		samples[count++] = gw_sys_now_ns() - begin_ns;
		if (word != bench_page_word(share->kind, page))
			atomic_fetch_add(&share->error_count, 1);
		if (touches->think_ns)
			(void)nanosleep(&(struct timespec){.tv_nsec = (long)touches->think_ns},
					NULL);
	}
	share->sample_count[toucher->index] = count;
	return NULL;
}

static void touch(struct bench_share *share, const uint8_t *memory, uint64_t page_count)
{
	struct toucher touchers[BENCH_THREAD_MAX];

	share->begin_ns = gw_sys_now_ns();
	for (uint32_t i = 0; i < share->touches.thread_count; i++) {
		touchers[i] = (struct toucher){
			.share = share, .memory = memory, .page_count = page_count, .index = i};
		CHECK_EQ(pthread_create(&touchers[i].thread, NULL, toucher_main, &touchers[i]), 0);
	}
	for (uint32_t i = 0; i < share->touches.thread_count; i++)
		CHECK_EQ(pthread_join(touchers[i].thread, NULL), 0);
	share->end_ns = gw_sys_now_ns();
	atomic_store(&share->running, 0);
}

/* --- one message with the address and the userfaultfd ------------------------------------------- */

struct hand_off {
	struct msghdr message;
	struct iovec iov;
	_Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(int))];
};

static struct msghdr *hand_off_init(struct hand_off *hand_off, uint64_t *address)
{
	*hand_off = (struct hand_off){.iov = {.iov_base = address, .iov_len = sizeof(*address)}};
	hand_off->message = (struct msghdr){.msg_iov = &hand_off->iov,
					    .msg_iovlen = 1,
					    .msg_control = hand_off->control,
					    .msg_controllen = sizeof(hand_off->control)};
	return &hand_off->message;
}

static void give_uffd(int socket_fd, int uffd, uint64_t address)
{
	struct hand_off hand_off;
	struct msghdr *const message = hand_off_init(&hand_off, &address);
	struct cmsghdr *const header = CMSG_FIRSTHDR(message);

	header->cmsg_level = SOL_SOCKET;
	header->cmsg_type = SCM_RIGHTS;
	header->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(header), &uffd, sizeof(uffd));
	CHECK_EQ(sendmsg(socket_fd, message, 0), sizeof(address));
}

static int take_uffd(int socket_fd, uint64_t *ret_address)
{
	struct hand_off hand_off;
	struct msghdr *const message = hand_off_init(&hand_off, ret_address);
	int uffd = -1;

	CHECK_EQ(recvmsg(socket_fd, message, MSG_CMSG_CLOEXEC), sizeof(*ret_address));
	CHECK(CMSG_FIRSTHDR(message));
	memcpy(&uffd, CMSG_DATA(CMSG_FIRSTHDR(message)), sizeof(uffd));
	return uffd;
}

static _Noreturn void guest_main(const struct bench_guest *guest, int socket_fd)
{
	void *memory = NULL;
	char byte;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	CHECK_EQ(gw_sys_mmap(NULL, guest->len, PROT_READ | PROT_WRITE, MAP_SHARED, guest->ram_fd, 0,
			     &memory),
		 0);
	const int uffd =
		gw_uffd_open(GW_UFFD_FEATURE_MISSING_SHMEM | GW_UFFD_FEATURE_EVENT_REMOVE, NULL);

	CHECK(uffd >= 0);
	CHECK_EQ(gw_uffd_register(uffd, (uintptr_t)memory, guest->len, UFFDIO_REGISTER_MODE_MISSING,
				  NULL),
		 0);
	give_uffd(socket_fd, uffd, (uintptr_t)memory);
	while (recv(socket_fd, &byte, 1, 0) == 1)
		touch(guest->share, memory, guest->len / PAGE);
	_exit(EXIT_SUCCESS);
}

void bench_guest_start(struct bench_guest *guest, enum bench_kind kind, uint64_t len)
{
	void *share = NULL;
	int fds[2];

	*guest = (struct bench_guest){.len = len};
	CHECK_EQ(gw_sys_mmap(NULL, sizeof(struct bench_share), PROT_READ | PROT_WRITE,
			     MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0, &share),
		 0);
	guest->share = share;
	guest->share->kind = kind;
	guest->ram_fd = gw_sys_memfd_create("guest", MFD_CLOEXEC);
	CHECK(guest->ram_fd >= 0);
	CHECK_EQ(gw_sys_ftruncate(guest->ram_fd, (off_t)len), 0);
	CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
	guest->socket_fd = fds[0];
	guest->pid = fork();
	CHECK(guest->pid >= 0);
	if (guest->pid == 0) {
		close(fds[0]);
		guest_main(guest, fds[1]);
	}
	close(fds[1]);
	guest->uffd = take_uffd(guest->socket_fd, &guest->address);
}

void bench_guest_touch(struct bench_guest *guest, const struct bench_touches *touches)
{
	CHECK(touches->thread_count >= 1 && touches->thread_count <= BENCH_THREAD_MAX);
	CHECK(touches->count <= BENCH_SAMPLE_MAX);
	guest->share->touches = *touches;
	atomic_store(&guest->share->running, touches->thread_count);
	CHECK_EQ(send(guest->socket_fd, "", 1, 0), 1);
}

bool bench_guest_is_done(const struct bench_guest *guest)
{
	return atomic_load(&guest->share->running) == 0;
}

void bench_guest_wait(const struct bench_guest *guest)
{
	/* Not a futex: nothing of ours shall run in the guest's wake-up. */
	while (!bench_guest_is_done(guest))
		(void)nanosleep(&(struct timespec){.tv_nsec = 500000}, NULL);
	CHECK_EQ(atomic_load(&guest->share->error_count), 0);
}

void bench_guest_stop(struct bench_guest *guest)
{
	int status;

	CHECK_EQ(kill(guest->pid, SIGKILL), 0);
	CHECK_EQ(waitpid(guest->pid, &status, 0), guest->pid);
	CHECK_EQ(gw_sys_close(guest->uffd), 0);
	CHECK_EQ(gw_sys_close(guest->ram_fd), 0);
	CHECK_EQ(gw_sys_close(guest->socket_fd), 0);
	CHECK_EQ(gw_sys_munmap(guest->share, sizeof(*guest->share)), 0);
}
