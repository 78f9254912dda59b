/* SPDX-License-Identifier: Apache-2.0 */
/*
 * install_adopt.c - before the first page: an empty memory, or a predecessor's.
 *
 * Threads, Errors, Ownership, Units, Source: see install.h.
 *
 * Adoption may be killed and begun again: each page is moved by itself, and every row of the
 * table in install.h, applied to its own result, gives that result again.
 */
#include <godwit/install.h>

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <godwit/sys.h>
#include <godwit/uffd.h>

#define PAGE_SIZE_SMALL UINT32_C(4096)
#define PAGE_SIZE_HUGE	(UINT32_C(2) << 20)

static uint64_t total_len(const struct gw_install *install)
{
	return gw_page_map_page_count(install->map) * install->page_size;
}

static int map_huge(struct gw_install *install)
{
	void *address = NULL;
	int err = gw_sys_mmap(NULL, install->page_size, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1,
			      0, &address);

	if (err < 0)
		return err;
	install->zeros = address;
	if (install->method != GW_INSTALL_CONTINUE)
		return 0;
	err = gw_sys_mmap(NULL, total_len(install), PROT_READ | PROT_WRITE, MAP_SHARED,
			  install->ram_fd, 0, &address);
	if (err == 0)
		install->alias = address;
	return err;
}

static bool method_is_possible(uint32_t method, uint32_t page_size, uint32_t uffd_count)
{
	switch (method) {
	case GW_INSTALL_COPY:
	case GW_INSTALL_CONTINUE:
		return uffd_count >= 1 && uffd_count <= GW_ARRIVAL_UFFD_COUNT_MAX;
	case GW_INSTALL_WRITE:
		return uffd_count == 0 && page_size == PAGE_SIZE_SMALL;
	default:
		return false;
	}
}

int gw_install_init(struct gw_install *install, const int *uffds, uint32_t uffd_count, int ram_fd,
		    uint32_t page_size, uint32_t method, struct gw_page_map *map,
		    const struct gw_arrival_region *regions, uint32_t region_count)
{
	uint64_t offset = 0;
	int err = 0;

	memset(install, 0, sizeof(*install));
	if ((page_size != PAGE_SIZE_SMALL && page_size != PAGE_SIZE_HUGE) ||
	    !method_is_possible(method, page_size, uffd_count) || region_count == 0 ||
	    region_count > GW_ARRIVAL_REGION_COUNT_MAX)
		return -EINVAL;
	for (uint32_t i = 0; i < region_count; i++) {
		const struct gw_arrival_region *const region = &regions[i];

		if (region->offset != offset || region->len == 0 || region->host_addr == 0 ||
		    (region->uffd_index > 0 && region->uffd_index >= uffd_count) ||
		    region->len % page_size != 0 || region->host_addr % page_size != 0)
			return -EINVAL;
		install->regions[i].first_page = offset / page_size;
		install->regions[i].page_count = region->len / page_size;
		install->regions[i].host_addr = region->host_addr;
		install->regions[i].uffd = uffd_count > 0 ? uffds[region->uffd_index] : -1;
		offset += region->len;
	}
	if (offset != gw_page_map_page_count(map) * page_size)
		return -EINVAL;
	install->ram_fd = ram_fd;
	install->page_size = page_size;
	install->method = method;
	install->region_count = region_count;
	install->map = map;
	if (page_size == PAGE_SIZE_HUGE)
		err = map_huge(install);
	if (err < 0)
		gw_install_fini(install);
	return err;
}

void gw_install_fini(struct gw_install *install)
{
	if (install->zeros)
		(void)gw_sys_munmap(install->zeros, install->page_size);
	if (install->alias)
		(void)gw_sys_munmap(install->alias, total_len(install));
	install->zeros = NULL;
	install->alias = NULL;
}

int gw_install_check_empty(const struct gw_install *install)
{
	struct stat stat;
	const int err = gw_sys_fstat(install->ram_fd, &stat);

	if (err < 0)
		return err;
	if ((uint64_t)stat.st_size < total_len(install))
		return -EINVAL;
	/* Blocks and not SEEK_DATA alone: what fallocate(2) prepared is no data yet, but it is there. */
	if (stat.st_blocks > 0)
		return -ENOTEMPTY;
	if (install->page_size == PAGE_SIZE_HUGE)
		return 0;
	const off_t data = gw_sys_lseek(install->ram_fd, 0, SEEK_DATA);

	if (data == -ENXIO)
		return 0;
	return data < 0 ? (int)data : -ENOTEMPTY;
}

/* Where the page cache has data, walked in ascending order. */
struct data_cursor {
	uint64_t first; /* of the extent at or after the page last asked for */
	uint64_t end;
};

static int has_data_small(const struct gw_install *install, struct data_cursor *cursor,
			  uint64_t page)
{
	if (page >= cursor->end) {
		const off_t at = (off_t)(page * install->page_size);
		const off_t data = gw_sys_lseek(install->ram_fd, at, SEEK_DATA);

		if (data == -ENXIO) {
			cursor->first = UINT64_MAX;
			cursor->end = UINT64_MAX;
			return 0;
		}
		if (data < 0)
			return (int)data;
		const off_t hole = gw_sys_lseek(install->ram_fd, data, SEEK_HOLE);

		if (hole < 0)
			return (int)hole;
		cursor->first = (uint64_t)data / install->page_size;
		cursor->end = (uint64_t)hole / install->page_size;
	}
	return page >= cursor->first;
}

/*
 * hugetlbfs has no SEEK_DATA. CONTINUE asks the same without harm: it maps a page that is in
 * the page cache, whole since COPY shows no other, and makes none.
 */
static int has_data_huge(const struct gw_install *install, uint64_t page,
			 const struct gw_install_again *again)
{
	uint64_t address = 0;
	uint64_t done = 0;
	int uffd = -1;

	if (!gw_install_host_addr(install, page, &uffd, &address))
		return -EINVAL;
	for (;;) {
		const int answer = gw_uffd_continue(uffd, address, install->page_size, &done);

		if (answer == GW_UFFD_NO_PAGE)
			return 0;
		if (answer == GW_UFFD_DONE || answer == GW_UFFD_EXISTS)
			return 1;
		if (answer == GW_UFFD_GONE)
			return -ESRCH;
		if (answer == GW_UFFD_NO_SPACE)
			return -ENOMEM;
		if (answer == GW_UFFD_NOT_REGISTERED)
			return -ENXIO; /* not ENOENT: there is something to adopt */
		if (answer != GW_UFFD_AGAIN)
			return answer < 0 ? answer : -EIO;
		if (again->on_again(again->user) < 0)
			return -ECANCELED;
	}
}

static int has_data(const struct gw_install *install, struct data_cursor *cursor, uint64_t page,
		    uint8_t state, const struct gw_install_again *again)
{
	if (install->page_size != PAGE_SIZE_HUGE)
		return has_data_small(install, cursor, page);
	/* Half filled perhaps: it must not be shown, and is punched whatever there is. */
	if (install->method == GW_INSTALL_CONTINUE && state == GW_PAGE_INSTALLING)
		return 1;
	return has_data_huge(install, page, again);
}

/* The state that a page is to have, given what was found; 0 = violation; -errno. */
static int settle(const struct gw_install *install, uint64_t page, uint8_t state, bool data,
		  const struct gw_install_again *again)
{
	int found;

	switch (state) {
	case GW_PAGE_ABSENT:
	case GW_PAGE_REQUESTED_BULK:
	case GW_PAGE_REQUESTED_DEMAND:
		return data ? 0 : GW_PAGE_ABSENT;
	case GW_PAGE_INSTALLING:
		if (!data)
			return GW_PAGE_ABSENT;
		if (install->method == GW_INSTALL_COPY)
			return GW_PAGE_PRESENT;
		found = gw_sys_fallocate(install->ram_fd,
					 FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
					 (off_t)(page * install->page_size),
					 (off_t)install->page_size);
		return found < 0 ? found : GW_PAGE_ABSENT;
	case GW_PAGE_FILLED:
		if (install->method != GW_INSTALL_CONTINUE)
			return 0;
		/* What is a question there is meant here: map it. 0: removed since we looked. */
		found = data ? has_data_huge(install, page, again) : 0;
		return found < 0 ? found : found ? GW_PAGE_PRESENT : GW_PAGE_REMOVED;
	case GW_PAGE_PRESENT:
		return data ? GW_PAGE_PRESENT : GW_PAGE_REMOVED;
	case GW_PAGE_ZERO:
		return data ? GW_PAGE_PRESENT : GW_PAGE_ZERO;
	case GW_PAGE_REMOVED:
	case GW_PAGE_POISONED:
		return state;
	default:
		return 0;
	}
}

/* What was installed by one who died before it was counted: bulk, for want of better knowledge. */
static void count_uncounted(struct gw_page_map *map, uint64_t settled_count)
{
	const uint64_t counted = gw_page_map_counter(map, GW_COUNT_DEMAND_PAGE) +
				 gw_page_map_counter(map, GW_COUNT_BULK_PAGE) +
				 gw_page_map_counter(map, GW_COUNT_ZERO_PAGE) +
				 gw_page_map_counter(map, GW_COUNT_REMOVED_PAGE);

	if (counted < settled_count)
		gw_page_map_count(map, GW_COUNT_BULK_PAGE, settled_count - counted);
}

int gw_install_adopt(struct gw_install *install, const struct gw_install_again *again)
{
	struct gw_page_map *const map = install->map;
	const uint64_t page_count = gw_page_map_page_count(map);
	struct data_cursor cursor = {0};
	uint64_t settled_count = 0;

	for (uint64_t page = 0; page < page_count; page++) {
		const uint8_t state = gw_page_map_get(map, page);
		const int found = has_data(install, &cursor, page, state, again);

		if (found < 0)
			return found;
		const int wanted = settle(install, page, state, found != 0, again);

		if (wanted < 0)
			return wanted;
		if (wanted == 0) {
			gw_install_violate(install);
			return -ENOTEMPTY;
		}
		if (wanted != state) {
			(void)gw_page_map_move(map, page, state, (uint8_t)wanted);
			if (wanted == GW_PAGE_REMOVED)
				gw_page_map_count(map, GW_COUNT_REMOVED_PAGE, 1);
		}
		/* A settled state may have its bit set, never the other way round: repaired all the same. */
		if (gw_page_state_is_final((uint8_t)wanted)) {
			gw_install_publish(install, page, 1);
			settled_count++;
		} else {
			gw_bitmap_mark_absent(gw_page_map_bitmap(map), page, 1);
		}
	}
	count_uncounted(map, settled_count);
	return 0;
}
