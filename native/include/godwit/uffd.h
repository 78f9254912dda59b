/* SPDX-License-Identifier: Apache-2.0 */
/*
 * uffd.h - userfaultfd(2): the handshake, events, and the ioctls that resolve a fault, each
 * answer of the kernel turned into an outcome.
 *
 * Threads    Any thread; the kernel serialises.
 * Errors     An outcome >= 0, or -errno for what no correct caller sees (EINVAL, EFAULT of a
 *            bad source, EBADF).
 * Ownership  open gives an fd to the caller.
 * Units      Bytes; addresses are those of the process that registered them.
 * Source     ioctl_userfaultfd(2); linux/userfaultfd.h of 6.18. The distribution's header may
 *            be older: what it lacks is defined here.
 */
#ifndef GW_UFFD_H
#define GW_UFFD_H

#include <stdint.h>

#include <godwit/export.h>

/* cdef:begin - extracted for cffi by tools/gen_ffi.py; keep it plain C. */

/* Bits of uffdio_api.features; they never change their meaning. */
#define GW_UFFD_FEATURE_EVENT_REMOVE	   0x8
#define GW_UFFD_FEATURE_MISSING_HUGETLBFS  0x10
#define GW_UFFD_FEATURE_MISSING_SHMEM	   0x20
#define GW_UFFD_FEATURE_SIGBUS		   0x80
#define GW_UFFD_FEATURE_THREAD_ID	   0x100
#define GW_UFFD_FEATURE_MINOR_HUGETLBFS	   0x200
#define GW_UFFD_FEATURE_MINOR_SHMEM	   0x400
#define GW_UFFD_FEATURE_WP_HUGETLBFS_SHMEM 0x1000
#define GW_UFFD_FEATURE_WP_UNPOPULATED	   0x2000
#define GW_UFFD_FEATURE_POISON		   0x4000
#define GW_UFFD_FEATURE_WP_ASYNC	   0x8000
#define GW_UFFD_FEATURE_MOVE		   0x10000

/*
 * Which features can be used here, found by trying each: the kernel grants it, and, for
 * missing-shmem and minor-shmem, a memfd can be registered so.
 *
 * Returns 0; -EPERM userfaultfd is forbidden to us; -ENOSYS; -errno of a failing call.
 */
int gw_uffd_probe(uint64_t *ret_features);

/* "missing-shmem", ... of one feature bit; NULL if it has no name here. */
const char *gw_uffd_feature_name(uint64_t feature);

/* cdef:end */

#include <linux/userfaultfd.h>
#include <stdbool.h>
#include <stddef.h>

enum gw_uffd_outcome {
	GW_UFFD_DONE = 0,   /* all of it */
	GW_UFFD_AGAIN = 1,  /* an event waits to be read: drain, then go on after ret_done */
	GW_UFFD_EXISTS = 2, /* a page is there already. Nobody was woken */
	GW_UFFD_GONE = 3,   /* the process is */
	GW_UFFD_NOT_REGISTERED = 4, /* nothing of ours is mapped there */
	GW_UFFD_NO_SPACE = 5, /* the file system or the memory is full; the page is as it was */
	GW_UFFD_NO_PAGE = 6,  /* CONTINUE: the page cache has no page there */
};

/*
 * A new userfaultfd: /dev/userfaultfd where it may be opened, else the system call; and the
 * handshake for `features`. A refused feature spoils the fd, so it is closed.
 * Returns the fd (O_CLOEXEC, O_NONBLOCK); -EINVAL a feature is unknown; -EPERM; -errno.
 */
int gw_uffd_open(uint64_t features, uint64_t *ret_granted);
/*
 * The same for faults of user space only, which needs no privilege. An access of the kernel, also of
 * KVM, to an absent page fails then with EFAULT: it never waits, and never reads zeros.
 */
int gw_uffd_open_user_mode(uint64_t features, uint64_t *ret_granted);

/* `mode` of UFFDIO_REGISTER_MODE_*. ret_ioctls: bit n = ioctl n works on the range; may be NULL. */
int gw_uffd_register(int uffd, uint64_t address, uint64_t len, uint64_t mode, uint64_t *ret_ioctls);
/*
 * Wakes who waits there, also who went to sleep meanwhile. May be called again. 0; -ENOMEM the
 * process is gone, or has too many mappings; -errno.
 */
int gw_uffd_unregister(int uffd, uint64_t address, uint64_t len);

/* Read up to count_max events. Returns how many, 0 = none now; -errno. */
int gw_uffd_read(int uffd, struct uffd_msg *ret_events, uint32_t count_max);

/*
 * Put pages in place without waking: publish first, then gw_uffd_wake. *ret_done is always
 * set: the bytes that are in place whatever the outcome. With EXISTS the page at
 * address + *ret_done is the one that was there.
 */
int gw_uffd_copy(int uffd, uint64_t address, const void *source, uint64_t len, uint64_t *ret_done);
int gw_uffd_zeropage(int uffd, uint64_t address, uint64_t len, uint64_t *ret_done);
int gw_uffd_continue(int uffd, uint64_t address, uint64_t len, uint64_t *ret_done);

/* Waiters go on, or fault again if the page is absent. 0; -errno. Also after the process's death. */
int gw_uffd_wake(int uffd, uint64_t address, uint64_t len);

/* 1 if the fd is a userfaultfd, 0 if not; -errno. */
int gw_uffd_is_uffd(int fd);

#endif /* GW_UFFD_H */
