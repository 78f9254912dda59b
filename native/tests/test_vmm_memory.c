/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_vmm_memory.c - the library on real memory: what blocks, what is SIGBUS, what is PROT_NONE,
 * and that all of it is gone after the release.
 *
 * Threads: the test's, which is the agent; touchers; guest threads. Errors: a failed check ends the
 * process. Ownership: each test its own. Units: pages. Source: vmm_memory.c, vmm_give.c.
 */
#include "vmm_agent.h"

#include <grp.h>

#define COMPLETE "{\"event\": \"complete\"}\n"
#define RELEASED "{\"event\": \"released\"}\n"

static struct toucher touch(const uint8_t *at)
{
	return (struct toucher){.at = at};
}

static void touch_start(struct toucher *toucher)
{
	CHECK_EQ(pthread_create(&toucher->thread, NULL, toucher_main, toucher), 0);
}

static void release(struct rig *rig, struct agent *agent)
{
	agent_say(agent, COMPLETE);
	rig_wait_complete(rig);
	CHECK_EQ(gw_vmm_release(rig->vmm), 0);
	agent_expect(agent, RELEASED);
}

/* --- userfaultfd that blocks ------------------------------------------------------------------ */

static void the_window_blocks_and_the_agent_installs(void)
{
	struct rig rig;
	struct agent agent;
	struct toucher toucher;

	rig_prepare(&rig, GW_VMM_UFFD, 64, 2);
	rig.config.uffd_count = 3;
	CHECK_EQ(gw_vmm_create(&rig.config, &rig.vmm), 0);
	rig_connect(&rig, &agent);
	CHECK_EQ(agent.channel_fd, -1);
	CHECK_EQ(agent.uffd_count, 3);
	CHECK_EQ(gw_vmm_absent_count(rig.vmm), 64);
	CHECK(gw_vmm_is_absent(rig.vmm, 0));
	CHECK(!gw_vmm_slot_bitmap(rig.vmm, 0));
	CHECK_EQ(rig_fault(&rig, 0, 1), -EINVAL);
	gw_vmm_kick(rig.vmm, 0);
	gw_vmm_unkick(rig.vmm, 0);
	for (uint64_t page = 0; page < 63; page++) {
		toucher = touch(rig.window + page * PAGE);
		touch_start(&toucher);
		agent_copy_page(&agent, page);
		CHECK_EQ(toucher_join(&toucher), first_word(page));
	}
	/* The last one is a hole: after the release it reads zero, without an agent. */
	release(&rig, &agent);
	agent_close(&agent);
	CHECK_EQ(gw_vmm_absent_count(rig.vmm), 0);
	CHECK(!gw_vmm_is_absent(rig.vmm, 0));
	CHECK_EQ(rig.window[63 * PAGE], 0);
	rig_destroy(&rig);
}

/* The image in as many parts as there are userfaultfds, each page in exactly one mapping. */
static void the_memory_is_dealt_out(void)
{
	static const uint32_t counts[] = {1, 2, 5, 16};

	for (size_t i = 0; i < sizeof(counts) / sizeof(counts[0]); i++) {
		struct rig rig;
		struct agent agent;
		uint64_t offset = 0;
		uint64_t uffd = 0;

		rig_prepare(&rig, GW_VMM_UFFD, i == 3 ? 16384 : 66, 1);
		rig.config.uffd_count = counts[i];
		CHECK_EQ(gw_vmm_create(&rig.config, &rig.vmm), 0);
		rig_connect(&rig, &agent);
		CHECK_EQ(agent.uffd_count, counts[i]);
		for (uint32_t at = 0; at < agent_mapping_count(&agent); at++) {
			CHECK_EQ(agent_number(&agent, "offset", at), offset);
			CHECK_EQ(agent_number(&agent, "base_host_virt_addr", at),
				 (uintptr_t)rig.window + offset);
			CHECK_EQ(agent_number(&agent, "guest_phys_addr", at),
				 rig_gpa(&rig, offset / PAGE));
			CHECK(agent_number(&agent, "uffd", at) >= uffd);
			uffd = agent_number(&agent, "uffd", at);
			offset += agent_number(&agent, "size", at);
			CHECK(i != 3 || offset % (2U << 20) == 0);
		}
		CHECK_EQ(uffd, counts[i] - 1);
		CHECK_EQ(offset, rig.page_count * PAGE);
		for (uint64_t page = 0; page < 66; page++)
			agent_copy_page(&agent, page);
		agent_close(&agent);
		rig_destroy(&rig);
	}
}

/* kvm-userfault needs a kernel that has it for its slots; its channel and memory need not. */
static void a_bit_and_a_userfaultfd_on_one_mapping(void)
{
	struct rig rig;
	struct agent agent;
	struct faulter faulter;

	rig_create(&rig, GW_VMM_KVM_USERFAULT, 256, 1);
	rig_connect(&rig, &agent);
	CHECK_EQ(gw_vmm_slot_flags(rig.vmm), 1U << 3);
	CHECK(gw_vmm_slot_bitmap(rig.vmm, 1) == gw_vmm_slot_bitmap(rig.vmm, 0) + 2);
	faulter_start(&faulter, &rig, 0, 130, 1);
	CHECK_EQ(agent_take(&agent, 0).page, 130);
	agent_copy_page(&agent, 130);
	agent_publish(&agent, 130);
	CHECK_EQ(faulter_join(&faulter), GW_VMM_FAULT_PRESENT);
	CHECK(guest_has_pattern(rig.guest, 130));
	agent_publish_all(&agent);
	release(&rig, &agent);
	CHECK_EQ(gw_vmm_slot_flags(rig.vmm), 0);
	agent_close(&agent);
	rig_destroy(&rig);
}

/* --- SIGBUS mode ------------------------------------------------------------------------------ */

/* The kernel's own access, as KVM's: 1 or -1 and EFAULT. */
static int kernel_reads(const int pipe_fds[2], const uint8_t *at, uint8_t *ret_byte)
{
	if (write(pipe_fds[1], at, 1) != 1) {
		CHECK_EQ(errno, EFAULT);
		return -1;
	}
	CHECK_EQ(read(pipe_fds[0], ret_byte, 1), 1);
	return 1;
}

static void guests_fault_and_the_window_blocks(void)
{
	struct rig rig;
	struct agent agent;
	struct faulter faulter;
	struct toucher toucher;
	int pipe_fds[2];
	uint8_t byte = 1;
	const uint64_t hole = rig_gpa(&(struct rig){.page_count = 64}, 40);

	CHECK_EQ(pipe(pipe_fds), 0);
	rig_create(&rig, GW_VMM_EXIT_EMULATION, 64, 1);
	rig_connect(&rig, &agent);
	CHECK_EQ(agent.uffd_count, 1); /* the private one is not handed out */
	CHECK_EQ(kernel_reads(pipe_fds, rig.guest + 33 * PAGE, &byte), -1);
	faulter_start(&faulter, &rig, 0, 33, 1);
	CHECK_EQ(agent_take(&agent, 0).page, 33);
	toucher = touch(rig.window + 33 * PAGE);
	touch_start(&toucher);
	agent_copy_page(&agent, 33);
	agent_publish(&agent, 33);
	CHECK_EQ(faulter_join(&faulter), GW_VMM_FAULT_PRESENT);
	CHECK_EQ(toucher_join(&toucher), first_word(33));
	CHECK_EQ(kernel_reads(pipe_fds, rig.guest + 33 * PAGE, &byte), 1);
	CHECK_EQ(byte, rig.window[33 * PAGE]);

	/* A hole: never filled while its bit is set; after that, zeros where there is no page. */
	CHECK_EQ(gw_vmm_fill_holes(rig.vmm, &hole, 1), -EAGAIN);
	CHECK_EQ(kernel_reads(pipe_fds, rig.guest + 40 * PAGE, &byte), -1);
	agent_publish(&agent, 40);
	CHECK_EQ(rig_fault(&rig, 0, 40), GW_VMM_FAULT_HERE);
	CHECK_EQ(kernel_reads(pipe_fds, rig.guest + 40 * PAGE, &byte), -1);
	gw_sys_fail_nth(GW_SYS_IOCTL, 1, ENOMEM);
	CHECK_EQ(gw_vmm_fill_holes(rig.vmm, &hole, 1), -ENOMEM);
	gw_sys_fail_nth(GW_SYS_IOCTL, 1, EAGAIN);
	CHECK_EQ(gw_vmm_fill_holes(rig.vmm, &hole, 1), -EAGAIN);
	CHECK_EQ(gw_vmm_fill_holes(rig.vmm, (uint64_t[]){hole, UINT64_C(1) << 50}, 2), 0);
	CHECK_EQ(kernel_reads(pipe_fds, rig.guest + 40 * PAGE, &byte), 1);
	CHECK_EQ(byte, 0);
	const uint64_t filled = rig_gpa(&rig, 33);

	CHECK_EQ(gw_vmm_fill_holes(rig.vmm, &filled, 1), 0);
	CHECK(guest_has_pattern(rig.guest, 33));
	agent_publish_all(&agent);
	CHECK_EQ(kernel_reads(pipe_fds, rig.guest + 50 * PAGE, &byte), -1);
	release(&rig, &agent);
	CHECK_EQ(kernel_reads(pipe_fds, rig.guest + 50 * PAGE, &byte), 1);
	CHECK_EQ(gw_vmm_fill_holes(rig.vmm, &hole, 1), 0);
	agent_close(&agent);
	rig_destroy(&rig);
}

/* --- without privilege ------------------------------------------------------------------------ */

static void become_nobody(void)
{
	CHECK_EQ(setgroups(0, NULL), 0);
	CHECK_EQ(setresgid(65534, 65534, 65534), 0);
	CHECK_EQ(setresuid(65534, 65534, 65534), 0);
}

static void user_mode_is_enough_for_threads(void)
{
	struct rig rig;
	struct agent agent;
	struct toucher toucher;
	char reason[GW_VMM_REASON_LEN_MAX];
	int pipe_fds[2];
	uint8_t byte = 1;

	if (getuid() != 0)
		return; /* without privilege already: the other tests say it */
	become_nobody();
	CHECK_EQ(gw_vmm_try(GW_VMM_EXIT_SIGSEGV, -1, reason), 0);
	CHECK_EQ(gw_vmm_try(GW_VMM_UFFD, -1, reason), 0);
	const bool refused = strstr(reason, "user space only") != NULL;

	rig_prepare(&rig, GW_VMM_UFFD, 64, 1);
	if (refused)
		CHECK_EQ(gw_vmm_create(&rig.config, &rig.vmm), -EPERM);
	rig.config.user_mode_ok = true;
	CHECK_EQ(gw_vmm_create(&rig.config, &rig.vmm), 0);
	rig_connect(&rig, &agent);
	toucher = touch(rig.window + 7 * PAGE);
	touch_start(&toucher);
	agent_copy_page(&agent, 7);
	CHECK_EQ(toucher_join(&toucher), first_word(7));
	CHECK_EQ(pipe(pipe_fds), 0);
	/* Neither blocked nor zero. */
	if (refused)
		CHECK_EQ(kernel_reads(pipe_fds, rig.window + 8 * PAGE, &byte), -1);
	agent_close(&agent);
	rig_destroy(&rig);
}

/* What SIGBUS mode is for is what user mode does anyway: KVM's exits need no privilege either. */
static void exits_need_no_privilege(void)
{
	struct rig rig;
	struct agent agent;
	int pipe_fds[2];
	uint8_t byte = 1;

	if (getuid() == 0)
		become_nobody();
	rig_prepare(&rig, GW_VMM_EXIT_EMULATION, 64, 1);
	rig.config.user_mode_ok = true;
	CHECK_EQ(gw_vmm_create(&rig.config, &rig.vmm), 0);
	rig_connect(&rig, &agent);
	CHECK_EQ(pipe(pipe_fds), 0);
	CHECK_EQ(kernel_reads(pipe_fds, rig.guest + 7 * PAGE, &byte), -1);
	agent_copy_page(&agent, 7);
	agent_publish(&agent, 7);
	CHECK_EQ(kernel_reads(pipe_fds, rig.guest + 7 * PAGE, &byte), 1);
	CHECK_EQ(byte, rig.window[7 * PAGE]);
	agent_close(&agent);
	rig_destroy(&rig);
}

/* --- 2 MiB ------------------------------------------------------------------------------------ */

/* Registered and handed off; no huge page is needed for that. */
static void pages_of_2m_go_by_userfaultfd(void)
{
	const uint64_t len = UINT64_C(8) << 20;
	struct rig rig;
	struct agent agent;

	rig_prepare(&rig, GW_VMM_UFFD, 64, 1);
	const int fd = memfd_create("rig", MFD_CLOEXEC | MFD_HUGETLB);

	if (fd < 0) {
		fprintf(stderr, "  no hugetlbfs in this kernel\n");
		rig_destroy(&rig);
		return;
	}
	CHECK_EQ(ftruncate(fd, (off_t)len), 0);
	void *const at = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);

	CHECK(at != MAP_FAILED);
	rig.regions[0] = (struct gw_vmm_region){.len = len, .host_addr = (uintptr_t)at};
	rig.config.region_count = 1;
	rig.config.ram_fd = fd;
	rig.config.page_size = 2U << 20;
	rig.config.uffd_count = 2;
	CHECK_EQ(gw_vmm_create(&rig.config, &rig.vmm), 0);
	rig_connect(&rig, &agent);
	CHECK_EQ(agent_number(&agent, "page_size", 0), 2U << 20);
	CHECK_EQ(agent_number(&agent, "offset", 1), len / 2);
	CHECK_EQ(gw_vmm_absent_count(rig.vmm), 4);
	agent_close(&agent);
	rig_destroy(&rig);
	CHECK_EQ(munmap(at, len), 0);
	CHECK_EQ(close(fd), 0);
}

int main(void)
{
	guest_need_uffd();
	RUN_FORKED(the_window_blocks_and_the_agent_installs);
	RUN_FORKED(the_memory_is_dealt_out);
	RUN_FORKED(a_bit_and_a_userfaultfd_on_one_mapping);
	RUN_FORKED(guests_fault_and_the_window_blocks);
	RUN_FORKED(user_mode_is_enough_for_threads);
	RUN_FORKED(exits_need_no_privilege);
	RUN_FORKED(pages_of_2m_go_by_userfaultfd);
	return EXIT_SUCCESS;
}
