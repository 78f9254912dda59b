/* SPDX-License-Identifier: Apache-2.0 */
/*
 * importer.c - which private page may take which step, and what a step that fails leaves behind.
 *
 * Threads, Errors, Ownership, Units, Source: see importer.h.
 *
 * Ordering. States move by compare-and-swap, acq_rel. A page in IMPORTING or FLIPPING belongs to one
 * thread until that thread stores another state (release), so one page never sees two imports; the
 * next owner sees what the last one did. Tests: one_import_whoever_asks in test_importer.c parks a
 * thread at importer.imported, a_page_on_its_way_is_not_given_back at importer.flipped.
 */
#include <godwit/importer.h>

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>

#include <godwit/sys.h>

struct gw_importer {
	const struct gw_importer_ops *ops;
	void *self;
	uint64_t page_count;
	_Atomic uint64_t left_count; /* relaxed: it orders nothing; bits are what the guest sees */
	_Atomic uint8_t states[];
};

static uint64_t private_count(uint64_t page_count, const struct gw_private_run *runs,
			      size_t run_count)
{
	uint64_t end = 0, count = 0;

	for (size_t i = 0; i < run_count; i++) {
		if (runs[i].count == 0 || runs[i].first < end || runs[i].first >= page_count ||
		    runs[i].count > page_count - runs[i].first)
			return UINT64_MAX;
		end = runs[i].first + runs[i].count;
		count += runs[i].count;
	}
	return count;
}

int gw_importer_create(uint64_t page_count, const struct gw_private_run *runs, size_t run_count,
		       const struct gw_importer_ops *ops, void *self,
		       struct gw_importer **ret_importer)
{
	const uint64_t count = private_count(page_count, runs, run_count);

	if (count == UINT64_MAX || page_count > SIZE_MAX / 2)
		return -EINVAL;
	struct gw_importer *const importer = calloc(1, sizeof(*importer) + page_count);

	if (!importer)
		return -ENOMEM;
	importer->ops = ops;
	importer->self = self;
	importer->page_count = page_count;
	atomic_store(&importer->left_count, count);
	for (size_t i = 0; i < run_count; i++)
		for (uint64_t page = 0; page < runs[i].count; page++)
			atomic_store_explicit(&importer->states[runs[i].first + page],
					      GW_PRIVATE_ABSENT, memory_order_relaxed);
	*ret_importer = importer;
	return 0;
}

void gw_importer_destroy(struct gw_importer *importer)
{
	free(importer);
}

enum gw_private_state gw_importer_state(const struct gw_importer *importer, uint64_t page)
{
	if (page >= importer->page_count)
		return GW_PRIVATE_NOT;
	return atomic_load_explicit(&importer->states[page], memory_order_acquire);
}

uint64_t gw_importer_left_count(const struct gw_importer *importer)
{
	return atomic_load_explicit(&importer->left_count, memory_order_relaxed);
}

static bool is_private(const struct gw_importer *importer, uint64_t first, uint64_t count)
{
	if (count == 0 || first >= importer->page_count || count > importer->page_count - first)
		return false;
	for (uint64_t i = 0; i < count; i++)
		if (gw_importer_state(importer, first + i) == GW_PRIVATE_NOT)
			return false;
	return true;
}

static bool move(struct gw_importer *importer, uint64_t page, uint8_t from, uint8_t to)
{
	return atomic_compare_exchange_strong_explicit(&importer->states[page], &from, to,
						       memory_order_acq_rel, memory_order_acquire);
}

/* As many as are in `from`, from `first` on: they are the caller's now. */
static uint64_t claim(struct gw_importer *importer, uint64_t first, uint64_t count_max,
		      uint8_t from, uint8_t to)
{
	uint64_t count = 0;

	while (count < count_max && move(importer, first + count, from, to))
		count++;
	return count;
}

/* Pages of our own: nobody else moves them. */
static void store(struct gw_importer *importer, uint64_t first, uint64_t count, uint8_t to)
{
	for (uint64_t i = 0; i < count; i++)
		atomic_store_explicit(&importer->states[first + i], to, memory_order_release);
}

static bool is_passing(int64_t error)
{
	return error == -EAGAIN || error == -EINTR || error == -EBUSY || error == -ENOMEM;
}

/* FLIPPING pages, ours. The import is never undone and never done again. */
static int flip(struct gw_importer *importer, uint64_t first, uint64_t count)
{
	GW_HOOK("importer.imported");
	const int result =
		importer->ops->set_attributes(importer->self, first, count, GW_ATTRIBUTE_PRIVATE);

	if (result < 0) {
		store(importer, first, count, GW_PRIVATE_IMPORTED);
		return is_passing(result) ? GW_IMPORTER_AGAIN : GW_IMPORTER_HELD;
	}
	GW_HOOK("importer.flipped");
	store(importer, first, count, GW_PRIVATE_PRESENT);
	atomic_fetch_sub_explicit(&importer->left_count, count, memory_order_relaxed);
	importer->ops->publish(importer->self, first, count);
	return GW_IMPORTER_DONE;
}

/*
 * IMPORTING pages, ours, that were all in `from`. ret_taken: how many the outcome is about; the rest
 * is in `from` again.
 *
 * EEXIST is success only where an earlier attempt of ours ended in doubt. On a first attempt the
 * content is not ours, and a guest is held rather than given it.
 */
static int import_run(struct gw_importer *importer, uint64_t first, uint64_t count,
		      const uint8_t *data, uint8_t from, uint64_t *ret_taken)
{
	int64_t done = importer->ops->import(importer->self, first, count, data);

	if (done == -EEXIST && from == GW_PRIVATE_DOUBTFUL)
		done = 1;
	if (done > (int64_t)count) {
		/* The steps lie. */
		store(importer, first, count, GW_PRIVATE_HELD);
		*ret_taken = count;
		return GW_IMPORTER_HELD;
	}
	if (done == 0 || is_passing(done)) {
		store(importer, first, count, from);
		*ret_taken = count;
		return GW_IMPORTER_AGAIN;
	}
	*ret_taken = done < 0 ? 1 : (uint64_t)done;
	store(importer, first + *ret_taken, count - *ret_taken, from);
	if (done < 0) {
		store(importer, first, 1, GW_PRIVATE_HELD);
		return GW_IMPORTER_HELD;
	}
	store(importer, first, *ret_taken, GW_PRIVATE_FLIPPING);
	return flip(importer, first, *ret_taken);
}

static int worse(int a, int b)
{
	return a > b ? a : b;
}

/*
 * One step over pages at `first`. Returns the outcome; ret_taken >= 1 pages it is about. A page that
 * another thread takes from under us is that thread's business.
 */
static int advance(struct gw_importer *importer, uint64_t first, uint64_t count,
		   const uint8_t *data, uint64_t *ret_taken)
{
	const uint8_t state = (uint8_t)gw_importer_state(importer, first);
	uint64_t claimed;

	*ret_taken = 1;
	switch (state) {
	case GW_PRIVATE_ABSENT:
	case GW_PRIVATE_DOUBTFUL:
		if (!data)
			return GW_IMPORTER_AGAIN;
		claimed = claim(importer, first, count, state, GW_PRIVATE_IMPORTING);
		if (claimed == 0)
			return GW_IMPORTER_DONE;
		return import_run(importer, first, claimed, data, state, ret_taken);
	case GW_PRIVATE_IMPORTED:
		claimed = claim(importer, first, count, state, GW_PRIVATE_FLIPPING);
		if (claimed == 0)
			return GW_IMPORTER_DONE;
		*ret_taken = claimed;
		return flip(importer, first, claimed);
	case GW_PRIVATE_HELD:
		return GW_IMPORTER_HELD;
	default:
		return GW_IMPORTER_DONE;
	}
}

static int advance_all(struct gw_importer *importer, uint64_t first, uint64_t count,
		       const uint8_t *data, size_t page_len)
{
	int outcome = GW_IMPORTER_DONE;

	if (!is_private(importer, first, count))
		return -EINVAL;
	for (uint64_t i = 0, taken; i < count; i += taken)
		outcome = worse(outcome, advance(importer, first + i, count - i,
						 data ? data + i * page_len : NULL, &taken));
	return outcome;
}

int gw_importer_run(struct gw_importer *importer, uint64_t first, uint64_t count,
		    const uint8_t *data, size_t page_len)
{
	if (!data || page_len == 0)
		return -EINVAL;
	return advance_all(importer, first, count, data, page_len);
}

int gw_importer_settle(struct gw_importer *importer, uint64_t first, uint64_t count)
{
	return advance_all(importer, first, count, NULL, 0);
}

/* GIVEN_BACK, from whatever it is; false: somebody is at it. */
static bool take_back(struct gw_importer *importer, uint64_t page)
{
	uint8_t state = (uint8_t)gw_importer_state(importer, page);

	/* Bounded: every turn is a step of another thread's, and a page has few. */
	while (state != GW_PRIVATE_GIVEN_BACK) {
		if (state == GW_PRIVATE_IMPORTING || state == GW_PRIVATE_FLIPPING)
			return false;
		if (move(importer, page, state, GW_PRIVATE_GIVEN_BACK)) {
			if (state != GW_PRIVATE_PRESENT)
				atomic_fetch_sub_explicit(&importer->left_count, 1,
							  memory_order_relaxed);
			break;
		}
		state = (uint8_t)gw_importer_state(importer, page);
	}
	return true;
}

int gw_importer_give_back(struct gw_importer *importer, uint64_t first, uint64_t count)
{
	if (!is_private(importer, first, count))
		return -EINVAL;
	/* Before the flip: an import after it would write into what the guest thinks is shared. */
	for (uint64_t i = 0; i < count; i++)
		if (!take_back(importer, first + i))
			return -EBUSY;
	const int result = importer->ops->set_attributes(importer->self, first, count, 0);

	if (result < 0)
		return is_passing(result) ? GW_IMPORTER_AGAIN : GW_IMPORTER_HELD;
	importer->ops->publish(importer->self, first, count);
	return GW_IMPORTER_DONE;
}

int gw_importer_retry_held(struct gw_importer *importer, uint64_t page)
{
	if (page >= importer->page_count)
		return -EINVAL;
	return move(importer, page, GW_PRIVATE_HELD, GW_PRIVATE_DOUBTFUL) ? 0 : -EINVAL;
}
