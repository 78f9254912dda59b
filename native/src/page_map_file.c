/* SPDX-License-Identifier: Apache-2.0 */
/*
 * page_map_file.c - the two files of a page map: made whole or not at all, mapped, adopted.
 *
 * Threads, Errors, Ownership, Units, Source: see page_map.h.
 *
 * The order of creation: bitmap, then the map under a temporary name, then rename(2) to its own:
 * a crash in between leaves no map, and a bitmap without a map is nobody's. The
 * blocks of both are allocated before: a store into a full tmpfs would be SIGBUS.
 */
#include "page_map_internal.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <godwit/sys.h>

#define TEMPORARY_SUFFIX ".new"
#define NAME_LEN_MAX	 (GW_PAGE_MAP_PATH_LEN_MAX + 16)

static size_t page_aligned(size_t len)
{
	return (len + 4095U) & ~(size_t)4095U;
}

static int name_of(char ret_name[NAME_LEN_MAX], const char *path, const char *suffix)
{
	const size_t len = strlen(path);

	if (len == 0 || len > GW_PAGE_MAP_PATH_LEN_MAX)
		return -EINVAL;
	(void)snprintf(ret_name, NAME_LEN_MAX, "%s%s", path, suffix);
	return 0;
}

/* Open, size if `create`, map. Nothing is left open; a file made here stays when a later step fails. */
static int map_file(const char *name, size_t len, bool create, void **ret_address)
{
	const int flags = O_RDWR | O_CLOEXEC | (create ? O_CREAT | O_TRUNC : 0);
	const int fd = gw_sys_open(name, flags, 0600);
	struct stat stat = {0};
	int err = fd < 0 ? fd : 0;

	if (err == 0 && create)
		err = gw_sys_fallocate(fd, 0, 0, (off_t)len);
	if (err == 0)
		err = gw_sys_fstat(fd, &stat);
	if (err == 0 && stat.st_size != (off_t)len)
		err = -ESTALE;
	if (err == 0)
		err = gw_sys_mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0,
				  ret_address);
	if (fd >= 0)
		(void)gw_sys_close(fd);
	if (err == 0 && *ret_address)
		return 0;
	return err < 0 ? err : -EIO;
}

static bool identity_is_valid(const struct gw_page_map_identity *identity)
{
	return identity->page_count > 0 && identity->page_count <= UINT64_C(1) << 40 &&
	       identity->epoch > 0 && identity->image_id[0] != '\0' &&
	       strlen(identity->image_id) <= GW_PAGE_MAP_IMAGE_LEN_MAX;
}

static void header_fill(struct gw_page_map_header *header,
			const struct gw_page_map_identity *identity)
{
	header->magic = GW_PAGE_MAP_MAGIC;
	header->version = GW_PAGE_MAP_VERSION;
	header->header_len = GW_PAGE_MAP_HEADER_LEN;
	header->epoch = identity->epoch;
	header->page_count = identity->page_count;
	header->page_size = identity->page_size;
	header->install_method = identity->install_method;
	(void)snprintf(header->image_id, sizeof(header->image_id), "%s", identity->image_id);
}

static bool header_is_of(const struct gw_page_map_header *header,
			 const struct gw_page_map_identity *identity)
{
	return header->magic == GW_PAGE_MAP_MAGIC && header->version == GW_PAGE_MAP_VERSION &&
	       header->header_len == GW_PAGE_MAP_HEADER_LEN && header->epoch == identity->epoch &&
	       header->page_count == identity->page_count &&
	       header->page_size == identity->page_size &&
	       header->install_method == identity->install_method &&
	       strncmp(header->image_id, identity->image_id, sizeof(header->image_id)) == 0;
}

/* Map both files, written to only if made here; `map_name` is the temporary one then. */
static int map_both(const char *path, const char *map_name, uint64_t page_count, bool create,
		    struct gw_page_map **ret_map)
{
	char bitmap_name[NAME_LEN_MAX];
	struct gw_page_map *const map = calloc(1, sizeof(*map));
	void *address = NULL;
	int err = map ? name_of(bitmap_name, path, GW_PAGE_MAP_BITMAP_SUFFIX) : -ENOMEM;

	if (err < 0)
		goto fail;
	map->map_len = page_aligned(GW_PAGE_MAP_HEADER_LEN + (size_t)page_count);
	map->bitmap_len = page_aligned(gw_bitmap_len(page_count));
	err = map_file(bitmap_name, map->bitmap_len, create, &address);
	if (err < 0)
		goto fail;
	map->bitmap.words = address;
	err = map_file(map_name, map->map_len, create, &address);
	if (err < 0)
		goto fail;
	map->header = address;
	map->states = (_Atomic uint8_t *)address + GW_PAGE_MAP_HEADER_LEN;
	*ret_map = map;
	return 0;
fail:
	gw_page_map_destroy(map);
	return err;
}

int gw_page_map_create(const char *path, const struct gw_page_map_identity *identity,
		       struct gw_page_map **ret_map)
{
	char temporary[NAME_LEN_MAX];
	struct gw_page_map *map = NULL;
	int err = name_of(temporary, path, TEMPORARY_SUFFIX);

	if (err < 0)
		return err;
	if (!identity_is_valid(identity))
		return -EINVAL;
	/* One agent a VM, so that nobody makes it between here and the rename. */
	err = gw_sys_open(path, O_RDONLY | O_CLOEXEC, 0);
	if (err >= 0) {
		(void)gw_sys_close(err);
		return -EEXIST;
	}
	if (err != -ENOENT)
		return err;
	err = map_both(path, temporary, identity->page_count, true, &map);
	if (err < 0)
		goto fail;
	header_fill(map->header, identity);
	gw_bitmap_init(&map->bitmap, (void *)map->bitmap.words, identity->page_count);
	memset((void *)map->states, GW_PAGE_ABSENT, (size_t)identity->page_count);
	gw_bitmap_mark_absent(&map->bitmap, 0, identity->page_count);
	GW_HOOK("page_map.filled");
	err = gw_sys_rename(temporary, path);
	if (err < 0)
		goto fail;
	*ret_map = map;
	return 0;
fail:
	gw_page_map_destroy(map);
	(void)gw_sys_unlink(temporary);
	/* There is no map, so the bitmap is nobody's: it would be memory that nobody counts. */
	(void)gw_page_map_unlink(path);
	return err;
}

int gw_page_map_adopt(const char *path, const struct gw_page_map_identity *identity,
		      struct gw_page_map **ret_map)
{
	struct gw_page_map *map = NULL;
	int err;

	if (strlen(path) > GW_PAGE_MAP_PATH_LEN_MAX || !identity_is_valid(identity))
		return -EINVAL;
	err = map_both(path, path, identity->page_count, false, &map);
	if (err < 0)
		return err;
	/* Before anything is written: a map of somebody else stays as it is. */
	if (map->header->magic == GW_PAGE_MAP_MAGIC && map->header->version > GW_PAGE_MAP_VERSION)
		err = -EPROTONOSUPPORT;
	else if (!header_is_of(map->header, identity))
		err = -ESTALE;
	if (err < 0) {
		gw_page_map_destroy(map);
		return err;
	}
	gw_bitmap_init(&map->bitmap, (void *)map->bitmap.words, identity->page_count);
	*ret_map = map;
	return 0;
}

void gw_page_map_destroy(struct gw_page_map *map)
{
	if (!map)
		return;
	if (map->header)
		(void)gw_sys_munmap(map->header, map->map_len);
	if (map->bitmap.words)
		(void)gw_sys_munmap((void *)map->bitmap.words, map->bitmap_len);
	free(map);
}

int gw_page_map_unlink(const char *path)
{
	char bitmap_name[NAME_LEN_MAX];
	int err = name_of(bitmap_name, path, GW_PAGE_MAP_BITMAP_SUFFIX);

	if (err < 0)
		return err;
	/* The map first: a bitmap without one is nobody's, a map without one cannot be adopted. */
	err = gw_sys_unlink(path);
	const int bitmap_err = gw_sys_unlink(bitmap_name);

	return err < 0 ? err : bitmap_err;
}
