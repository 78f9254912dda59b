# SPDX-License-Identifier: Apache-2.0
"""Migrations: admission, phases, and the decision."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import replace
from typing import Any

import sqlalchemy as sa

from services.common.errors import FailedPreconditionError, InternalError, NotFoundError
from services.orchestrator.migration import TERMINAL, Decision, Noted, Phase
from services.orchestrator.store import schema
from services.orchestrator.store.admission import Admitter, Also, Asked
from services.orchestrator.store.database import Database
from services.orchestrator.store.fleet import (
    active_migration_id,
    next_epoch,
)
from services.orchestrator.store.identity import refuse_in_doubt
from services.orchestrator.store.rows import (
    EventRow,
    IdempotencyRow,
    MigrationRow,
    TransitionRow,
    VmRow,
    VmState,
    row_values,
)

_m = schema.migrations.c

EVENTS_FIRST = 20
EVENTS_LAST = 80
"""How many events of a migration are kept: a link that flaps for a week must not fill the store."""

_NO_WAIT = {"wait_reason": "", "wait_message": "", "wait_hint": ""}


class PhaseLostError(InternalError):
    """Somebody else has moved the migration on: read it again."""


class _RehearsedError(Exception):
    """Rolls a rehearsal back."""


def migration_unknown(migration_id: str) -> NotFoundError:
    """The refusal of a migration that there never was."""
    return NotFoundError(
        "MIGRATION_UNKNOWN",
        f"there is no migration {migration_id!r}",
        hint="list the migrations",
        metadata={"migration_id": migration_id},
    )


class MigrationTable:
    """Reads and writes migrations. Every write raises `version` by one."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._admitter = Admitter(database)

    # --- reading ---

    async def get(self, migration_id: str) -> MigrationRow | None:
        """One migration."""

        def work(connection: sa.Connection) -> MigrationRow | None:
            return _select(connection, migration_id)

        return await self._database.read(work)

    async def page(
        self, vm_id: str, *, before: str, count: int, unfinished: bool = False
    ) -> list[MigrationRow]:
        """At most `count`, the newest first, of one VM or ("") of all, older than id `before`.

        `unfinished`: only those that are not terminal.
        """
        query = sa.select(schema.migrations).order_by(_m.migration_id.desc()).limit(count)
        if vm_id:
            query = query.where(_m.vm_id == vm_id)
        if before:
            query = query.where(_m.migration_id < before)
        if unfinished:
            query = query.where(~_m.terminal)

        def work(connection: sa.Connection) -> list[MigrationRow]:
            return [MigrationRow.of(row) for row in connection.execute(query)]

        return await self._database.read(work)

    async def unfinished(self) -> list[MigrationRow]:
        """All that are not terminal, the oldest first."""
        return await self._where(~_m.terminal)

    async def owing(self) -> list[MigrationRow]:
        """Terminal ones of which a node has not yet said that what it had is gone."""
        return await self._where(_m.terminal & (_m.destination_owed | _m.source_owed))

    async def _where(self, condition: sa.ColumnElement[bool]) -> list[MigrationRow]:
        query = sa.select(schema.migrations).where(condition).order_by(_m.migration_id)

        def work(connection: sa.Connection) -> list[MigrationRow]:
            return [MigrationRow.of(row) for row in connection.execute(query)]

        return await self._database.read(work)

    async def active_of(self, vm_id: str) -> str:
        """Id of the VM's unfinished migration, or ""."""

        def work(connection: sa.Connection) -> str:
            return active_migration_id(connection, vm_id)

        return await self._database.read(work)

    async def active_ids(self) -> dict[str, str]:
        """Ids of unfinished migrations by VM."""
        return {row.vm_id: row.migration_id for row in await self.unfinished()}

    async def transitions(self, migration_ids: list[str]) -> dict[str, list[TransitionRow]]:
        """Every phase that each entered, in order."""
        table = schema.transitions
        query = (
            sa.select(table)
            .where(table.c.migration_id.in_(migration_ids))
            .order_by(table.c.migration_id, table.c.sequence)
        )
        found: dict[str, list[TransitionRow]] = {each: [] for each in migration_ids}

        def work(connection: sa.Connection) -> None:
            for row in connection.execute(query):
                found[row.migration_id].append(
                    TransitionRow(phase=Phase(row.phase), at_ns=row.at_ns, message=row.message)
                )

        await self._database.read(work)
        return found

    async def events(self, migration_id: str) -> list[EventRow]:
        """What happened to it, in order, as far as it is kept."""
        table = schema.events
        query = (
            sa.select(table).where(table.c.migration_id == migration_id).order_by(table.c.sequence)
        )

        def work(connection: sa.Connection) -> list[EventRow]:
            return [event_of(row) for row in connection.execute(query)]

        return await self._database.read(work)

    async def add_event(self, migration_id: str, event: EventRow) -> MigrationRow:
        """Add an event. The first EVENTS_FIRST are kept for good, and the last EVENTS_LAST."""

        def work(connection: sa.Connection) -> MigrationRow:
            add_event(connection, migration_id, event)
            return _update(connection, migration_id, {})

        return await self._database.write(work)

    # --- admission ---

    async def create(
        self,
        row: MigrationRow,
        idempotency: IdempotencyRow | None,
        *also: Also,
    ) -> None:
        """Insert a migration, and the answer to its request, in one transaction (I7, I9).

        `also`: what else is written in it.

        Raises:
            NotFoundError: VM_UNKNOWN.
            AlreadyExistsError: MIGRATION_ACTIVE.
            StoreInDoubtError: nothing is admitted.
            FailedPreconditionError: VM_NOT_RUNNING; VM_MOVED: the VM is not where it was when the
                caller looked.
            sqlalchemy.exc.IntegrityError: the key of `idempotency` was used meanwhile.
        """
        await self._admitter.admit(Asked(row=row, idempotency=idempotency, also=also))

    # --- phases ---

    async def enter(
        self,
        row: MigrationRow,
        phase: Phase,
        *,
        now_ns: int,
        note: Noted | None = None,
        event: EventRow | None = None,
        **fields: Any,
    ) -> MigrationRow:
        """Move `row` to `phase`, with what else is then true. Not for the decisions' own phases.

        `event`: what is told of it.

        Raises:
            PhaseLostError: it is not in `row.phase` any more.
        """
        values: dict[str, Any] = {
            "phase": phase,
            "terminal": phase in TERMINAL,
            "phase_at_ns": now_ns,
            "version": _m.version + 1,
            **_NO_WAIT,
            **fields,
        }
        if note:
            values |= {"reason": note.reason, "message": note.message, "hint": note.hint}
        if phase in TERMINAL:
            values["ended_at_ns"] = now_ns

        def work(connection: sa.Connection) -> MigrationRow:
            changed = connection.execute(
                sa.update(schema.migrations)
                .where(_m.migration_id == row.migration_id, _m.phase == row.phase)
                .values(_forward(values))
                .returning(schema.migrations)
            )
            entered = changed.one_or_none()
            if entered is None:
                raise PhaseLostError(
                    "PHASE_LOST", f"migration {row.migration_id} is not {row.phase} any more"
                )
            add_transition(
                connection, row.migration_id, phase, now_ns, note.message if note else ""
            )
            if event is not None:
                add_event(connection, row.migration_id, event)
            return MigrationRow.of(entered)

        return await self._database.write(work)

    async def reserve_epoch(self, row: MigrationRow) -> MigrationRow:
        """Issue the destination's epoch, once: asked again it is the same."""

        def work(connection: sa.Connection) -> MigrationRow:
            present = _select(connection, row.migration_id)
            if present is None:
                raise migration_unknown(row.migration_id)
            if present.epoch:
                return present
            epoch = next_epoch(connection, row.vm_id)
            return _update(connection, row.migration_id, {"epoch": epoch})

        return await self._database.write(work)

    async def reserve_return_epoch(self, row: MigrationRow) -> MigrationRow:
        """Issue the epoch under which the source gets its guest back, once: then it is the same."""

        def work(connection: sa.Connection) -> MigrationRow:
            present = _select(connection, row.migration_id)
            if present is None:
                raise migration_unknown(row.migration_id)
            if present.return_epoch:
                return present
            epoch = next_epoch(connection, row.vm_id)
            return _update(connection, row.migration_id, {"return_epoch": epoch})

        return await self._database.write(work)

    async def give_back(self, row: MigrationRow, *, now_ns: int) -> MigrationRow:
        """The second compare-and-swap (I5). Returns what the store says then.

        Only over GIVING_BACK with COMMITTED; the same transaction makes the source the owner again,
        under the fresh epoch that both nodes have seen by then.

        Raises:
            StoreError: written or not: read again.
            StoreInDoubtError: nothing is decided.
        """
        return await self._database.write_then_read(
            lambda connection: _write_return(connection, row.migration_id, now_ns),
            lambda connection: _select(connection, row.migration_id) or row,
        )

    async def give_up(self, row: MigrationRow, note: Noted, *, now_ns: int) -> MigrationRow:
        """LOST, by an operator's word: the guest is gone, both nodes are to free what they have.

        The VM is STOPPING at its owner under the epoch that fences everybody.

        Raises:
            PhaseLostError: it is not in `row.phase` any more.
        """

        def work(connection: sa.Connection) -> MigrationRow:
            refuse_in_doubt(connection)
            epoch = next_epoch(connection, row.vm_id)
            values = {
                "phase": Phase.LOST,
                "terminal": True,
                "phase_at_ns": now_ns,
                "ended_at_ns": now_ns,
                "reason": note.reason,
                "message": note.message,
                "hint": note.hint,
                "return_epoch": epoch,
                "source_owed": True,
                "destination_owed": True,
                "version": _m.version + 1,
                **_NO_WAIT,
            }
            changed = connection.execute(
                sa.update(schema.migrations)
                .where(
                    _m.migration_id == row.migration_id,
                    _m.phase == row.phase,
                    _m.decision == Decision.COMMITTED,
                    ~_m.given_back,
                )
                .values(values)
                .returning(schema.migrations)
            )
            written = changed.one_or_none()
            if written is None:
                raise PhaseLostError(
                    "PHASE_LOST", f"migration {row.migration_id} is not {row.phase} any more"
                )
            add_transition(connection, row.migration_id, Phase.LOST, now_ns, note.message)
            owner = (row.destination_node, row.epoch)
            _move_vm(connection, row.vm_id, owner, (row.destination_node, epoch))
            connection.execute(
                sa.update(schema.vms)
                .where(schema.vms.c.vm_id == row.vm_id)
                .values(state=VmState.STOPPING)
            )
            return MigrationRow.of(written)

        return await self._database.write(work)

    async def decide(self, row: MigrationRow, decision: Decision, *, now_ns: int) -> MigrationRow:
        """Try to write the decision: one compare-and-swap (I2). Returns what the store says then.

        COMMITTED is written only over SWITCHOVER, over no decision, and not once a cancel was
        accepted. The same transaction makes the destination the owner, under its epoch. ABORTED is
        written over no decision in any phase, and issues the epoch under which the source goes on.

        Raises:
            StoreError: written or not: read again.
            StoreInDoubtError: nothing is decided.
        """
        return await self._database.write_then_read(
            lambda connection: _write_decision(connection, row.migration_id, decision, now_ns),
            lambda connection: _select(connection, row.migration_id) or row,
        )

    async def rehearse(self) -> None:
        """Take a decision about a VM that does not exist, and roll it back.

        The first decision of a process would otherwise compile its statements and open its
        connection while a guest stands still.
        """
        vm = VmRow(
            vm_id="-",
            node="-",
            epoch=1,
            state=VmState.RUNNING,
            spec_json="",
            spec_hash="",
            memory_bytes=0,
            created_at_ns=0,
        )
        row = MigrationRow.new(
            migration_id="-",
            vm=vm,
            destination_node="-",
            bulk_bytes_per_s_max=0,
            traceparent="",
            now_ns=0,
        )
        row = replace(row, phase=Phase.SWITCHOVER, epoch=2)

        def write(connection: sa.Connection) -> None:
            connection.execute(
                sa.insert(schema.nodes).values(name="-", agent_address="", registered_at_ns=0)
            )
            connection.execute(
                sa.insert(schema.vms).values({c.name: getattr(vm, c.name) for c in schema.vms.c})
            )
            connection.execute(sa.insert(schema.migrations).values(row_values(row)))
            _write_decision(connection, row.migration_id, Decision.COMMITTED, 0)
            _select(connection, row.migration_id)
            raise _RehearsedError

        with contextlib.suppress(_RehearsedError):
            await self._database.write_then_read(write, lambda _connection: None)

    async def request_cancel(self, migration_id: str) -> MigrationRow:
        """Accept a cancel while nothing is decided. From then on COMMITTED cannot be written.

        Raises:
            NotFoundError: MIGRATION_UNKNOWN.
            FailedPreconditionError: PAST_COMMIT; ALREADY_ENDED.
        """

        def work(connection: sa.Connection) -> MigrationRow:
            row = _select(connection, migration_id)
            if row is None:
                raise migration_unknown(migration_id)
            if row.decision is Decision.COMMITTED:
                raise FailedPreconditionError(
                    "PAST_COMMIT",
                    f"the guest belongs to {row.destination_node} already ({row.phase})",
                    hint="let it finish and move it back",
                    metadata={"migration_id": migration_id, "phase": row.phase},
                )
            if row.phase is Phase.FAILED:
                raise FailedPreconditionError(
                    "ALREADY_ENDED",
                    f"migration {migration_id} has failed already",
                    metadata={"migration_id": migration_id, "phase": row.phase},
                )
            if row.cancel_requested or row.decision:
                return row
            return _update(connection, migration_id, {"cancel_requested": True})

        return await self._database.write(work)

    # --- notes ---

    async def record(self, migration_id: str, **fields: Any) -> MigrationRow:
        """Write fields that do not change the phase: counters, progress, what is waited for."""

        def work(connection: sa.Connection) -> MigrationRow:
            return _update(connection, migration_id, fields)

        return await self._database.write(work)


# The statements of a decision are made once: to make, and to look up as compiled, each of them anew
# costs more than the fsync, while a guest stands still.


def _decide(
    decision: Decision, phase: Phase, *conditions: sa.ColumnElement[bool]
) -> sa.sql.dml.ReturningUpdate[Any]:
    return (
        sa.update(schema.migrations)
        .where(_m.migration_id == sa.bindparam("of"), _m.decision.is_(None), *conditions)
        .values(
            decision=decision,
            phase=phase,
            phase_at_ns=sa.bindparam("now_ns"),
            version=_m.version + 1,
            **_NO_WAIT,
        )
        .returning(schema.migrations)
    )


_DECIDE = {
    Decision.COMMITTED: _decide(
        Decision.COMMITTED,
        Phase.COMMITTED,
        _m.phase == Phase.SWITCHOVER,
        ~_m.cancel_requested,
        _m.epoch > 0,
    ),
    Decision.ABORTED: _decide(Decision.ABORTED, Phase.ABORTED),
}
_MOVE_VM = (
    sa.update(schema.vms)
    .where(
        schema.vms.c.vm_id == sa.bindparam("of"),
        schema.vms.c.node == sa.bindparam("from_node"),
        schema.vms.c.epoch == sa.bindparam("from_epoch"),
    )
    .values(node=sa.bindparam("to_node"), epoch=sa.bindparam("to_epoch"))
)
_ADD_TRANSITION = sa.insert(schema.transitions).values(
    migration_id=sa.bindparam("of"),
    sequence=sa.select(sa.func.coalesce(sa.func.max(schema.transitions.c.sequence), 0) + 1)
    .where(schema.transitions.c.migration_id == sa.bindparam("of"))
    .scalar_subquery(),
    phase=sa.bindparam("entered"),
    at_ns=sa.bindparam("now_ns"),
    message=sa.bindparam("note"),
)
_SELECT = sa.select(schema.migrations).where(_m.migration_id == sa.bindparam("of"))


def _write_decision(
    connection: sa.Connection, migration_id: str, decision: Decision, now_ns: int
) -> None:
    refuse_in_doubt(connection)
    written = connection.execute(
        _DECIDE[decision], {"of": migration_id, "now_ns": now_ns}
    ).one_or_none()
    if written is None:
        return
    row = MigrationRow.of(written)
    add_transition(connection, migration_id, row.phase, now_ns, "")
    was = (row.source_node, row.source_epoch)
    if decision is Decision.COMMITTED:
        _move_vm(connection, row.vm_id, was, (row.destination_node, row.epoch))
    elif row.epoch:
        epoch = next_epoch(connection, row.vm_id)
        _update(connection, migration_id, {"resume_epoch": epoch, "destination_owed": True})
        _move_vm(connection, row.vm_id, was, (row.source_node, epoch))


def _write_return(connection: sa.Connection, migration_id: str, now_ns: int) -> None:
    refuse_in_doubt(connection)
    written = connection.execute(
        sa.update(schema.migrations)
        .where(
            _m.migration_id == migration_id,
            _m.phase == Phase.GIVING_BACK,
            _m.decision == Decision.COMMITTED,
            ~_m.given_back,
            _m.return_epoch > _m.epoch,
        )
        .values(
            given_back=True,
            # By force the destination was not asked: that it is fenced is owed.
            destination_owed=_m.by_force,
            phase=Phase.GIVEN_BACK,
            phase_at_ns=now_ns,
            version=_m.version + 1,
            **_NO_WAIT,
        )
        .returning(schema.migrations)
    ).one_or_none()
    if written is None:
        return
    row = MigrationRow.of(written)
    add_transition(connection, migration_id, row.phase, now_ns, "")
    was = (row.destination_node, row.epoch)
    _move_vm(connection, row.vm_id, was, (row.source_node, row.return_epoch))


def _move_vm(
    connection: sa.Connection, vm_id: str, was: tuple[str, int], to: tuple[str, int]
) -> None:
    """Change the owner and epoch; the transaction fails if they are not what they were (I1)."""
    moved = connection.execute(
        _MOVE_VM,
        {
            "of": vm_id,
            "from_node": was[0],
            "from_epoch": was[1],
            "to_node": to[0],
            "to_epoch": to[1],
        },
    )
    if moved.rowcount != 1:
        raise InternalError(
            "OWNER_CHANGED", f"I1: VM {vm_id} is no longer {was[0]}'s under epoch {was[1]}"
        )


def _select(connection: sa.Connection, migration_id: str) -> MigrationRow | None:
    row = connection.execute(_SELECT, {"of": migration_id}).one_or_none()
    return MigrationRow.of(row) if row else None


def _forward(fields: dict[str, Any]) -> dict[str, Any]:
    """Progress never falls (I12), also where a deposed orchestrator writes what it saw last."""
    if "progress" not in fields:
        return fields
    given = fields["progress"]
    return {**fields, "progress": sa.case((_m.progress > given, _m.progress), else_=given)}


def _update(connection: sa.Connection, migration_id: str, fields: dict[str, Any]) -> MigrationRow:
    changed = connection.execute(
        sa.update(schema.migrations)
        .where(_m.migration_id == migration_id)
        .values(**_forward(fields), version=_m.version + 1)
        .returning(schema.migrations)
    )
    return MigrationRow.of(changed.one())


def add_transition(
    connection: sa.Connection, migration_id: str, phase: Phase, at_ns: int, message: str
) -> None:
    """Note that a phase was entered, after all that were."""
    connection.execute(
        _ADD_TRANSITION,
        {"of": migration_id, "entered": phase, "now_ns": at_ns, "note": message},
    )


def add_event(connection: sa.Connection, migration_id: str, event: EventRow) -> None:
    """Add an event after all others, and let go of those in the middle."""
    table = schema.events
    last = connection.execute(
        sa.select(sa.func.coalesce(sa.func.max(table.c.sequence), 0)).where(
            table.c.migration_id == migration_id
        )
    ).scalar_one()
    values = dataclasses.asdict(event) | {
        "migration_id": migration_id,
        "sequence": last + 1,
        "evidence": "\n".join(event.evidence),
    }
    connection.execute(sa.insert(table).values(values))
    connection.execute(
        sa.delete(table).where(
            table.c.migration_id == migration_id,
            table.c.sequence > EVENTS_FIRST,
            table.c.sequence <= last + 1 - EVENTS_LAST,
        )
    )


def event_of(row: Any) -> EventRow:
    """A result row."""
    values = row._asdict()
    del values["migration_id"]
    evidence = tuple(values["evidence"].split("\n")) if values["evidence"] else ()
    return EventRow(**(values | {"evidence": evidence}))
