/* SPDX-License-Identifier: Apache-2.0 */
/*
 * image.h - the memory of one image, read without changing it.
 *
 * Threads    An image never changes after create: any thread may read it. References are
 *            counted atomically.
 * Errors     0, a count, or -errno.
 * Ownership  create opens the memory anew and copies the record; the caller keeps its fd and
 *            strings. The last unref closes.
 * Units      Bytes; offsets are image offsets (regions laid end to end).
 * Source     lseek(2) SEEK_DATA, pread(2), tmpfs(5); common.proto; docs/design/wire.md.
 *
 * Memory is read with pread(2) into a buffer of the caller's, not through a mapping:
 *   - a mapping inflates the source: reading a hole of a shared mapping allocates the page;
 *     pread gives zeros and allocates nothing (tests/test_image.c, st_blocks);
 *   - a file cut short answers a mapping with SIGBUS, which kills the page server of every
 *     guest; pread answers with a short count, which is DATA_LOSS of one;
 *   - checksum and bytes agree, also while the guest runs on the memory, and when a record
 *     is replaced nothing of the memory is read later on behalf of the old one;
 *   - it costs next to nothing: each page is served about once, so through a mapping it is always a
 *     first touch (docs/adr/0006-pread.md has the figures).
 * Rejected with the mapping: fstat before each touch (races with the cut), sigsetjmp (a
 * library must not own the process's signals), sealing (the memory is the VMM's).
 */
#ifndef GW_IMAGE_H
#define GW_IMAGE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <godwit/page_wire.h>
#include <godwit/serve.h>

/* The unit of a want and of zero detection, whatever the page size of a region. */
#define GW_IMAGE_PAGE_LEN 4096ul

struct gw_image;

/*
 * Open the memory behind a record. The new image has one reference.
 *
 * Returns 0; -EINVAL a field is out of range, regions are not ascending and whole pages, or
 * the inode is another; -EBADF; -EOVERFLOW a region leaves the file; -ENOMEM; -errno.
 */
int gw_image_create(const struct gw_serve_image *record, struct gw_image **ret_image);
void gw_image_ref(struct gw_image *image);
/* NULL is a no-op. */
void gw_image_unref(struct gw_image *image);

const char *gw_image_id(const struct gw_image *image);
uint64_t gw_image_size(const struct gw_image *image);
/* Who may read it: gw_serve_image. */
struct gw_image_access {
	char destination[GW_TLS_NAME_LEN_MAX + 1]; /* "": any node */
	uint64_t destination_epoch;
	bool has_destination_key;
	bool has_token_key;
	uint8_t destination_key[GW_TLS_KEY_LEN];
	uint8_t token_key[GW_SERVE_TOKEN_KEY_LEN];
};

/* Borrowed. */
const struct gw_image_access *gw_image_access(const struct gw_image *image);
/* The record, as it is put on the wire. Borrowed. */
const struct gw_wire_image *gw_image_record(const struct gw_image *image);

/*
 * How much of [offset, offset + len) is a hole from its start on. The range is page
 * aligned and within the image. Where the file system cannot tell, nothing is a hole.
 *
 * Returns the bytes, 0..len; -ENODATA the memory cannot be read any more.
 */
int64_t gw_image_hole_len(const struct gw_image *image, uint64_t offset, uint64_t len);

/* Where the guest's page that holds `offset` begins, by its region's page size; the end stays. */
uint64_t gw_image_page_begin(const struct gw_image *image, uint64_t offset);

/*
 * Read exactly `len` bytes. Holes read as zeros and stay holes. `ret_data` should be page
 * aligned: see grpc_receive.c for what it costs if not.
 *
 * Returns 0; -ERANGE outside the image; -ENOMEM not now; -ENODATA the memory cannot be read any
 * more: it was cut short, or the medium failed.
 */
int gw_image_read(const struct gw_image *image, uint64_t offset, void *ret_data, size_t len);

/*
 * Where there is data, ascending and merged, in an array to free(3). At most `count_max`
 * extents: holes too short to matter are counted as data then, never the reverse.
 *
 * Returns how many; -ENODATA; -ENOMEM; -EINVAL count_max is 0.
 */
int64_t gw_image_extents(const struct gw_image *image, size_t count_max,
			 struct gw_wire_extent **ret_extents);

/* True if every byte is zero. Fast on what is not: it looks at the start first. */
bool gw_bytes_are_zero(const void *data, size_t len);

/* True if `id` is 1..len_max of [A-Za-z0-9._-]. */
bool gw_id_is_valid(const char *id, size_t len, size_t len_max);

#endif /* GW_IMAGE_H */
