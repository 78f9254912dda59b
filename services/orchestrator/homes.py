# SPDX-License-Identifier: Apache-2.0
"""A guest's place in the books of whatever runs the cluster, beside our own reservation."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

from services.orchestrator.store.rows import MigrationRow

Prepare = Callable[[MigrationRow], Awaitable[None]]


class Homes(Protocol):
    """Makes room for a guest where it goes."""

    async def prepare(self, row: MigrationRow) -> None:
        """Return once the destination has a place for the guest.

        Called before anything is prepared on either side, and again after a restart. The place is
        given up again by whoever made it, when the store says that the migration is over.

        Raises:
            GodwitError: there is none, and why.
        """


class NoHomes:
    """Nobody else keeps books."""

    async def prepare(self, row: MigrationRow) -> None:
        """See Homes."""


class HomesInCharge:
    """Homes of a controller that may not be at work just now: then a move waits for it.

    As long as PREPARING may take, then the move fails, and the guest has noticed nothing.
    """

    def __init__(self) -> None:
        self._prepare: Prepare | None = None
        self._changed = asyncio.Event()

    def use(self, prepare: Prepare | None) -> None:
        """The controller is at work, or (None) is not any more."""
        self._prepare = prepare
        if prepare:
            self._changed.set()
        else:
            self._changed.clear()

    async def prepare(self, row: MigrationRow) -> None:
        """See Homes."""
        await self._changed.wait()
        assert self._prepare is not None
        await self._prepare(row)
