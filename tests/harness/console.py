# SPDX-License-Identifier: Apache-2.0
"""Reads what the demo's guest says on its console."""

from __future__ import annotations

import asyncio
import itertools
import re
from pathlib import Path

_BEAT = re.compile(r"^HB (\d+) ", re.MULTILINE)
_SWEEP = re.compile(r"^SWEEP (\d+) (begin|end) ", re.MULTILINE)
_ERROR = re.compile(r"^(?:WL ERR|.*Kernel panic|.*BUG:).*$", re.MULTILINE)
POLL_S = 0.02


def beats_in(text: str) -> list[int]:
    """Numbers of the heartbeats. Join the texts of two runs: a stop may cut a line in two."""
    return [int(number) for number in _BEAT.findall(text.replace("\r", ""))]


class Console:
    """One console log."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def text(self) -> str:
        """All of it."""
        return (
            self._path.read_text(errors="replace").replace("\r", "") if self._path.exists() else ""
        )

    def beats(self) -> list[int]:
        """Numbers of the heartbeats."""
        return beats_in(self.text())

    def last_beat(self) -> int:
        """The last heartbeat so far."""
        return self.beats()[-1]

    def follows(self, source: Console) -> bool:
        """The guest went on here where it stopped there: no beat lost, none twice."""
        beats = beats_in(source.text() + self.text())
        return bool(self.text()) and all(b == a + 1 for a, b in itertools.pairwise(beats))

    def reached(self) -> int:
        """The last heartbeat so far; -1 before the first."""
        return max(self.beats(), default=-1)

    def errors(self) -> list[str]:
        """What the guest found wrong, and what it did that it should not."""
        beats = self.beats()
        gaps = [f"{a} -> {b}" for a, b in itertools.pairwise(beats) if b != a + 1]
        return [*_ERROR.findall(self.text()), *gaps]

    async def wait_beat(self, number: int) -> None:
        """Return once the guest has come that far; the test's timeout ends a wait in vain."""
        while self.reached() < number:  # noqa: ASYNC110 - a file has no event
            await asyncio.sleep(POLL_S)

    def sweeps(self) -> int:
        """Passes over all pages that began and ended on this console."""
        seen = {"begin": set[int](), "end": set[int]()}
        for number, what in _SWEEP.findall(self.text()):
            seen[what].add(int(number))
        return len(seen["begin"] & seen["end"])

    async def wait_sweeps(self, count: int) -> None:
        """Return once the guest has verified all its pages that often."""
        while self.sweeps() < count:  # noqa: ASYNC110 - a file has no event
            await asyncio.sleep(POLL_S)
