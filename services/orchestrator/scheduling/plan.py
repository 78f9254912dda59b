# SPDX-License-Identifier: Apache-2.0
"""The dry run: the same schedule, played through with predicted durations."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field

from services.orchestrator.scheduling.model import Request
from services.orchestrator.scheduling.schedule import Schedule, Wait


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """How long a move is predicted to take."""

    overhead_s: float = 1.0
    """Whatever its size."""
    bytes_per_s: float = 500e6

    def duration_s(self, memory_bytes: int) -> float:
        """Of one move."""
        return self.overhead_s + memory_bytes / self.bytes_per_s


def learn_rate(seen: Iterable[tuple[int, float]], fallback: Rate) -> Rate:
    """From (memory in bytes, seconds) of moves that were made: their median speed.

    The smallest of them tells the overhead; without any it is the fallback.
    """
    moves = sorted((memory, took_s) for memory, took_s in seen if memory > 0 and took_s > 0)
    if not moves:
        return fallback
    overhead_s = min(took_s for _memory, took_s in moves) / 2
    speeds = sorted(memory / max(took_s - overhead_s, 1e-3) for memory, took_s in moves)
    return Rate(overhead_s=overhead_s, bytes_per_s=speeds[len(speeds) // 2])


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A move of the plan."""

    request_id: str
    vm_id: str
    source: str
    target: str
    because: str
    wave: int
    """From 1: those of a wave begin when one of the wave before has ended, or at once."""
    starts_s: float
    """After the beginning, as predicted; so below."""
    ends_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Impossible:
    """A VM that cannot go."""

    vm_id: str
    source: str
    check: str
    reason: str
    hint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What would be done, in order."""

    steps: tuple[Step, ...] = ()
    impossible: tuple[Impossible, ...] = ()
    ends_s: float = 0.0
    """When the last move ends, as predicted."""
    waves: int = 0


@dataclass(slots=True)
class _Course:
    steps: list[Step] = field(default_factory=list)
    running: list[tuple[float, str, int]] = field(default_factory=list)
    """(end, request id, wave): a heap."""


def plan(schedule: Schedule, rate: Rate, *, parallel_max: int = 0) -> Plan:
    """Play a schedule through, to the end. It is used up.

    What already runs in it ends in its own time, as if begun now. `parallel_max`: at most so many
    of the waiting ones at a time; 0: as many as the limits let go.
    """
    course = _Course()
    ours = {request.request_id: request for request in schedule.requests()}
    for request_id, admission in schedule.running.items():
        ends_s = rate.duration_s(admission.request.vm.memory_bytes)
        heapq.heappush(course.running, (ends_s, request_id, 0))
    held_back = _hold_back(schedule, ours, parallel_max)
    _begin(schedule, course, rate, 0.0, 0)
    while course.running:
        now_s, request_id, wave = heapq.heappop(course.running)
        schedule.end(request_id, moved=True)
        # What ends at the same time makes room together.
        while course.running and course.running[0][0] <= now_s:
            _, other, other_wave = heapq.heappop(course.running)
            schedule.end(other, moved=True)
            wave = max(wave, other_wave)
        if held_back:
            _let_go(schedule, held_back, ours, parallel_max)
        _begin(schedule, course, rate, now_s, wave)
    stuck = [_impossible(wait) for wait in schedule.waiting(0.0)]
    stuck += [
        Impossible(
            vm_id=each.vm.vm_id,
            source=each.vm.node,
            check="NOT_REACHED",
            reason="those before it cannot go",
            hint="mend what holds them, or raise max parallel",
        )
        for each in held_back
    ]
    return Plan(
        steps=tuple(course.steps),
        impossible=tuple(stuck),
        ends_s=max((step.ends_s for step in course.steps), default=0.0),
        waves=max((step.wave for step in course.steps), default=0),
    )


def _begin(schedule: Schedule, course: _Course, rate: Rate, now_s: float, wave: int) -> None:
    for admission in schedule.admit(now_s):
        request = admission.request
        ends_s = now_s + rate.duration_s(request.vm.memory_bytes)
        heapq.heappush(course.running, (ends_s, request.request_id, wave + 1))
        course.steps.append(
            Step(
                request_id=request.request_id,
                vm_id=request.vm.vm_id,
                source=request.vm.node,
                target=admission.target,
                because=admission.because,
                wave=wave + 1,
                starts_s=now_s,
                ends_s=ends_s,
            )
        )


def _hold_back(schedule: Schedule, ours: dict[str, Request], parallel_max: int) -> list[Request]:
    """All but the first `parallel_max`, the next one last."""
    if not parallel_max or len(ours) <= parallel_max:
        return []
    later = list(ours.values())[parallel_max:]
    for request in later:
        schedule.withdraw(request.request_id)
    return later[::-1]


def _let_go(
    schedule: Schedule, held_back: list[Request], ours: dict[str, Request], parallel_max: int
) -> None:
    under_way = sum(each in ours for each in schedule.running) + len(schedule)
    while held_back and under_way < parallel_max:
        schedule.put(held_back.pop())
        under_way += 1


def _impossible(wait: Wait) -> Impossible:
    return Impossible(
        vm_id=wait.request.vm.vm_id,
        source=wait.request.vm.node,
        check=wait.reason,
        reason=wait.message,
        hint=wait.hint,
    )
