# SPDX-License-Identifier: Apache-2.0
"""Nodes, VMs and their epochs."""

from __future__ import annotations

import sqlalchemy as sa

from services.common.errors import AlreadyExistsError, NotFoundError
from services.common.vm_spec import VmSpec
from services.orchestrator.store import schema
from services.orchestrator.store.database import Database, insert
from services.orchestrator.store.identity import refuse_in_doubt
from services.orchestrator.store.rows import NodeRow, VmRow, VmState

_vms = schema.vms.c

# Made once: to make a statement anew, and to look it up as compiled, costs more than to run it.
_ACTIVE = sa.select(schema.migrations.c.migration_id).where(
    schema.migrations.c.vm_id == sa.bindparam("of"),
    schema.migrations.c.terminal == sa.false(),
)
_VM = sa.select(schema.vms).where(_vms.vm_id == sa.bindparam("of"))


def next_epoch(connection: sa.Connection, vm_id: str) -> int:
    """A fresh epoch: never issued before, also if the VM was deleted and came back (I1).

    Raises:
        StoreInDoubtError: whoever has forgotten what it issued must not issue.
    """
    refuse_in_doubt(connection)
    statement = (
        insert(connection, schema.epochs)
        .values(vm_id=vm_id, last_epoch=1)
        .on_conflict_do_update(
            index_elements=[schema.epochs.c.vm_id],
            set_={"last_epoch": schema.epochs.c.last_epoch + 1},
        )
        .returning(schema.epochs.c.last_epoch)
    )
    return int(connection.execute(statement).scalar_one())


def active_migration_id(connection: sa.Connection, vm_id: str) -> str:
    """The VM's migration that is not terminal, or ""."""
    return str(connection.execute(_ACTIVE, {"of": vm_id}).scalar_one_or_none() or "")


def vm_of(connection: sa.Connection, vm_id: str) -> VmRow | None:
    """One VM."""
    row = connection.execute(_VM, {"of": vm_id}).one_or_none()
    return VmRow.of(row) if row else None


def migration_active(vm_id: str, migration_id: str) -> AlreadyExistsError:
    """The refusal that names the migration in the way."""
    return AlreadyExistsError(
        "MIGRATION_ACTIVE",
        f"VM {vm_id} is being moved by migration {migration_id}",
        hint="wait for it to end, or cancel it",
        metadata={"migration_id": migration_id, "vm_id": vm_id},
    )


def vm_unknown(vm_id: str) -> NotFoundError:
    """The refusal of a VM that the fleet does not have."""
    return NotFoundError(
        "VM_UNKNOWN",
        f"there is no VM {vm_id!r}",
        hint="list the VMs of the fleet",
        metadata={"vm_id": vm_id},
    )


class FleetTable:
    """Which nodes and VMs there are, and who owns what."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # --- nodes ---

    async def put_node(self, name: str, agent_address: str, *, now_ns: int) -> tuple[NodeRow, bool]:
        """Insert a node or give it a new address. The bool: it is new."""

        def work(connection: sa.Connection) -> tuple[NodeRow, bool]:
            known = connection.execute(
                sa.update(schema.nodes)
                .where(schema.nodes.c.name == name)
                .values(agent_address=agent_address)
            )
            if not known.rowcount:
                connection.execute(
                    sa.insert(schema.nodes).values(
                        name=name, agent_address=agent_address, registered_at_ns=now_ns
                    )
                )
            row = connection.execute(sa.select(schema.nodes).where(schema.nodes.c.name == name))
            return NodeRow(**row.one()._asdict()), not known.rowcount

        return await self._database.write(work)

    async def node(self, name: str) -> NodeRow | None:
        """One node."""

        def work(connection: sa.Connection) -> NodeRow | None:
            found = connection.execute(sa.select(schema.nodes).where(schema.nodes.c.name == name))
            row = found.one_or_none()
            return NodeRow(**row._asdict()) if row else None

        return await self._database.read(work)

    async def nodes(self) -> list[NodeRow]:
        """All of them, by name."""

        def work(connection: sa.Connection) -> list[NodeRow]:
            found = connection.execute(sa.select(schema.nodes).order_by(schema.nodes.c.name))
            return [NodeRow(**row._asdict()) for row in found]

        return await self._database.read(work)

    async def nodes_page(self, *, after: str, count: int) -> list[tuple[NodeRow, list[str]]]:
        """At most `count` by name, after the name `after`, each with the ids of its VMs."""
        query = (
            sa.select(schema.nodes)
            .where(schema.nodes.c.name > after)
            .order_by(schema.nodes.c.name)
            .limit(count)
        )

        def work(connection: sa.Connection) -> list[tuple[NodeRow, list[str]]]:
            rows = [NodeRow(**row._asdict()) for row in connection.execute(query)]
            vm_ids: dict[str, list[str]] = {row.name: [] for row in rows}
            found = connection.execute(
                sa.select(_vms.vm_id, _vms.node).where(_vms.node.in_(vm_ids)).order_by(_vms.vm_id)
            )
            for vm_id, node in found:
                vm_ids[node].append(vm_id)
            return [(row, vm_ids[row.name]) for row in rows]

        return await self._database.read(work)

    async def vm_ids_of(self, node: str) -> list[str]:
        """The VMs of a node, by id."""
        query = sa.select(_vms.vm_id).where(_vms.node == node).order_by(_vms.vm_id)

        def work(connection: sa.Connection) -> list[str]:
            return list(connection.execute(query).scalars())

        return await self._database.read(work)

    # --- VMs ---

    async def vms_page(self, *, after: str, count: int) -> list[tuple[VmRow, str]]:
        """At most `count` by id, after the id `after`, each with its unfinished migration or ""."""
        query = sa.select(schema.vms).where(_vms.vm_id > after).order_by(_vms.vm_id).limit(count)
        m = schema.migrations.c

        def work(connection: sa.Connection) -> list[tuple[VmRow, str]]:
            rows = [VmRow.of(row) for row in connection.execute(query)]
            moving = connection.execute(
                sa.select(m.vm_id, m.migration_id).where(
                    ~m.terminal, m.vm_id.in_([row.vm_id for row in rows])
                )
            )
            active = {row.vm_id: row.migration_id for row in moving}
            return [(row, active.get(row.vm_id, "")) for row in rows]

        return await self._database.read(work)

    async def vm(self, vm_id: str) -> VmRow | None:
        """One VM."""

        def work(connection: sa.Connection) -> VmRow | None:
            found = connection.execute(sa.select(schema.vms).where(_vms.vm_id == vm_id))
            row = found.one_or_none()
            return VmRow.of(row) if row else None

        return await self._database.read(work)

    async def vms(self) -> list[VmRow]:
        """All of them, by id."""

        def work(connection: sa.Connection) -> list[VmRow]:
            found = connection.execute(sa.select(schema.vms).order_by(_vms.vm_id))
            return [VmRow.of(row) for row in found]

        return await self._database.read(work)

    async def last_epoch(self, vm_id: str) -> int:
        """The highest epoch ever issued for the VM, or 0."""

        def work(connection: sa.Connection) -> int:
            found = connection.execute(
                sa.select(schema.epochs.c.last_epoch).where(schema.epochs.c.vm_id == vm_id)
            )
            return int(found.scalar_one_or_none() or 0)

        return await self._database.read(work)

    async def last_epochs(self) -> dict[str, int]:
        """The highest epoch ever issued, by VM."""

        def work(connection: sa.Connection) -> dict[str, int]:
            rows = connection.execute(sa.select(schema.epochs))
            return {row.vm_id: row.last_epoch for row in rows}

        return await self._database.read(work)

    async def begin_start(self, spec: VmSpec, node: str, *, now_ns: int) -> VmRow:
        """Write a VM as STARTING under a fresh epoch, before its agent hears of it.

        An equal one that is still STARTING there is returned as it is: its start goes on.

        Raises:
            AlreadyExistsError: VM_EXISTS.
        """

        def work(connection: sa.Connection) -> VmRow:
            found = connection.execute(sa.select(schema.vms).where(_vms.vm_id == spec.vm_id))
            if row := found.one_or_none():
                vm = VmRow.of(row)
                if (vm.state, vm.node, vm.spec_hash) == (VmState.STARTING, node, spec.spec_hash):
                    return vm
                raise AlreadyExistsError(
                    "VM_EXISTS",
                    f"VM {vm.vm_id} exists on node {vm.node} ({vm.state})",
                    hint="choose another vm_id, or stop that VM first",
                    metadata={"vm_id": vm.vm_id, "node": vm.node},
                )
            vm = VmRow(
                vm_id=spec.vm_id,
                node=node,
                epoch=next_epoch(connection, spec.vm_id),
                state=VmState.STARTING,
                spec_json=spec.canonical_json(),
                spec_hash=spec.spec_hash,
                memory_bytes=spec.memory_bytes,
                created_at_ns=now_ns,
            )
            connection.execute(
                sa.insert(schema.vms).values(
                    {c.name: getattr(vm, c.name) for c in schema.vms.columns}
                )
            )
            return vm

        return await self._database.write(work)

    async def finish_start(self, vm_id: str, epoch: int) -> VmRow | None:
        """STARTING → RUNNING. None: the VM is no longer that one."""

        def work(connection: sa.Connection) -> VmRow | None:
            connection.execute(
                sa.update(schema.vms)
                .where(_vms.vm_id == vm_id, _vms.epoch == epoch, _vms.state == VmState.STARTING)
                .values(state=VmState.RUNNING)
            )
            found = connection.execute(
                sa.select(schema.vms).where(_vms.vm_id == vm_id, _vms.epoch == epoch)
            )
            row = found.one_or_none()
            return VmRow.of(row) if row else None

        return await self._database.write(work)

    async def forget(self, vm_id: str, epoch: int, state: VmState) -> None:
        """Remove the record of a VM that never started, or has stopped. Its epochs stay."""

        def work(connection: sa.Connection) -> None:
            connection.execute(
                sa.delete(schema.vms).where(
                    _vms.vm_id == vm_id, _vms.epoch == epoch, _vms.state == state
                )
            )
            connection.execute(sa.delete(schema.bitmaps).where(schema.bitmaps.c.vm_id == vm_id))

        await self._database.write(work)

    async def begin_stop(self, vm_id: str) -> VmRow:
        """Write a VM as STOPPING under a fresh epoch; one that is STOPPING already stays as it is.

        Raises:
            NotFoundError: VM_UNKNOWN.
            AlreadyExistsError: MIGRATION_ACTIVE, VM_STARTING.
        """

        def work(connection: sa.Connection) -> VmRow:
            found = connection.execute(sa.select(schema.vms).where(_vms.vm_id == vm_id))
            row = found.one_or_none()
            if row is None:
                raise vm_unknown(vm_id)
            vm = VmRow.of(row)
            if vm.state is VmState.STOPPING:
                return vm
            if migration_id := active_migration_id(connection, vm_id):
                raise migration_active(vm_id, migration_id)
            epoch = next_epoch(connection, vm_id)
            changed = connection.execute(
                sa.update(schema.vms)
                .where(_vms.vm_id == vm_id)
                .values(epoch=epoch, state=VmState.STOPPING)
                .returning(schema.vms)
            )
            return VmRow.of(changed.one())

        return await self._database.write(work)
