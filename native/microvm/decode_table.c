/* SPDX-License-Identifier: Apache-2.0 */
/*
 * decode_table.c - see decode_table.h.
 *
 * Threads, Errors, Ownership, Units, Source: see decode_table.h.
 *
 * Where an operand's size depends on much, the larger one is there: a page asked for in vain, once.
 */
#include "decode_table.h"

#include <stddef.h>

#define NO_MEMORY(mask, value, immediate)                         \
	{                                                         \
		mask, value, 0, immediate, MV_PLAIN, false, false \
	}
#define MODRM(mask, value, size, immediate)                         \
	{                                                           \
		mask, value, size, immediate, MV_PLAIN, true, false \
	}
#define STRING(value, kind, size)                        \
	{                                                \
		0xFF, value, size, 0, kind, false, false \
	}

static const struct mv_rule ONE_BYTE[] = {
	/* ADD OR ADC SBB AND SUB XOR CMP */
	MODRM(0xC5, 0x00, 1, 0),
	MODRM(0xC5, 0x01, MV_SIZE_V, 0),
	NO_MEMORY(0xC7, 0x04, MV_IMMEDIATE_1),
	NO_MEMORY(0xC7, 0x05, MV_IMMEDIATE_Z),
	{0xF8, 0x50, 0, 0, MV_PUSH, false, false},
	{0xF8, 0x58, 0, 0, MV_POP, false, false},
	MODRM(0xFF, 0x63, 4, 0), /* MOVSXD */
	{0xFF, 0x68, 0, MV_IMMEDIATE_Z, MV_PUSH, false, false},
	MODRM(0xFF, 0x69, MV_SIZE_V, MV_IMMEDIATE_Z), /* IMUL */
	{0xFF, 0x6A, 0, MV_IMMEDIATE_1, MV_PUSH, false, false},
	MODRM(0xFF, 0x6B, MV_SIZE_V, MV_IMMEDIATE_1),
	NO_MEMORY(0xF0, 0x70, MV_IMMEDIATE_1), /* Jcc */
	MODRM(0xFF, 0x80, 1, MV_IMMEDIATE_1),
	MODRM(0xFF, 0x81, MV_SIZE_V, MV_IMMEDIATE_Z),
	MODRM(0xFF, 0x83, MV_SIZE_V, MV_IMMEDIATE_1),
	MODRM(0xFD, 0x84, 1, 0), /* TEST, XCHG */
	MODRM(0xFD, 0x85, MV_SIZE_V, 0),
	MODRM(0xFD, 0x88, 1, 0), /* MOV */
	MODRM(0xFD, 0x89, MV_SIZE_V, 0),
	MODRM(0xFD, 0x8C, 2, 0),			     /* MOV of segment registers */
	MODRM(0xFF, 0x8D, 0, 0),			     /* LEA */
	{0xFF, 0x8F, MV_SIZE_STACK, 0, MV_POP, true, false}, /* POP to memory */
	NO_MEMORY(0xF8, 0x90, 0),
	NO_MEMORY(0xFE, 0x98, 0),
	NO_MEMORY(0xFF, 0x9B, 0),
	{0xFF, 0x9C, 0, 0, MV_PUSH, false, false}, /* PUSHF */
	{0xFF, 0x9D, 0, 0, MV_POP, false, false},
	NO_MEMORY(0xFE, 0x9E, 0),
	{0xFD, 0xA0, 1, MV_IMMEDIATE_ADDR, MV_ABSOLUTE, false, false},
	{0xFD, 0xA1, MV_SIZE_V, MV_IMMEDIATE_ADDR, MV_ABSOLUTE, false, false},
	STRING(0xA4, MV_MOVE, 1),
	STRING(0xA5, MV_MOVE, MV_SIZE_V),
	STRING(0xA6, MV_MOVE, 1), /* CMPS */
	STRING(0xA7, MV_MOVE, MV_SIZE_V),
	NO_MEMORY(0xFF, 0xA8, MV_IMMEDIATE_1), /* TEST */
	NO_MEMORY(0xFF, 0xA9, MV_IMMEDIATE_Z),
	STRING(0xAA, MV_STORE, 1),
	STRING(0xAB, MV_STORE, MV_SIZE_V),
	STRING(0xAC, MV_LOAD, 1),
	STRING(0xAD, MV_LOAD, MV_SIZE_V),
	STRING(0xAE, MV_STORE, 1), /* SCAS */
	STRING(0xAF, MV_STORE, MV_SIZE_V),
	NO_MEMORY(0xF8, 0xB0, MV_IMMEDIATE_1), /* MOV */
	NO_MEMORY(0xF8, 0xB8, MV_IMMEDIATE_V),
	MODRM(0xFF, 0xC0, 1, MV_IMMEDIATE_1), /* shifts */
	MODRM(0xFF, 0xC1, MV_SIZE_V, MV_IMMEDIATE_1),
	{0xFF, 0xC2, 0, MV_IMMEDIATE_2, MV_POP, false, true}, /* RET */
	{0xFF, 0xC3, 0, 0, MV_POP, false, true},
	MODRM(0xFF, 0xC6, 1, MV_IMMEDIATE_1), /* MOV */
	MODRM(0xFF, 0xC7, MV_SIZE_V, MV_IMMEDIATE_Z),
	{0xFF, 0xC8, 0, MV_IMMEDIATE_3, MV_ENTER, false, false},
	{0xFF, 0xC9, 0, 0, MV_LEAVE, false, false},
	MODRM(0xFD, 0xD0, 1, 0), /* shifts */
	MODRM(0xFD, 0xD1, MV_SIZE_V, 0),
	{0xFF, 0xD7, 1, 0, MV_TRANSLATE, false, false},	       /* XLAT */
	MODRM(0xF8, 0xD8, 0, 0),			       /* x87: narrowed */
	NO_MEMORY(0xF8, 0xE0, MV_IMMEDIATE_1),		       /* LOOP, JRCXZ, IN, OUT */
	{0xFF, 0xE8, 0, MV_IMMEDIATE_4, MV_PUSH, false, true}, /* CALL */
	NO_MEMORY(0xFF, 0xE9, MV_IMMEDIATE_4),
	NO_MEMORY(0xFF, 0xEB, MV_IMMEDIATE_1),
	NO_MEMORY(0xFC, 0xEC, 0), /* IN, OUT */
	NO_MEMORY(0xFE, 0xF4, 0), /* HLT, CMC */
	MODRM(0xFF, 0xF6, 1, 0),  /* TEST, NOT, NEG, MUL, DIV: narrowed */
	MODRM(0xFF, 0xF7, MV_SIZE_V, 0),
	NO_MEMORY(0xF8, 0xF8, 0), /* CLC to STD; FE and FF are before it */
};

static const struct mv_rule GROUPS_5[] = {
	MODRM(0xFF, 0xFE, 1, 0), /* INC, DEC */
	MODRM(0xFF, 0xFF, MV_SIZE_V, 0),
};

static const struct mv_rule TWO_BYTE[] = {
	NO_MEMORY(0xFF, 0x05, 0), /* SYSCALL */
	NO_MEMORY(0xFF, 0x0B, 0), /* UD2 */
	MODRM(0xFF, 0x0D, 0, 0),  /* PREFETCHW */
	MODRM(0xFE, 0x10, MV_SIZE_SCALAR, 0),
	MODRM(0xFE, 0x12, MV_SIZE_X, 0), /* MOVLPS, and MOVSLDUP with its 16 */
	MODRM(0xFE, 0x14, MV_SIZE_X, 0),
	MODRM(0xFE, 0x16, MV_SIZE_X, 0),
	MODRM(0xF8, 0x18, 0, 0), /* PREFETCH, NOP */
	MODRM(0xFE, 0x28, MV_SIZE_X, 0),
	MODRM(0xFF, 0x2A, 8, 0),
	MODRM(0xFF, 0x2B, MV_SIZE_X, 0),
	MODRM(0xFC, 0x2C, 8, 0),	 /* conversions, COMISS, COMISD */
	NO_MEMORY(0xFF, 0x31, 0),	 /* RDTSC */
	MODRM(0xF0, 0x40, MV_SIZE_V, 0), /* CMOV */
	MODRM(0xF0, 0x50, MV_SIZE_SCALAR, 0),
	MODRM(0xFF, 0x6E, MV_SIZE_Y, 0), /* MOVD, MOVQ */
	MODRM(0xFF, 0x6F, MV_SIZE_P, 0),
	MODRM(0xFF, 0x70, MV_SIZE_P, MV_IMMEDIATE_1),
	MODRM(0xFC, 0x70, 0, MV_IMMEDIATE_1), /* shifts of registers */
	NO_MEMORY(0xFF, 0x77, 0),	      /* EMMS */
	MODRM(0xFC, 0x74, MV_SIZE_P, 0),
	MODRM(0xFE, 0x7C, MV_SIZE_X, 0),
	MODRM(0xFF, 0x7E, MV_SIZE_Y, 0),
	MODRM(0xFF, 0x7F, MV_SIZE_P, 0),
	MODRM(0xF0, 0x60, MV_SIZE_P, 0),
	NO_MEMORY(0xF0, 0x80, MV_IMMEDIATE_4),	   /* Jcc */
	MODRM(0xF0, 0x90, 1, 0),		   /* SETcc */
	{0xF7, 0xA0, 0, 0, MV_PUSH, false, false}, /* FS, GS */
	{0xF7, 0xA1, 0, 0, MV_POP, false, false},
	NO_MEMORY(0xFF, 0xA2, 0), /* CPUID */
	{0xE7, 0xA3, MV_SIZE_V, 0, MV_BIT, true, false},
	MODRM(0xF7, 0xA4, MV_SIZE_V, MV_IMMEDIATE_1), /* SHLD, SHRD */
	MODRM(0xF7, 0xA5, MV_SIZE_V, 0),
	MODRM(0xFF, 0xAE, 0, 0), /* narrowed */
	MODRM(0xFF, 0xAF, MV_SIZE_V, 0),
	MODRM(0xFF, 0xB0, 1, 0), /* CMPXCHG */
	MODRM(0xFF, 0xB1, MV_SIZE_V, 0),
	MODRM(0xF7, 0xB6, 1, 0), /* MOVZX, MOVSX */
	MODRM(0xF7, 0xB7, 2, 0), /* but B8 to BA, BC and BD are narrowed */
	MODRM(0xFF, 0xB8, MV_SIZE_V, 0),
	MODRM(0xFF, 0xBA, MV_SIZE_V, MV_IMMEDIATE_1),
	MODRM(0xFE, 0xBC, MV_SIZE_V, 0),
	MODRM(0xFF, 0xC0, 1, 0), /* XADD */
	MODRM(0xFF, 0xC1, MV_SIZE_V, 0),
	MODRM(0xFF, 0xC2, MV_SIZE_SCALAR, MV_IMMEDIATE_1),
	MODRM(0xFF, 0xC3, MV_SIZE_Y, 0), /* MOVNTI */
	MODRM(0xFF, 0xC4, 2, MV_IMMEDIATE_1),
	MODRM(0xFF, 0xC5, 0, MV_IMMEDIATE_1),
	MODRM(0xFF, 0xC6, MV_SIZE_X, MV_IMMEDIATE_1),
	MODRM(0xFF, 0xC7, MV_SIZE_PAIR, 0), /* narrowed */
	NO_MEMORY(0xF8, 0xC8, 0),	    /* BSWAP */
	{0xFF, 0xF7, MV_SIZE_P, 0, MV_MASKED, true, false},
	MODRM(0xF0, 0xD0, MV_SIZE_P, 0),
	MODRM(0xFF, 0xF0, MV_SIZE_X, 0), /* LDDQU */
	MODRM(0xF0, 0xE0, MV_SIZE_P, 0),
	MODRM(0xF0, 0xF0, MV_SIZE_P, 0),
};

static const struct mv_rule THREE_BYTE_38[] = {
	/* VPBROADCAST, VBROADCAST */
	MODRM(0xFF, 0x18, 4, 0), MODRM(0xFF, 0x19, 8, 0), MODRM(0xFF, 0x1A, 16, 0),
	MODRM(0xFF, 0x58, 4, 0), MODRM(0xFF, 0x59, 8, 0), MODRM(0xFF, 0x5A, 16, 0),
	MODRM(0xFF, 0x78, 1, 0), MODRM(0xFF, 0x79, 2, 0),
	/* PMOVSX, PMOVZX */
	MODRM(0xEF, 0x20, MV_SIZE_HALF, 0), MODRM(0xEF, 0x21, MV_SIZE_QUARTER, 0),
	MODRM(0xEF, 0x22, MV_SIZE_EIGHTH, 0), MODRM(0xEF, 0x23, MV_SIZE_HALF, 0),
	MODRM(0xEF, 0x24, MV_SIZE_QUARTER, 0), MODRM(0xEF, 0x25, MV_SIZE_HALF, 0),
	MODRM(0xFF, 0xF0, MV_SIZE_V, 0),				  /* MOVBE, CRC32 */
	MODRM(0xFF, 0xF1, MV_SIZE_V, 0), MODRM(0xF8, 0xF0, MV_SIZE_Y, 0), /* BMI, ADX */
	MODRM(0xE0, 0x00, MV_SIZE_P, 0), MODRM(0xE0, 0x20, MV_SIZE_X, 0),
	MODRM(0xF0, 0x40, MV_SIZE_X, 0), MODRM(0xFC, 0x8C, MV_SIZE_X, 0), /* VPMASKMOV */
	/* FMA; its scalars are smaller */
	MODRM(0xF8, 0x98, MV_SIZE_X, 0), MODRM(0xFE, 0x96, MV_SIZE_X, 0),
	MODRM(0xF8, 0xA8, MV_SIZE_X, 0), MODRM(0xFE, 0xA6, MV_SIZE_X, 0),
	MODRM(0xF8, 0xB8, MV_SIZE_X, 0), MODRM(0xFE, 0xB6, MV_SIZE_X, 0),
	MODRM(0xF8, 0xC8, MV_SIZE_X, 0), /* SHA */
	MODRM(0xF8, 0xD8, MV_SIZE_X, 0), /* AES */
};

static const struct mv_rule THREE_BYTE_3A[] = {
	MODRM(0xFF, 0x0A, 4, MV_IMMEDIATE_1), /* ROUNDSS, ROUNDSD */
	MODRM(0xFF, 0x0B, 8, MV_IMMEDIATE_1),
	MODRM(0xFF, 0x0F, MV_SIZE_P, MV_IMMEDIATE_1), /* PALIGNR */
	MODRM(0xEB, 0x00, MV_SIZE_X, MV_IMMEDIATE_1), /* VPERM */
	MODRM(0xF8, 0x08, MV_SIZE_X, MV_IMMEDIATE_1),
	MODRM(0xFF, 0x14, 1, MV_IMMEDIATE_1), /* PEXTR, PINSR */
	MODRM(0xFF, 0x15, 2, MV_IMMEDIATE_1),
	MODRM(0xFF, 0x16, MV_SIZE_Y, MV_IMMEDIATE_1),
	MODRM(0xFF, 0x17, 4, MV_IMMEDIATE_1),
	MODRM(0xDE, 0x18, 16, MV_IMMEDIATE_1), /* VINSERT, VEXTRACT */
	MODRM(0xFF, 0x20, 1, MV_IMMEDIATE_1),
	MODRM(0xFF, 0x21, 4, MV_IMMEDIATE_1),
	MODRM(0xFF, 0x22, MV_SIZE_Y, MV_IMMEDIATE_1),
	MODRM(0xFC, 0x40, MV_SIZE_X, MV_IMMEDIATE_1),
	MODRM(0xFC, 0x60, 16, MV_IMMEDIATE_1), /* PCMPSTR */
	MODRM(0xFF, 0xCC, 16, MV_IMMEDIATE_1), /* SHA, AES */
	MODRM(0xFF, 0xDF, 16, MV_IMMEDIATE_1),
	MODRM(0xFF, 0xF0, MV_SIZE_Y, MV_IMMEDIATE_1), /* RORX */
};

static bool find(const struct mv_rule *rules, size_t count, uint8_t opcode,
		 struct mv_rule *ret_rule)
{
	for (size_t i = 0; i < count; i++) {
		if ((opcode & rules[i].mask) == rules[i].value) {
			*ret_rule = rules[i];
			return true;
		}
	}
	return false;
}

#define FIND(rules) find(rules, sizeof(rules) / sizeof((rules)[0]), opcode, ret_rule)

bool mv_rule_find(uint8_t map, uint8_t opcode, const struct mv_prefixes *prefixes,
		  struct mv_rule *ret_rule)
{
	switch (map) {
	case 0:
		return FIND(GROUPS_5) || FIND(ONE_BYTE);
	case 1:
		/* With VEX these are for the mask registers of AVX-512. */
		if (prefixes->vex && ((opcode & 0xF0) == 0x40 || (opcode & 0xE0) == 0x80))
			return false;
		return FIND(TWO_BYTE);
	case 2:
		if (!FIND(THREE_BYTE_38))
			return false;
		if (prefixes->repeat == 0xF2 && opcode == 0xF0)
			ret_rule->size = 1; /* CRC32 of a byte */
		return true;
	case 3:
		return FIND(THREE_BYTE_3A);
	default:
		return false;
	}
}

/* --- groups -------------------------------------------------------------------------------------- */

/* What ModRM's middle bits make of D8 to DF; 0 is not in the table. */
static const uint8_t X87_LEN[8][8] = {
	{4, 4, 4, 4, 4, 4, 4, 4},   {4, 0, 4, 4, 28, 2, 28, 2}, {4, 4, 4, 4, 4, 4, 4, 4},
	{4, 4, 4, 4, 0, 10, 0, 10}, {8, 8, 8, 8, 8, 8, 8, 8},	{8, 8, 8, 8, 108, 0, 108, 2},
	{2, 2, 2, 2, 2, 2, 2, 2},   {2, 2, 2, 2, 10, 8, 10, 8},
};

static bool narrow_ff(struct mv_rule *rule, uint8_t reg)
{
	switch (reg) {
	case 0:
	case 1:
		return true; /* INC, DEC */
	case 2:
		rule->kind = MV_PUSH; /* CALL */
		rule->stack8 = true;
		rule->size = 8;
		return true;
	case 4:
		rule->size = 8; /* JMP */
		return true;
	case 6:
		rule->kind = MV_PUSH;
		rule->size = MV_SIZE_STACK;
		return true;
	default:
		return false;
	}
}

/* FXSAVE, FXRSTOR, LDMXCSR, STMXCSR, CLFLUSH; XSAVE's size depends on the processor's state. */
static bool narrow_ae(struct mv_rule *rule, uint8_t reg, bool memory)
{
	static const uint8_t sizes[8] = {MV_SIZE_FXSAVE, MV_SIZE_FXSAVE, 4, 4, 0, 0, 0, 1};

	rule->size = sizes[reg];
	return !memory || rule->size > 0;
}

bool mv_rule_narrow(struct mv_rule *rule, uint8_t map, uint8_t opcode, uint8_t modrm,
		    const struct mv_prefixes *prefixes)
{
	const uint8_t reg = modrm >> 3 & 7;
	const bool memory = modrm >> 6 != 3;

	if (map == 1 && opcode == 0xAE)
		return narrow_ae(rule, reg, memory);
	if (map == 1 && opcode == 0xC7)
		return reg == 1 || !memory; /* RDRAND is of registers */
	if (map == 1 && opcode == 0xBA)
		return reg >= 4; /* the bit is inside of the operand */
	if (map == 1 && opcode == 0xB8)
		return prefixes->repeat == 0xF3; /* POPCNT */
	if (map == 1 && ((opcode == 0x7E && prefixes->repeat == 0xF3) || opcode == 0xD6))
		rule->size = 8; /* MOVQ */
	if (map != 0)
		return true;
	if ((opcode & 0xF8) == 0xD8) {
		rule->size = X87_LEN[opcode & 7][reg];
		return !memory || rule->size > 0;
	}
	switch (opcode) {
	case 0xF6:
	case 0xF7:
		if (reg < 2) /* TEST */
			rule->immediate = opcode == 0xF6 ? MV_IMMEDIATE_1 : MV_IMMEDIATE_Z;
		return true;
	case 0xFE:
		return reg < 2;
	case 0xFF:
		return narrow_ff(rule, reg);
	case 0x8F: /* XOP */
	case 0xC6:
	case 0xC7:
		return reg == 0;
	default:
		return true;
	}
}

/* --- sizes --------------------------------------------------------------------------------------- */

uint32_t mv_operand_len(uint8_t size, const struct mv_prefixes *prefixes)
{
	const uint32_t vector = prefixes->vex256 ? 32 : 16;

	switch (size) {
	case MV_SIZE_V:
		return prefixes->wide ? 8 : prefixes->operand16 ? 2 : 4;
	case MV_SIZE_Y:
		return prefixes->wide ? 8 : 4;
	case MV_SIZE_STACK:
		return prefixes->operand16 ? 2 : 8;
	case MV_SIZE_X:
		return vector;
	case MV_SIZE_HALF:
		return vector / 2;
	case MV_SIZE_QUARTER:
		return vector / 4;
	case MV_SIZE_EIGHTH:
		return vector / 8;
	case MV_SIZE_P:
		return prefixes->operand16 || prefixes->repeat || prefixes->vex ? vector : 8;
	case MV_SIZE_SCALAR:
		return prefixes->repeat == 0xF3 ? 4 : prefixes->repeat == 0xF2 ? 8 : vector;
	case MV_SIZE_PAIR:
		return prefixes->wide ? 16 : 8;
	case MV_SIZE_FXSAVE:
		return 512;
	default:
		return size;
	}
}

uint32_t mv_immediate_len(uint8_t immediate, const struct mv_prefixes *prefixes, bool address32)
{
	switch (immediate) {
	case MV_IMMEDIATE_Z:
		return prefixes->operand16 ? 2 : 4;
	case MV_IMMEDIATE_V:
		return prefixes->wide ? 8 : prefixes->operand16 ? 2 : 4;
	case MV_IMMEDIATE_ADDR:
		return address32 ? 4 : 8;
	default:
		return immediate; /* a number of bytes */
	}
}
