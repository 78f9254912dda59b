/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_microvm_workload.c - the guest's checks are worth something: whatever page is damaged, stale,
 * swapped or lost, whatever counter or register loses a beat, a sweep finds it; and without damage
 * it finds nothing, wherever the guest was stopped and copied.
 */
#include "check.h"
#include "guest/measure.h"

#define VCPU_COUNT 2u
#define PAGE_COUNT 20u
#define SHARED	   5u
#define RAM_LEN	   (GM_WORK_OFFSET + PAGE_COUNT * GM_PAGE_SIZE)
#define TICK_STEPS 3u
#define KIND_COUNT 10u
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define WORD_STEP 7u /* the plain variant takes every word, these are ten times slower */
#else
#define WORD_STEP 1u
#endif
#define STEPS_MAX 100000u

struct world {
	uint8_t *ram;
	struct gm_vcpu vcpus[VCPU_COUNT];
	uint64_t steps[VCPU_COUNT];
	uint64_t asked;
	uint64_t swept[VCPU_COUNT];
	uint64_t swept_pages;
	uint64_t swept_errors;
	uint64_t filled_pages;
	uint64_t kinds[KIND_COUNT]; /* errors reported, by enum gm_error */
	uint64_t beats[VCPU_COUNT];
	uint64_t touch_count;
};

static uint32_t hypercall(struct gm_vcpu *vcpu, uint32_t call, const uint64_t args[4])
{
	struct world *world = vcpu->owner;
	const uint64_t id = vcpu->ctx.id;

	switch (call) {
	case GM_CALL_BEAT:
		CHECK_EQ(args[0], world->beats[id] + 1);
		world->beats[id] = args[0];
		return (uint32_t)world->asked;
	case GM_CALL_ERROR:
		CHECK(args[0] < KIND_COUNT);
		world->kinds[args[0]]++;
		return 0;
	case GM_CALL_FILLED:
		world->filled_pages += args[0];
		return 0;
	case GM_CALL_VERIFIED:
		world->swept[id] = args[0];
		world->swept_pages += args[1];
		world->swept_errors += args[2];
		return 0;
	case GM_CALL_MEASURED:
		CHECK(args[2] < args[3]);
		CHECK(args[0] > 0);
		world->touch_count += args[1];
		return 0;
	default:
		CHECK_EQ(call, GM_CALL_IDLE);
		return 0;
	}
}

/* Time is steps: a test that is repeated sees the same. */
static void update_ticks(struct gm_vcpu *vcpu)
{
	struct world *world = vcpu->owner;

	vcpu->ctx.tick_count = ++world->steps[vcpu->ctx.id] / TICK_STEPS;
}

static struct gm_page *page_of(const struct world *world, uint64_t page)
{
	return (struct gm_page *)(world->ram + GM_WORK_OFFSET + page * GM_PAGE_SIZE);
}

static struct gm_control *control_of(const struct world *world)
{
	return (struct gm_control *)(world->ram + GM_CONTROL_GPA);
}

static void adopt(struct world *world)
{
	for (uint32_t i = 0; i < VCPU_COUNT; i++) {
		world->vcpus[i].ram = world->ram;
		world->vcpus[i].hypercall = hypercall;
		world->vcpus[i].update_ticks = update_ticks;
		world->vcpus[i].owner = world;
	}
}

static struct world *create(uint32_t workload, uint64_t op_count_per_tick)
{
	struct world *world = calloc(1, sizeof(*world));

	CHECK(world);
	world->ram = calloc(1, RAM_LEN);
	CHECK(world->ram);
	*(struct gm_boot *)(world->ram + GM_BOOT_GPA) = (struct gm_boot){
		.magic = GM_BOOT_MAGIC,
		.abi_version = GM_ABI_VERSION,
		.vcpu_count = VCPU_COUNT,
		.workload = workload,
		.tick_us = 1000,
		.memory_bytes = RAM_LEN,
		.work_offset = GM_WORK_OFFSET,
		.work_page_count = PAGE_COUNT,
		.shared_page_count = SHARED,
		.op_count_per_tick = op_count_per_tick,
		.seed = 42,
	};
	adopt(world);
	for (uint32_t i = 0; i < VCPU_COUNT; i++)
		gm_vcpu_init(&world->vcpus[i], i);
	return world;
}

/* Another host: other memory, the same content. */
static struct world *copy_of(const struct world *from)
{
	struct world *world = malloc(sizeof(*world));

	CHECK(world);
	*world = *from;
	world->ram = malloc(RAM_LEN);
	CHECK(world->ram);
	memcpy(world->ram, from->ram, RAM_LEN);
	adopt(world);
	return world;
}

/* Back to how `saved` is: only what a guest changes is copied. */
static void restore(struct world *world, const struct world *saved)
{
	uint8_t *ram = world->ram;

	*world = *saved;
	world->ram = ram;
	memcpy(ram + GM_BOOT_GPA, saved->ram + GM_BOOT_GPA, GM_PAGE_SIZE);
	memcpy(ram + GM_CONTROL_GPA, saved->ram + GM_CONTROL_GPA, GM_PAGE_SIZE);
	memcpy(ram + GM_WORK_OFFSET, saved->ram + GM_WORK_OFFSET, RAM_LEN - GM_WORK_OFFSET);
	adopt(world);
}

static void destroy(struct world *world)
{
	free(world->ram);
	free(world);
}

static void steps(struct world *world, uint64_t count)
{
	for (uint64_t i = 0; i < count; i++)
		for (uint32_t id = 0; id < VCPU_COUNT; id++)
			gm_vcpu_step(&world->vcpus[id]);
}

static void run_until_filled(struct world *world)
{
	for (uint32_t i = 0; i < STEPS_MAX && world->filled_pages < PAGE_COUNT; i++)
		steps(world, 1);
	CHECK_EQ(world->filled_pages, PAGE_COUNT);
}

/* A whole sweep; returns the errors that it and the touches before it found. */
static uint64_t sweep(struct world *world)
{
	uint64_t errors = 0;

	world->asked++;
	world->swept_pages = 0;
	for (uint32_t i = 0; i < STEPS_MAX; i++) {
		steps(world, 1);
		if (world->swept[0] == world->asked && world->swept[1] == world->asked)
			break;
	}
	CHECK_EQ(world->swept[0], world->asked);
	CHECK_EQ(world->swept[1], world->asked);
	CHECK_EQ(world->swept_pages, PAGE_COUNT);
	for (uint32_t id = 0; id < VCPU_COUNT; id++)
		errors += world->vcpus[id].ctx.error_count;
	return errors;
}

static struct world *running(void)
{
	struct world *world = create(GM_WORKLOAD_VERIFY, 0);

	run_until_filled(world);
	steps(world, 500);
	CHECK_EQ(sweep(world), 0);
	return world;
}

static void an_undamaged_guest_finds_nothing(void)
{
	struct world *world = running();

	for (int i = 0; i < 5; i++) {
		steps(world, 200);
		CHECK_EQ(sweep(world), 0);
	}
	CHECK(control_of(world)->op_total > 10000);
	CHECK_EQ(world->swept_errors, 0);
	destroy(world);
}

static void every_word_of_every_page_counts(void)
{
	struct world *saved = running();
	struct world *world = copy_of(saved);

	for (uint64_t page = 0; page < PAGE_COUNT; page++) {
		for (uint64_t word = page % WORD_STEP; word < GM_PAGE_SIZE / 8; word += WORD_STEP) {
			uint64_t *words = (uint64_t *)page_of(world, page);

			words[word] ^= 1ull << word % 64;
			CHECK(sweep(world) > 0);
			restore(world, saved);
		}
	}
	destroy(world);
	destroy(saved);
}

/* Nothing in such a page is wrong by itself: only what the vCPUs remember gives it away. */
static void a_page_that_went_back_in_time_is_found(void)
{
	struct world *saved = running();
	struct world *later = copy_of(saved);
	struct world *world;

	steps(later, 1000);
	CHECK_EQ(sweep(later), 0);
	world = copy_of(later);
	for (uint64_t page = 0; page < PAGE_COUNT; page++) {
		CHECK(memcmp(page_of(world, page), page_of(saved, page), GM_PAGE_SIZE) != 0);
		memcpy(page_of(world, page), page_of(saved, page), GM_PAGE_SIZE);
		CHECK(sweep(world) > 0);
		CHECK(world->kinds[GM_ERROR_COUNT] + world->kinds[GM_ERROR_SUM] > 0);
		restore(world, later);
	}
	destroy(world);
	destroy(later);
	destroy(saved);
}

static void a_zero_page_and_a_swapped_page_are_found(void)
{
	struct world *saved = running();
	struct world *world = copy_of(saved);

	for (uint64_t page = 0; page < PAGE_COUNT; page++) {
		memset(page_of(world, page), 0, GM_PAGE_SIZE);
		CHECK(sweep(world) > 0);
		CHECK(world->kinds[GM_ERROR_TAG] > 0);
		restore(world, saved);
		memcpy(page_of(world, page), page_of(saved, (page + 1) % PAGE_COUNT), GM_PAGE_SIZE);
		CHECK(sweep(world) > 0);
		CHECK(world->kinds[GM_ERROR_TAG] > 0);
		restore(world, saved);
	}
	destroy(world);
	destroy(saved);
}

static void lost_counts_are_found(void)
{
	struct world *saved = running();
	struct world *world = copy_of(saved);

	control_of(world)->op_total--;
	CHECK(sweep(world) > 0);
	CHECK_EQ(world->kinds[GM_ERROR_OP_TOTAL], 1);
	restore(world, saved);
	page_of(world, 0)->locked--;
	CHECK(sweep(world) > 0);
	CHECK_EQ(world->kinds[GM_ERROR_LOCKED], 1);
	restore(world, saved);
	world->vcpus[1].ctx.register_sum = 0;
	CHECK_EQ(sweep(world), 1);
	CHECK_EQ(world->kinds[GM_ERROR_REGISTER], 1);
	destroy(world);
	destroy(saved);
}

static void a_lost_boot_page_is_said_and_survived(void)
{
	struct world *world = running();

	memset(world->ram + GM_BOOT_GPA, 0, GM_PAGE_SIZE);
	steps(world, 100);
	CHECK(world->kinds[GM_ERROR_BOOT] > 0);
	destroy(world);
}

/* Stopped between any two steps, from the first page filled to the middle of a sweep, and moved. */
static void a_guest_moves_at_any_step(void)
{
	struct world *world = create(GM_WORKLOAD_VERIFY, 0);

	for (uint32_t move = 0; move < 400; move++) {
		struct world *moved;

		if (move % 10 == 5 && world->filled_pages == PAGE_COUNT &&
		    world->swept[0] == world->asked && world->swept[1] == world->asked)
			world->asked++;
		gm_vcpu_step(&world->vcpus[move % VCPU_COUNT]);
		steps(world, move % 7);
		moved = copy_of(world);
		memset(world->ram + GM_WORK_OFFSET, 0xDB, RAM_LEN - GM_WORK_OFFSET);
		destroy(world);
		world = moved;
	}
	CHECK(world->asked > 3);
	steps(world, 1000);
	CHECK_EQ(sweep(world), 0);
	CHECK(world->beats[0] > 100);
	destroy(world);
}

static void sequential_goes_round(void)
{
	struct world *world = create(GM_WORKLOAD_SEQUENTIAL, 0);
	const struct gm_boot *boot = (const struct gm_boot *)(world->ram + GM_BOOT_GPA);
	uint64_t first;

	run_until_filled(world);
	while (world->vcpus[1].ctx.op_count < 80)
		steps(world, 1);
	for (uint32_t id = 0; id < VCPU_COUNT; id++) {
		const uint64_t own = gm_own_pages(boot, id, &first);
		const uint64_t ops = world->vcpus[id].ctx.op_count;

		for (uint64_t i = 0; i < own; i++)
			CHECK_EQ(page_of(world, first + i)->locked, ops / own + (i < ops % own));
	}
	CHECK_EQ(sweep(world), 0);
	destroy(world);
}

static void hot_is_hot_and_idle_is_idle(void)
{
	struct world *hot = create(GM_WORKLOAD_HOT, 0);
	struct world *idle = create(GM_WORKLOAD_IDLE, 0);
	uint64_t first;

	run_until_filled(hot);
	steps(hot, 1000);
	(void)gm_own_pages((const struct gm_boot *)(hot->ram + GM_BOOT_GPA), 0, &first);
	CHECK(page_of(hot, first)->locked > hot->vcpus[0].ctx.op_count * 3 / 4);
	CHECK_EQ(sweep(hot), 0);
	run_until_filled(idle);
	steps(idle, 1000);
	CHECK_EQ(control_of(idle)->op_total, 0);
	CHECK(idle->beats[0] > 300);
	CHECK_EQ(sweep(idle), 0);
	destroy(hot);
	destroy(idle);
}

static void a_limit_is_kept(void)
{
	struct world *world = create(GM_WORKLOAD_VERIFY, 5);

	run_until_filled(world);
	steps(world, 3000);
	CHECK(world->vcpus[0].ctx.op_count <= 5 * world->beats[0]);
	CHECK(world->vcpus[0].ctx.op_count > 2 * world->beats[0]);
	CHECK_EQ(sweep(world), 0);
	destroy(world);
}

static void the_pages_are_dealt_out(void)
{
	struct gm_boot boot = {.vcpu_count = 3, .work_page_count = 103, .shared_page_count = 25};
	uint64_t next = boot.shared_page_count;

	for (uint64_t id = 0; id < boot.vcpu_count; id++) {
		uint64_t first;
		const uint64_t count = gm_own_pages(&boot, id, &first);

		CHECK_EQ(first, next);
		CHECK(count >= 26);
		next += count;
	}
	CHECK_EQ(next, boot.work_page_count);
}

static void each_page_is_measured_once(void)
{
	struct world *world = create(GM_WORKLOAD_MEASURE, 0);

	for (uint64_t count = 1; count < 300; count++) {
		bool seen[300] = {false};

		for (uint64_t i = 0; i < count; i++) {
			const uint64_t page = gm_measure_order(i, count);

			CHECK(page < count);
			CHECK(!seen[page]);
			seen[page] = true;
		}
	}
	run_until_filled(world);
	CHECK_EQ(sweep(world), 0);
	CHECK_EQ(world->touch_count, PAGE_COUNT - SHARED);
	destroy(world);
}

int main(void)
{
	RUN(the_pages_are_dealt_out);
	RUN(an_undamaged_guest_finds_nothing);
	RUN(every_word_of_every_page_counts);
	RUN(a_page_that_went_back_in_time_is_found);
	RUN(a_zero_page_and_a_swapped_page_are_found);
	RUN(lost_counts_are_found);
	RUN(a_lost_boot_page_is_said_and_survived);
	RUN(a_guest_moves_at_any_step);
	RUN(sequential_goes_round);
	RUN(hot_is_hot_and_idle_is_idle);
	RUN(a_limit_is_kept);
	RUN(each_page_is_measured_once);
	return EXIT_SUCCESS;
}
