/* SPDX-License-Identifier: Apache-2.0 */
/*
 * decode_table.h - the opcode maps, as far as decode.c needs them; nobody else includes it.
 *
 * Threads: pure functions over constants.
 * Errors: false: not in the table.
 * Ownership: none.
 * Units: bytes.
 * Source: Intel SDM vol. 2, appendix A.
 */
#ifndef MV_DECODE_TABLE_H
#define MV_DECODE_TABLE_H

#include <stdbool.h>
#include <stdint.h>

struct mv_prefixes {
	bool operand16; /* 66, or VEX's for it */
	bool wide;	/* REX.W */
	uint8_t repeat; /* F2, F3 or 0 */
	bool vex;
	bool vex256;
};

/* How much memory an operand is: these, or a plain number of bytes. */
enum mv_size {
	MV_SIZE_V = 240, /* 8 wide, 2 with 66, else 4 */
	MV_SIZE_Y,	 /* 8 wide, else 4 */
	MV_SIZE_STACK,	 /* 2 with 66, else 8 */
	MV_SIZE_X,	 /* a vector: 16 or 32 */
	MV_SIZE_HALF,	 /* half of one */
	MV_SIZE_QUARTER,
	MV_SIZE_EIGHTH,
	MV_SIZE_P,	/* MMX 8; with 66 or VEX a vector */
	MV_SIZE_SCALAR, /* F3 4, F2 8, else a vector */
	MV_SIZE_PAIR,	/* CMPXCHG8B and 16B */
	MV_SIZE_FXSAVE, /* 512 */
};

enum mv_immediate {
	MV_IMMEDIATE_NONE,
	MV_IMMEDIATE_1,
	MV_IMMEDIATE_2,
	MV_IMMEDIATE_3,
	MV_IMMEDIATE_4,
	MV_IMMEDIATE_Z,	   /* 2 with 66, else 4 */
	MV_IMMEDIATE_V,	   /* 8 wide, 2 with 66, else 4 */
	MV_IMMEDIATE_ADDR, /* 4 with 67, else 8 */
};

enum mv_kind {
	MV_PLAIN,     /* what ModRM says */
	MV_PUSH,      /* and the stack below */
	MV_POP,	      /* and the stack */
	MV_MOVE,      /* [rsi] and [rdi] */
	MV_STORE,     /* [rdi] */
	MV_LOAD,      /* [rsi] */
	MV_ABSOLUTE,  /* the immediate is the address */
	MV_TRANSLATE, /* [rbx + al] */
	MV_MASKED,    /* [rdi], with a segment */
	MV_BIT,	      /* what ModRM says, and a register's bit offset from there */
	MV_ENTER,
	MV_LEAVE,
};

/* For opcodes with (opcode & mask) == value. */
struct mv_rule {
	uint8_t mask;
	uint8_t value;
	uint8_t size;	   /* enum mv_size, or bytes */
	uint8_t immediate; /* enum mv_immediate */
	uint8_t kind;	   /* enum mv_kind */
	bool modrm;
	bool stack8; /* 66 does not make the stack's part smaller: near branches */
};

bool mv_rule_find(uint8_t map, uint8_t opcode, const struct mv_prefixes *prefixes,
		  struct mv_rule *ret_rule);

/* What ModRM's middle bits change about it, in groups. */
bool mv_rule_narrow(struct mv_rule *rule, uint8_t map, uint8_t opcode, uint8_t modrm,
		    const struct mv_prefixes *prefixes);

uint32_t mv_operand_len(uint8_t size, const struct mv_prefixes *prefixes);
uint32_t mv_immediate_len(uint8_t immediate, const struct mv_prefixes *prefixes, bool address32);

#endif
