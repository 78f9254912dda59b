/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vmm_give.c - exit-sigsegv: let the threads have pages that are here, by mprotect.
 *
 * Threads    Any number of threads at once, inside of their signal handlers: no lock, no
 *            allocation, no stdio. mprotect serialises in the kernel; every range that is given
 *            holds clear bits only, and nothing is ever taken back, so the order does not matter.
 * Errors, Ownership, Units, Source: see vmm.h.
 *
 * The kernel lets a process have vm.max_map_count mappings (65530 as a rule), and a page with absent
 * neighbours costs two: a guest of 256 MiB, every second page of it given, would use them all up, and
 * with them every mmap of the VMM. So:
 *   1. what is given is the whole run of pages that are here, around the one asked for;
 *   2. after every GIVE_COUNT_MAX of those the runs are counted, exactly, in `given`;
 *   3. more than RUN_COUNT_MAX of them, or ENOMEM: the granule grows, and from then on only whole
 *      aligned granules are given, and awaited. It grows until it is a region, which always fits.
 * The granule's first size keeps 2 * (runs + granules) mappings under the usual limit.
 */
#include "vmm_internal.h"

#include <errno.h>
#include <sys/mman.h>

#include <godwit/sys.h>

#define WORD_PAGES     64U
#define GIVE_COUNT_MAX 8192U
#define RUN_COUNT_MAX  8192U
#define GRANULE_MIN    64U
#define GRANULE_GROWTH 8U
/* How far a run is looked for: 64 MiB each way, some hundred loads. */
#define RUN_LEN_MAX 16384U

/* --- which pages ------------------------------------------------------------------------------ */

/* The first page at or after `from`, below `end`, that is absent; `end` if none. */
static uint64_t next_absent(const struct gw_vmm *vmm, uint64_t from, uint64_t end)
{
	while (from < end) {
		const uint64_t word = atomic_load_explicit(&vmm->words[from / WORD_PAGES],
							   memory_order_acquire) >>
				      (from % WORD_PAGES);

		if (word != 0) {
			const uint64_t page = from + (uint64_t)__builtin_ctzll(word);

			return page < end ? page : end;
		}
		from += WORD_PAGES - from % WORD_PAGES;
	}
	return end;
}

/* The first page of the run of present pages that ends with `page`, not before `start`. */
static uint64_t run_start(const struct gw_vmm *vmm, uint64_t page, uint64_t start)
{
	for (;;) {
		const uint64_t bit = page % WORD_PAGES;
		const uint64_t word =
			atomic_load_explicit(&vmm->words[page / WORD_PAGES], memory_order_acquire)
			<< (WORD_PAGES - 1 - bit);

		if (word != 0) {
			/* The absent page nearest below; page itself is present. */
			const uint64_t first = page - (uint64_t)__builtin_clzll(word) + 1;

			return first > start ? first : start;
		}
		if (page - bit <= start)
			return start;
		page -= bit + 1;
	}
}

/* --- how many mappings ------------------------------------------------------------------------ */

/* Runs of given pages: each begins where a bit is set and the one below is not. */
static uint64_t count_runs(const struct gw_vmm *vmm)
{
	uint64_t below = 0;
	uint64_t run_count = 0;

	for (uint64_t i = 0; i < (vmm->page_count + WORD_PAGES - 1) / WORD_PAGES; i++) {
		const uint64_t word = atomic_load_explicit(&vmm->given[i], memory_order_relaxed);

		run_count += (uint64_t)__builtin_popcountll(word & ~(word << 1 | below));
		below = word >> (WORD_PAGES - 1);
	}
	return run_count;
}

/* So that granules of the whole image are no more than RUN_COUNT_MAX. */
static uint64_t first_granule(const struct gw_vmm *vmm)
{
	uint64_t granule = GRANULE_MIN;

	while (vmm->page_count / granule > RUN_COUNT_MAX)
		granule *= 2;
	return granule;
}

/* Only ever grows, whoever else grows it at the same time. Relaxed: a number, nothing hangs on it. */
static void grow(struct gw_vmm *vmm, uint64_t granule)
{
	uint64_t old = atomic_load_explicit(&vmm->granule, memory_order_relaxed);

	while (old < granule &&
	       !atomic_compare_exchange_weak_explicit(&vmm->granule, &old, granule,
						      memory_order_relaxed, memory_order_relaxed))
		;
}

static void mark_given(struct gw_vmm *vmm, uint64_t first, uint64_t end)
{
	while (first < end) {
		const uint64_t bit = first % WORD_PAGES;
		const uint64_t left = WORD_PAGES - bit;
		const uint64_t span = end - first < left ? end - first : left;
		const uint64_t mask = (span == WORD_PAGES ? 0 : UINT64_C(1) << span) - 1;

		/* Relaxed: who sees the bit skips an mprotect that the kernel has done already. */
		atomic_fetch_or_explicit(&vmm->given[first / WORD_PAGES], mask << bit,
					 memory_order_relaxed);
		first += span;
	}
	if (atomic_fetch_add_explicit(&vmm->give_count, 1, memory_order_relaxed) + 1 <
	    GIVE_COUNT_MAX)
		return;
	atomic_store_explicit(&vmm->give_count, 0, memory_order_relaxed);
	if (count_runs(vmm) > RUN_COUNT_MAX)
		grow(vmm, first_granule(vmm));
}

/* --- give ------------------------------------------------------------------------------------- */

static int make_accessible(const struct gw_vmm *vmm, const struct gw_vmm_region_state *region,
			   uint64_t first, uint64_t end)
{
	const uint64_t address = region->at.guest_addr + (first - region->first) * vmm->page_size;

	return gw_sys_mprotect((void *)(uintptr_t)address, (size_t)((end - first) * vmm->page_size),
			       PROT_READ | PROT_WRITE);
}

int gw_vmm_give(struct gw_vmm *vmm, uint64_t page, uint64_t *ret_first, uint64_t *ret_count)
{
	const struct gw_vmm_region_state *const region = gw_vmm_region_of_page(vmm, page);
	const uint64_t region_end = region->first + region->count;

	if (atomic_load_explicit(&vmm->given[page / WORD_PAGES], memory_order_relaxed) >>
		    (page % WORD_PAGES) &
	    1U)
		return 0;
	for (;;) {
		const uint64_t granule = atomic_load_explicit(&vmm->granule, memory_order_relaxed);
		uint64_t first = page / granule * granule;
		uint64_t end = first + granule;

		/* Its granule, cut at the region, must be here; then what is here around it. */
		first = first > region->first ? first : region->first;
		end = end < region_end ? end : region_end;
		if (next_absent(vmm, first, end) < end) {
			*ret_first = first;
			*ret_count = end - first;
			return -EAGAIN;
		}
		const bool whole = first == region->first && end == region_end;

		if (granule == 1) {
			const uint64_t low = page - region->first > RUN_LEN_MAX ? page - RUN_LEN_MAX
										: region->first;
			const uint64_t high = region_end - page > RUN_LEN_MAX ? page + RUN_LEN_MAX
									      : region_end;

			first = run_start(vmm, page, low);
			end = next_absent(vmm, page, high);
		}
		const int err = make_accessible(vmm, region, first, end);

		if (err == 0) {
			mark_given(vmm, first, end);
			return 0;
		}
		if (err != -ENOMEM || whole)
			return err;
		grow(vmm, granule == 1 ? first_granule(vmm) : granule * GRANULE_GROWTH);
	}
}
