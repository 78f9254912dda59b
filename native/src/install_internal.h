/* SPDX-License-Identifier: Apache-2.0 */
/*
 * install_internal.h - what install*.c share.
 *
 * Threads, Errors, Ownership, Units, Source: see install.h.
 */
#ifndef GW_INSTALL_INTERNAL_H
#define GW_INSTALL_INTERNAL_H

#include <godwit/install.h>

#include <sys/types.h>

bool gw_install_is_huge(const struct gw_install *install);
off_t gw_install_offset_of(const struct gw_install *install, uint64_t page);
void gw_install_wake(const struct gw_install *install, uint64_t first, uint64_t count);
/* Clear the bits of settled pages, then wake. */
void gw_install_publish_and_wake(struct gw_install *install, uint64_t first, uint64_t count);
/* What an enum gw_uffd_outcome other than DONE and AGAIN means for the whole install. */
int gw_install_outcome_of(struct gw_install *install, int outcome);

#endif /* GW_INSTALL_INTERNAL_H */
