# SPDX-License-Identifier: Apache-2.0
"""Operations, their VMs, and which node is kept empty by which."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

import sqlalchemy as sa

from services.common.errors import AlreadyExistsError, FailedPreconditionError, NotFoundError
from services.orchestrator.operations.model import (
    ENDED,
    Item,
    ItemState,
    Kind,
    Operation,
    Options,
    State,
)
from services.orchestrator.scheduling.model import Priority
from services.orchestrator.store import schedule_schema as tables
from services.orchestrator.store.database import Database
from services.orchestrator.store.identity import refuse_in_doubt
from services.orchestrator.store.records import put_idempotency
from services.orchestrator.store.rows import IdempotencyRow
from services.orchestrator.store.schedule import change_node

_o = tables.operations.c
_i = tables.operation_vms.c


def operation_unknown(operation_id: str) -> NotFoundError:
    """The refusal of an operation that there never was."""
    return NotFoundError(
        "OPERATION_UNKNOWN",
        f"there is no operation {operation_id!r}",
        hint="list the operations",
        metadata={"operation_id": operation_id},
    )


def _values(operation: Operation) -> dict[str, Any]:
    return {
        "operation_id": operation.operation_id,
        "kind": operation.kind,
        "node": operation.node,
        "state": operation.state,
        "ended": operation.ended,
        "paused": operation.paused,
        "options": json.dumps(asdict(operation.options)),
        "reason": operation.reason,
        "message": operation.message,
        "hint": operation.hint,
        "created_at_ns": operation.created_at_ns,
        "ended_at_ns": operation.ended_at_ns,
        "version": operation.version,
    }


def _operation(row: Any) -> Operation:
    values = row._asdict()
    del values["ended"]
    options = json.loads(values["options"])
    options |= {"priority": Priority(options["priority"]), "windows": tuple(options["windows"])}
    return Operation(
        **(
            values
            | {
                "kind": Kind(values["kind"]),
                "state": State(values["state"]),
                "options": Options(**options),
            }
        )
    )


def _item(row: Any) -> Item:
    values = row._asdict()
    del values["operation_id"]
    return Item(**(values | {"state": ItemState(values["state"])}))


class OperationTable:
    """Reads and writes operations."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(
        self,
        operation: Operation,
        items: Iterable[Item],
        *,
        close: bool = False,
        reopen: bool = False,
        idempotency: IdempotencyRow | None = None,
    ) -> None:
        """Insert one; in the same transaction its node is closed, or opened again.

        Raises:
            AlreadyExistsError: OPERATION_ACTIVE: the node has one.
        """

        def work(connection: sa.Connection) -> None:
            refuse_in_doubt(connection)
            if operation.node:
                _refuse_second(connection, operation.node)
            connection.execute(sa.insert(tables.operations).values(_values(operation)))
            rows = [asdict(item) | {"operation_id": operation.operation_id} for item in items]
            if rows:
                connection.execute(sa.insert(tables.operation_vms), rows)
            if close:
                change_node(connection, operation.node, closed_by=operation.operation_id)
            if reopen:
                change_node(connection, operation.node, closed_by="")
            if idempotency:
                put_idempotency(connection, idempotency)

        await self._database.write(work)

    async def get(self, operation_id: str) -> tuple[Operation, tuple[Item, ...]]:
        """One, with its VMs in order.

        Raises:
            NotFoundError: OPERATION_UNKNOWN.
        """

        def work(connection: sa.Connection) -> tuple[Operation, tuple[Item, ...]]:
            return _get(connection, operation_id)

        return await self._database.read(work)

    async def unfinished(self) -> list[Operation]:
        """All that have not ended, the oldest first."""
        query = sa.select(tables.operations).where(~_o.ended).order_by(_o.operation_id)

        def work(connection: sa.Connection) -> list[Operation]:
            return [_operation(row) for row in connection.execute(query)]

        return await self._database.read(work)

    async def vms_page(self, operation_id: str, *, after: str, count: int) -> list[Item]:
        """At most `count` VMs of one, in order, after the VM `after`.

        Raises:
            NotFoundError: OPERATION_UNKNOWN.
        """
        place = (
            sa.select(_i.sequence)
            .where(_i.operation_id == operation_id, _i.vm_id == after)
            .scalar_subquery()
        )
        query = (
            sa.select(tables.operation_vms)
            .where(_i.operation_id == operation_id)
            .order_by(_i.sequence, _i.vm_id)
            .limit(count)
        )
        if after:
            later = (_i.sequence > place) | ((_i.sequence == place) & (_i.vm_id > after))
            query = query.where(later)

        def work(connection: sa.Connection) -> list[Item]:
            there = sa.select(_o.operation_id).where(_o.operation_id == operation_id)
            if connection.execute(there).one_or_none() is None:
                raise operation_unknown(operation_id)
            return [_item(row) for row in connection.execute(query)]

        return await self._database.read(work)

    async def page(
        self, *, before: str, count: int, unfinished: bool = False
    ) -> list[tuple[Operation, dict[str, int]]]:
        """At most `count`, the newest first, older than id `before`; with VMs by state.

        `unfinished`: only those that have not ended.
        """
        query = sa.select(tables.operations).order_by(_o.operation_id.desc()).limit(count)
        if before:
            query = query.where(_o.operation_id < before)
        if unfinished:
            query = query.where(~_o.ended)

        def work(connection: sa.Connection) -> list[tuple[Operation, dict[str, int]]]:
            found = [_operation(row) for row in connection.execute(query)]
            counts: dict[str, dict[str, int]] = {each.operation_id: {} for each in found}
            rows = connection.execute(
                sa.select(_i.operation_id, _i.state, sa.func.count().label("n"))
                .where(_i.operation_id.in_(counts))
                .group_by(_i.operation_id, _i.state)
            )
            for row in rows:
                counts[row.operation_id][row.state] = row.n
            return [(each, counts[each.operation_id]) for each in found]

        return await self._database.read(work)

    async def last_drain(self, node: str) -> tuple[Operation, tuple[Item, ...]] | None:
        """The last drain of a node, whatever became of it."""
        query = (
            sa.select(_o.operation_id)
            .where(_o.kind == Kind.DRAIN, _o.node == node)
            .order_by(_o.operation_id.desc())
            .limit(1)
        )

        def work(connection: sa.Connection) -> tuple[Operation, tuple[Item, ...]] | None:
            found = connection.execute(query).scalar_one_or_none()
            return _get(connection, found) if found else None

        return await self._database.read(work)

    async def write(
        self, before: Operation, after: Operation, items: Iterable[Item], *, now_ns: int
    ) -> bool:
        """What a step led to; `items`: those that changed. False: it was changed meanwhile.

        A drain that ends as cancelled opens its node again in the same transaction.
        """
        ends = after.ended and not before.ended
        after = replace(
            after, version=before.version + 1, ended_at_ns=now_ns if ends else before.ended_at_ns
        )
        values = _values(after)

        def work(connection: sa.Connection) -> bool:
            written = connection.execute(
                sa.update(tables.operations)
                .where(_o.operation_id == before.operation_id, _o.version == before.version)
                .values(values)
            )
            if written.rowcount != 1:
                return False
            for item in items:
                _put_item(connection, before.operation_id, item)
            if ends and after.kind is Kind.DRAIN and after.state is State.CANCELLED:
                connection.execute(
                    sa.update(tables.node_settings)
                    .where(
                        tables.node_settings.c.name == after.node,
                        tables.node_settings.c.closed_by == after.operation_id,
                    )
                    .values(closed_by="")
                )
            return True

        return await self._database.write(work)

    async def change(
        self, operation_id: str, *, cancel: bool = False, paused: bool | None = None
    ) -> None:
        """What operators may change of one under way.

        Raises:
            NotFoundError: OPERATION_UNKNOWN.
            FailedPreconditionError: ALREADY_ENDED.
        """

        def work(connection: sa.Connection) -> None:
            operation, _items = _get(connection, operation_id)
            if cancel and operation.state is State.CANCELLED:
                return
            if operation.state in ENDED:
                raise FailedPreconditionError(
                    "ALREADY_ENDED",
                    f"operation {operation_id} has {operation.state} already",
                    metadata={"operation_id": operation_id, "state": operation.state},
                )
            values: dict[str, Any] = {"version": _o.version + 1}
            if cancel:
                values |= {"state": State.CANCELLING, "paused": False}
            elif paused is not None and operation.state is State.RUNNING:
                values["paused"] = paused
            connection.execute(
                sa.update(tables.operations).where(_o.operation_id == operation_id).values(values)
            )

        await self._database.write(work)


def _get(connection: sa.Connection, operation_id: str) -> tuple[Operation, tuple[Item, ...]]:
    row = connection.execute(
        sa.select(tables.operations).where(_o.operation_id == operation_id)
    ).one_or_none()
    if row is None:
        raise operation_unknown(operation_id)
    items = connection.execute(
        sa.select(tables.operation_vms)
        .where(_i.operation_id == operation_id)
        .order_by(_i.sequence, _i.vm_id)
    )
    return _operation(row), tuple(_item(each) for each in items)


def _put_item(connection: sa.Connection, operation_id: str, item: Item) -> None:
    values = asdict(item)
    known = connection.execute(
        sa.update(tables.operation_vms)
        .where(_i.operation_id == operation_id, _i.vm_id == item.vm_id)
        .values(values)
    )
    if not known.rowcount:
        connection.execute(
            sa.insert(tables.operation_vms).values(operation_id=operation_id, **values)
        )


def _refuse_second(connection: sa.Connection, node: str) -> None:
    found = connection.execute(
        sa.select(_o.operation_id, _o.kind).where(_o.node == node, ~_o.ended)
    ).one_or_none()
    if found:
        raise AlreadyExistsError(
            "OPERATION_ACTIVE",
            f"{found.kind} {found.operation_id} of node {node} is under way",
            hint="wait for it to end, or cancel it",
            metadata={"operation_id": found.operation_id, "node": node},
        )
