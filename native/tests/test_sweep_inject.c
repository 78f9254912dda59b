/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_sweep_inject.c - each system call of an injection, in the agent, in its child and in the VMM,
 * fails once with each errno that it can give: the VMM is as it was, or armed; its threads go on.
 */
#include "sweep.h"
#include "target.h"

#include <sys/ioctl.h>

#include <godwit/inject.h>

#define FEATURES (GW_UFFD_FEATURE_MISSING_SHMEM | GW_UFFD_FEATURE_EVENT_REMOVE)

struct injection {
	struct target target;
	int fd_count;
	int map_count;
};

/* Armed and disarmed again. The target's own descriptor stays open: there is one more each time. */
static int injection_act(struct injection *injection)
{
	const struct target *const target = &injection->target;
	struct gw_inject_result result = {.uffd = -7};
	const int err = gw_inject_uffd(target->pid, target->ram_fd, FEATURES,
				       UFFDIO_REGISTER_MODE_MISSING, &result);

	CHECK(err < 0 || result.uffd >= 0);
	CHECK(err == 0 || result.uffd == -7);
	injection->fd_count += err == 0;
	check_untouched(target, injection->fd_count, injection->map_count);
	if (err < 0)
		return err;
	struct uffdio_range range = {.start = result.ranges[0].host_addr,
				     .len = result.ranges[0].len};

	CHECK_EQ(ioctl(result.uffd, UFFDIO_UNREGISTER, &range), 0);
	CHECK_EQ(close(result.uffd), 0);
	return 0;
}

static bool may_be(enum gw_sys_call call, int err, int result)
{
	/* The child's end is what the agent hears of it. */
	if (call == GW_SYS_SENDMSG || call == GW_SYS_RECV || call == GW_SYS_RECVMSG)
		return result == -EPIPE || result == -ECONNRESET;
	(void)err;
	return false;
}

/* Not by sweep_all: a run in between that must succeed would cost as much again. */
static void injection(void)
{
	struct injection injection = {.target = target_start(WAIT_READ)};
	struct sweep sweep;

	gw_sys_share_with_children();
	injection.fd_count = fd_count(injection.target.pid);
	injection.map_count = map_count(injection.target.pid);
	CHECK_EQ(injection_act(&injection), 0);
	sweep_count_begin(&sweep, SWEEP_INJECT);
	CHECK_EQ(injection_act(&injection), 0);
	sweep_count_end(&sweep);
	sweep_check_declared(&sweep, NULL);
	const int own_fd_count = sweep_fd_count();

	for (const enum gw_sys_call *call = sweep.scenario->calls; *call; call++) {
		for (size_t e = 0; sweep_errors[*call][e]; e++) {
			if (!sweep_applies(sweep.scenario, sweep_errors[*call][e]))
				continue;
			const int err = sweep_errors[*call][e];
			const uint64_t count = sweep.call_counts[*call];

			for (uint64_t nth = 1; nth <= count; nth++) {
				sweep_say(*call, nth, err);
				sweep_arm(*call, nth, err);
				const int result = injection_act(&injection);
				const bool failed = gw_sys_failed();

				gw_sys_fail_none();
				if (result != 0 && result != -err && !may_be(*call, err, result))
					fprintf(stderr, "%s %lu %s gives %d\n", gw_sys_name(*call),
						nth, sweep_error_name(err), result);
				CHECK(result == 0 || result == -err || may_be(*call, err, result));
				sweep.failed_counts[*call][e] += failed;
				sweep.failed_count += failed;
				CHECK_EQ(sweep_fd_count(), own_fd_count);
			}
		}
	}
	sweep_check_whole(&sweep);
	CHECK_EQ(injection_act(&injection), 0);
	/* It has not noticed. */
	const uint64_t one = 1;

	CHECK_EQ(write(injection.target.wake_fd, &one, sizeof(one)), sizeof(one));
	while (*(volatile uint8_t *)&injection.target.shared[1] == 0)
		sched_yield();
	target_stop(&injection.target);
}

struct taking {
	const struct target *target;
	int remote_fd;
};

static int taking_act(void *user)
{
	const struct taking *const taking = user;
	struct gw_inject_result result = {.uffd = -7};
	const int err = gw_inject_take(taking->target->pid, taking->remote_fd,
				       taking->target->ram_fd, &result);

	if (err < 0)
		return result.uffd == -7 ? err : -1000;
	/* Whether its features could be read or not, it is the one. */
	return close(result.uffd) == 0 ? 0 : -1000;
}

static void taking(void)
{
	const struct target target = target_start(WAIT_READ);
	struct gw_inject_result first = {0};

	CHECK_EQ(gw_inject_uffd(target.pid, target.ram_fd, FEATURES, UFFDIO_REGISTER_MODE_MISSING,
				&first),
		 0);
	CHECK_EQ(close(first.uffd), 0);
	struct taking taking = {.target = &target, .remote_fd = first.remote_fd};

	sweep_all(SWEEP_TAKE, taking_act, &taking, NULL);
	target_stop(&target);
}

int main(void)
{
	guest_need_uffd();
	RUN_FORKED(injection);
	RUN_FORKED(taking);
	return EXIT_SUCCESS;
}
