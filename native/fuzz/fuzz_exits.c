/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fuzz_exits.c - the exit channel against a VMM that writes anything anywhere in it, before the agent
 * attaches and after: no page beyond the image is ever named, nothing outside the channel is touched.
 *
 * Input: switches, then steps of three bytes and what they take.
 */
#include "fuzz.h"

#include <godwit/exits.h>
#include <godwit/sys.h>

#include <errno.h>
#include <stdbool.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE_COUNT     200u
#define CHANNEL_LEN    12288u
#define BITMAP_OFFSET  4096u
#define VCPUS_OFFSET   8192u
#define VCPU_COUNT     3u
#define STEP_COUNT_MAX 64

static uint8_t *channel;
static int channel_fd = -1;

static void make_channel(void)
{
	const struct gw_exit_header header = {
		.magic = GW_EXIT_MAGIC,
		.version = GW_EXIT_VERSION,
		.header_len = GW_EXIT_HEADER_LEN,
		.total_len = CHANNEL_LEN,
		.page_size = 4096,
		.vcpu_count = VCPU_COUNT,
		.page_count = PAGE_COUNT,
		.bitmap_offset = BITMAP_OFFSET,
		.vcpus_offset = VCPUS_OFFSET,
	};

	if (channel_fd < 0) {
		channel_fd = memfd_create("channel", MFD_CLOEXEC | MFD_ALLOW_SEALING);
		FUZZ_CHECK(channel_fd >= 0 && ftruncate(channel_fd, CHANNEL_LEN) == 0);
		FUZZ_CHECK(fcntl(channel_fd, F_ADD_SEALS, F_SEAL_SHRINK) == 0);
		channel =
			mmap(NULL, CHANNEL_LEN, PROT_READ | PROT_WRITE, MAP_SHARED, channel_fd, 0);
		FUZZ_CHECK(channel != MAP_FAILED);
	}
	memset(channel, 0, CHANNEL_LEN);
	memcpy(channel, &header, sizeof(header));
	memset(channel + BITMAP_OFFSET, 0xff, PAGE_COUNT / 8);
}

/* The VMM writes up to 8 bytes somewhere. */
static void scribble(struct fuzz_input *input)
{
	const size_t at = fuzz_take_u16(input) % (CHANNEL_LEN - 8);
	const uint64_t value = fuzz_take_u64(input);

	memcpy(channel + at, &value, sizeof(value));
}

static void take(struct gw_exits *exits)
{
	struct gw_exit_request requests[16];
	const uint32_t count = gw_exits_take(exits, requests, 16);

	FUZZ_CHECK(count <= 16);
	for (uint32_t i = 0; i < count; i++)
		FUZZ_CHECK(requests[i].page < PAGE_COUNT);
}

static void step(struct gw_exits *exits, struct fuzz_input *input)
{
	uint64_t first;

	switch (fuzz_take_u8(input) % 5) {
	case 0:
		scribble(input);
		break;
	case 1:
		take(exits);
		break;
	case 2:
		(void)gw_exits_sleep(exits);
		gw_exits_awake(exits);
		break;
	case 3:
		first = fuzz_take_u8(input) % PAGE_COUNT;
		gw_exits_publish(exits, first, 1 + fuzz_take_u8(input) % (PAGE_COUNT - first));
		break;
	default:
		gw_exits_repost(exits);
		break;
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
	struct fuzz_input input = {.data = data, .len = len};
	_Atomic uint64_t words[4] = {0};
	struct gw_bitmap own;
	struct gw_exits *exits;
	uint8_t before;

	make_channel();
	gw_bitmap_init(&own, (void *)words, PAGE_COUNT);
	gw_bitmap_mark_absent(&own, 0, PAGE_COUNT);
	for (before = fuzz_take_u8(&input) % 8; before > 0; before--)
		scribble(&input);
	if (gw_exits_attach(channel_fd, 4096, &own, &exits))
		return 0;
	for (int i = 0; i < STEP_COUNT_MAX && input.len > 0; i++)
		step(exits, &input);
	take(exits);
	FUZZ_CHECK(gw_exits_vcpu_count(exits) <= GW_EXIT_VCPU_COUNT_MAX);
	gw_exits_detach(exits);
	return 0;
}
