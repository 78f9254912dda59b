/* SPDX-License-Identifier: Apache-2.0 */
/*
 * workload.c - fill the pages, touch and check them for ever, sweep all of them when asked.
 *
 * Threads, Errors, Ownership, Units, Source: see workload.h.
 *
 * What a sweep adds to the checks that every touch makes: between two barriers no vCPU touches a
 * page, so that counters of several vCPUs can be compared. Each vCPU remembers how often it touched
 * pages and the running sum of its op numbers, in memory and in a register; the pages must add up to
 * exactly that, so that a page that went back to any earlier content is found, wherever it is.
 */
#include "workload.h"

#include "measure.h"
#include "platform.h"

#define OPS_PER_STEP	     8u
#define FULL_CHECK_INTERVAL  16u
#define ERRORS_REPORTED_MAX  16u
#define IDLE_US_WHEN_LOST    100000u
#define MIX_A		     0x9E3779B97F4A7C15ull
#define MIX_B		     0xBF58476D1CE4E5B9ull
#define MIX_C		     0x94D049BB133111EBull
#define NEVER_EQUAL_TO_EMPTY 0x5851F42D4C957F2Dull

enum gm_phase {
	PHASE_FILL = 1,
	PHASE_FILL_WAIT = 2,
	PHASE_RUN = 3,
	PHASE_SWEEP_WAIT = 4, /* until nobody touches pages any more */
	PHASE_SWEEP = 5,
	PHASE_SWEPT_WAIT = 6, /* until everybody's share is counted */
	PHASE_MEASURE = 7,    /* before a sweep */
};

bool gm_phase_valid(uint64_t phase)
{
	return phase >= PHASE_FILL && phase <= PHASE_MEASURE;
}

static const struct gm_boot *boot_of(const struct gm_vcpu *vcpu)
{
	return gm_at(vcpu, GM_BOOT_GPA);
}

static struct gm_control *control_of(const struct gm_vcpu *vcpu)
{
	return gm_at(vcpu, GM_CONTROL_GPA);
}

static struct gm_page *page_at(const struct gm_vcpu *vcpu, uint64_t page)
{
	return gm_at(vcpu, boot_of(vcpu)->work_offset + page * GM_PAGE_SIZE);
}

static uint64_t mix(uint64_t value)
{
	value = (value ^ (value >> 30)) * MIX_B;
	value = (value ^ (value >> 27)) * MIX_C;
	return value ^ (value >> 31);
}

static uint64_t tag_of(uint64_t page)
{
	return (page + 1) * MIX_A; /* odd factor: zero for no page */
}

static uint64_t body_of(uint64_t page, uint64_t index, uint64_t generation)
{
	return mix(page * MIX_A + index * MIX_B + generation * MIX_C + NEVER_EQUAL_TO_EMPTY);
}

static uint64_t check_of(const struct gm_slot *slot, uint64_t page, uint64_t id)
{
	uint64_t value = mix(page * MIX_A + id + NEVER_EQUAL_TO_EMPTY);

	value = mix(value + slot->generation);
	value = mix(value + slot->sum);
	return mix(value + slot->last_op);
}

/* The generation that last wrote body[index] of a page of one vCPU; 0 = as filled. */
static uint64_t generation_of(uint64_t index, uint64_t generation)
{
	const uint64_t lag = (generation + GM_BODY_LEN - index) % GM_BODY_LEN;

	return lag < generation ? generation - lag : 0;
}

static uint64_t next_random(struct gm_vcpu *vcpu)
{
	uint64_t value = vcpu->ctx.random;

	value ^= value >> 12;
	value ^= value << 25;
	value ^= value >> 27;
	vcpu->ctx.random = value;
	return value * MIX_A >> 16;
}

uint64_t gm_own_pages(const struct gm_boot *boot, uint64_t id, uint64_t *ret_first)
{
	const uint64_t own = boot->work_page_count - boot->shared_page_count;
	const uint64_t share = own / boot->vcpu_count;

	*ret_first = boot->shared_page_count + id * share;
	return id + 1 == boot->vcpu_count ? own - id * share : share;
}

/* A vCPU's part of all pages, for filling and sweeping: its own, then every n-th shared one. */
static uint64_t part_count(const struct gm_boot *boot, uint64_t id)
{
	uint64_t first;
	const uint64_t shared = boot->shared_page_count / boot->vcpu_count +
				(id < boot->shared_page_count % boot->vcpu_count);

	return gm_own_pages(boot, id, &first) + shared;
}

static uint64_t part_page(const struct gm_boot *boot, uint64_t id, uint64_t index)
{
	uint64_t first;
	const uint64_t own = gm_own_pages(boot, id, &first);

	return index < own ? first + index : (index - own) * boot->vcpu_count + id;
}

static void found(struct gm_vcpu *vcpu, enum gm_error kind, uint64_t page, uint64_t got,
		  uint64_t want)
{
	vcpu->ctx.error_count++;
	if (vcpu->ctx.error_count <= ERRORS_REPORTED_MAX)
		gm_hypercall(vcpu, GM_CALL_ERROR, kind, page, got, want);
}

static void expect(struct gm_vcpu *vcpu, enum gm_error kind, uint64_t page, uint64_t got,
		   uint64_t want)
{
	if (got != want)
		found(vcpu, kind, page, got, want);
}

static void fill_page(struct gm_vcpu *vcpu, uint64_t number)
{
	struct gm_page *page = page_at(vcpu, number);

	page->tag = tag_of(number);
	for (uint64_t id = 0; id < boot_of(vcpu)->vcpu_count; id++)
		page->slots[id].check = check_of(&page->slots[id], number, id);
	for (uint64_t i = 0; i < GM_BODY_LEN; i++)
		page->body[i] = body_of(number, i, 0);
}

static void check_body(struct gm_vcpu *vcpu, uint64_t number, uint64_t generation)
{
	const struct gm_page *page = page_at(vcpu, number);

	for (uint64_t i = 0; i < GM_BODY_LEN; i++)
		expect(vcpu, GM_ERROR_BODY, number, page->body[i],
		       body_of(number, i, generation_of(i, generation)));
}

/* One read-modify-write of a page, everything that it can check first. */
static void touch(struct gm_vcpu *vcpu, uint64_t number)
{
	struct gm_ctx *ctx = &vcpu->ctx;
	struct gm_page *page = page_at(vcpu, number);
	struct gm_slot *slot = &page->slots[ctx->id];
	const bool shared = number < boot_of(vcpu)->shared_page_count;
	const uint64_t op = ctx->op_count + 1;
	const uint64_t generation = slot->generation + 1;
	const uint64_t index = generation % GM_BODY_LEN;

	expect(vcpu, GM_ERROR_TAG, number, page->tag, tag_of(number));
	expect(vcpu, GM_ERROR_SLOT, number, slot->check, check_of(slot, number, ctx->id));
	if (op % FULL_CHECK_INTERVAL == 0)
		check_body(vcpu, number, shared ? 0 : slot->generation);
	else
		expect(vcpu, GM_ERROR_BODY, number, page->body[index],
		       body_of(number, index, shared ? 0 : generation_of(index, slot->generation)));
	if (!shared)
		page->body[index] = body_of(number, index, generation);
	__atomic_fetch_add(&page->locked, 1, __ATOMIC_RELAXED);
	slot->generation = generation;
	slot->sum += op;
	slot->last_op = op;
	slot->check = check_of(slot, number, ctx->id);
	ctx->op_count = op;
	ctx->op_sum += op;
	gm_register_sum_add(vcpu, op);
}

static uint64_t choose_page(struct gm_vcpu *vcpu)
{
	const struct gm_boot *boot = boot_of(vcpu);
	const uint64_t random = next_random(vcpu);
	uint64_t first;
	const uint64_t own = gm_own_pages(boot, vcpu->ctx.id, &first);
	const uint64_t hot = own / 16 + 1;

	switch (boot->workload) {
	case GM_WORKLOAD_SEQUENTIAL:
		return first + vcpu->ctx.op_count % own;
	case GM_WORKLOAD_HOT:
		return first + (random >> 4) % (random % 16 ? hot : own);
	default:
		if (random % 4 == 0 && boot->shared_page_count > 0)
			return (random >> 2) % boot->shared_page_count;
		return first + (random >> 2) % own;
	}
}

static void sleep_a_tick(struct gm_vcpu *vcpu)
{
	gm_hypercall(vcpu, GM_CALL_IDLE, boot_of(vcpu)->tick_us, 0, 0, 0);
}

static void run(struct gm_vcpu *vcpu)
{
	const struct gm_boot *boot = boot_of(vcpu);
	uint64_t count = OPS_PER_STEP;

	if (boot->op_count_per_tick > 0 && vcpu->ctx.op_budget < count)
		count = vcpu->ctx.op_budget;
	if (boot->workload == GM_WORKLOAD_IDLE || boot->workload == GM_WORKLOAD_MEASURE ||
	    count == 0) {
		sleep_a_tick(vcpu);
		return;
	}
	for (uint64_t i = 0; i < count; i++)
		touch(vcpu, choose_page(vcpu));
	vcpu->ctx.op_budget -= boot->op_count_per_tick > 0 ? count : 0;
	__atomic_fetch_add(&control_of(vcpu)->op_total, count, __ATOMIC_RELAXED);
}

/*
 * Barriers: a counter of arrivals that only grows. The n-th barrier is passed when all vCPUs have
 * arrived n times. Acquire and release order everything before it against everything after it.
 */
static void arrive(struct gm_vcpu *vcpu, enum gm_phase phase)
{
	__atomic_fetch_add(&control_of(vcpu)->arrived, 1, __ATOMIC_ACQ_REL);
	vcpu->ctx.barrier_count++;
	vcpu->ctx.phase = phase;
	vcpu->ctx.cursor = 0;
}

static bool everybody_arrived(struct gm_vcpu *vcpu)
{
	const uint64_t want = vcpu->ctx.barrier_count * boot_of(vcpu)->vcpu_count;

	if (__atomic_load_n(&control_of(vcpu)->arrived, __ATOMIC_ACQUIRE) >= want)
		return true;
	sleep_a_tick(vcpu);
	return false;
}

static void fill(struct gm_vcpu *vcpu)
{
	const struct gm_boot *boot = boot_of(vcpu);
	const uint64_t count = part_count(boot, vcpu->ctx.id);

	if (vcpu->ctx.cursor < count) {
		fill_page(vcpu, part_page(boot, vcpu->ctx.id, vcpu->ctx.cursor));
		vcpu->ctx.cursor++;
		return;
	}
	arrive(vcpu, PHASE_FILL_WAIT);
}

static void begin_sweep(struct gm_vcpu *vcpu, uint64_t number)
{
	struct gm_ctx *ctx = &vcpu->ctx;
	struct gm_control *control = control_of(vcpu);

	ctx->sweep_number = number;
	ctx->sweep_error_count = ctx->error_count; /* a difference, in the end */
	ctx->sweep_page_count = 0;
	control->op_count[ctx->id] = ctx->op_count;
	/* Before the barrier: behind it everybody adds to it. */
	__atomic_store_n(&control->seen_count[ctx->id], 0, __ATOMIC_RELAXED);
	__atomic_store_n(&control->seen_sum[ctx->id], 0, __ATOMIC_RELAXED);
	arrive(vcpu, PHASE_SWEEP_WAIT);
}

static void sweep_page(struct gm_vcpu *vcpu, uint64_t number)
{
	const struct gm_boot *boot = boot_of(vcpu);
	struct gm_control *control = control_of(vcpu);
	const struct gm_page *page = page_at(vcpu, number);
	const bool shared = number < boot->shared_page_count;
	uint64_t touches = 0;

	expect(vcpu, GM_ERROR_TAG, number, page->tag, tag_of(number));
	for (uint64_t id = 0; id < GM_VCPU_COUNT_MAX; id++) {
		const struct gm_slot *slot = &page->slots[id];

		if (id >= boot->vcpu_count) {
			expect(vcpu, GM_ERROR_SLOT, number,
			       slot->generation | slot->sum | slot->last_op | slot->check, 0);
			continue;
		}
		expect(vcpu, GM_ERROR_SLOT, number, slot->check, check_of(slot, number, id));
		touches += slot->generation;
		if (slot->generation == 0)
			continue;
		__atomic_fetch_add(&control->seen_count[id], slot->generation, __ATOMIC_RELAXED);
		__atomic_fetch_add(&control->seen_sum[id], slot->sum, __ATOMIC_RELAXED);
	}
	expect(vcpu, GM_ERROR_LOCKED, number, __atomic_load_n(&page->locked, __ATOMIC_RELAXED),
	       touches);
	check_body(vcpu, number, shared ? 0 : page->slots[vcpu->ctx.id].generation);
	vcpu->ctx.sweep_page_count++;
}

static void sweep(struct gm_vcpu *vcpu)
{
	const struct gm_boot *boot = boot_of(vcpu);

	if (vcpu->ctx.cursor < part_count(boot, vcpu->ctx.id)) {
		sweep_page(vcpu, part_page(boot, vcpu->ctx.id, vcpu->ctx.cursor));
		vcpu->ctx.cursor++;
		return;
	}
	arrive(vcpu, PHASE_SWEPT_WAIT);
}

/* All pages are counted, and nobody touches one before it has passed this barrier as well. */
static void end_sweep(struct gm_vcpu *vcpu)
{
	struct gm_ctx *ctx = &vcpu->ctx;
	const struct gm_control *control = control_of(vcpu);
	const uint64_t no_page = ~0ull;

	expect(vcpu, GM_ERROR_COUNT, no_page,
	       __atomic_load_n(&control->seen_count[ctx->id], __ATOMIC_RELAXED), ctx->op_count);
	expect(vcpu, GM_ERROR_SUM, no_page,
	       __atomic_load_n(&control->seen_sum[ctx->id], __ATOMIC_RELAXED), ctx->op_sum);
	expect(vcpu, GM_ERROR_REGISTER, no_page, gm_register_sum(vcpu), ctx->op_sum);
	ctx->sweep_error_count = ctx->error_count - ctx->sweep_error_count;
	ctx->phase = PHASE_RUN;
	gm_hypercall(vcpu, GM_CALL_VERIFIED, ctx->sweep_number, ctx->sweep_page_count,
		     ctx->sweep_error_count, ctx->op_count);
}

static void check_op_total(struct gm_vcpu *vcpu)
{
	const struct gm_control *control = control_of(vcpu);
	uint64_t sum = 0;

	for (uint64_t id = 0; id < boot_of(vcpu)->vcpu_count; id++)
		sum += control->op_count[id];
	expect(vcpu, GM_ERROR_OP_TOTAL, ~0ull,
	       __atomic_load_n(&control->op_total, __ATOMIC_RELAXED), sum);
}

/* Returns true if there is nothing else to do in this step: a sweep begins, or the guest ends. */
static bool beat(struct gm_vcpu *vcpu)
{
	struct gm_ctx *ctx = &vcpu->ctx;
	const uint64_t ticks = gm_ticks(vcpu);
	uint64_t asked;

	if (ticks == ctx->tick_seen)
		return false;
	ctx->tick_seen = ticks;
	ctx->op_budget = boot_of(vcpu)->op_count_per_tick;
	ctx->beat_count++;
	asked = gm_hypercall(vcpu, GM_CALL_BEAT, ctx->beat_count, ctx->op_count, ctx->error_count,
			     ticks);
	if (asked & GM_BEAT_POWER_OFF) {
		gm_hypercall(vcpu, GM_CALL_POWER_OFF, 0, 0, 0, 0);
		return true;
	}
	if (asked <= ctx->sweep_number || ctx->phase != PHASE_RUN)
		return false;
	if (boot_of(vcpu)->workload == GM_WORKLOAD_MEASURE) {
		gm_measure_begin(vcpu);
		ctx->cursor = 0;
		ctx->phase = PHASE_MEASURE;
		return true;
	}
	begin_sweep(vcpu, asked);
	return true;
}

static void measure(struct gm_vcpu *vcpu)
{
	uint64_t first;
	const uint64_t count = gm_own_pages(boot_of(vcpu), vcpu->ctx.id, &first);

	for (uint32_t i = 0; i < OPS_PER_STEP && vcpu->ctx.cursor < count; i++) {
		const uint64_t page = first + gm_measure_order(vcpu->ctx.cursor++, count);

		gm_measure_touch(vcpu, &page_at(vcpu, page)->tag);
	}
	if (vcpu->ctx.cursor < count)
		return;
	gm_measure_report(vcpu);
	/* Whoever asked waits for this sweep or a later one: one more than the last is either. */
	begin_sweep(vcpu, vcpu->ctx.sweep_number + 1);
}

void gm_vcpu_init(struct gm_vcpu *vcpu, uint64_t id)
{
	struct gm_ctx *ctx = &vcpu->ctx;

	*ctx = (struct gm_ctx){.id = id, .phase = PHASE_FILL};
	ctx->random = mix(boot_of(vcpu)->seed + (id + 1) * MIX_A) | 1;
	gm_register_sum_set(vcpu, 0);
}

/* Whoever lost this page has nothing to go on with: it says so, rather than divide by zero. */
static bool boot_lost(struct gm_vcpu *vcpu)
{
	const struct gm_boot *boot = boot_of(vcpu);

	if (boot->magic == GM_BOOT_MAGIC && boot->abi_version == GM_ABI_VERSION)
		return false;
	found(vcpu, GM_ERROR_BOOT, ~0ull, boot->magic, GM_BOOT_MAGIC);
	gm_hypercall(vcpu, GM_CALL_IDLE, IDLE_US_WHEN_LOST, 0, 0, 0);
	return true;
}

void gm_vcpu_step(struct gm_vcpu *vcpu)
{
	if (boot_lost(vcpu) || beat(vcpu))
		return;
	switch ((enum gm_phase)vcpu->ctx.phase) {
	case PHASE_FILL:
		fill(vcpu);
		break;
	case PHASE_FILL_WAIT:
		if (!everybody_arrived(vcpu))
			break;
		vcpu->ctx.phase = PHASE_RUN;
		gm_hypercall(vcpu, GM_CALL_FILLED, part_count(boot_of(vcpu), vcpu->ctx.id), 0, 0,
			     0);
		break;
	case PHASE_RUN:
		run(vcpu);
		break;
	case PHASE_SWEEP_WAIT:
		if (!everybody_arrived(vcpu))
			break;
		if (vcpu->ctx.id == 0)
			check_op_total(vcpu);
		vcpu->ctx.phase = PHASE_SWEEP;
		break;
	case PHASE_SWEEP:
		sweep(vcpu);
		break;
	case PHASE_SWEPT_WAIT:
		if (everybody_arrived(vcpu))
			end_sweep(vcpu);
		break;
	case PHASE_MEASURE:
		measure(vcpu);
		break;
	}
}
