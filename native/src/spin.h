/* SPDX-License-Identifier: Apache-2.0 */
/*
 * spin.h - whether to look for work instead of sleeping until it comes.
 *
 * Threads    Each spin belongs to one thread.
 * Errors     None.
 * Ownership  None; zeroed is ready.
 * Units      Nanoseconds of CLOCK_MONOTONIC.
 * Source     docs/design/page-path.md, "Spinning".
 *
 * To be woken on an idle core of a virtual machine costs 40 to 50 us, more than all the rest of a fault. So
 * who serves faults looks while they are hot, and gives its core away at each turn. For how long is learnt: twice as
 * long after a wait that looking would have caught, half as long after any other. So a
 * guest that faults every now and then costs nothing.
 *
 * A yield that takes longer than a step of our own bulk has given the core to a stranger, with a time slice
 * of milliseconds: each fault would wait for all of them, while who sleeps and is woken comes first (three busy
 * processes on two cores: 1.7 ms a fault, 40 us sleeping). So it sleeps for a second then.
 */
#ifndef GW_SPIN_H
#define GW_SPIN_H

#include <stdbool.h>
#include <stdint.h>

#define SPIN_NS_MIN	  UINT64_C(12500)
#define SPIN_NS_MAX	  UINT64_C(100000)
#define SPIN_YIELD_NS_MAX UINT64_C(500000) /* longer than a step of our own bulk takes */
#define SPIN_CROWDED_NS	  UINT64_C(1000000000)

struct spin {
	uint64_t look_ns;  /* how long it looks before it sleeps; 0 = not */
	uint64_t sleep_ns; /* until then not at all */
};

static inline bool spin_may(const struct spin *spin, uint64_t now_ns)
{
	return spin->look_ns > 0 && now_ns >= spin->sleep_ns;
}

/* A yield is over. False: the core was given to a stranger, looking does not pay here. */
static inline bool spin_yielded(struct spin *spin, uint64_t begin_ns, uint64_t now_ns)
{
	if (now_ns - begin_ns <= SPIN_YIELD_NS_MAX)
		return true;
	spin->sleep_ns = now_ns + SPIN_CROWDED_NS;
	return false;
}

/* A wait took so long, looking or sleeping: how long to look at the next. */
static inline void spin_learn(struct spin *spin, uint64_t waited_ns)
{
	if (waited_ns > SPIN_NS_MAX)
		spin->look_ns = spin->look_ns / 2 >= SPIN_NS_MIN ? spin->look_ns / 2 : 0;
	else if (spin->look_ns == 0)
		spin->look_ns = SPIN_NS_MIN;
	else if (spin->look_ns < SPIN_NS_MAX)
		spin->look_ns *= 2;
}

#endif
