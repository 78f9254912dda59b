# SPDX-License-Identifier: Apache-2.0
"""One answer of preflight: what was found, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.pagecore.uffd_names import ARRIVAL_FEATURES


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One answer; godwit.common.v1.Check."""

    check: str
    passed: bool
    reason: str
    hint: str = ""


def verdict(check: str, problem: str, *, fine: str, hint: str) -> Check:
    """A check that fails if there is a `problem`."""
    return Check(
        check=check, passed=not problem, reason=problem or fine, hint=hint if problem else ""
    )


def uffd_check(features: Sequence[str], *, balloon: bool) -> Check:
    """Kernel features that an arrival cannot do without; docs/compatibility.md."""
    wanted = set(ARRIVAL_FEATURES) | ({"event-remove"} if balloon else set())
    missing = sorted(wanted.difference(features))
    return verdict(
        "uffd-features",
        f"userfaultfd lacks {', '.join(missing)}" if missing else "",
        fine=f"userfaultfd has {', '.join(sorted(wanted))}",
        hint="needs Linux 4.11 or later with CONFIG_USERFAULTFD and access to it: root,"
        " CAP_SYS_PTRACE or /dev/userfaultfd",
    )
