# SPDX-License-Identifier: Apache-2.0
"""Starts every part that has died again: what systemd or a DaemonSet does, and nothing more."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from services.common.errors import UnavailableError
from services.demo.cluster import Cluster
from services.demo.part import Part

POLL_S = 0.005
AGAIN_S = 0.5
"""After a start that failed, as on a full disk."""


@dataclass(slots=True, kw_only=True)
class Down:
    """One death of a part. CLOCK_MONOTONIC; 0: not yet. `died_ns` is when it was noticed."""

    part: str
    died_ns: int
    spawned_ns: int = 0
    up_ns: int = 0
    failed_starts: int = 0
    forked: bool = False
    """Its parent lived and forked the next one; it is not known when that one answers."""


class Keeper:
    """Use `keeping`. Attributes: delay_s (from a death to the new process), downs (all of them)."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.delay_s = 0.0
        self.downs: list[Down] = []
        self._starting: set[str] = set()
        self._workers: dict[str, int] = {}

    @property
    def all_up(self) -> bool:
        """Every part runs and answers."""
        return not self._starting and all(part.is_running for part in self._cluster.parts)

    async def wait_up(self) -> None:
        """Return once every part runs and answers."""
        while not self.all_up:  # noqa: ASYNC110 - processes
            await asyncio.sleep(POLL_S)

    async def watch(self, part: Part) -> None:
        """Keep one part running."""
        while True:
            await asyncio.sleep(POLL_S)
            if part.is_running:
                self._watch_worker(part)
                continue
            self._starting.add(part.name)
            down = Down(part=part.name, died_ns=time.monotonic_ns())
            self.downs.append(down)
            await asyncio.sleep(self.delay_s)
            while True:
                down.spawned_ns = time.monotonic_ns()
                try:
                    await self._cluster.start(part)
                    break
                except UnavailableError:
                    down.failed_starts += 1
                    await asyncio.sleep(AGAIN_S)
            down.up_ns = time.monotonic_ns()
            self._starting.discard(part.name)
            self._workers.pop(part.name, None)

    def _watch_worker(self, part: Part) -> None:
        """Take note if the parent of a part's worker has forked another."""
        now, pid = time.monotonic_ns(), part.worker_pid
        if pid and self._workers.setdefault(part.name, pid) != pid:
            self._workers[part.name] = pid
            self.downs.append(Down(part=part.name, died_ns=now, spawned_ns=now, forked=True))


@asynccontextmanager
async def keeping(cluster: Cluster) -> AsyncIterator[Keeper]:
    """Keep every part of a cluster running for the length of the block."""
    keeper = Keeper(cluster)
    tasks = [asyncio.create_task(keeper.watch(part)) for part in cluster.parts]
    try:
        yield keeper
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
