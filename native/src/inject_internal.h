/* SPDX-License-Identifier: Apache-2.0 */
/*
 * inject_internal.h - a stopped thread of another process, and system calls made in it.
 *
 * Threads    One tracer thread from attach to detach (ptrace(2) allows no other).
 * Errors     0, a system call's result, or -errno.
 * Ownership  detach gives the thread back as it was found, whatever happened in between.
 * Units      Addresses are the target's.
 * Source     ptrace(2); arch/x86/kernel/signal.c for what an interrupted call is owed.
 */
#ifndef GW_INJECT_INTERNAL_H
#define GW_INJECT_INTERNAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/user.h>

#include <godwit/inject.h>

#define GW_REMOTE_SCRATCH_LEN 4096

struct gw_remote {
	pid_t pid;
	struct user_regs_struct saved; /* what detach restores */
	uint64_t saved_mask;	       /* blocked signals, likewise */
	uint64_t syscall_address;      /* of a `syscall` instruction */
	bool in_call;		       /* stands at the entry of a call that got no further */
	uint64_t scratch;	       /* GW_REMOTE_SCRATCH_LEN bytes of ours in the target */
};

/* Stop the main thread of `pid`. Returns 0; -ESRCH; -EPERM; -ENOSYS not x86-64;
 * -ETIMEDOUT it does not come out of the kernel; -errno. */
int gw_remote_attach(pid_t pid, struct gw_remote *ret_remote);
/* Restore and let go. */
void gw_remote_detach(struct gw_remote *remote);

/* Make a system call there. Returns its result, or -ESRCH if the process ended meanwhile. */
long gw_remote_call(struct gw_remote *remote, long number, const uint64_t arguments[6]);
/* ioctl with a structure that goes there and comes back through the scratch page. */
long gw_remote_ioctl(struct gw_remote *remote, int fd, unsigned long request, void *argument,
		     size_t len);
/* Copy bytes into the scratch page. Returns 0; -errno. */
int gw_remote_put(struct gw_remote *remote, const void *bytes, size_t len);

/*
 * Where `pid` maps the file behind `ram_fd` shared and writable.
 * Returns 0; -ENXIO nowhere; -E2BIG in more than GW_INJECT_RANGE_COUNT_MAX places; -ESRCH; -errno.
 */
int gw_inject_find_ranges(pid_t pid, int ram_fd, struct gw_inject_result *result);
/* Start and end of the vDSO. Returns 0; -ENOENT; -errno. */
int gw_inject_find_vdso(pid_t pid, uint64_t *ret_start, uint64_t *ret_end);

#endif /* GW_INJECT_INTERNAL_H */
