# SPDX-License-Identifier: Apache-2.0
"""Answers to repeated requests, and bitmaps."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from services.orchestrator.store import schema
from services.orchestrator.store.database import Database, insert
from services.orchestrator.store.rows import BitmapRow, IdempotencyRow

ANSWERS_MAX = 10_000
"""How many answers are kept. A number, not a time: by a clock that jumps a year ahead a request
that is repeated within a second would be done twice."""


FORGET_EVERY = 64
"""To look for the oldest costs as much as an admission: it is done now and then, by the clock,
which no caller chooses. So some more than ANSWERS_MAX may be there."""

_answers = schema.idempotency.c
_FORGET = sa.delete(schema.idempotency).where(
    _answers.created_at_ns
    <= sa.select(_answers.created_at_ns)
    .order_by(_answers.created_at_ns.desc())
    .offset(sa.bindparam("kept"))
    .limit(1)
    .scalar_subquery()
)
_KEEP = sa.insert(schema.idempotency)


def last_answer_ns() -> sa.ScalarSelect[int]:
    """When the last answer was given, by the store; to be part of another statement, or alone."""
    return sa.select(sa.func.coalesce(sa.func.max(_answers.created_at_ns), 0)).scalar_subquery()


_LAST = sa.select(last_answer_ns())


def _make_room(
    connection: sa.Connection, rows: Sequence[IdempotencyRow], last_ns: int
) -> list[dict[str, object]]:
    """Forget the oldest answers but ANSWERS_MAX - 1, now and then; the values of the next ones.

    Their order is that of `created_at_ns`, which therefore never falls, whatever the clock does.
    """
    if any((row.created_at_ns >> 8) % FORGET_EVERY == 0 for row in rows):
        connection.execute(_FORGET, {"kept": ANSWERS_MAX - 1})
    values: list[dict[str, object]] = []
    for row in rows:
        last_ns = max(row.created_at_ns, last_ns + 1)
        values.append(
            {
                "key": row.key,
                "request_hash": row.request_hash,
                "response": row.response,
                "created_at_ns": last_ns,
            }
        )
    return values


def keep_answers(connection: sa.Connection, rows: Sequence[IdempotencyRow], last_ns: int) -> None:
    """Keep answers, and forget the oldest if there are too many. `last_ns`: of last_answer_ns().

    Raises:
        sqlalchemy.exc.IntegrityError: a key was used meanwhile.
    """
    if values := _make_room(connection, rows, last_ns):
        connection.execute(_KEEP, values if len(values) > 1 else values[0])


def put_idempotency(connection: sa.Connection, row: IdempotencyRow) -> None:
    """Keep one answer.

    Raises:
        sqlalchemy.exc.IntegrityError: as keep_answers.
    """
    keep_answers(connection, [row], connection.execute(_LAST).scalar_one())


class IdempotencyTable:
    """What was answered to which key."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def get(self, key: str) -> IdempotencyRow | None:
        """The answer, if it is one of the last ANSWERS_MAX."""
        table = schema.idempotency
        query = sa.select(table).where(table.c.key == key)

        def work(connection: sa.Connection) -> IdempotencyRow | None:
            row = (connection.execute(query)).one_or_none()
            return IdempotencyRow(**row._asdict()) if row else None

        return await self._database.read(work)

    async def put(self, row: IdempotencyRow) -> None:
        """Keep an answer; the first one stays."""

        def work(connection: sa.Connection) -> None:
            last_ns = connection.execute(_LAST).scalar_one()
            connection.execute(
                insert(connection, schema.idempotency)
                .values(_make_room(connection, [row], last_ns)[0])
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
                insert(connection, table)
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
