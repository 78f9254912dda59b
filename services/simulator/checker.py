# SPDX-License-Identifier: Apache-2.0
"""Judges a simulation by its log alone. Shares no code with what it judges.

It counts moves under way by itself, from who went where, and knows the limits only as numbers.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from services.simulator.events import (
    Asked,
    Ended,
    Event,
    Frozen,
    GaveUp,
    LimitsSet,
    NodeClosed,
    NodeSeen,
    VmSeen,
    Went,
)

_DEFAULTS = {"cluster": 64, "node-out": 2, "node-in": 2, "link": 16, "group": 1}
OVERTAKEN_S = 3 * 300 + 120
"""Three classes of head start, and the wait after which the oldest gets the next tokens."""


@dataclass(slots=True)
class _Move:
    vm_id: str
    source: str
    asked_s: float
    went_s: float | None = None
    over: bool = False


@dataclass(slots=True)
class Findings:
    """What the log shows."""

    violations: list[str] = field(default_factory=list)
    """Of limits, and of what a target must be."""
    starved: list[str] = field(default_factory=list)
    """Moves that others overtook for too long, or that never went though nothing forbade it."""
    moves: int = 0
    admissions: int = 0
    failures: int = 0


class Checker:
    """Reads the log once, in order."""

    def __init__(self) -> None:
        self.findings = Findings()
        self._limits = dict(_DEFAULTS)
        self._links: dict[str, str] = {}
        self._room: dict[str, int] = {}
        self._vms: dict[str, VmSeen] = {}
        self._where: dict[str, str] = {}
        self._closed: set[str] = set()
        self._frozen = False
        self._moves: dict[str, _Move] = {}
        self._under_way: dict[str, list[str]] = {}
        self._targets: dict[str, str] = {}
        self._count: Counter[str] = Counter()
        self._longest_s = 0.0

    def read(self, events: list[Event]) -> Findings:
        """Judge a whole log."""
        for event in events:
            match event:
                case LimitsSet():
                    self._limits.update(event.values)
                case NodeSeen():
                    self._links[event.node] = event.link
                    self._room[event.node] = event.memory_bytes
                case VmSeen():
                    self._vms[event.vm_id] = event
                    self._where[event.vm_id] = event.node
                    self._room[event.node] -= event.memory_bytes
                case NodeClosed():
                    (self._closed.add if event.closed else self._closed.discard)(event.node)
                case Frozen():
                    self._frozen = event.frozen
                case Asked():
                    self._asked(event)
                case Went():
                    self._went(event)
                case Ended():
                    self._ended(event)
                case GaveUp():
                    self._gave_up(event)
        self._overtaken()
        return self.findings

    def _asked(self, event: Asked) -> None:
        if event.move_id not in self._moves:
            self.findings.moves += 1
        source = self._where[event.vm_id]
        self._moves[event.move_id] = _Move(event.vm_id, source, event.at_s)

    def _limit(self, key: str) -> int:
        return self._limits.get(key, self._limits[key.partition(":")[0]])

    def _went(self, event: Went) -> None:
        move = self._moves[event.move_id]
        move.went_s = event.at_s
        vm, source, target = self._vms[move.vm_id], self._where[move.vm_id], event.target
        self.findings.admissions += 1
        keys = ["cluster", f"node-out:{source}", f"node-in:{target}"]
        here, there = self._links[source], self._links[target]
        if here != there:
            keys += [f"link:{each}" for each in (here, there) if each]
        if vm.group:
            keys.append(f"group:{vm.group}")
        self._count.update(keys)
        self._under_way[event.move_id] = keys
        self._targets[event.move_id] = target
        self._room[target] -= vm.memory_bytes
        wrong = [
            f"{key} {self._count[key]}/{self._limit(key)}"
            for key in keys
            if self._count[key] > self._limit(key)
        ]
        if target == source:
            wrong.append("goes where it is")
        if target in self._closed:
            wrong.append(f"goes to {target}, which is being emptied")
        if self._room[target] < 0:
            wrong.append(f"{target} has {-self._room[target]} bytes too few")
        if self._frozen:
            wrong.append("went while admissions were frozen")
        self.findings.violations += [f"{event.at_s:.3f} {event.move_id}: {each}" for each in wrong]

    def _ended(self, event: Ended) -> None:
        move = self._moves[event.move_id]
        vm, target = self._vms[move.vm_id], self._targets.pop(event.move_id)
        self._count.subtract(self._under_way.pop(event.move_id))
        move.over = event.moved
        assert move.went_s is not None
        self._longest_s = max(self._longest_s, event.at_s - move.went_s)
        if event.moved:
            self._room[move.source] += vm.memory_bytes
            self._where[move.vm_id] = target
        else:
            self._room[target] += vm.memory_bytes
            self.findings.failures += 1

    def _gave_up(self, event: GaveUp) -> None:
        # What no node can take was not starved by anybody; a limit may hold nobody for ever.
        if event.reason.endswith("_LIMIT") or event.reason in ("NEXT", "RESERVED", "FROZEN"):
            self.findings.starved.append(f"{event.move_id}: never went: {event.reason}")

    def _overtaken(self) -> None:
        """Of two that left one node: the one asked for long after the other went before it."""
        by_source: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
        for move_id, move in self._moves.items():
            if move.went_s is not None:
                by_source[move.source].append((move.went_s, move.asked_s, move_id))
        patience_s = OVERTAKEN_S + self._longest_s
        for moves in by_source.values():
            newest_s = float("-inf")
            for _went_s, asked_s, move_id in sorted(moves):
                if newest_s > asked_s + patience_s:
                    self.findings.starved.append(f"{move_id}: overtaken for {patience_s:.0f} s")
                newest_s = max(newest_s, asked_s)
