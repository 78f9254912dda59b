# SPDX-License-Identifier: Apache-2.0
"""Conditions as Kubernetes has them: a list keyed by type, with the time of the last change."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

MESSAGE_LEN_MAX = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """One of them. `status`: None, nobody knows yet."""

    type: str
    status: bool | None
    reason: str
    """A code, e.g. NODE_INBOUND_LIMIT."""
    message: str = ""


_STATUS = {True: "True", False: "False", None: "Unknown"}


def write(
    conditions: Iterable[Condition],
    before: Iterable[dict[str, Any]],
    *,
    now: str,
    generation: int,
) -> list[dict[str, Any]]:
    """As status.conditions has them. `before`: as they were; what did not turn keeps its time."""
    known = {each["type"]: each for each in before}
    written = []
    for each in conditions:
        old = known.get(each.type)
        status = _STATUS[each.status]
        kept = old and old["status"] == status
        written.append(
            {
                "type": each.type,
                "status": status,
                "reason": each.reason,
                "message": each.message[:MESSAGE_LEN_MAX],
                "observedGeneration": generation,
                "lastTransitionTime": old["lastTransitionTime"] if old and kept else now,
            }
        )
    return written


def rfc3339(at: Timestamp | None) -> str | None:
    """A time as Kubernetes spells it; None stays None."""
    if at is None:
        return None
    return dt.datetime.fromtimestamp(at.seconds, tz=dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def now_rfc3339(now_ns: int) -> str:
    """The same, of nanoseconds since 1970."""
    return dt.datetime.fromtimestamp(now_ns // 10**9, tz=dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def percent(share: float) -> str:
    """A share of the whole, which is 100 only when it is whole."""
    return f"{100 if share >= 1 else min(int(share * 100), 99)}%"
