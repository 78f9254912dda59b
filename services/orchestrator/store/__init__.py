# SPDX-License-Identifier: Apache-2.0
"""The one durable memory of the fleet: SQLite on a local file, or PostgreSQL."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from services.orchestrator.store import identity, opening
from services.orchestrator.store.database import (
    Database,
    StoreBusyError,
    StoreError,
    StoreFullError,
    StoreReadOnlyError,
)
from services.orchestrator.store.fleet import FleetTable
from services.orchestrator.store.identity import StoreInDoubtError
from services.orchestrator.store.leadership import NotLeaderError
from services.orchestrator.store.migrations import MigrationTable, PhaseLostError
from services.orchestrator.store.operations import OperationTable
from services.orchestrator.store.records import BitmapTable, IdempotencyTable
from services.orchestrator.store.schedule import ScheduleTable

__all__ = [
    "NotLeaderError",
    "PhaseLostError",
    "Store",
    "StoreBusyError",
    "StoreError",
    "StoreFullError",
    "StoreInDoubtError",
    "StoreReadOnlyError",
    "open_store",
]


class Store:
    """What the orchestrator remembers."""

    def __init__(self, database: Database, known: dict[str, str]) -> None:
        self.database = database
        self.identity = identity.Identity(database, known)
        self.fleet = FleetTable(database)
        self.migrations = MigrationTable(database)
        self.idempotency = IdempotencyTable(database)
        self.bitmaps = BitmapTable(database)
        self.schedule = ScheduleTable(database)
        self.operations = OperationTable(database)

    @property
    def incarnation(self) -> str:
        """Another one means another memory (I2)."""
        return self.identity.incarnation


@contextlib.asynccontextmanager
async def open_store(where: str | Path) -> AsyncIterator[Store]:
    """Open the store at a path, or at postgresql://..., making or upgrading it.

    Raises:
        StoreError: it cannot be opened.
        InvalidArgumentError: STORE_INVALID: it is neither.
        FailedPreconditionError: STORE_TOO_NEW: a newer Godwit wrote it.
    """
    database = opening.database_of(where)
    try:
        store = Store(database, await database.prepare(opening.prepare))
        if not store.identity.in_doubt:
            await store.migrations.rehearse()
        yield store
    finally:
        await database.close()
