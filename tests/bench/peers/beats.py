# SPDX-License-Identifier: Apache-2.0
"""What a move cost a guest, by what the guest said on its two consoles; nobody else is asked.

VMMs report a downtime, each its own; a guest's heartbeats mean the same everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

from services.demo.console import Console, Heartbeat, Line, parse

NS_PER_S = 1_000_000_000
FULL_SPEED_S = 1.5
"""How long before the switch the guest's full speed is taken from."""
AFTER_S = 1.0
"""The first second: from the last heartbeat at the source on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one move."""

    gap_ms: float
    """From the last heartbeat at the source to the first at the destination."""
    later_gap_ms: float
    """The longest silence in the first second after that."""
    full_pages_per_s: float
    """Pages that the workload rewrote before the move."""
    first_second_share: float
    """What it rewrote in the first second, as a share of that."""
    error_count: int
    """Pages that the guest found wrong, ever."""


def beats(console: Console, cut: str = "") -> list[tuple[Line, Heartbeat]]:
    """The heartbeats; `cut`: what the run before began to say and did not end."""
    lines = list(console.lines)
    if cut and lines:
        lines[0] = replace(lines[0], text=cut.rstrip("\r") + lines[0].text)
    said = [(line, parse(line.text)) for line in lines]
    return [(line, record) for line, record in said if isinstance(record, Heartbeat)]


def cost(before: Console, after: Console) -> Cost:
    """Of the move between two runs.

    Raises:
        ValueError: a run has too few heartbeats, or their numbers do not go on: a guest that was
            doubled, or restarted, has no cost worth comparing.
    """
    old, new = beats(before), beats(after, before.tail)
    if len(old) < 2 or len(new) < 2:
        raise ValueError(f"{len(old)} heartbeats before the move, {len(new)} after it")
    if new[0][1].number != old[-1][1].number + 1:
        raise ValueError(f"heartbeat {new[0][1].number} after {old[-1][1].number}")
    last_ns, last = old[-1][0].t_ns, old[-1][1]
    since = next(pair for pair in old if pair[0].t_ns >= last_ns - FULL_SPEED_S * NS_PER_S)
    if since[1].number == last.number:
        raise ValueError("no heartbeats to take the full speed from")
    full = (last.ops - since[1].ops) / (last_ns - since[0].t_ns) * NS_PER_S
    end_ns = last_ns + AFTER_S * NS_PER_S
    if new[-1][0].t_ns < end_ns:
        raise ValueError("the guest was not listened to for a second")
    within = [pair for pair in new if pair[0].t_ns <= end_ns]
    done = within[-1][1].ops - last.ops if within else 0
    stamps = [line.t_ns for line, _ in within]
    return Cost(
        gap_ms=(new[0][0].t_ns - last_ns) / 1e6,
        later_gap_ms=max((b - a for a, b in pairwise(stamps)), default=0) / 1e6,
        full_pages_per_s=full,
        first_second_share=done / (full * AFTER_S),
        error_count=max(beat.errors for _, beat in [*old, *new]),
    )
