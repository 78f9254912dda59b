/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_vmm_exit.c - the exit decoder: each return of KVM_RUN has one class, over the whole product of
 * results, exits, flags, addresses and lengths; whatever is not known holds the guest.
 */
#include <errno.h>
#include <linux/kvm.h>
#include <stdint.h>

#include <godwit/exit_channel.h>
#include <godwit/vmm.h>

#include "check.h"

#define MEMORY_FAULT 39U
#define PRIVATE	     (UINT64_C(1) << 3)
#define USERFAULT    (UINT64_C(1) << 4)
#define ASYNC	     (UINT64_C(1) << 5) /* of an RFC; to us, a bit that nobody knows */

#define RAM_BEGIN 0x100000ULL
#define RAM_END	  0x900000ULL

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

/* One return of KVM_RUN. */
struct told {
	int result;
	uint32_t exit_reason;
	uint64_t flags;
	uint64_t gpa;
	uint64_t len;
};

static bool is_ram(const void *opaque, uint64_t gpa)
{
	CHECK(opaque == &is_ram);
	return gpa >= RAM_BEGIN && gpa < RAM_END;
}

static enum gw_vmm_exit classify(int result, const struct kvm_run *run,
				 struct gw_vmm_exit_info *ret_info)
{
	return gw_vmm_classify(result, run, is_ram, &is_ram, ret_info);
}

static struct kvm_run run_of(const struct told *told)
{
	struct kvm_run run = {.exit_reason = told->exit_reason};
	const uint64_t words[3] = {told->flags, told->gpa, told->len};

	memcpy(&run.hw, words, sizeof(words));
	return run;
}

/* The rules again, as a table: the first row that fits says the class. -1, ANY: whatever it is. */
enum where { ANYWHERE, ALL_RAM, NOT_ALL_RAM };
enum shape { ANY_SHAPE, A_RANGE, NO_RANGE };
#define ANY (-1)

static const struct rule {
	int result;
	int64_t exit_reason;
	int64_t known;		/* are all flags? 0, 1 or ANY */
	int64_t private_access; /* is the flag set? 0, 1 or ANY */
	int64_t userfault;
	enum shape shape;
	enum where where;
	enum gw_vmm_exit is;
} rules[] = {
	{-EINTR, ANY, ANY, ANY, ANY, ANY_SHAPE, ANYWHERE, GW_VMM_EXIT_INTERRUPTED},
	{-EAGAIN, ANY, ANY, ANY, ANY, ANY_SHAPE, ANYWHERE, GW_VMM_EXIT_INTERRUPTED},
	{-EHWPOISON, ANY, ANY, ANY, ANY, ANY_SHAPE, ANYWHERE, GW_VMM_EXIT_POISON},
	{-EFAULT, MEMORY_FAULT, 0, ANY, ANY, ANY_SHAPE, ANYWHERE, GW_VMM_EXIT_UNKNOWN},
	{-EFAULT, MEMORY_FAULT, 1, ANY, ANY, NO_RANGE, ANYWHERE, GW_VMM_EXIT_UNKNOWN},
	{-EFAULT, MEMORY_FAULT, 1, 0, 0, A_RANGE, ANYWHERE, GW_VMM_EXIT_SHARED},
	{-EFAULT, MEMORY_FAULT, 1, 1, ANY, A_RANGE, ALL_RAM, GW_VMM_EXIT_PRIVATE},
	{-EFAULT, MEMORY_FAULT, 1, 0, 1, A_RANGE, ALL_RAM, GW_VMM_EXIT_USERFAULT},
	{-EFAULT, MEMORY_FAULT, 1, ANY, ANY, A_RANGE, NOT_ALL_RAM, GW_VMM_EXIT_UNKNOWN},
	{-EFAULT, ANY, ANY, ANY, ANY, ANY_SHAPE, ANYWHERE, GW_VMM_EXIT_BARE_FAULT},
	{0, MEMORY_FAULT, ANY, ANY, ANY, ANY_SHAPE, ANYWHERE, GW_VMM_EXIT_UNKNOWN},
};

static enum gw_vmm_exit expected(const struct told *told)
{
	/* In 128 bits, where nothing wraps. */
	const unsigned __int128 end = (unsigned __int128)told->gpa + told->len;
	const bool range = told->len > 0 && end <= (unsigned __int128)1 << 64;
	const bool ram = range && told->gpa >= RAM_BEGIN && end <= RAM_END;
	const bool known = (told->flags & ~(PRIVATE | USERFAULT)) == 0;

	for (size_t i = 0; i < COUNT(rules); i++) {
		const struct rule *const rule = &rules[i];

		if (rule->result == told->result &&
		    (rule->exit_reason == ANY || rule->exit_reason == told->exit_reason) &&
		    (rule->known == ANY || rule->known == known) &&
		    (rule->private_access == ANY ||
		     rule->private_access == ((told->flags & PRIVATE) != 0)) &&
		    (rule->userfault == ANY ||
		     rule->userfault == ((told->flags & USERFAULT) != 0)) &&
		    (rule->shape == ANY_SHAPE || (rule->shape == A_RANGE) == range) &&
		    (rule->where == ANYWHERE || (rule->where == ALL_RAM) == ram))
			return rule->is;
	}
	return GW_VMM_EXIT_OTHER;
}

static void check_info(const struct told *told, enum gw_vmm_exit is,
		       const struct gw_vmm_exit_info *info)
{
	switch (is) {
	case GW_VMM_EXIT_USERFAULT:
	case GW_VMM_EXIT_PRIVATE:
	case GW_VMM_EXIT_SHARED:
	case GW_VMM_EXIT_UNKNOWN:
		CHECK(info->gpa == told->gpa && info->len == told->len);
		CHECK(info->flags == told->flags);
		break;
	case GW_VMM_EXIT_POISON:
		CHECK(info->gpa == GW_VMM_GPA_NONE || info->gpa == told->gpa);
		CHECK(info->gpa == GW_VMM_GPA_NONE || told->exit_reason == MEMORY_FAULT);
		break;
	default:
		CHECK(info->gpa == GW_VMM_GPA_NONE && info->len == 0 && info->flags == 0);
	}
}

/* Exits whose own words are read are tested by themselves. */
static bool has_own_words(const struct told *told)
{
	return told->result == 0 &&
	       (told->exit_reason == KVM_EXIT_MMIO || told->exit_reason == KVM_EXIT_INTERNAL_ERROR);
}

static void every_return_has_its_class(void)
{
	static const int results[] = {0,       -EFAULT, -EHWPOISON, -EINTR, -EAGAIN,
				      -EINVAL, -ENOMEM, -EIO,	    -ENXIO, 1};
	static const uint64_t strange[] = {0, 1, 2, 4, ASYNC, UINT64_C(1) << 63};
	static const uint64_t gpas[] = {
		0,	 RAM_BEGIN - 4096, RAM_BEGIN,	      RAM_BEGIN + 5, RAM_END - 4096,
		RAM_END, RAM_END - 1,	   UINT64_MAX - 4095, UINT64_MAX};
	static const uint64_t lens[] = {0, 4096, 1, 8192, 2 << 20, RAM_END, UINT64_MAX};
	uint64_t count = 0;
	uint64_t seen[GW_VMM_EXIT_NOT_EMULATED + 1] = {0};

	for (size_t r = 0; r < COUNT(results); r++)
		for (uint32_t reason = 0; reason < 64; reason++)
			for (unsigned int f = 0; f < 4 * COUNT(strange); f++)
				for (size_t g = 0; g < COUNT(gpas); g++)
					for (size_t l = 0; l < COUNT(lens); l++) {
						const struct told told = {
							.result = results[r],
							.exit_reason = reason,
							.flags = strange[f / 4] |
								 ((f & 1) ? PRIVATE : 0) |
								 ((f & 2) ? USERFAULT : 0),
							.gpa = gpas[g],
							.len = lens[l],
						};
						const struct kvm_run run = run_of(&told);
						struct gw_vmm_exit_info info = {7, 7, 7};

						if (has_own_words(&told))
							continue;
						const enum gw_vmm_exit is =
							classify(told.result, &run, &info);

						CHECK_EQ(is, expected(&told));
						check_info(&told, is, &info);
						seen[is]++;
						count++;
					}
	fprintf(stderr, "  %llu returns\n", (unsigned long long)count);
	for (unsigned int is = 0; is < COUNT(seen); is++)
		CHECK((seen[is] > 0) ==
		      (is != GW_VMM_EXIT_RAM_MMIO && is != GW_VMM_EXIT_NOT_EMULATED));
}

/* What the rules would not show if the oracle made the same mistake: by hand. */
static void the_words_of_the_contract(void)
{
	static const struct {
		struct told told;
		enum gw_vmm_exit is;
	} table[] = {
		{{-EFAULT, 39, USERFAULT, RAM_BEGIN, 4096}, GW_VMM_EXIT_USERFAULT},
		{{-EFAULT, 39, PRIVATE, RAM_BEGIN, 4096}, GW_VMM_EXIT_PRIVATE},
		{{-EFAULT, 39, PRIVATE | USERFAULT, RAM_BEGIN, 4096}, GW_VMM_EXIT_PRIVATE},
		{{-EFAULT, 39, 0, RAM_BEGIN, 4096}, GW_VMM_EXIT_SHARED},
		{{-EFAULT, 39, 0, 0xfee00000, 4096}, GW_VMM_EXIT_SHARED},
		{{-EFAULT, 39, USERFAULT, 0xfee00000, 4096}, GW_VMM_EXIT_UNKNOWN},
		{{-EFAULT, 39, USERFAULT | ASYNC, RAM_BEGIN, 4096}, GW_VMM_EXIT_UNKNOWN},
		{{-EFAULT, 39, 1, RAM_BEGIN, 4096}, GW_VMM_EXIT_UNKNOWN},
		{{-EFAULT, 39, USERFAULT, RAM_BEGIN, 0}, GW_VMM_EXIT_UNKNOWN},
		{{-EFAULT, 39, USERFAULT, RAM_END - 4096, 8192}, GW_VMM_EXIT_UNKNOWN},
		{{-EFAULT, 39, USERFAULT, UINT64_MAX, 4096}, GW_VMM_EXIT_UNKNOWN},
		{{-EFAULT, 0, USERFAULT, RAM_BEGIN, 4096}, GW_VMM_EXIT_BARE_FAULT},
		{{-EFAULT, KVM_EXIT_IO, 0, 0, 0}, GW_VMM_EXIT_BARE_FAULT},
		{{-EFAULT, KVM_EXIT_MMIO, 0, RAM_BEGIN, 4096}, GW_VMM_EXIT_BARE_FAULT},
		{{-EHWPOISON, 39, 0, RAM_BEGIN, 4096}, GW_VMM_EXIT_POISON},
		{{-EINTR, 39, USERFAULT, RAM_BEGIN, 4096}, GW_VMM_EXIT_INTERRUPTED},
		{{-EAGAIN, 0, 0, 0, 0}, GW_VMM_EXIT_INTERRUPTED},
		{{-ENOMEM, 39, USERFAULT, RAM_BEGIN, 4096}, GW_VMM_EXIT_OTHER},
		{{0, 39, USERFAULT, RAM_BEGIN, 4096}, GW_VMM_EXIT_UNKNOWN},
		{{0, KVM_EXIT_IO, 0, 0, 0}, GW_VMM_EXIT_OTHER},
		{{0, KVM_EXIT_SHUTDOWN, 0, 0, 0}, GW_VMM_EXIT_OTHER},
	};
	struct gw_vmm_exit_info info;

	for (size_t i = 0; i < COUNT(table); i++) {
		const struct kvm_run run = run_of(&table[i].told);

		CHECK_EQ(classify(table[i].told.result, &run, &info), table[i].is);
		check_info(&table[i].told, table[i].is, &info);
	}
}

static void poison_says_where_if_the_kernel_does(void)
{
	const struct told with = {-EHWPOISON, MEMORY_FAULT, PRIVATE, RAM_BEGIN, 4096};
	const struct told without = {-EHWPOISON, KVM_EXIT_IO, PRIVATE, RAM_BEGIN, 4096};
	const struct kvm_run run_with = run_of(&with), run_without = run_of(&without);
	struct gw_vmm_exit_info info;

	CHECK_EQ(classify(-EHWPOISON, &run_with, &info), GW_VMM_EXIT_POISON);
	CHECK(info.gpa == RAM_BEGIN && info.len == 4096);
	CHECK_EQ(classify(-EHWPOISON, &run_without, &info), GW_VMM_EXIT_POISON);
	CHECK(info.gpa == GW_VMM_GPA_NONE && info.len == 0);
}

static void mmio_inside_of_ram(void)
{
	static const struct {
		uint64_t gpa;
		uint32_t len;
		bool ram;
	} table[] = {
		{RAM_BEGIN, 4, true},	   {RAM_END - 1, 1, true},    {RAM_END - 2, 4, true},
		{RAM_BEGIN - 2, 4, true},  {RAM_BEGIN - 4, 4, false}, {RAM_END, 8, false},
		{0xfee00000, 4, false},	   {UINT64_MAX, 8, false},    {RAM_BEGIN, 0, true},
		{RAM_BEGIN - 1, 0, false},
	};

	for (size_t i = 0; i < COUNT(table); i++)
		for (uint8_t write = 0; write < 2; write++) {
			struct kvm_run run = {.exit_reason = KVM_EXIT_MMIO};
			struct gw_vmm_exit_info info;

			run.mmio.phys_addr = table[i].gpa;
			run.mmio.len = table[i].len;
			run.mmio.is_write = write;
			CHECK_EQ(classify(0, &run, &info),
				 table[i].ram ? GW_VMM_EXIT_RAM_MMIO : GW_VMM_EXIT_OTHER);
			CHECK(info.gpa == (table[i].ram ? table[i].gpa : GW_VMM_GPA_NONE));
			CHECK(info.flags == (table[i].ram && write ? GW_EXIT_WRITE : 0));
		}
}

static void an_emulation_that_gave_up(void)
{
	for (uint32_t suberror = 0; suberror < 6; suberror++)
		for (uint32_t ndata = 0; ndata < 9; ndata++)
			for (uint64_t flags = 0; flags < 4; flags++)
				for (uint8_t len = 0; len <= 15; len++) {
					struct kvm_run run = {.exit_reason =
								      KVM_EXIT_INTERNAL_ERROR};
					struct gw_vmm_exit_info info;
					const bool told = ndata >= 3 && (flags & 1);

					run.emulation_failure.suberror = suberror;
					run.emulation_failure.ndata = ndata;
					run.emulation_failure.flags = flags;
					run.emulation_failure.insn_size = len;
					if (suberror != KVM_INTERNAL_ERROR_EMULATION) {
						CHECK_EQ(classify(0, &run, &info),
							 GW_VMM_EXIT_OTHER);
						continue;
					}
					CHECK_EQ(classify(0, &run, &info),
						 GW_VMM_EXIT_NOT_EMULATED);
					CHECK(info.gpa == GW_VMM_GPA_NONE);
					CHECK_EQ(info.len, told ? len : 0);
					CHECK_EQ(info.flags, told && len == 15 ? 0 : GW_EXIT_EXEC);
				}
}

int main(void)
{
	RUN(every_return_has_its_class);
	RUN(the_words_of_the_contract);
	RUN(poison_says_where_if_the_kernel_does);
	RUN(mmio_inside_of_ram);
	RUN(an_emulation_that_gave_up);
	return EXIT_SUCCESS;
}
