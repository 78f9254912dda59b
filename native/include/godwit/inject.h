/* SPDX-License-Identifier: Apache-2.0 */
/*
 * inject.h - make a running VMM create a userfaultfd over its guest's memory,
 * keep one reference itself, and hand us another.
 *
 * Threads    Call from a thread that may block for some milliseconds. The target's
 *            main thread is stopped meanwhile; its others run on.
 * Errors     0 or -errno. When it fails the target is as it was before.
 * Ownership  The fd returned is the caller's (O_CLOEXEC | O_NONBLOCK). The target
 *            keeps its own at `remote_fd` for as long as it lives: closing the last
 *            reference would hand the guest zero pages.
 * Units      Bytes; addresses are the target's.
 * Source     ptrace(2), pidfd_getfd(2), userfaultfd(2); docs/design/injection.md.
 */
#ifndef GW_INJECT_H
#define GW_INJECT_H

#include <stdint.h>

#include <godwit/export.h>

/* cdef:begin - extracted for cffi by tools/gen_ffi.py; keep it plain C. */

#define GW_INJECT_RANGE_COUNT_MAX 64

struct gw_inject_range {
	uint64_t host_addr;   /* in the target */
	uint64_t len;	      /* > 0 */
	uint64_t file_offset; /* in the RAM file */
};

struct gw_inject_result {
	int32_t uffd;	     /* ours */
	int32_t remote_fd;   /* the target's own number of it */
	uint64_t features;   /* what UFFDIO_API granted */
	uint64_t stopped_ns; /* how long the target's main thread stood still */
	uint32_t range_count;
	uint32_t reserved;
	struct gw_inject_range ranges[GW_INJECT_RANGE_COUNT_MAX];
};

/*
 * In process `pid`: userfaultfd, UFFDIO_API with `features`, UFFDIO_REGISTER with
 * `register_mode` over every shared writable mapping of the file (st_dev, st_ino)
 * behind `ram_fd`.
 *
 * Returns 0; -ESRCH no such process; -ENXIO it does not map the file; -EPERM
 * ptrace or userfaultfd is forbidden; -EINVAL a feature is unknown to the kernel;
 * -ENOSYS not x86-64; or the -errno of the call that failed in the target.
 */
int gw_inject_uffd(int32_t pid, int32_t ram_fd, uint64_t features, uint64_t register_mode,
		   struct gw_inject_result *ret_result);

/*
 * Take a userfaultfd that `pid` holds at `remote_fd` again (after the death of an
 * agent), and look up the ranges that map the file behind `ram_fd`.
 *
 * Returns 0; -ESRCH; -EBADF it is not a userfaultfd; -EPERM.
 */
int gw_inject_take(int32_t pid, int32_t remote_fd, int32_t ram_fd,
		   struct gw_inject_result *ret_result);

/* cdef:end */

#endif /* GW_INJECT_H */
