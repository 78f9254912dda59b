/* SPDX-License-Identifier: Apache-2.0 */
/*
 * clock_shim.c - LD_PRELOAD: moves the wall clock of one process by as many seconds as the file
 * GODWIT_CLOCK_OFFSET_FILE says, at once when that changes. Clocks that count from the boot are left
 * alone, as they are when somebody sets a machine's clock.
 *
 * Threads: any. Errors: without the file the clock is right. Ownership: the mapping is the process's.
 * Units: seconds. Source: clock_gettime(2), gettimeofday(2), time(2).
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile long *offset;

__attribute__((constructor)) static void map_offset(void)
{
	const char *const path = getenv("GODWIT_CLOCK_OFFSET_FILE");
	const int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
	void *const at = fd < 0 ? MAP_FAILED : mmap(NULL, 8, PROT_READ, MAP_SHARED, fd, 0);

	if (fd >= 0)
		close(fd);
	if (at != MAP_FAILED)
		offset = at;
}

int clock_gettime(clockid_t clock, struct timespec *ret_time)
{
	const long result = syscall(SYS_clock_gettime, clock, ret_time);

	if (result == 0 && offset && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
		ret_time->tv_sec += *offset;
	return (int)result;
}

int gettimeofday(struct timeval *ret_time, void *zone)
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

	if (clock_gettime(CLOCK_REALTIME, &now) != 0)
		return -1;
	if (ret_time)
		*ret_time = now.tv_sec;
	return now.tv_sec;
}
