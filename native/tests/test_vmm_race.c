/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_vmm_race.c - a vCPU is parked at each step of its fault, and a kick, its page, or a new agent
 * passes it there. It never sleeps through any of them: wait_ns_max is for ever here.
 *
 * Threads: the test's, which is the agent and who kicks; the vCPU. Errors: a failed check, or the
 * child's alarm, ends the process. Ownership: each test its own. Units: pages.
 * Source: vmm_fault.c, "Order".
 */
#include "vmm_agent.h"

#define PAGE_COUNT 64
#define WANTED	   5

/* In the order in which a fault passes them. The last two: between them is the kernel. */
static const char *const POINTS[] = {
	"vmm.missing",	      /* the bit was set; not looked whether kicked */
	"vmm.posted",	      /* not looked whether the agent sleeps */
	"vmm.spinning",	      /* before its looks */
	"vmm.wait_published", /* before the last look */
	"vmm.before_sleep",   /* after it, before FUTEX_WAIT */
	NULL,		      /* asleep */
};

#define POINT_COUNT (sizeof(POINTS) / sizeof(POINTS[0]))

struct race {
	struct rig rig;
	struct agent agent;
	struct faulter faulter;
	const char *point;
};

static void race_start(struct race *race, const char *point)
{
	rig_prepare(&race->rig, GW_VMM_EXIT_SIGSEGV, PAGE_COUNT, 2);
	race->rig.config.spin_ns = 1000;
	CHECK_EQ(gw_vmm_create(&race->rig.config, &race->rig.vmm), 0);
	race->rig.vmm->wait_ns_max = 0;
	rig_connect(&race->rig, &race->agent);
	race->point = point;
	if (point)
		gw_hook_hold(point);
	faulter_start(&race->faulter, &race->rig, 1, WANTED, 1);
	if (point)
		CHECK(gw_hook_wait(point, 1, DEADLINE_MS));
	else
		agent_wait_asleep(&race->agent, 1);
}

static void race_go_on(const struct race *race)
{
	if (race->point)
		gw_hook_release(race->point);
}

static void race_end(struct race *race, int want)
{
	CHECK_EQ(faulter_join(&race->faulter), want);
	CHECK_EQ(race->agent.rings[1].waiting, 0);
	agent_close(&race->agent);
	rig_destroy(&race->rig);
}

static void a_kick_before_the_fault(void)
{
	struct rig rig;
	struct agent agent;
	struct faulter faulter;

	rig_create(&rig, GW_VMM_EXIT_SIGSEGV, PAGE_COUNT, 2);
	rig_connect(&rig, &agent);
	gw_vmm_kick(rig.vmm, 1);
	errno = EDOM;
	CHECK_EQ(rig_fault(&rig, 1, WANTED), -EINTR);
	CHECK_EQ(rig_fault(&rig, 1, WANTED), -EINTR); /* until the unkick */
	CHECK_EQ(errno, EDOM);
	/* Another's kick, and a vCPU that does not exist. */
	gw_vmm_kick(rig.vmm, 0);
	gw_vmm_kick(rig.vmm, 2);
	gw_vmm_unkick(rig.vmm, 2);
	gw_vmm_unkick(rig.vmm, 1);
	faulter_start(&faulter, &rig, 1, WANTED, 1);
	CHECK_EQ(agent_take(&agent, 1).page, WANTED);
	agent_publish(&agent, WANTED);
	CHECK_EQ(faulter_join(&faulter), GW_VMM_FAULT_PRESENT);
	/* A page that is here needs no wait: a kick does not hide it. */
	gw_vmm_kick(rig.vmm, 1);
	CHECK_EQ(rig_fault(&rig, 1, WANTED), GW_VMM_FAULT_HERE);
	agent_close(&agent);
	rig_destroy(&rig);
}

static void a_kick(const char *point)
{
	struct race race;

	race_start(&race, point);
	gw_vmm_kick(race.rig.vmm, 1);
	race_go_on(&race);
	race_end(&race, -EINTR);
}

/* Kicked and unkicked while it slept: it may have missed that, and then it waits on. */
static void a_kick_taken_back(const char *point)
{
	struct race race;

	race_start(&race, point);
	gw_vmm_kick(race.rig.vmm, 1);
	gw_vmm_unkick(race.rig.vmm, 1);
	race_go_on(&race);
	if (point) {
		agent_wait_asleep(&race.agent, 1);
		agent_publish(&race.agent, WANTED);
		race_end(&race, GW_VMM_FAULT_PRESENT);
		return;
	}
	agent_publish(&race.agent, WANTED);
	CHECK_EQ(pthread_join(race.faulter.thread, NULL), 0);
	CHECK(race.faulter.result == -EINTR || race.faulter.result == GW_VMM_FAULT_PRESENT);
	agent_close(&race.agent);
	rig_destroy(&race.rig);
}

static void its_page(const char *point)
{
	struct race race;

	race_start(&race, point);
	agent_publish(&race.agent, WANTED);
	race_go_on(&race);
	/* At the first point it looks whether it was kicked, and posts, before it looks again. */
	race_end(&race, GW_VMM_FAULT_PRESENT);
}

/* The agent takes the request, or dies with it; the next one wants to hear it again. */
static void a_new_agent(const char *point)
{
	struct race race;
	uint32_t taken = 0;

	race_start(&race, point);
	if (agent_untaken(&race.agent, 1) > 0) {
		CHECK_EQ(agent_take(&race.agent, 1).page, WANTED);
		taken++;
	}
	agent_repost(&race.agent);
	race_go_on(&race);
	CHECK_EQ(agent_take(&race.agent, 1).page, WANTED);
	agent_publish(&race.agent, WANTED);
	race_end(&race, GW_VMM_FAULT_PRESENT);
	CHECK(taken == 1 || strcmp(point, POINTS[0]) == 0);
}

/* The agent goes to sleep while the vCPU has posted and not yet looked whether it sleeps. */
static void the_agent_goes_to_sleep(const char *point)
{
	struct race race;
	uint64_t rings = 0;

	race_start(&race, point);
	atomic_store(&race.agent.header->agent_idle, 1);
	const bool agent_sees = agent_untaken(&race.agent, 1) > 0;

	race_go_on(&race);
	if (!agent_sees) {
		agent_wait_readable(race.agent.doorbell_fd);
		CHECK_EQ(read(race.agent.doorbell_fd, &rings, sizeof(rings)), sizeof(rings));
	}
	CHECK_EQ(agent_take(&race.agent, 1).page, WANTED);
	agent_publish(&race.agent, WANTED);
	race_end(&race, GW_VMM_FAULT_PRESENT);
	CHECK(agent_sees || strcmp(point, POINTS[0]) == 0);
}

static struct race *signalled;

static void kick_in_handler(int number)
{
	(void)number;
	gw_vmm_kick(signalled->rig.vmm, 1);
}

/* A signal alone wakes the sleeper and changes nothing; a kick out of its handler ends the fault. */
static void a_kick_out_of_a_signal_handler(void)
{
	struct race race;
	struct sigaction action = {.sa_handler = SIG_IGN};

	signalled = &race;
	action.sa_handler = kick_in_handler;
	CHECK_EQ(sigaction(SIGUSR1, &action, NULL), 0);
	race_start(&race, NULL);
	CHECK_EQ(pthread_kill(race.faulter.thread, SIGUSR1), 0);
	race_end(&race, -EINTR);
}

static const struct {
	const char *name;
	void (*run)(const char *point);
} RACES[] = {
	{"a kick", a_kick},
	{"a kick taken back", a_kick_taken_back},
	{"its page", its_page},
	{"a new agent", a_new_agent},
	{"the agent goes to sleep", the_agent_goes_to_sleep},
};

static size_t race_at;
static size_t point_at;

static void one_race(void)
{
	RACES[race_at].run(POINTS[point_at]);
}

int main(void)
{
	RUN_FORKED(a_kick_before_the_fault);
	for (race_at = 0; race_at < sizeof(RACES) / sizeof(RACES[0]); race_at++)
		for (point_at = 0; point_at < POINT_COUNT; point_at++) {
			fprintf(stderr, "- %s at %s\n", RACES[race_at].name,
				POINTS[point_at] ? POINTS[point_at] : "its sleep");
			guest_run_forked(one_race);
		}
	RUN_FORKED(a_kick_out_of_a_signal_handler);
	return EXIT_SUCCESS;
}
