/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_vmm_handoff.c - what an agent is handed, what it says and hears, and that another agent gets
 * the same when it dies.
 *
 * Threads: the test's, which is the agent; the library's. Errors: a failed check ends the process.
 * Ownership: each test its own. Units: pages. Source: docs/exit-channel.md, sections 1 and 5.
 */
#include "vmm_agent.h"

#define PAGE_COUNT 64
#define COMPLETE   "{\"event\": \"complete\"}\n"
#define RELEASED   "{\"event\": \"released\"}\n"

static void expect_text(const struct rig *rig, const struct agent *agent)
{
	char want[2048];

	(void)snprintf(want, sizeof(want),
		       "{\"protocol\": \"godwit-exit-channel\", \"version\": 1, \"vmm\": \"rig\", "
		       "\"pid\": %d, \"backend\": \"exit-sigsegv\", "
		       "\"backend_reason\": \"a \\\"test\\\"?\", \"vcpu_count\": 2, "
		       "\"fds\": [\"memory\", \"channel\", \"doorbell\"], \"mappings\": ["
		       "{\"base_host_virt_addr\": %llu, \"size\": 131072, \"offset\": 0, "
		       "\"page_size\": 4096, \"page_size_kib\": 4096, \"guest_phys_addr\": 0}, "
		       "{\"base_host_virt_addr\": %llu, \"size\": 131072, \"offset\": 131072, "
		       "\"page_size\": 4096, \"page_size_kib\": 4096, "
		       "\"guest_phys_addr\": 4294967296}]}\n",
		       getpid(), (unsigned long long)(uintptr_t)rig->window,
		       (unsigned long long)(uintptr_t)rig->window + 131072);
	if (strcmp(agent->message, want) != 0)
		fprintf(stderr, "got  %swant %s", agent->message, want);
	CHECK(strcmp(agent->message, want) == 0);
}

static bool same_file(int a, int b)
{
	struct stat stats[2];

	CHECK_EQ(fstat(a, &stats[0]), 0);
	CHECK_EQ(fstat(b, &stats[1]), 0);
	return stats[0].st_ino == stats[1].st_ino && stats[0].st_dev == stats[1].st_dev;
}

static void the_message_says_what_is_passed(void)
{
	struct rig rig;
	struct agent agent;
	char long_path[200];

	rig_create(&rig, GW_VMM_EXIT_SIGSEGV, PAGE_COUNT, 2);
	memset(long_path, 'x', sizeof(long_path) - 1);
	long_path[sizeof(long_path) - 1] = '\0';
	CHECK_EQ(gw_vmm_connect(rig.vmm, long_path), -EINVAL);
	CHECK_EQ(gw_vmm_connect(rig.vmm, ""), -EINVAL);
	rig_connect(&rig, &agent);
	CHECK_EQ(gw_vmm_connect(rig.vmm, rig.path), -EALREADY);
	expect_text(&rig, &agent);
	CHECK_EQ(agent.fd_count, 3);
	CHECK(same_file(agent.memory_fd, rig.ram_fd));
	CHECK(fcntl(agent.doorbell_fd, F_GETFL) & O_NONBLOCK);
	agent_close(&agent);
	rig_destroy(&rig);
}

static void the_end(struct rig *rig, struct agent *agent)
{
	CHECK_EQ(gw_vmm_release(rig->vmm), -EBUSY);
	agent_publish_all(agent);
	CHECK_EQ(gw_vmm_release(rig->vmm), -EBUSY); /* bits are not durability: it must be said */
	agent_say(agent, COMPLETE);
	rig_wait_complete(rig);
	CHECK_EQ(gw_vmm_absent_count(rig->vmm), 0);
	CHECK(!gw_vmm_is_released(rig->vmm));
	CHECK_EQ(gw_vmm_release(rig->vmm), 0);
	CHECK_EQ(gw_vmm_release(rig->vmm), 0);
	agent_expect(agent, RELEASED);
	agent_wait_readable(agent->fd);
	CHECK_EQ(recv(agent->fd, agent->message, 1, 0), 0); /* and the connection ends */
	CHECK(gw_vmm_is_released(rig->vmm));
	CHECK_EQ(rig->complete_count, 1);
}

static void complete_then_released(void)
{
	struct rig rig;
	struct agent agent;

	rig_create(&rig, GW_VMM_EXIT_SIGSEGV, PAGE_COUNT, 2);
	rig_connect(&rig, &agent);
	the_end(&rig, &agent);
	rig.window[0] = 1;
	CHECK_EQ(rig.guest[0], 1); /* PROT_NONE is gone */
	agent_close(&agent);
	rig_destroy(&rig);
}

/* Lines in pieces, with other white space, and lines of a later version. */
static void lines_are_taken_as_they_come(void)
{
	static const char line[] = "{\"event\":\"news\"}\n\n {\t\"event\" :\"complete\" }\r\n"
				   "{\"event\": \"complete\"}\n";
	struct rig rig;
	struct agent agent;

	rig_create(&rig, GW_VMM_EXIT_SIGSEGV, PAGE_COUNT, 2);
	rig_connect(&rig, &agent);
	agent_publish_all(&agent);
	for (const char *at = line; *at != '\0'; at++)
		agent_say(&agent, (char[]){*at, '\0'});
	rig_wait_complete(&rig);
	CHECK_EQ(gw_vmm_release(rig.vmm), 0);
	agent_expect(&agent, RELEASED);
	CHECK_EQ(rig.complete_count, 1);
	agent_close(&agent);
	rig_destroy(&rig);
}

/* It hangs up on us, and comes again; nothing else has happened. */
static void expect_hang_up(const struct rig *rig, struct agent *agent)
{
	agent_wait_readable(agent->fd);
	CHECK(recv(agent->fd, agent->message, 1, 0) <= 0);
	agent_hang_up(agent);
	agent_accept(agent);
	CHECK_EQ(rig->complete_count, 0);
	CHECK_EQ(gw_vmm_release(rig->vmm), -EBUSY);
}

/* The worst an agent can say: that it is over when it is not. And the silliest. */
static void lies_and_noise_end_the_connection(void)
{
	struct rig rig;
	struct agent agent;
	char noise[300];

	rig_create(&rig, GW_VMM_EXIT_SIGSEGV, PAGE_COUNT, 2);
	rig_connect(&rig, &agent);
	for (uint64_t page = 0; page < PAGE_COUNT - 1; page++)
		agent_publish(&agent, page);
	agent_say(&agent, COMPLETE);
	expect_hang_up(&rig, &agent);
	memset(noise, 'x', sizeof(noise) - 1);
	noise[sizeof(noise) - 1] = '\0';
	agent_say(&agent, noise);
	expect_hang_up(&rig, &agent);
	the_end(&rig, &agent);
	agent_close(&agent);
	rig_destroy(&rig);
}

static void a_new_agent_gets_the_same(void)
{
	struct rig rig;
	struct agent agent;
	char first[sizeof(agent.message)];

	rig_create(&rig, GW_VMM_EXIT_SIGSEGV, PAGE_COUNT, 2);
	rig_connect(&rig, &agent);
	memcpy(first, agent.message, sizeof(first));
	for (int i = 0; i < 3; i++) {
		agent_close(&agent); /* the socket too: it finds nobody for a while */
		gw_hook_call("vmm.disconnected", NULL, NULL);
		while (gw_hook_reach_count("vmm.disconnected") < 2)
			(void)sched_yield();
		agent_listen(&agent, rig.path);
		agent_accept(&agent);
		CHECK(strcmp(agent.message, first) == 0);
		CHECK_EQ(agent.fd_count, 3);
		agent_publish(&agent, (uint64_t)i);
	}
	CHECK_EQ(gw_vmm_absent_count(rig.vmm), PAGE_COUNT - 3); /* the memory is the same */
	/* Dead between complete and released: the next one hears it at once. */
	agent_publish_all(&agent);
	agent_say(&agent, COMPLETE);
	rig_wait_complete(&rig);
	agent_close(&agent);
	CHECK_EQ(gw_vmm_release(rig.vmm), 0);
	agent_listen(&agent, rig.path);
	agent_accept(&agent);
	agent_expect(&agent, RELEASED);
	CHECK_EQ(rig.complete_count, 1);
	agent_close(&agent);
	rig_destroy(&rig);
}

/* --- agents that are processes, and die ------------------------------------------------------- */

/* Takes one request and dies with it, page unserved; or serves until the VMM closes. */
static void agent_process(struct rig *rig, int go_fd, int ready_fd, bool dies)
{
	struct agent agent;
	char byte;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	CHECK_EQ(read(go_fd, &byte, 1), 1);
	agent_listen(&agent, rig->path);
	CHECK_EQ(write(ready_fd, &byte, 1), 1);
	agent_accept(&agent);
	if (dies) {
		(void)agent_take(&agent, 1);
		(void)kill(getpid(), SIGKILL);
	}
	/* What docs/exit-channel.md asks of a new one. */
	agent_repost(&agent);
	const uint64_t page = agent_take(&agent, 1).page;

	agent_write_page(&agent, page);
	agent_publish(&agent, page);
	for (uint64_t i = 0; i < PAGE_COUNT; i++)
		if (i != page)
			agent_write_page(&agent, i);
	agent_publish_all(&agent);
	agent_say(&agent, COMPLETE);
	agent_expect(&agent, RELEASED);
	_exit(EXIT_SUCCESS);
}

static void an_agent_that_is_killed_is_followed_by_another(void)
{
	struct rig rig;
	struct faulter faulter;
	int go[2][2];
	int ready[2];
	pid_t pids[2];
	char byte = 0;
	int status;

	rig_prepare(&rig, GW_VMM_EXIT_SIGSEGV, PAGE_COUNT, 2);
	CHECK_EQ(pipe(ready), 0);
	for (int i = 0; i < 2; i++) {
		CHECK_EQ(pipe(go[i]), 0);
		pids[i] = fork();
		CHECK(pids[i] >= 0);
		if (pids[i] == 0)
			agent_process(&rig, go[i][0], ready[1], i == 0);
	}
	CHECK_EQ(gw_vmm_create(&rig.config, &rig.vmm), 0);
	rig.vmm->wait_ns_max = 0;
	CHECK_EQ(write(go[0][1], &byte, 1), 1);
	CHECK_EQ(read(ready[0], &byte, 1), 1);
	CHECK_EQ(gw_vmm_connect(rig.vmm, rig.path), 0);
	faulter_start(&faulter, &rig, 1, 9, 1);
	CHECK_EQ(waitpid(pids[0], &status, 0), pids[0]);
	CHECK(WIFSIGNALED(status));
	CHECK_EQ(write(go[1][1], &byte, 1), 1);
	CHECK_EQ(faulter_join(&faulter), GW_VMM_FAULT_PRESENT);
	CHECK(guest_has_pattern(rig.guest, 9));
	rig_wait_complete(&rig);
	CHECK_EQ(gw_vmm_release(rig.vmm), 0);
	CHECK_EQ(waitpid(pids[1], &status, 0), pids[1]);
	CHECK_EQ(status, 0);
	/* The line is out a moment before the library knows. */
	while (!gw_vmm_is_released(rig.vmm))
		(void)sched_yield();
	for (uint64_t page = 0; page < PAGE_COUNT; page++)
		CHECK(guest_has_pattern(rig.guest, page));
	rig_destroy(&rig);
}

/* --- calls that fail -------------------------------------------------------------------------- */

static const struct {
	enum gw_sys_call call;
	int err;
	uint64_t nth_max;
} FAILURES[] = {
	/* As often as it comes for certain. */
	{GW_SYS_SOCKET, EMFILE, 1},
	{GW_SYS_CONNECT, EAGAIN, 1},
	{GW_SYS_CONNECT, ENOENT, 1},
	{GW_SYS_SENDMSG, EAGAIN, 2},
	{GW_SYS_SENDMSG, EINTR, 2},
	{GW_SYS_SENDMSG, EPIPE, 2},
	{GW_SYS_SENDMSG, ETOOMANYREFS, 1},
	{GW_SYS_RECV, EINTR, 1},
	{GW_SYS_RECV, ECONNRESET, 1},
	{GW_SYS_POLL, EINTR, 1},
	{GW_SYS_POLL, ENOMEM, 1},
	{GW_SYS_WRITE, EINTR, 1},
	{GW_SYS_CLOSE, EIO, 1},
};

/* Accepts as often as it must: a connection that the failure broke is followed by another. */
static void serve_to_the_end(struct rig *rig, struct agent *agent)
{
	char byte;

	for (;;) {
		struct pollfd poll_fd = {.events = POLLIN};

		agent->fd = accept4(agent->listen_fd, NULL, NULL, SOCK_CLOEXEC);
		CHECK(agent->fd >= 0);
		agent->message_len = 0;
		agent->fd_count = 0;
		agent->uffd_count = 0;
		poll_fd.fd = agent->fd;
		CHECK_EQ(poll(&poll_fd, 1, DEADLINE_MS), 1);
		if (recv(agent->fd, &byte, 1, MSG_PEEK) <= 0) {
			CHECK_EQ(close(agent->fd), 0); /* broken before its first byte */
			continue;
		}
		agent_read_message(agent);
		agent_sort_fds(agent);
		agent_map_channel(agent);
		agent_publish_all(agent);
		(void)send(agent->fd, COMPLETE, strlen(COMPLETE), MSG_NOSIGNAL);
		if (atomic_load(&rig->complete_count) == 0) {
			/* Either it has heard us, or it hangs up. */
			while (sem_trywait(&rig->completed) != 0 && poll(&poll_fd, 1, 1) == 0)
				;
			if (atomic_load(&rig->complete_count) > 0)
				CHECK_EQ(gw_vmm_release(rig->vmm), 0);
		} else {
			CHECK_EQ(gw_vmm_release(rig->vmm), 0);
		}
		CHECK_EQ(poll(&poll_fd, 1, DEADLINE_MS), 1);
		if (recv(agent->fd, &byte, 1, 0) == 1)
			return; /* of the released line */
		agent_hang_up(agent);
	}
}

static void calls_that_fail_are_made_again(void)
{
	for (size_t i = 0; i < sizeof(FAILURES) / sizeof(FAILURES[0]); i++)
		for (uint64_t nth = 1; nth <= FAILURES[i].nth_max; nth++) {
			const int fd_count = open_fd_count();
			struct rig rig;
			struct agent agent;

			rig_create(&rig, GW_VMM_EXIT_SIGSEGV, PAGE_COUNT, 2);
			agent_listen(&agent, rig.path);
			gw_sys_fail_nth(FAILURES[i].call, nth, FAILURES[i].err);
			CHECK_EQ(gw_vmm_connect(rig.vmm, rig.path), 0);
			serve_to_the_end(&rig, &agent);
			agent_close(&agent);
			rig_destroy(&rig);
			gw_sys_fail_none();
			CHECK(gw_sys_failed());
			CHECK_EQ(open_fd_count(), fd_count);
		}
}

static void a_failing_start_can_be_tried_again(void)
{
	struct rig rig;
	struct agent agent;

	rig_create(&rig, GW_VMM_EXIT_SIGSEGV, PAGE_COUNT, 2);
	gw_sys_fail_nth(GW_SYS_EVENTFD, 1, EMFILE);
	CHECK_EQ(gw_vmm_connect(rig.vmm, rig.path), -EMFILE);
	rig_connect(&rig, &agent);
	agent_publish_all(&agent);
	agent_say(&agent, COMPLETE);
	rig_wait_complete(&rig);
	gw_sys_fail_nth(GW_SYS_MPROTECT, 2, ENOMEM);
	CHECK_EQ(gw_vmm_release(rig.vmm), -ENOMEM);
	CHECK(!gw_vmm_is_released(rig.vmm));
	CHECK_EQ(gw_vmm_release(rig.vmm), 0);
	agent_expect(&agent, RELEASED);
	agent_close(&agent);
	rig_destroy(&rig);
}

int main(void)
{
	RUN_FORKED(the_message_says_what_is_passed);
	RUN_FORKED(complete_then_released);
	RUN_FORKED(lines_are_taken_as_they_come);
	RUN_FORKED(lies_and_noise_end_the_connection);
	RUN_FORKED(a_new_agent_gets_the_same);
	RUN_FORKED(an_agent_that_is_killed_is_followed_by_another);
	RUN_FORKED(calls_that_fail_are_made_again);
	RUN_FORKED(a_failing_start_can_be_tried_again);
	return EXIT_SUCCESS;
}
