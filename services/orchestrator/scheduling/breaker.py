# SPDX-License-Identifier: Apache-2.0
"""What earlier failures forbid for a while: back-off of a VM, and the circuit breaker of a node.

Computed from how moves ended, which the store knows: a new leader comes to the same answer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a move ended."""

    vm_id: str
    source: str
    target: str
    ended_s: float
    ok: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Caution:
    """How failures are answered. Seconds."""

    backoff_s: float = 20.0
    """After the first failure of a VM; doubled by each further one in a row."""
    backoff_s_max: float = 600.0
    breaker_after: int = 3
    """So many failures in a row open a node's breaker."""
    breaker_s: float = 60.0
    """For so long; doubled by each further one. After it moves are let through again, and the first
    that fails opens it anew."""
    breaker_s_max: float = 1800.0
    avoid_s: float = 1800.0
    """A VM is placed elsewhere than where it failed, for so long, if there is somewhere else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """What follows from the outcomes."""

    not_before_s: dict[str, float] = field(default_factory=dict)
    """By VM."""
    avoid: dict[str, frozenset[str]] = field(default_factory=dict)
    """Targets to avoid, by VM."""
    broken_until_s: dict[str, float] = field(default_factory=dict)
    """Nodes whose breaker is open."""
    failures: dict[str, int] = field(default_factory=dict)
    """In a row, by node."""


def trouble(outcomes: Iterable[Outcome], now_s: float, caution: Caution) -> Trouble:
    """What `outcomes` forbid at `now_s`; in any order. A success ends every row of failures.

    What ended in the future, by a clock that was set back since, forbids nothing.
    """
    row_of_vm: dict[str, list[Outcome]] = defaultdict(list)
    row_of_node: dict[str, list[Outcome]] = defaultdict(list)
    past = (each for each in outcomes if each.ended_s <= now_s)
    for each in sorted(past, key=lambda outcome: outcome.ended_s):
        rows = (row_of_vm[each.vm_id], row_of_node[each.source], row_of_node[each.target])
        for row in rows:
            if each.ok:
                row.clear()
            else:
                row.append(each)
    result = Trouble()
    for vm_id, row in row_of_vm.items():
        if not row:
            continue
        delay_s = _doubled(caution.backoff_s, len(row) - 1, caution.backoff_s_max)
        if row[-1].ended_s + delay_s > now_s:
            result.not_before_s[vm_id] = row[-1].ended_s + delay_s
        recent = (each for each in row if each.ended_s + caution.avoid_s > now_s)
        if targets := frozenset(each.target for each in recent):
            result.avoid[vm_id] = targets
    for node, row in row_of_node.items():
        if not row:
            continue
        result.failures[node] = len(row)
        # One VM that cannot move is the VM's trouble, not the node's.
        if len({each.vm_id for each in row}) < 2 or len(row) < caution.breaker_after:
            continue
        open_s = _doubled(
            caution.breaker_s, len(row) - caution.breaker_after, caution.breaker_s_max
        )
        if row[-1].ended_s + open_s > now_s:
            result.broken_until_s[node] = row[-1].ended_s + open_s
    return result


def _doubled(first_s: float, times: int, most_s: float) -> float:
    return min(first_s * 2.0 ** min(times, 30), most_s)
