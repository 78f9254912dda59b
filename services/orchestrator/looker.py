# SPDX-License-Identifier: Apache-2.0
"""Looks again whenever something changed, and now and then untold."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

from services.common.errors import GodwitError


class Looker:
    """Level-triggered: calls `look`, waits to be woken, calls it again. `async with running()`."""

    def __init__(
        self,
        look: Callable[[], Awaitable[object]],
        *,
        look_s: float,
        gather_s: float,
        log: logging.Logger,
        what: str,
    ) -> None:
        """Look at the latest every `look_s`; changes within `gather_s` are looked at together.

        What `look` raises as a GodwitError is said in `log`, of `what`, and the next look comes.
        """
        self._look = look
        self._look_s = look_s
        self._gather_s = gather_s
        self._log = log
        self._what = what
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """Something changed: look."""
        self._wake.set()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Look, again and again, for the length of the block."""
        async with asyncio.TaskGroup() as group:
            task = group.create_task(self._run())
            try:
                yield
            finally:
                task.cancel()

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            try:
                await self._look()
            except GodwitError as error:
                self._log.warning("%s could not be looked at: %s", self._what, error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._look_s):
                    await self._wake.wait()
            await asyncio.sleep(self._gather_s)
