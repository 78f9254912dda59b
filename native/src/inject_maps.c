/* SPDX-License-Identifier: Apache-2.0 */
/*
 * inject_maps.c - read what a process maps: /proc/PID/maps, a line at a time.
 *
 * Threads, Errors, Ownership, Units: see inject_internal.h. Source: proc_pid_maps(5).
 */
#include "inject_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

#include <godwit/sys.h>

#define LINE_LEN_MAX 4608 /* a path of PATH_MAX and what stands before it */

struct mapping {
	uint64_t start, end, offset, inode;
	unsigned int major, minor;
	char permissions[5];
	char name[64]; /* as much of it as tells "[vdso]" */
};

/* Called for each mapping; not 0 ends the walk and is its result. */
typedef int (*mapping_visitor)(const struct mapping *mapping, void *user);

static int visit_line(const char *line, mapping_visitor visit, void *user)
{
	struct mapping mapping = {0};
	const int fields =
		sscanf(line, "%" SCNx64 "-%" SCNx64 " %4s %" SCNx64 " %x:%x %" SCNu64 " %63[^\n]",
		       &mapping.start, &mapping.end, mapping.permissions, &mapping.offset,
		       &mapping.major, &mapping.minor, &mapping.inode, mapping.name);

	return fields >= 7 ? visit(&mapping, user) : 0;
}

static int walk_mappings(pid_t pid, mapping_visitor visit, void *user)
{
	char path[32];
	char buffer[LINE_LEN_MAX + 1];
	size_t len = 0;
	int result = 0;

	(void)snprintf(path, sizeof(path), "/proc/%d/maps", (int)pid);
	const int fd = gw_sys_open(path, O_RDONLY | O_CLOEXEC, 0);

	if (fd < 0)
		return fd == -ENOENT ? -ESRCH : fd;
	while (result == 0) {
		const ssize_t got = gw_sys_read(fd, buffer + len, LINE_LEN_MAX - len);
		char *line = buffer;
		char *end = NULL;

		if (got == -EINTR)
			continue;
		if (got <= 0) {
			result = (int)got;
			break;
		}
		len += (size_t)got;
		buffer[len] = '\0';
		while (result == 0 && (end = strchr(line, '\n')) != NULL) {
			*end = '\0';
			result = visit_line(line, visit, user);
			line = end + 1;
		}
		len -= (size_t)(line - buffer);
		memmove(buffer, line, len);
		if (len == LINE_LEN_MAX)
			result = -EMSGSIZE;
	}
	gw_sys_close(fd);
	return result;
}

struct range_search {
	struct gw_inject_result *result;
	struct stat file;
};

static int visit_range(const struct mapping *mapping, void *user)
{
	struct range_search *const search = user;
	struct gw_inject_result *const result = search->result;

	if (mapping->inode != search->file.st_ino || mapping->major != major(search->file.st_dev) ||
	    mapping->minor != minor(search->file.st_dev))
		return 0;
	if (mapping->permissions[1] != 'w' || mapping->permissions[3] != 's')
		return 0;
	if (result->range_count == GW_INJECT_RANGE_COUNT_MAX)
		return -E2BIG;
	result->ranges[result->range_count++] = (struct gw_inject_range){
		.host_addr = mapping->start,
		.len = mapping->end - mapping->start,
		.file_offset = mapping->offset,
	};
	return 0;
}

int gw_inject_find_ranges(pid_t pid, int ram_fd, struct gw_inject_result *result)
{
	struct range_search search = {.result = result};
	int err = gw_sys_fstat(ram_fd, &search.file);

	result->range_count = 0;
	if (err == 0)
		err = walk_mappings(pid, visit_range, &search);
	if (err < 0)
		return err;
	return result->range_count > 0 ? 0 : -ENXIO;
}

struct vdso_search {
	uint64_t start, end;
};

static int visit_vdso(const struct mapping *mapping, void *user)
{
	struct vdso_search *const search = user;

	if (strcmp(mapping->name, "[vdso]") != 0)
		return 0;
	search->start = mapping->start;
	search->end = mapping->end;
	return 1;
}

int gw_inject_find_vdso(pid_t pid, uint64_t *ret_start, uint64_t *ret_end)
{
	struct vdso_search search = {0};
	const int found = walk_mappings(pid, visit_vdso, &search);

	if (found <= 0)
		return found < 0 ? found : -ENOENT;
	*ret_start = search.start;
	*ret_end = search.end;
	return 0;
}
