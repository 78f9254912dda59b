/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sandbox.h - system call filters: what a thread of the page path, and a page server, may ask the kernel.
 *
 * Threads    gw_sandbox_enter filters the calling thread and those that it starts later;
 *            GW_SANDBOX_PAGE_SERVER every thread of the process. There is no way out.
 * Errors     0 or -errno. A filter that cannot be installed leaves everything as it was.
 * Ownership  Nothing is kept.
 * Units      none.
 * Source     seccomp(2), linux/seccomp.h, docs/adr/0010-sandbox.md.
 *
 * A filter answers, it never kills: a guest may hang on this thread. What is on the list is let through.
 * What nobody here has a use for and an intruder would want is EPERM. Everything else is ENOSYS, which a C library
 * newer than this file knows how to live with: it tries the older call.
 */
#ifndef GW_SANDBOX_H
#define GW_SANDBOX_H

#include <stdint.h>

#include <godwit/export.h>

/* cdef:begin */

enum gw_sandbox_kind {
	GW_SANDBOX_PAGE_SERVER =
		1, /* a whole process that reads images and answers gRPC and HTTP */
	GW_SANDBOX_PAGE_THREAD = 2, /* a demand or bulk thread of an arrival */
};

enum gw_sandbox_mode {
	GW_SANDBOX_OFF = 0,
	GW_SANDBOX_LOG = 1, /* what would be refused is let through, and is in the kernel's log */
	GW_SANDBOX_ENFORCE = 2, /* is refused, and is in the kernel's log */
};

/*
 * Enter, for good. Sets no_new_privs of the calling thread.
 * -EINVAL: no such kind or mode. -ENOSYS: this kernel, this architecture or this build (a sanitizer's
 * runtime makes calls of its own) has no filters.
 */
GW_EXPORT int gw_sandbox_enter(uint32_t kind, uint32_t mode);

/* cdef:end */

#endif
