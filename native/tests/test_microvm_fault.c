/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_microvm_fault.c - guests whose memory is absent: post-copy by userfaultfd, with either
 * accelerator, and the seam through which a vCPU's own faults leave KVM.
 */
#include "test_microvm.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/utsname.h>

#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif

#define SHORT_PAUSE_NS 50000000ull

static struct mv_machine *filled_machine(enum mv_accel accel, uint32_t vcpu_count)
{
	const struct mv_machine_config config = test_config(accel, vcpu_count);
	struct mv_machine *machine = test_machine(&config);
	struct watch watch = {0};

	await_filled(machine, &watch);
	return machine;
}

/* A notice from another thread: the test waits for it, and does not guess with a sleep. */
static void signal_fd(int fd)
{
	const uint64_t one = 1;

	CHECK_EQ(write(fd, &one, sizeof(one)), sizeof(one));
}

static void await_fd(int fd)
{
	struct pollfd poller = {.fd = fd, .events = POLLIN};
	uint64_t count;

	CHECK_EQ(poll(&poller, 1, WAIT_MS), 1);
	CHECK_EQ(read(fd, &count, sizeof(count)), sizeof(count));
}

/* --- post-copy by userfaultfd --------------------------------------------------------------------- */

/*
 * Serves the pages of `source`, one a fault. If told so it holds the first workload page back, and
 * that alone: a vCPU that waits inside of KVM's emulator, for a page of the system area, cannot be
 * interrupted (with a signal pending it even spins there until the page comes).
 */
struct pager {
	const struct mv_memory *source;
	const struct mv_memory *destination;
	pthread_t thread;
	int uffd;
	int stop_fd;
	int held_fd;	/* readable: a fault is held */
	int release_fd; /* readable: it may be served */
	bool hold;
	uint64_t held_address; /* of the page that is held back; 0 none */
	uint64_t fault_count;
};

static void serve_fault(struct pager *pager, uint64_t address)
{
	const uint64_t offset = (address - (uintptr_t)pager->destination->base) &
				~(GM_PAGE_SIZE - 1);
	uint8_t page[GM_PAGE_SIZE];
	struct uffdio_copy copy = {
		.dst = (uintptr_t)pager->destination->base + offset,
		.src = (uintptr_t)page,
		.len = sizeof(page),
	};
	struct uffdio_range range = {.start = copy.dst, .len = copy.len};

	pager->fault_count++;
	if (pager->hold && offset >= GM_WORK_OFFSET) {
		pager->hold = false;
		pager->held_address = copy.dst;
		signal_fd(pager->held_fd);
	}
	if (copy.dst == pager->held_address)
		return;
	/* Through the file: looking at a hole by its mapping would fill it. */
	CHECK_EQ(pread(pager->source->fd, page, sizeof(page), (off_t)offset), sizeof(page));
	if (ioctl(pager->uffd, UFFDIO_COPY, &copy) == 0)
		return;
	/* The second of two vCPUs on one page; its waiter was not woken by the EEXIST. */
	CHECK_EQ(errno, EEXIST);
	CHECK_EQ(ioctl(pager->uffd, UFFDIO_WAKE, &range), 0);
}

static void release(struct pager *pager)
{
	const uint64_t address = pager->held_address;

	await_fd(pager->release_fd);
	pager->held_address = 0;
	serve_fault(pager, address);
}

static void *pager_main(void *argument)
{
	struct pager *pager = argument;

	for (;;) {
		struct pollfd pollers[] = {{.fd = pager->uffd, .events = POLLIN},
					   {.fd = pager->stop_fd, .events = POLLIN},
					   {.fd = pager->release_fd, .events = POLLIN}};
		struct uffd_msg message;

		CHECK(poll(pollers, 3, -1) > 0);
		if (pollers[1].revents != 0)
			return NULL;
		if (pollers[2].revents != 0)
			release(pager);
		if (read(pager->uffd, &message, sizeof(message)) != sizeof(message))
			continue;
		CHECK_EQ(message.event, UFFD_EVENT_PAGEFAULT);
		serve_fault(pager, message.arg.pagefault.address);
	}
}

static int open_uffd(enum mv_accel accel)
{
	/* Threads fault in user mode only: no privilege is needed for that. */
	const int mode = accel == MV_ACCEL_THREAD ? UFFD_USER_MODE_ONLY : 0;
	struct uffdio_api api = {.api = UFFD_API};
	const int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | mode);

	check_need(fd >= 0, "uffd", "run as root, or set vm.unprivileged_userfaultfd=1");
	CHECK_EQ(ioctl(fd, UFFDIO_API, &api), 0);
	return fd;
}

static void start_pager(struct pager *pager, enum mv_accel accel, const struct mv_memory *source,
			const struct mv_memory *destination)
{
	struct uffdio_register range = {
		.range = {.start = (uintptr_t)destination->base, .len = destination->size},
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};

	pager->source = source;
	pager->destination = destination;
	pager->uffd = open_uffd(accel);
	pager->stop_fd = eventfd(0, EFD_CLOEXEC);
	pager->held_fd = eventfd(0, EFD_CLOEXEC);
	pager->release_fd = eventfd(0, EFD_CLOEXEC);
	CHECK_EQ(ioctl(pager->uffd, UFFDIO_REGISTER, &range), 0);
	CHECK_EQ(pthread_create(&pager->thread, NULL, pager_main, pager), 0);
}

static void stop_pager(struct pager *pager)
{
	struct uffdio_range range = {
		.start = (uintptr_t)pager->destination->base,
		.len = pager->destination->size,
	};

	signal_fd(pager->stop_fd);
	pthread_join(pager->thread, NULL);
	CHECK_EQ(ioctl(pager->uffd, UFFDIO_UNREGISTER, &range), 0);
	close(pager->uffd);
	close(pager->stop_fd);
	close(pager->held_fd);
	close(pager->release_fd);
}

/* Every page of it, the system area and the stacks included, comes when it is touched. */
static void memory_follows(enum mv_accel accel, uint32_t vcpu_count)
{
	struct mv_machine *source = filled_machine(accel, vcpu_count);
	struct mv_machine *destination = incoming_for(source);
	struct pager pager = {0};
	size_t len;
	uint8_t *bytes;

	fprintf(stderr, "  %s, %u vCPUs\n", source->accel->name, vcpu_count);
	pause_machine(source);
	bytes = save_machine(source, &len);
	start_pager(&pager, accel, &source->memory, &destination->memory);
	load_machine(destination, bytes, len);
	resume_machine(destination);
	CHECK_EQ(sweep(destination), 0);
	CHECK_EQ(sweep(destination), 0);
	stop_pager(&pager);
	CHECK(pager.fault_count >= WORK_PAGES);
	mv_machine_destroy(source);
	CHECK_EQ(sweep(destination), 0);
	free(bytes);
	mv_machine_destroy(destination);
}

/* KVM waits interruptibly since Linux 6.2. */
static bool faults_can_be_interrupted(void)
{
	struct utsname name;
	char *end;
	unsigned long major, minor;

	CHECK_EQ(uname(&name), 0);
	major = strtoul(name.release, &end, 10);
	minor = *end == '.' ? strtoul(end + 1, NULL, 10) : 0;
	return major > 6 || (major == 6 && minor >= 2);
}

/*
 * A pause while a vCPU waits for a page. KVM lets go of the fault on a signal, so that it stops at
 * the instruction. A thread waits in the kernel: the pause times out and the guest runs on.
 */
static void a_pause_meets_an_absent_page(enum mv_accel accel, uint32_t vcpu_count)
{
	struct mv_machine *source = filled_machine(accel, vcpu_count);
	struct mv_machine *destination = incoming_for(source);
	struct pager pager = {.hold = true};
	struct mv_error error;
	size_t len;
	uint8_t *bytes;

	pause_machine(source);
	bytes = save_machine(source, &len);
	start_pager(&pager, accel, &source->memory, &destination->memory);
	load_machine(destination, bytes, len);
	resume_machine(destination);
	await_fd(pager.held_fd);
	if (accel == MV_ACCEL_KVM && faults_can_be_interrupted()) {
		pause_machine(destination);
		resume_machine(destination);
	} else {
		CHECK_EQ(mv_machine_pause(destination, SHORT_PAUSE_NS, &error), -ETIMEDOUT);
		CHECK_EQ(destination->state, MV_RUNNING);
	}
	signal_fd(pager.release_fd);
	CHECK_EQ(sweep(destination), 0);
	stop_pager(&pager);
	free(bytes);
	mv_machine_destroy(source);
	mv_machine_destroy(destination);
}

/* --- the seam: memory that is absent for KVM, as EFAULT ------------------------------------------- */

struct seam {
	struct mv_machine *machine;
	pthread_mutex_t lock;
	pthread_cond_t kicked;
	_Atomic uint32_t count;
	int entered_fd;
	bool wait;
};

static void forbid(const struct mv_machine *machine, bool on)
{
	CHECK_EQ(mprotect(machine->memory.base + GM_WORK_OFFSET, WORK_BYTES,
			  on ? PROT_NONE : PROT_READ | PROT_WRITE),
		 0);
}

static int handle(void *opaque, struct mv_vcpu *vcpu, const struct mv_memory_fault *fault,
		  struct mv_error *error)
{
	struct seam *seam = opaque;

	(void)error;
	CHECK(fault->kind == MV_FAULT_BARE || fault->kind == MV_FAULT_EXIT);
	if (atomic_fetch_add(&seam->count, 1) == 0)
		signal_fd(seam->entered_fd);
	if (!seam->wait) {
		forbid(seam->machine, false);
		return 0;
	}
	pthread_mutex_lock(&seam->lock);
	while (!mv_vcpu_kicked(vcpu))
		pthread_cond_wait(&seam->kicked, &seam->lock);
	pthread_mutex_unlock(&seam->lock);
	return -EINTR;
}

static void kick(void *opaque, struct mv_vcpu *vcpu)
{
	struct seam *seam = opaque;

	(void)vcpu;
	pthread_mutex_lock(&seam->lock);
	pthread_cond_broadcast(&seam->kicked);
	pthread_mutex_unlock(&seam->lock);
}

static void open_seam(struct seam *seam, struct mv_machine *machine, bool wait)
{
	*seam = (struct seam){.machine = machine, .wait = wait};
	pthread_mutex_init(&seam->lock, NULL);
	pthread_cond_init(&seam->kicked, NULL);
	seam->entered_fd = eventfd(0, EFD_CLOEXEC);
	machine->fault_handler =
		(struct mv_fault_handler){.handle = handle, .kick = kick, .opaque = seam};
}

static void close_seam(struct seam *seam)
{
	close(seam->entered_fd);
	pthread_cond_destroy(&seam->kicked);
	pthread_mutex_destroy(&seam->lock);
}

static void a_handled_fault_repeats_the_instruction(enum mv_accel accel, uint32_t vcpu_count)
{
	struct mv_machine *machine;
	uint64_t fault_count = 0;
	struct seam seam;

	if (accel != MV_ACCEL_KVM)
		return;
	machine = filled_machine(accel, vcpu_count);
	open_seam(&seam, machine, false);
	for (uint32_t i = 1; i <= 20; i++) {
		pause_machine(machine);
		forbid(machine, true);
		resume_machine(machine);
		CHECK_EQ(sweep(machine), 0);
		CHECK(atomic_load(&seam.count) >= i);
	}
	/* Whichever of them comes first makes the memory present for all. */
	for (uint32_t i = 0; i < vcpu_count; i++)
		fault_count += atomic_load(&machine->vcpus[i].counters.fault_count);
	CHECK_EQ(fault_count, atomic_load(&seam.count));
	mv_machine_destroy(machine);
	close_seam(&seam);
}

/* It parks at the faulting instruction; the fault happens again wherever the guest goes on. */
static void a_vcpu_in_a_fault_can_be_paused_and_moved(enum mv_accel accel, uint32_t vcpu_count)
{
	struct mv_machine *source, *destination;
	struct seam seam;
	size_t len;
	uint8_t *bytes;

	if (accel != MV_ACCEL_KVM)
		return;
	source = filled_machine(accel, vcpu_count);
	pause_machine(source);
	open_seam(&seam, source, true);
	forbid(source, true);
	resume_machine(source);
	await_fd(seam.entered_fd);
	pause_machine(source);
	bytes = save_machine(source, &len);
	destination = incoming_for(source);
	copy_memory(&source->memory, &destination->memory);
	mv_machine_destroy(source);
	load_machine(destination, bytes, len);
	resume_machine(destination);
	CHECK_EQ(sweep(destination), 0);
	free(bytes);
	mv_machine_destroy(destination);
	close_seam(&seam);
}

static void a_fault_that_nobody_handles_holds_the_guest(enum mv_accel accel, uint32_t vcpu_count)
{
	struct mv_machine *machine;
	struct watch watch = {0};
	struct mv_error error;

	if (accel != MV_ACCEL_KVM)
		return;
	machine = filled_machine(accel, vcpu_count);
	pause_machine(machine);
	forbid(machine, true);
	resume_machine(machine);
	await_failed(machine, &watch);
	CHECK_EQ(mv_machine_pause(machine, PAUSE_NS, &error), -EBUSY);
	CHECK_EQ(mv_machine_resume(machine, &error), -EBUSY);
	CHECK(strstr(error.text, "absent memory"));
	mv_machine_destroy(machine);
}

static void all_post_copies(void)
{
	on_every_accel(memory_follows);
}
static void all_pauses(void)
{
	on_every_accel(a_pause_meets_an_absent_page);
}
static void all_handled(void)
{
	on_every_accel(a_handled_fault_repeats_the_instruction);
}
static void all_paused(void)
{
	on_every_accel(a_vcpu_in_a_fault_can_be_paused_and_moved);
}
static void all_held(void)
{
	on_every_accel(a_fault_that_nobody_handles_holds_the_guest);
}

int main(void)
{
	RUN(all_handled);
	RUN(all_paused);
	RUN(all_held);
	RUN(all_post_copies);
	RUN(all_pauses);
	return EXIT_SUCCESS;
}
