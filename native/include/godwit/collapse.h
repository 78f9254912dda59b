/* SPDX-License-Identifier: Apache-2.0 */
/*
 * collapse.h - 4 KiB pages of a RAM file made one huge page, once its guest is whole.
 *
 * Threads    Any. A vCPU that touches the range meanwhile waits for it.
 * Errors     0 or -errno.
 * Ownership  Nothing is kept; the descriptor is borrowed.
 * Units      Bytes of the RAM file.
 * Source     madvise(2), MADV_COLLAPSE (Linux 6.1).
 */
#ifndef GW_COLLAPSE_H
#define GW_COLLAPSE_H

#include <stdint.h>

#include <godwit/export.h>

/* cdef:begin - extracted for cffi by tools/gen_ffi.py; keep it plain C. */

#define GW_COLLAPSE_LEN 2097152

/*
 * Make the range of GW_COLLAPSE_LEN at `offset` huge in the page cache, so that whoever has it mapped may
 * map it so at the next touch. Its content stays; a hole in it is allocated: do not ask for such.
 *
 * Returns 0, also if it is huge already; -EINVAL offset is no multiple, or the kernel or the file
 * system cannot; -EAGAIN, -EBUSY, -ENOMEM it stays as it is: no huge page is free, or somebody uses a
 * page; -EPERM; -errno of mmap.
 */
int gw_collapse(int32_t ram_fd, uint64_t offset);

/* cdef:end */

#endif /* GW_COLLAPSE_H */
