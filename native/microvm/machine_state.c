/* SPDX-License-Identifier: Apache-2.0 */
/*
 * machine_state.c - a stopped machine into a state blob, and out of one.
 *
 * Threads, Errors, Ownership, Units, Source: see machine.h.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "accel.h"
#include "guest/layout.h"

#define RULE_COUNT (2u + MV_ACCEL_RULE_COUNT_MAX)

static void save_books(const struct mv_machine *machine, struct mv_blob_writer *writer)
{
	const struct mv_machine_book book = {.sweep_asked = machine->sweep_asked};

	mv_blob_add(writer, MV_SECTION_MACHINE, 0, &book, sizeof(book));
	for (uint32_t i = 0; i < machine->config.vcpu_count; i++) {
		const struct mv_told *told = &machine->vcpus[i].told;
		const struct mv_vcpu_book vcpu_book = {
			.beat_number = told->last_beat.number,
			.op_count = told->op_count,
			.error_count = told->error_count,
			.tick_count = told->tick_count,
			.sweep_number = told->sweep_number,
			.sweep_page_count = told->sweep_page_count,
			.sweep_error_count = told->sweep_error_count,
			.sweep_op_count = told->sweep_op_count,
		};

		mv_blob_add(writer, MV_SECTION_VCPU, i, &vcpu_book, sizeof(vcpu_book));
	}
}

int mv_machine_save(struct mv_machine *machine, uint8_t **ret_bytes, size_t *ret_len,
		    struct mv_error *error)
{
	const struct mv_blob_header identity = {
		.memory_bytes = machine->memory.size,
		.accel = (uint32_t)machine->accel->id,
		.vcpu_count = machine->config.vcpu_count,
		.guest_abi = GM_ABI_VERSION,
	};
	struct mv_blob_writer writer = {0};
	int rc;

	/* Every vCPU is parked and only this thread can resume it: the lock need not be held. */
	pthread_mutex_lock(&machine->lock);
	rc = machine->state == MV_PAUSED ? 0 : mv_machine_refuse(machine, "save", error);
	pthread_mutex_unlock(&machine->lock);
	if (rc < 0)
		return rc;
	save_books(machine, &writer);
	rc = machine->accel->save(machine, &writer, error);
	if (rc < 0) {
		free(writer.bytes);
		return rc;
	}
	rc = mv_blob_finish(&writer, &identity, ret_bytes, ret_len);
	return rc < 0 ? mv_refuse_errno(error, rc, "save") : 0;
}

static int check_identity(const struct mv_machine *machine, const struct mv_blob_header *header,
			  struct mv_error *error)
{
	if (header->accel != (uint32_t)machine->accel->id)
		return mv_refuse(error, -EBADMSG, "state of accelerator %u, this machine runs %s",
				 header->accel, machine->accel->name);
	if (header->guest_abi != GM_ABI_VERSION)
		return mv_refuse(error, -EBADMSG, "state of guest ABI %u, this program has %u",
				 header->guest_abi, GM_ABI_VERSION);
	if (header->memory_bytes != machine->memory.size)
		return mv_refuse(error, -EBADMSG, "state of %llu bytes of memory, this has %llu",
				 (unsigned long long)header->memory_bytes,
				 (unsigned long long)machine->memory.size);
	if (header->vcpu_count != machine->config.vcpu_count)
		return mv_refuse(error, -EBADMSG, "state of %u vCPUs, this machine has %u",
				 header->vcpu_count, machine->config.vcpu_count);
	return 0;
}

static int check_books(const struct mv_machine *machine, const struct mv_blob_reader *reader,
		       struct mv_error *error)
{
	static const uint64_t zeros[7];
	size_t len;
	const struct mv_machine_book *book = mv_blob_find(reader, MV_SECTION_MACHINE, 0, &len);

	if (book->sweep_asked > MV_SWEEP_MAX || memcmp(book->reserved, zeros, sizeof(zeros)) != 0)
		return mv_refuse(error, -EBADMSG, "the machine's section is not valid");
	for (uint32_t i = 0; i < machine->config.vcpu_count; i++) {
		const struct mv_vcpu_book *vcpu = mv_blob_find(reader, MV_SECTION_VCPU, i, &len);

		if (vcpu->sweep_number > book->sweep_asked)
			return mv_refuse(error, -EBADMSG, "vCPU %u finished a sweep too many", i);
	}
	return 0;
}

static int check_blob(const struct mv_machine *machine, const struct mv_blob_reader *reader,
		      struct mv_error *error)
{
	struct mv_blob_rule rules[RULE_COUNT] = {
		{MV_SECTION_MACHINE, 1, sizeof(struct mv_machine_book),
		 sizeof(struct mv_machine_book), 8},
		{MV_SECTION_VCPU, machine->config.vcpu_count, sizeof(struct mv_vcpu_book),
		 sizeof(struct mv_vcpu_book), 8},
	};
	int rc = check_identity(machine, &reader->header, error);

	if (rc == 0)
		rc = mv_blob_check(reader, rules, 2 + machine->accel->rules(machine, rules + 2),
				   error);
	if (rc == 0)
		rc = check_books(machine, reader, error);
	if (rc == 0)
		rc = machine->accel->check(machine, reader, error);
	return rc;
}

static void load_books(struct mv_machine *machine, const struct mv_blob_reader *reader)
{
	size_t len;
	const struct mv_machine_book *book = mv_blob_find(reader, MV_SECTION_MACHINE, 0, &len);

	machine->sweep_asked = book->sweep_asked;
	for (uint32_t i = 0; i < machine->config.vcpu_count; i++) {
		const struct mv_vcpu_book *vcpu = mv_blob_find(reader, MV_SECTION_VCPU, i, &len);

		machine->vcpus[i].told = (struct mv_told){
			.op_count = vcpu->op_count,
			.error_count = vcpu->error_count,
			.tick_count = vcpu->tick_count,
			.last_beat = {.number = vcpu->beat_number},
			.sweep_number = vcpu->sweep_number,
			.sweep_page_count = vcpu->sweep_page_count,
			.sweep_error_count = vcpu->sweep_error_count,
			.sweep_op_count = vcpu->sweep_op_count,
		};
	}
}

int mv_machine_load(struct mv_machine *machine, const uint8_t *bytes, size_t len,
		    struct mv_error *error)
{
	struct mv_blob_reader reader;
	int rc;

	pthread_mutex_lock(&machine->lock);
	rc = machine->state == MV_INCOMING ? 0 : mv_machine_refuse(machine, "load", error);
	pthread_mutex_unlock(&machine->lock);
	if (rc == 0)
		rc = mv_blob_open(bytes, len, &reader, error);
	if (rc == 0)
		rc = check_blob(machine, &reader, error);
	if (rc < 0)
		return rc;
	rc = machine->accel->load(machine, &reader, error);
	pthread_mutex_lock(&machine->lock);
	if (rc == 0) {
		load_books(machine, &reader);
		machine->state = MV_PAUSED;
	} else {
		/* Half a state is worse than none: this process will not run it, another may. */
		memcpy(machine->failure, error->text, sizeof(machine->failure));
		machine->state = MV_FAILED;
	}
	pthread_mutex_unlock(&machine->lock);
	return rc;
}
