/* SPDX-License-Identifier: Apache-2.0 */
/*
 * blob.h - the state of a paused machine without its memory, as bytes: written by save, read by a
 * loader that refuses everything it does not know.
 *
 * Threads: a writer or a reader belongs to one caller.
 * Errors: -errno, and words in struct mv_error. A writer that ran out of memory says so at its end.
 * Ownership: a writer owns its bytes until mv_blob_finish hands them over (free them); a reader
 *            borrows the bytes that it was given.
 * Units: bytes; every integer is little-endian.
 * Source: native/microvm/README.md, "The state blob".
 *
 *   header, 64 bytes   struct mv_blob_header; the CRC-32C is over the whole blob, its own field zero
 *   sections           struct mv_blob_section, then `len` bytes, then zeros up to a multiple of 8;
 *                      ascending by (type, index), so that none is there twice
 */
#ifndef MV_BLOB_H
#define MV_BLOB_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "error.h"

#define MV_BLOB_MAGIC	0x54534d764d77476full /* "oGwMvMST" */
#define MV_BLOB_VERSION 1u
#define MV_BLOB_LEN_MAX (16u << 20)

struct mv_blob_header {
	uint64_t magic;
	uint32_t version;
	uint32_t header_len; /* 64 */
	uint64_t total_len;
	uint64_t memory_bytes;
	uint32_t section_count;
	uint32_t accel; /* enum mv_accel */
	uint32_t vcpu_count;
	uint32_t guest_abi; /* GM_ABI_VERSION */
	uint32_t reserved[3];
	uint32_t crc32c;
};
_Static_assert(sizeof(struct mv_blob_header) == 64, "on the wire");

struct mv_blob_section {
	uint32_t type;	/* enum mv_section */
	uint32_t index; /* the vCPU's number, or the chip's; else 0 */
	uint64_t len;
};
_Static_assert(sizeof(struct mv_blob_section) == 16, "on the wire");

enum mv_section {
	MV_SECTION_MACHINE = 1, /* struct mv_machine_book */
	MV_SECTION_VCPU = 2,	/* struct mv_vcpu_book */
	/* --accel kvm: the kernel's own structs */
	MV_SECTION_KVM_IRQCHIP = 16, /* index 0 PIC, 1 second PIC, 2 IOAPIC */
	MV_SECTION_KVM_PIT2 = 17,
	MV_SECTION_KVM_CLOCK = 18,
	MV_SECTION_KVM_CPUID = 32, /* kvm_cpuid_entry2[] */
	MV_SECTION_KVM_TSC_KHZ = 33,
	MV_SECTION_KVM_SREGS2 = 34,
	MV_SECTION_KVM_XCRS = 35,
	MV_SECTION_KVM_XSAVE = 36,
	MV_SECTION_KVM_LAPIC = 37,
	MV_SECTION_KVM_MSRS = 38, /* kvm_msr_entry[] */
	MV_SECTION_KVM_DEBUGREGS = 39,
	MV_SECTION_KVM_REGS = 40,
	MV_SECTION_KVM_MP_STATE = 41,
	MV_SECTION_KVM_VCPU_EVENTS = 42,
	/* --accel thread */
	MV_SECTION_THREAD_CTX = 64, /* struct gm_ctx */
};

/* What a blob must hold, and nothing else: one row per type, ascending. */
struct mv_blob_rule {
	uint32_t type;
	uint32_t count;	  /* sections of this type; their indexes are 0..count-1 */
	uint32_t len_min; /* bytes of each */
	uint32_t len_max;
	uint32_t unit; /* len is a multiple of it */
};

struct mv_blob_writer {
	uint8_t *bytes;
	size_t len;
	size_t capacity;
	uint32_t section_count;
	bool failed; /* out of memory: sticky */
};

/* Sections must come in ascending order; `data` is copied. */
void mv_blob_add(struct mv_blob_writer *writer, enum mv_section type, uint32_t index,
		 const void *data, size_t len);

/*
 * Fills in the header from `identity` (memory_bytes, accel, vcpu_count, guest_abi), hands over the
 * bytes. Returns 0 or -ENOMEM; the writer is empty again either way.
 */
int mv_blob_finish(struct mv_blob_writer *writer, const struct mv_blob_header *identity,
		   uint8_t **ret_bytes, size_t *ret_len);

struct mv_blob_reader {
	const uint8_t *bytes;
	struct mv_blob_header header;
};

/* Everything that can be said without knowing the machine. Returns 0 or -EBADMSG. */
int mv_blob_open(const uint8_t *bytes, size_t len, struct mv_blob_reader *ret_reader,
		 struct mv_error *error);

/* Exactly the sections of `rules`. Returns 0 or -EBADMSG. */
int mv_blob_check(const struct mv_blob_reader *reader, const struct mv_blob_rule *rules,
		  size_t rule_count, struct mv_error *error);

/* One section's payload, in place and aligned to 8 if the blob is; NULL if there is none. */
const void *mv_blob_find(const struct mv_blob_reader *reader, enum mv_section type, uint32_t index,
			 size_t *ret_len);

#endif
