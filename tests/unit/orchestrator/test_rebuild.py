# SPDX-License-Identifier: Apache-2.0
"""A store that has forgotten decides nothing until it has learnt what the agents know (I2)."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sqlite3
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from godwit.agent.v1 import fault_agent_service_pb2 as pb

from services.common.errors import (
    AlreadyExistsError,
    DataLossError,
    FailedPreconditionError,
    GodwitError,
    NotFoundError,
)
from services.orchestrator.agents import AgentPool
from services.orchestrator.merge import EPOCH_JUMP, Known, RebuildConflictError, merge
from services.orchestrator.migration import Decision, Phase
from services.orchestrator.rebuild import RebuildIncompleteError, Report, rebuild
from services.orchestrator.store import Store, StoreInDoubtError, open_store
from services.orchestrator.store.backup import backup, check, in_use, restore
from services.orchestrator.store.rows import MigrationRow, VmRow, VmState
from tests.harness.fake_fleet import VM, FakeFleet, eventually
from tests.unit.orchestrator.test_restarts import FORWARD_POINTS, assert_one_guest

BEFORE_PREPARING = ("validating.entered", "reserving.entered", "preparing.entered")
POINTS = [
    (point, forgotten)
    for point in FORWARD_POINTS
    for forgotten in ("migration", "since_preparing")
    if forgotten == "migration" or point not in BEFORE_PREPARING
]


async def rebuilt(fleet: FakeFleet, *without: str) -> Report:
    """Rebuild the store of a fleet whose orchestrator is stopped."""
    async with opened(fleet) as store:
        return await rebuild(
            store,
            lambda incarnation: AgentPool(incarnation, fleet.deadlines),
            without=without,
            now_ns=1,
        )


@contextlib.asynccontextmanager
async def opened(fleet: FakeFleet) -> AsyncIterator[Store]:
    with in_use(fleet.store, alone=True):
        async with open_store(fleet.store) as store:
            for name, agent in fleet.agents.items():
                await store.fleet.put_node(name, str(agent.address), now_ns=1)
            yield store


def remove(store: Path, *suffixes: str) -> None:
    for suffix in suffixes:
        Path(f"{store}{suffix}").unlink(missing_ok=True)


async def assert_frozen(fleet: FakeFleet) -> None:
    """Nothing is admitted, and everybody is told."""
    with pytest.raises(StoreInDoubtError):
        await fleet.migrate("c")
    with pytest.raises(StoreInDoubtError):
        await fleet.start_vm("vm-new", "c")
    with pytest.raises(StoreInDoubtError):
        await fleet.core.fleet.stop_vm(VM)
    answer = await fleet.http.get("/readyz")
    assert answer.status_code == 503
    assert "STORE_IN_DOUBT" in answer.json()["detail"]
    assert "godwit store rebuild" in answer.json()["hint"]
    refused = await fleet.post("/v1/migrations", {"vm": VM, "destination_node": "c"})
    assert (refused.status_code, refused.json()["reason"]) == (409, "STORE_IN_DOUBT")
    assert "godwit_store_in_doubt 1.0" in (await fleet.http.get("/metrics")).text


async def assert_usable(fleet: FakeFleet, at: str) -> None:
    """The guest moves again, under an epoch that nobody has seen."""
    seen = max(agent.evidence(VM).epoch_seen for agent in fleet.agents.values())
    to = "c" if at != "c" else "a"
    ended = await fleet.ended(await fleet.migrate(to))
    assert ended["phase"] == "succeeded", ended
    await assert_one_guest(fleet, to)
    assert fleet.agents[to].records[VM].epoch_owned > seen


# --- copies ---


async def test_backup_of_a_store_in_use(fleet: FakeFleet, tmp_path: Path) -> None:
    """One file, whole, of one moment; the orchestrator moves a guest meanwhile."""
    migration_id = await fleet.migrate()
    for number in range(5):
        backup(fleet.store, tmp_path / f"copy-{number}.db")
    await fleet.ended(migration_id)
    for number in range(5):
        copy = tmp_path / f"copy-{number}.db"
        check(copy)
    with pytest.raises(AlreadyExistsError):
        backup(fleet.store, tmp_path / "copy-0.db")
    with pytest.raises(NotFoundError):
        backup(tmp_path / "none.db", tmp_path / "new.db")


async def test_restore_needs_the_store_for_itself(fleet: FakeFleet, tmp_path: Path) -> None:
    backup(fleet.store, tmp_path / "copy.db")
    with pytest.raises(FailedPreconditionError) as refused:
        restore(fleet.store, tmp_path / "copy.db")
    assert refused.value.reason == "STORE_IN_USE"


@pytest.mark.parametrize("content", [b"", b"not a store", b"SQLite format 3\0" + bytes(200)])
def test_what_is_no_store_is_not_restored(tmp_path: Path, content: bytes) -> None:
    store, copy = tmp_path / "s.db", tmp_path / "copy.db"
    store.write_bytes(b"as it was")
    copy.write_bytes(content)
    with pytest.raises(DataLossError):
        restore(store, copy)
    assert store.read_bytes() == b"as it was"


async def test_restored_store_is_another_one_and_in_doubt(fleet: FakeFleet, tmp_path: Path) -> None:
    """Also if nothing has happened since; and what was there is kept."""
    backup(fleet.store, tmp_path / "copy.db")
    before = fleet.core.context.store.incarnation
    await fleet.stop()
    incarnation = restore(fleet.store, tmp_path / "copy.db")
    assert incarnation != before
    check(fleet.store.with_name(f"{fleet.store.name}.before-{incarnation}"))
    await fleet.start()
    assert fleet.core.context.store.incarnation == incarnation
    await assert_frozen(fleet)
    await fleet.restart()
    await assert_frozen(fleet)
    await fleet.stop()
    await rebuilt(fleet)
    await fleet.start()
    await assert_usable(fleet, "a")


# --- doubt found by agents ---


async def test_copied_back_by_hand_is_found_by_epochs(fleet: FakeFleet, tmp_path: Path) -> None:
    """The same incarnation; a node has seen more than the file remembers."""
    backup(fleet.store, tmp_path / "copy.db")
    await fleet.ended(await fleet.migrate())
    await fleet.stop()
    remove(fleet.store, "-wal", "-shm")
    shutil.copy(tmp_path / "copy.db", fleet.store)
    await fleet.start()
    await eventually(lambda: fleet.core.context.doubt.why)
    await assert_frozen(fleet)
    # It is durable: the node that knows need not be there the next time.
    await eventually(lambda: fleet.core.context.store.identity.in_doubt)
    await fleet.stop()
    await fleet.b.kill()
    await fleet.start()
    await assert_frozen(fleet)
    await fleet.stop()
    await fleet.b.start()
    await rebuilt(fleet)
    await fleet.start()
    await assert_usable(fleet, "b")


async def test_store_made_anew_learns_everything(fleet: FakeFleet) -> None:
    """Gone with its disk: VMs, owners, epochs come back; it was frozen until then."""
    await fleet.ended(await fleet.migrate())
    await fleet.start_vm("vm-2", "c")
    await fleet.stop()
    remove(fleet.store, "", "-wal", "-shm")
    await fleet.start()
    await eventually(lambda: fleet.core.context.doubt.why)
    with pytest.raises(GodwitError, match="forgotten"):
        await fleet.start_vm("vm-3", "c")
    await fleet.stop()
    report = await rebuilt(fleet)
    assert report.vm_count == 2
    await fleet.start()
    assert (await fleet.vm())["node"] == "b"
    assert (await fleet.vm("vm-2"))["node"] == "c"
    await assert_usable(fleet, "b")


# --- everything that a migration may have come to since the copy ---


@pytest.mark.parametrize(("point", "forgotten"), POINTS)
async def test_store_is_restored_under_a_migration(
    fleet: FakeFleet, hooks: Path, tmp_path: Path, point: str, forgotten: str
) -> None:
    """The orchestrator ends anywhere, the store is as it was before the move or at its beginning.

    Nothing runs twice, and a guest that is between two nodes gets on by itself.
    """
    await fleet.be_patient()
    held = hooks / "orchestrator.preparing.entered.hold"
    if forgotten == "since_preparing":
        held.touch()
    else:
        backup(fleet.store, tmp_path / "copy.db")
    hold = hooks / f"orchestrator.{point}.hold"
    hold.touch()
    await fleet.migrate()
    if forgotten == "since_preparing":
        await eventually((hooks / "orchestrator.preparing.entered.reached").exists)
        backup(fleet.store, tmp_path / "copy.db")
        held.unlink()
    await eventually((hooks / f"orchestrator.{point}.reached").exists)
    await fleet.stop()
    hold.unlink()
    runs = fleet.world.owners(VM)
    begun = len(fleet.world.history)
    restore(fleet.store, tmp_path / "copy.db")
    await rebuilt(fleet)
    assert fleet.world.owners(VM) == runs
    assert len(fleet.world.history) == begun
    await fleet.start()

    async def nothing_under_way() -> bool:
        return not await fleet.core.context.store.migrations.unfinished()

    await eventually(nothing_under_way)
    arrived = any(node == "b" for _vm, node, _epoch in fleet.world.history)
    at = "b" if arrived else "a"
    await eventually(lambda: fleet.world.owners(VM) == [at])
    await eventually(lambda: not _shells(fleet))
    await assert_one_guest(fleet, at)
    await assert_usable(fleet, at)


@pytest.mark.parametrize("point", ["validating.entered", "postcopy.entered"])
@pytest.mark.parametrize("without", [(), ("b",)])
async def test_store_has_one_move_under_way_and_the_nodes_a_later_one(
    fleet: FakeFleet, hooks: Path, tmp_path: Path, point: str, without: tuple[str, ...]
) -> None:
    """The later one was admitted, so that the former had ended, whoever can still say how."""
    await fleet.be_patient()
    hold, reached = (hooks / f"orchestrator.{point}.{each}" for each in ("hold", "reached"))
    hold.touch()
    former = await fleet.migrate()
    await eventually(reached.exists)
    backup(fleet.store, tmp_path / "copy.db")
    hold.unlink()
    await fleet.ended(former)
    hold = hooks / "orchestrator.postcopy.entered.hold"
    reached = hooks / "orchestrator.postcopy.entered.reached"
    reached.unlink(missing_ok=True)
    hold.touch()
    later = await fleet.migrate("c")
    await eventually(reached.exists)
    await fleet.stop()
    hold.unlink()
    restore(fleet.store, tmp_path / "copy.db")
    await rebuilt(fleet, *without)
    assert fleet.world.owners(VM) == ["c"]
    async with opened(fleet) as store:
        assert [row.migration_id for row in await store.migrations.unfinished()] == [later]
        assert [(vm.vm_id, vm.node) for vm in await store.fleet.vms()] == [(VM, "c")]


def _shells(fleet: FakeFleet) -> list[str]:
    roles = (pb.VM_ROLE_ARRIVING, pb.VM_ROLE_DEPARTING, pb.VM_ROLE_SEALED)
    return [name for name, agent in fleet.agents.items() if agent.evidence(VM).role in roles]


# --- the command line ---


async def godwit(*arguments: object) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.cli.main",
        "store",
        *map(str, arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


async def test_commands(fleet: FakeFleet, tmp_path: Path) -> None:
    """Backup while it runs, restore and rebuild once it has stopped, and a fleet that goes on."""
    store, copy = ("--store", fleet.store), tmp_path / "copy.db"
    assert (await godwit("backup", copy, *store))[0] == 0
    await fleet.ended(await fleet.migrate())
    status, said = await godwit("restore", copy, *store)
    assert (status, "STORE_IN_USE" in said) == (3, True), said
    assert (await godwit("rebuild", "--from-agents", *store))[0] == 3
    await fleet.stop()
    status, said = await godwit("restore", copy, *store)
    assert (status, "godwit store rebuild --from-agents" in said) == (0, True), said
    await fleet.b.kill()
    status, said = await godwit("rebuild", "--from-agents", *store)
    assert (status, "--without b" in said) == (5, True), said
    await fleet.b.start()
    assert (await godwit("rebuild", *store))[0] == 2
    status, said = await godwit("rebuild", "--from-agents", *store)
    assert status == 0, said
    assert "vm-1: belongs to b under epoch 2, running" in said
    await fleet.start()
    await assert_usable(fleet, "b")


# --- rebuilds that cannot be ---


async def test_node_that_does_not_answer_stops_a_rebuild(fleet: FakeFleet, tmp_path: Path) -> None:
    """Nothing has changed then; left out on purpose, it brings the doubt back with it."""
    backup(fleet.store, tmp_path / "copy.db")
    await fleet.ended(await fleet.migrate())
    await fleet.stop()
    restore(fleet.store, tmp_path / "copy.db")
    await fleet.b.kill()
    obeyed = [agent.obeys for agent in fleet.agents.values()]
    with pytest.raises(RebuildIncompleteError, match="node b"):
        await rebuilt(fleet)
    assert [agent.obeys for agent in fleet.agents.values()] == obeyed
    await rebuilt(fleet, "b")
    await fleet.start()
    assert not fleet.core.context.doubt.why
    await fleet.b.start()
    await eventually(lambda: fleet.core.context.doubt.why)
    await fleet.stop()
    await rebuilt(fleet)
    await fleet.start()
    await assert_usable(fleet, "b")


async def test_rebuild_that_was_interrupted_leaves_the_doubt(fleet: FakeFleet) -> None:
    """It can be run again, until it has ended."""
    await fleet.stop()
    fleet.agents["c"].refuse("ListVms", FailedPreconditionError("BOOM", "refused"))
    with pytest.raises(RebuildIncompleteError):
        await rebuilt(fleet)
    await fleet.start()
    await assert_frozen(fleet)
    await fleet.stop()
    await rebuilt(fleet)
    await fleet.start()
    await assert_usable(fleet, "a")


async def test_two_guests_are_a_persons_work(fleet: FakeFleet) -> None:
    """I1 broke before: nobody guesses which is the true one."""
    await fleet.stop()
    twin = fleet.b.records.setdefault(VM, type(fleet.a.records[VM])(vm_id=VM))
    twin.role, twin.vmm = pb.VM_ROLE_RESIDENT, pb.VMM_STATE_RUNNING
    twin.epoch_seen = twin.epoch_owned = 7
    with pytest.raises(RebuildConflictError, match="I1"):
        await rebuilt(fleet)
    twin.vmm = pb.VMM_STATE_DEAD
    del fleet.b.records[VM]
    await rebuilt(fleet)


@pytest.mark.parametrize("seen", [2, 4])
def test_earlier_move_than_the_stores_is_a_persons_work(seen: int) -> None:
    """The store has one under epoch 3; the nodes have another. Only a later one proves its end."""
    vm = VmRow(
        vm_id=VM,
        node="a",
        epoch=1,
        state=VmState.RUNNING,
        spec_json="",
        spec_hash="",
        memory_bytes=0,
        created_at_ns=0,
    )
    new = MigrationRow.new(
        migration_id="stores",
        vm=vm,
        destination_node="b",
        bulk_bytes_per_s_max=0,
        traceparent="",
        now_ns=1,
    )
    stores = replace(new, phase=Phase.POSTCOPY, decision=Decision.COMMITTED, epoch=3)
    c = pb.Evidence(vm_id=VM, node="c", role=pb.VM_ROLE_ARRIVED, migration_id="nodes")
    c.epoch_seen = c.epoch_prepared = c.epoch_activating = seen
    known = Known(vm_id=VM, vm=vm, last_epoch=3, migrations={"stores": stores}, evidence=[c])
    if seen < stores.epoch:
        with pytest.raises(RebuildConflictError, match="an earlier one, nodes"):
            merge(known, now_ns=1)
    else:
        merged = {row.migration_id: row.phase for row in merge(known, now_ns=1).migrations}
        assert merged == {"nodes": Phase.COMMITTED, "stores": Phase.SUCCEEDED}


async def test_epochs_jump(fleet: FakeFleet) -> None:
    """What the forgotten store issued and nobody has seen is never issued again."""
    await fleet.stop()
    await rebuilt(fleet)
    with contextlib.closing(sqlite3.connect(fleet.store)) as connection:
        assert connection.execute("SELECT last_epoch FROM epochs").fetchall() == [(1 + EPOCH_JUMP,)]
