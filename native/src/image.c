/* SPDX-License-Identifier: Apache-2.0 */
/*
 * image.c - the memory of one image, read without changing it.
 *
 * Threads, Errors, Ownership, Units, Source: see image.h.
 */
#include <godwit/image.h>

#include <godwit/sys.h>

#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Where a region lies in the image and in the file. */
struct placed_region {
	uint64_t offset;
	uint64_t len;
	uint64_t file_offset;
};

struct gw_image {
	/* Counts owners. Released with release, the last taken with acquire, so that whatever an
	 * owner read happens before the free. test_serve.c under TSan. */
	atomic_size_t ref_count;
	int fd;
	uint64_t size;
	struct gw_wire_image record; /* strings point into the three below */
	struct gw_image_access access;
	struct placed_region regions[GW_SERVE_REGION_COUNT_MAX];
	char image_id[GW_PAGE_ID_LEN_MAX + 1];
	char vm_id[GW_PAGE_ID_LEN_MAX + 1];
	char boot_id[GW_PAGE_ID_LEN_MAX + 1];
};

_Static_assert(GW_SERVE_REGION_COUNT_MAX <= GW_PAGE_REGION_COUNT_MAX,
	       "each has a place on the wire");

bool gw_id_is_valid(const char *id, size_t len, size_t len_max)
{
	if (len == 0 || len > len_max)
		return false;
	for (size_t i = 0; i < len; i++) {
		const char c = id[i];

		if (!((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
		      c == '.' || c == '_' || c == '-'))
			return false;
	}
	return true;
}

/* Copy an id and let `ret_view` show the copy. Empty is allowed where `optional`. */
static bool copy_id(const char *id, bool optional, char *ret_copy, struct gw_wire_string *ret_view)
{
	const size_t len = id ? strnlen(id, GW_PAGE_ID_LEN_MAX + 1) : 0;

	if (!(len == 0 && optional) && !gw_id_is_valid(id, len, GW_PAGE_ID_LEN_MAX))
		return false;
	if (len)
		memcpy(ret_copy, id, len);
	ret_copy[len] = '\0';
	*ret_view = (struct gw_wire_string){.data = ret_copy, .len = len};
	return true;
}

static bool region_is_valid(const struct gw_serve_region *region)
{
	if (region->page_size != 4096 && region->page_size != 2u << 20)
		return false;
	return region->size > 0 && region->size % region->page_size == 0 &&
	       region->gpa % region->page_size == 0 &&
	       region->file_offset % GW_IMAGE_PAGE_LEN == 0 &&
	       region->gpa <= UINT64_MAX - region->size;
}

/* Lay the regions end to end. */
static int place_regions(struct gw_image *image, const struct gw_serve_image *record,
			 uint64_t file_size)
{
	uint64_t gpa_min = 0;

	if (record->region_count == 0 || record->region_count > GW_SERVE_REGION_COUNT_MAX)
		return -EINVAL;
	for (uint32_t i = 0; i < record->region_count; i++) {
		const struct gw_serve_region *region = &record->regions[i];

		if (!region_is_valid(region) || region->gpa < gpa_min)
			return -EINVAL;
		if (region->size > file_size || region->file_offset > file_size - region->size ||
		    region->size > INT64_MAX - image->size)
			return -EOVERFLOW;
		gpa_min = region->gpa + region->size;
		image->regions[i] = (struct placed_region){.offset = image->size,
							   .len = region->size,
							   .file_offset = region->file_offset};
		image->record.regions[i] = (struct gw_wire_region){.region_id = i,
								   .gpa = region->gpa,
								   .size = region->size,
								   .page_size = region->page_size};
		image->size += region->size;
	}
	image->record.region_count = record->region_count;
	return 0;
}

static bool copy_access(struct gw_image_access *access, const struct gw_serve_image *record)
{
	const char *destination = record->destination ? record->destination : "";
	const size_t len = strnlen(destination, GW_TLS_NAME_LEN_MAX + 1);

	if (len > GW_TLS_NAME_LEN_MAX)
		return false;
	memcpy(access->destination, destination, len);
	access->destination_epoch = record->destination_epoch;
	access->has_destination_key = record->destination_key != NULL;
	access->has_token_key = record->token_key != NULL;
	if (record->destination_key)
		memcpy(access->destination_key, record->destination_key, GW_TLS_KEY_LEN);
	if (record->token_key)
		memcpy(access->token_key, record->token_key, GW_SERVE_TOKEN_KEY_LEN);
	return true;
}

static int copy_record(struct gw_image *image, const struct gw_serve_image *record)
{
	if (record->struct_size != sizeof(*record) || record->epoch == 0 ||
	    record->generation == 0 || !record->regions ||
	    (record->state != GW_IMAGE_LIVE && record->state != GW_IMAGE_FROZEN))
		return -EINVAL;
	if (!copy_id(record->image_id, false, image->image_id, &image->record.image_id) ||
	    !copy_id(record->vm_id, true, image->vm_id, &image->record.vm_id) ||
	    !copy_id(record->boot_id, true, image->boot_id, &image->record.boot_id) ||
	    !copy_access(&image->access, record))
		return -EINVAL;
	image->record.epoch = record->epoch;
	image->record.inode = record->inode;
	image->record.generation = record->generation;
	image->record.state = (int32_t)record->state;
	return 0;
}

/*
 * A file description of our own: SEEK_DATA moves the file position, and the caller's may be
 * the VMM's. Where it cannot be opened anew, the descriptor is shared after all.
 */
static int open_anew(int fd)
{
	char path[32];
	int got;

	if (fd < 0)
		return -EBADF;
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	got = gw_sys_open(path, O_RDONLY | O_CLOEXEC, 0);
	return got >= 0 ? got : gw_sys_dup(fd);
}

int gw_image_create(const struct gw_serve_image *record, struct gw_image **ret_image)
{
	struct gw_image *image = calloc(1, sizeof(*image));
	struct stat file;
	int err;

	if (!image)
		return -ENOMEM;
	atomic_init(&image->ref_count, 1);
	image->fd = -1;
	err = copy_record(image, record);
	if (err)
		goto fail;
	image->fd = open_anew(record->ram_fd);
	err = image->fd < 0 ? image->fd : gw_sys_fstat(image->fd, &file);
	if (err)
		goto fail;
	if (record->inode != 0 && record->inode != file.st_ino) {
		err = -EINVAL;
		goto fail;
	}
	err = place_regions(image, record, (uint64_t)file.st_size);
	if (err)
		goto fail;
	*ret_image = image;
	return 0;
fail:
	gw_image_unref(image);
	return err;
}

void gw_image_ref(struct gw_image *image)
{
	atomic_fetch_add_explicit(&image->ref_count, 1, memory_order_relaxed);
}

void gw_image_unref(struct gw_image *image)
{
	if (!image || atomic_fetch_sub_explicit(&image->ref_count, 1, memory_order_acq_rel) != 1)
		return;
	if (image->fd >= 0)
		gw_sys_close(image->fd);
	free(image);
}

const char *gw_image_id(const struct gw_image *image)
{
	return image->image_id;
}

uint64_t gw_image_size(const struct gw_image *image)
{
	return image->size;
}

const struct gw_image_access *gw_image_access(const struct gw_image *image)
{
	return &image->access;
}

const struct gw_wire_image *gw_image_record(const struct gw_image *image)
{
	return &image->record;
}

/* The region that holds `offset`, which is within the image. */
static const struct placed_region *region_at(const struct gw_image *image, uint64_t offset)
{
	const struct placed_region *region = image->regions;

	while (offset - region->offset >= region->len)
		region++;
	return region;
}

uint64_t gw_image_page_begin(const struct gw_image *image, uint64_t offset)
{
	const struct placed_region *region;

	if (offset >= image->size)
		return image->size;
	region = region_at(image, offset);
	return offset -
	       (offset - region->offset) % image->record.regions[region - image->regions].page_size;
}

static uint64_t min_u64(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

/* Of file bytes [offset, end): where the first data is; `end` if there is none; -ENODATA. */
static int64_t seek_data(int fd, uint64_t offset, uint64_t end)
{
	const off_t found = gw_sys_lseek(fd, (off_t)offset, SEEK_DATA);

	/* Nothing but a hole up to the end of the file, or the file ends before `offset`: told
	 * apart by whoever reads; a hole at the end of a file that was cut is no hole. */
	if (found == -ENXIO) {
		const off_t size = gw_sys_lseek(fd, 0, SEEK_END);

		return size >= 0 && (uint64_t)size >= end ? (int64_t)end : -ENODATA;
	}
	if (found == -EINVAL)
		return (int64_t)offset; /* the file system does not know holes */
	if (found < 0)
		return -ENODATA;
	return (int64_t)min_u64((uint64_t)found, end);
}

int64_t gw_image_hole_len(const struct gw_image *image, uint64_t offset, uint64_t len)
{
	uint64_t done = 0;

	while (done < len) {
		const struct placed_region *region = region_at(image, offset + done);
		const uint64_t into = offset + done - region->offset;
		const uint64_t at = region->file_offset + into;
		const uint64_t end = at + min_u64(region->len - into, len - done);
		const int64_t found = seek_data(image->fd, at, end);

		if (found < 0)
			return found;
		/* A page that is partly data is data. */
		done += ((uint64_t)found - at) / GW_IMAGE_PAGE_LEN * GW_IMAGE_PAGE_LEN;
		if ((uint64_t)found < end)
			break;
	}
	return (int64_t)done;
}

static int read_file(int fd, uint64_t offset, uint8_t *ret_data, size_t len)
{
	while (len > 0) {
		const ssize_t got = gw_sys_pread(fd, ret_data, len, (off_t)offset);

		if (got == -EINTR)
			continue;
		/* Room that a page needs to be read in at all, from swap say: it passes. */
		if (got == -ENOMEM)
			return -ENOMEM;
		/* 0 is the end of a file that was cut short, an error a medium that failed. */
		if (got <= 0)
			return -ENODATA;
		ret_data += got;
		offset += (uint64_t)got;
		len -= (size_t)got;
	}
	return 0;
}

int gw_image_read(const struct gw_image *image, uint64_t offset, void *ret_data, size_t len)
{
	uint8_t *at = ret_data;

	if (offset > image->size || len > image->size - offset)
		return -ERANGE;
	while (len > 0) {
		const struct placed_region *region = region_at(image, offset);
		const uint64_t into = offset - region->offset;
		const size_t part = (size_t)min_u64(region->len - into, len);
		const int err = read_file(image->fd, region->file_offset + into, at, part);

		if (err)
			return err;
		at += part;
		offset += part;
		len -= part;
	}
	return 0;
}

/* --- extents --------------------------------------------------------------------------------- */

struct extent_list {
	struct gw_wire_extent *extents;
	size_t count;
	size_t count_max;
	uint64_t gap_max; /* holes up to so long are counted as data */
};

/* Merge over longer and longer holes until there is room. */
static void thin_out(struct extent_list *list)
{
	while (list->count == list->count_max) {
		size_t kept = 0;

		list->gap_max = list->gap_max ? list->gap_max * 2 : GW_IMAGE_PAGE_LEN;
		for (size_t i = 1; i < list->count; i++) {
			struct gw_wire_extent *last = &list->extents[kept];
			const struct gw_wire_extent *next = &list->extents[i];

			if (next->offset - (last->offset + last->len) <= list->gap_max)
				last->len = next->offset + next->len - last->offset;
			else
				list->extents[++kept] = *next;
		}
		list->count = kept + 1;
	}
}

static void add_extent(struct extent_list *list, uint64_t offset, uint64_t len)
{
	if (list->count > 0) {
		struct gw_wire_extent *last = &list->extents[list->count - 1];

		if (list->count_max == 1 || offset - (last->offset + last->len) <= list->gap_max) {
			last->len = offset + len - last->offset;
			return;
		}
	}
	if (list->count == list->count_max)
		thin_out(list);
	list->extents[list->count++] = (struct gw_wire_extent){.offset = offset, .len = len};
}

static int add_region(struct extent_list *list, int fd, const struct placed_region *region)
{
	const uint64_t end = region->file_offset + region->len;
	uint64_t at = region->file_offset;

	while (at < end) {
		const int64_t data = seek_data(fd, at, end);
		off_t hole;
		uint64_t first;
		uint64_t last;

		if (data < 0)
			return (int)data;
		if ((uint64_t)data == end)
			break;
		hole = gw_sys_lseek(fd, (off_t)data, SEEK_HOLE);
		if (hole == -EINVAL)
			hole = (off_t)end;
		if (hole < 0)
			return -ENODATA;
		/* To whole pages, outwards. */
		first = (uint64_t)data / GW_IMAGE_PAGE_LEN * GW_IMAGE_PAGE_LEN;
		last = (min_u64((uint64_t)hole, end) + GW_IMAGE_PAGE_LEN - 1) / GW_IMAGE_PAGE_LEN *
		       GW_IMAGE_PAGE_LEN;
		add_extent(list, region->offset + (first - region->file_offset), last - first);
		at = last;
	}
	return 0;
}

int64_t gw_image_extents(const struct gw_image *image, size_t count_max,
			 struct gw_wire_extent **ret_extents)
{
	struct extent_list list = {.count_max = count_max};
	int err = 0;
	int fd;

	if (count_max == 0)
		return -EINVAL;
	/* Its own description: SEEK_HOLE walks all pages of a full memory, and holds the lock of
	 * the file position meanwhile, where gw_image_hole_len of other threads would wait. */
	fd = open_anew(image->fd);
	if (fd < 0)
		return fd;
	list.extents = calloc(count_max, sizeof(*list.extents));
	if (!list.extents) {
		gw_sys_close(fd);
		return -ENOMEM;
	}
	for (uint32_t i = 0; i < image->record.region_count && !err; i++)
		err = add_region(&list, fd, &image->regions[i]);
	gw_sys_close(fd);
	if (err) {
		free(list.extents);
		return err;
	}
	*ret_extents = list.extents;
	return (int64_t)list.count;
}

bool gw_bytes_are_zero(const void *data, size_t len)
{
	static const uint8_t zeros[64];
	const uint8_t *at = data;

	/* What is not zero mostly differs at once; the rest is libc's memcmp with itself, shifted. */
	if (len <= sizeof(zeros))
		return memcmp(at, zeros, len) == 0;
	return memcmp(at, zeros, sizeof(zeros)) == 0 &&
	       memcmp(at, at + sizeof(zeros), len - sizeof(zeros)) == 0;
}
