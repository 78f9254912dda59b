# SPDX-License-Identifier: Apache-2.0
"""Which failures are worth another try."""

from __future__ import annotations

FINAL = frozenset(
    {
        # The guest: nothing is left to move, or a person has to look.
        "GUEST_ENDED",
        "GUEST_GONE",
        "SOURCE_VMM_DEAD",
        "VM_UNKNOWN",
        "NODE_REBOOTED",
        "STATE_STALE",
        "STATE_CORRUPT",
        # What was asked for: the next one is refused for the same.
        "PREFLIGHT_FAILED",
        "FIELD_INVALID",
        "SPEC_INVALID",
        "DRIVER_UNKNOWN",
        "SAME_NODE",
        # Somebody has to mend it first.
        "JOURNAL_NEWER",
        "PAGE_MAP_NEWER",
        "PERMISSION_DENIED",
        "UNAUTHENTICATED",
        "CANCELLED",
        "PEER_BUG",
        "BUG",
    }
)
"""Reasons of a failure that comes again, however long one waits."""


def is_retryable(reason: str) -> bool:
    """True unless it is known that trying again does not help."""
    return reason not in FINAL
