# SPDX-License-Identifier: Apache-2.0
"""Answers to repeated requests, and bitmaps."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.dialects import sqlite

from services.orchestrator.store import schema
from services.orchestrator.store.database import Database
from services.orchestrator.store.rows import BitmapRow, IdempotencyRow

IDEMPOTENCY_NS = 24 * 3600 * 10**9
"""How long an answer is kept."""


def put_idempotency(connection: sa.Connection, row: IdempotencyRow) -> None:
    """Keep an answer, and forget those that are a day old.

    Raises:
        sqlalchemy.exc.IntegrityError: the key was used meanwhile.
    """
    table = schema.idempotency
    connection.execute(
        sa.delete(table).where(table.c.created_at_ns < row.created_at_ns - IDEMPOTENCY_NS)
    )
    connection.execute(
        sa.insert(table).values(
            key=row.key,
            request_hash=row.request_hash,
            response=row.response,
            created_at_ns=row.created_at_ns,
        )
    )


class IdempotencyTable:
    """What was answered to which key."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def get(self, key: str, *, now_ns: int) -> IdempotencyRow | None:
        """The answer, if it was given within a day."""
        table = schema.idempotency
        query = sa.select(table).where(
            table.c.key == key, table.c.created_at_ns >= now_ns - IDEMPOTENCY_NS
        )

        def work(connection: sa.Connection) -> IdempotencyRow | None:
            row = (connection.execute(query)).one_or_none()
            return IdempotencyRow(**row._asdict()) if row else None

        return await self._database.read(work)

    async def put(self, row: IdempotencyRow) -> None:
        """Keep an answer; the first one stays."""

        def work(connection: sa.Connection) -> None:
            table = schema.idempotency
            connection.execute(
                sa.delete(table).where(table.c.created_at_ns < row.created_at_ns - IDEMPOTENCY_NS)
            )
            connection.execute(
                sqlite.insert(table)
                .values(
                    key=row.key,
                    request_hash=row.request_hash,
                    response=row.response,
                    created_at_ns=row.created_at_ns,
                )
                .on_conflict_do_nothing()
            )

        await self._database.write(work)


class BitmapTable:
    """The last written userfault bitmap of each VM."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def put(self, row: BitmapRow) -> None:
        """Write one, unless a later epoch's is there."""
        table = schema.bitmaps
        values = {
            "vm_id": row.vm_id,
            "epoch": row.epoch,
            "page_size_bytes": row.page_size_bytes,
            "page_count": row.page_count,
            "absent_count": row.absent_count,
            "packed": row.packed,
        }

        def work(connection: sa.Connection) -> None:
            connection.execute(
                sqlite.insert(table)
                .values(values)
                .on_conflict_do_update(
                    index_elements=[table.c.vm_id], set_=values, where=table.c.epoch <= row.epoch
                )
            )

        await self._database.write(work)

    async def all(self) -> list[BitmapRow]:
        """Every one."""

        def work(connection: sa.Connection) -> list[BitmapRow]:
            found = connection.execute(sa.select(schema.bitmaps))
            return [BitmapRow(**row._asdict()) for row in found]

        return await self._database.read(work)
