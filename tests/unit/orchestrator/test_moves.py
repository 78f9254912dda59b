# SPDX-License-Identifier: Apache-2.0
"""Whole migrations over real gRPC against agents that fail in every way an agent can."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from godwit.agent.v1 import fault_agent_service_pb2 as pb
from godwit.common.v1 import common_pb2

from services.common.errors import (
    AlreadyExistsError,
    DataLossError,
    FailedPreconditionError,
    UnavailableError,
)
from services.orchestrator.migration import Decision
from services.orchestrator.store import StoreError, StoreInDoubtError
from services.orchestrator.store.migrations import MigrationTable
from services.orchestrator.store.rows import MigrationRow
from tests.harness.fake_agent import Gate
from tests.harness.fake_fleet import VM, FakeFleet, eventually

FORWARD_PATH = [
    "pending",
    "validating",
    "reserving",
    "preparing",
    "ready",
    "switchover",
    "committed",
    "postcopy",
    "finalizing",
    "succeeded",
]


def phases(migration: dict[str, list[dict[str, str]]]) -> list[str]:
    return [each["phase"] for each in migration["transitions"]]


async def assert_moved(fleet: FakeFleet, to: str = "b") -> None:
    """The guest runs at `to` alone, with all its memory, and the source kept nothing."""
    assert fleet.world.owners(VM) == [to]
    record = fleet.agents[to].records[VM]
    assert record.memory == {page: page * 7 + 1 for page in range(record.page_count)}
    assert record.role == pb.VM_ROLE_RESIDENT
    others = [agent for name, agent in fleet.agents.items() if name != to]
    assert not any(agent.records[VM].memory for agent in others if VM in agent.records)
    vm = await fleet.vm()
    assert (vm["node"], vm["epoch"]) == (to, record.epoch_owned)
    assert vm["vmm_state"] == "running"
    bitmap = await fleet.bitmap()
    assert (bitmap["absent_count"], bitmap["resident_percent"]) == (0, 100.0)


async def assert_stayed(fleet: FakeFleet, at: str = "a") -> None:
    """The guest runs at `at` alone, with all its memory; nobody else has anything of it."""
    assert fleet.world.owners(VM) == [at]
    record = fleet.agents[at].records[VM]
    assert record.role == pb.VM_ROLE_RESIDENT
    assert not record.exported
    assert len(record.memory) == record.page_count
    vm = await fleet.vm()
    assert vm["node"] == at
    assert vm["epoch"] >= record.epoch_owned


async def test_there_and_back(fleet: FakeFleet) -> None:
    """Two moves; every page arrives, epochs grow, and the source is freed each time."""
    fleet.b.pages_per_tick = 4
    gone = await fleet.ended(await fleet.migrate("b"))
    await assert_moved(fleet, "b")
    assert phases(gone) == FORWARD_PATH
    assert (gone["decision"], gone["reason"], gone["progress"]) == ("committed", "", 1.0)
    assert 0 < gone["pause_ns"] < gone["total_ns"]
    assert gone["counters"]["page_count"] == gone["counters"]["bulk_page_count"] + 1
    assert gone["counters"]["absent_count"] == 0
    back = await fleet.ended(await fleet.migrate("a"))
    await assert_moved(fleet, "a")
    assert back["epoch"] > gone["epoch"]
    assert [node for _vm, node, _epoch in fleet.world.history] == ["a", "b", "a"]


async def test_switchover_calls_nothing_it_does_not_need(fleet: FakeFleet) -> None:
    """The pause has Pause, Transfer and Activate in it and no question to anybody."""
    described: list[int] = []

    async def count() -> None:
        described.append(fleet.a.calls["Describe"] + fleet.b.calls["Describe"])

    fleet.a.before("Pause", count)
    fleet.b.before("Activate", count)
    await fleet.ended(await fleet.migrate())
    assert described[0] == described[1]
    assert fleet.a.calls["Pause"] == fleet.a.calls["TransferDeviceState"] == 1
    assert fleet.b.calls["Activate"] == fleet.a.calls["Seal"] == 1


async def test_an_agent_that_only_pauses_is_told_to_transfer(fleet: FakeFleet) -> None:
    """A release that does not know `transfer_to` answers without `transferred`."""
    fleet.a.carries_on = False
    await fleet.ended(await fleet.migrate())
    await assert_moved(fleet, "b")
    assert fleet.a.calls["Pause"] == fleet.a.calls["TransferDeviceState"] == 1


async def test_an_activation_without_an_answer_does_not_hold_up_the_seal(fleet: FakeFleet) -> None:
    gate = fleet.b.hold("Activate")
    migration_id = await fleet.migrate()
    await gate.reached.wait()
    await eventually(lambda: fleet.a.calls["Seal"] == 1)
    gate.opened.set()
    assert (await fleet.ended(migration_id))["phase"] == "succeeded"
    await assert_moved(fleet, "b")


async def test_two_vms_at_once(fleet: FakeFleet) -> None:
    """Opposite directions, independent of each other."""
    await fleet.start_vm("vm-2", "b")
    first, second = await fleet.migrate("b"), await fleet.migrate("a", "vm-2")
    assert (await fleet.ended(first))["phase"] == "succeeded"
    assert (await fleet.ended(second))["phase"] == "succeeded"
    assert (fleet.world.owners(VM), fleet.world.owners("vm-2")) == (["b"], ["a"])


# --- lost messages ---

COMMANDS = [
    ("b", "Describe"),
    ("a", "Preflight"),
    ("b", "Preflight"),
    ("a", "PrepareSource"),
    ("b", "PrepareDestination"),
    ("a", "Pause"),
    ("a", "TransferDeviceState"),
    ("b", "Activate"),
    ("a", "Seal"),
    ("b", "WatchProgress"),
    ("a", "ReleaseSource"),
    ("b", "ReleaseDestination"),
]


@pytest.mark.parametrize(("node", "rpc"), COMMANDS)
@pytest.mark.parametrize("lost", ["request", "reply"])
async def test_lost_message_is_no_no(fleet: FakeFleet, node: str, rpc: str, lost: str) -> None:
    """A message that is lost once costs a retry, never the migration and never a second guest."""
    agent = fleet.agents[node]
    (agent.drop_request if lost == "request" else agent.drop_reply)(rpc)
    ended = await fleet.ended(await fleet.migrate())
    assert ended["phase"] == "succeeded", ended
    await assert_moved(fleet)


@pytest.mark.parametrize("lost", ["request", "reply"])
async def test_lost_device_state_brings_the_guest_back(fleet: FakeFleet, lost: str) -> None:
    """The source's agent could not deliver: the guest stands still, so there is no second try."""
    (fleet.b.drop_request if lost == "request" else fleet.b.drop_reply)("LoadDeviceState")
    ended = await fleet.ended(await fleet.migrate())
    assert (ended["phase"], ended["decision"]) == ("failed", "aborted")
    assert ended["reason"] == "DESTINATION_UNREACHABLE"
    await assert_stayed(fleet)
    assert fleet.b.records[VM].role == pb.VM_ROLE_GONE


@pytest.mark.parametrize("rpc", ["AbortDestination", "Resume", "AbortSource"])
@pytest.mark.parametrize("lost", ["request", "reply"])
async def test_lost_message_while_undoing(fleet: FakeFleet, rpc: str, lost: str) -> None:
    """Undoing is retried until evidence says that it is done."""
    agent = fleet.b if rpc == "AbortDestination" else fleet.a
    (agent.drop_request if lost == "request" else agent.drop_reply)(rpc)
    point = "PrepareDestination" if rpc == "AbortSource" else "TransferDeviceState"
    side = fleet.b if rpc == "AbortSource" else fleet.a
    side.refuse(point, FailedPreconditionError("BOOM", "refused by the test"))
    ended = await fleet.ended(await fleet.migrate())
    assert (ended["phase"], ended["reason"]) == ("failed", "BOOM")
    await assert_stayed(fleet)


# --- failures before the decision ---


@pytest.mark.parametrize(
    ("node", "rpc", "paused"),
    [
        ("a", "Preflight", False),
        ("b", "Preflight", False),
        ("a", "PrepareSource", False),
        ("b", "PrepareDestination", False),
        ("a", "Pause", False),
        ("a", "TransferDeviceState", True),
    ],
)
async def test_refusal_before_the_decision_leaves_the_guest_at_home(
    fleet: FakeFleet, node: str, rpc: str, paused: bool
) -> None:
    """The reason survives the undoing; a guest that was not paused is not resumed."""
    error = DataLossError("STATE_CORRUPT", "the hash differs", hint="look at the link")
    fleet.agents[node].refuse(rpc, error)
    ended = await fleet.ended(await fleet.migrate())
    assert (ended["phase"], ended["decision"]) == ("failed", "aborted")
    assert (ended["reason"], ended["hint"]) == ("STATE_CORRUPT", "look at the link")
    await assert_stayed(fleet)
    runs = [(node, epoch) for _vm, node, epoch in fleet.world.history]
    if paused:
        assert [node for node, _epoch in runs] == ["a", "a"]
        assert runs[1][1] > ended["epoch"], "resumed under an epoch that is not fresh"
    else:
        assert len(runs) == 1
        assert fleet.a.calls["Resume"] == 0
    again = await fleet.ended(await fleet.migrate())
    assert again["phase"] == "succeeded"
    await assert_moved(fleet)


async def test_failed_preflight_names_the_checks(fleet: FakeFleet) -> None:
    """And changes nothing: no epoch is spent, no agent hears a command."""
    fleet.b.failed_checks.append(
        common_pb2.Check(check="uffd", passed=False, reason="no userfaultfd", hint="load it")
    )
    ended = await fleet.ended(await fleet.migrate())
    assert (ended["phase"], ended["reason"]) == ("failed", "PREFLIGHT_FAILED")
    assert ended["message"] == "b: uffd: no userfaultfd"
    assert ended["hint"] == "load it"
    assert (ended["epoch"], VM in fleet.b.records) == (0, False)
    assert fleet.a.calls["PrepareSource"] == fleet.a.calls["AbortSource"] == 0


@pytest.mark.parametrize("what", ["agent", "vmm"])
async def test_destination_dies_before_the_decision(fleet: FakeFleet, what: str) -> None:
    """The source runs on under a fresh epoch, whether or not the death can be proved yet."""

    async def die() -> None:
        if what == "vmm":
            fleet.b.kill_vmm(VM)
        else:
            await fleet.b.kill()

    fleet.a.before("TransferDeviceState", die)
    migration_id = await fleet.migrate()
    ended = await fleet.ended(migration_id)
    assert ended["phase"] == "failed", ended
    await assert_stayed(fleet)
    assert fleet.world.history[-1][2] > ended["epoch"]
    row = await fleet.core.context.store.migrations.get(migration_id)
    assert row is not None
    assert row.destination_owed is (what == "agent")
    if what == "agent":
        # The proof is owed, and collected from the agent that comes back.
        await fleet.b.start()
        await eventually(lambda: fleet.b.records[VM].role == pb.VM_ROLE_GONE)
        assert fleet.b.records[VM].vmm == pb.VMM_STATE_DEAD
    assert fleet.world.owners(VM) == ["a"]


async def test_source_agent_dies_while_the_guest_stands_still(fleet: FakeFleet) -> None:
    """Nobody can resume it until the agent is back; then it is, and only then FAILED is said."""
    fleet.a.before("TransferDeviceState", fleet.a.kill)
    migration_id = await fleet.migrate()
    stuck = await fleet.until(
        migration_id, lambda each: each["phase"] == "aborted" and bool(each["reason"])
    )
    assert stuck["ended_at"] is None
    assert fleet.world.owners(VM) == []
    await fleet.a.start()
    assert (await fleet.ended(migration_id))["phase"] == "failed"
    await assert_stayed(fleet)


async def test_source_vmm_dies_before_the_decision(fleet: FakeFleet) -> None:
    """The guest is gone, which is nobody's fault: FAILED says so, and nothing runs anywhere."""

    async def die() -> None:
        fleet.a.kill_vmm(VM)

    fleet.a.before("Pause", die)
    ended = await fleet.ended(await fleet.migrate())
    assert (ended["phase"], ended["decision"]) == ("failed", "aborted")
    assert fleet.world.owners(VM) == []


async def test_transfer_that_hangs_gives_the_guest_back(fleet: FakeFleet) -> None:
    """The budget of the switchover is bounded, and what arrives later is stale."""
    gate = fleet.b.stall("LoadDeviceState")
    migration_id = await fleet.migrate()
    await gate.reached.wait()
    ended = await fleet.ended(migration_id)
    assert ended["phase"] == "failed"
    await assert_stayed(fleet)
    gate.opened.set()
    await asyncio.sleep(0.05)  # gives a late load the time to do harm
    assert fleet.b.records[VM].vmm == pb.VMM_STATE_DEAD
    await assert_stayed(fleet)


async def test_late_pause_is_stale(fleet: FakeFleet) -> None:
    """A Pause that was given up on arrives after the undoing: the guest runs on."""
    gate = fleet.a.stall("Pause")
    ended = await fleet.ended(await fleet.migrate())
    assert ended["phase"] == "failed"
    gate.opened.set()
    await asyncio.sleep(0.05)
    await assert_stayed(fleet)
    assert len(fleet.world.history) == 1


async def test_store_that_is_behind_decides_nothing(fleet: FakeFleet) -> None:
    """I2: an agent has seen an epoch that this store never issued."""
    fleet.a.records[VM].epoch_seen = 999
    with pytest.raises(StoreInDoubtError, match="999"):
        await fleet.migrate()
    violations = fleet.core.context.metrics.invariant_violations.labels("I2")
    assert violations._value.get() == 1
    assert fleet.world.owners(VM) == ["a"]


# --- cancel ---


@pytest.mark.parametrize(
    ("node", "rpc"),
    [
        ("a", "Preflight"),
        ("a", "PrepareSource"),
        ("b", "PrepareDestination"),
        ("a", "Pause"),
        ("a", "TransferDeviceState"),
        ("b", "LoadDeviceState"),
    ],
)
async def test_cancel_before_the_decision(fleet: FakeFleet, node: str, rpc: str) -> None:
    """Accepted wherever the migration stands, and nothing of it stays."""
    gate = fleet.agents[node].hold(rpc)
    migration_id = await fleet.migrate()
    await gate.reached.wait()
    assert (await fleet.cancel(migration_id))["cancel_requested"]
    ended = await fleet.ended(migration_id)
    assert (ended["phase"], ended["reason"]) == ("cancelled", "CANCELLED")
    gate.opened.set()
    await assert_stayed(fleet)
    assert (await fleet.cancel(migration_id))["phase"] == "cancelled"
    await asyncio.sleep(0.05)
    await assert_stayed(fleet)


async def test_cancel_races_the_commit(fleet: FakeFleet, hooks: Path) -> None:
    """Accepted an instant before the decision: COMMITTED cannot be written any more."""
    (hooks / "orchestrator.decision.before.hold").touch()
    migration_id = await fleet.migrate()
    await eventually((hooks / "orchestrator.decision.before.reached").exists)
    await fleet.cancel(migration_id)
    (hooks / "orchestrator.decision.before.hold").unlink()
    ended = await fleet.ended(migration_id)
    assert (ended["phase"], ended["decision"]) == ("cancelled", "aborted")
    await assert_stayed(fleet)


async def test_cancel_past_commit_is_refused(fleet: FakeFleet) -> None:
    fleet.b.fetching.clear()
    migration_id = await fleet.migrate()
    await fleet.in_phase(migration_id, "postcopy")
    before = await fleet.migration(migration_id)
    with pytest.raises(FailedPreconditionError, match="PAST_COMMIT"):
        await fleet.cancel(migration_id)
    assert (await fleet.migration(migration_id))["cancel_requested"] is False
    assert before["decision"] == "committed"
    fleet.b.fetching.set()
    assert (await fleet.ended(migration_id))["phase"] == "succeeded"
    await assert_moved(fleet)


# --- past the decision ---


async def test_destination_silent_after_the_commit_is_waited_for(fleet: FakeFleet) -> None:
    """I8: no time-out resumes the source; the destination runs when it is back."""
    fleet.b.before("Activate", fleet.b.kill)
    migration_id = await fleet.migrate()
    waiting = await fleet.until(
        migration_id, lambda each: each["phase"] == "committed" and bool(each["reason"])
    )
    assert waiting["decision"] == "committed"
    alarms = fleet.core.context.metrics.alarms.labels("committed")
    await eventually(lambda: alarms._value.get() > 0)
    assert (await fleet.migration(migration_id))["phase"] == "committed"
    assert fleet.world.owners(VM) == []
    await fleet.b.start()
    ended = await fleet.ended(migration_id)
    assert (ended["phase"], ended["reason"]) == ("succeeded", "")
    await assert_moved(fleet)


async def test_source_silent_after_the_commit_does_not_hold_the_guest(fleet: FakeFleet) -> None:
    """The guest runs at once; the seal is given until it is taken, and before anything is freed."""
    fleet.a.before("Seal", fleet.a.kill)
    fleet.b.fetching.clear()
    migration_id = await fleet.migrate()
    await fleet.in_phase(migration_id, "postcopy")
    assert fleet.world.owners(VM) == ["b"]
    fleet.b.fetching.set()
    await fleet.in_phase(migration_id, "finalizing")
    assert fleet.a.calls["ReleaseSource"] == 0
    await fleet.a.start()
    assert (await fleet.ended(migration_id))["phase"] == "succeeded"
    await assert_moved(fleet)


async def test_link_lost_and_found(fleet: FakeFleet) -> None:
    """POSTCOPY_PAUSED while the page server cannot be reached, then on; progress never falls."""
    fleet.b.pages_per_tick = 1
    migration_id = await fleet.migrate()
    await fleet.until(
        migration_id,
        lambda each: bool(each["counters"]) and each["counters"]["bulk_page_count"] > 4,
    )
    fleet.a.page_server_up = False
    paused = await fleet.in_phase(migration_id, "postcopy_paused")
    assert paused["reason"] == "LINK_LOST"
    bitmap = await fleet.bitmap()
    assert bitmap["absent_count"] == sum(count for _first, count in bitmap["absent_runs"]) > 0
    fleet.a.page_server_up = True
    ended = await fleet.ended(migration_id)
    assert (ended["phase"], ended["reason"]) == ("succeeded", "")
    assert phases(ended)[7:10] == ["postcopy", "postcopy_paused", "recovering"]
    await assert_moved(fleet)


async def test_destination_agent_killed_in_postcopy(fleet: FakeFleet) -> None:
    """The restarted agent adopts the arrival, and the orchestrator follows it again."""
    fleet.b.pages_per_tick = 1
    migration_id = await fleet.migrate()
    await fleet.in_phase(migration_id, "postcopy")
    await fleet.b.kill()
    waiting = await fleet.until(migration_id, lambda each: each["reason"] != "")
    assert waiting["phase"] == "postcopy"
    await fleet.b.start()
    assert (await fleet.ended(migration_id))["phase"] == "succeeded"
    await assert_moved(fleet)


async def test_guest_that_ends_itself_is_a_success(fleet: FakeFleet) -> None:
    fleet.b.fetching.clear()
    migration_id = await fleet.migrate()
    await fleet.in_phase(migration_id, "postcopy")
    fleet.b.end_guest(VM)
    ended = await fleet.ended(migration_id)
    assert (ended["phase"], ended["reason"]) == ("succeeded", "GUEST_ENDED")
    assert fleet.a.records[VM].role == pb.VM_ROLE_GONE
    assert fleet.world.owners(VM) == []


async def test_dead_vmm_with_memory_missing_needs_a_person(fleet: FakeFleet) -> None:
    """Not FAILED and not released: both sides keep what they have, a second move is refused."""
    fleet.b.fetching.clear()
    migration_id = await fleet.migrate()
    await fleet.in_phase(migration_id, "postcopy")
    fleet.b.kill_vmm(VM)
    stuck = await fleet.in_phase(migration_id, "needs_attention")
    assert stuck["reason"] == "DESTINATION_VMM_DEAD"
    assert stuck["hint"]
    assert fleet.a.records[VM].memory
    assert fleet.a.calls["ReleaseSource"] == 0
    with pytest.raises(AlreadyExistsError, match=migration_id):
        await fleet.migrate("c")
    assert fleet.world.owners(VM) == []


async def test_rebooted_source_needs_a_person(fleet: FakeFleet) -> None:
    """The boot id proves that the memory is gone; the guest waits on what it lacks, unharmed."""
    fleet.b.pages_per_tick = 1
    migration_id = await fleet.migrate()
    await fleet.in_phase(migration_id, "postcopy")
    await eventually(lambda: len(fleet.b.records[VM].memory) > 3)
    await fleet.a.reboot()
    stuck = await fleet.in_phase(migration_id, "needs_attention")
    assert stuck["reason"] == "SOURCE_MEMORY_GONE"
    assert fleet.world.owners(VM) == ["b"]
    bitmap = await fleet.bitmap()
    assert 0 < bitmap["absent_count"] < bitmap["page_count"]


async def test_needs_attention_ends_by_itself_when_pages_come(fleet: FakeFleet) -> None:
    """What looked lost and was not: evidence leads out again, no person needed."""
    fleet.b.pages_per_tick = 1
    migration_id = await fleet.migrate()
    await fleet.in_phase(migration_id, "postcopy")
    boot_id, fleet.a.boot_id = fleet.a.boot_id, "misread"
    fleet.a.page_server_up = False
    await fleet.in_phase(migration_id, "needs_attention")
    fleet.a.boot_id, fleet.a.page_server_up = boot_id, True
    assert (await fleet.ended(migration_id))["phase"] == "succeeded"
    await assert_moved(fleet)


# --- the store ---


@pytest.mark.parametrize("written", [True, False])
async def test_decision_whose_answer_is_lost_is_read_back(
    fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch, written: bool
) -> None:
    """I2: the store failed in the decision. Written or not, what it says afterwards holds."""
    decide = MigrationTable.decide
    failures = iter([True])

    async def failing(
        self: MigrationTable, row: MigrationRow, decision: Decision, *, now_ns: int
    ) -> MigrationRow:
        if next(failures, False):
            if written:
                await decide(self, row, decision, now_ns=now_ns)
            raise StoreError("STORE_FAILED", "the disk is on fire")
        return await decide(self, row, decision, now_ns=now_ns)

    monkeypatch.setattr(MigrationTable, "decide", failing)
    ended = await fleet.ended(await fleet.migrate())
    if written:
        assert ended["phase"] == "succeeded"
        await assert_moved(fleet)
    else:
        assert (ended["phase"], ended["reason"]) == ("failed", "DECISION_NOT_WRITTEN")
        await assert_stayed(fleet)


async def test_unreadable_decision_keeps_the_guest_paused(
    fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I8: without a readable decision nobody runs; with it, exactly one does."""
    decide, get = MigrationTable.decide, MigrationTable.get
    broken = True

    async def failing(
        self: MigrationTable, row: MigrationRow, decision: Decision, *, now_ns: int
    ) -> MigrationRow:
        if broken:
            raise StoreError("STORE_FAILED", "no such device")
        return await decide(self, row, decision, now_ns=now_ns)

    gate = Gate()

    async def unreadable(self: MigrationTable, migration_id: str) -> MigrationRow | None:
        if broken:
            gate.reached.set()
            raise StoreError("STORE_FAILED", "no such device")
        return await get(self, migration_id)

    migration_id = await fleet.migrate()
    monkeypatch.setattr(MigrationTable, "decide", failing)
    monkeypatch.setattr(MigrationTable, "get", unreadable)
    await gate.reached.wait()
    alarms = fleet.core.context.metrics.alarms.labels("switchover")
    await eventually(lambda: alarms._value.get() > 0)
    assert fleet.world.owners(VM) == []
    broken = False
    ended = await fleet.ended(migration_id)
    assert ended["phase"] in ("succeeded", "failed")
    assert fleet.world.owners(VM) == ["b" if ended["phase"] == "succeeded" else "a"]


async def test_transient_refusal_before_the_pause_is_retried(fleet: FakeFleet) -> None:
    fleet.b.refuse("PrepareDestination", UnavailableError("PAGE_SERVER_UNREACHABLE", "again"))
    assert (await fleet.ended(await fleet.migrate()))["phase"] == "succeeded"
    await assert_moved(fleet)
