# SPDX-License-Identifier: Apache-2.0
"""Reads what a rebuild starts from, and writes what it found, in one transaction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sqlalchemy as sa

from services.orchestrator.store import identity, schema
from services.orchestrator.store.database import Database
from services.orchestrator.store.migrations import add_transition
from services.orchestrator.store.rows import MigrationRow, VmRow, row_values


async def all_migrations(database: Database) -> list[MigrationRow]:
    """Every migration, ended or not."""

    def work(connection: sa.Connection) -> list[MigrationRow]:
        return [MigrationRow.of(row) for row in connection.execute(sa.select(schema.migrations))]

    return await database.read(work)


async def write(
    database: Database,
    *,
    vms: Mapping[str, VmRow | None],
    last_epochs: Mapping[str, int],
    migrations: Sequence[MigrationRow],
) -> None:
    """Write all of it, and that the store is no longer in doubt. Epochs only grow."""

    def work(connection: sa.Connection) -> None:
        for vm_id, epoch in last_epochs.items():
            _put_epoch(connection, vm_id, epoch)
        # What has ended first: one that only the nodes know may be under way in its place, and the
        # store lets one of a VM be under way at any time, in a transaction too.
        for row in sorted(migrations, key=lambda row: not row.terminal):
            _put_migration(connection, row)
        for vm_id, vm in vms.items():
            connection.execute(sa.delete(schema.vms).where(schema.vms.c.vm_id == vm_id))
            if vm is not None:
                values = {column.name: getattr(vm, column.name) for column in schema.vms.columns}
                connection.execute(sa.insert(schema.vms).values(values))
        identity.put(connection, identity.IN_DOUBT, "")

    await database.write(work)


def _put_epoch(connection: sa.Connection, vm_id: str, epoch: int) -> None:
    table = schema.epochs
    known = connection.execute(
        sa.update(table).where(table.c.vm_id == vm_id).values(last_epoch=epoch)
    )
    if not known.rowcount:
        connection.execute(sa.insert(table).values(vm_id=vm_id, last_epoch=epoch))


def _put_migration(connection: sa.Connection, row: MigrationRow) -> None:
    table, values = schema.migrations, row_values(row)
    known = connection.execute(
        sa.update(table).where(table.c.migration_id == row.migration_id).values(values)
    )
    if not known.rowcount:
        connection.execute(sa.insert(table).values(values))
    add_transition(connection, row.migration_id, row.phase, row.phase_at_ns, row.message)
