/* SPDX-License-Identifier: Apache-2.0 */
/*
 * exits.h - the agent's side of the exit channel: take the vCPUs' requests, clear their bits, wake
 * them.
 *
 * Threads    publish and wake: any thread. take, sleep and awake: the demand thread alone.
 *            attach and detach: one thread, before and after all others.
 * Errors     0, a count, or -errno. The memory is another process's, and nothing in it is
 *            believed: an index is masked, a page number checked, a count bounded; a VMM that
 *            writes nonsense harms its own guest.
 * Ownership  attach maps the memory; the fd stays the caller's.
 * Units      Pages, counted from the start of the image.
 * Source     exit_channel.h; docs/exit-channel.md.
 */
#ifndef GW_EXITS_H
#define GW_EXITS_H

#include <stdbool.h>
#include <stdint.h>

#include <godwit/bitmap.h>
#include <godwit/exit_channel.h>

struct gw_exits;

/*
 * Map and check a channel that a VMM has handed off. Bits that are clear in `own`, the agent's own
 * bitmap, are cleared in the channel's: an adopter may know more than the VMM was told.
 *
 * Returns 0; -EINVAL it is not a channel, not of so many pages, or could be cut under us (no
 * F_SEAL_SHRINK); -ENOMEM; -errno of a failing call.
 */
int gw_exits_attach(int fd, uint32_t page_size, const struct gw_bitmap *own,
		    struct gw_exits **ret_exits);
/* Unmap. vCPUs that wait go on waiting. NULL is a no-op. */
void gw_exits_detach(struct gw_exits *exits);

uint32_t gw_exits_vcpu_count(const struct gw_exits *exits);

/*
 * Take up to count_max requests, in turn from each ring. Pages are checked against the page count;
 * others are dropped and counted. Returns how many.
 */
uint32_t gw_exits_take(struct gw_exits *exits, struct gw_exit_request *ret_requests,
		       uint32_t count_max);

/* About to sleep: from now on vCPUs ring. False: there are requests, do not. */
bool gw_exits_sleep(struct gw_exits *exits);
void gw_exits_awake(struct gw_exits *exits);

/* The pages have their content, or are known to be zero: clear their bits (release), wake who waits. */
void gw_exits_publish(struct gw_exits *exits, uint64_t first, uint64_t count);
/* Everybody who waits looks again and posts again what is absent still. */
void gw_exits_repost(struct gw_exits *exits);

/* Requests that named no page of the image. */
uint64_t gw_exits_refused_count(const struct gw_exits *exits);

#endif /* GW_EXITS_H */
