/* SPDX-License-Identifier: Apache-2.0 */
/*
 * decode.c - see decode.h.
 *
 * Threads, Errors, Ownership, Units, Source: see decode.h.
 *
 * prefixes, opcode -> a rule of the table -> ModRM, SIB, displacement -> immediate -> accesses.
 */
#include "decode.h"

#include <errno.h>
#include <stdbool.h>
#include <string.h>

#include "decode_table.h"

#define PREFIX_FS 0x64
#define PREFIX_GS 0x65

struct instruction {
	const uint8_t *bytes;
	size_t len;
	size_t at;
	bool cut; /* there were fewer bytes than it has */
	const struct mv_registers *registers;
	struct mv_prefixes prefixes;
	uint8_t segment; /* PREFIX_FS, PREFIX_GS or 0 */
	bool address32;
	uint8_t rex_r, rex_x, rex_b; /* 0 or 8 */
	uint8_t map;		     /* 0 one byte, 1 0F, 2 0F 38, 3 0F 3A */
	uint8_t opcode;
	uint8_t modrm;
	bool memory;	   /* ModRM names memory */
	bool rip_relative; /* to the end of the instruction, which is not known yet */
	uint64_t ea;
	uint64_t immediate;
	uint32_t count;
	struct mv_access *accesses;
};

/* Little-endian, sign-extended. */
static uint64_t take(struct instruction *in, size_t len)
{
	uint64_t value = 0;

	if (in->cut || in->len - in->at < len) {
		in->cut = true;
		return 0;
	}
	memcpy(&value, in->bytes + in->at, len);
	in->at += len;
	if (len > 0 && len < sizeof(value)) {
		const unsigned int shift = 64 - 8 * (unsigned int)len;

		value = (uint64_t)((int64_t)(value << shift) >> shift);
	}
	return value;
}

static uint8_t take_byte(struct instruction *in)
{
	return (uint8_t)take(in, 1);
}

static void add(struct instruction *in, uint64_t addr, uint32_t len)
{
	if (len > 0 && in->count < MV_ACCESS_COUNT_MAX)
		in->accesses[in->count++] = (struct mv_access){.addr = addr, .len = len};
}

/* --- prefixes and opcode ------------------------------------------------------------------------- */

static bool legacy_prefix(struct instruction *in, uint8_t byte)
{
	switch (byte) {
	case 0x66:
		in->prefixes.operand16 = true;
		return true;
	case 0x67:
		in->address32 = true;
		return true;
	case 0xF2:
	case 0xF3:
		in->prefixes.repeat = byte;
		return true;
	case PREFIX_FS:
	case PREFIX_GS:
		in->segment = byte;
		return true;
	case 0x26:
	case 0x2E:
	case 0x36:
	case 0x3E:
	case 0xF0:
		return true;
	default:
		return false;
	}
}

static void set_rex(struct instruction *in, uint8_t rex)
{
	in->prefixes.wide = rex & 8;
	in->rex_r = rex & 4 ? 8 : 0;
	in->rex_x = rex & 2 ? 8 : 0;
	in->rex_b = rex & 1 ? 8 : 0;
}

/* The bits of a REX prefix are in it inverted; `pp` stands for a legacy prefix. */
static void take_vex(struct instruction *in, bool three)
{
	static const uint8_t repeats[4] = {0, 0, 0xF3, 0xF2};
	const uint8_t first = take_byte(in);
	uint8_t last = first;
	uint8_t rex = (uint8_t)(~first >> 5 & 4);

	in->map = 1;
	if (three) {
		last = take_byte(in);
		rex = (uint8_t)((~first >> 5 & 7) | (last >> 4 & 8));
		in->map = first & 31;
	}
	set_rex(in, rex);
	in->prefixes.vex = true;
	in->prefixes.vex256 = last & 4;
	in->prefixes.operand16 = (last & 3) == 1;
	in->prefixes.repeat = repeats[last & 3];
	in->opcode = take_byte(in);
}

static void take_opcode(struct instruction *in)
{
	uint8_t byte = take_byte(in);

	while (!in->cut && legacy_prefix(in, byte))
		byte = take_byte(in);
	if ((byte & 0xF0) == 0x40) {
		set_rex(in, byte & 15);
		byte = take_byte(in);
	}
	if (byte == 0xC5 || byte == 0xC4) {
		take_vex(in, byte == 0xC4);
		return;
	}
	if (byte == 0x0F) {
		in->map = 1;
		byte = take_byte(in);
		if (byte == 0x38 || byte == 0x3A) {
			in->map = byte == 0x38 ? 2 : 3;
			byte = take_byte(in);
		}
	}
	in->opcode = byte;
}

/* --- ModRM --------------------------------------------------------------------------------------- */

static uint64_t base_of(const struct instruction *in, unsigned int number, bool popped)
{
	/* POP to memory has taken its 8 bytes from the stack before it looks where to. */
	return in->registers->gpr[number] + (popped && number == MV_RSP ? 8 : 0);
}

static void take_sib(struct instruction *in, unsigned int mod, bool popped)
{
	const uint8_t sib = take_byte(in);
	const unsigned int base = sib & 7;
	const unsigned int index = (sib >> 3 & 7) | in->rex_x;

	if (base == 5 && mod == 0)
		in->ea = take(in, 4);
	else
		in->ea = base_of(in, base | in->rex_b, popped);
	if (index != MV_RSP)
		in->ea += in->registers->gpr[index] << (sib >> 6);
}

static void take_modrm(struct instruction *in, bool popped)
{
	unsigned int mod, rm;

	in->modrm = take_byte(in);
	mod = in->modrm >> 6;
	rm = in->modrm & 7;
	in->memory = mod != 3;
	if (!in->memory)
		return;
	if (rm == 4) {
		take_sib(in, mod, popped);
	} else if (rm == 5 && mod == 0) {
		in->ea = take(in, 4);
		in->rip_relative = true;
	} else {
		in->ea = base_of(in, rm | in->rex_b, popped);
	}
	if (mod == 1)
		in->ea += take(in, 1);
	else if (mod == 2)
		in->ea += take(in, 4);
}

static uint64_t linear(const struct instruction *in, uint64_t addr)
{
	if (in->address32)
		addr = (uint32_t)addr;
	if (in->segment == PREFIX_FS)
		addr += in->registers->fs_base;
	else if (in->segment == PREFIX_GS)
		addr += in->registers->gs_base;
	return addr;
}

/* --- accesses ------------------------------------------------------------------------------------ */

/* BT and its like with a register: the bit may be anywhere, in units of the operand's size. */
static uint64_t bit_offset(const struct instruction *in, uint32_t size)
{
	const unsigned int number = (in->modrm >> 3 & 7) | in->rex_r;
	const unsigned int unused = 64 - 8 * size;
	const int64_t bit = (int64_t)(in->registers->gpr[number] << unused) >> unused;

	return (uint64_t)(bit >> (size == 8 ? 6 : size == 4 ? 5 : 4)) * size;
}

/*
 * ENTER size, level: pushes RBP, copies level - 1 frame pointers, pushes one more, and looks whether
 * the frame's end can be written.
 */
static void add_enter(struct instruction *in)
{
	const uint64_t rsp = in->registers->gpr[MV_RSP];
	const uint32_t level = in->immediate >> 16 & 31;
	const uint32_t pushed = 8 * (level + 1);

	add(in, rsp - pushed, pushed);
	if (level > 1)
		add(in, in->registers->gpr[MV_RBP] - 8ull * (level - 1), 8 * (level - 1));
	add(in, rsp - pushed - (in->immediate & 0xFFFF), 8);
}

static void add_accesses(struct instruction *in, const struct mv_rule *rule)
{
	const uint64_t *gpr = in->registers->gpr;
	const uint32_t size = mv_operand_len(rule->size, &in->prefixes);
	const uint32_t stack = in->prefixes.operand16 && !rule->stack8 ? 2 : 8;

	if (in->memory)
		add(in, linear(in, in->ea + (rule->kind == MV_BIT ? bit_offset(in, size) : 0)),
		    size);
	switch (rule->kind) {
	case MV_PLAIN:
	case MV_BIT:
		break;
	case MV_PUSH:
		add(in, gpr[MV_RSP] - stack, stack);
		break;
	case MV_POP:
		add(in, gpr[MV_RSP], stack);
		break;
	case MV_MOVE:
		add(in, linear(in, gpr[MV_RSI]), size);
		add(in, in->address32 ? (uint32_t)gpr[MV_RDI] : gpr[MV_RDI], size);
		break;
	case MV_STORE:
		add(in, in->address32 ? (uint32_t)gpr[MV_RDI] : gpr[MV_RDI], size);
		break;
	case MV_LOAD:
		add(in, linear(in, gpr[MV_RSI]), size);
		break;
	case MV_ABSOLUTE:
		add(in, linear(in, in->immediate), size);
		break;
	case MV_TRANSLATE:
		add(in, linear(in, gpr[MV_RBX] + (gpr[MV_RAX] & 0xFF)), 1);
		break;
	case MV_MASKED:
		add(in, linear(in, gpr[MV_RDI]), size);
		break;
	case MV_ENTER:
		add_enter(in);
		break;
	case MV_LEAVE:
		add(in, gpr[MV_RBP], stack);
		break;
	}
}

int mv_decode(const uint8_t *bytes, size_t len, const struct mv_registers *registers,
	      struct mv_access ret_accesses[MV_ACCESS_COUNT_MAX])
{
	struct instruction in = {
		.bytes = bytes,
		.len = len < MV_INSTRUCTION_LEN_MAX ? len : MV_INSTRUCTION_LEN_MAX,
		.registers = registers,
		.accesses = ret_accesses,
	};
	struct mv_rule rule;

	take_opcode(&in);
	if (!in.cut) {
		if (!mv_rule_find(in.map, in.opcode, &in.prefixes, &rule))
			return -ENOSYS;
		if (rule.modrm) {
			take_modrm(&in, rule.kind == MV_POP);
			if (!in.cut &&
			    !mv_rule_narrow(&rule, in.map, in.opcode, in.modrm, &in.prefixes))
				return -ENOSYS;
		}
		in.immediate =
			take(&in, mv_immediate_len(rule.immediate, &in.prefixes, in.address32));
	}
	if (in.cut)
		return len < MV_INSTRUCTION_LEN_MAX ? -EAGAIN : -ENOSYS;
	if (in.rip_relative)
		in.ea += registers->rip + in.at;
	add_accesses(&in, &rule);
	return (int)in.count;
}
