/* SPDX-License-Identifier: Apache-2.0 */
/* export.h - marks what the shared object offers. */
#ifndef GW_EXPORT_H
#define GW_EXPORT_H

#if defined(__GNUC__)
#define GW_EXPORT __attribute__((visibility("default")))
#else
#define GW_EXPORT
#endif

#endif /* GW_EXPORT_H */
