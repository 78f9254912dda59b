# SPDX-License-Identifier: Apache-2.0
"""Who moves next, where to, and why not yet: values in, values out.

No clock, no store and no network: time comes in as an argument. The orchestrator, the dry run of a
drain and the simulator run the same code.
"""
