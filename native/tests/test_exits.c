/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_exits.c - the agent's end of the exit channel: what it checks, takes, clears and wakes; the
 * two races that could lose a wake, each parked at the point where it is decided; a VMM that lies.
 * The vCPUs here are written out by hand after docs/exit-channel.md, so that vmm.h cannot hide a
 * mistake that both ends make.
 */
#include "guest.h"

#include <errno.h>

#include <godwit/exits.h>

#define PAGE_COUNT    UINT64_C(200) /* not a multiple of 64 */
#define VCPU_COUNT    3U
#define BITMAP_OFFSET 4096U
#define VCPUS_OFFSET  8192U
#define CHANNEL_LEN   12288U

struct channel {
	int fd;
	struct gw_exit_header *header;
	_Atomic uint64_t *bitmap;
	struct gw_exit_vcpu *vcpus;
	struct gw_bitmap own;
	_Atomic uint64_t own_words[4];
	struct gw_exits *exits;
};

static void channel_make(struct channel *channel, unsigned int seals)
{
	void *address = NULL;

	memset(channel, 0, sizeof(*channel));
	channel->fd = gw_sys_memfd_create("channel", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	CHECK(channel->fd >= 0);
	CHECK_EQ(gw_sys_ftruncate(channel->fd, CHANNEL_LEN), 0);
	CHECK_EQ(gw_sys_mmap(NULL, CHANNEL_LEN, PROT_READ | PROT_WRITE, MAP_SHARED, channel->fd, 0,
			     &address),
		 0);
	CHECK_EQ(gw_sys_fcntl(channel->fd, F_ADD_SEALS, (long)seals), 0);
	channel->header = address;
	channel->bitmap = (_Atomic uint64_t *)((char *)address + BITMAP_OFFSET);
	channel->vcpus = (struct gw_exit_vcpu *)((char *)address + VCPUS_OFFSET);
	*channel->header = (struct gw_exit_header){
		.magic = GW_EXIT_MAGIC,
		.version = GW_EXIT_VERSION,
		.header_len = GW_EXIT_HEADER_LEN,
		.total_len = CHANNEL_LEN,
		.page_size = PAGE,
		.vcpu_count = VCPU_COUNT,
		.page_count = PAGE_COUNT,
		.bitmap_offset = BITMAP_OFFSET,
		.vcpus_offset = VCPUS_OFFSET,
	};
	for (uint64_t page = 0; page < PAGE_COUNT; page++)
		channel->bitmap[page / 64] |= UINT64_C(1) << page % 64;
	gw_bitmap_init(&channel->own, (void *)channel->own_words, PAGE_COUNT);
	gw_bitmap_mark_absent(&channel->own, 0, PAGE_COUNT);
}

static int attach(struct channel *channel)
{
	return gw_exits_attach(channel->fd, PAGE, &channel->own, &channel->exits);
}

static void channel_open(struct channel *channel)
{
	channel_make(channel, F_SEAL_SHRINK);
	CHECK_EQ(attach(channel), 0);
}

static bool is_absent(const struct channel *channel, uint64_t page)
{
	return (atomic_load(&channel->bitmap[page / 64]) >> page % 64 & 1) != 0;
}

static void post(struct channel *channel, uint32_t index, uint64_t page)
{
	struct gw_exit_vcpu *const vcpu = &channel->vcpus[index];
	const uint32_t head = atomic_load(&vcpu->request_head);

	vcpu->requests[head % GW_EXIT_REQUEST_COUNT] = (struct gw_exit_request){.page = page};
	atomic_store(&vcpu->request_head, head + 1);
}

/* --- attaching -------------------------------------------------------------------------------- */

static void a_channel_that_is_wrong_is_refused(void)
{
	struct channel channel;

	channel_make(&channel, F_SEAL_SHRINK);
#define REFUSED(field, value)                                           \
	do {                                                            \
		struct gw_exit_header *const header = channel.header;   \
		const __typeof__(header->field) before = header->field; \
		header->field = value;                                  \
		CHECK_EQ(attach(&channel), -EINVAL);                    \
		header->field = before;                                 \
	} while (0)

	REFUSED(magic, 0);
	REFUSED(version, 2);
	REFUSED(header_len, 64);
	REFUSED(total_len, CHANNEL_LEN - 4096);
	REFUSED(total_len, CHANNEL_LEN + 4096);
	REFUSED(page_size, 2U << 20);
	REFUSED(vcpu_count, 0);
	REFUSED(vcpu_count, GW_EXIT_VCPU_COUNT_MAX + 1);
	REFUSED(vcpu_count, 5); /* one block more than there is room for */
	REFUSED(page_count, PAGE_COUNT - 1);
	REFUSED(page_count, PAGE_COUNT + 1);
	REFUSED(bitmap_offset, 0);
	REFUSED(bitmap_offset, BITMAP_OFFSET + 8);
	REFUSED(bitmap_offset, CHANNEL_LEN);
	REFUSED(bitmap_offset, UINT64_MAX - 4095);
	REFUSED(vcpus_offset, CHANNEL_LEN);
	REFUSED(vcpus_offset, BITMAP_OFFSET); /* one in the other */
	REFUSED(vcpus_offset, UINT64_MAX - 4095);
	CHECK_EQ(attach(&channel), 0);
	gw_exits_detach(channel.exits);

	/* It could be cut while we look at it. */
	channel_make(&channel, F_SEAL_GROW);
	CHECK_EQ(attach(&channel), -EINVAL);
	channel.fd = gw_sys_open("/dev/null", O_RDWR | O_CLOEXEC, 0);
	CHECK_EQ(attach(&channel), -EINVAL);
}

static void each_failing_call_leaves_nothing(void)
{
	static const enum gw_sys_call calls[] = {GW_SYS_FCNTL, GW_SYS_FSTAT, GW_SYS_MMAP};
	struct channel channel;

	channel_make(&channel, F_SEAL_SHRINK);
	for (size_t i = 0; i < sizeof(calls) / sizeof(calls[0]); i++) {
		gw_sys_fail_nth(calls[i], 1, ENOMEM);
		CHECK_EQ(attach(&channel), -ENOMEM);
		CHECK(gw_sys_failed());
		CHECK(!channel.exits);
		gw_sys_fail_none();
	}
}

static void an_adopter_tells_what_it_knows_and_nothing_else(void)
{
	struct channel channel;

	channel_make(&channel, F_SEAL_SHRINK);
	(void)gw_bitmap_publish(&channel.own, 60, 10);
	/* Cleared by a predecessor that died before it was in its own bitmap: never set again. */
	atomic_fetch_and(&channel.bitmap[0], ~UINT64_C(2));
	CHECK_EQ(attach(&channel), 0);
	for (uint64_t page = 0; page < PAGE_COUNT; page++)
		CHECK_EQ(is_absent(&channel, page), page != 1 && (page < 60 || page >= 70));
	CHECK_EQ(atomic_load(&channel.header->repost_count), 1);
	for (uint32_t i = 0; i < VCPU_COUNT; i++)
		CHECK_EQ(atomic_load(&channel.vcpus[i].wake_count), 1);
	gw_exits_detach(channel.exits);
	CHECK_EQ(attach(&channel), 0);
	CHECK_EQ(atomic_load(&channel.header->repost_count), 2);
	gw_exits_detach(channel.exits);
}

/* --- requests --------------------------------------------------------------------------------- */

static void requests_come_in_turn_and_once(void)
{
	struct gw_exit_request requests[8];
	struct channel channel;

	channel_open(&channel);
	CHECK_EQ(gw_exits_vcpu_count(channel.exits), VCPU_COUNT);
	CHECK_EQ(gw_exits_take(channel.exits, requests, 8), 0);
	for (uint64_t i = 0; i < 5; i++)
		post(&channel, 0, i);
	post(&channel, 2, 100);
	/* No room for all: what is left is taken next, and vCPU 2 is not behind vCPU 0 for ever. */
	CHECK_EQ(gw_exits_take(channel.exits, requests, 3), 3);
	CHECK_EQ(requests[0].page, 0);
	CHECK_EQ(requests[2].page, 2);
	CHECK_EQ(gw_exits_take(channel.exits, requests, 1), 1);
	CHECK_EQ(requests[0].page, 100);
	CHECK_EQ(gw_exits_take(channel.exits, requests, 8), 2);
	CHECK_EQ(requests[0].page, 3);
	CHECK_EQ(requests[1].page, 4);
	CHECK_EQ(gw_exits_take(channel.exits, requests, 8), 0);
	CHECK_EQ(atomic_load(&channel.vcpus[0].request_tail), 5);
	/* The counters go round. */
	atomic_store(&channel.vcpus[1].request_head, UINT32_MAX);
	atomic_store(&channel.vcpus[1].request_tail, UINT32_MAX);
	post(&channel, 1, 7);
	post(&channel, 1, 8);
	CHECK_EQ(gw_exits_take(channel.exits, requests, 8), 2);
	CHECK_EQ(requests[1].page, 8);
	CHECK_EQ(atomic_load(&channel.vcpus[1].request_tail), 1);
	gw_exits_detach(channel.exits);
}

static void nonsense_is_bounded_and_counted(void)
{
	struct gw_exit_request requests[64];
	struct channel channel;

	channel_open(&channel);
	post(&channel, 0, PAGE_COUNT);
	post(&channel, 0, UINT64_MAX);
	post(&channel, 0, PAGE_COUNT - 1);
	CHECK_EQ(gw_exits_take(channel.exits, requests, 64), 1);
	CHECK_EQ(requests[0].page, PAGE_COUNT - 1);
	CHECK_EQ(gw_exits_refused_count(channel.exits), 2);
	/* A head that ran away: never more than the ring holds, and then no more. */
	atomic_store(&channel.vcpus[1].request_head, 4000000000U);
	CHECK_EQ(gw_exits_take(channel.exits, requests, 64), GW_EXIT_REQUEST_COUNT);
	/* Waiting for nonsense wakes nobody, waiting for everything does no harm. */
	atomic_store(&channel.vcpus[0].waiting, 7);
	for (uint32_t i = 0; i < GW_EXIT_WAIT_COUNT; i++)
		atomic_store(&channel.vcpus[0].wait_pages[i], UINT64_MAX - i);
	const uint32_t before = atomic_load(&channel.vcpus[0].wake_count);

	gw_exits_publish(channel.exits, 0, 10);
	CHECK_EQ(atomic_load(&channel.vcpus[0].wake_count), before);
	gw_exits_publish(channel.exits, PAGE_COUNT - 1, 2); /* ours: a range that is none */
	CHECK(is_absent(&channel, PAGE_COUNT - 1));
	/* The header changed under us is not read again. */
	channel.header->vcpu_count = 4000;
	channel.header->page_count = 4000;
	channel.header->bitmap_offset = 1U << 30;
	gw_exits_publish(channel.exits, 10, 10);
	gw_exits_repost(channel.exits);
	CHECK_EQ(gw_exits_vcpu_count(channel.exits), VCPU_COUNT);
	CHECK(!is_absent(&channel, 19));
	gw_exits_detach(channel.exits);
}

/* --- publishing ------------------------------------------------------------------------------- */

static void only_those_who_wait_for_a_page_are_woken(void)
{
	struct channel channel;

	channel_open(&channel);
	for (uint32_t i = 0; i < VCPU_COUNT; i++)
		for (uint32_t j = 0; j < GW_EXIT_WAIT_COUNT; j++)
			atomic_store(&channel.vcpus[i].wait_pages[j], GW_EXIT_PAGE_NONE);
	atomic_store(&channel.vcpus[0].wait_pages[3], 65);
	atomic_store(&channel.vcpus[0].waiting, 1);
	atomic_store(&channel.vcpus[1].wait_pages[0], 66);
	atomic_store(&channel.vcpus[1].waiting, 1);
	atomic_store(&channel.vcpus[2].wait_pages[0], 65); /* does not sleep (any more) */
	gw_exits_publish(channel.exits, 63, 3);
	CHECK_EQ(atomic_load(&channel.vcpus[0].wake_count), 2);
	CHECK_EQ(atomic_load(&channel.vcpus[1].wake_count), 1);
	CHECK_EQ(atomic_load(&channel.vcpus[2].wake_count), 1);
	for (uint64_t page = 0; page < PAGE_COUNT; page++)
		CHECK_EQ(is_absent(&channel, page), page < 63 || page > 65);
	gw_exits_publish(channel.exits, 0, PAGE_COUNT);
	for (uint64_t page = 0; page < PAGE_COUNT; page++)
		CHECK(!is_absent(&channel, page));
	CHECK_EQ(atomic_load(&channel.bitmap[3]), 0);
	gw_exits_detach(channel.exits);
}

/* Step 5 of docs/exit-channel.md, with a park between `waiting` and the last look. */
static void wait_for_page(struct channel *channel, uint32_t index, uint64_t page)
{
	struct gw_exit_vcpu *const vcpu = &channel->vcpus[index];

	for (;;) {
		const uint32_t seen = atomic_load(&vcpu->wake_count);

		atomic_store(&vcpu->wait_pages[0], page);
		atomic_store(&vcpu->waiting, 1);
		GW_HOOK("test.waiting");
		if (!is_absent(channel, page))
			break;
		GW_HOOK("test.before_sleep");
		(void)gw_sys_futex_wait(&vcpu->wake_count, seen, 0);
	}
	atomic_store(&vcpu->waiting, 0);
}

static void *waiter_main(void *argument)
{
	wait_for_page(argument, 1, 5);
	return NULL;
}

/* The page comes while the vCPU is between two of its steps: it does not sleep for ever. */
static void publish_while_parked_at(const char *point)
{
	struct channel channel;
	pthread_t waiter;

	channel_open(&channel);
	gw_hook_hold(point);
	CHECK_EQ(pthread_create(&waiter, NULL, waiter_main, &channel), 0);
	CHECK(gw_hook_wait(point, 1, TIMEOUT_MS));
	gw_exits_publish(channel.exits, 5, 1);
	gw_hook_release(point);
	CHECK_EQ(pthread_join(waiter, NULL), 0);
	gw_exits_detach(channel.exits);
}

static void a_page_that_comes_before_the_last_look(void)
{
	publish_while_parked_at("test.waiting");
}

static void a_page_that_comes_after_the_last_look(void)
{
	publish_while_parked_at("test.before_sleep");
}

static void *publisher_main(void *argument)
{
	struct channel *const channel = argument;

	gw_exits_publish(channel->exits, 5, 1);
	return NULL;
}

/* The publisher has cleared the bit and not yet looked who waits, when a vCPU begins to wait. */
static void a_vcpu_that_begins_to_wait_while_it_is_published(void)
{
	struct channel channel;
	pthread_t publisher;

	channel_open(&channel);
	gw_hook_hold("exits.cleared");
	CHECK_EQ(pthread_create(&publisher, NULL, publisher_main, &channel), 0);
	CHECK(gw_hook_wait("exits.cleared", 1, TIMEOUT_MS));
	wait_for_page(&channel, 1, 5); /* returns: it sees the bit */
	gw_hook_release("exits.cleared");
	CHECK_EQ(pthread_join(publisher, NULL), 0);
	gw_exits_detach(channel.exits);
}

/* --- the doorbell ----------------------------------------------------------------------------- */

static void *sleeper_main(void *argument)
{
	struct channel *const channel = argument;

	return gw_exits_sleep(channel->exits) ? argument : NULL;
}

static void a_request_while_the_agent_goes_to_sleep(void)
{
	struct channel channel;
	pthread_t agent;
	void *slept = &channel;

	channel_open(&channel);
	CHECK(gw_exits_sleep(channel.exits));
	CHECK_EQ(atomic_load(&channel.header->agent_idle), 1);
	gw_exits_awake(channel.exits);
	CHECK_EQ(atomic_load(&channel.header->agent_idle), 0);

	gw_hook_hold("exits.idle");
	CHECK_EQ(pthread_create(&agent, NULL, sleeper_main, &channel), 0);
	CHECK(gw_hook_wait("exits.idle", 1, TIMEOUT_MS));
	/* The vCPU sees idle and rings; the agent sees the request and stays awake: both is enough. */
	post(&channel, 2, 9);
	CHECK_EQ(atomic_load(&channel.header->agent_idle), 1);
	gw_hook_release("exits.idle");
	CHECK_EQ(pthread_join(agent, &slept), 0);
	CHECK(!slept);
	CHECK_EQ(atomic_load(&channel.header->agent_idle), 0);
	gw_exits_detach(channel.exits);
}

int main(void)
{
	RUN_FORKED(a_channel_that_is_wrong_is_refused);
	RUN_FORKED(each_failing_call_leaves_nothing);
	RUN_FORKED(an_adopter_tells_what_it_knows_and_nothing_else);
	RUN_FORKED(requests_come_in_turn_and_once);
	RUN_FORKED(nonsense_is_bounded_and_counted);
	RUN_FORKED(only_those_who_wait_for_a_page_are_woken);
	RUN_FORKED(a_page_that_comes_before_the_last_look);
	RUN_FORKED(a_page_that_comes_after_the_last_look);
	RUN_FORKED(a_vcpu_that_begins_to_wait_while_it_is_published);
	RUN_FORKED(a_request_while_the_agent_goes_to_sleep);
	return 0;
}
