/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_vmm_fault.c - what a vCPU's fault does to the channel, and what ends it.
 *
 * Threads: the test's, which is the agent; vCPUs. Errors: a failed check ends the process.
 * Ownership: each test its own. Units: pages. Source: docs/exit-channel.md, section 3.
 *
 * exit-sigsegv throughout, as it needs no privilege: the channel is the same for all.
 */
#include "vmm_agent.h"

#define PAGE_COUNT 256

static void start_with(struct rig *rig, struct agent *agent, uint32_t vcpu_count, uint32_t spin_ns,
		       uint64_t page_count)
{
	rig_prepare(rig, GW_VMM_EXIT_SIGSEGV, page_count, vcpu_count);
	rig->config.spin_ns = spin_ns;
	CHECK_EQ(gw_vmm_create(&rig->config, &rig->vmm), 0);
	rig->vmm->wait_ns_max = 0;
	rig_connect(rig, agent);
}

static void start(struct rig *rig, struct agent *agent, uint32_t vcpu_count, uint32_t spin_ns)
{
	start_with(rig, agent, vcpu_count, spin_ns, PAGE_COUNT);
}

static void finish(struct rig *rig, struct agent *agent)
{
	agent_close(agent);
	rig_destroy(rig);
}

static void everything_is_absent_at_first(void)
{
	struct rig rig;
	struct agent agent;

	rig_prepare(&rig, GW_VMM_EXIT_SIGSEGV, 100, 3); /* not whole words */
	rig.regions[0].len = 36 * PAGE;
	rig.regions[1] = (struct gw_vmm_region){
		.gpa = GPA_BASE,
		.len = 64 * PAGE,
		.offset = 36 * PAGE,
		.host_addr = (uintptr_t)rig.window + 36 * PAGE,
		.guest_addr = (uintptr_t)rig.guest + 36 * PAGE,
	};
	CHECK_EQ(gw_vmm_create(&rig.config, &rig.vmm), 0);
	rig_connect(&rig, &agent);
	CHECK_EQ(agent.header->page_count, 100);
	CHECK_EQ(agent.header->vcpu_count, 3);
	CHECK_EQ(agent.words[0], UINT64_MAX);
	CHECK_EQ(agent.words[1], (UINT64_C(1) << 36) - 1);
	for (uint32_t i = 0; i < 3; i++)
		for (uint32_t j = 0; j < GW_EXIT_WAIT_COUNT; j++)
			CHECK_EQ(agent.rings[i].wait_pages[j], GW_EXIT_PAGE_NONE);
	CHECK_EQ(gw_vmm_absent_count(rig.vmm), 100);
	CHECK(gw_vmm_is_absent(rig.vmm, GPA_BASE + 63 * PAGE));
	CHECK(!gw_vmm_is_absent(rig.vmm, GPA_BASE + 64 * PAGE));
	CHECK(!gw_vmm_is_absent(rig.vmm, 36 * PAGE));
	agent_publish(&agent, 99);
	CHECK(!gw_vmm_is_absent(rig.vmm, GPA_BASE + 63 * PAGE + 4095));
	CHECK_EQ(gw_vmm_absent_count(rig.vmm), 99);
	CHECK(gw_vmm_slot_bitmap(rig.vmm, 0) == (const uint64_t *)(const void *)rig.vmm->words);
	CHECK(!gw_vmm_slot_bitmap(rig.vmm, 2));
	CHECK_EQ(gw_vmm_slot_flags(rig.vmm), 0);
	finish(&rig, &agent);
}

static void a_fault_is_asked_for_and_ends_with_its_bit(uint32_t spin_ns)
{
	struct rig rig;
	struct agent agent;
	struct faulter faulter;
	struct gw_vmm_stats stats;

	start(&rig, &agent, 2, spin_ns);
	faulter_start(&faulter, &rig, 1, 200, 1);
	const struct gw_exit_request request = agent_take(&agent, 1);

	CHECK_EQ(request.page, 200);
	CHECK_EQ(request.flags, GW_EXIT_WRITE);
	agent_wait_asleep(&agent, 1);
	agent_write_page(&agent, 200);
	agent_publish(&agent, 200);
	CHECK_EQ(faulter_join(&faulter), GW_VMM_FAULT_PRESENT);
	CHECK(guest_has_pattern(rig.guest, 200));
	CHECK_EQ(rig_fault(&rig, 1, 200), GW_VMM_FAULT_HERE);
	gw_vmm_stats(rig.vmm, 1, &stats);
	CHECK_EQ(stats.exit_count, 2);
	CHECK_EQ(stats.spurious_count, 1);
	CHECK(stats.blocked_ns > 0);
	CHECK_EQ(agent.rings[1].blocked_ns, stats.blocked_ns);
	gw_vmm_stats(rig.vmm, 0, &stats);
	CHECK_EQ(stats.exit_count, 0);
	CHECK_EQ(agent.rings[1].waiting, 0);
	CHECK_EQ(agent_untaken(&agent, 1), 0);
	finish(&rig, &agent);
}

static void a_fault_that_sleeps(void)
{
	a_fault_is_asked_for_and_ends_with_its_bit(0);
}

static void a_fault_that_spins_first(void)
{
	a_fault_is_asked_for_and_ends_with_its_bit(GW_VMM_SPIN_NS_MAX);
}

/* The page comes while it spins: nobody wakes it, and it does not sleep. */
static void a_spin_that_pays(void)
{
	struct rig rig;
	struct agent agent;
	struct faulter faulter;

	start(&rig, &agent, 1, GW_VMM_SPIN_NS_MAX);
	rig.vmm->vcpus[0].spin_ns = GW_VMM_SPIN_NS_MAX / 2;
	gw_hook_hold("vmm.spinning");
	gw_hook_call("vmm.wait_published", NULL, NULL); /* counts from now on */
	faulter_start(&faulter, &rig, 0, 7, 1);
	CHECK(gw_hook_wait("vmm.spinning", 1, DEADLINE_MS));
	agent_publish(&agent, 7);
	gw_hook_release("vmm.spinning");
	CHECK_EQ(faulter_join(&faulter), GW_VMM_FAULT_PRESENT);
	CHECK_EQ(gw_hook_reach_count("vmm.wait_published"), 0);
	CHECK_EQ(rig.vmm->vcpus[0].spin_ns, GW_VMM_SPIN_NS_MAX);
	finish(&rig, &agent);
}

static void a_spin_that_does_not_pay_gets_shorter(void)
{
	struct rig rig;
	struct agent agent;

	start(&rig, &agent, 1, 1600);
	for (uint64_t page = 0; page < 8; page++) {
		struct faulter faulter;

		gw_hook_hold("vmm.wait_published"); /* it has spun for nothing */
		faulter_start(&faulter, &rig, 0, page, 1);
		CHECK(gw_hook_wait("vmm.wait_published", 1, DEADLINE_MS));
		agent_publish(&agent, page);
		gw_hook_release("vmm.wait_published");
		CHECK_EQ(faulter_join(&faulter), GW_VMM_FAULT_PRESENT);
		(void)agent_take(&agent, 0);
	}
	CHECK_EQ(rig.vmm->vcpus[0].spin_ns, 100);
	finish(&rig, &agent);
}

static void several_pages_are_one_fault(void)
{
	struct rig rig;
	struct agent agent;
	struct faulter faulter;
	uint64_t gpas[4] = {UINT64_C(1) << 50, 0, 8, GPA_BASE};

	start(&rig, &agent, 1, 0);
	agent_publish(&agent, 12);
	faulter_start(&faulter, &rig, 0, 10, 8);
	for (uint64_t page = 10; page < 18; page++)
		if (page != 12)
			CHECK_EQ(agent_take(&agent, 0).page, page);
	/* In any order; not before the last. Those that are here are waited for no more. */
	for (uint64_t page = 17; page >= 11; page--) {
		agent_wait_asleep(&agent, 0);
		agent_publish(&agent, page);
	}
	agent_wait_asleep(&agent, 0);
	CHECK_EQ(agent.rings[0].wait_pages[0], 10);
	agent_publish(&agent, 10);
	CHECK_EQ(faulter_join(&faulter), GW_VMM_FAULT_PRESENT);
	/* Addresses outside of RAM count for nothing, two in one page for one. */
	agent_publish(&agent, 0);
	CHECK_EQ(gw_vmm_fault(rig.vmm, 0, gpas, 1, 0), -EINVAL);
	CHECK_EQ(gw_vmm_fault(rig.vmm, 0, gpas, 3, 0), GW_VMM_FAULT_HERE);
	CHECK_EQ(gw_vmm_fault(rig.vmm, 0, gpas, 0, 0), -EINVAL);
	CHECK_EQ(gw_vmm_fault(rig.vmm, 0, gpas, GW_EXIT_WAIT_COUNT + 1, 0), -EINVAL);
	CHECK_EQ(gw_vmm_fault(rig.vmm, 1, gpas, 3, 0), -EINVAL);
	finish(&rig, &agent);
}

/* Faults that are kicked away ask once; after that another page finds the ring full. */
static void a_full_ring_delays_and_loses_nothing(void)
{
	struct rig rig;
	struct agent agent;
	struct faulter faulter;

	start(&rig, &agent, 1, 0);
	for (uint64_t page = 0; page < GW_EXIT_REQUEST_COUNT; page++)
		for (int i = 0; i < 3; i++) {
			gw_hook_hold("vmm.posted");
			faulter_start(&faulter, &rig, 0, page, 1);
			CHECK(gw_hook_wait("vmm.posted", 1, DEADLINE_MS));
			gw_vmm_kick(rig.vmm, 0);
			gw_hook_release("vmm.posted");
			CHECK_EQ(faulter_join(&faulter), -EINTR);
			gw_vmm_unkick(rig.vmm, 0);
			CHECK_EQ(agent_untaken(&agent, 0), page + 1);
		}
	faulter_start(&faulter, &rig, 0, 99, 1);
	gw_hook_call("vmm.slept", NULL, NULL);
	while (gw_hook_reach_count("vmm.slept") < 3)
		(void)sched_yield();
	CHECK_EQ(agent_untaken(&agent, 0), GW_EXIT_REQUEST_COUNT);
	/* Nobody publishes, nobody wakes: it posts by itself. */
	for (uint64_t page = 0; page < GW_EXIT_REQUEST_COUNT; page++)
		CHECK_EQ(agent_take(&agent, 0).page, page);
	CHECK_EQ(agent_take(&agent, 0).page, 99);
	agent_publish(&agent, 99);
	CHECK_EQ(faulter_join(&faulter), GW_VMM_FAULT_PRESENT);
	finish(&rig, &agent);
}

static void a_tail_that_is_nonsense_harms_nobody(void)
{
	struct rig rig;
	struct agent agent;
	struct faulter faulter;

	start(&rig, &agent, 1, 0);
	atomic_store(&agent.rings[0].request_tail, 4711);
	faulter_start(&faulter, &rig, 0, 5, 1);
	agent_wait_asleep(&agent, 0);
	CHECK_EQ(agent.rings[0].request_head, 0);
	atomic_store(&agent.rings[0].request_tail, 0);
	CHECK_EQ(agent_take(&agent, 0).page, 5);
	agent_publish(&agent, 5);
	CHECK_EQ(faulter_join(&faulter), GW_VMM_FAULT_PRESENT);
	finish(&rig, &agent);
}

static uint64_t read_doorbell(const struct agent *agent)
{
	uint64_t rings = 0;

	agent_wait_readable(agent->doorbell_fd);
	CHECK_EQ(read(agent->doorbell_fd, &rings, sizeof(rings)), sizeof(rings));
	return rings;
}

static void the_doorbell_rings_once_for_an_agent_that_sleeps(void)
{
	struct rig rig;
	struct agent agent;
	struct faulter faulters[2];
	uint64_t rings;

	start(&rig, &agent, 2, 0);
	/* Awake: no ring. */
	faulter_start(&faulters[0], &rig, 0, 1, 1);
	agent_wait_asleep(&agent, 0);
	CHECK_EQ(read(agent.doorbell_fd, &rings, sizeof(rings)), -1);
	agent_publish(&agent, 1);
	CHECK_EQ(faulter_join(&faulters[0]), GW_VMM_FAULT_PRESENT);
	(void)agent_take(&agent, 0);
	atomic_store(&agent.header->agent_idle, 1);
	for (uint32_t i = 0; i < 2; i++) {
		faulter_start(&faulters[i], &rig, i, 2 + i, 1);
		agent_wait_asleep(&agent, i);
	}
	CHECK_EQ(read_doorbell(&agent), 1);
	CHECK_EQ(agent.header->agent_idle, 0);
	for (uint32_t i = 0; i < 2; i++) {
		CHECK_EQ(agent_take(&agent, i).page, 2 + i);
		agent_publish(&agent, 2 + i);
		CHECK_EQ(faulter_join(&faulters[i]), GW_VMM_FAULT_PRESENT);
	}
	finish(&rig, &agent);
}

/* Each call that a fault makes, failed once with what a kernel could say: it ends all the same. */
static void calls_that_fail_are_made_again(void)
{
	static const struct {
		enum gw_sys_call call;
		int err;
	} failures[] = {
		{GW_SYS_FUTEX, ENOSYS}, {GW_SYS_FUTEX, EINTR},	   {GW_SYS_FUTEX, EAGAIN},
		{GW_SYS_FUTEX, EFAULT}, {GW_SYS_WRITE, EBADF},	   {GW_SYS_WRITE, EINTR},
		{GW_SYS_WRITE, EIO},	{GW_SYS_FUTEX, ETIMEDOUT},
	};
	struct rig rig;
	struct agent agent;

	start(&rig, &agent, 1, 0);
	for (size_t i = 0; i < sizeof(failures) / sizeof(failures[0]); i++) {
		struct faulter faulter;

		atomic_store(&agent.header->agent_idle, 1);
		gw_sys_fail_nth(failures[i].call, 1, failures[i].err);
		faulter_start(&faulter, &rig, 0, i, 1);
		CHECK_EQ(read_doorbell(&agent), 1);
		CHECK_EQ(agent_take(&agent, 0).page, i);
		agent_wait_asleep(&agent, 0);
		CHECK(gw_sys_failed());
		agent_publish(&agent, i);
		CHECK_EQ(faulter_join(&faulter), GW_VMM_FAULT_PRESENT);
	}
	finish(&rig, &agent);
}

/* A wake that died with its agent: the vCPU looks again by itself. */
static void a_lost_wake_is_made_up_for(void)
{
	struct rig rig;
	struct agent agent;
	struct faulter faulter;

	start(&rig, &agent, 1, 0);
	rig.vmm->wait_ns_max = 1000000;
	faulter_start(&faulter, &rig, 0, 3, 1);
	agent_wait_asleep(&agent, 0);
	atomic_fetch_and(&agent.words[0], ~UINT64_C(8));
	CHECK_EQ(faulter_join(&faulter), GW_VMM_FAULT_PRESENT);
	finish(&rig, &agent);
}

/* --- 32 at once ------------------------------------------------------------------------------- */

#define CROWD	    32
#define CROWD_PAGES 4096U

struct member {
	pthread_t thread;
	const struct rig *rig;
	uint32_t vcpu;
};

static struct {
	struct agent *agent;
	_Atomic uint32_t running;
	_Atomic uint64_t served;
} crowd;

static void *member_main(void *argument)
{
	const struct member *const member = argument;
	uint64_t page = (uint64_t)member->vcpu * 7;

	for (uint32_t i = 0; i < CROWD_PAGES; i++) {
		int result;

		page = (page * 5 + 3) % CROWD_PAGES; /* every page once */
		while ((result = rig_fault(member->rig, member->vcpu, page)) == -EINTR)
			gw_vmm_unkick(member->rig->vmm, member->vcpu);
		CHECK(result == GW_VMM_FAULT_PRESENT || result == GW_VMM_FAULT_HERE);
		CHECK(!gw_vmm_is_absent(member->rig->vmm, rig_gpa(member->rig, page)));
		CHECK(guest_has_pattern(member->rig->guest, page));
	}
	atomic_fetch_sub(&crowd.running, 1);
	return NULL;
}

static void *server_main(void *argument)
{
	static bool written[CROWD_PAGES];

	(void)argument;
	while (atomic_load(&crowd.running) > 0) {
		for (uint32_t i = 0; i < CROWD; i++)
			while (agent_untaken(crowd.agent, i) > 0) {
				const uint64_t page = agent_take(crowd.agent, i).page;

				CHECK(page < CROWD_PAGES);
				if (!written[page]) {
					written[page] = true;
					agent_write_page(crowd.agent, page);
				}
				agent_publish(crowd.agent, page);
				atomic_fetch_add(&crowd.served, 1);
			}
		(void)sched_yield();
	}
	return NULL;
}

static void thirty_two_vcpus_and_kicks(void)
{
	struct rig rig;
	struct agent agent;
	struct member members[CROWD];
	pthread_t server;
	uint64_t exits = 0;

	start_with(&rig, &agent, CROWD, 2000, CROWD_PAGES);
	crowd.agent = &agent;
	atomic_store(&crowd.running, CROWD);
	CHECK_EQ(pthread_create(&server, NULL, server_main, NULL), 0);
	for (uint32_t i = 0; i < CROWD; i++) {
		members[i] = (struct member){.rig = &rig, .vcpu = i};
		CHECK_EQ(pthread_create(&members[i].thread, NULL, member_main, &members[i]), 0);
	}
	for (uint32_t i = 0; atomic_load(&crowd.running) > 0; i++) {
		gw_vmm_kick(rig.vmm, i % CROWD);
		(void)sched_yield();
	}
	for (uint32_t i = 0; i < CROWD; i++) {
		struct gw_vmm_stats stats;

		CHECK_EQ(pthread_join(members[i].thread, NULL), 0);
		gw_vmm_stats(rig.vmm, i, &stats);
		exits += stats.exit_count;
	}
	CHECK_EQ(pthread_join(server, NULL), 0);
	CHECK(exits >= (uint64_t)CROWD * CROWD_PAGES);
	CHECK(atomic_load(&crowd.served) >= CROWD_PAGES);
	CHECK_EQ(gw_vmm_absent_count(rig.vmm), 0);
	finish(&rig, &agent);
}

int main(void)
{
	RUN_FORKED(everything_is_absent_at_first);
	RUN_FORKED(a_fault_that_sleeps);
	RUN_FORKED(a_fault_that_spins_first);
	RUN_FORKED(a_spin_that_pays);
	RUN_FORKED(a_spin_that_does_not_pay_gets_shorter);
	RUN_FORKED(several_pages_are_one_fault);
	RUN_FORKED(a_full_ring_delays_and_loses_nothing);
	RUN_FORKED(a_tail_that_is_nonsense_harms_nobody);
	RUN_FORKED(the_doorbell_rings_once_for_an_agent_that_sleeps);
	RUN_FORKED(calls_that_fail_are_made_again);
	RUN_FORKED(a_lost_wake_is_made_up_for);
	RUN_FORKED(thirty_two_vcpus_and_kicks);
	return EXIT_SUCCESS;
}
