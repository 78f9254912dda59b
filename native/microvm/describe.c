/* SPDX-License-Identifier: Apache-2.0 */
/*
 * describe.c - see describe.h.
 *
 * Threads, Errors, Ownership, Units, Source: see describe.h.
 */
#include "describe.h"

#include <inttypes.h>
#include <unistd.h>

#include "accel.h"
#include "guest/platform.h"

static void add_slots(const struct mv_memory *memory, struct mv_text *text)
{
	mv_text_add(text, ",\"slots\":[");
	for (uint32_t i = 0; i < memory->slot_count; i++) {
		const struct mv_memory_slot *slot = &memory->slots[i];

		mv_text_add(text,
			    "%s{\"gpa\":%" PRIu64 ",\"size\":%" PRIu64 ",\"offset\":%" PRIu64
			    ",\"host_addr\":%" PRIuPTR "}",
			    i > 0 ? "," : "", slot->gpa, slot->size, slot->offset,
			    (uintptr_t)memory->base + slot->offset);
	}
	mv_text_add(text, "]");
}

static void add_faults(const struct mv_machine *machine, struct mv_text *text)
{
	const struct mv_faults *faults = machine->faults;

	mv_text_add(text, ",\"faults\":\"%s\"", mv_faults_state_name(mv_faults_state(machine)));
	if (!faults)
		return;
	mv_text_add(text, ",\"fault_backend\":\"%s\",\"fault_backend_reason\":",
		    gw_vmm_backend_name(mv_faults_backend(faults)));
	mv_text_add_string(text, mv_faults_reason(faults));
}

static void add_state(struct mv_machine *machine, struct mv_text *text)
{
	pthread_mutex_lock(&machine->lock);
	mv_text_add(text, ",\"state\":\"%s\"", mv_state_name(machine->state));
	if (machine->state == MV_FAILED) {
		mv_text_add(text, ",\"failure\":");
		mv_text_add_string(text, machine->failure);
	}
	pthread_mutex_unlock(&machine->lock);
}

void mv_describe(struct mv_machine *machine, const char *control_path, struct mv_text *text)
{
	const struct mv_memory *memory = &machine->memory;

	mv_text_add(text, ",\"vmm\":\"godwit-microvm\",\"protocol\":1,\"guest_abi\":%u",
		    GM_ABI_VERSION);
	mv_text_add(text, ",\"pid\":%d,\"accel\":\"%s\"", (int)getpid(), machine->accel->name);
	if (machine->accel_reason[0] != '\0') {
		mv_text_add(text, ",\"accel_reason\":");
		mv_text_add_string(text, machine->accel_reason);
	}
	mv_text_add(text, ",\"vcpu_count\":%u,\"memory_bytes\":%" PRIu64 ",\"page_size\":%" PRIu64,
		    machine->config.vcpu_count, memory->size, memory->page_size);
	mv_text_add(text, ",\"memory_fd\":%d", memory->fd);
	if (machine->config.memory.path) {
		mv_text_add(text, ",\"memory_file\":");
		mv_text_add_string(text, machine->config.memory.path);
	}
	add_slots(memory, text);
	add_faults(machine, text);
	mv_text_add(text, ",\"control\":");
	mv_text_add_string(text, control_path);
	add_state(machine, text);
}

static void add_number(struct mv_text *text, const char *name, uint64_t number)
{
	mv_text_add(text, ",\"%s\":%" PRIu64, name, number);
}

static void add_counter(struct mv_text *text, const char *name, const _Atomic uint64_t *counter)
{
	add_number(text, name, atomic_load_explicit(counter, memory_order_relaxed));
}

static void add_beat(struct mv_text *text, const char *name, const struct mv_beat *beat)
{
	mv_text_add(text, ",\"%s\":{\"number\":%" PRIu64 ",\"time_ns\":%" PRIu64 "}", name,
		    beat->number, beat->time_ns);
}

static uint64_t to_ns(const struct mv_machine *machine, uint64_t ticks)
{
	const uint64_t tick_count = gm_tick() - machine->made_tick;
	const uint64_t time_ns = mv_now_ns() - machine->made_ns;

	return tick_count > 0 ? (uint64_t)((double)ticks * (double)time_ns / (double)tick_count)
			      : 0;
}

static void add_touches(struct mv_text *text, const struct mv_vcpu *vcpu)
{
	const struct mv_machine *machine = vcpu->machine;
	struct gw_latency_summary summary;

	gw_histogram_summarise(&vcpu->touches.ticks, &summary);
	if (summary.sample_count == 0)
		return;
	mv_text_add(text, ",\"touches\":{\"count\":%" PRIu64, summary.sample_count);
	add_number(text, "span_ns", to_ns(machine, vcpu->touches.span_ticks));
	add_number(text, "p50_ns", to_ns(machine, summary.p50_ns));
	add_number(text, "p99_ns", to_ns(machine, summary.p99_ns));
	add_number(text, "p999_ns", to_ns(machine, summary.p999_ns));
	add_number(text, "max_ns", to_ns(machine, summary.max_ns));
	mv_text_add(text, "}");
}

static void add_vcpu(struct mv_text *text, const struct mv_vcpu *vcpu)
{
	const struct mv_told *told = &vcpu->told;
	const struct mv_vcpu_counters *counters = &vcpu->counters;

	mv_text_add(text, "%s{\"id\":%u", vcpu->id > 0 ? "," : "", vcpu->id);
	add_counter(text, "exits", &counters->exit_count);
	add_counter(text, "hypercalls", &counters->hypercall_count);
	add_counter(text, "interrupted", &counters->interrupted_count);
	add_counter(text, "faults", &counters->fault_count);
	add_counter(text, "spurious", &counters->spurious_count);
	add_counter(text, "blocked_ns", &counters->blocked_ns);
	add_counter(text, "idle_ns", &counters->idle_ns);
	add_number(text, "ops", told->op_count);
	add_number(text, "errors", told->error_count);
	add_number(text, "ticks", told->tick_count);
	add_number(text, "filled_pages", told->filled_page_count);
	add_beat(text, "first_beat", &told->first_beat);
	add_beat(text, "last_beat", &told->last_beat);
	add_number(text, "beat_gap_max_ns", told->beat_gap_max_ns);
	add_number(text, "beat_jumps", told->beat_jump_count);
	add_number(text, "sweep", told->sweep_number);
	add_touches(text, vcpu);
	mv_text_add(text, "}");
}

void mv_describe_stats(struct mv_machine *machine, struct mv_text *text)
{
	pthread_mutex_lock(&machine->lock);
	mv_text_add(text, ",\"faults\":\"%s\"", mv_faults_state_name(mv_faults_state(machine)));
	add_number(text, "pause_ns", machine->pause_ns);
	add_number(text, "lost_events", machine->events.lost_count);
	add_number(text, "time_ns", mv_now_ns());
	mv_text_add(text, ",\"vcpus\":[");
	for (uint32_t i = 0; i < machine->config.vcpu_count; i++)
		add_vcpu(text, &machine->vcpus[i]);
	mv_text_add(text, "]");
	pthread_mutex_unlock(&machine->lock);
	add_state(machine, text);
}

void mv_describe_sweep(struct mv_machine *machine, uint64_t number, struct mv_text *text)
{
	uint64_t pages = 0, errors = 0, ops = 0;

	pthread_mutex_lock(&machine->lock);
	for (uint32_t i = 0; i < machine->config.vcpu_count; i++) {
		pages += machine->vcpus[i].told.sweep_page_count;
		errors += machine->vcpus[i].told.sweep_error_count;
		ops += machine->vcpus[i].told.sweep_op_count;
	}
	pthread_mutex_unlock(&machine->lock);
	add_number(text, "sweep", number);
	add_number(text, "pages_verified", pages);
	add_number(text, "errors", errors);
	add_number(text, "ops", ops);
}
