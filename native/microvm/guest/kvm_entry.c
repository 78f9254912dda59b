/* SPDX-License-Identifier: Apache-2.0 */
/*
 * kvm_entry.c - where a vCPU of KVM starts: ring 3, its number in rdi, its stack in rsp.
 *
 * Threads: one call per vCPU, on that vCPU.
 * Errors: none; it never returns.
 * Ownership: none.
 * Units: none.
 * Source: kvm_boot.c, which sets the registers; guest.ld, which puts this first.
 *
 * No `int`, `syscall` or `hlt` here or in anything called: PVM cannot run them in ring 3.
 */
#include "workload.h"

#include <stddef.h>

/* A freestanding compiler may call these where it copies or clears a struct. */
void *memset(void *to, int value, size_t len);
void *memcpy(void *restrict to, const void *restrict from, size_t len);

void *memset(void *to, int value, size_t len)
{
	unsigned char *bytes = to;

	for (size_t i = 0; i < len; i++)
		bytes[i] = (unsigned char)value;
	return to;
}

void *memcpy(void *restrict to, const void *restrict from, size_t len)
{
	unsigned char *bytes = to;
	const unsigned char *source = from;

	for (size_t i = 0; i < len; i++)
		bytes[i] = source[i];
	return to;
}

_Noreturn void gm_entry(uint64_t id);

__attribute__((section(".text.entry"))) _Noreturn void gm_entry(uint64_t id)
{
	struct gm_vcpu vcpu;

	gm_vcpu_init(&vcpu, id);
	for (;;)
		gm_vcpu_step(&vcpu);
}
