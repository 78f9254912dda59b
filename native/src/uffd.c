/* SPDX-License-Identifier: Apache-2.0 */
/*
 * uffd.c - see uffd.h for Threads, Errors, Ownership, Units and Source.
 *
 * How the kernel answers an ioctl that puts pages in place (mm/userfaultfd.c, observed in
 * test_uffd.c): 0 = all. Else errno, and the ioctl's own field has the bytes done or, if none,
 * the error negated: EEXIST and the rest only come for the first page; a batch that meets them
 * later says EAGAIN with what it has done. EAGAIN with nothing done: an event that changes the
 * address space waits to be read.
 */
#include <godwit/uffd.h>

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>

#include <godwit/sys.h>

#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

/* Linux 5.11; the headers of old distributions lack it. */
#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif

#define DEVICE_PATH "/dev/userfaultfd"

static int open_raw(int mode)
{
	/* NOLINTNEXTLINE(performance-no-int-to-ptr): this ioctl takes flags where others take a pointer. */
	void *const flags = (void *)(uintptr_t)(O_CLOEXEC | O_NONBLOCK | mode);
	const int device = gw_sys_open(DEVICE_PATH, O_RDWR | O_CLOEXEC, 0);

	/* The device needs a file permission only; the call needs CAP_SYS_PTRACE or the sysctl. */
	if (device >= 0) {
		const int uffd = gw_sys_ioctl(device, (unsigned long)USERFAULTFD_IOC_NEW, flags);

		(void)gw_sys_close(device);
		if (uffd >= 0)
			return uffd;
	}
	return gw_sys_userfaultfd(O_CLOEXEC | O_NONBLOCK | mode);
}

static int open_mode(int mode, uint64_t features, uint64_t *ret_granted)
{
	struct uffdio_api api = {.api = UFFD_API, .features = features};
	const int uffd = open_raw(mode);

	if (uffd < 0)
		return uffd;
	const int err = gw_sys_ioctl(uffd, UFFDIO_API, &api);

	if (err < 0) {
		(void)gw_sys_close(uffd);
		return err;
	}
	if (ret_granted)
		*ret_granted = api.features;
	return uffd;
}

int gw_uffd_open(uint64_t features, uint64_t *ret_granted)
{
	return open_mode(0, features, ret_granted);
}

int gw_uffd_open_user_mode(uint64_t features, uint64_t *ret_granted)
{
	return open_mode(UFFD_USER_MODE_ONLY, features, ret_granted);
}

int gw_uffd_register(int uffd, uint64_t address, uint64_t len, uint64_t mode, uint64_t *ret_ioctls)
{
	struct uffdio_register reg = {.range = {.start = address, .len = len}, .mode = mode};
	const int err = gw_sys_ioctl(uffd, UFFDIO_REGISTER, &reg);

	if (err < 0)
		return err;
	if (ret_ioctls)
		*ret_ioctls = reg.ioctls;
	return 0;
}

int gw_uffd_unregister(int uffd, uint64_t address, uint64_t len)
{
	struct uffdio_range range = {.start = address, .len = len};
	int err = gw_sys_ioctl(uffd, UFFDIO_UNREGISTER, &range);

	/*
	 * The kernel wakes who waits before it takes the registration off. Since faults are handled under
	 * the lock of the mapping alone (6.7), one may go to sleep between the two, and nobody wakes it
	 * any more. WAKE asks for no registration. test_uffd.c: who_faults_meanwhile_is_not_left_asleep.
	 */
	if (err == 0)
		err = gw_sys_ioctl(uffd, UFFDIO_WAKE, &range);
	return err;
}

int gw_uffd_read(int uffd, struct uffd_msg *ret_events, uint32_t count_max)
{
	for (;;) {
		const ssize_t len = gw_sys_read(uffd, ret_events, count_max * sizeof(*ret_events));

		if (len == -EINTR)
			continue;
		if (len == -EAGAIN)
			return 0;
		return len < 0 ? (int)len : (int)((size_t)len / sizeof(*ret_events));
	}
}

/* `result`: of the ioctl; `field`: its own out field. */
static int outcome_of(int result, int64_t field, uint64_t len, uint64_t *ret_done)
{
	*ret_done = result == 0 ? len : field > 0 ? (uint64_t)field : 0;
	switch (result) {
	case 0:
		return GW_UFFD_DONE;
	case -EAGAIN:
		return GW_UFFD_AGAIN;
	case -EEXIST:
		return GW_UFFD_EXISTS;
	case -ESRCH:
		return GW_UFFD_GONE;
	case -ENOENT:
		return GW_UFFD_NOT_REGISTERED;
	/*
	 * ENOSPC meant an exiting process in 4.11 and 4.12 alone; since then it is a full file
	 * system, as ENOMEM is. Trying again tells: a process that is gone says ESRCH then.
	 */
	case -ENOSPC:
	case -ENOMEM:
		return GW_UFFD_NO_SPACE;
	default:
		return result;
	}
}

int gw_uffd_copy(int uffd, uint64_t address, const void *source, uint64_t len, uint64_t *ret_done)
{
	struct uffdio_copy copy = {
		.dst = address,
		.src = (uintptr_t)source,
		.len = len,
		.mode = UFFDIO_COPY_MODE_DONTWAKE,
	};
	const int result = gw_sys_ioctl(uffd, UFFDIO_COPY, &copy);

	return outcome_of(result, copy.copy, len, ret_done);
}

int gw_uffd_zeropage(int uffd, uint64_t address, uint64_t len, uint64_t *ret_done)
{
	struct uffdio_zeropage zero = {
		.range = {.start = address, .len = len},
		.mode = UFFDIO_ZEROPAGE_MODE_DONTWAKE,
	};
	const int result = gw_sys_ioctl(uffd, UFFDIO_ZEROPAGE, &zero);

	return outcome_of(result, zero.zeropage, len, ret_done);
}

int gw_uffd_continue(int uffd, uint64_t address, uint64_t len, uint64_t *ret_done)
{
	struct uffdio_continue cont = {
		.range = {.start = address, .len = len},
		.mode = UFFDIO_CONTINUE_MODE_DONTWAKE,
	};
	const int result = gw_sys_ioctl(uffd, UFFDIO_CONTINUE, &cont);

	if (result == -EFAULT) {
		*ret_done = 0;
		return GW_UFFD_NO_PAGE;
	}
	return outcome_of(result, cont.mapped, len, ret_done);
}

int gw_uffd_wake(int uffd, uint64_t address, uint64_t len)
{
	struct uffdio_range range = {.start = address, .len = len};

	return gw_sys_ioctl(uffd, UFFDIO_WAKE, &range);
}

int gw_uffd_is_uffd(int fd)
{
	static const char wanted[] = "anon_inode:[userfaultfd]";
	char path[32];
	char target[64];

	(void)snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	const ssize_t len = gw_sys_readlink(path, target, sizeof(target));

	if (len < 0)
		return (int)len;
	return len == sizeof(wanted) - 1 && memcmp(target, wanted, sizeof(wanted) - 1) == 0;
}
