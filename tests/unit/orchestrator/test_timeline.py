# SPDX-License-Identifier: Apache-2.0
"""Each recovery is told: what failed, what is done about it, how long the guest was held."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from godwit.agent.v1 import fault_agent_service_pb2 as pb

from services.common.errors import UnavailableError
from services.orchestrator.store import StoreFullError
from services.orchestrator.timeline import of_certificates
from tests.harness.fake_fleet import VM, FakeFleet, eventually


def kinds(migration: Any) -> list[str]:
    return [event["kind"] for event in migration["events"]]


def told(migration: Any, kind: str) -> Any:
    """The first event of a kind."""
    return next(event for event in migration["events"] if event["kind"] == kind)


async def in_postcopy(fleet: FakeFleet) -> str:
    """A migration whose pages come slowly."""
    fleet.b.pages_per_tick = 1
    migration_id = await fleet.migrate()
    await fleet.until(
        migration_id,
        lambda each: bool(each["counters"]) and each["counters"]["bulk_page_count"] > 4,
    )
    return migration_id


async def test_a_move_without_trouble_tells_nothing(fleet: FakeFleet) -> None:
    ended = await fleet.ended(await fleet.migrate())
    assert ended["phase"] == "succeeded"
    assert kinds(ended) == []


async def test_a_lost_link_and_how_long_the_guest_was_held(fleet: FakeFleet) -> None:
    """Lost twice: each outage is told once, with what the destination measured."""
    migration_id = await in_postcopy(fleet)
    for _ in range(2):
        fleet.a.page_server_up = False
        await fleet.in_phase(migration_id, "postcopy_paused")
        fleet.a.page_server_up = True
        await fleet.in_phase(migration_id, "postcopy")
    ended = await fleet.ended(migration_id)
    assert kinds(ended) == ["LINK_LOST", "RECOVERED"] * 2
    lost, recovered, _, again = ended["events"]
    assert "connection refused" in lost["message"]
    assert "keeps trying" in lost["action"]
    assert "network" in lost["hint"]
    assert (recovered["duration_ns"], recovered["held_ns"]) == (2_000_000_000, 1_500_000_000)
    assert "the guest was held for 1.5 s" in recovered["message"]
    assert again["held_ns"] == 3_000_000_000
    assert ended["counters"]["held_total_ns"] == 4_500_000_000
    assert [hold["cause"] for hold in ended["counters"]["holds"]] == ["link_lost"] * 2


async def test_no_memory_pauses_with_its_name_and_goes_on(fleet: FakeFleet) -> None:
    migration_id = await in_postcopy(fleet)
    record = fleet.b.records[VM]
    record.no_room = True
    paused = await fleet.in_phase(migration_id, "postcopy_paused")
    assert paused["reason"] == "NO_MEMORY"
    assert "b" in paused["message"]
    assert "free memory on b" in paused["hint"]
    record.no_room = False
    assert (await fleet.ended(migration_id))["phase"] == "succeeded"


async def test_an_agent_that_was_restarted(fleet: FakeFleet) -> None:
    """Away, back after so long, and it is another process that has taken the arrival up."""
    migration_id = await in_postcopy(fleet)
    await fleet.b.kill()
    await fleet.until(migration_id, lambda each: each["events"] != [])
    await fleet.b.start()
    ended = await fleet.ended(migration_id)
    assert ended["phase"] == "succeeded"
    assert kinds(ended).count("AGENT_RESTARTED") == 1
    restarted, over = told(ended, "AGENT_RESTARTED"), told(ended, "GOES_ON")
    assert restarted["node"] == "b"
    assert "takes the arrival up again" in restarted["message"]
    assert over["duration_ns"] > 0
    # A wait that is told again and again is one event.
    assert all(kinds(ended).count(kind) == 1 for kind in kinds(ended)[:1])


async def test_another_orchestrator_says_that_it_rejoined(fleet: FakeFleet) -> None:
    """And does not tell the outages of before once more."""
    migration_id = await in_postcopy(fleet)
    fleet.a.page_server_up = False
    await fleet.in_phase(migration_id, "postcopy_paused")
    fleet.a.page_server_up = True
    await fleet.until(migration_id, lambda each: "RECOVERED" in kinds(each))
    await fleet.until(migration_id, lambda each: bool(each["counters"]["holds"]))
    await fleet.in_phase(migration_id, "postcopy")
    await fleet.restart()
    ended = await fleet.ended(migration_id)
    assert kinds(ended) == ["LINK_LOST", "RECOVERED", "REJOINED"]
    assert "postcopy" in told(ended, "REJOINED")["message"]


async def test_a_guest_that_ended(fleet: FakeFleet) -> None:
    fleet.b.fetching.clear()
    migration_id = await fleet.migrate()
    await fleet.in_phase(migration_id, "postcopy")
    fleet.b.end_guest(VM)
    ended = await fleet.ended(migration_id)
    assert kinds(ended) == ["GUEST_ENDED"]
    assert "released" in told(ended, "GUEST_ENDED")["action"]


async def test_where_a_person_is_needed_both_sides_are_shown(fleet: FakeFleet) -> None:
    """What each node could prove when it got stuck, and that the memory is kept."""
    fleet.b.fetching.clear()
    migration_id = await fleet.migrate()
    await fleet.in_phase(migration_id, "postcopy")
    await eventually(lambda: fleet.a.records[VM].role == pb.VM_ROLE_SEALED)
    fleet.b.kill_vmm(VM)
    stuck = await fleet.in_phase(migration_id, "needs_attention")
    event = told(stuck, "DESTINATION_VMM_DEAD")
    assert event["hint"]
    assert "nothing is freed" in event["action"]
    source, destination = event["evidence"]
    assert source.startswith("a: sealed, its VMM is dead")
    assert "MiB of the guest's memory" in source
    assert destination.startswith("b: arrived, its VMM is dead")
    assert "ACTIVATING" in destination


async def test_an_alarm_is_told_once_a_phase(fleet: FakeFleet) -> None:
    for _ in range(200):
        fleet.b.refuse("Activate", UnavailableError("VMM_UNREACHABLE", "mute", hint="look"))
    migration_id = await fleet.migrate()
    alarmed = await fleet.until(migration_id, lambda each: "ALARM" in kinds(each))
    assert "mute" in told(alarmed, "ALARM")["message"]
    assert "nothing is given up" in told(alarmed, "ALARM")["action"]
    await asyncio.sleep(fleet.limits.alarm_s * 2)
    fleet.b._before["Activate"].clear()
    ended = await fleet.ended(migration_id)
    assert (ended["phase"], kinds(ended).count("ALARM")) == ("succeeded", 1)


async def test_events_wait_for_a_store_that_is_full(
    fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A timeline never stops a move, and forgets nothing that it has room for."""
    table = fleet.core.context.store.migrations
    write, full = table.add_event, True

    async def add_event(migration_id: str, event: Any) -> Any:
        if full:
            raise StoreFullError("STORE_FULL", "no space")
        return await write(migration_id, event)

    monkeypatch.setattr(table, "add_event", add_event)
    migration_id = await in_postcopy(fleet)
    fleet.a.page_server_up = False
    await fleet.in_phase(migration_id, "postcopy_paused")
    fleet.a.page_server_up = True
    await fleet.until(migration_id, lambda each: bool(each["counters"]["holds"]))
    await fleet.in_phase(migration_id, "postcopy")
    full = False
    fleet.a.page_server_up = False
    await fleet.in_phase(migration_id, "postcopy_paused")
    fleet.a.page_server_up = True
    ended = await fleet.ended(migration_id)
    assert sorted(kinds(ended)) == ["LINK_LOST"] * 2 + ["RECOVERED"] * 2


@pytest.mark.parametrize(
    ("left_s", "is_by_pin", "kinds"),
    [
        (None, False, []),
        (8 * 86400.0, False, []),
        (6 * 86400.0, False, ["CERTIFICATE_ENDS_SOON"]),
        (-1.0, False, ["CERTIFICATE_ENDED"]),
        (-1.0, True, ["CERTIFICATE_ENDED", "PEER_BY_PIN"]),
        (8 * 86400.0, True, ["PEER_BY_PIN"]),
    ],
)
def test_what_is_said_of_certificates(
    left_s: float | None, is_by_pin: bool, kinds: list[str]
) -> None:
    events = of_certificates("b", left_s, is_by_pin=is_by_pin)
    assert [event.kind for event in events] == kinds
    assert all(event.node == "b" and event.hint and "b" in event.message for event in events)
