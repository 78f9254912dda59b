# SPDX-License-Identifier: Apache-2.0
"""Reads many subjects at once, as they are told."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import sqlalchemy as sa
from godwit.fleet.v1 import operation_service_pb2, types_pb2

from services.common.errors import NotFoundError
from services.orchestrator.events.model import Change, Kind, Subject
from services.orchestrator.migration import Phase
from services.orchestrator.queue import Queue
from services.orchestrator.store import Store, schedule_schema, schema
from services.orchestrator.store.migrations import event_of
from services.orchestrator.store.rows import EventRow, MigrationRow, TransitionRow
from services.orchestrator.store.schedule import AdmissionRow, admission_of
from services.orchestrator.views import migration_view

Nodes = Callable[[list[str]], Awaitable[list[types_pb2.Node]]]
Operations = Callable[[str], Awaitable[operation_service_pb2.Operation]]


class StoreReader:
    """See feed.Reader."""

    def __init__(self, store: Store, queue: Queue, nodes: Nodes, operations: Operations) -> None:
        """`nodes`: reads some by name; `operations`: one by its id."""
        self._store = store
        self._queue = queue
        self._nodes = nodes
        self._operations = operations

    async def unfinished(self) -> dict[Subject, int]:
        """Every migration and operation that has not ended."""
        return {
            **{
                (Kind.MIGRATION, row.migration_id): row.version
                for row in await self._store.migrations.unfinished()
            },
            **{
                (Kind.OPERATION, each.operation_id): each.version
                for each in await self._store.operations.unfinished()
            },
        }

    async def read(self, subjects: list[Subject]) -> list[Change]:
        """All of them that there are."""
        of = {kind: [key for each, key in subjects if each is kind] for kind in Kind}
        found: dict[Subject, Change] = {}
        if of[Kind.MIGRATION]:
            found |= await self._migrations(of[Kind.MIGRATION])
        for operation_id in of[Kind.OPERATION]:
            found |= await self._operation(operation_id)
        if of[Kind.NODE]:
            for node in await self._nodes(of[Kind.NODE]):
                subject = (Kind.NODE, node.name)
                node.ClearField("vm_ids")
                found[subject] = Change(subject=subject, message=node, version=0)
        return [found[subject] for subject in subjects if subject in found]

    async def _migrations(self, ids: list[str]) -> dict[Subject, Change]:
        def work(connection: sa.Connection) -> _Migrations:
            return _Migrations(connection, ids)

        read = await self._store.database.read(work)
        changes = {}
        for row in read.rows:
            key = row.migration_id
            wait = self._queue.wait_of(key) if row.phase is Phase.PENDING else None
            view = migration_view(
                row,
                read.transitions[key],
                read.events[key],
                admission=read.admissions.get(key),
                wait=wait,
            )
            subject = (Kind.MIGRATION, key)
            changes[subject] = Change(
                subject=subject,
                message=view,
                version=row.version,
                ended=row.terminal,
                moves=(Kind.OPERATION, view.operation_id) if view.operation_id else None,
            )
        return changes

    async def _operation(self, operation_id: str) -> dict[Subject, Change]:
        try:
            view = await self._operations(operation_id)
        except NotFoundError:
            return {}
        view.ClearField("vms")
        subject = (Kind.OPERATION, operation_id)
        ended = view.HasField("ended_at")
        change = Change(subject=subject, message=view, version=view.version, ended=ended)
        return {subject: change}


class _Migrations:
    """Rows of some migrations, as of one moment."""

    def __init__(self, connection: sa.Connection, ids: list[str]) -> None:
        m, t, e = schema.migrations, schema.transitions, schema.events
        a = schedule_schema.admissions
        self.rows: list[MigrationRow] = [
            MigrationRow.of(row)
            for row in connection.execute(sa.select(m).where(m.c.migration_id.in_(ids)))
        ]
        self.transitions: dict[str, list[TransitionRow]] = {key: [] for key in ids}
        self.events: dict[str, list[EventRow]] = {key: [] for key in ids}
        query = sa.select(t).where(t.c.migration_id.in_(ids)).order_by(t.c.sequence)
        for row in connection.execute(query):
            self.transitions[row.migration_id].append(
                TransitionRow(phase=Phase(row.phase), at_ns=row.at_ns, message=row.message)
            )
        query = sa.select(e).where(e.c.migration_id.in_(ids)).order_by(e.c.sequence)
        for row in connection.execute(query):
            self.events[row.migration_id].append(event_of(row))
        self.admissions: dict[str, AdmissionRow] = {
            row.migration_id: admission_of(row)
            for row in connection.execute(sa.select(a).where(a.c.migration_id.in_(ids)))
        }
