# SPDX-License-Identifier: Apache-2.0
"""The one durable memory of the fleet: SQLite on a local file."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import sqlalchemy as sa

from services.common.errors import FailedPreconditionError
from services.orchestrator.store import identity, schema
from services.orchestrator.store.database import (
    Database,
    StoreBusyError,
    StoreError,
    StoreFullError,
    StoreReadOnlyError,
)
from services.orchestrator.store.fleet import FleetTable
from services.orchestrator.store.identity import StoreInDoubtError
from services.orchestrator.store.migrations import MigrationTable, PhaseLostError
from services.orchestrator.store.records import BitmapTable, IdempotencyTable

__all__ = [
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

    @property
    def incarnation(self) -> str:
        """Another one means another memory (I2)."""
        return self.identity.incarnation


@contextlib.asynccontextmanager
async def open_store(path: Path) -> AsyncIterator[Store]:
    """Open the store at `path`, making or upgrading it.

    Raises:
        StoreError: it cannot be opened.
        FailedPreconditionError: STORE_TOO_NEW: a newer Godwit wrote it.
    """
    database = Database(path)
    try:
        store = Store(database, await _prepare(database, path))
        if not store.identity.in_doubt:
            await store.migrations.rehearse()
        yield store
    finally:
        await database.close()


async def _prepare(database: Database, path: Path) -> dict[str, str]:
    def work(connection: sa.Connection) -> dict[str, str]:
        schema.metadata.create_all(connection)
        known = identity.read(connection)
        if not known:
            known = {
                identity.INCARNATION: identity.new_incarnation(),
                identity.SCHEMA_VERSION: str(schema.SCHEMA_VERSION),
            }
            connection.execute(
                sa.insert(schema.meta),
                [{"key": key, "value": value} for key, value in known.items()],
            )
        version = int(known["schema_version"])
        if version > schema.SCHEMA_VERSION:
            raise FailedPreconditionError(
                "STORE_TOO_NEW",
                f"{path} has schema {version}, this release knows up to {schema.SCHEMA_VERSION}",
                hint="run the release that wrote it, or a later one",
            )
        for step in range(version, schema.SCHEMA_VERSION):
            for statement in schema.UPGRADES[step]:
                connection.exec_driver_sql(statement)
        connection.execute(
            sa.update(schema.meta)
            .where(schema.meta.c.key == "schema_version")
            .values(value=str(schema.SCHEMA_VERSION))
        )
        return known

    return await database.write(work)
