# SPDX-License-Identifier: Apache-2.0
"""How many pages of a guest were absent, over the time of its arrival. Sans-IO, bounded."""

from __future__ import annotations

from dataclasses import dataclass, field

POINT_COUNT_MAX = 256
"""Of one VM. With more, every second one goes, and points come half as often."""
GAP_NS_FIRST = 100_000_000
VM_COUNT_MAX = 2_000
"""Whose series are kept: of those that arrived, or are arriving, last."""


@dataclass(frozen=True, slots=True)
class Point:
    """What was absent at a moment."""

    at_ns: int
    """Wall clock, for people."""
    absent_count: int


@dataclass(slots=True)
class Series:
    """One arrival. The first point is its beginning, the last one is the newest there was."""

    epoch: int
    page_count: int = 0
    points: list[Point] = field(default_factory=list)
    gap_ns: int = GAP_NS_FIRST
    """Between two points that are kept, at least; the last one may be nearer."""

    def add(self, point: Point) -> None:
        """The newest."""
        points = self.points
        if len(points) > 1 and points[-1].at_ns - points[-2].at_ns < self.gap_ns:
            points.pop()  # it was there only for being the newest
        points.append(point)
        if len(points) > POINT_COUNT_MAX:
            self.points = [*points[:-1:2], points[-1]]
            self.gap_ns *= 2


class Residency:
    """The series of the VMs that arrived last."""

    def __init__(self) -> None:
        self._series: dict[str, Series] = {}

    def get(self, vm_id: str, epoch: int) -> Series | None:
        """The VM's under the epoch of its owner."""
        series = self._series.get(vm_id)
        return series if series and series.epoch == epoch else None

    def add(self, vm_id: str, epoch: int, page_count: int, point: Point) -> None:
        """What is known now."""
        series = self._series.pop(vm_id, None)
        if series is None or series.epoch != epoch:
            series = Series(epoch)
        self._series[vm_id] = series  # the last to be let go of
        series.page_count = page_count
        series.add(point)
        while len(self._series) > VM_COUNT_MAX:
            del self._series[next(iter(self._series))]

    def forget(self, vm_id: str) -> None:
        """The VM is gone."""
        self._series.pop(vm_id, None)
