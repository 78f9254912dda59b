/* SPDX-License-Identifier: Apache-2.0 */
/*
 * clock.c - a wall clock that jumps, for one process: preloaded, it adds to CLOCK_REALTIME what the
 * file $GODWIT_HOOKS_DIR.clock says (int64, nanoseconds), at any moment. CLOCK_MONOTONIC stays.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define NS_PER_S 1000000000ll

static const _Atomic int64_t *offset;
static int (*real_clock_gettime)(clockid_t, struct timespec *);

__attribute__((constructor)) static void open_offset(void)
{
	const char *hooks = getenv("GODWIT_HOOKS_DIR");
	char path[4096];
	void *mapped;
	int fd;

	if (!hooks)
		return;
	snprintf(path, sizeof(path), "%s.clock", hooks);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return;
	mapped = mmap(NULL, sizeof(int64_t), PROT_READ, MAP_SHARED, fd, 0);
	close(fd);
	if (mapped != MAP_FAILED)
		offset = mapped;
}

int clock_gettime(clockid_t id, struct timespec *ret_time)
{
	int rc;

	/* Other libraries' constructors ask before ours has run. Racing threads find the same. */
	if (!real_clock_gettime)
		real_clock_gettime =
			(int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
	rc = real_clock_gettime(id, ret_time);

	if (rc == 0 && offset && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) {
		const int64_t now_ns = ret_time->tv_sec * NS_PER_S + ret_time->tv_nsec +
				       atomic_load_explicit(offset, memory_order_relaxed);

		ret_time->tv_sec = now_ns / NS_PER_S;
		ret_time->tv_nsec = now_ns % NS_PER_S;
	}
	return rc;
}

int gettimeofday(struct timeval *restrict ret_time, void *restrict zone)
{
	struct timespec now;

	(void)zone;
	if (clock_gettime(CLOCK_REALTIME, &now) != 0)
		return -1;
	ret_time->tv_sec = now.tv_sec;
	ret_time->tv_usec = now.tv_nsec / 1000;
	return 0;
}

time_t time(time_t *ret_time)
{
	struct timespec now;

	clock_gettime(CLOCK_REALTIME, &now);
	if (ret_time)
		*ret_time = now.tv_sec;
	return now.tv_sec;
}
