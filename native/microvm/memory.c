/* SPDX-License-Identifier: Apache-2.0 */
/*
 * memory.c - see memory.h.
 *
 * Threads, Errors, Ownership, Units, Source: see memory.h.
 */
#include "memory.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "guest/layout.h"

#ifndef MFD_HUGE_2MB
#define MFD_HUGE_2MB (21u << 26)
#endif

static int open_memfd(bool huge, struct mv_error *error)
{
	const unsigned int flags = MFD_CLOEXEC | (huge ? MFD_HUGETLB | MFD_HUGE_2MB : 0u);
	const int fd = memfd_create("godwit-microvm", flags);

	return fd >= 0 ? fd : mv_refuse_errno(error, -errno, "memfd_create");
}

/*
 * An open-file-description lock: it goes with the last descriptor, also after kill -9, and no other
 * descriptor of the same process can drop it by being closed, as with a POSIX lock.
 */
static int lock_file(int fd, const char *path, struct mv_error *error)
{
	struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};

	if (fcntl(fd, F_OFD_SETLK, &lock) == 0)
		return 0;
	if (errno == EAGAIN || errno == EACCES)
		return mv_refuse(error, -EBUSY, "%s: another process runs a guest on it", path);
	return mv_refuse_errno(error, -errno, "%s: lock", path);
}

static int check_file(int fd, const struct mv_memory_config *config, struct mv_error *error)
{
	struct stat status;
	struct statfs fs;

	if (fstat(fd, &status) < 0 || fstatfs(fd, &fs) < 0)
		return mv_refuse_errno(error, -errno, "%s", config->path);
	if (!S_ISREG(status.st_mode))
		return mv_refuse(error, -EINVAL, "%s: not a regular file", config->path);
	if ((fs.f_type == HUGETLBFS_MAGIC) != config->huge)
		return mv_refuse(error, -EINVAL, "%s: %s", config->path,
				 config->huge ? "--huge-pages needs a file in hugetlbfs"
					      : "in hugetlbfs, which needs --huge-pages");
	if (config->huge && (uint64_t)fs.f_bsize != GM_HUGE_PAGE_SIZE)
		return mv_refuse(error, -EINVAL,
				 "%s: hugetlbfs with pages of %llu bytes, not 2 MiB", config->path,
				 (unsigned long long)fs.f_bsize);
	if (status.st_size == 0)
		return 0;
	if (!config->incoming)
		return mv_refuse(error, -EEXIST,
				 "%s: has data already; only --incoming takes a file over",
				 config->path);
	if ((uint64_t)status.st_size != config->size)
		return mv_refuse(error, -EEXIST, "%s: has %llu bytes, --memory says %llu",
				 config->path, (unsigned long long)status.st_size,
				 (unsigned long long)config->size);
	return 0;
}

static int open_file(const struct mv_memory_config *config, struct mv_error *error)
{
	const int fd = open(config->path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
	int rc;

	if (fd < 0)
		return mv_refuse_errno(error, -errno, "%s", config->path);
	/* Locked before it is looked at: what is seen stays so. */
	rc = lock_file(fd, config->path, error);
	if (rc == 0)
		rc = check_file(fd, config, error);
	if (rc < 0) {
		close(fd);
		return rc;
	}
	return fd;
}

static int check_config(const struct mv_memory_config *config, struct mv_error *error)
{
	if (config->size < GM_MEMORY_BYTES_MIN || config->size > GM_MEMORY_BYTES_MAX)
		return mv_refuse(error, -EINVAL, "memory is 64 MiB to 254 GiB, not %llu bytes",
				 (unsigned long long)config->size);
	if (config->size % GM_HUGE_PAGE_SIZE != 0)
		return mv_refuse(error, -EINVAL, "memory is a multiple of 2 MiB, not %llu bytes",
				 (unsigned long long)config->size);
	return 0;
}

static void set_slots(struct mv_memory *memory)
{
	const uint64_t low = memory->size < GM_HOLE_START ? memory->size : GM_HOLE_START;

	memory->slots[0] = (struct mv_memory_slot){.gpa = 0, .size = GM_SYSTEM_SIZE, .offset = 0};
	memory->slots[1] = (struct mv_memory_slot){
		.gpa = GM_SYSTEM_SIZE, .size = low - GM_SYSTEM_SIZE, .offset = GM_SYSTEM_SIZE};
	memory->slot_count = 2;
	if (memory->size > low) {
		memory->slots[2] = (struct mv_memory_slot){
			.gpa = GM_HOLE_END, .size = memory->size - low, .offset = low};
		memory->slot_count = 3;
	}
}

static int map(const struct mv_memory *memory, int protection, uint8_t **ret_base,
	       struct mv_error *error)
{
	void *base;
	/*
	 * A hugetlb mapping reserves its pages here, or fails here; without the reservation a guest
	 * would die of SIGBUS later. Of small pages there are to be no reservations: most are absent.
	 */
	const int reserve = memory->page_size == GM_HUGE_PAGE_SIZE ? 0 : MAP_NORESERVE;

	base = mmap(NULL, memory->size, protection, MAP_SHARED | reserve, memory->fd, 0);
	if (base == MAP_FAILED)
		return mv_refuse_errno(error, -errno, "map %llu bytes of guest memory%s",
				       (unsigned long long)memory->size,
				       reserve ? "" : " in huge pages (vm.nr_hugepages)");
	/* A core dump must not page the guest in, and no child may write to it. */
	(void)madvise(base, memory->size, MADV_DONTDUMP);
	(void)madvise(base, memory->size, MADV_DONTFORK);
	*ret_base = base;
	return 0;
}

int mv_memory_map_guest(struct mv_memory *memory, int protection, struct mv_error *error)
{
	return map(memory, protection, &memory->guest, error);
}

bool mv_memory_offset(const struct mv_memory *memory, uint64_t gpa, uint64_t *ret_offset)
{
	for (uint32_t i = 0; i < memory->slot_count; i++) {
		const struct mv_memory_slot *slot = &memory->slots[i];

		if (gpa - slot->gpa < slot->size) {
			*ret_offset = slot->offset + (gpa - slot->gpa);
			return true;
		}
	}
	return false;
}

uint64_t mv_memory_gpa(const struct mv_memory *memory, uint64_t offset)
{
	const struct mv_memory_slot *slot = &memory->slots[memory->slot_count - 1];

	while (offset < slot->offset)
		slot--;
	return slot->gpa + (offset - slot->offset);
}

int mv_memory_create(const struct mv_memory_config *config, struct mv_memory *ret_memory,
		     struct mv_error *error)
{
	struct mv_memory memory = {
		.fd = -1,
		.size = config->size,
		.page_size = config->huge ? GM_HUGE_PAGE_SIZE : GM_PAGE_SIZE,
	};
	int rc = check_config(config, error);

	if (rc < 0)
		return rc;
	memory.fd = config->path ? open_file(config, error) : open_memfd(config->huge, error);
	if (memory.fd < 0)
		return memory.fd;
	if (ftruncate(memory.fd, (off_t)config->size) < 0)
		rc = mv_refuse_errno(error, -errno, "make guest memory %llu bytes long",
				     (unsigned long long)config->size);
	if (rc == 0)
		rc = map(&memory, PROT_READ | PROT_WRITE, &memory.base, error);
	memory.guest = memory.base;
	if (rc < 0) {
		mv_memory_destroy(&memory);
		return rc;
	}
	set_slots(&memory);
	*ret_memory = memory;
	return 0;
}

void mv_memory_destroy(struct mv_memory *memory)
{
	if (memory->guest && memory->guest != memory->base)
		munmap(memory->guest, memory->size);
	if (memory->base)
		munmap(memory->base, memory->size);
	if (memory->fd >= 0)
		close(memory->fd);
	*memory = (struct mv_memory){.fd = -1};
}
