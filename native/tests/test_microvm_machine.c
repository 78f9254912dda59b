/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_microvm_machine.c - a machine can be stopped anywhere, saved, loaded into another one and go
 * on there as if nothing had been; what cannot be is refused and changes nothing.
 */
#include "test_microvm.h"

#include <fcntl.h>
#include <godwit/crc32c.h>
#include <sys/stat.h>

#define SWEEPS_MAX 1000

/* Moves the guest; the source is gone after that. */
static struct mv_machine *move(struct mv_machine *source)
{
	struct mv_machine *destination = incoming_for(source);
	size_t len;
	uint8_t *bytes = save_machine(source, &len);

	copy_memory(&source->memory, &destination->memory);
	load_machine(destination, bytes, len);
	for (uint32_t i = 0; i < source->config.vcpu_count; i++)
		CHECK_EQ(destination->vcpus[i].told.last_beat.number,
			 source->vcpus[i].told.last_beat.number);
	free(bytes);
	mv_machine_destroy(source);
	return destination;
}

static struct mv_machine *filled_machine(enum mv_accel accel, uint32_t vcpu_count)
{
	const struct mv_machine_config config = test_config(accel, vcpu_count);
	struct mv_machine *machine = test_machine(&config);
	struct watch watch = {0};

	CHECK_EQ(machine->accel->id, accel);
	await_filled(machine, &watch);
	CHECK_EQ(watch.guest_errors + watch.failed + watch.others, 0);
	return machine;
}

/* --- moves -------------------------------------------------------------------------------------- */

static bool all_worked(struct mv_machine *machine)
{
	bool worked = true;

	pthread_mutex_lock(&machine->lock);
	for (uint32_t i = 0; i < machine->config.vcpu_count; i++)
		worked = worked && machine->vcpus[i].told.op_count > 0;
	pthread_mutex_unlock(&machine->lock);
	return worked;
}

/* Stopped while it fills, while it runs and in the middle of sweeps. */
static void moves_in_a_row(enum mv_accel accel, uint32_t vcpu_count)
{
	const struct mv_machine_config config = test_config(accel, vcpu_count);
	struct mv_machine *machine = test_machine(&config);
	struct watch watch = {0};

	fprintf(stderr, "  %s, %u vCPUs\n", machine->accel->name, vcpu_count);
	pause_machine(machine);
	watch_events(machine, &watch); /* on a busy host it may have filled its pages by now */
	machine = move(machine);
	resume_machine(machine);
	await_filled(machine, &watch);
	for (int i = 0; i < 4; i++) {
		const uint64_t number = ask_sweep(machine);

		pause_machine(machine);
		machine = move(machine);
		resume_machine(machine);
		CHECK_EQ(await_sweep(machine, number), 0);
		pause_machine(machine);
		for (uint32_t v = 0; v < vcpu_count; v++) {
			const struct mv_told *told = &machine->vcpus[v].told;

			CHECK(told->first_beat.number > 0);
			CHECK(told->last_beat.number >= told->first_beat.number);
			CHECK(told->tick_count >= told->last_beat.number);
		}
		resume_machine(machine);
	}
	/* Between sweeps it works; a vCPU that gets no processor may miss one. */
	for (int i = 0; i < SWEEPS_MAX && !all_worked(machine); i++)
		CHECK_EQ(sweep(machine), 0);
	CHECK(all_worked(machine));
	mv_machine_destroy(machine);
}

/* Heartbeats: the first at the destination is the successor of the last at the source. */
static void beats_go_up_by_one(enum mv_accel accel, uint32_t vcpu_count)
{
	struct mv_machine *machine = filled_machine(accel, vcpu_count);
	uint64_t last[GM_VCPU_COUNT_MAX];

	CHECK_EQ(sweep(machine), 0);
	pause_machine(machine);
	for (uint32_t i = 0; i < vcpu_count; i++)
		last[i] = machine->vcpus[i].told.last_beat.number;
	machine = move(machine);
	resume_machine(machine);
	CHECK_EQ(sweep(machine), 0);
	pause_machine(machine);
	for (uint32_t i = 0; i < vcpu_count; i++)
		CHECK_EQ(machine->vcpus[i].told.first_beat.number, last[i] + 1);
	mv_machine_destroy(machine);
}

/* Two VMMs write to one file: of each vCPU every number is there once, and the times ascend. */
static void every_beat_is_logged(enum mv_accel accel, uint32_t vcpu_count)
{
	char path[] = "/tmp/godwit-beats-XXXXXX";
	struct mv_machine_config config = test_config(accel, vcpu_count);
	struct mv_logged_beat beat, last[GM_VCPU_COUNT_MAX] = {0};
	struct mv_machine *machine;
	const int fd = mkstemp(path);

	CHECK(fd >= 0);
	config.beat_log = path;
	machine = test_machine(&config);
	CHECK_EQ(sweep(machine), 0);
	pause_machine(machine);
	machine = move(machine);
	resume_machine(machine);
	CHECK_EQ(sweep(machine), 0);
	pause_machine(machine);
	while (read(fd, &beat, sizeof(beat)) == sizeof(beat)) {
		CHECK(beat.vcpu < vcpu_count);
		CHECK_EQ(beat.number, last[beat.vcpu].number + 1);
		CHECK(beat.time_ns > last[beat.vcpu].time_ns);
		CHECK_EQ(beat.pid, (uint32_t)getpid());
		last[beat.vcpu] = beat;
	}
	for (uint32_t i = 0; i < vcpu_count; i++)
		CHECK_EQ(last[i].number, machine->vcpus[i].told.last_beat.number);
	mv_machine_destroy(machine);
	close(fd);
	unlink(path);
}

static void an_ended_guest_stays_ended(enum mv_accel accel, uint32_t vcpu_count)
{
	struct mv_machine *machine = filled_machine(accel, vcpu_count);
	char line[MV_EVENT_LEN_MAX];
	struct mv_error error;
	uint8_t *bytes;
	size_t len;

	pause_machine(machine);
	CHECK_EQ(mv_machine_power_off(machine, &error), -EBUSY);
	resume_machine(machine);
	CHECK_EQ(mv_machine_power_off(machine, &error), 0);
	while (!mv_machine_take_event(machine, line))
		await_notice(machine);
	CHECK(strstr(line, "\"event\":\"ended\""));
	CHECK_EQ(mv_machine_power_off(machine, &error), 0);
	CHECK_EQ(mv_machine_resume(machine, &error), -EBUSY);
	CHECK_EQ(mv_machine_pause(machine, PAUSE_NS, &error), -EBUSY);
	CHECK_EQ(mv_machine_save(machine, &bytes, &len, &error), -EBUSY);
	CHECK(strstr(error.text, "the machine is ended"));
	mv_machine_destroy(machine);
}

static void a_saved_machine_may_go_on(enum mv_accel accel, uint32_t vcpu_count)
{
	struct mv_machine *machine = filled_machine(accel, vcpu_count);

	for (int i = 0; i < 10; i++) {
		size_t len;

		pause_machine(machine);
		free(save_machine(machine, &len));
		resume_machine(machine);
	}
	CHECK_EQ(sweep(machine), 0);
	mv_machine_destroy(machine);
}

static void stopped_and_started_a_thousand_times(enum mv_accel accel, uint32_t vcpu_count)
{
	struct mv_machine *machine = filled_machine(accel, vcpu_count);
	const uint64_t number = ask_sweep(machine);

	for (int i = 0; i < 1000; i++) {
		pause_machine(machine);
		pthread_mutex_lock(&machine->lock);
		CHECK_EQ(machine->parked_count, vcpu_count);
		pthread_mutex_unlock(&machine->lock);
		resume_machine(machine);
	}
	CHECK_EQ(await_sweep(machine, number), 0);
	CHECK_EQ(sweep(machine), 0);
	mv_machine_destroy(machine);
}

/* The test of the tests: one bit of one page. */
static void damage_on_the_way_is_found(enum mv_accel accel, uint32_t vcpu_count)
{
	struct mv_machine *machine = filled_machine(accel, vcpu_count);

	pause_machine(machine);
	machine = move(machine);
	machine->memory.base[GM_WORK_OFFSET + 11 * GM_PAGE_SIZE + 4000] ^= 4;
	resume_machine(machine);
	CHECK(sweep(machine) > 0);
	mv_machine_destroy(machine);
}

/* --- refusals ----------------------------------------------------------------------------------- */

static void the_wrong_state_is_refused(enum mv_accel accel, uint32_t vcpu_count)
{
	struct mv_machine *machine = filled_machine(accel, vcpu_count);
	struct mv_machine *incoming = incoming_for(machine);
	struct mv_error error;
	uint8_t *bytes, *other;
	uint64_t number;
	size_t len;

	CHECK_EQ(mv_machine_save(machine, &bytes, &len, &error), -EBUSY);
	CHECK_EQ(mv_machine_resume(machine, &error), 0);
	pause_machine(machine);
	CHECK_EQ(mv_machine_pause(machine, PAUSE_NS, &error), 0);
	CHECK_EQ(mv_machine_ask_sweep(machine, &number, &error), -EBUSY);
	bytes = save_machine(machine, &len);
	CHECK_EQ(mv_machine_load(machine, bytes, len, &error), -EBUSY);
	CHECK_EQ(mv_machine_pause(incoming, PAUSE_NS, &error), -EBUSY);
	CHECK_EQ(mv_machine_resume(incoming, &error), -EBUSY);
	CHECK_EQ(mv_machine_save(incoming, &other, &len, &error), -EBUSY);
	resume_machine(machine);
	CHECK_EQ(mv_machine_load(machine, bytes, len, &error), -EBUSY);
	CHECK_EQ(sweep(machine), 0);
	free(bytes);
	mv_machine_destroy(machine);
	mv_machine_destroy(incoming);
}

static void refuses_blob(const struct mv_machine_config *config, const uint8_t *bytes, size_t len,
			 const char *why)
{
	struct mv_machine *machine = test_machine(config);
	struct mv_error error;

	CHECK_EQ(mv_machine_load(machine, bytes, len, &error), -EBADMSG);
	if (!strstr(error.text, why))
		fprintf(stderr, "said: %s\n", error.text);
	CHECK(strstr(error.text, why));
	CHECK_EQ(machine->state, MV_INCOMING);
	mv_machine_destroy(machine);
}

static void a_state_for_another_machine_is_refused(enum mv_accel accel, uint32_t vcpu_count)
{
	struct mv_machine *machine = filled_machine(accel, vcpu_count);
	struct mv_machine_config config = machine->config;
	size_t len;
	uint8_t *bytes;

	pause_machine(machine);
	bytes = save_machine(machine, &len);
	config.memory.incoming = true;
	config.vcpu_count++;
	refuses_blob(&config, bytes, len, "vCPUs");
	config.vcpu_count--;
	config.memory.size += GM_HUGE_PAGE_SIZE;
	refuses_blob(&config, bytes, len, "memory");
	config.memory.size -= GM_HUGE_PAGE_SIZE;
	if (accel == MV_ACCEL_KVM) {
		config.accel = MV_ACCEL_THREAD;
		refuses_blob(&config, bytes, len, "accelerator");
		config.accel = accel;
	}
	refuses_blob(&config, bytes, len - 1, "came");
	bytes[len / 2] ^= 1;
	refuses_blob(&config, bytes, len, "CRC");
	free(bytes);
	mv_machine_destroy(machine);
}

/* A blob with a right CRC and a wrong word in one of its sections. */
static void seal(uint8_t *bytes, size_t len)
{
	const size_t at = offsetof(struct mv_blob_header, crc32c);
	uint32_t crc;

	memset(bytes + at, 0, sizeof(crc));
	crc = gw_crc32c(0, bytes, len);
	memcpy(bytes + at, &crc, sizeof(crc));
}

static void changed_section(const struct mv_machine *machine, enum mv_section type, size_t offset,
			    uint32_t value, const uint8_t *good, size_t len, const char *why)
{
	struct mv_machine_config config = machine->config;
	struct mv_blob_reader reader;
	struct mv_error error;
	size_t section_len;
	uint8_t *bytes = malloc(len);
	const uint8_t *section;

	CHECK(bytes);
	memcpy(bytes, good, len);
	CHECK_EQ(mv_blob_open(bytes, len, &reader, &error), 0);
	section = mv_blob_find(&reader, type, 0, &section_len);
	CHECK(section && offset + sizeof(value) <= section_len);
	memcpy(bytes + (section - bytes) + offset, &value, sizeof(value));
	seal(bytes, len);
	config.accel = machine->accel->id;
	config.memory.incoming = true;
	refuses_blob(&config, bytes, len, why);
	free(bytes);
}

static void senseless_content_is_refused(enum mv_accel accel, uint32_t vcpu_count)
{
	struct mv_machine *machine = filled_machine(accel, vcpu_count);
	size_t len;
	uint8_t *bytes;

	pause_machine(machine);
	bytes = save_machine(machine, &len);
	changed_section(machine, MV_SECTION_MACHINE, 4, 1, bytes, len, "not valid");
	changed_section(machine, MV_SECTION_MACHINE, 60, 1, bytes, len, "not valid");
	changed_section(machine, MV_SECTION_VCPU, 36, 1, bytes, len, "sweep");
	if (accel == MV_ACCEL_THREAD) {
		changed_section(machine, MV_SECTION_THREAD_CTX, 0, 9, bytes, len, "context");
		changed_section(machine, MV_SECTION_THREAD_CTX, 8, 99, bytes, len, "context");
	} else {
		/* CPUID leaf 0: the vendor. MSR 0: an index that nobody has. A chip's own number. */
		changed_section(machine, MV_SECTION_KVM_CPUID, 16, 1, bytes, len, "vendor");
		changed_section(machine, MV_SECTION_KVM_MSRS, 0, 0x12345678, bytes, len,
				"no MSR 0x12345678");
		changed_section(machine, MV_SECTION_KVM_IRQCHIP, 0, 2, bytes, len, "chip 0");
		changed_section(machine, MV_SECTION_KVM_TSC_KHZ, 4, 1, bytes, len, "TSC");
	}
	free(bytes);
	mv_machine_destroy(machine);
}

/* --- memory -------------------------------------------------------------------------------------- */

static uint64_t resident_bytes(const struct mv_machine *machine)
{
	struct stat status;

	CHECK_EQ(fstat(machine->memory.fd, &status), 0);
	return (uint64_t)status.st_blocks * 512;
}

/* A page that the VMM touched would be taken for the guest's (DESIGN 3.2). */
static void an_incoming_machine_touches_no_memory(enum mv_accel accel, uint32_t vcpu_count)
{
	struct mv_machine *machine = filled_machine(accel, vcpu_count);
	struct mv_machine *incoming = incoming_for(machine);
	size_t len;
	uint8_t *bytes;

	CHECK(resident_bytes(machine) >= WORK_BYTES);
	CHECK(resident_bytes(machine) < 2 * WORK_BYTES);
	CHECK_EQ(resident_bytes(incoming), 0);
	pause_machine(machine);
	bytes = save_machine(machine, &len);
	load_machine(incoming, bytes, len);
	CHECK_EQ(resident_bytes(incoming), 0);
	mv_machine_destroy(incoming);
	free(bytes);
	mv_machine_destroy(machine);
}

static void a_memory_file_has_one_owner(enum mv_accel accel, uint32_t vcpu_count)
{
	struct mv_machine_config config = test_config(accel, vcpu_count);
	char path[] = "/dev/shm/godwit-test-microvm-XXXXXX";
	struct mv_machine *machine, *second;
	struct mv_error error;
	const int fd = mkstemp(path);

	CHECK(fd >= 0);
	config.memory.path = path;
	config.paused = true;
	machine = test_machine(&config);
	CHECK_EQ(mv_machine_create(&config, &second, &error), -EBUSY);
	config.memory.incoming = true;
	CHECK_EQ(mv_machine_create(&config, &second, &error), -EBUSY);
	mv_machine_destroy(machine);
	config.memory.incoming = false;
	CHECK_EQ(mv_machine_create(&config, &second, &error), -EEXIST);
	config.memory.incoming = true;
	config.memory.size *= 2;
	CHECK_EQ(mv_machine_create(&config, &second, &error), -EEXIST);
	config.memory.size /= 2;
	mv_machine_destroy(test_machine(&config));
	config.memory.huge = true;
	CHECK_EQ(mv_machine_create(&config, &second, &error), -EINVAL);
	CHECK(strstr(error.text, "hugetlbfs"));
	close(fd);
	unlink(path);
}

static void what_cannot_be_is_refused(void)
{
	static const struct {
		size_t offset;
		uint64_t value;
		size_t len;
		const char *why;
	} cases[] = {
#define CASE(field, value, why)                            \
	{offsetof(struct mv_machine_config, field), value, \
	 sizeof(((struct mv_machine_config *)0)->field), why}
		CASE(vcpu_count, 0, "vCPUs"),
		CASE(vcpu_count, GM_VCPU_COUNT_MAX + 1, "vCPUs"),
		CASE(workload, 0, "workload"),
		CASE(workload, GM_WORKLOAD_MEASURE + 1, "workload"),
		CASE(tick_us, 199, "tick"),
		CASE(tick_us, 1000001, "tick"),
		CASE(memory.size, 62ull << 20, "64 MiB"),
		CASE(memory.size, 256ull << 30, "254 GiB"),
		CASE(memory.size, (64ull << 20) + 4096, "2 MiB"),
		CASE(work_bytes, MEMORY_BYTES, "does not fit"),
		CASE(work_bytes, 4096, "4 pages"),
		CASE(work_offset, 4096, "begins"),
		CASE(work_offset, GM_WORK_OFFSET + 1, "begins"),
		CASE(work_offset, MEMORY_BYTES + 4096, "begins"),
		CASE(work_offset, MEMORY_BYTES - 4096, "does not fit"),
	};

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct mv_machine_config config = test_config(MV_ACCEL_THREAD, 2);
		struct mv_machine *machine;
		struct mv_error error;

		memcpy((uint8_t *)&config + cases[i].offset, &cases[i].value, cases[i].len);
		CHECK_EQ(mv_machine_create(&config, &machine, &error), -EINVAL);
		CHECK(strstr(error.text, cases[i].why));
	}
}

/* Above 3 GiB memory goes on at 4 GiB; the file has no hole there, and the workload sits astride. */
static void a_large_machine_uses_both_sides_of_the_hole(enum mv_accel accel, uint32_t vcpu_count)
{
	struct mv_machine_config config = test_config(accel, vcpu_count);
	struct mv_machine *machine;
	struct watch watch = {0};

	config.memory.size = 5ull << 30;
	config.work_offset = GM_HOLE_START - WORK_BYTES / 2;
	machine = test_machine(&config);
	CHECK_EQ(machine->memory.slot_count, 3);
	CHECK_EQ(machine->memory.slots[2].gpa, 4ull << 30);
	CHECK_EQ(machine->memory.slots[2].offset, 3ull << 30);
	await_filled(machine, &watch);
	pause_machine(machine);
	machine = move(machine);
	resume_machine(machine);
	CHECK_EQ(sweep(machine), 0);
	mv_machine_destroy(machine);
}

static void all_large(void)
{
	on_every_accel(a_large_machine_uses_both_sides_of_the_hole);
}
static void all_moves(void)
{
	on_every_accel(moves_in_a_row);
}
static void all_beats(void)
{
	on_every_accel(beats_go_up_by_one);
}
static void all_logs(void)
{
	on_every_accel(every_beat_is_logged);
}
static void all_ends(void)
{
	on_every_accel(an_ended_guest_stays_ended);
}
static void all_rollbacks(void)
{
	on_every_accel(a_saved_machine_may_go_on);
}
static void all_stops(void)
{
	on_every_accel(stopped_and_started_a_thousand_times);
}
static void all_damage(void)
{
	on_every_accel(damage_on_the_way_is_found);
}
static void all_states(void)
{
	on_every_accel(the_wrong_state_is_refused);
}
static void all_others(void)
{
	on_every_accel(a_state_for_another_machine_is_refused);
}
static void all_senseless(void)
{
	on_every_accel(senseless_content_is_refused);
}
static void all_untouched(void)
{
	on_every_accel(an_incoming_machine_touches_no_memory);
}
static void all_owners(void)
{
	on_every_accel(a_memory_file_has_one_owner);
}

int main(void)
{
	RUN(what_cannot_be_is_refused);
	RUN(all_owners);
	RUN(all_large);
	RUN(all_untouched);
	RUN(all_states);
	RUN(all_others);
	RUN(all_senseless);
	RUN(all_moves);
	RUN(all_beats);
	RUN(all_logs);
	RUN(all_ends);
	RUN(all_rollbacks);
	RUN(all_stops);
	RUN(all_damage);
	return EXIT_SUCCESS;
}
