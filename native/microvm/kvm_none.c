/* SPDX-License-Identifier: Apache-2.0 */
/*
 * kvm_none.c - where there is no KVM guest of ours: the guest's code is for x86-64.
 *
 * Threads, Errors, Ownership, Units: see accel.h.
 * Source: none.
 */
#include <errno.h>

#include "accel.h"

static int none_create(struct mv_machine *machine, struct mv_error *error)
{
	(void)machine;
	return mv_refuse(error, -ENODEV, "--accel kvm is for x86-64 only");
}

static void none_destroy(struct mv_machine *machine)
{
	(void)machine;
}
static void none_kick(struct mv_vcpu *vcpu)
{
	(void)vcpu;
}

static int none_attach(struct mv_machine *machine, struct mv_error *error)
{
	(void)machine;
	(void)error;
	return 0;
}

const struct mv_accel_ops mv_accel_kvm = {
	.name = "kvm",
	.id = MV_ACCEL_KVM,
	.create = none_create,
	.attach = none_attach,
	.kick = none_kick,
	.release = none_kick,
	.destroy = none_destroy,
};
