# SPDX-License-Identifier: Apache-2.0
"""The queue's tables. An admission takes its tokens in the transaction that admits (I9)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import sqlalchemy as sa

from services.common.errors import NotFoundError
from services.orchestrator.migration import Phase
from services.orchestrator.scheduling.limits import LimitSet
from services.orchestrator.scheduling.model import Placing, Priority
from services.orchestrator.scheduling.policy import Mode, Policy, Settings
from services.orchestrator.store import schedule_schema as tables
from services.orchestrator.store import schema
from services.orchestrator.store.database import Database
from services.orchestrator.store.identity import refuse_in_doubt
from services.orchestrator.store.rows import MigrationRow, NodeRow

_m = schema.migrations.c
_a = tables.admissions.c
_v = schema.vms.c
RECENT = 400
"""How many of the last migrations tell what to be careful with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionRow:
    """What a migration asked the queue for, and what it got."""

    migration_id: str
    priority: Priority
    target: str
    operation_id: str
    settings: Settings
    policies: tuple[str, ...]
    admitted_at_ns: int = 0
    because: str = ""
    attempt: int = 1
    """Which try of the move it is."""
    retry_of: str = ""
    """The migration that failed and of which this is the next try."""
    retries_left: int = 0
    """How many follow if it fails."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSettings:
    """What operators said about a node."""

    labels: Mapping[str, str] = field(default_factory=dict)
    taints: frozenset[str] = frozenset()
    link: str = ""
    closed_by: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class VmSettings:
    """What operators said about a VM."""

    labels: Mapping[str, str] = field(default_factory=dict)
    placing: Placing = field(default_factory=Placing)


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A migration in PENDING, with what it asked for."""

    migration: MigrationRow
    admission: AdmissionRow | None
    """None: it was written before there was a queue."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Everything that a look at the queue needs from the store, as of one moment."""

    waiting: list[Waiting]
    running: list[tuple[MigrationRow, tuple[str, ...]]]
    """Admitted and not over, with the tokens that they hold."""
    recent: list[MigrationRow]
    """The last that ended."""
    limits: LimitSet
    frozen: str
    nodes: dict[str, NodeSettings]
    vms: dict[str, VmSettings]
    paused: frozenset[str]
    """Operations that are."""
    fleet: list[NodeRow]
    """All nodes, by name."""
    homes: list[tuple[str, str, int]]
    """(VM, node, bytes) of every VM."""
    admitted_ns: dict[str, int]
    """When each of `recent` was admitted."""
    operations: dict[str, str]
    """The operation that asked for each that is not over; of those that one did ask for."""
    specs: dict[str, str]
    """JSON of those that wait, by VM."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """An admission to be written."""

    migration_id: str
    target: str
    because: str
    keys: tuple[str, ...]


_NEW_ADMISSION = sa.insert(tables.admissions)
_NO_RETRY = (
    sa.update(tables.admissions).where(_a.migration_id == sa.bindparam("of")).values(retries_left=0)
)
_WITH_RETRIES = (
    sa.select(_a.migration_id)
    .join(schema.migrations, _m.migration_id == _a.migration_id)
    .where(_a.retries_left > sa.literal_column("0"), _m.terminal)
    .order_by(_a.migration_id)
)


def new_admission(row: AdmissionRow) -> tuple[sa.Insert, dict[str, Any]]:
    """What is inserted with a migration that goes through the queue."""
    return _NEW_ADMISSION, {
        "migration_id": row.migration_id,
        "priority": int(row.priority),
        "target": row.target,
        "operation_id": row.operation_id,
        "settings": _settings_json(row.settings),
        "policies": json.dumps(row.policies),
        "admitted_at_ns": row.admitted_at_ns,
        "because": row.because,
        "attempt": row.attempt,
        "retry_of": row.retry_of,
        "retries_left": row.retries_left,
    }


def no_retry_of(migration_id: str) -> tuple[sa.Update, dict[str, Any]]:
    """What settles that a migration that is over is not tried again, or was."""
    return _NO_RETRY, {"of": migration_id}


def admission_of(row: Any) -> AdmissionRow:
    """A result row."""
    return AdmissionRow(
        migration_id=row.migration_id,
        priority=Priority(row.priority),
        target=row.target,
        operation_id=row.operation_id,
        settings=_settings(row.settings),
        policies=tuple(json.loads(row.policies)),
        admitted_at_ns=row.admitted_at_ns,
        because=row.because,
        attempt=row.attempt,
        retry_of=row.retry_of,
        retries_left=row.retries_left,
    )


def _settings_json(settings: Settings) -> str:
    return json.dumps({key: value for key, value in asdict(settings).items() if value is not None})


def _settings(text: str) -> Settings:
    values = json.loads(text)
    if "priority" in values:
        values["priority"] = Priority(values["priority"])
    if "mode" in values:
        values["mode"] = Mode(values["mode"])
    return Settings(**values)


def _limits(connection: sa.Connection) -> LimitSet:
    rows = connection.execute(sa.select(tables.limits))
    return LimitSet().with_values({row.key: row.value for row in rows})


def _frozen(connection: sa.Connection) -> str:
    query = sa.select(tables.switches.c.value).where(tables.switches.c.name == "frozen")
    return str(connection.execute(query).scalar_one_or_none() or "")


def _node_settings(row: Any) -> NodeSettings:
    return NodeSettings(
        labels=json.loads(row.labels),
        taints=frozenset(json.loads(row.taints)),
        link=row.link,
        closed_by=row.closed_by,
    )


def _vm_settings(row: Any) -> VmSettings:
    placing = json.loads(row.placing)
    placing["tolerations"] = frozenset(placing.get("tolerations", ()))
    return VmSettings(labels=json.loads(row.labels), placing=Placing(**placing))


class ScheduleTable:
    """Reads and writes what scheduling remembers."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # --- the queue ---

    async def snapshot(self) -> Snapshot:
        """Everything, as of one moment."""
        return await self._database.read(_snapshot)

    async def snapshot_if_any_waits(self) -> Snapshot | None:
        """The same; None if nothing waits for admission."""
        query = sa.select(_m.migration_id).where(_m.phase == Phase.PENDING, ~_m.terminal).limit(1)

        def work(connection: sa.Connection) -> Snapshot | None:
            if connection.execute(query).one_or_none() is None:
                return None
            return _snapshot(connection)

        return await self._database.read(work)

    async def admit(self, grants: Iterable[Grant], *, now_ns: int) -> list[MigrationRow]:
        """Admit what can be admitted of `grants`, in order, each with all its tokens or not at all.

        Tokens are counted here, in the transaction that takes them: what another has taken since
        the caller looked is not there. Returns the migrations as they are then.
        """

        def work(connection: sa.Connection) -> list[MigrationRow]:
            refuse_in_doubt(connection)
            if _frozen(connection):
                return []
            _sweep(connection)
            limits, used = _limits(connection), _used(connection)
            admitted = []
            for grant in grants:
                if any(used[key] >= limits.of(key) for key in grant.keys):
                    continue
                if row := _grant(connection, grant, now_ns):
                    used.update(grant.keys)
                    admitted.append(row)
            return admitted

        return await self._database.write(work)

    async def admission(self, migration_id: str) -> AdmissionRow | None:
        """What a migration asked for and got; None: it never waited in a queue."""
        query = sa.select(tables.admissions).where(_a.migration_id == migration_id)

        def work(connection: sa.Connection) -> AdmissionRow | None:
            row = connection.execute(query).one_or_none()
            return admission_of(row) if row else None

        return await self._database.read(work)

    async def set_priority(self, migration_id: str, priority: Priority) -> bool:
        """Change the class of one that waits. False: it does not wait any more."""
        statement = (
            sa.update(tables.admissions)
            .where(_a.migration_id == migration_id, _a.admitted_at_ns == 0)
            .values(priority=int(priority))
        )

        def work(connection: sa.Connection) -> bool:
            return connection.execute(statement).rowcount == 1

        return await self._database.write(work)

    async def granted(self, migration_id: str) -> tuple[AdmissionRow | None, MigrationRow | None]:
        """The same, and the migration, as of one moment."""

        def work(connection: sa.Connection) -> tuple[AdmissionRow | None, MigrationRow | None]:
            asked = connection.execute(
                sa.select(tables.admissions).where(_a.migration_id == migration_id)
            ).one_or_none()
            if asked is None:
                return None, None
            found = connection.execute(
                sa.select(schema.migrations).where(_m.migration_id == migration_id)
            )
            return admission_of(asked), MigrationRow.of(found.one())

        return await self._database.read(work)

    # --- retries ---

    async def ended_with_retries(self) -> list[str]:
        """Migrations that are over and of which it is not settled whether they are tried again."""

        def work(connection: sa.Connection) -> list[str]:
            return list(connection.execute(_WITH_RETRIES).scalars())

        return await self._database.read(work)

    async def settle_retry(self, migration_id: str) -> None:
        """It is not tried again, or was."""
        statement, values = no_retry_of(migration_id)

        def work(connection: sa.Connection) -> None:
            connection.execute(statement, values)

        await self._database.write(work)

    # --- limits, and the emergency stop ---

    async def limits(self) -> tuple[LimitSet, dict[str, int]]:
        """The limits, and how many tokens of each key are held."""

        def work(connection: sa.Connection) -> tuple[LimitSet, dict[str, int]]:
            return _limits(connection), dict(_used(connection))

        return await self._database.read(work)

    async def set_limits(self, values: Mapping[str, int | None]) -> None:
        """Change some; None removes one of a node, link or group.

        Raises:
            InvalidArgumentError: LIMIT_INVALID; nothing was changed.
        """

        def work(connection: sa.Connection) -> None:
            _limits(connection).with_values(values)
            for key, value in values.items():
                connection.execute(sa.delete(tables.limits).where(tables.limits.c.key == key))
                if value is not None:
                    connection.execute(sa.insert(tables.limits).values(key=key, value=value))

        await self._database.write(work)

    async def frozen(self) -> str:
        """Why admissions are frozen; "" while they are not."""
        return await self._database.read(_frozen)

    async def freeze(self, why: str) -> None:
        """Freeze admissions, or ("") let them go on. What is under way goes on either way (I14)."""

        def work(connection: sa.Connection) -> None:
            name = tables.switches.c.name
            connection.execute(sa.delete(tables.switches).where(name == "frozen"))
            if why:
                connection.execute(sa.insert(tables.switches).values(name="frozen", value=why))

        await self._database.write(work)

    # --- policies ---

    async def policies(self, *, after: str = "", count: int | None = None) -> list[Policy]:
        """By name; all of them, or at most `count` after the name `after`."""
        name = tables.policies.c.name
        query = sa.select(tables.policies).where(name > after).order_by(name).limit(count)

        def work(connection: sa.Connection) -> list[Policy]:
            rows = connection.execute(query)
            return [
                Policy(
                    name=row.name,
                    match_labels=json.loads(row.match_labels),
                    settings=_settings(row.settings),
                )
                for row in rows
            ]

        return await self._database.read(work)

    async def put_policy(self, policy: Policy) -> None:
        """Write one, or write it anew."""

        def work(connection: sa.Connection) -> None:
            _delete_policy(connection, policy.name)
            connection.execute(
                sa.insert(tables.policies).values(
                    name=policy.name,
                    match_labels=json.dumps(dict(policy.match_labels), sort_keys=True),
                    settings=_settings_json(policy.settings),
                )
            )

        await self._database.write(work)

    async def delete_policy(self, name: str) -> None:
        """Remove one. Migrations that it was written to keep what it said.

        Raises:
            NotFoundError: POLICY_UNKNOWN.
        """

        def work(connection: sa.Connection) -> None:
            if not _delete_policy(connection, name):
                raise NotFoundError(
                    "POLICY_UNKNOWN", f"there is no policy {name!r}", hint="list the policies"
                )

        await self._database.write(work)

    # --- what operators say of nodes and VMs ---

    async def node_settings(self, names: Iterable[str] | None = None) -> dict[str, NodeSettings]:
        """By name; of those of which something was said, of all or of `names`."""
        query = sa.select(tables.node_settings)
        if names is not None:
            query = query.where(tables.node_settings.c.name.in_(list(names)))

        def work(connection: sa.Connection) -> dict[str, NodeSettings]:
            rows = connection.execute(query)
            return {row.name: _node_settings(row) for row in rows}

        return await self._database.read(work)

    async def vm_settings(self, vm_ids: Iterable[str] | None = None) -> dict[str, VmSettings]:
        """By id; of those of which something was said, of all or of `vm_ids`."""
        query = sa.select(tables.vm_settings)
        if vm_ids is not None:
            query = query.where(tables.vm_settings.c.vm_id.in_(list(vm_ids)))

        def work(connection: sa.Connection) -> dict[str, VmSettings]:
            rows = connection.execute(query)
            return {row.vm_id: _vm_settings(row) for row in rows}

        return await self._database.read(work)

    async def put_node_settings(self, name: str, settings: NodeSettings) -> None:
        """Write what is said of a node. Who closed it is not changed by this."""

        def work(connection: sa.Connection) -> None:
            change_node(
                connection,
                name,
                labels=json.dumps(dict(settings.labels), sort_keys=True),
                taints=json.dumps(sorted(settings.taints)),
                link=settings.link,
            )

        await self._database.write(work)

    async def put_vm_settings(self, vm_id: str, settings: VmSettings) -> None:
        """Write what is said of a VM."""
        placing = asdict(settings.placing)
        placing["tolerations"] = sorted(settings.placing.tolerations)

        def work(connection: sa.Connection) -> None:
            connection.execute(
                sa.delete(tables.vm_settings).where(tables.vm_settings.c.vm_id == vm_id)
            )
            connection.execute(
                sa.insert(tables.vm_settings).values(
                    vm_id=vm_id,
                    labels=json.dumps(dict(settings.labels), sort_keys=True),
                    placing=json.dumps(placing, sort_keys=True),
                )
            )

        await self._database.write(work)


def _grant(connection: sa.Connection, grant: Grant, now_ns: int) -> MigrationRow | None:
    """None: it does not wait any more, or is about to be cancelled."""
    waits = connection.execute(
        sa.select(_m.migration_id)
        .join(tables.admissions, _a.migration_id == _m.migration_id)
        .where(
            _m.migration_id == grant.migration_id,
            _m.phase == Phase.PENDING,
            _m.source_node != grant.target,
            ~_m.cancel_requested,
            _a.admitted_at_ns == 0,
        )
    )
    if waits.one_or_none() is None:
        return None
    connection.execute(
        sa.update(tables.admissions)
        .where(_a.migration_id == grant.migration_id)
        .values(admitted_at_ns=now_ns, because=grant.because)
    )
    connection.execute(
        sa.insert(tables.tokens),
        [{"migration_id": grant.migration_id, "key": key} for key in grant.keys],
    )
    changed = connection.execute(
        sa.update(schema.migrations)
        .where(_m.migration_id == grant.migration_id)
        .values(destination_node=grant.target, version=_m.version + 1)
        .returning(schema.migrations)
    )
    return MigrationRow.of(changed.one())


def _sweep(connection: sa.Connection) -> None:
    """Tokens of what is over count no more; here their rows go."""
    active = sa.select(_m.migration_id).where(~_m.terminal)
    connection.execute(sa.delete(tables.tokens).where(tables.tokens.c.migration_id.not_in(active)))


def _snapshot(connection: sa.Connection) -> Snapshot:
    waiting, running = _unfinished(connection)
    query = sa.select(schema.migrations).order_by(_m.migration_id.desc()).limit(RECENT)
    recent = [MigrationRow.of(row) for row in connection.execute(query) if row.terminal]
    admitted = connection.execute(
        sa.select(_a.migration_id, _a.admitted_at_ns).where(
            _a.migration_id.in_([row.migration_id for row in recent])
        )
    )
    asked = connection.execute(
        sa.select(_a.migration_id, _a.operation_id)
        .join(schema.migrations, _m.migration_id == _a.migration_id)
        .where(~_m.terminal, _a.operation_id != "")
    )
    paused = connection.execute(
        sa.select(tables.operations.c.operation_id).where(
            tables.operations.c.paused, ~tables.operations.c.ended
        )
    )
    return Snapshot(
        waiting=waiting,
        running=running,
        recent=recent,
        admitted_ns={row.migration_id: row.admitted_at_ns for row in admitted},
        operations={row.migration_id: row.operation_id for row in asked},
        limits=_limits(connection),
        frozen=_frozen(connection),
        nodes={
            row.name: _node_settings(row)
            for row in connection.execute(sa.select(tables.node_settings))
        },
        vms={
            row.vm_id: _vm_settings(row)
            for row in connection.execute(sa.select(tables.vm_settings))
        },
        paused=frozenset(paused.scalars()),
        fleet=[
            NodeRow(**row._asdict())
            for row in connection.execute(sa.select(schema.nodes).order_by(schema.nodes.c.name))
        ],
        homes=[
            (row.vm_id, row.node, row.memory_bytes)
            for row in connection.execute(
                sa.select(_v.vm_id, _v.node, _v.memory_bytes).order_by(_v.vm_id)
            )
        ],
        specs={
            row.vm_id: row.spec_json
            for row in connection.execute(
                sa.select(_v.vm_id, _v.spec_json)
                .join(schema.migrations, _m.vm_id == _v.vm_id)
                .where(~_m.terminal, _m.phase == Phase.PENDING)
            )
        },
    )


def change_node(connection: sa.Connection, name: str, **values: str) -> None:
    """Change what is said of a node; what was never said of it has the default."""
    table = tables.node_settings
    known = connection.execute(sa.update(table).where(table.c.name == name).values(**values))
    if not known.rowcount:
        said = {"labels": "{}", "taints": "[]", "link": "", "closed_by": ""} | values
        connection.execute(sa.insert(table).values(name=name, **said))


def _delete_policy(connection: sa.Connection, name: str) -> int:
    deleted = connection.execute(sa.delete(tables.policies).where(tables.policies.c.name == name))
    return deleted.rowcount


def _unfinished(
    connection: sa.Connection,
) -> tuple[list[Waiting], list[tuple[MigrationRow, tuple[str, ...]]]]:
    admissions = {
        row.migration_id: admission_of(row)
        for row in connection.execute(
            sa.select(tables.admissions)
            .join(schema.migrations, _m.migration_id == _a.migration_id)
            .where(~_m.terminal)
        )
    }
    held: dict[str, list[str]] = {}
    for migration_id, key in _held(connection):
        held.setdefault(migration_id, []).append(key)
    waiting, running = [], []
    query = sa.select(schema.migrations).where(~_m.terminal).order_by(_m.migration_id)
    for found in connection.execute(query):
        row = MigrationRow.of(found)
        admission = admissions.get(row.migration_id)
        if row.phase is Phase.PENDING and not (admission and admission.admitted_at_ns):
            waiting.append(Waiting(migration=row, admission=admission))
        elif row.destination_node:
            running.append((row, tuple(held.get(row.migration_id, ()))))
    return waiting, running


def _held(connection: sa.Connection) -> list[tuple[str, str]]:
    """(migration, key) of every token that counts."""
    t = tables.tokens.c
    query = (
        sa.select(t.migration_id, t.key)
        .join(schema.migrations, _m.migration_id == t.migration_id)
        .where(~_m.terminal)
    )
    return [(row.migration_id, row.key) for row in connection.execute(query)]


def _used(connection: sa.Connection) -> Counter[str]:
    return Counter(key for _migration_id, key in _held(connection))
