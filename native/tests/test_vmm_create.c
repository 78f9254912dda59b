/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_vmm_create.c - what create refuses and what trying a backend says; each system call of both
 * failed once.
 *
 * Threads: the test's alone. Errors: a failed check ends the process. Ownership: each test its own.
 * Units: pages. Source: vmm.h.
 */
#include "vmm_agent.h"

#define PAGE_COUNT 256
#define CALLS_MAX  60

static const enum gw_vmm_backend BACKENDS[] = {
	GW_VMM_KVM_USERFAULT,
	GW_VMM_EXIT_EMULATION,
	GW_VMM_EXIT_SIGSEGV,
	GW_VMM_UFFD,
};

#define BACKEND_COUNT (sizeof(BACKENDS) / sizeof(BACKENDS[0]))

/* --- what is refused -------------------------------------------------------------------------- */

struct mistake {
	const char *what;
	enum gw_vmm_backend backend;
	void (*make)(struct rig *rig);
};

#define MISTAKE(name, statement)          \
	static void name(struct rig *rig) \
	{                                 \
		statement;                \
	}

MISTAKE(another_size, rig->config.struct_size--)
MISTAKE(page_of_2m, rig->config.page_size = 2U << 20)
MISTAKE(page_of_8k, rig->config.page_size = 8192)
MISTAKE(no_vcpu, rig->config.vcpu_count = 0)
MISTAKE(many_vcpus, rig->config.vcpu_count = GW_EXIT_VCPU_COUNT_MAX + 1)
MISTAKE(backend_auto, rig->config.backend = GW_VMM_AUTO)
MISTAKE(no_uffd, rig->config.uffd_count = 0)
MISTAKE(many_uffds, rig->config.uffd_count = GW_VMM_UFFD_COUNT_MAX + 1)
MISTAKE(long_spin, rig->config.spin_ns = GW_VMM_SPIN_NS_MAX + 1)
MISTAKE(no_name, rig->config.vmm_name = NULL)
MISTAKE(no_callback, rig->config.on_complete = NULL)
MISTAKE(no_regions, rig->config.region_count = 0)
MISTAKE(many_regions, rig->config.region_count = GW_VMM_REGION_COUNT_MAX + 1)
MISTAKE(a_hole_in_the_image, rig->regions[1].offset += PAGE)
MISTAKE(not_from_0, rig->regions[0].offset = PAGE)
MISTAKE(half_a_page, rig->regions[1].len -= 100)
MISTAKE(empty, rig->regions[1].len = 0)
MISTAKE(odd_gpa, rig->regions[1].gpa++)
MISTAKE(gpas_overlap, rig->regions[1].gpa = rig->regions[0].len - PAGE)
MISTAKE(gpa_ends, rig->regions[1].gpa = 0 - PAGE)
MISTAKE(hosts_overlap, rig->regions[1].host_addr -= PAGE)
MISTAKE(no_host, rig->regions[0].host_addr = 0)
MISTAKE(guests_overlap, rig->regions[1].guest_addr -= PAGE)
MISTAKE(guest_is_window, rig->regions[0].guest_addr = rig->regions[0].host_addr)
MISTAKE(guest_is_others_window, rig->regions[0].guest_addr = rig->regions[1].host_addr)
MISTAKE(no_guest, rig->regions[0].guest_addr = 0)
MISTAKE(two_mappings, rig->regions[0].guest_addr += PAGE)
MISTAKE(ram_too_short, CHECK_EQ(ftruncate(rig->ram_fd, (PAGE_COUNT - 1) * (off_t)PAGE), 0))

static const struct mistake MISTAKES[] = {
	{"another struct_size", GW_VMM_UFFD, another_size},
	{"2 MiB and exits", GW_VMM_EXIT_SIGSEGV, page_of_2m},
	{"8 KiB", GW_VMM_UFFD, page_of_8k},
	{"no vCPU", GW_VMM_UFFD, no_vcpu},
	{"too many vCPUs", GW_VMM_EXIT_SIGSEGV, many_vcpus},
	{"auto", GW_VMM_UFFD, backend_auto},
	{"no uffd", GW_VMM_UFFD, no_uffd},
	{"too many uffds", GW_VMM_UFFD, many_uffds},
	{"a long spin", GW_VMM_EXIT_SIGSEGV, long_spin},
	{"no name", GW_VMM_UFFD, no_name},
	{"no callback", GW_VMM_UFFD, no_callback},
	{"no regions", GW_VMM_UFFD, no_regions},
	{"too many regions", GW_VMM_UFFD, many_regions},
	{"a hole in the image", GW_VMM_UFFD, a_hole_in_the_image},
	{"an image not from 0 on", GW_VMM_UFFD, not_from_0},
	{"half a page", GW_VMM_UFFD, half_a_page},
	{"an empty region", GW_VMM_UFFD, empty},
	{"an odd gpa", GW_VMM_UFFD, odd_gpa},
	{"gpas that overlap", GW_VMM_UFFD, gpas_overlap},
	{"a gpa without end", GW_VMM_UFFD, gpa_ends},
	{"windows that overlap", GW_VMM_EXIT_SIGSEGV, hosts_overlap},
	{"no window", GW_VMM_EXIT_SIGSEGV, no_host},
	{"guests that overlap", GW_VMM_EXIT_SIGSEGV, guests_overlap},
	{"guest and window are one", GW_VMM_EXIT_SIGSEGV, guest_is_window},
	{"a guest in another's window", GW_VMM_EXIT_EMULATION, guest_is_others_window},
	{"threads without a guest", GW_VMM_EXIT_SIGSEGV, no_guest},
	{"two mappings for uffd", GW_VMM_UFFD, two_mappings},
	{"two mappings for the flag", GW_VMM_KVM_USERFAULT, two_mappings},
	{"memory too short", GW_VMM_EXIT_SIGSEGV, ram_too_short},
};

static void each_mistake_is_refused(void)
{
	for (size_t i = 0; i < sizeof(MISTAKES) / sizeof(MISTAKES[0]); i++) {
		struct rig rig;
		struct gw_vmm *const untouched = (struct gw_vmm *)(void *)&rig;

		rig_prepare(&rig, MISTAKES[i].backend, PAGE_COUNT, 2);
		const int fd_count = open_fd_count();

		MISTAKES[i].make(&rig);
		rig.vmm = untouched;
		const int err = gw_vmm_create(&rig.config, &rig.vmm);

		if (err != -EINVAL)
			fprintf(stderr, "%s: %d\n", MISTAKES[i].what, err);
		CHECK_EQ(err, -EINVAL);
		CHECK(rig.vmm == untouched);
		CHECK_EQ(open_fd_count(), fd_count);
		rig.vmm = NULL; /* which destroy takes */
		rig_destroy(&rig);
	}
}

static void slots_begin_with_a_word(void)
{
	struct rig rig;

	rig_prepare(&rig, GW_VMM_KVM_USERFAULT, 100, 1); /* regions of 50 */
	CHECK_EQ(gw_vmm_create(&rig.config, &rig.vmm), -EINVAL);
	rig_destroy(&rig);
}

/* Content from before the registration would be taken for the guest's. */
static void memory_with_content_is_refused(void)
{
	for (size_t i = 0; i < BACKEND_COUNT; i++) {
		struct rig rig;

		rig_prepare(&rig, BACKENDS[i], PAGE_COUNT, 2);
		CHECK_EQ(*(volatile uint8_t *)(rig.window + 200 * PAGE),
			 0); /* touched, never written */
		CHECK_EQ(gw_vmm_create(&rig.config, &rig.vmm), -EEXIST);
		rig_destroy(&rig);
	}
}

/* --- calls that fail -------------------------------------------------------------------------- */

static void each_call_of_create_failed_once(void)
{
	static const int errors[] = {ENOMEM, EMFILE, EPERM, EINVAL};
	uint32_t failed_count = 0;

	for (size_t i = 0; i < BACKEND_COUNT; i++)
		for (uint64_t nth = 1; nth < CALLS_MAX; nth++) {
			const int fd_count = open_fd_count();
			const int want = errors[nth % 4];
			struct rig rig;

			rig_prepare(&rig, BACKENDS[i], PAGE_COUNT, 2);
			rig.config.uffd_count = 2;
			gw_sys_fail_nth(GW_SYS_ANY, nth, want);
			const int err = gw_vmm_create(&rig.config, &rig.vmm);
			const bool failed = gw_sys_failed();

			gw_sys_fail_none();
			/* /dev/userfaultfd has a substitute, and so has full mode in one place. */
			CHECK(err == 0 || (failed && err == -want));
			CHECK((err == 0) == (rig.vmm != NULL));
			failed_count += err < 0;
			rig_destroy(&rig);
			CHECK_EQ(open_fd_count(), fd_count);
			if (!failed)
				break;
			CHECK(nth < CALLS_MAX - 1);
		}
	CHECK(failed_count > 40);
}

/* --- trying ----------------------------------------------------------------------------------- */

static int open_kvm(void)
{
	return open("/dev/kvm", O_RDWR | O_CLOEXEC);
}

static void a_try_says_why_not(void)
{
	char reason[GW_VMM_REASON_LEN_MAX];
	const int fd_count = open_fd_count();

	CHECK_EQ(gw_vmm_try(GW_VMM_AUTO, -1, reason), -EINVAL);
	CHECK_EQ(gw_vmm_try(GW_VMM_KVM_USERFAULT, -1, reason), -ENODEV);
	CHECK(strcmp(reason, "kvm-userfault: there is no usable /dev/kvm (ENODEV)") == 0);
	CHECK_EQ(gw_vmm_try(GW_VMM_EXIT_EMULATION, -1, reason), -ENODEV);
	CHECK_EQ(gw_vmm_try(GW_VMM_EXIT_SIGSEGV, -1, reason), 0);
	CHECK(strcmp(reason, "exit-sigsegv: works") == 0);
	CHECK_EQ(gw_vmm_try(GW_VMM_UFFD, -1, reason), 0);
	gw_sys_fail_nth(GW_SYS_MEMFD_CREATE, 1, ENOSYS);
	CHECK_EQ(gw_vmm_try(GW_VMM_UFFD, -1, reason), -ENOSYS);
	CHECK(strcmp(reason, "uffd: no shared memory can be made (ENOSYS)") == 0);
	gw_sys_fail_from(GW_SYS_USERFAULTFD, 1, EPERM);
	CHECK_EQ(gw_vmm_try(GW_VMM_UFFD, -1, reason), 0); /* the device will do */
	gw_sys_fail_from(GW_SYS_IOCTL, 1, EPERM);
	CHECK_EQ(gw_vmm_try(GW_VMM_UFFD, -1, reason), -EPERM);
	CHECK(strcmp(reason, "uffd: userfaultfd is refused (EPERM)") == 0);
	gw_sys_fail_from(GW_SYS_MPROTECT, 1, EACCES);
	CHECK_EQ(gw_vmm_try(GW_VMM_EXIT_SIGSEGV, -1, reason), -EACCES);
	gw_sys_fail_none();
	CHECK_EQ(open_fd_count(), fd_count);
}

/* A machine is made, a slot set: the kernel itself says whether it knows the flag. */
static void a_try_asks_kvm(void)
{
	char reason[GW_VMM_REASON_LEN_MAX];
	const int kvm_fd = open_kvm();
	const int fd_count = open_fd_count();

	if (kvm_fd < 0) {
		check_need(!check_required("kvm"), "kvm", "give access to /dev/kvm");
		fprintf(stderr, "  without /dev/kvm: nothing to ask\n");
		return;
	}
	CHECK_EQ(gw_vmm_try(GW_VMM_EXIT_EMULATION, kvm_fd, reason), 0);
	CHECK_EQ(gw_vmm_try(GW_VMM_UFFD, kvm_fd, reason), 0);
	const int err = gw_vmm_try(GW_VMM_KVM_USERFAULT, kvm_fd, reason);

	fprintf(stderr, "  %s\n", reason);
	CHECK(err == 0 || err == -EINVAL || err == -ENOTTY);
	if (err == -EINVAL)
		CHECK(strcmp(reason, "kvm-userfault: the kernel refuses the flag KVM_MEM_USERFAULT "
				     "(EINVAL)") == 0);
	/* 1: the machine. 2: the slot without the flag. 3: with it. */
	gw_sys_fail_nth(GW_SYS_IOCTL, 1, ENOMEM);
	CHECK_EQ(gw_vmm_try(GW_VMM_KVM_USERFAULT, kvm_fd, reason), -ENOMEM);
	gw_sys_fail_nth(GW_SYS_IOCTL, 2, ENOTTY);
	CHECK_EQ(gw_vmm_try(GW_VMM_KVM_USERFAULT, kvm_fd, reason), -ENOTTY);
	CHECK(strstr(reason, "has no KVM_SET_USER_MEMORY_REGION2"));
	gw_sys_fail_nth(GW_SYS_IOCTL, 1, EBUSY);
	CHECK_EQ(gw_vmm_try(GW_VMM_EXIT_EMULATION, kvm_fd, reason), -EBUSY);
	gw_sys_fail_nth(GW_SYS_IOCTL, 2, EINVAL);
	CHECK_EQ(gw_vmm_try(GW_VMM_EXIT_EMULATION, kvm_fd, reason), -EINVAL);
	gw_sys_fail_none();
	CHECK_EQ(open_fd_count(), fd_count);
	CHECK_EQ(close(kvm_fd), 0);
}

static void backends_have_names(void)
{
	enum gw_vmm_backend backend = GW_VMM_AUTO;

	for (size_t i = 0; i < BACKEND_COUNT; i++) {
		CHECK_EQ(gw_vmm_backend_by_name(gw_vmm_backend_name(BACKENDS[i]), &backend), 0);
		CHECK_EQ(backend, BACKENDS[i]);
	}
	CHECK_EQ(gw_vmm_backend_by_name("auto", &backend), 0);
	CHECK_EQ(gw_vmm_backend_by_name("", &backend), -EINVAL);
	CHECK_EQ(backend, GW_VMM_AUTO);
}

int main(void)
{
	guest_need_uffd();
	RUN_FORKED(each_mistake_is_refused);
	RUN_FORKED(slots_begin_with_a_word);
	RUN_FORKED(memory_with_content_is_refused);
	RUN_FORKED(each_call_of_create_failed_once);
	RUN_FORKED(a_try_says_why_not);
	RUN_FORKED(a_try_asks_kvm);
	RUN_FORKED(backends_have_names);
	return EXIT_SUCCESS;
}
