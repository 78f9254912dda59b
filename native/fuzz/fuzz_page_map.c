/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fuzz_page_map.c - a page map and a userfault bitmap of a predecessor, whatever is in the two files:
 * refused, or adopted with counts that agree, and no state but those of the table is ever moved to.
 *
 * Input: a switch, so many bytes over the head of the map, then over its states, then over the bitmap.
 */
#include "fuzz.h"

#include <godwit/page_map.h>

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define PAGE_COUNT 300u
#define HEAD_LEN   4096u

static char directory[] = "/dev/shm/godwit-fuzz-XXXXXX";
static char map_path[64], bitmap_path[80];

static const struct gw_page_map_identity identity = {
	.epoch = 7,
	.page_count = PAGE_COUNT,
	.page_size = 4096,
	.install_method = 1,
	.image_id = "image",
};

static void clean_up(void)
{
	(void)gw_page_map_unlink(map_path);
	(void)rmdir(directory);
}

static void make_directory(void)
{
	if (map_path[0])
		return;
	FUZZ_CHECK(mkdtemp(directory));
	snprintf(map_path, sizeof(map_path), "%s/map", directory);
	snprintf(bitmap_path, sizeof(bitmap_path), "%s" GW_PAGE_MAP_BITMAP_SUFFIX, map_path);
	atexit(clean_up);
}

static void overwrite(const char *path, off_t at, const uint8_t *data, size_t len)
{
	const int fd = open(path, O_RDWR | O_CLOEXEC);

	FUZZ_CHECK(fd >= 0);
	FUZZ_CHECK(pwrite(fd, data, len, at) == (ssize_t)len);
	close(fd);
}

static void use(struct gw_page_map *map)
{
	const struct gw_bitmap *bitmap = gw_page_map_bitmap_const(map);
	uint8_t bytes[(PAGE_COUNT + 7) / 8];
	uint64_t absent = 0;

	FUZZ_CHECK(gw_page_map_page_count(map) == PAGE_COUNT);
	for (uint64_t page = 0; page < PAGE_COUNT; page++) {
		const uint8_t state = gw_page_map_get(map, page);

		absent += gw_bitmap_is_absent(bitmap, page);
		for (uint8_t to = 0; to < GW_PAGE_STATE_COUNT; to++) {
			if (!gw_page_state_may_move(state, to))
				continue;
			FUZZ_CHECK(gw_page_map_move(map, page, state, to));
			FUZZ_CHECK(gw_page_map_get(map, page) == to);
			break;
		}
	}
	FUZZ_CHECK(absent == gw_bitmap_absent_count(bitmap));
	gw_bitmap_copy(bitmap, bytes);
	FUZZ_CHECK(gw_bitmap_publish(gw_page_map_bitmap(map), 0, PAGE_COUNT) == absent);
	FUZZ_CHECK(gw_bitmap_absent_count(bitmap) == 0);
	(void)gw_page_map_is_complete(map);
	(void)gw_page_map_is_violated(map);
	(void)gw_page_map_set_generation(map, 3);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
	struct fuzz_input input = {.data = data, .len = len};
	struct gw_page_map *map;
	uint8_t bytes[HEAD_LEN];
	size_t head_len;
	int err;

	make_directory();
	(void)gw_page_map_unlink(map_path);
	FUZZ_CHECK(gw_page_map_create(map_path, &identity, &map) == 0);
	gw_page_map_destroy(map);
	head_len = fuzz_take_u8(&input);
	if (head_len) {
		fuzz_take(&input, bytes, head_len);
		overwrite(map_path, fuzz_take_u16(&input) % HEAD_LEN, bytes, head_len);
	}
	fuzz_take(&input, bytes, PAGE_COUNT);
	overwrite(map_path, HEAD_LEN, bytes, PAGE_COUNT);
	fuzz_take(&input, bytes, (PAGE_COUNT + 7) / 8);
	overwrite(bitmap_path, 0, bytes, (PAGE_COUNT + 7) / 8);
	err = gw_page_map_adopt(map_path, &identity, &map);
	FUZZ_CHECK(err <= 0);
	if (err == 0) {
		use(map);
		gw_page_map_destroy(map);
	}
	return 0;
}
