/* SPDX-License-Identifier: Apache-2.0 */
/*
 * private_shim.h - a machine with private memory, as far as its rules go: it records every step of an
 * import and says which rule a step broke first. It stands in for hardware that nobody here has.
 *
 * Threads    A mutex guards all of it.
 * Errors     A broken rule is kept, not aborted on: the tests of wrong importers look for it.
 * Ownership  The test's.
 * Units      Pages of PRIVATE_PAGE_LEN bytes.
 * Source     docs/design/private-pages.md, "The rules".
 */
#ifndef GODWIT_TESTS_PRIVATE_SHIM_H
#define GODWIT_TESTS_PRIVATE_SHIM_H

#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>

#include <godwit/importer.h>

#include "check.h"

#define PRIVATE_PAGE_COUNT 64U
#define PRIVATE_PAGE_LEN   64U /* a model's page needs no 4096 bytes */

struct private_page {
	unsigned int fetch_count, import_count, flip_count, publish_count;
	bool has_content, is_private, is_clear, given_back;
};

struct private_shim {
	pthread_mutex_t lock;
	struct private_page pages[PRIVATE_PAGE_COUNT];
	char log[4096];
	char broken[128]; /* the first rule that was broken; empty: none */
	/* One failure: the step's error, or a number of pages that import takes at most. */
	int import_error, flip_error;
	bool import_done; /* with import_error: it has happened all the same */
	int64_t import_max;
};

static inline void shim_init(struct private_shim *shim)
{
	memset(shim, 0, sizeof(*shim));
	pthread_mutex_init(&shim->lock, NULL);
	shim->import_max = PRIVATE_PAGE_COUNT;
}

static inline void shim_log(struct private_shim *shim, const char *step, uint64_t first,
			    uint64_t count, int result)
{
	const size_t len = strlen(shim->log);

	if (len + 64 > sizeof(shim->log))
		return;
	snprintf(shim->log + len, sizeof(shim->log) - len, result ? "%s %u+%u=%d " : "%s %u+%u ",
		 step, (unsigned int)first, (unsigned int)count, result);
}

static inline void shim_rule(struct private_shim *shim, bool kept, const char *rule, uint64_t page)
{
	if (!kept && shim->broken[0] == 0)
		snprintf(shim->broken, sizeof(shim->broken), "%s (page %u)", rule,
			 (unsigned int)page);
}

/* What the source has. */
static inline void shim_content(uint64_t page, uint8_t ret_data[PRIVATE_PAGE_LEN])
{
	for (unsigned int i = 0; i < PRIVATE_PAGE_LEN; i++)
		ret_data[i] = (uint8_t)(page * 31 + i + 1);
}

/* The agent's part: content for each page at ret_data. */
static inline void shim_fetch(struct private_shim *shim, uint64_t first, uint64_t count,
			      uint8_t *ret_data)
{
	pthread_mutex_lock(&shim->lock);
	for (uint64_t i = 0; i < count; i++) {
		shim_rule(shim, !shim->pages[first + i].has_content,
			  "fetched although it has content", first + i);
		shim->pages[first + i].fetch_count++;
		shim_content(first + i, ret_data + i * PRIVATE_PAGE_LEN);
	}
	shim_log(shim, "fetch", first, count, 0);
	pthread_mutex_unlock(&shim->lock);
}

static inline int64_t shim_import(void *self, uint64_t first, uint64_t count, const uint8_t *data)
{
	struct private_shim *const shim = self;
	uint8_t want[PRIVATE_PAGE_LEN];

	pthread_mutex_lock(&shim->lock);
	const int error = shim->import_error;
	int64_t done = (int64_t)count < shim->import_max ? (int64_t)count : shim->import_max;

	shim->import_error = 0;
	shim->import_max = PRIVATE_PAGE_COUNT;
	if (shim->pages[first].has_content && shim->pages[first].import_count > 0 && error == 0) {
		/* As kernels do. Whoever asks twice without a reason has broken a rule, though. */
		shim_log(shim, "import", first, count, -EEXIST);
		pthread_mutex_unlock(&shim->lock);
		return -EEXIST;
	}
	if (error)
		done = shim->import_done ? 1 : 0;
	for (int64_t i = 0; i < done; i++) {
		struct private_page *const page = &shim->pages[first + (uint64_t)i];

		shim_content(first + (uint64_t)i, want);
		shim_rule(shim, page->fetch_count > 0, "imported before it was fetched",
			  first + (uint64_t)i);
		shim_rule(shim, memcmp(want, data + i * PRIVATE_PAGE_LEN, sizeof(want)) == 0,
			  "imported other bytes than the source's", first + (uint64_t)i);
		shim_rule(shim, page->import_count == 0, "imported twice", first + (uint64_t)i);
		shim_rule(shim, !page->is_private, "imported after the flip", first + (uint64_t)i);
		shim_rule(shim, !page->is_clear, "imported after its bit was cleared",
			  first + (uint64_t)i);
		shim_rule(shim, !page->given_back, "imported although it was given back",
			  first + (uint64_t)i);
		page->import_count++;
		page->has_content = true;
	}
	shim->import_done = false;
	shim_log(shim, "import", first, error ? count : (uint64_t)done, error);
	pthread_mutex_unlock(&shim->lock);
	return error ? error : done;
}

static inline int shim_set_attributes(void *self, uint64_t first, uint64_t count,
				      uint64_t attributes)
{
	struct private_shim *const shim = self;
	const bool to_private = attributes == GW_ATTRIBUTE_PRIVATE;

	pthread_mutex_lock(&shim->lock);
	const int error = shim->flip_error;

	shim->flip_error = 0;
	for (uint64_t i = 0; i < count && !error; i++) {
		struct private_page *const page = &shim->pages[first + i];

		shim_rule(shim, !to_private || page->has_content, "flipped without content",
			  first + i);
		shim_rule(shim, !to_private || !page->is_clear, "flipped after its bit was cleared",
			  first + i);
		shim_rule(shim, !to_private || !page->is_private, "flipped twice", first + i);
		page->is_private = to_private;
		page->given_back |= !to_private;
		page->flip_count++;
	}
	shim_log(shim, to_private ? "private" : "shared", first, count, error);
	pthread_mutex_unlock(&shim->lock);
	return error;
}

static inline void shim_publish(void *self, uint64_t first, uint64_t count)
{
	struct private_shim *const shim = self;

	pthread_mutex_lock(&shim->lock);
	for (uint64_t i = 0; i < count; i++) {
		struct private_page *const page = &shim->pages[first + i];

		shim_rule(shim, page->given_back || page->is_private,
			  "its bit was cleared before the flip", first + i);
		shim_rule(shim, page->given_back || page->has_content,
			  "its bit was cleared without content", first + i);
		page->is_clear = true;
		page->publish_count++;
	}
	shim_log(shim, "publish", first, count, 0);
	pthread_mutex_unlock(&shim->lock);
}

static const struct gw_importer_ops shim_ops = {
	.import = shim_import,
	.set_attributes = shim_set_attributes,
	.publish = shim_publish,
};

#endif
