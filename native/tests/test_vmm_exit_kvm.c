/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_vmm_exit_kvm.c - the exit decoder against what this kernel's KVM really says: the one genuine
 * exit 39 of a stock kernel, bare faults, MMIO inside RAM, a fetch from absent memory.
 *
 * Absent is PROT_NONE here: KVM cannot tell it from a userfaultfd in SIGBUS mode, and it needs nothing.
 * Which instructions KVM emulates depends on the processor (real mode, on one that cannot run it).
 */
#include "check.h"

#ifdef __x86_64__

#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <godwit/exit_channel.h>
#include <godwit/vmm.h>

#define RAM_LEN	    (4ULL << 20)
#define CODE	    0x1000ULL
#define GDT	    0x2000ULL
#define TSS	    0x3000ULL
#define ABSENT_PAGE 0x6000ULL
#define STACK_TOP   0x8000ULL
#define TABLES	    0x10000ULL /* PML4, PDPT, PD */
#define PORT	    0x10
#define PAGE	    4096ULL
#define CONTENT	    0x5a

/* linux/kvm.h of 6.8 and 6.18. */
#define MEM_GUEST_MEMFD	 (1U << 2)
#define GMEM_MMAP	 (1U << 0)
#define GMEM_INIT_SHARED (1U << 1)
#define SET_REGION2	 _IOW(KVMIO, 0x49, struct region2)
#define CREATE_GMEM	 _IOWR(KVMIO, 0xd4, struct create_gmem)

struct region2 {
	uint32_t slot, flags;
	uint64_t gpa, len, host_addr, gmem_offset;
	uint32_t gmem_fd, pad1;
	uint64_t pad2[14];
};

struct create_gmem {
	uint64_t len, flags, reserved[6];
};

_Static_assert(sizeof(struct region2) == 160, "struct kvm_userspace_memory_region2");
_Static_assert(sizeof(struct create_gmem) == 64, "struct kvm_create_guest_memfd");

struct guest {
	int kvm_fd, vm_fd, vcpu_fd;
	uint8_t *ram;
	struct kvm_run *run;
	size_t run_len;
};

static bool is_ram(const void *opaque, uint64_t gpa)
{
	(void)opaque;
	return gpa < RAM_LEN;
}

static void open_guest(struct guest *guest)
{
	guest->kvm_fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	CHECK(guest->kvm_fd >= 0);
	guest->vm_fd = ioctl(guest->kvm_fd, KVM_CREATE_VM, 0);
	CHECK(guest->vm_fd >= 0);
	guest->ram = mmap(NULL, RAM_LEN, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(guest->ram != MAP_FAILED);
	guest->vcpu_fd = ioctl(guest->vm_fd, KVM_CREATE_VCPU, 0);
	CHECK(guest->vcpu_fd >= 0);
	guest->run_len = (size_t)ioctl(guest->kvm_fd, KVM_GET_VCPU_MMAP_SIZE, 0);
	guest->run =
		mmap(NULL, guest->run_len, PROT_READ | PROT_WRITE, MAP_SHARED, guest->vcpu_fd, 0);
	CHECK(guest->run != MAP_FAILED);
	struct kvm_enable_cap strict = {.cap = KVM_CAP_EXIT_ON_EMULATION_FAILURE, .args = {1}};

	CHECK_EQ(ioctl(guest->vm_fd, KVM_ENABLE_CAP, &strict), 0);
}

static void close_guest(struct guest *guest)
{
	munmap(guest->run, guest->run_len);
	munmap(guest->ram, RAM_LEN);
	close(guest->vcpu_fd);
	close(guest->vm_fd);
	close(guest->kvm_fd);
}

static void set_slot(const struct guest *guest, uint32_t slot, uint64_t gpa, uint64_t len)
{
	const struct kvm_userspace_memory_region region = {.slot = slot,
							   .guest_phys_addr = gpa,
							   .memory_size = len,
							   .userspace_addr =
								   (uintptr_t)guest->ram + gpa};

	CHECK_EQ(ioctl(guest->vm_fd, KVM_SET_USER_MEMORY_REGION, &region), 0);
}

static struct kvm_segment segment(uint16_t selector, uint8_t type, bool code)
{
	return (struct kvm_segment){.limit = UINT32_MAX,
				    .selector = selector,
				    .type = type,
				    .present = 1,
				    .dpl = 3,
				    .s = 1,
				    .g = 1,
				    .l = code,
				    .db = !code};
}

static void set_regs(const struct guest *guest)
{
	const struct kvm_regs regs = {
		.rip = CODE, .rsp = STACK_TOP, .rsi = ABSENT_PAGE, .rflags = 0x3002};

	CHECK_EQ(ioctl(guest->vcpu_fd, KVM_SET_REGS, &regs), 0);
}

static void enter_real_mode(const struct guest *guest)
{
	struct kvm_sregs sregs;

	CHECK_EQ(ioctl(guest->vcpu_fd, KVM_GET_SREGS, &sregs), 0);
	sregs.cs.base = 0;
	sregs.cs.selector = 0;
	CHECK_EQ(ioctl(guest->vcpu_fd, KVM_SET_SREGS, &sregs), 0);
	set_regs(guest);
}

/* Long mode, ring 3, the first 4 MiB mapped to themselves: it runs natively on every KVM. */
static void enter_long_mode(const struct guest *guest)
{
	static struct {
		struct kvm_cpuid2 head;
		struct kvm_cpuid_entry2 entries[256];
	} cpuid;
	struct kvm_sregs sregs;
	uint64_t *const gdt = (uint64_t *)(void *)(guest->ram + GDT);
	uint64_t *const tables = (uint64_t *)(void *)(guest->ram + TABLES);

	gdt[2] = 0x00affb000000ffff;
	gdt[3] = 0x00cff3000000ffff;
	tables[0] = (TABLES + PAGE) | 7;
	tables[512] = (TABLES + 2 * PAGE) | 7;
	tables[1024] = 0x87;
	tables[1025] = (2ULL << 20) | 0x87;
	cpuid.head.nent = 256;
	CHECK_EQ(ioctl(guest->kvm_fd, KVM_GET_SUPPORTED_CPUID, &cpuid), 0);
	CHECK_EQ(ioctl(guest->vcpu_fd, KVM_SET_CPUID2, &cpuid), 0);
	CHECK_EQ(ioctl(guest->vcpu_fd, KVM_GET_SREGS, &sregs), 0);
	sregs.cs = segment(0x13, 11, true);
	sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = segment(0x1b, 3, false);
	sregs.tr = (struct kvm_segment){
		.base = TSS, .limit = 0x67, .selector = 0x28, .type = 11, .present = 1};
	sregs.gdt.base = GDT;
	sregs.gdt.limit = 0x3f;
	sregs.idt.limit = 0;
	sregs.cr0 = 0x80000031;
	sregs.cr3 = TABLES;
	sregs.cr4 = 0x620;
	sregs.efer = 0x500;
	CHECK_EQ(ioctl(guest->vcpu_fd, KVM_SET_SREGS, &sregs), 0);
	set_regs(guest);
}

static enum gw_vmm_exit enter(const struct guest *guest, struct gw_vmm_exit_info *ret_info)
{
	/* What an older exit may have left. */
	guest->run->exit_reason = KVM_EXIT_MMIO;
	const int result = ioctl(guest->vcpu_fd, KVM_RUN, 0) < 0 ? -errno : 0;
	const enum gw_vmm_exit is = gw_vmm_classify(result, guest->run, is_ram, NULL, ret_info);

	fprintf(stderr, "  result %d exit %u: class %d gpa %#llx len %llu flags %#llx\n", result,
		guest->run->exit_reason, is, (unsigned long long)ret_info->gpa,
		(unsigned long long)ret_info->len, (unsigned long long)ret_info->flags);
	return is;
}

static void is_absent(const struct guest *guest, bool absent)
{
	CHECK_EQ(mprotect(guest->ram + ABSENT_PAGE, PAGE,
			  absent ? PROT_NONE : PROT_READ | PROT_WRITE),
		 0);
}

static uint64_t rip(const struct guest *guest)
{
	struct kvm_regs regs;

	CHECK_EQ(ioctl(guest->vcpu_fd, KVM_GET_REGS, &regs), 0);
	return regs.rip;
}

/* The guest got CONTENT where it wanted it, and says so through the port. */
static void check_done(const struct guest *guest, uint64_t value)
{
	struct gw_vmm_exit_info info;
	uint64_t said = 0;

	CHECK_EQ(enter(guest, &info), GW_VMM_EXIT_OTHER);
	CHECK_EQ(guest->run->exit_reason, KVM_EXIT_IO);
	CHECK_EQ(guest->run->io.port, PORT);
	memcpy(&said, (uint8_t *)guest->run + guest->run->io.data_offset, guest->run->io.size);
	CHECK_EQ(said, value);
}

static void put_code(const struct guest *guest, uint64_t gpa, const uint8_t *code, size_t len)
{
	memcpy(guest->ram + gpa, code, len);
}

/* Natively: an access and a fetch are both EFAULT, nothing moved; with the page there both go on. */
static void a_native_access_and_fetch_are_bare_faults(void)
{
	static const uint8_t load[] = {0x8a, 0x06, 0xe6, PORT, 0xeb, 0xfe}; /* mov (%rsi), %al */
	static const uint8_t jump[] = {0xff, 0xe6};			    /* jmp *%rsi */
	static const uint8_t there[] = {0xb0, CONTENT, 0xe6, PORT, 0xeb, 0xfe};

	for (int fetch = 0; fetch < 2; fetch++) {
		struct guest guest;
		struct gw_vmm_exit_info info;

		open_guest(&guest);
		set_slot(&guest, 0, 0, RAM_LEN);
		put_code(&guest, CODE, fetch ? jump : load, fetch ? sizeof(jump) : sizeof(load));
		if (fetch)
			put_code(&guest, ABSENT_PAGE, there, sizeof(there));
		else
			guest.ram[ABSENT_PAGE] = CONTENT;
		enter_long_mode(&guest);
		is_absent(&guest, true);
		for (int i = 0; i < 2; i++) {
			CHECK_EQ(enter(&guest, &info), GW_VMM_EXIT_BARE_FAULT);
			CHECK(info.gpa == GW_VMM_GPA_NONE);
			CHECK_EQ(rip(&guest), fetch ? ABSENT_PAGE : CODE);
		}
		is_absent(&guest, false);
		check_done(&guest, CONTENT);
		close_guest(&guest);
	}
}

/* Emulated: a load is MMIO, to be answered; where real mode runs natively, a bare fault. */
static void an_emulated_load_is_mmio_inside_of_ram(void)
{
	static const uint8_t load[] = {0xa0, 0x00, 0x60, 0xe6,
				       PORT, 0xeb, 0xfe}; /* mov 0x6000, %al */
	struct guest guest;
	struct gw_vmm_exit_info info;

	open_guest(&guest);
	set_slot(&guest, 0, 0, RAM_LEN);
	put_code(&guest, CODE, load, sizeof(load));
	guest.ram[ABSENT_PAGE] = CONTENT;
	enter_real_mode(&guest);
	is_absent(&guest, true);
	const enum gw_vmm_exit is = enter(&guest, &info);

	is_absent(&guest, false);
	CHECK(is == GW_VMM_EXIT_RAM_MMIO || is == GW_VMM_EXIT_BARE_FAULT);
	if (is == GW_VMM_EXIT_RAM_MMIO) {
		CHECK_EQ(info.gpa, ABSENT_PAGE);
		CHECK_EQ(info.flags, 0);
		/* As a device would: KVM does not look into RAM again. */
		memcpy(guest.run->mmio.data, guest.ram + info.gpa, info.len);
	}
	check_done(&guest, CONTENT);
	close_guest(&guest);
}

/* Emulated: a fetch is exit 17, and running again fetches again. */
static void an_emulated_fetch_is_a_failed_emulation(void)
{
	static const uint8_t jump[] = {0xe9, 0xfd, 0x4f}; /* jmp 0x6000 */
	static const uint8_t there[] = {0xb0, CONTENT, 0xe6, PORT, 0xeb, 0xfe};
	struct guest guest;
	struct gw_vmm_exit_info info;

	open_guest(&guest);
	set_slot(&guest, 0, 0, RAM_LEN);
	put_code(&guest, CODE, jump, sizeof(jump));
	put_code(&guest, ABSENT_PAGE, there, sizeof(there));
	enter_real_mode(&guest);
	is_absent(&guest, true);
	const enum gw_vmm_exit is = enter(&guest, &info);

	CHECK(is == GW_VMM_EXIT_NOT_EMULATED || is == GW_VMM_EXIT_BARE_FAULT);
	if (is == GW_VMM_EXIT_NOT_EMULATED)
		CHECK(info.len == 0 && info.flags == GW_EXIT_EXEC);
	CHECK_EQ(rip(&guest), ABSENT_PAGE);
	is_absent(&guest, false);
	check_done(&guest, CONTENT);
	close_guest(&guest);
}

/* Emulated: its read is MMIO; then the exchange cannot be done on a bus, and the emulation fails. */
static void an_emulated_locked_access_is_a_failed_emulation(void)
{
	/* lock cmpxchg %bl, 0x6000: CONTENT is not 0, so it is loaded into %al. */
	static const uint8_t exchange[] = {0xf0, 0x0f, 0xb0, 0x1e, 0x00,
					   0x60, 0xe6, PORT, 0xeb, 0xfe};
	struct guest guest;
	struct gw_vmm_exit_info info;

	open_guest(&guest);
	set_slot(&guest, 0, 0, RAM_LEN);
	put_code(&guest, CODE, exchange, sizeof(exchange));
	guest.ram[ABSENT_PAGE] = CONTENT;
	enter_real_mode(&guest);
	is_absent(&guest, true);
	enum gw_vmm_exit is = enter(&guest, &info);

	if (is == GW_VMM_EXIT_RAM_MMIO) {
		CHECK_EQ(info.gpa, ABSENT_PAGE);
		guest.run->mmio.data[0] = CONTENT;
		is = enter(&guest, &info);
		CHECK_EQ(is, GW_VMM_EXIT_NOT_EMULATED);
		/* It was no fetch. */
		CHECK(info.len == 15 && info.flags == 0);
	}
	CHECK(is == GW_VMM_EXIT_NOT_EMULATED || is == GW_VMM_EXIT_BARE_FAULT);
	CHECK_EQ(rip(&guest), CODE);
	is_absent(&guest, false);
	check_done(&guest, CONTENT);
	close_guest(&guest);
}

static void a_kick_is_an_interruption(void)
{
	static const uint8_t loop[] = {0xeb, 0xfe};
	struct guest guest;
	struct gw_vmm_exit_info info;

	open_guest(&guest);
	set_slot(&guest, 0, 0, RAM_LEN);
	put_code(&guest, CODE, loop, sizeof(loop));
	enter_long_mode(&guest);
	guest.run->immediate_exit = 1;
	CHECK_EQ(enter(&guest, &info), GW_VMM_EXIT_INTERRUPTED);
	close_guest(&guest);
}

/*
 * The genuine exit 39: a slot on a guest_memfd that has been closed. Its flags are 0, a shared access,
 * because the memory was made shared; then an ordinary slot takes its place and the guest goes on.
 */
static void the_genuine_exit_of_a_closed_guest_memfd(void)
{
	static const uint8_t load[] = {0x8a, 0x06, 0xe6, PORT, 0xeb, 0xfe};
	struct guest guest;
	struct gw_vmm_exit_info info;
	const uint64_t strange = 1;
	struct create_gmem gmem = {.len = PAGE, .flags = GMEM_MMAP | GMEM_INIT_SHARED};

	open_guest(&guest);
	const int gmem_fd = ioctl(guest.vm_fd, CREATE_GMEM, &gmem);

	if (gmem_fd < 0)
		fprintf(stderr, "KVM_CREATE_GUEST_MEMFD: %s\n", strerror(errno));
	check_need(gmem_fd >= 0, "guest_memfd",
		   "a kernel of 6.18 or later, with CONFIG_KVM_GUEST_MEMFD");
	struct region2 region = {.slot = 1,
				 .flags = MEM_GUEST_MEMFD,
				 .gpa = ABSENT_PAGE,
				 .len = PAGE,
				 .host_addr = (uintptr_t)guest.ram + ABSENT_PAGE,
				 .gmem_fd = (uint32_t)gmem_fd};

	set_slot(&guest, 0, 0, ABSENT_PAGE);
	set_slot(&guest, 2, ABSENT_PAGE + PAGE, RAM_LEN - ABSENT_PAGE - PAGE);
	CHECK_EQ(ioctl(guest.vm_fd, SET_REGION2, &region), 0);
	CHECK_EQ(close(gmem_fd), 0);
	put_code(&guest, CODE, load, sizeof(load));
	enter_long_mode(&guest);
	for (int i = 0; i < 2; i++) {
		CHECK_EQ(enter(&guest, &info), GW_VMM_EXIT_SHARED);
		CHECK_EQ(info.gpa, ABSENT_PAGE);
		CHECK_EQ(info.len, PAGE);
		CHECK_EQ(info.flags, 0);
		CHECK_EQ(rip(&guest), CODE);
	}
	/* The same words, but flags nobody knows: what the kernel wrote is where we read it. */
	memcpy(&guest.run->hw, &strange, sizeof(strange));
	CHECK_EQ(gw_vmm_classify(-EFAULT, guest.run, is_ram, NULL, &info), GW_VMM_EXIT_UNKNOWN);

	guest.ram[ABSENT_PAGE] = CONTENT;
	region.len = 0;
	CHECK_EQ(ioctl(guest.vm_fd, SET_REGION2, &region), 0);
	set_slot(&guest, 1, ABSENT_PAGE, PAGE);
	check_done(&guest, CONTENT);
	close_guest(&guest);
}

int main(void)
{
	const int kvm_fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);

	check_need(kvm_fd >= 0, "kvm", "/dev/kvm cannot be opened");
	close(kvm_fd);
	RUN(a_native_access_and_fetch_are_bare_faults);
	RUN(an_emulated_load_is_mmio_inside_of_ram);
	RUN(an_emulated_fetch_is_a_failed_emulation);
	RUN(an_emulated_locked_access_is_a_failed_emulation);
	RUN(a_kick_is_an_interruption);
	/* Last: it may skip. */
	RUN(the_genuine_exit_of_a_closed_guest_memfd);
	return EXIT_SUCCESS;
}

#else

int main(void)
{
	check_need(false, "kvm", "the guest's code is for x86-64");
	return EXIT_FAILURE;
}

#endif
