# SPDX-License-Identifier: Apache-2.0
"""Drives native/bench/bench_page_path.c: one command, one measurement."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Any

from tests.bench.processes import REPO, line

PROGRAM = REPO / "build/native/bench_page_path"


class Kind(IntEnum):
    """What the source's memory holds; enum bench_kind."""

    RAW = 0
    ZERO_HEAVY = 1
    TEXT = 2
    HOLE = 3


class PagePath:
    """A running program and its source."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.own_network: bool = json.loads(line(process))["own_network"]

    def ask(self, *words: object) -> dict[str, Any]:
        """What one command measured.

        Raises:
            RuntimeError: it ended; stderr says at which check.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(str(word) for word in words).encode() + b"\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(line(self._process))
        return answer

    def serve(self, kind: Kind, mib: int) -> Path:
        """A new source; the file that its memory is."""
        answer = self.ask("serve", int(kind), mib)
        return Path(f"/proc/{answer['pid']}/fd/{answer['memory_fd']}")

    def samples(self, *words: object) -> list[float]:
        """Microseconds."""
        return [ns / 1000 for ns in self.ask(*words)["ns"]]

    def rate(self, *words: object) -> float:
        """MB/s."""
        answer = self.ask(*words)
        return float(answer["bytes"] / answer["elapsed_ns"] * 1000)

    def demand(
        self,
        *,
        bulk: int | None,
        count: int,
        threads: int = 1,
        think_us: int = 0,
        in_order: bool = False,
    ) -> dict[str, Any]:
        """Faults; `bulk`: bytes/s, 0 = no limit, None = none."""
        rate = "off" if bulk is None else bulk
        return self.ask("demand", rate, threads, count, think_us, int(in_order))


@contextmanager
def page_path(prefix: Sequence[str] = ()) -> Iterator[PagePath]:
    """Start it; `prefix`: what runs it."""
    process = subprocess.Popen(
        [*prefix, str(PROGRAM)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=REPO,
        env={**os.environ, "LC_ALL": "C"},
    )
    try:
        yield PagePath(process)
        assert process.stdin is not None
        process.stdin.close()
        if process.wait(60) != 0:
            raise RuntimeError(f"{PROGRAM.name} ended with {process.returncode}")
    finally:
        process.kill()
        process.wait()
