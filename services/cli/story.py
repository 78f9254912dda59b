# SPDX-License-Identifier: Apache-2.0
"""What happened to a migration, as an account: phases and events in order, and what can be done."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING

from services.cli import quantities

if TYPE_CHECKING:
    from godwit.models import ArrivalCounters, Migration, MigrationEvent

_INDENT = " " * 16


def held(counters: ArrivalCounters) -> str:
    """How long the guest was held by outages; empty: there was none."""
    now = counters.hold_now
    if not counters.holds and now is None:
        return ""
    longest = max((hold.held_ns for hold in counters.holds), default=0)
    text = f"{quantities.duration(counters.held_total_ns) or '0'} in all"
    if longest:
        text += f", {quantities.duration(longest)} at a time"
    if now is not None:
        since = quantities.duration(now.held_ns) if now.held_ns else "not yet held"
        text += f"; now: {now.cause.replace('_', ' ')}, {since}"
    return text


def lines(one: Migration) -> list[str]:
    """The account; empty if there is nothing to tell."""
    told = sorted(_entries(one), key=lambda entry: entry[0])
    if not told:
        return []
    return ["history:", *(line for _, block in told for line in block)]


def _entries(one: Migration) -> Iterator[tuple[tuple[float, int], list[str]]]:
    """Blocks of lines with what they are sorted by: the time, then phases before events."""
    said = {event.message for event in one.events}
    for step in one.transitions:
        # A reason that an event tells in full is not told twice.
        why = "" if step.message in said else step.message
        text = f"  {_clock(step.at)}  {step.phase:16} {why}".rstrip()
        yield (_seconds(step.at), 0), [text]
    before = 0
    for event in one.events:
        block = _event(event)
        if (left_out := event.sequence - before - 1) > 0:
            block = [f"{_INDENT}... {left_out} events left out", *block]
        before = event.sequence
        yield (_seconds(event.at), 1), block


def _event(event: MigrationEvent) -> list[str]:
    node = f"{event.node}: " if event.node and not event.message.startswith(event.node) else ""
    block = [f"  {_clock(event.at)}  ! {event.kind}: {node}{event.message}"]
    if event.action:
        block.append(f"{_INDENT}Godwit: {event.action}")
    if event.hint:
        block.append(f"{_INDENT}you:    {event.hint}")
    block += [f"{_INDENT}{line}" for line in event.evidence]
    return block


def _clock(at: datetime | None) -> str:
    return at.strftime("%H:%M:%S.%f")[:-3] if at else f"{'-':12}"


def _seconds(at: datetime | None) -> float:
    return at.timestamp() if at else 0.0
