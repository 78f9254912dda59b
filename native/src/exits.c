/* SPDX-License-Identifier: Apache-2.0 */
/*
 * exits.c - the agent's end of the exit channel.
 *
 * Threads, Errors, Ownership, Units, Source: see exits.h.
 *
 * Lost wakes. Two pairs of stores and loads; all eight are sequentially consistent, so that at
 * least one side sees the other's store. (Fences would do as well; TSan does not know them.)
 *
 *   vCPU:  waiting = 1          | look at the bit       publish: clear the bit | look at waiting
 *   vCPU:  request_head + 1     | look at agent_idle    sleep:   agent_idle = 1 | look at the heads
 *
 * test_exits.c parks a vCPU of its own between its two (test.waiting) while a page is published, the
 * publisher between its two (exits.cleared) while a vCPU begins to wait, and the agent between its two
 * (exits.idle) while a request is posted; test_vmm_race.c parks the library's vCPU (vmm.wait_published).
 *
 * A hostile VMM. It can write anything, at any time, also between two of our looks: each value is
 * read once into a local and checked there. What it can reach that way: pages of its own image
 * fetched early, needless wakes, and request_tail, which is its own loss. The bitmap here is a copy;
 * what is absent is known from the page map, which no VMM can write.
 */
#include <godwit/exits.h>

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <godwit/sys.h>

#define PAGE_SIZE	UINT64_C(4096)
#define RING_MASK	(GW_EXIT_REQUEST_COUNT - 1)
#define BITS_PER_WORD	64
#define CHANNEL_LEN_MAX (UINT64_C(1) << 36)

struct gw_exits {
	struct gw_exit_header *header;
	_Atomic uint64_t *bitmap;
	struct gw_exit_vcpu *vcpus;
	size_t len;
	uint32_t vcpu_count; /* as checked: the header is not read again */
	uint32_t next_vcpu;  /* of the demand thread: whose ring is looked at first */
	uint64_t page_count;
	_Atomic uint64_t refused_count;
};

/* --- attach ----------------------------------------------------------------------------------- */

static bool is_inside(uint64_t offset, uint64_t len, uint64_t total_len)
{
	return offset % PAGE_SIZE == 0 && offset >= GW_EXIT_HEADER_LEN && offset <= total_len &&
	       len <= total_len - offset;
}

static bool header_is_valid(const struct gw_exit_header *header, uint64_t file_len,
			    uint32_t page_size, uint64_t page_count)
{
	const uint64_t bitmap_len = gw_bitmap_len(page_count);
	const uint64_t vcpus_len = (uint64_t)header->vcpu_count * GW_EXIT_VCPU_LEN;

	return header->magic == GW_EXIT_MAGIC && header->version == GW_EXIT_VERSION &&
	       header->header_len == GW_EXIT_HEADER_LEN && header->total_len == file_len &&
	       header->page_size == page_size && header->page_count == page_count &&
	       header->vcpu_count >= 1 && header->vcpu_count <= GW_EXIT_VCPU_COUNT_MAX &&
	       is_inside(header->bitmap_offset, bitmap_len, file_len) &&
	       is_inside(header->vcpus_offset, vcpus_len, file_len) &&
	       (header->bitmap_offset + bitmap_len <= header->vcpus_offset ||
		header->vcpus_offset + vcpus_len <= header->bitmap_offset);
}

/* How long the memory is, for ever: without the seal it could be cut, and a look be SIGBUS. */
static int sealed_len(int fd, uint64_t *ret_len)
{
	struct stat stat = {0};
	const int seals = gw_sys_fcntl(fd, F_GET_SEALS, 0);
	int err = seals < 0 ? seals : 0;

	if (err == 0)
		err = gw_sys_fstat(fd, &stat);
	if (err < 0)
		return err;
	if ((seals & F_SEAL_SHRINK) == 0 || stat.st_size < (off_t)GW_EXIT_HEADER_LEN ||
	    (uint64_t)stat.st_size > CHANNEL_LEN_MAX)
		return -EINVAL;
	*ret_len = (uint64_t)stat.st_size;
	return 0;
}

/* What we know to be present is present for the vCPUs too; nothing goes the other way. */
static void sync_bitmap(struct gw_exits *exits, const struct gw_bitmap *own)
{
	const uint64_t word_count = gw_bitmap_len(exits->page_count) / sizeof(uint64_t);

	for (uint64_t i = 0; i < word_count; i++) {
		const uint64_t absent = atomic_load_explicit(&own->words[i], memory_order_relaxed);

		/* Release: the content of those pages is in place, by us or by a predecessor. */
		atomic_fetch_and_explicit(&exits->bitmap[i], absent, memory_order_release);
	}
}

int gw_exits_attach(int fd, uint32_t page_size, const struct gw_bitmap *own,
		    struct gw_exits **ret_exits)
{
	struct gw_exits *const exits = calloc(1, sizeof(*exits));
	void *address = NULL;
	uint64_t len = 0;
	int err = exits ? sealed_len(fd, &len) : -ENOMEM;

	if (err == 0)
		err = gw_sys_mmap(NULL, (size_t)len, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0,
				  &address);
	if (err < 0) {
		free(exits);
		return err;
	}
	exits->header = address;
	exits->len = (size_t)len;
	/* Checked in a copy: what is used later is what was checked. */
	const struct gw_exit_header header = {
		.magic = exits->header->magic,
		.version = exits->header->version,
		.header_len = exits->header->header_len,
		.total_len = exits->header->total_len,
		.page_size = exits->header->page_size,
		.vcpu_count = exits->header->vcpu_count,
		.page_count = exits->header->page_count,
		.bitmap_offset = exits->header->bitmap_offset,
		.vcpus_offset = exits->header->vcpus_offset,
	};

	if (!header_is_valid(&header, len, page_size, own->page_count)) {
		gw_exits_detach(exits);
		return -EINVAL;
	}
	exits->bitmap = (_Atomic uint64_t *)((char *)address + header.bitmap_offset);
	exits->vcpus = (struct gw_exit_vcpu *)((char *)address + header.vcpus_offset);
	exits->vcpu_count = header.vcpu_count;
	exits->page_count = header.page_count;
	sync_bitmap(exits, own);
	/* Whoever asked a predecessor asks us. */
	gw_exits_repost(exits);
	*ret_exits = exits;
	return 0;
}

void gw_exits_detach(struct gw_exits *exits)
{
	if (!exits)
		return;
	(void)gw_sys_munmap(exits->header, exits->len);
	free(exits);
}

uint32_t gw_exits_vcpu_count(const struct gw_exits *exits)
{
	return exits->vcpu_count;
}

uint64_t gw_exits_refused_count(const struct gw_exits *exits)
{
	return atomic_load_explicit(&exits->refused_count, memory_order_relaxed);
}

/* --- requests --------------------------------------------------------------------------------- */

static uint32_t untaken_count(const struct gw_exit_vcpu *vcpu, uint32_t tail)
{
	const uint32_t head = atomic_load_explicit(&vcpu->request_head, memory_order_seq_cst);

	/* More than the ring holds is nonsense; its last slots are as good as any. */
	return head - tail <= GW_EXIT_REQUEST_COUNT ? head - tail : GW_EXIT_REQUEST_COUNT;
}

static uint32_t take_of(struct gw_exits *exits, struct gw_exit_vcpu *vcpu,
			struct gw_exit_request *ret_requests, uint32_t count_max)
{
	const uint32_t tail = atomic_load_explicit(&vcpu->request_tail, memory_order_relaxed);
	const uint32_t untaken = untaken_count(vcpu, tail);
	const uint32_t count = untaken < count_max ? untaken : count_max;
	uint32_t taken = 0;

	for (uint32_t i = 0; i < count; i++) {
		const volatile struct gw_exit_request *const slot =
			&vcpu->requests[(tail + i) & RING_MASK];
		const struct gw_exit_request request = {.page = slot->page, .flags = slot->flags};

		if (request.page < exits->page_count)
			ret_requests[taken++] = request;
		else
			atomic_fetch_add_explicit(&exits->refused_count, 1, memory_order_relaxed);
	}
	if (count > 0)
		atomic_store_explicit(&vcpu->request_tail, tail + count, memory_order_release);
	return taken;
}

uint32_t gw_exits_take(struct gw_exits *exits, struct gw_exit_request *ret_requests,
		       uint32_t count_max)
{
	const uint32_t first = exits->next_vcpu;
	uint32_t taken = 0;

	/* In turn: a vCPU that asks all the time is not always the first one heard. */
	for (uint32_t i = 0; i < exits->vcpu_count && taken < count_max; i++) {
		const uint32_t at = (first + i) % exits->vcpu_count;

		taken += take_of(exits, &exits->vcpus[at], &ret_requests[taken], count_max - taken);
		exits->next_vcpu = (at + 1) % exits->vcpu_count;
	}
	return taken;
}

bool gw_exits_sleep(struct gw_exits *exits)
{
	atomic_store_explicit(&exits->header->agent_idle, 1, memory_order_seq_cst);
	GW_HOOK("exits.idle");
	for (uint32_t i = 0; i < exits->vcpu_count; i++) {
		const struct gw_exit_vcpu *const vcpu = &exits->vcpus[i];
		const uint32_t tail =
			atomic_load_explicit(&vcpu->request_tail, memory_order_relaxed);

		if (untaken_count(vcpu, tail) > 0) {
			gw_exits_awake(exits);
			return false;
		}
	}
	return true;
}

void gw_exits_awake(struct gw_exits *exits)
{
	atomic_store_explicit(&exits->header->agent_idle, 0, memory_order_relaxed);
}

/* --- completions ------------------------------------------------------------------------------ */

static void wake(struct gw_exit_vcpu *vcpu)
{
	/* Release: who sees the count sees the bits. The sleeper looks at them in any case. */
	atomic_fetch_add_explicit(&vcpu->wake_count, 1, memory_order_release);
	(void)gw_sys_futex_wake(&vcpu->wake_count, INT_MAX);
}

static void clear_bits(struct gw_exits *exits, uint64_t first, uint64_t count)
{
	while (count > 0) {
		const uint64_t bit = first % BITS_PER_WORD;
		const uint64_t span = count < BITS_PER_WORD - bit ? count
								  : (uint64_t)BITS_PER_WORD - bit;
		const uint64_t mask = (span == BITS_PER_WORD ? 0 : UINT64_C(1) << span) - 1;

		atomic_fetch_and_explicit(&exits->bitmap[first / BITS_PER_WORD], ~(mask << bit),
					  memory_order_seq_cst);
		first += span;
		count -= span;
	}
}

static bool waits_for(const struct gw_exit_vcpu *vcpu, uint64_t first, uint64_t count)
{
	/* Acquire as well: its pages were stored before. */
	if (atomic_load_explicit(&vcpu->waiting, memory_order_seq_cst) == 0)
		return false;
	for (uint32_t i = 0; i < GW_EXIT_WAIT_COUNT; i++) {
		const uint64_t page =
			atomic_load_explicit(&vcpu->wait_pages[i], memory_order_relaxed);

		if (page - first < count)
			return true;
	}
	return false;
}

void gw_exits_publish(struct gw_exits *exits, uint64_t first, uint64_t count)
{
	if (first >= exits->page_count || count > exits->page_count - first)
		return;
	clear_bits(exits, first, count);
	GW_HOOK("exits.cleared");
	for (uint32_t i = 0; i < exits->vcpu_count; i++)
		if (waits_for(&exits->vcpus[i], first, count))
			wake(&exits->vcpus[i]);
}

void gw_exits_repost(struct gw_exits *exits)
{
	atomic_fetch_add_explicit(&exits->header->repost_count, 1, memory_order_release);
	for (uint32_t i = 0; i < exits->vcpu_count; i++)
		wake(&exits->vcpus[i]);
}
