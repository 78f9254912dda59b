/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sys_hooks.c - what tests arm: failing calls and parked threads. Empty in what ships.
 *
 * Threads    A mutex guards the points; the counters are atomics. A thread parked at
 *            a point holds no lock.
 * Errors     A point too many aborts: it is the test that is wrong.
 * Ownership  Process-wide, as a test is.
 * Units      none.
 * Source     sys.h.
 */
#include <godwit/sys.h>

#ifdef GW_TEST_HOOKS

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* In shared memory where a test asks for that. */
struct arms {
	_Atomic uint64_t call_counts[GW_SYS_CALL_COUNT];
	/* The armed failure: `fail_left` counts down to 1, which fails; 0 = none. */
	_Atomic uint64_t fail_left;
	_Atomic int fail_call;
	_Atomic int fail_error; /* 0: not an error, but short_len bytes at most */
	_Atomic size_t short_len;
	_Atomic bool fail_repeats;
	_Atomic bool fail_happened;
};

static struct arms own_arms;
/* Changed while there is one thread. */
static struct arms *arms = &own_arms;
static _Thread_local size_t short_now = SIZE_MAX;

void gw_sys_share_with_children(void)
{
	void *const shared = mmap(NULL, sizeof(*arms), PROT_READ | PROT_WRITE,
				  MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	if (shared == MAP_FAILED)
		abort();
	arms = shared;
}

static void arm(enum gw_sys_call call, uint64_t nth, int err, size_t short_len, bool repeats)
{
	atomic_store(&arms->fail_left, 0);
	atomic_store(&arms->fail_call, (int)call);
	atomic_store(&arms->fail_error, err);
	atomic_store(&arms->short_len, short_len);
	atomic_store(&arms->fail_repeats, repeats);
	atomic_store(&arms->fail_happened, false);
	/* Last: who sees it sees the rest. */
	atomic_store(&arms->fail_left, nth);
}

void gw_sys_fail_nth(enum gw_sys_call call, uint64_t nth, int err)
{
	arm(call, nth, err, 0, false);
}

void gw_sys_fail_from(enum gw_sys_call call, uint64_t nth, int err)
{
	arm(call, nth, err, 0, true);
}

void gw_sys_short_nth(enum gw_sys_call call, uint64_t nth, size_t len_max)
{
	arm(call, nth, 0, len_max, false);
}

void gw_sys_fail_none(void)
{
	atomic_store(&arms->fail_left, 0);
}

bool gw_sys_failed(void)
{
	return atomic_load(&arms->fail_happened);
}

uint64_t gw_sys_count(enum gw_sys_call call)
{
	return atomic_load(&arms->call_counts[call]);
}

const char *gw_sys_name(enum gw_sys_call call)
{
	static const char *const names[GW_SYS_CALL_COUNT] = {"ANY",
#define NAME(name) #name,
							     GW_SYS_CALLS(NAME)
#undef NAME
	};

	return names[call];
}

int gw_sys_injected(enum gw_sys_call call)
{
	atomic_fetch_add(&arms->call_counts[GW_SYS_ANY], 1);
	atomic_fetch_add(&arms->call_counts[call], 1);
	uint64_t left = atomic_load(&arms->fail_left);
	const int wanted = atomic_load(&arms->fail_call);

	if (left == 0 || (wanted != GW_SYS_ANY && wanted != (int)call))
		return 0;
	for (;;) {
		if (left == 0)
			return 0;
		const uint64_t next = left == 1 && atomic_load(&arms->fail_repeats) ? 1 : left - 1;

		if (atomic_compare_exchange_weak(&arms->fail_left, &left, next))
			break;
	}
	if (left != 1)
		return 0;
	atomic_store(&arms->fail_happened, true);
	const int err = atomic_load(&arms->fail_error);

	if (err == 0)
		short_now = atomic_load(&arms->short_len);
	return -err;
}

size_t gw_sys_shortened(size_t len)
{
	const size_t len_max = short_now;

	short_now = SIZE_MAX;
	return len < len_max ? len : len_max;
}

/* Set and unset while no thread is in an ioctl; the answer's release orders the user before it. */
static _Atomic(gw_sys_ioctl_answer) ioctl_answer;
static void *_Atomic ioctl_user;

void gw_sys_answer_ioctl(gw_sys_ioctl_answer answer, void *user)
{
	atomic_store(&ioctl_user, user);
	atomic_store(&ioctl_answer, answer);
}

bool gw_sys_ioctl_answered(int fd, unsigned long request, void *argument, int *ret_result)
{
	const gw_sys_ioctl_answer answer = atomic_load(&ioctl_answer);

	return answer && answer(atomic_load(&ioctl_user), fd, request, argument, ret_result);
}

struct point {
	char name[GW_HOOK_POINT_LEN_MAX];
	bool held;
	unsigned int parked_count;
	unsigned int reach_count;
	void (*act)(void *);
	void *argument;
};

static pthread_mutex_t points_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t points_changed = PTHREAD_COND_INITIALIZER;
static struct point points[GW_HOOK_POINT_COUNT_MAX];
static unsigned int point_count;
/* Lets a test that arms nothing pass every point without the lock. */
static _Atomic bool points_used;

static struct point *find(const char *name)
{
	for (unsigned int i = 0; i < point_count; i++)
		if (strcmp(points[i].name, name) == 0)
			return &points[i];
	return NULL;
}

static struct point *find_or_add(const char *name)
{
	struct point *point = find(name);

	if (point)
		return point;
	if (point_count == GW_HOOK_POINT_COUNT_MAX || strlen(name) >= sizeof(points[0].name))
		abort();
	point = &points[point_count++];
	memset(point, 0, sizeof(*point));
	memcpy(point->name, name, strlen(name) + 1);
	atomic_store(&points_used, true);
	return point;
}

void gw_hook_hold(const char *point)
{
	pthread_mutex_lock(&points_lock);
	struct point *const found = find_or_add(point);

	found->held = true;
	found->reach_count = 0;
	pthread_mutex_unlock(&points_lock);
}

bool gw_hook_wait(const char *point, unsigned int count, int timeout_ms)
{
	struct timespec until;
	bool there = false;

	clock_gettime(CLOCK_REALTIME, &until);
	until.tv_sec += timeout_ms / 1000;
	until.tv_nsec += (long)(timeout_ms % 1000) * 1000000;
	if (until.tv_nsec >= 1000000000) {
		until.tv_sec++;
		until.tv_nsec -= 1000000000;
	}
	pthread_mutex_lock(&points_lock);
	struct point *const found = find_or_add(point);

	for (;;) {
		there = found->parked_count >= count;
		if (there || pthread_cond_timedwait(&points_changed, &points_lock, &until) != 0)
			break;
	}
	pthread_mutex_unlock(&points_lock);
	return there;
}

void gw_hook_release(const char *point)
{
	pthread_mutex_lock(&points_lock);
	find_or_add(point)->held = false;
	pthread_cond_broadcast(&points_changed);
	pthread_mutex_unlock(&points_lock);
}

void gw_hook_call(const char *point, void (*act)(void *), void *argument)
{
	pthread_mutex_lock(&points_lock);
	struct point *const found = find_or_add(point);

	found->act = act;
	found->argument = argument;
	found->reach_count = 0;
	pthread_mutex_unlock(&points_lock);
}

unsigned int gw_hook_reach_count(const char *point)
{
	pthread_mutex_lock(&points_lock);
	const struct point *const found = find(point);
	const unsigned int count = found ? found->reach_count : 0;

	pthread_mutex_unlock(&points_lock);
	return count;
}

void gw_hook_reach(const char *point)
{
	if (!atomic_load_explicit(&points_used, memory_order_relaxed))
		return;
	pthread_mutex_lock(&points_lock);
	struct point *const found = find(point);

	if (!found) {
		pthread_mutex_unlock(&points_lock);
		return;
	}
	found->reach_count++;
	void (*const act)(void *) = found->act;
	void *const argument = found->argument;

	if (found->held) {
		found->parked_count++;
		pthread_cond_broadcast(&points_changed);
		while (found->held)
			pthread_cond_wait(&points_changed, &points_lock);
		found->parked_count--;
	}
	pthread_mutex_unlock(&points_lock);
	if (act)
		act(argument);
}

#else

/* ISO C wants a declaration in every file. */
extern int gw_sys_hooks_absent;

#endif
