/* SPDX-License-Identifier: Apache-2.0 */
/*
 * describe.h - a machine in JSON: what it is, and how it fares.
 *
 * Threads: the control thread.
 * Errors: none; a text that is too long is cut, and says so.
 * Ownership: nothing is kept.
 * Units: in the names; times are of CLOCK_MONOTONIC.
 * Source: native/microvm/README.md, "The control socket".
 */
#ifndef MV_DESCRIBE_H
#define MV_DESCRIBE_H

#include <stdint.h>

#include "json.h"
#include "machine.h"

/* Members, each with a comma before it: what stays the same for the machine's life, and its state. */
void mv_describe(struct mv_machine *machine, const char *control_path, struct mv_text *text);

/* Counters of every vCPU. */
void mv_describe_stats(struct mv_machine *machine, struct mv_text *text);

/* What sweep `number` found; it is over. */
void mv_describe_sweep(struct mv_machine *machine, uint64_t number, struct mv_text *text);

#endif
