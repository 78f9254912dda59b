# SPDX-License-Identifier: Apache-2.0
"""Keys that have to be looked at: each at most once at a time, with back-off after a failure."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable

from services.common.errors import GodwitError
from services.orchestrator.kubernetes.api import ConflictError

log = logging.getLogger(__name__)

BACK_OFF_S_MIN = 0.1
BACK_OFF_S_MAX = 60.0

Reconcile = Callable[[str], Awaitable[float | None]]
"""Makes one key right, by what is true now. Returns in how many seconds it wants to look again."""


class WorkQueue:
    """Level-triggered: a key says that something about it changed, not what.

    A key that is added while it is being looked at is looked at once more afterwards. One that
    fails comes back after a delay that doubles, with jitter, to a minute; one that succeeds is
    forgiven. `async with queue.running()` is its life.
    """

    def __init__(
        self, reconcile: Reconcile, *, what: str, workers: int = 4, seed: int | None = None
    ) -> None:
        self._reconcile = reconcile
        self._what = what
        self._workers = workers
        self._random = random.Random(seed)  # noqa: S311 - jitter
        self._ready: asyncio.Queue[str] = asyncio.Queue()
        self._waiting: set[str] = set()
        """In `_ready`."""
        self._busy: set[str] = set()
        self._again: set[str] = set()
        """Added while they were looked at."""
        self._failures: dict[str, int] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def add(self, key: str) -> None:
        """Look at it as soon as may be."""
        if timer := self._timers.pop(key, None):
            timer.cancel()
        if key in self._busy:
            self._again.add(key)
        elif key not in self._waiting:
            self._waiting.add(key)
            self._ready.put_nowait(key)

    def add_after(self, key: str, delay_s: float) -> None:
        """Look at it then, if nothing makes us look earlier."""
        loop = asyncio.get_running_loop()
        timer = self._timers.get(key)
        if timer and timer.when() <= loop.time() + delay_s:
            return
        if timer:
            timer.cancel()
        self._timers[key] = loop.call_later(delay_s, self._due, key)

    def _due(self, key: str) -> None:
        self._timers.pop(key, None)
        self.add(key)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Look at what is added, for the length of the block."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._work()) for _ in range(self._workers)]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
                for timer in self._timers.values():
                    timer.cancel()
                self._timers.clear()

    async def _work(self) -> None:
        while True:
            key = await self._ready.get()
            self._waiting.discard(key)
            self._busy.add(key)
            try:
                await self._look(key)
            finally:
                self._busy.discard(key)
                if key in self._again:
                    self._again.discard(key)
                    self.add(key)

    async def _look(self, key: str) -> None:
        try:
            again_s = await self._reconcile(key)
        except ConflictError:
            # Somebody wrote in between: what we look at next is newer.
            self._fail(key, BACK_OFF_S_MIN)
        except GodwitError as error:
            delay_s = self._fail(key)
            log.warning("%s %s: %s; again in %.1f s", self._what, key, error, delay_s)
        except Exception:
            delay_s = self._fail(key)
            log.exception("%s %s: a bug; again in %.1f s", self._what, key, delay_s)
        else:
            self._failures.pop(key, None)
            if again_s is not None:
                self.add_after(key, again_s)

    def _fail(self, key: str, most_s: float = BACK_OFF_S_MAX) -> float:
        count = self._failures[key] = self._failures.get(key, 0) + 1
        delay_s = min(BACK_OFF_S_MIN * 2.0 ** min(count - 1, 16), most_s)
        delay_s *= self._random.uniform(0.5, 1.0)
        self.add_after(key, delay_s)
        return delay_s
