# SPDX-License-Identifier: Apache-2.0
"""I5: after COMMITTED a guest goes back to its source on proof alone, and then by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from godwit.agent.v1 import fault_agent_service_pb2 as pb
from godwit.common.v1 import common_pb2

from services.common.errors import FailedPreconditionError
from services.orchestrator.store.migrations import MigrationTable
from services.orchestrator.store.rows import MigrationRow
from tests.harness.fake_fleet import VM, FakeFleet, eventually

PATH = ["committed", "giving_back", "given_back", "returned"]


def phases(migration: dict[str, list[dict[str, str]]]) -> list[str]:
    return [each["phase"] for each in migration["transitions"]]


async def assert_back(fleet: FakeFleet, migration_id: str) -> None:
    """The guest runs at its source alone, whole, under a fresh epoch; b has nothing of it."""
    ended = await fleet.ended(migration_id)
    assert phases(ended)[-4:] == PATH, ended
    assert ended["reason"] == "DESTINATION_GONE_BEFORE_ACTIVATION"
    assert ended["decision"] == "returned"
    assert fleet.world.owners(VM) == ["a"]
    record = fleet.a.records[VM]
    assert len(record.memory) == record.page_count
    vm = await fleet.vm()
    assert (vm["node"], vm["epoch"]) == ("a", ended["return_epoch"])
    assert vm["epoch"] > ended["epoch"]
    assert fleet.b.records[VM].role == pb.VM_ROLE_GONE
    assert fleet.b.records[VM].epoch_seen == vm["epoch"]
    assert fleet.world.broken == []


async def shell_dies(fleet: FakeFleet) -> None:
    """The destination's VMM is killed."""
    fleet.b.kill_vmm(VM)


async def host_reboots(fleet: FakeFleet) -> None:
    """Its whole host is restarted; the journal stays."""
    await fleet.b.reboot()


async def shell_dies_sealed(fleet: FakeFleet) -> None:
    """The source was sealed before."""
    await eventually(lambda: _is(fleet, pb.VM_ROLE_SEALED))
    fleet.b.kill_vmm(VM)


async def _is(fleet: FakeFleet, role: pb.VmRole.ValueType) -> bool:
    return fleet.a.records[VM].role == role


@pytest.mark.parametrize("strike", [shell_dies, host_reboots, shell_dies_sealed])
async def test_a_guest_that_never_ran_goes_back(
    fleet: FakeFleet, strike: Callable[[FakeFleet], Awaitable[None]]
) -> None:
    """The VMM dies between COMMITTED and ACTIVATING: nobody has to do anything."""
    gate = fleet.b.hold("Activate")
    migration_id = await fleet.migrate()
    await gate.reached.wait()
    await strike(fleet)
    gate.opened.set()
    await assert_back(fleet, migration_id)
    # And it can be moved again.
    assert (await fleet.ended(await fleet.migrate()))["phase"] == "succeeded"


@pytest.mark.parametrize("rpc", ["RecallDestination", "RecallSource", "Resume"])
@pytest.mark.parametrize("lost", ["request", "reply"])
async def test_a_lost_message_is_no_no(fleet: FakeFleet, rpc: str, lost: str) -> None:
    """Each is given again, under the same epoch."""
    agent = fleet.b if rpc == "RecallDestination" else fleet.a
    (agent.drop_request if lost == "request" else agent.drop_reply)(rpc)
    fleet.b.before("Activate", lambda: shell_dies(fleet))
    await assert_back(fleet, await fleet.migrate())
    assert agent.calls[rpc] >= 2 or rpc == "Resume"


@pytest.mark.parametrize(
    "point", ["giving_back.entered", "giveback.before", "giveback.after", "given_back.entered"]
)
async def test_the_next_orchestrator_goes_on(fleet: FakeFleet, hooks: Path, point: str) -> None:
    """On either side of the second compare-and-swap."""
    (hooks / f"orchestrator.{point}.hold").touch()
    fleet.b.before("Activate", lambda: shell_dies(fleet))
    migration_id = await fleet.migrate()
    await eventually(lambda: _there(hooks / f"orchestrator.{point}.reached"))
    await fleet.stop()
    (hooks / f"orchestrator.{point}.hold").unlink()
    await fleet.start()
    await assert_back(fleet, migration_id)


async def _there(path: Path) -> bool:
    return await asyncio.to_thread(path.exists)


async def test_a_destination_that_may_have_run_it_keeps_it(fleet: FakeFleet) -> None:
    """ACTIVATING is durable: neither side runs, nothing is thrown away, a person is asked."""

    async def die() -> None:
        record = fleet.b.records[VM]
        record.epoch_activating = record.epoch_prepared
        fleet.b.kill_vmm(VM)

    fleet.b.before("Activate", die)
    stuck = await fleet.in_phase(await fleet.migrate(), "needs_attention")
    assert stuck["reason"] == "DESTINATION_VMM_DEAD"
    assert fleet.world.owners(VM) == []
    assert fleet.a.records[VM].memory


async def test_a_recall_that_finds_activating_gives_nothing_back(fleet: FakeFleet) -> None:
    """The evidence was too early: the destination itself refuses, and that is believed."""

    async def run_after_all() -> None:
        record = fleet.b.records[VM]
        record.epoch_activating = record.epoch_prepared

    fleet.b.before("Activate", lambda: shell_dies(fleet))
    fleet.b.before("RecallDestination", run_after_all)
    migration_id = await fleet.migrate()
    stuck = await fleet.in_phase(migration_id, "needs_attention")
    assert stuck["reason"] == "DESTINATION_VMM_DEAD"
    assert stuck["decision"] == "committed"
    assert (await fleet.vm())["node"] == "b"
    assert fleet.a.calls["Resume"] == 0


async def test_a_destination_that_cannot_be_asked_proves_nothing(fleet: FakeFleet) -> None:
    """I8: it is waited for; once it says that it never ran the guest, the guest goes back."""
    gate = fleet.b.hold("Activate")
    migration_id = await fleet.migrate()
    await gate.reached.wait()
    fleet.b.kill_vmm(VM)
    await fleet.b.kill()
    await fleet.until(migration_id, lambda each: "UNREACHABLE" in each["reason"])
    assert (await fleet.migration(migration_id))["phase"] == "committed"
    assert fleet.a.calls["Resume"] == 0
    await fleet.b.start()
    await assert_back(fleet, migration_id)


async def test_sealed_and_not_kept_is_gone(fleet: FakeFleet) -> None:
    """Nobody can let it run any more: that is said, and nothing is thrown away."""
    fleet.a.keeps_states = False
    fleet.b.before("Activate", lambda: shell_dies_sealed(fleet))
    stuck = await fleet.in_phase(await fleet.migrate(), "needs_attention")
    assert stuck["reason"] == "GUEST_GONE"
    assert fleet.world.owners(VM) == []
    assert fleet.a.records[VM].memory


async def test_a_destination_without_its_journal_proves_nothing(fleet: FakeFleet) -> None:
    """A state directory that was wiped has no ACTIVATING either."""

    async def forget() -> None:
        fleet.b.kill_vmm(VM)
        del fleet.b.records[VM]
        raise FailedPreconditionError("WRONG_STATE", "it is not known here")

    fleet.b.before("Activate", forget)
    stuck = await fleet.in_phase(await fleet.migrate(), "needs_attention")
    assert stuck["reason"] == "DESTINATION_JOURNAL_LOST"
    assert fleet.a.calls["Resume"] == 0


async def test_a_late_activate_and_a_late_seal_are_stale(fleet: FakeFleet) -> None:
    """Whatever was on its way when the guest went back is refused by both nodes."""
    fleet.b.before("Activate", lambda: shell_dies(fleet))
    migration_id = await fleet.migrate()
    await assert_back(fleet, migration_id)
    row = await fleet.core.context.store.migrations.get(migration_id)
    assert row is not None
    fence = common_pb2.Fence(
        vm_id=VM,
        epoch=row.epoch,
        migration_id=migration_id,
        decision=common_pb2.DECISION_COMMITTED,
    )
    agents = fleet.core.context.agents
    with pytest.raises(FailedPreconditionError, match="STALE_EPOCH"):
        await agents.get("b").activate(pb.ActivateRequest(fence=fence), traceparent="")
    with pytest.raises(FailedPreconditionError, match="STALE_EPOCH"):
        await agents.get("a").seal(pb.SealRequest(fence=fence), traceparent="")
    assert fleet.world.owners(VM) == ["a"]


async def test_a_source_vmm_that_dies_after_the_save_is_made_again(fleet: FakeFleet) -> None:
    """Before the decision: its memory and its device state are the whole guest."""

    async def die() -> None:
        fleet.a.kill_vmm(VM)
        raise FailedPreconditionError("LOAD_FAILED", "for the test")

    fleet.a.after("TransferDeviceState", die)
    ended = await fleet.ended(await fleet.migrate())
    assert ended["phase"] == "failed"
    assert fleet.world.owners(VM) == ["a"]


async def test_the_return_is_one_compare_and_swap(fleet: FakeFleet) -> None:
    """A second one changes nothing; without GIVING_BACK there is none."""
    ended = await fleet.ended(await fleet.migrate())
    table: MigrationTable = fleet.core.context.store.migrations
    row = await table.get(ended["migration_id"])
    assert row is not None
    same: MigrationRow = await table.give_back(row, now_ns=1)
    assert same == row
    assert (await fleet.vm())["node"] == "b"
