# SPDX-License-Identifier: Apache-2.0
"""Every heartbeat that a microvm has ever made, on whatever node: proof that there is one of it.

Its VMMs append each beat to one file (`--beat-log`), which outlives them. Of each vCPU the numbers
must go up by exactly one from record to record: a beat of the source after one of the destination
repeats a number, a guest that runs on from an old state repeats many, a lost one leaves a hole.
"""

from __future__ import annotations

import abc
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path

_RECORD = struct.Struct("=QQII")
"""struct mv_logged_beat."""
_TROUBLE_MAX = 20
GAP_NS = 50_000_000
"""A guest that is silent for so long is held, or its host is busy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """Attributes: number (from 1, by one), t_ns CLOCK_MONOTONIC, pid of the VMM, vcpu."""

    number: int
    t_ns: int
    pid: int
    vcpu: int


@dataclass(slots=True, kw_only=True)
class Window:
    """What was said since it was opened.

    Attributes:
        held_ns: the longest that any vCPU was silent between two beats.
        gaps: (from, to) of each silence longer than GAP_NS, CLOCK_MONOTONIC.
        doubled: beats whose number was there before, and VMMs that spoke after their successor.
        missing: numbers that nobody said.
        count: beats.
        pids: VMMs that spoke, in the order of their first beat.
    """

    held_ns: int = 0
    gaps: list[tuple[int, int]] = field(default_factory=list)
    doubled: int = 0
    missing: int = 0
    count: int = 0
    pids: list[int] = field(default_factory=list)


class Beats(abc.ABC):
    """Judges the beats of one guest, wherever they are read."""

    def __init__(self, vcpu_count: int) -> None:
        self.window = Window()
        self.last: list[Beat | None] = [None] * vcpu_count
        self.trouble: list[str] = []
        self.may_lack = False
        """Beats may be missing: where they are written there is no room."""

    @abc.abstractmethod
    def poll(self) -> list[Beat]:
        """Read what is new, and judge it."""

    @abc.abstractmethod
    def close(self) -> None:
        """Read no more."""

    def open_window(self) -> None:
        """Begin to count anew, from the last beats on."""
        self.poll()
        self.window = Window()
        self.trouble = []

    def went_on_after(self, t_ns: int) -> int | None:
        """How long a guest that was held at `t_ns` was held on: the vCPU that was held longest.

        None: it was not held then.
        """
        return max((to - t_ns for since, to in self.window.gaps if since < t_ns < to), default=None)

    def silent_ns(self, now_ns: int) -> int:
        """How long the vCPU that has been silent longest has been silent."""
        self.poll()
        return max((now_ns - beat.t_ns for beat in self.last if beat), default=0)

    def judge(self, beat: Beat) -> None:
        """Take a beat in, in its turn."""
        window, before = self.window, self.last[beat.vcpu]
        window.count += 1
        if beat.pid not in window.pids:
            window.pids.append(beat.pid)
        elif beat.pid != window.pids[-1]:
            window.doubled += 1
            self.tell(f"{beat} of a VMM that had been followed by {window.pids[-1]}")
        if before is not None:
            window.held_ns = max(window.held_ns, beat.t_ns - before.t_ns)
            if beat.t_ns - before.t_ns > GAP_NS:
                window.gaps.append((before.t_ns, beat.t_ns))
            if beat.number <= before.number:
                window.doubled += 1
                self.tell(f"{beat} came after {before}")
            elif beat.number > before.number + 1 and not self.may_lack:
                window.missing += beat.number - before.number - 1
                self.tell(f"{beat} came after {before}")
        self.last[beat.vcpu] = beat

    def tell(self, what: str) -> None:
        """Keep what is wrong for the result."""
        if len(self.trouble) < _TROUBLE_MAX:
            self.trouble.append(what)


class BeatLog(Beats):
    """Reads one microvm's log as it grows."""

    def __init__(self, path: Path, vcpu_count: int) -> None:
        super().__init__(vcpu_count)
        self.path = path
        self._file = path.open("rb")

    def close(self) -> None:
        """Close and remove the file."""
        self._file.close()
        self.path.unlink(missing_ok=True)

    def poll(self) -> list[Beat]:
        """Read what is new, and judge it."""
        data = self._file.read()
        whole = len(data) - len(data) % _RECORD.size
        if whole != len(data):
            self._file.seek(whole - len(data), os.SEEK_CUR)
        news = [
            Beat(number=number, t_ns=t_ns, pid=pid, vcpu=vcpu)
            for number, t_ns, pid, vcpu in _RECORD.iter_unpack(data[:whole])
        ]
        for beat in news:
            self.judge(beat)
        return news
