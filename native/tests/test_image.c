/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_image.c - the memory of an image is read as it is: holes stay holes, a file that is
 * cut short is an error and not a signal, and nothing outside a region is reachable.
 */
#include "check.h"

#include <godwit/image.h>
#include <godwit/sys.h>

#include <errno.h>
#include <linux/memfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define PAGE 4096ul
#define MIB  (1ul << 20)

static int new_memory(size_t len)
{
	const int fd = memfd_create("test-image", MFD_CLOEXEC);

	CHECK(fd >= 0);
	CHECK_EQ(ftruncate(fd, (off_t)len), 0);
	return fd;
}

static void fill(int fd, uint64_t offset, size_t len, uint8_t byte)
{
	uint8_t page[PAGE];

	memset(page, byte, sizeof(page));
	for (size_t done = 0; done < len; done += sizeof(page))
		CHECK_EQ(pwrite(fd, page, sizeof(page), (off_t)(offset + done)), sizeof(page));
}

static uint64_t blocks_of(int fd)
{
	struct stat file;

	CHECK_EQ(fstat(fd, &file), 0);
	return (uint64_t)file.st_blocks;
}

static struct gw_serve_image record_of(int fd, const struct gw_serve_region *regions,
				       uint32_t region_count)
{
	return (struct gw_serve_image){.struct_size = sizeof(struct gw_serve_image),
				       .ram_fd = fd,
				       .image_id = "img-1",
				       .vm_id = "vm",
				       .boot_id = "",
				       .epoch = 1,
				       .generation = 1,
				       .state = GW_IMAGE_FROZEN,
				       .region_count = region_count,
				       .regions = regions};
}

static struct gw_image *open_whole(int fd, uint64_t len)
{
	const struct gw_serve_region region = {.size = len, .page_size = 4096};
	const struct gw_serve_image record = record_of(fd, &region, 1);
	struct gw_image *image;

	CHECK_EQ(gw_image_create(&record, &image), 0);
	return image;
}

static void reading_never_inflates_the_source(void)
{
	const int fd = new_memory(64 * MIB);
	struct gw_image *image = open_whole(fd, 64 * MIB);
	struct gw_wire_extent *extents;
	uint8_t *data = aligned_alloc(PAGE, MIB);
	uint64_t blocks;

	CHECK(data);
	fill(fd, 8 * MIB, MIB, 1);
	fill(fd, 33 * MIB + 3 * PAGE, PAGE, 2);
	blocks = blocks_of(fd);
	CHECK(blocks >= (MIB + PAGE) / 512);
	for (uint64_t offset = 0; offset < 64 * MIB; offset += MIB) {
		CHECK(gw_image_hole_len(image, offset, MIB) >= 0);
		CHECK_EQ(gw_image_read(image, offset, data, MIB), 0);
		CHECK_EQ(data[3 * PAGE], offset == 8 * MIB ? 1 : offset == 33 * MIB ? 2 : 0);
	}
	CHECK_EQ(gw_image_extents(image, 100, &extents), 2);
	CHECK(extents[0].offset == 8 * MIB && extents[0].len == MIB);
	CHECK(extents[1].offset == 33 * MIB + 3 * PAGE && extents[1].len == PAGE);
	CHECK_EQ(blocks_of(fd), blocks);
	free(extents);
	free(data);
	gw_image_unref(image);
	close(fd);
}

static void holes_are_measured_from_the_start(void)
{
	const int fd = new_memory(16 * PAGE);
	struct gw_image *image = open_whole(fd, 16 * PAGE);

	CHECK_EQ(gw_image_hole_len(image, 0, 16 * PAGE), 16 * PAGE);
	fill(fd, 5 * PAGE, PAGE, 1);
	CHECK_EQ(gw_image_hole_len(image, 0, 16 * PAGE), 5 * PAGE);
	CHECK_EQ(gw_image_hole_len(image, 0, 3 * PAGE), 3 * PAGE);
	CHECK_EQ(gw_image_hole_len(image, 0, 5 * PAGE), 5 * PAGE);
	CHECK_EQ(gw_image_hole_len(image, 5 * PAGE, 11 * PAGE), 0);
	CHECK_EQ(gw_image_hole_len(image, 6 * PAGE, 10 * PAGE), 10 * PAGE);
	gw_image_unref(image);
	close(fd);
}

static void seeking_does_not_move_the_callers_position(void)
{
	const int fd = new_memory(4 * MIB);
	struct gw_image *image = open_whole(fd, 4 * MIB);
	struct gw_wire_extent *extents;

	CHECK_EQ(lseek(fd, 12345, SEEK_SET), 12345);
	fill(fd, MIB, PAGE, 1);
	CHECK_EQ(gw_image_hole_len(image, 0, MIB), MIB);
	CHECK_EQ(gw_image_extents(image, 4, &extents), 1);
	CHECK_EQ(lseek(fd, 0, SEEK_CUR), 12345);
	free(extents);
	gw_image_unref(image);
	close(fd);
}

/* Two regions, the second before the first in the file, with file bytes that belong to neither. */
static void regions_are_laid_end_to_end(void)
{
	static const struct gw_serve_region regions[] = {
		{.gpa = 0, .size = 4 * PAGE, .file_offset = 20 * PAGE, .page_size = 4096},
		{.gpa = 1u << 30, .size = 3 * PAGE, .file_offset = 2 * PAGE, .page_size = 4096},
	};
	const int fd = new_memory(64 * PAGE);
	const struct gw_serve_image record = record_of(fd, regions, 2);
	struct gw_wire_extent *extents;
	struct gw_image *image;
	uint8_t data[4 * PAGE];

	CHECK_EQ(gw_image_create(&record, &image), 0);
	CHECK_EQ(gw_image_size(image), 7 * PAGE);
	CHECK_EQ(gw_image_record(image)->region_count, 2);
	CHECK_EQ(gw_image_record(image)->regions[1].region_id, 1);
	for (uint64_t page = 0; page < 64; page++)
		if (page != 21 && page != 22)
			fill(fd, page * PAGE, PAGE, (uint8_t)(page + 1));
	/* Across the seam: region 0 page 3, region 1 pages 0 and 1. */
	CHECK_EQ(gw_image_read(image, 3 * PAGE, data, 3 * PAGE), 0);
	CHECK_EQ(data[0], 24);
	CHECK_EQ(data[PAGE], 3);
	CHECK_EQ(data[2 * PAGE], 4);
	CHECK_EQ(gw_image_hole_len(image, PAGE, 6 * PAGE), 2 * PAGE);
	CHECK_EQ(gw_image_extents(image, 10, &extents), 2);
	CHECK(extents[0].offset == 0 && extents[0].len == PAGE);
	CHECK(extents[1].offset == 3 * PAGE && extents[1].len == 4 * PAGE);
	free(extents);
	CHECK_EQ(gw_image_read(image, 7 * PAGE, data, PAGE), -ERANGE);
	CHECK_EQ(gw_image_read(image, 6 * PAGE, data, 2 * PAGE), -ERANGE);
	CHECK_EQ(gw_image_read(image, UINT64_MAX, data, PAGE), -ERANGE);
	gw_image_unref(image);
	close(fd);
}

/* A hole across the seam of two regions is one. */
static void holes_go_on_across_regions(void)
{
	static const struct gw_serve_region regions[] = {
		{.gpa = 0, .size = 4 * PAGE, .file_offset = 0, .page_size = 4096},
		{.gpa = 1u << 30, .size = 4 * PAGE, .file_offset = 8 * PAGE, .page_size = 4096},
	};
	const int fd = new_memory(12 * PAGE);
	const struct gw_serve_image record = record_of(fd, regions, 2);
	struct gw_image *image;

	CHECK_EQ(gw_image_create(&record, &image), 0);
	fill(fd, 5 * PAGE, PAGE, 9); /* of neither */
	CHECK_EQ(gw_image_hole_len(image, 0, 8 * PAGE), 8 * PAGE);
	fill(fd, 10 * PAGE, PAGE, 9);
	CHECK_EQ(gw_image_hole_len(image, PAGE, 7 * PAGE), 5 * PAGE);
	gw_image_unref(image);
	close(fd);
}

static void a_file_cut_short_is_an_error_not_a_signal(void)
{
	const int fd = new_memory(4 * MIB);
	struct gw_image *image = open_whole(fd, 4 * MIB);
	struct gw_wire_extent *extents = NULL;
	uint8_t data[2 * PAGE];

	fill(fd, 0, 4 * MIB, 1);
	CHECK_EQ(ftruncate(fd, MIB + PAGE), 0);
	CHECK_EQ(gw_image_read(image, 0, data, sizeof(data)), 0);
	CHECK_EQ(gw_image_read(image, MIB, data, PAGE), 0);
	CHECK_EQ(gw_image_read(image, MIB, data, 2 * PAGE), -ENODATA);
	CHECK_EQ(gw_image_read(image, 3 * MIB, data, PAGE), -ENODATA);
	CHECK_EQ(gw_image_hole_len(image, 3 * MIB, PAGE), -ENODATA);
	CHECK_EQ(gw_image_extents(image, 4, &extents), -ENODATA);
	CHECK(!extents);
	/* Grown again, what was cut is lost: it is a hole now, and only the generation can tell. */
	gw_image_unref(image);
	close(fd);
}

static void extents_are_thinned_out_towards_data(void)
{
	const int fd = new_memory(256 * PAGE);
	struct gw_image *image = open_whole(fd, 256 * PAGE);

	/* Odd pages in the first half, then a long hole, then one page. */
	for (uint64_t page = 1; page < 128; page += 2)
		fill(fd, page * PAGE, PAGE, 1);
	fill(fd, 250 * PAGE, PAGE, 1);
	for (size_t count_max = 1; count_max < 70; count_max++) {
		struct gw_wire_extent *extents;
		const int64_t count = gw_image_extents(image, count_max, &extents);

		CHECK(count >= 1 && (size_t)count <= count_max);
		if (count_max >= 65)
			CHECK_EQ(count, 65);
		for (uint64_t page = 0; page < 256; page++) {
			const bool is_data = (page < 128 && page % 2 == 1) || page == 250;
			bool covered = false;

			for (int64_t i = 0; i < count; i++)
				covered |= page * PAGE >= extents[i].offset &&
					   page * PAGE < extents[i].offset + extents[i].len;
			CHECK(covered || !is_data);
			/* Exact where there is room, and the long hole survives where two fit. */
			if (count_max >= 65 || (count_max >= 2 && page > 130 && page < 250))
				CHECK(covered == is_data);
		}
		for (int64_t i = 1; i < count; i++)
			CHECK(extents[i].offset > extents[i - 1].offset + extents[i - 1].len);
		free(extents);
	}
	gw_image_unref(image);
	close(fd);
}

/* hugetlbfs knows no holes, reads zeros where it has none, and must not allocate for that. */
static void huge_pages_are_read_without_being_made(void)
{
	const size_t huge_len = 2 * MIB;
	const struct gw_serve_region region = {.size = 2 * huge_len, .page_size = 2u << 20};
	const int fd = memfd_create("test-huge", MFD_CLOEXEC | MFD_HUGETLB | MFD_HUGE_2MB);
	struct gw_serve_image record;
	struct gw_image *image;
	uint8_t *data = aligned_alloc(PAGE, MIB);
	uint8_t *memory = MAP_FAILED;
	uint64_t blocks;

	CHECK(data);
	if (fd >= 0 && ftruncate(fd, (off_t)(2 * huge_len)) == 0)
		memory = mmap(NULL, huge_len, PROT_READ | PROT_WRITE, MAP_SHARED, fd,
			      (off_t)huge_len);
	if (memory == MAP_FAILED) {
		fprintf(stderr, "  not run: needs a free huge page, sysctl vm.nr_hugepages=1\n");
	} else {
		memset(memory, 7, huge_len);
		blocks = blocks_of(fd);
		record = record_of(fd, &region, 1);
		CHECK_EQ(gw_image_create(&record, &image), 0);
		CHECK(gw_image_hole_len(image, 0, MIB) >= 0);
		CHECK_EQ(gw_image_read(image, MIB, data, MIB), 0);
		CHECK(gw_bytes_are_zero(data, MIB));
		CHECK_EQ(gw_image_read(image, 3 * MIB, data, MIB), 0);
		CHECK(data[0] == 7 && data[MIB - 1] == 7);
		CHECK_EQ(blocks_of(fd), blocks);
		gw_image_unref(image);
		munmap(memory, huge_len);
	}
	free(data);
	if (fd >= 0)
		close(fd);
}

static void bad_records_are_refused(void)
{
	const struct gw_serve_region good = {.size = 4 * PAGE, .page_size = 4096};
	const int fd = new_memory(16 * PAGE);
	struct gw_serve_region region;
	struct gw_image *image = NULL;
	struct gw_serve_image record;
	char long_id[140];

	memset(long_id, 'a', sizeof(long_id) - 1);
	long_id[sizeof(long_id) - 1] = '\0';
#define REFUSED(field, value, want)                               \
	do {                                                      \
		region = good;                                    \
		record = record_of(fd, &region, 1);               \
		field = value;                                    \
		CHECK_EQ(gw_image_create(&record, &image), want); \
		CHECK(!image);                                    \
	} while (0)
	REFUSED(record.struct_size, 8, -EINVAL);
	REFUSED(record.ram_fd, -1, -EBADF);
	REFUSED(record.ram_fd, 1000000, -EBADF);
	REFUSED(record.image_id, NULL, -EINVAL);
	REFUSED(record.image_id, "", -EINVAL);
	REFUSED(record.image_id, "a/b", -EINVAL);
	REFUSED(record.image_id, long_id, -EINVAL);
	REFUSED(record.vm_id, "\xff", -EINVAL);
	REFUSED(record.epoch, 0, -EINVAL);
	REFUSED(record.generation, 0, -EINVAL);
	REFUSED(record.state, 0, -EINVAL);
	REFUSED(record.state, 3, -EINVAL);
	REFUSED(record.inode, 1, -EINVAL);
	REFUSED(record.region_count, 0, -EINVAL);
	REFUSED(record.region_count, GW_SERVE_REGION_COUNT_MAX + 1, -EINVAL);
	REFUSED(record.regions, NULL, -EINVAL);
	REFUSED(region.size, 0, -EINVAL);
	REFUSED(region.size, 100, -EINVAL);
	REFUSED(region.page_size, 8192, -EINVAL);
	REFUSED(region.page_size, 2u << 20, -EINVAL);
	REFUSED(region.gpa, 5, -EINVAL);
	REFUSED(region.gpa, UINT64_MAX - PAGE + 1, -EINVAL);
	REFUSED(region.file_offset, 100, -EINVAL);
	REFUSED(region.file_offset, 13 * PAGE, -EOVERFLOW);
	REFUSED(region.file_offset, UINT64_MAX - PAGE + 1, -EOVERFLOW);
	REFUSED(region.size, 1ull << 62, -EOVERFLOW);
#undef REFUSED
	const struct gw_serve_region crossed[] = {
		{.gpa = 8 * PAGE, .size = PAGE, .page_size = 4096},
		{.gpa = 4 * PAGE, .size = PAGE, .page_size = 4096}};

	record = record_of(fd, crossed, 2);
	CHECK_EQ(gw_image_create(&record, &image), -EINVAL);
	gw_image_unref(NULL);
	close(fd);
}

static void failing_system_calls_are_told(void)
{
	const struct gw_serve_region region = {.size = 16 * PAGE, .page_size = 4096};
	const int fd = new_memory(16 * PAGE);
	const struct gw_serve_image record = record_of(fd, &region, 1);
	struct gw_wire_extent *extents;
	struct gw_image *image = NULL;
	uint8_t data[PAGE];

	/* Opening anew fails: the descriptor is shared. */
	gw_sys_fail_nth(GW_SYS_OPEN, 1, EACCES);
	CHECK_EQ(gw_image_create(&record, &image), 0);
	gw_image_unref(image);
	image = NULL;
	gw_sys_fail_nth(GW_SYS_FSTAT, 1, EIO);
	CHECK_EQ(gw_image_create(&record, &image), -EIO);
	CHECK(!image);

	CHECK_EQ(gw_image_create(&record, &image), 0);
	fill(fd, 0, 16 * PAGE, 7);
	gw_sys_fail_nth(GW_SYS_PREAD, 1, EINTR);
	CHECK_EQ(gw_image_read(image, 0, data, PAGE), 0);
	gw_sys_fail_nth(GW_SYS_PREAD, 1, EIO);
	CHECK_EQ(gw_image_read(image, 0, data, PAGE), -ENODATA);
	gw_sys_fail_nth(GW_SYS_PREAD, 1, ENOMEM);
	CHECK_EQ(gw_image_read(image, 0, data, PAGE), -ENOMEM);
	CHECK_EQ(gw_image_read(image, 0, data, PAGE), 0);
	/* A file system without holes: all is data. */
	gw_sys_fail_from(GW_SYS_LSEEK, 1, EINVAL);
	CHECK_EQ(gw_image_hole_len(image, 0, PAGE), 0);
	CHECK_EQ(gw_image_extents(image, 4, &extents), 1);
	CHECK(extents[0].offset == 0 && extents[0].len == 16 * PAGE);
	free(extents);
	gw_sys_fail_from(GW_SYS_LSEEK, 1, EIO);
	CHECK_EQ(gw_image_hole_len(image, 0, PAGE), -ENODATA);
	CHECK_EQ(gw_image_extents(image, 4, &extents), -ENODATA);
	gw_sys_fail_none();
	gw_image_unref(image);
	close(fd);
}

static void zeros_are_told_from_nearly_zeros(void)
{
	static const size_t lens[] = {1, 63, 64, 65, 128, 4096, 1u << 20};
	uint8_t *data = calloc(1, 1u << 20);

	CHECK(data);
	for (size_t i = 0; i < sizeof(lens) / sizeof(lens[0]); i++) {
		const size_t len = lens[i];
		const size_t step = len > 5000 ? 997 : 1;

		CHECK(gw_bytes_are_zero(data, len));
		for (size_t at = 0; at < len; at += step) {
			data[at] = 0x80;
			CHECK(!gw_bytes_are_zero(data, len));
			data[at] = 0;
		}
		data[len - 1] = 1;
		CHECK(!gw_bytes_are_zero(data, len));
		data[len - 1] = 0;
	}
	free(data);
}

int main(void)
{
	RUN(reading_never_inflates_the_source);
	RUN(holes_are_measured_from_the_start);
	RUN(seeking_does_not_move_the_callers_position);
	RUN(regions_are_laid_end_to_end);
	RUN(holes_go_on_across_regions);
	RUN(a_file_cut_short_is_an_error_not_a_signal);
	RUN(extents_are_thinned_out_towards_data);
	RUN(huge_pages_are_read_without_being_made);
	RUN(bad_records_are_refused);
	RUN(failing_system_calls_are_told);
	RUN(zeros_are_told_from_nearly_zeros);
	return EXIT_SUCCESS;
}
