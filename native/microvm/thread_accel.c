/* SPDX-License-Identifier: Apache-2.0 */
/*
 * thread_accel.c - the guest's workload in threads of this process, over the same guest memory,
 * where there is no KVM. Its state is struct gm_ctx, as portable as the workload's source.
 *
 * Threads, Errors, Ownership, Units: see accel.h.
 * Source: guest/workload.h.
 *
 * A vCPU stops between two steps only. A step that waits for absent memory, in the kernel or in the
 * signal handler below, therefore delays a pause until the page is there, and may time it out.
 *
 * exit-sigsegv: guest memory is PROT_NONE where a page is absent. The handler runs on the thread that
 * touched it, in the middle of a step: of the guest's code, which calls nothing and holds no lock, so
 * that the handler may do what ordinary code may. If the page cannot be had, it leaves the step for
 * good: its registers are lost, and so the machine has failed or is quitting.
 */
#include "accel.h"

#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>

#include "guest/workload.h"

#define NS_PER_US 1000ull

struct thread_vcpu {
	struct gm_vcpu guest;
	uint64_t next_tick_ns; /* 0: a new period begins */
	bool failed;	       /* a hypercall that there is not */
	sigjmp_buf leave;      /* out of the signal handler: the end of this vCPU */
	struct mv_error error; /* and why; empty: it is quitting */
};

/* The vCPU whose step this thread is in; NULL: a fault of it is a crash. */
static _Thread_local struct mv_vcpu *stepping;

/* What SIGSEGV and SIGBUS did before; written once, before the first thread with faults starts. */
static struct sigaction before_segv, before_bus;

static struct thread_vcpu *thread_of(const struct mv_vcpu *vcpu)
{
	return vcpu->accel_data;
}

static const struct gm_boot *boot_of(const struct mv_machine *machine)
{
	return (const struct gm_boot *)(machine->memory.guest + GM_BOOT_GPA);
}

static uint32_t hypercall(struct gm_vcpu *guest, uint32_t call, const uint64_t args[4])
{
	struct mv_vcpu *vcpu = guest->owner;
	const int64_t answer = mv_vcpu_hypercall(vcpu, call, args);

	if (answer < 0)
		thread_of(vcpu)->failed = true;
	return answer < 0 ? 0 : (uint32_t)answer;
}

/* What the LAPIC does for a KVM guest: ticks that came together count as one. */
static void update_ticks(struct gm_vcpu *guest)
{
	const struct mv_vcpu *vcpu = guest->owner;
	struct thread_vcpu *thread = thread_of(vcpu);
	const uint64_t now_ns = mv_now_ns();

	if (now_ns < thread->next_tick_ns)
		return;
	if (thread->next_tick_ns > 0)
		guest->ctx.tick_count++;
	thread->next_tick_ns = now_ns + boot_of(vcpu->machine)->tick_us * NS_PER_US;
}

static int thread_create(struct mv_machine *machine, struct mv_error *error)
{
	machine->has_exits = true;
	for (uint32_t i = 0; i < machine->config.vcpu_count; i++) {
		struct thread_vcpu *thread = calloc(1, sizeof(*thread));

		if (!thread)
			return mv_refuse_errno(error, -ENOMEM, "make vCPU %u", i);
		thread->guest.hypercall = hypercall;
		thread->guest.update_ticks = update_ticks;
		thread->guest.owner = &machine->vcpus[i];
		machine->vcpus[i].accel_data = thread;
	}
	return 0;
}

/* --- exits by signal ------------------------------------------------------------------------------ */

/* Back to what was: the access is repeated, and this time the process dies of it. */
static void crash(int number)
{
	(void)sigaction(number, number == SIGSEGV ? &before_segv : &before_bus, NULL);
}

static void on_fault(int number, siginfo_t *info, void *context)
{
	struct mv_vcpu *vcpu = stepping;
	const struct mv_memory *memory = vcpu ? &vcpu->machine->memory : NULL;
	const uintptr_t offset = memory ? (uintptr_t)info->si_addr - (uintptr_t)memory->guest
					: UINTPTR_MAX;
	const int saved_errno = errno;
	struct mv_memory_fault fault = {.kind = MV_FAULT_EXIT};
	struct thread_vcpu *thread;
	int rc;

	(void)context;
	if (!memory || offset >= memory->size) {
		crash(number);
		return;
	}
	thread = thread_of(vcpu);
	fault.gpa = mv_memory_gpa(memory, offset);
	if (number == SIGBUS)
		rc = mv_refuse(&thread->error, -EHWPOISON,
			       "the content of a page is lost, in this host's memory: %#llx",
			       (unsigned long long)fault.gpa);
	else
		rc = mv_vcpu_memory_fault(vcpu, &fault, &thread->error);
	if (rc < 0)
		siglongjmp(thread->leave, rc);
	errno = saved_errno;
}

/* For the whole process; a second machine sets the same. */
static int catch_faults(void)
{
	struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO};
	struct sigaction now;

	sigemptyset(&action.sa_mask);
	if (sigaction(SIGSEGV, NULL, &now) < 0)
		return -errno;
	if (now.sa_sigaction == on_fault)
		return 0;
	if (sigaction(SIGSEGV, &action, &before_segv) < 0 ||
	    sigaction(SIGBUS, &action, &before_bus) < 0)
		return -errno;
	return 0;
}

static int thread_attach(struct mv_machine *machine, struct mv_error *error)
{
	const bool exits = machine->faults &&
			   mv_faults_backend(machine->faults) == GW_VMM_EXIT_SIGSEGV;
	const int rc = exits ? catch_faults() : 0;

	for (uint32_t i = 0; i < machine->config.vcpu_count; i++)
		thread_of(&machine->vcpus[i])->guest.ram = machine->memory.guest;
	return rc < 0 ? mv_refuse_errno(error, rc, "sigaction") : 0;
}

/* --- running ------------------------------------------------------------------------------------- */

static int thread_boot(struct mv_machine *machine, struct mv_error *error)
{
	(void)error;
	for (uint32_t i = 0; i < machine->config.vcpu_count; i++)
		gm_vcpu_init(&thread_of(&machine->vcpus[i])->guest, i);
	return 0;
}

static int step_until_kicked(struct mv_vcpu *vcpu)
{
	struct thread_vcpu *thread = thread_of(vcpu);
	const int left = sigsetjmp(thread->leave, 1);

	if (left != 0)
		return left;
	while (!thread->failed && !mv_vcpu_kicked(vcpu)) {
		stepping = vcpu;
		gm_vcpu_step(&thread->guest);
		stepping = NULL;
	}
	return 0;
}

static int thread_run(struct mv_vcpu *vcpu, struct mv_error *error)
{
	struct thread_vcpu *thread = thread_of(vcpu);
	int rc;

	thread->next_tick_ns = 0;
	rc = step_until_kicked(vcpu);
	stepping = NULL;
	if (rc < 0 && rc != -EINTR)
		return mv_refuse(error, rc, "absent memory: SIGSEGV: %.200s", thread->error.text);
	if (thread->failed)
		return mv_refuse(error, -ENOSYS, "the guest made an unknown hypercall");
	mv_count(&vcpu->counters.exit_count, 1);
	mv_count(&vcpu->counters.interrupted_count, 1);
	return 0;
}

/* `kicked` is looked at between any two steps: nothing else is needed. */
static void thread_kick(struct mv_vcpu *vcpu)
{
	(void)vcpu;
}

static int thread_save(struct mv_machine *machine, struct mv_blob_writer *writer,
		       struct mv_error *error)
{
	(void)error;
	for (uint32_t i = 0; i < machine->config.vcpu_count; i++)
		mv_blob_add(writer, MV_SECTION_THREAD_CTX, i,
			    &thread_of(&machine->vcpus[i])->guest.ctx, sizeof(struct gm_ctx));
	return 0;
}

static size_t thread_rules(const struct mv_machine *machine,
			   struct mv_blob_rule ret_rules[MV_ACCEL_RULE_COUNT_MAX])
{
	ret_rules[0] = (struct mv_blob_rule){MV_SECTION_THREAD_CTX, machine->config.vcpu_count,
					     sizeof(struct gm_ctx), sizeof(struct gm_ctx), 8};
	return 1;
}

static int thread_check(const struct mv_machine *machine, const struct mv_blob_reader *reader,
			struct mv_error *error)
{
	for (uint32_t i = 0; i < machine->config.vcpu_count; i++) {
		size_t len;
		const struct gm_ctx *ctx = mv_blob_find(reader, MV_SECTION_THREAD_CTX, i, &len);

		/* The id is an index into guest memory, the random state is never zero. */
		if (ctx->id != i || ctx->random == 0 || !gm_phase_valid(ctx->phase))
			return mv_refuse(error, -EBADMSG, "vCPU %u: its context is not valid", i);
	}
	return 0;
}

static int thread_load(struct mv_machine *machine, const struct mv_blob_reader *reader,
		       struct mv_error *error)
{
	(void)error;
	for (uint32_t i = 0; i < machine->config.vcpu_count; i++) {
		size_t len;
		const struct gm_ctx *ctx = mv_blob_find(reader, MV_SECTION_THREAD_CTX, i, &len);

		thread_of(&machine->vcpus[i])->guest.ctx = *ctx;
	}
	return 0;
}

static void thread_destroy(struct mv_machine *machine)
{
	for (uint32_t i = 0; i < machine->config.vcpu_count; i++) {
		free(machine->vcpus[i].accel_data);
		machine->vcpus[i].accel_data = NULL;
	}
}

const struct mv_accel_ops mv_accel_thread = {
	.name = "thread",
	.id = MV_ACCEL_THREAD,
	.create = thread_create,
	.attach = thread_attach,
	.boot = thread_boot,
	.run = thread_run,
	.kick = thread_kick,
	.release = thread_kick,
	.save = thread_save,
	.rules = thread_rules,
	.check = thread_check,
	.load = thread_load,
	.destroy = thread_destroy,
};
