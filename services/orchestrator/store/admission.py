# SPDX-License-Identifier: Apache-2.0
"""Admission: migrations are written in batches, each with all that belongs to it or not at all.

One transaction writes at a time. Who asks while one is under way would wait for a transaction of
each of those before him; so all who wait are written in the next one, by as many statements as one
of them takes. Each is checked for itself: a refusal is of the one that is refused (I7, I9).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from services.common.errors import FailedPreconditionError, GodwitError
from services.orchestrator.store import schema
from services.orchestrator.store.database import Database
from services.orchestrator.store.fleet import migration_active, vm_unknown
from services.orchestrator.store.identity import IN_DOUBT, StoreInDoubtError
from services.orchestrator.store.records import keep_answers, last_answer_ns
from services.orchestrator.store.rows import IdempotencyRow, MigrationRow, VmState, row_values

BATCH_MAX = 32
"""Admissions in one transaction: others that write wait for it, a decision above all."""

_v, _m = schema.vms.c, schema.migrations.c
# Statements are made once: to make one anew costs more than to run it.
_DOUBT = sa.select(schema.meta.c.value).where(schema.meta.c.key == IN_DOUBT)
_CHECK = (
    sa.select(
        _v.vm_id,
        _v.node,
        _v.epoch,
        _v.state,
        _m.migration_id.label("active"),
        last_answer_ns().label("last_answer_ns"),
        _DOUBT.scalar_subquery().label("doubt"),
    )
    .select_from(
        sa.outerjoin(
            schema.vms, schema.migrations, (_m.vm_id == _v.vm_id) & (_m.terminal == sa.false())
        )
    )
    .where(_v.vm_id.in_(sa.bindparam("vm_ids", expanding=True)))
)
_INSERT = sa.insert(schema.migrations)
_FIRST_TRANSITION = sa.insert(schema.transitions)


Also = tuple[sa.Insert | sa.Update, dict[str, Any]]
"""A statement that is the same object each time, and its values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A migration that is to be written, and what is written with it."""

    row: MigrationRow
    idempotency: IdempotencyRow | None = None
    """The answer to its request."""
    also: tuple[Also, ...] = ()
    """What else is written in the same transaction."""


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    asked: Asked
    done: asyncio.Future[None]


class Admitter:
    """Writes who asks. One for each store."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiting: list[_Waiting] = []
        self._task: asyncio.Task[None] | None = None

    async def admit(self, asked: Asked) -> None:
        """Write one; durable when this returns.

        Cancelled, or failed with a StoreError, it may have been written or not: read.

        Raises:
            GodwitError, sqlalchemy.exc.IntegrityError: as MigrationTable.create.
        """
        loop = asyncio.get_running_loop()
        each = _Waiting(asked, loop.create_future())
        self._waiting.append(each)
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._admit_all())
        await each.done

    async def _admit_all(self) -> None:
        while self._waiting:
            batch = self._waiting[:BATCH_MAX]
            del self._waiting[:BATCH_MAX]
            await self._admit(batch)

    async def _admit(self, batch: list[_Waiting]) -> None:
        """Every one of them hears something, whatever happens."""
        try:
            refusals = await self._database.write(lambda connection: _write(connection, batch))
        except sa.exc.IntegrityError as error:
            if len(batch) == 1:
                _answer(batch[0], error)
                return
            for each in batch:  # it is one of them: each by itself
                await self._admit([each])
        except Exception as error:  # noqa: BLE001 - whatever it is, each of them hears it
            for each in batch:
                _answer(each, error)
        else:
            for each in batch:
                _answer(each, refusals.get(each))
        finally:
            for each in batch:  # cancelled: the store is closed
                each.done.cancel()


def _answer(waiting: _Waiting, error: Exception | None) -> None:
    if waiting.done.done():
        return  # he does not wait any more
    if error is None:
        waiting.done.set_result(None)
    else:
        waiting.done.set_exception(error)


def _write(connection: sa.Connection, batch: list[_Waiting]) -> dict[_Waiting, GodwitError]:
    """Write those that can be written; why not, of the others."""
    vm_ids = sorted({each.asked.row.vm_id for each in batch})
    found = {row.vm_id: row for row in connection.execute(_CHECK, {"vm_ids": vm_ids})}
    doubt = _doubt(connection, list(found.values()))
    last_ns = max((row.last_answer_ns for row in found.values()), default=0)
    active: dict[str, str] = {row.vm_id: row.active for row in found.values() if row.active}
    refusals: dict[_Waiting, GodwitError] = {}
    admitted: list[Asked] = []
    for each in batch:
        row = each.asked.row
        if doubt:
            refusals[each] = StoreInDoubtError(doubt)
        elif refusal := _refusal(row, found.get(row.vm_id), active.get(row.vm_id, "")):
            refusals[each] = refusal
        else:
            active[row.vm_id] = row.migration_id
            admitted.append(each.asked)
    if admitted:
        _insert(connection, admitted, last_ns)
    return refusals


def _doubt(connection: sa.Connection, found: list[Any]) -> str:
    """Why nothing is admitted, or ""; part of the check, unless that found no VM."""
    doubt = found[0].doubt if found else connection.execute(_DOUBT).scalar_one_or_none()
    return str(doubt or "")


def _refusal(row: MigrationRow, vm: Any, active: str) -> GodwitError | None:
    if vm is None:
        return vm_unknown(row.vm_id)
    if active:
        return migration_active(row.vm_id, active)
    if vm.state != VmState.RUNNING:
        return FailedPreconditionError(
            "VM_NOT_RUNNING",
            f"VM {vm.vm_id} is {vm.state}",
            hint="try again when it runs",
            metadata={"vm_id": vm.vm_id, "state": vm.state},
        )
    if (vm.node, vm.epoch) != (row.source_node, row.source_epoch):
        return FailedPreconditionError(
            "VM_MOVED", f"VM {vm.vm_id} is on node {vm.node} now", hint="try again"
        )
    return None


def _insert(connection: sa.Connection, admitted: list[Asked], last_ns: int) -> None:
    rows = [each.row for each in admitted]
    _execute(connection, _INSERT, (row_values(row) for row in rows))
    _execute(
        connection,
        _FIRST_TRANSITION,
        (
            {
                "migration_id": row.migration_id,
                "sequence": 1,
                "phase": row.phase,
                "at_ns": row.created_at_ns,
                "message": "",
            }
            for row in rows
        ),
    )
    others: dict[sa.Insert | sa.Update, list[dict[str, Any]]] = {}
    for each in admitted:
        for statement, values in each.also:
            others.setdefault(statement, []).append(values)
    for statement, given in others.items():
        _execute(connection, statement, given)
    keep_answers(connection, [each.idempotency for each in admitted if each.idempotency], last_ns)


def _execute(
    connection: sa.Connection, statement: sa.Insert | sa.Update, values: Iterable[dict[str, Any]]
) -> None:
    given = list(values)
    connection.execute(statement, given if len(given) > 1 else given[0])
