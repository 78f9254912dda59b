# SPDX-License-Identifier: Apache-2.0
"""An orchestrator ends at every named point, on both sides of the decision; the next one goes on.

A point is held by its hook file, the orchestrator's tasks are cancelled where they stand, and
another one starts on the same store: what was not written did not happen.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from godwit.agent.v1 import fault_agent_service_pb2 as pb
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.common.errors import FailedPreconditionError
from tests.harness.fake_fleet import VM, FakeFleet, eventually, fake_fleet

FORWARD_POINTS = [
    "validating.entered",
    "reserving.entered",
    "preparing.entered",
    "prepare.source_done",
    "preparing.done",
    "ready.entered",
    "switchover.entered",
    "pause.before",
    "pause.after",
    "transfer.after",
    "decision.before",
    "decision.after",
    "committed.entered",
    "activate.before",
    "activate.after",
    "seal.before",
    "seal.after",
    "committed.done",
    "postcopy.entered",
    "postcopy.done",
    "finalizing.entered",
    "release.before",
    "release.side_source",
    "release.side_destination",
    "finalizing.done",
]
UNDO_POINTS = [
    "rolling_back.entered",
    "decision.before",
    "decision.after",
    "aborted.entered",
    "undo.destination_done",
    "resume.before",
    "resume.after",
    "aborted.done",
]


async def crash_at(fleet: FakeFleet, hooks: Path, point: str, migration_id: str = "") -> str:
    """Run until `point`, end the orchestrator there, start the next one."""
    hold = hooks / f"orchestrator.{point}.hold"
    hold.touch()
    migration_id = migration_id or await fleet.migrate()
    await eventually((hooks / f"orchestrator.{point}.reached").exists)
    await fleet.stop()
    hold.unlink()
    await fleet.start()
    return migration_id


async def assert_one_guest(fleet: FakeFleet, at: str) -> None:
    assert fleet.world.owners(VM) == [at]
    assert fleet.world.broken == []
    record = fleet.agents[at].records[VM]
    assert len(record.memory) == record.page_count
    vm = await fleet.vm()
    assert (vm["node"], vm["migration_id"]) == (at, None)


@pytest.mark.parametrize("point", FORWARD_POINTS)
async def test_next_orchestrator_finishes_the_move(
    fleet: FakeFleet, hooks: Path, point: str
) -> None:
    migration_id = await crash_at(fleet, hooks, point)
    ended = await fleet.ended(migration_id)
    assert ended["phase"] == "succeeded", ended
    assert ended["pause_ns"] > 0
    await assert_one_guest(fleet, "b")
    assert [node for _vm, node, _epoch in fleet.world.history] == ["a", "b"]


@pytest.mark.requires("postgres")
@pytest.mark.parametrize("point", ["pause.after", "decision.before", "decision.after"])
async def test_next_leader_finishes_the_move(
    tmp_path: Path, new_database: Callable[[], str], hooks: Path, point: str
) -> None:
    """The same on PostgreSQL: what the next one knows is what was written, and what agents say."""
    async with fake_fleet(tmp_path, server=new_database()) as fleet:
        migration_id = await crash_at(fleet, hooks, point)
        assert fleet.core.context.role.leader.term == 2
        ended = await fleet.ended(migration_id)
        assert ended["phase"] == "succeeded", ended
        await assert_one_guest(fleet, "b")
        assert [node for _vm, node, _epoch in fleet.world.history] == ["a", "b"]


@pytest.mark.parametrize("point", UNDO_POINTS)
async def test_next_orchestrator_finishes_the_undoing(
    fleet: FakeFleet, hooks: Path, point: str
) -> None:
    await fleet.be_patient()  # it is the refusal that fails it, not a busy machine
    fleet.a.refuse("TransferDeviceState", FailedPreconditionError("BOOM", "refused"))
    migration_id = await crash_at(fleet, hooks, point)
    ended = await fleet.ended(migration_id)
    assert (ended["phase"], ended["reason"]) == ("failed", "BOOM"), ended
    await assert_one_guest(fleet, "a")
    assert fleet.b.records[VM].role == pb.VM_ROLE_GONE


async def test_next_orchestrator_finishes_the_cancel(fleet: FakeFleet, hooks: Path) -> None:
    """A cancel that was accepted is remembered, whoever carries it out."""
    gate = fleet.a.hold("TransferDeviceState")
    migration_id = await fleet.migrate()
    await gate.reached.wait()
    (hooks / "orchestrator.cancelling.entered.hold").touch()
    await fleet.cancel(migration_id)
    await crash_at(fleet, hooks, "cancelling.entered", migration_id)
    gate.opened.set()
    assert (await fleet.ended(migration_id))["phase"] == "cancelled"
    await assert_one_guest(fleet, "a")


async def test_accepted_cancel_survives_before_it_is_noticed(fleet: FakeFleet, hooks: Path) -> None:
    """The store's word alone is enough: nobody told the mover."""
    hold = hooks / "orchestrator.preparing.entered.hold"
    hold.touch()
    migration_id = await fleet.migrate()
    await eventually((hooks / "orchestrator.preparing.entered.reached").exists)
    await fleet.core.context.store.migrations.request_cancel(migration_id)
    await fleet.stop()
    hold.unlink()
    await fleet.start()
    assert (await fleet.ended(migration_id))["phase"] == "cancelled"
    await assert_one_guest(fleet, "a")


async def test_link_that_is_lost_while_nobody_watches(fleet: FakeFleet) -> None:
    """POSTCOPY_PAUSED is found again, or found out, by the next one."""
    fleet.b.pages_per_tick = 1
    migration_id = await fleet.migrate()
    await fleet.in_phase(migration_id, "postcopy")
    fleet.a.page_server_up = False
    await fleet.in_phase(migration_id, "postcopy_paused")
    bitmap = await fleet.bitmap()
    await fleet.stop()
    await fleet.start()
    # The bitmap is there before any agent has spoken, and is right once it has.
    assert (await fleet.migration(migration_id))["phase"] == "postcopy_paused"
    again = await fleet.bitmap()
    assert again["page_count"] == bitmap["page_count"]
    assert again["absent_count"] >= bitmap["absent_count"] > 0
    fleet.a.page_server_up = True
    ended = await fleet.ended(migration_id)
    assert ended["phase"] == "succeeded"
    await assert_one_guest(fleet, "b")


async def test_needs_attention_is_found_again(fleet: FakeFleet) -> None:
    fleet.b.fetching.clear()
    migration_id = await fleet.migrate()
    await fleet.in_phase(migration_id, "postcopy")
    fleet.b.kill_vmm(VM)
    await fleet.in_phase(migration_id, "needs_attention")
    await fleet.restart()
    assert (await fleet.migration(migration_id))["phase"] == "needs_attention"
    assert fleet.a.records[VM].memory


async def test_shell_that_died_meanwhile_costs_no_pause(fleet: FakeFleet, hooks: Path) -> None:
    """READY is checked again: a guest is not paused for a shell that is gone."""
    hold = hooks / "orchestrator.ready.entered.hold"
    hold.touch()
    migration_id = await fleet.migrate()
    await eventually((hooks / "orchestrator.ready.entered.reached").exists)
    await fleet.stop()
    fleet.b.kill_vmm(VM)
    hold.unlink()
    await fleet.start()
    ended = await fleet.ended(migration_id)
    assert (ended["phase"], ended["reason"]) == ("failed", "DESTINATION_GONE")
    assert fleet.a.calls["Pause"] == 0
    await assert_one_guest(fleet, "a")


async def test_owed_proof_is_collected_by_the_next_orchestrator(fleet: FakeFleet) -> None:
    fleet.a.before("TransferDeviceState", fleet.b.kill)
    migration_id = await fleet.migrate()
    assert (await fleet.ended(migration_id))["phase"] == "failed"
    await fleet.stop()
    await fleet.b.start()
    assert fleet.b.records[VM].role == pb.VM_ROLE_ARRIVING
    await fleet.start()
    await eventually(lambda: fleet.b.records[VM].role == pb.VM_ROLE_GONE)
    await assert_one_guest(fleet, "a")


async def test_start_of_a_vm_goes_on(fleet: FakeFleet) -> None:
    """A VM whose agent did not answer is STARTING, and runs once an orchestrator hears so."""
    fleet.b.stall("StartVm")
    request = asyncio.create_task(fleet.start_vm("vm-2", "b"))
    await eventually(lambda: fleet.b.calls["StartVm"])
    await fleet.stop()
    request.cancel()
    await asyncio.gather(request, return_exceptions=True)
    await fleet.b.kill()
    fleet.b._stalled.clear()
    await fleet.b.start()
    await fleet.start()
    await eventually(lambda: fleet.world.owners("vm-2") == ["b"])

    async def running() -> bool:
        vm = await fleet.core.context.store.fleet.vm("vm-2")
        return vm is not None and vm.state == "running"

    await eventually(running)
    assert len([vm for vm, _node, _epoch in fleet.world.history if vm == "vm-2"]) == 1


# --- anything, anywhere ---

FAULTS = st.sampled_from(
    [
        ("request", "Pause"),
        ("reply", "Pause"),
        ("reply", "TransferDeviceState"),
        ("request", "LoadDeviceState"),
        ("reply", "Activate"),
        ("request", "Activate"),
        ("reply", "Seal"),
        ("reply", "PrepareSource"),
        ("request", "PrepareDestination"),
        ("reply", "ReleaseSource"),
        ("reply", "AbortDestination"),
        ("reply", "Resume"),
        ("request", "WatchProgress"),
        ("kill", "a"),
        ("kill", "b"),
        ("restart", "orchestrator"),
        ("cancel", ""),
        ("cut", "link"),
    ]
)


@settings(
    max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@given(st.lists(st.tuples(FAULTS, st.integers(0, 60)), min_size=1, max_size=5), st.integers())
def test_any_faults_end_with_one_guest(
    tmp_path_factory: pytest.TempPathFactory,
    faults: list[tuple[tuple[str, str], int]],
    seed: int,
) -> None:
    """Faults at any moment, in any order, then healed: I1, I3, one owner, known to the store."""

    async def run() -> None:
        async with fake_fleet(tmp_path_factory.mktemp("chaos")) as fleet:
            fleet.b.pages_per_tick = 4
            chance = random.Random(seed)
            migration_id = await fleet.migrate()
            for (kind, what), delay_ms in faults:
                await asyncio.sleep(delay_ms / 1000 * chance.random() * 2)
                await _inject(fleet, kind, what, migration_id)
            fleet.a.page_server_up = True
            for agent in (fleet.a, fleet.b):
                if agent._stack is None:
                    await agent.start()
            ended = await fleet.ended(migration_id)
            owner = "b" if ended["phase"] == "succeeded" else "a"
            assert fleet.world.broken == []
            await assert_one_guest(fleet, owner)

    asyncio.run(run())


async def _inject(fleet: FakeFleet, kind: str, what: str, migration_id: str) -> None:
    if kind in ("request", "reply"):
        for agent in (fleet.a, fleet.b):
            (agent.drop_request if kind == "request" else agent.drop_reply)(what)
    elif kind == "kill":
        await fleet.agents[what].kill()
    elif kind == "restart":
        await fleet.restart()
    elif kind == "cancel":
        with contextlib.suppress(FailedPreconditionError):  # too late is an answer, too
            await fleet.cancel(migration_id)
    elif kind == "cut":
        fleet.a.page_server_up = False


# --- real processes ---


async def _orchestrator(fleet: FakeFleet, hooks: Path) -> asyncio.subprocess.Process:
    nodes = [f"--node={name}={agent.address}" for name, agent in fleet.agents.items()]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.orchestrator",
        "--rest=127.0.0.1:0",
        "--grpc=127.0.0.1:0",
        f"--store={fleet.store}",
        *nodes,
        env=os.environ | {"GODWIT_HOOKS_DIR": str(hooks)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert process.stdout
    line = (await process.stdout.readline()).decode()
    assert line.startswith("listening rest=127.0.0.1:"), line
    assert " grpc=127.0.0.1:" in line
    return process


@pytest.mark.parametrize("point", ["decision.before", "decision.after"])
async def test_killed_process_around_the_decision(
    fleet: FakeFleet, hooks: Path, point: str
) -> None:
    """Kill -9 where it matters most, then a SIGTERM that ends the next one cleanly."""
    migration_id = await crash_at(fleet, hooks, "preparing.entered")
    await fleet.stop()
    (hooks / f"orchestrator.{point}.exit").touch()
    process = await _orchestrator(fleet, hooks)
    assert await process.wait() == 137
    process = await _orchestrator(fleet, hooks)
    await eventually(lambda: fleet.world.owners(VM) == ["b"])
    process.send_signal(signal.SIGTERM)
    assert await process.wait() == 0
    await fleet.start()
    assert (await fleet.ended(migration_id))["phase"] == "succeeded"
    await assert_one_guest(fleet, "b")
