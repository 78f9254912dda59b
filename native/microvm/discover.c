/* SPDX-License-Identifier: Apache-2.0 */
/*
 * discover.c - see discover.h.
 *
 * Threads, Errors, Ownership, Units, Source: see discover.h.
 */
#include "discover.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "faults.h"
#include "kvm.h"

#define PREFIX_COUNT_MAX 4u
#define PREFIX_FS	 0x64
#define PREFIX_GS	 0x65

struct code {
	uint8_t bytes[MV_INSTRUCTION_LEN_MAX];
	size_t len;
};

static uint64_t page_of(uint64_t addr)
{
	return addr & ~(GM_PAGE_SIZE - 1);
}

static void set_registers(const struct kvm_regs *regs, struct mv_registers *registers)
{
	*registers = (struct mv_registers){
		.gpr = {regs->rax, regs->rcx, regs->rdx, regs->rbx, regs->rsp, regs->rbp, regs->rsi,
			regs->rdi, regs->r8, regs->r9, regs->r10, regs->r11, regs->r12, regs->r13,
			regs->r14, regs->r15},
		.rip = regs->rip,
	};
}

/* Through the guest's page tables. Returns 0, or -ENOENT: the guest has nothing there. */
static int translate(const struct mv_vcpu *vcpu, uint64_t linear, uint64_t *ret_gpa)
{
	struct kvm_translation translation = {.linear_address = linear};
	const int rc = mv_kvm_ioctl(mv_kvm_vcpu_of(vcpu)->fd, KVM_TRANSLATE, &translation);

	if (rc < 0)
		return rc;
	if (!translation.valid)
		return -ENOENT;
	*ret_gpa = translation.physical_address;
	return 0;
}

/*
 * The same, with a memory of one page: KVM_TRANSLATE is most of what a discovery costs, and code stays
 * in its page. If the guest has mapped that page elsewhere meanwhile, other bytes are decoded, a page is
 * asked for in vain, and the vCPU is here again with the same registers: then nothing is remembered.
 */
static int translate_code(const struct mv_vcpu *vcpu, uint64_t linear, uint64_t *ret_gpa)
{
	struct mv_kvm_vcpu *kvm_vcpu = mv_kvm_vcpu_of(vcpu);
	int rc;

	if (!kvm_vcpu->code_known || kvm_vcpu->code_page != page_of(linear)) {
		rc = translate(vcpu, page_of(linear), &kvm_vcpu->code_gpa);
		kvm_vcpu->code_known = rc == 0;
		kvm_vcpu->code_page = page_of(linear);
		if (rc < 0)
			return rc;
	}
	*ret_gpa = kvm_vcpu->code_gpa + linear % GM_PAGE_SIZE;
	return 0;
}

static void forget_code_if_nothing_moved(struct mv_kvm_vcpu *vcpu,
					 const struct mv_registers *registers)
{
	if (memcmp(&vcpu->code_registers, registers, sizeof(*registers)) == 0)
		vcpu->code_known = false;
	vcpu->code_registers = *registers;
}

static int need(struct mv_needs *needs, uint64_t gpa)
{
	for (uint32_t i = 0; i < needs->count; i++)
		if (needs->gpas[i] == page_of(gpa))
			return 0;
	if (needs->count == MV_NEED_COUNT_MAX)
		return -E2BIG;
	needs->gpas[needs->count++] = page_of(gpa);
	return 0;
}

/*
 * The code from `linear` to the end of its page, or as much as an instruction may have. Out of the
 * file, not the mapping: a hole is zeros there, and nothing can fault. Never of an absent page:
 * needs->fetch then, and no bytes.
 */
static int read_code(struct mv_vcpu *vcpu, uint64_t linear, struct mv_needs *needs,
		     struct code *code, struct mv_error *error)
{
	const struct mv_memory *memory = &vcpu->machine->memory;
	const size_t left = (size_t)(GM_PAGE_SIZE - linear % GM_PAGE_SIZE);
	const size_t room = sizeof(code->bytes) - code->len;
	const size_t len = left < room ? left : room;
	uint64_t gpa = 0, offset = 0;
	int rc = translate_code(vcpu, linear, &gpa);

	if (rc < 0)
		return mv_refuse_errno(error, rc, "rip %#llx translates to nothing",
				       (unsigned long long)linear);
	if (!mv_memory_offset(memory, gpa, &offset))
		return mv_refuse(error, -EFAULT, "rip is at %#llx, where no memory is",
				 (unsigned long long)gpa);
	rc = need(needs, gpa);
	if (rc < 0)
		return mv_refuse_errno(error, rc, "code");
	if (mv_faults_absent(vcpu->machine, gpa)) {
		needs->fetch = true;
		return 0;
	}
	if (pread(memory->fd, code->bytes + code->len, len, (off_t)offset) != (ssize_t)len)
		return mv_refuse(error, -EIO, "the code at %#llx cannot be read",
				 (unsigned long long)gpa);
	code->len += len;
	return 0;
}

/* Few instructions use them, and asking costs as much as all the rest. */
static int set_segment_bases(const struct mv_vcpu *vcpu, const struct code *code,
			     struct mv_registers *registers)
{
	struct kvm_sregs sregs = {.cr0 = 0};
	bool used = false;
	int rc;

	for (size_t i = 0; i < code->len && i < PREFIX_COUNT_MAX; i++)
		used = used || code->bytes[i] == PREFIX_FS || code->bytes[i] == PREFIX_GS;
	if (!used)
		return 0;
	rc = mv_kvm_ioctl(mv_kvm_vcpu_of(vcpu)->fd, KVM_GET_SREGS, &sregs);
	if (rc < 0)
		return rc;
	registers->fs_base = sregs.fs.base;
	registers->gs_base = sregs.gs.base;
	return 0;
}

static int decode(const struct mv_vcpu *vcpu, const struct code *code,
		  struct mv_registers *registers, struct mv_access *ret_accesses)
{
	const int rc = set_segment_bases(vcpu, code, registers);

	return rc < 0 ? rc : mv_decode(code->bytes, code->len, registers, ret_accesses);
}

static int refuse_instruction(const struct code *code, int rc, struct mv_error *error)
{
	char hex[3 * sizeof(code->bytes) + 1] = "";

	if (rc != -ENOSYS)
		return mv_refuse_errno(error, rc, "decode");
	for (size_t i = 0; i < code->len; i++)
		(void)snprintf(hex + 3 * i, sizeof(hex) - 3 * i, " %02x", code->bytes[i]);
	return mv_refuse(error, -ENOSYS, "an instruction that is not known:%s", hex);
}

/* Every page of every access. One that the guest itself has not mapped is the guest's own fault. */
static int need_accesses(const struct mv_vcpu *vcpu, const struct mv_access *accesses, int count,
			 struct mv_needs *needs)
{
	for (int i = 0; i < count; i++) {
		const uint64_t last = page_of(accesses[i].addr + accesses[i].len - 1);

		for (uint64_t page = page_of(accesses[i].addr);; page += GM_PAGE_SIZE) {
			uint64_t gpa;
			int rc = translate(vcpu, page, &gpa);

			if (rc == 0)
				rc = need(needs, gpa);
			if (rc < 0 && rc != -ENOENT)
				return rc;
			if (page == last)
				break;
		}
	}
	return 0;
}

int mv_kvm_discover(struct mv_vcpu *vcpu, struct mv_needs *ret_needs, struct mv_error *error)
{
	struct mv_needs *needs = ret_needs;
	struct mv_access accesses[MV_ACCESS_COUNT_MAX];
	struct code code = {.len = 0};
	uint64_t rip;
	int rc;

	*needs = (struct mv_needs){.count = 0};
	set_registers(&mv_kvm_vcpu_of(vcpu)->run->s.regs.regs, &needs->registers);
	rip = needs->registers.rip;
	forget_code_if_nothing_moved(mv_kvm_vcpu_of(vcpu), &needs->registers);
	rc = read_code(vcpu, rip, needs, &code, error);
	if (rc < 0 || needs->fetch)
		return rc;
	rc = decode(vcpu, &code, &needs->registers, accesses);
	if (rc == -EAGAIN) {
		/* It goes on in the next page: only now is it known that it does. */
		rc = read_code(vcpu, rip + code.len, needs, &code, error);
		if (rc < 0 || needs->fetch)
			return rc;
		rc = decode(vcpu, &code, &needs->registers, accesses);
	}
	if (rc < 0)
		return refuse_instruction(&code, rc, error);
	rc = need_accesses(vcpu, accesses, rc, needs);
	return rc < 0 ? mv_refuse_errno(error, rc, "the operands") : 0;
}
