/* SPDX-License-Identifier: Apache-2.0 */
/* What the pages of a benchmark hold, and the memory for them. See bench.h. */
#include "bench.h"

#include <sys/mman.h>

#include <godwit/sys.h>

#define GOLDEN	       0x9E3779B97F4A7C15ul
#define PAGE_WORDS     (PAGE / sizeof(uint64_t))
#define RUN_PAGE_COUNT 16ul /* zeros come in runs of 64 KiB */

static bool is_zero(enum bench_kind kind, uint64_t page)
{
	return kind == BENCH_HOLE || (kind == BENCH_ZERO_HEAVY && page / RUN_PAGE_COUNT % 10 != 0);
}

static bool is_hole(enum bench_kind kind, uint64_t page)
{
	return kind == BENCH_HOLE || (is_zero(kind, page) && page / RUN_PAGE_COUNT % 2 != 0);
}

uint64_t bench_page_word(enum bench_kind kind, uint64_t page)
{
	return is_zero(kind, page) ? 0 : (page + 1) * GOLDEN | 1;
}

bool bench_page_fill(enum bench_kind kind, uint64_t page, uint8_t *ret_page)
{
	uint64_t value = bench_page_word(kind, page);
	const size_t random_count = kind == BENCH_TEXT ? PAGE_WORDS / 4 : PAGE_WORDS;

	if (is_hole(kind, page))
		return false;
	for (size_t i = 0; i < PAGE_WORDS; i++) {
		const uint64_t repeated = 0x2065687420646E61ul + i % 4;

		memcpy(ret_page + i * sizeof(value), i < random_count ? &value : &repeated,
		       sizeof(value));
		value ^= value << 13;
		value ^= value >> 7;
		value ^= value << 17;
	}
	return true;
}

void bench_warm(uint64_t len)
{
	const int fd = memfd_create("warm", MFD_CLOEXEC);
	const uint64_t begin_ns = gw_sys_now_ns();
	void *memory = NULL;

	CHECK(fd >= 0);
	CHECK_EQ(gw_sys_ftruncate(fd, (off_t)len), 0);
	CHECK_EQ(gw_sys_mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0, &memory), 0);
	for (uint64_t at = 0; at < len; at += PAGE)
		*((volatile uint8_t *)memory + at) = 1;
	CHECK_EQ(gw_sys_munmap(memory, len), 0);
	CHECK_EQ(gw_sys_close(fd), 0);
	bench_print_rate(len, gw_sys_now_ns() - begin_ns);
}

void bench_print_samples(const uint64_t *samples, size_t count)
{
	printf("\"ns\":[");
	for (size_t i = 0; i < count; i++)
		printf("%s%lu", i ? "," : "", samples[i]);
	printf("]");
}

void bench_print_rate(uint64_t len, uint64_t elapsed_ns)
{
	printf("\"bytes\":%lu,\"elapsed_ns\":%lu", len, elapsed_ns);
}
