/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vmm_fault.c - a vCPU waits for pages: post, spin, sleep; and what takes it out of its sleep.
 *
 * Threads    gw_vmm_fault: the vCPU's thread, which alone writes request_head, waiting, wait_pages
 *            and the counters of its block. gw_vmm_kick: any. Both run inside of signal handlers
 *            too: no lock, no allocation, no stdio; errno stays as it was.
 * Errors, Ownership, Units: see vmm.h.
 * Source     docs/exit-channel.md, section 3.
 *
 * Order. Three pairs of a store and a load, sequentially consistent on this side; the agent has a
 * full fence between its own two. So of each pair at least one side sees the other's store:
 *
 *   vCPU                               the other side
 *   waiting = 1       | look at bit    clear the bit    | look at waiting       (publish)
 *   waiting = 1       | repost_count   repost_count + 1 | look at waiting       (a new agent)
 *   request_head + 1  | agent_idle     agent_idle = 1   | look at the heads     (the doorbell)
 *
 * and between the last look and FUTEX_WAIT the kernel compares wake_count, which was remembered
 * before the looks: whoever saw waiting = 1 has changed it. A kick needs no `waiting`: it
 * stores `kicked`, then changes wake_count; a vCPU that remembered the new count sees `kicked`.
 * Rejected: atomic_thread_fence, which ThreadSanitizer does not understand.
 * tests/test_vmm_race.c parks the vCPU at each hook below but vmm.slept, which is behind the sleep, and
 * lets the other side pass it.
 */
#include "vmm_internal.h"

#include <errno.h>
#include <limits.h>
#include <stdatomic.h>

#include <godwit/sys.h>

#define RING_MASK (GW_EXIT_REQUEST_COUNT - 1)
/* A full ring empties without anybody telling: what could not be posted is tried again so soon. */
#define RETRY_NS UINT64_C(1000000)
#define RETRY_MS 1
/* Looks between two readings of the clock. */
#define SPIN_LOOKS 32U
/* A spin that found nothing halves the next, one that did doubles it; never less than this part. */
#define SPIN_PART_MIN 16U

/* Pages that a vCPU waits for. Those that are here are taken out. */
struct wait {
	uint64_t pages[GW_EXIT_WAIT_COUNT];
	bool posted[GW_EXIT_WAIT_COUNT];
	uint32_t count;
	uint32_t repost_count; /* remembered before the posts: see post */
	uint64_t flags;
};

static void relax(void)
{
#if defined(__x86_64__)
	__builtin_ia32_pause();
#elif defined(__aarch64__)
	__asm__ volatile("yield");
#endif
}

/* --- what it waits for ------------------------------------------------------------------------ */

static void add_page(struct wait *wait, uint64_t page)
{
	for (uint32_t i = 0; i < wait->count; i++)
		if (wait->pages[i] == page)
			return;
	wait->pages[wait->count++] = page;
}

/* A bit that is clear stays clear. Returns false if none is left to wait for. */
static bool drop_present(const struct gw_vmm *vmm, struct wait *wait)
{
	uint32_t kept = 0;

	for (uint32_t i = 0; i < wait->count; i++) {
		/* Acquire: after the last of them the vCPU reads content. */
		if (!gw_vmm_page_is_absent(vmm, wait->pages[i]))
			continue;
		wait->pages[kept] = wait->pages[i];
		wait->posted[kept++] = wait->posted[i];
	}
	wait->count = kept;
	return kept > 0;
}

/* The last look: sequentially consistent, as it is one half of the pair with `waiting`. */
static bool is_any_absent(const struct gw_vmm *vmm, const struct wait *wait)
{
	for (uint32_t i = 0; i < wait->count; i++) {
		const uint64_t page = wait->pages[i];

		if (atomic_load(&vmm->words[page / 64]) >> (page % 64) & 1U)
			return true;
	}
	return false;
}

static bool is_kicked(const struct gw_vmm_vcpu *vcpu)
{
	return atomic_load(&vcpu->kicked) != 0;
}

/* --- post ------------------------------------------------------------------------------------- */

/* Posted before, by a fault that was kicked away, and not taken yet: it will be. */
static bool is_in_ring(const struct gw_exit_vcpu *ring, uint32_t tail, uint32_t head, uint64_t page)
{
	for (uint32_t i = tail; i != head; i++)
		if (ring->requests[i & RING_MASK].page == page)
			return true;
	return false;
}

/* Returns false if the agent sleeps and could not be woken. */
static bool ring_doorbell(const struct gw_vmm *vmm)
{
	const uint64_t one = 1;

	/* The second half of the pair with request_head. One vCPU alone rings. */
	if (atomic_load(&vmm->header->agent_idle) == 0 ||
	    atomic_exchange(&vmm->header->agent_idle, 0) == 0)
		return true;
	const ssize_t len = gw_sys_write(vmm->doorbell_fd, &one, sizeof(one));

	/* EAGAIN: it has been rung very often, and is readable. */
	if (len == (ssize_t)sizeof(one) || len == -EAGAIN)
		return true;
	atomic_store(&vmm->header->agent_idle, 1);
	return false;
}

/* Returns true if the agent has, or will get, all of it without our doing more. */
static bool post(const struct gw_vmm *vmm, struct gw_exit_vcpu *ring, struct wait *wait)
{
	/*
	 * Before the tail and the posts: a request that was taken and dropped is taken, at the
	 * latest, where this sees the count that says so (acquire), and so it is posted again.
	 */
	const uint32_t repost_count =
		atomic_load_explicit(&vmm->header->repost_count, memory_order_acquire);
	/* Acquire: the agent has read the slots that are free now. */
	const uint32_t tail = atomic_load_explicit(&ring->request_tail, memory_order_acquire);
	uint32_t head = atomic_load_explicit(&ring->request_head, memory_order_relaxed);
	bool is_all = true;

	/* The agent's word is not taken for more than a ring can hold. */
	const bool is_sane = head - tail <= GW_EXIT_REQUEST_COUNT;

	for (uint32_t i = 0; i < wait->count; i++) {
		if (wait->posted[i] && wait->repost_count == repost_count)
			continue;
		wait->posted[i] = is_sane && is_in_ring(ring, tail, head, wait->pages[i]);
		if (wait->posted[i])
			continue;
		if (!is_sane || head - tail == GW_EXIT_REQUEST_COUNT) {
			is_all = false;
			continue;
		}
		ring->requests[head & RING_MASK] = (struct gw_exit_request){
			.page = wait->pages[i],
			.flags = wait->flags,
		};
		/* Release for the slot; the whole of it for the pair with agent_idle. */
		atomic_store(&ring->request_head, ++head);
		wait->posted[i] = true;
	}
	wait->repost_count = repost_count;
	GW_HOOK("vmm.posted");
	return ring_doorbell(vmm) && is_all;
}

/* --- wait ------------------------------------------------------------------------------------- */

/* True: nothing is left to wait for. */
static bool spin(const struct gw_vmm *vmm, struct gw_vmm_vcpu *vcpu, struct wait *wait)
{
	if (vcpu->spin_ns == 0)
		return false;
	const uint64_t until_ns = gw_sys_now_ns() + vcpu->spin_ns;

	do {
		GW_HOOK("vmm.spinning");
		for (uint32_t i = 0; i < SPIN_LOOKS; i++) {
			if (!drop_present(vmm, wait)) {
				vcpu->spin_ns = vcpu->spin_ns * 2 < vmm->spin_ns_max
							? vcpu->spin_ns * 2
							: vmm->spin_ns_max;
				return true;
			}
			relax();
		}
		if (is_kicked(vcpu))
			return false;
	} while (gw_sys_now_ns() < until_ns);
	if (vcpu->spin_ns / 2 >= vmm->spin_ns_max / SPIN_PART_MIN)
		vcpu->spin_ns /= 2;
	return false;
}

static void sleep_until_woken(const struct gw_vmm *vmm, struct gw_vmm_vcpu *vcpu,
			      struct gw_exit_vcpu *ring, const struct wait *wait, uint64_t limit_ns)
{
	/* Before every look. Acquire: after a kick's count comes its `kicked`. */
	const uint32_t wake_count = atomic_load_explicit(&ring->wake_count, memory_order_acquire);
	int err = 0;

	for (uint32_t i = 0; i < GW_EXIT_WAIT_COUNT; i++)
		atomic_store_explicit(&ring->wait_pages[i],
				      i < wait->count ? wait->pages[i] : GW_EXIT_PAGE_NONE,
				      memory_order_relaxed);
	/* Release for wait_pages; the whole of it for the pairs with the bit and repost_count. */
	atomic_store(&ring->waiting, 1);
	GW_HOOK("vmm.wait_published");
	if (is_any_absent(vmm, wait) && !is_kicked(vcpu) &&
	    atomic_load(&vmm->header->repost_count) == wait->repost_count) {
		GW_HOOK("vmm.before_sleep");
		err = gw_sys_futex_wait(&ring->wake_count, wake_count, limit_ns);
		GW_HOOK("vmm.slept");
	}
	atomic_store_explicit(&ring->waiting, 0, memory_order_relaxed);
	/* A kernel that refuses to let us sleep shall not make us burn a processor. */
	if (err < 0 && err != -EAGAIN && err != -EINTR && err != -ETIMEDOUT)
		(void)gw_sys_poll(NULL, 0, RETRY_MS);
}

/* GW_VMM_FAULT_HERE, GW_VMM_FAULT_PRESENT or -EINTR. */
static int wait_for(const struct gw_vmm *vmm, uint32_t index, struct wait *wait)
{
	struct gw_vmm_vcpu *const vcpu = &vmm->vcpus[index];
	struct gw_exit_vcpu *const ring = &vmm->rings[index];

	if (!drop_present(vmm, wait))
		return GW_VMM_FAULT_HERE;
	GW_HOOK("vmm.missing");
	do {
		if (is_kicked(vcpu))
			return -EINTR;
		const bool is_posted = post(vmm, ring, wait);

		if (spin(vmm, vcpu, wait))
			break;
		sleep_until_woken(vmm, vcpu, ring, wait, is_posted ? vmm->wait_ns_max : RETRY_NS);
	} while (drop_present(vmm, wait));
	return GW_VMM_FAULT_PRESENT;
}

/* exit-sigsegv: the page is here; mapped for the threads, if need be with its whole granule. */
static int give(struct gw_vmm *vmm, uint32_t index, uint64_t page, uint64_t flags)
{
	for (;;) {
		uint64_t first = 0;
		uint64_t count = 0;
		struct wait wait = {.flags = flags & ~(uint64_t)GW_EXIT_WRITE};
		const int err = gw_vmm_give(vmm, page, &first, &count);

		if (err != -EAGAIN)
			return err;
		for (uint64_t i = first; i < first + count && wait.count < GW_EXIT_WAIT_COUNT; i++)
			if (gw_vmm_page_is_absent(vmm, i))
				add_page(&wait, i);
		const int outcome = wait_for(vmm, index, &wait);

		if (outcome < 0)
			return outcome;
	}
}

/* --- the interface ---------------------------------------------------------------------------- */

/* One writer, this thread: a load and a store. Relaxed: for people and metrics. */
static void count_fault(const struct gw_vmm *vmm, uint32_t index, bool is_spurious, uint64_t ns)
{
	struct gw_vmm_vcpu *const vcpu = &vmm->vcpus[index];
	struct gw_exit_vcpu *const ring = &vmm->rings[index];

	vcpu->exit_count++;
	vcpu->spurious_count += is_spurious;
	vcpu->blocked_ns += ns;
	atomic_store_explicit(&ring->exit_count, vcpu->exit_count, memory_order_relaxed);
	atomic_store_explicit(&ring->spurious_count, vcpu->spurious_count, memory_order_relaxed);
	atomic_store_explicit(&ring->blocked_ns, vcpu->blocked_ns, memory_order_relaxed);
}

int gw_vmm_fault(struct gw_vmm *vmm, uint32_t vcpu, const uint64_t *gpas, uint32_t count,
		 uint64_t flags)
{
	struct wait wait = {.flags = flags};
	uint64_t pages[GW_EXIT_WAIT_COUNT];
	uint32_t page_count = 0;

	if (!vmm->words || vcpu >= vmm->vcpu_count || count == 0 || count > GW_EXIT_WAIT_COUNT)
		return -EINVAL;
	for (uint32_t i = 0; i < count; i++) {
		const uint64_t page = gw_vmm_page_of(vmm, gpas[i]);

		if (page != GW_EXIT_PAGE_NONE)
			add_page(&wait, page);
	}
	if (wait.count == 0)
		return -EINVAL;
	for (; page_count < wait.count; page_count++)
		pages[page_count] = wait.pages[page_count];

	const int saved_errno = errno;
	const uint64_t start_ns = gw_sys_now_ns();
	int outcome = wait_for(vmm, vcpu, &wait);
	const bool is_spurious = outcome == GW_VMM_FAULT_HERE;

	if (vmm->backend == GW_VMM_EXIT_SIGSEGV)
		for (uint32_t i = 0; i < page_count && outcome >= 0; i++) {
			const int err = give(vmm, vcpu, pages[i], flags);

			outcome = err < 0 ? err : outcome;
		}
	count_fault(vmm, vcpu, is_spurious, gw_sys_now_ns() - start_ns);
	errno = saved_errno;
	return outcome;
}

void gw_vmm_kick(struct gw_vmm *vmm, uint32_t vcpu)
{
	if (!vmm->words || vcpu >= vmm->vcpu_count)
		return;
	const int saved_errno = errno;

	atomic_store(&vmm->vcpus[vcpu].kicked, 1);
	/* Release: see sleep_until_woken. The agent adds here as well; it only counts up. */
	atomic_fetch_add_explicit(&vmm->rings[vcpu].wake_count, 1, memory_order_release);
	(void)gw_sys_futex_wake(&vmm->rings[vcpu].wake_count, INT_MAX);
	errno = saved_errno;
}

void gw_vmm_unkick(struct gw_vmm *vmm, uint32_t vcpu)
{
	if (vmm->words && vcpu < vmm->vcpu_count)
		atomic_store(&vmm->vcpus[vcpu].kicked, 0);
}
