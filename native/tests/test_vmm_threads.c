/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_vmm_threads.c - exit-sigsegv with real threads and real signals; and that the mappings of the
 * process stay few.
 *
 * Threads: guests, whose handler calls the library; the agent. Errors: a failed check ends the
 * process. Ownership: each test its own. Units: pages. Source: vmm_give.c.
 */
#include "vmm_agent.h"

#include <sys/prctl.h>

#define GUEST_COUNT 4
#define PAGE_COUNT  4096U
#define GRANULE	    64U

/* --- guests ----------------------------------------------------------------------------------- */

static struct rig *rig_of_handler;
static _Thread_local uint32_t vcpu_of_thread;
static _Atomic uint64_t parked_count;

static void on_segv(int number, siginfo_t *info, void *context)
{
	struct rig *const rig = rig_of_handler;
	const uint64_t page = ((uintptr_t)info->si_addr - (uintptr_t)rig->guest) / PAGE;
	const uint64_t gpa = rig_gpa(rig, page);
	int result;

	(void)number;
	(void)context;
	while ((result = gw_vmm_fault(rig->vmm, vcpu_of_thread, &gpa, 1, 0)) == -EINTR) {
		atomic_fetch_add(&parked_count, 1);
		gw_vmm_unkick(rig->vmm, vcpu_of_thread);
	}
	/* What a VMM may do for every backend; here nothing is left to do. */
	if (result < 0 || gw_vmm_fill_holes(rig->vmm, &gpa, 1) != 0)
		_exit(3);
}

static void catch_segv(struct rig *rig)
{
	struct sigaction action = {.sa_flags = SA_SIGINFO | SA_NODEFER};

	rig_of_handler = rig;
	action.sa_sigaction = on_segv;
	CHECK_EQ(sigaction(SIGSEGV, &action, NULL), 0);
}

struct runner {
	pthread_t thread;
	uint32_t vcpu;
	uint32_t step;
};

/* Every page once, checked, and its counter of this guest added to. */
static void *guest_main(void *argument)
{
	const struct runner *const runner = argument;
	uint64_t page = (uint64_t)runner->vcpu * 1021;

	vcpu_of_thread = runner->vcpu;
	for (uint32_t i = 0; i < PAGE_COUNT; i++) {
		page = (page * runner->step + 7) % PAGE_COUNT;
		volatile uint64_t *const words =
			(volatile uint64_t *)(void *)(rig_of_handler->guest + page * PAGE);

		if (page % 16 != 15) /* else a hole */
			CHECK_EQ(words[8],
				 *(const uint64_t *)(const void *)(rig_of_handler->window +
								   page * PAGE + 64));
		words[runner->vcpu] = words[runner->vcpu] + 1;
	}
	return NULL;
}

struct server {
	struct agent *agent;
	_Atomic bool stop;
};

static void serve(const struct agent *agent, uint64_t page, bool *done)
{
	if (done[page])
		return;
	done[page] = true;
	if (page % 16 != 15)
		agent_write_page(agent, page);
	agent_publish(agent, page);
}

static void *server_main(void *argument)
{
	static bool done[PAGE_COUNT];
	struct server *const server = argument;

	while (!atomic_load(&server->stop)) {
		for (uint32_t i = 0; i < GUEST_COUNT; i++)
			while (agent_untaken(server->agent, i) > 0)
				serve(server->agent, agent_take(server->agent, i).page, done);
		(void)sched_yield();
	}
	return NULL;
}

static void threads_run_on_memory_that_comes(void)
{
	static const uint32_t steps[GUEST_COUNT] = {5, 13, 29, 1};
	struct rig rig;
	struct agent agent;
	struct server server = {.agent = &agent};
	struct runner runners[GUEST_COUNT];
	pthread_t server_thread;
	uint64_t exits = 0;

	rig_prepare(&rig, GW_VMM_EXIT_SIGSEGV, PAGE_COUNT, GUEST_COUNT);
	rig.config.spin_ns = 2000;
	CHECK_EQ(gw_vmm_create(&rig.config, &rig.vmm), 0);
	rig.vmm->wait_ns_max = 0;
	rig_connect(&rig, &agent);
	CHECK_EQ(agent.uffd_count, 0);
	catch_segv(&rig);
	CHECK_EQ(pthread_create(&server_thread, NULL, server_main, &server), 0);
	for (uint32_t i = 0; i < GUEST_COUNT; i++) {
		runners[i] = (struct runner){.vcpu = i, .step = steps[i]};
		CHECK_EQ(pthread_create(&runners[i].thread, NULL, guest_main, &runners[i]), 0);
	}
	for (uint32_t i = 0; i < 2000; i++) {
		gw_vmm_kick(rig.vmm, i % GUEST_COUNT);
		(void)sched_yield();
	}
	for (uint32_t i = 0; i < GUEST_COUNT; i++) {
		struct gw_vmm_stats stats;

		CHECK_EQ(pthread_join(runners[i].thread, NULL), 0);
		gw_vmm_stats(rig.vmm, i, &stats);
		exits += stats.exit_count;
	}
	atomic_store(&server.stop, true);
	CHECK_EQ(pthread_join(server_thread, NULL), 0);
	CHECK(exits > 0);
	CHECK_EQ(gw_vmm_absent_count(rig.vmm), 0);
	for (uint64_t page = 0; page < PAGE_COUNT; page++) {
		uint64_t want[PAGE / sizeof(uint64_t)] = {0};
		const uint64_t *const got =
			(const uint64_t *)(const void *)(rig.window + page * PAGE);

		if (page % 16 != 15)
			guest_pattern(page, (uint8_t *)want);
		for (uint32_t i = 0; i < GUEST_COUNT; i++)
			want[i]++;
		CHECK(memcmp(got, want, PAGE) == 0);
	}
	fprintf(stderr, "  %llu exits, %llu of them kicked away\n", (unsigned long long)exits,
		(unsigned long long)atomic_load(&parked_count));
	agent_close(&agent);
	rig_destroy(&rig);
}

/* --- mappings --------------------------------------------------------------------------------- */

static uint32_t mapping_count(void)
{
	FILE *const maps = fopen("/proc/self/maps", "re");
	uint32_t count = 0;
	int byte;

	CHECK(maps);
	while ((byte = fgetc(maps)) != EOF)
		count += byte == '\n';
	CHECK_EQ(fclose(maps), 0);
	return count;
}

static int give(const struct rig *rig, uint64_t page, uint64_t *ret_first, uint64_t *ret_count)
{
	return gw_vmm_give(rig->vmm, page, ret_first, ret_count);
}

static void what_is_here_around_a_page_is_given_with_it(void)
{
	struct rig rig;
	struct agent agent;
	uint64_t first;
	uint64_t count;

	rig_create(&rig, GW_VMM_EXIT_SIGSEGV, 512, 1); /* regions of 256 */
	rig_connect(&rig, &agent);
	for (uint64_t page = 60; page < 300; page++)
		if (page != 70 && page != 200)
			agent_publish(&agent, page);
	CHECK_EQ(give(&rig, 70, &first, &count), -EAGAIN);
	CHECK_EQ(first, 70);
	CHECK_EQ(count, 1);
	CHECK_EQ(give(&rig, 130, &first, &count), 0);
	/* 71..199, no more: neither over an absent page nor over a region's end. */
	CHECK_EQ(rig.vmm->given[1], UINT64_MAX << (71 - 64));
	CHECK_EQ(rig.vmm->given[2], UINT64_MAX);
	CHECK_EQ(rig.vmm->given[3], (UINT64_C(1) << (200 - 192)) - 1);
	const uint64_t call_count = gw_sys_count(GW_SYS_MPROTECT);

	CHECK_EQ(give(&rig, 199, &first, &count), 0); /* has it */
	CHECK_EQ(gw_sys_count(GW_SYS_MPROTECT), call_count);
	CHECK_EQ(give(&rig, 255, &first, &count), 0);
	CHECK_EQ(rig.vmm->given[3], ~(UINT64_C(1) << (200 - 192)));
	CHECK_EQ(rig.vmm->given[4], 0);
	for (uint64_t page = 71; page < 256; page++)
		if (page != 200)
			rig.guest[page * PAGE] = 1; /* SIGSEGV ends the child */
	agent_close(&agent);
	rig_destroy(&rig);
}

/* Every second page of much memory: two mappings a page, if it went on so. */
static void mappings_stay_few(void)
{
	const uint64_t page_count = 65536;
	struct rig rig;
	struct agent agent;
	uint64_t first = 0;
	uint64_t count = 0;
	uint64_t given = 0;

	rig_create(&rig, GW_VMM_EXIT_SIGSEGV, page_count, 1);
	rig_connect(&rig, &agent);
	for (uint64_t page = 0; page < page_count; page += 2)
		agent_publish(&agent, page);
	for (uint64_t page = 0; page < page_count; page += 2)
		given += give(&rig, page, &first, &count) == 0;
	CHECK_EQ(rig.vmm->granule, GRANULE);
	CHECK_EQ(count, GRANULE);
	CHECK(given > 8000 && given < 20000);
	CHECK(mapping_count() < 40000);
	/* With its neighbours it goes on. */
	for (uint64_t page = first; page < first + count; page++)
		agent_publish(&agent, page);
	CHECK_EQ(give(&rig, first + 2, &first, &count), 0);
	rig.guest[(first + 2) * PAGE] = 1;
	agent_close(&agent);
	rig_destroy(&rig);
}

/* Pages of a row, scattered in time: the runs are counted and found few, nothing changes. */
static void runs_that_grow_together_are_no_reason(void)
{
	struct rig rig;
	struct agent agent;
	const uint32_t before = mapping_count();
	uint64_t first;
	uint64_t count;

	rig_create(&rig, GW_VMM_EXIT_SIGSEGV, 40000, 1);
	rig_connect(&rig, &agent);
	for (uint64_t page = 0; page < 20000; page++) {
		agent_publish(&agent, page);
		CHECK_EQ(give(&rig, page, &first, &count), 0);
	}
	CHECK_EQ(rig.vmm->granule, 1);
	/* What the process had before, libraries and sanitizers, is not ours to count. */
	CHECK(mapping_count() < before + 100);
	agent_close(&agent);
	rig_destroy(&rig);
}

/* No mapping is left in the process: the fault waits for the granule, asks for it, and ends. */
static void without_mappings_left_a_whole_granule_is_awaited(void)
{
	struct rig rig;
	struct agent agent;
	struct faulter faulter;
	bool seen[GRANULE] = {false};

	rig_create(&rig, GW_VMM_EXIT_SIGSEGV, (uint64_t)4 * GRANULE,
		   1); /* two regions of two granules */
	rig_connect(&rig, &agent);
	gw_sys_fail_nth(GW_SYS_MPROTECT, 1, ENOMEM);
	faulter_start(&faulter, &rig, 0, GRANULE + 7, 1);
	for (uint32_t i = 0; i < GRANULE; i++) {
		const uint64_t page = agent_take(&agent, 0).page;

		CHECK(i > 0 || page == GRANULE + 7);
		CHECK(page >= GRANULE && page < (uint64_t)2 * GRANULE && !seen[page - GRANULE]);
		seen[page - GRANULE] = true;
		agent_write_page(&agent, page);
		agent_publish(&agent, page);
	}
	CHECK_EQ(faulter_join(&faulter), GW_VMM_FAULT_PRESENT);
	CHECK(gw_sys_failed());
	CHECK_EQ(rig.vmm->granule, GRANULE);
	for (uint64_t page = GRANULE; page < (uint64_t)2 * GRANULE; page++)
		CHECK(guest_has_pattern(rig.guest, page));
	/* A kick reaches it there as well. */
	faulter_start(&faulter, &rig, 0, 0, 1);
	CHECK_EQ(agent_take(&agent, 0).page, 0);
	agent_publish(&agent, 0);
	CHECK_EQ(agent_take(&agent, 0).page, 1);
	agent_wait_asleep(&agent, 0);
	gw_vmm_kick(rig.vmm, 0);
	CHECK_EQ(faulter_join(&faulter), -EINTR);
	gw_vmm_unkick(rig.vmm, 0);
	/* No granule is small enough: up to the region, and if even that is refused, it says so. */
	agent_publish_all(&agent);
	gw_sys_fail_from(GW_SYS_MPROTECT, 1, ENOMEM);
	CHECK_EQ(rig_fault(&rig, 0, 0), -ENOMEM);
	gw_sys_fail_none();
	CHECK_EQ(rig_fault(&rig, 0, 0), GW_VMM_FAULT_HERE);
	gw_sys_fail_nth(GW_SYS_MPROTECT, 1, EACCES);
	CHECK_EQ(rig_fault(&rig, 0, (uint64_t)3 * GRANULE), -EACCES);
	agent_close(&agent);
	rig_destroy(&rig);
}

int main(void)
{
	RUN_FORKED(threads_run_on_memory_that_comes);
	RUN_FORKED(what_is_here_around_a_page_is_given_with_it);
	RUN_FORKED(mappings_stay_few);
	RUN_FORKED(runs_that_grow_together_are_no_reason);
	RUN_FORKED(without_mappings_left_a_whole_granule_is_awaited);
	return EXIT_SUCCESS;
}
