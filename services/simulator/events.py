# SPDX-License-Identifier: Apache-2.0
"""The log of a simulation: what the checker and the report know of it, and all that they know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something happened at a virtual time."""

    at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsSet(Event):
    """From now on these limits count."""

    values: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSeen(Event):
    """A node is there, with its rack and its memory."""

    node: str
    link: str
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VmSeen(Event):
    """A VM is there."""

    vm_id: str
    node: str
    memory_bytes: int
    group: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeClosed(Event):
    """Nothing may be placed on a node any more, or again."""

    node: str
    closed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Frozen(Event):
    """The emergency stop, or its end."""

    frozen: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked(Event):
    """A move waits for admission. Asked for again after a failure it keeps its id."""

    move_id: str
    vm_id: str
    happening: int
    """Index of what asked for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Went(Event):
    """A move was admitted."""

    move_id: str
    target: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended(Event):
    """A move is over."""

    move_id: str
    moved: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class GaveUp(Event):
    """A move waits at the end of the simulation, with what is said of it."""

    move_id: str
    reason: str


@dataclass(slots=True)
class Log:
    """In order."""

    events: list[Event] = field(default_factory=list)

    def add(self, event: Event) -> None:
        """Note it."""
        self.events.append(event)
