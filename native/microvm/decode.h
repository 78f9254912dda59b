/* SPDX-License-Identifier: Apache-2.0 */
/*
 * decode.h - what memory an x86-64 instruction is about to touch.
 *
 * Threads: a pure function.
 * Errors: below. Whatever the table does not know is refused: nobody guesses.
 * Ownership: none.
 * Units: linear addresses, bytes.
 * Source: Intel SDM vol. 2, chapter 2 (the encoding), appendix A (the opcode maps).
 *
 * For EFAULT without an address (discover.c). A wrong answer cannot damage a guest: it asks for a
 * page in vain, and the instruction faults again. What is not here: EVEX, XOP, gathers, XSAVE, far
 * branches, INS and OUTS, and code that is not 64-bit.
 */
#ifndef MV_DECODE_H
#define MV_DECODE_H

#include <stddef.h>
#include <stdint.h>

#define MV_INSTRUCTION_LEN_MAX 15u
#define MV_ACCESS_COUNT_MAX    4u

enum mv_register { MV_RAX, MV_RCX, MV_RDX, MV_RBX, MV_RSP, MV_RBP, MV_RSI, MV_RDI };

struct mv_registers {
	uint64_t gpr[16]; /* as instructions number them */
	uint64_t rip;
	uint64_t fs_base;
	uint64_t gs_base;
};

struct mv_access {
	uint64_t addr;
	uint32_t len;
};

/*
 * `bytes` are at registers->rip. Of a repeated string instruction: the element it is at.
 *
 * Returns how many accesses, 0..MV_ACCESS_COUNT_MAX; -EAGAIN the instruction has more than `len`
 * bytes; -ENOSYS it is not in the table.
 */
int mv_decode(const uint8_t *bytes, size_t len, const struct mv_registers *registers,
	      struct mv_access ret_accesses[MV_ACCESS_COUNT_MAX]);

#endif
