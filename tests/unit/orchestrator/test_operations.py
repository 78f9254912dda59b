# SPDX-License-Identifier: Apache-2.0
"""Promise: a drain empties its node, can be stopped at any point, and an undrain takes it back."""

from __future__ import annotations

from typing import Any

import pytest

from services.orchestrator.operations import windows
from tests.harness.fake_fleet import VM, FakeFleet, eventually

ENDED = ("succeeded", "failed", "cancelled")
VMS = (VM, "vm-2", "vm-3")


@pytest.fixture
def fleet(stored_fleet: FakeFleet) -> FakeFleet:
    """Everything here runs on SQLite and on a real PostgreSQL."""
    return stored_fleet


@pytest.fixture
async def three(fleet: FakeFleet) -> FakeFleet:
    """Three VMs on a."""
    for vm_id in VMS[1:]:
        await fleet.start_vm(vm_id)
    return fleet


async def begin(fleet: FakeFleet, path: str, **body: Any) -> dict[str, Any]:
    response = await fleet.post(path, body)
    assert response.status_code == 202, response.text
    found: dict[str, Any] = response.json()
    assert response.headers["Location"] == f"/v1/operations/{found['operation_id']}"
    return found


async def until(fleet: FakeFleet, operation: dict[str, Any], *states: str) -> dict[str, Any]:
    async def look() -> dict[str, Any] | None:
        found: dict[str, Any] = await fleet.get(f"/v1/operations/{operation['operation_id']}")
        return found if found["state"] in states else None

    found: dict[str, Any] = await eventually(look)
    return found


async def nodes_of(fleet: FakeFleet) -> dict[str, str]:
    return {vm["vm_id"]: vm["node"] for vm in (await fleet.get("/v1/vms"))["vms"]}


async def test_a_drain_empties_its_node_and_an_undrain_brings_all_back(three: FakeFleet) -> None:
    drain = await begin(three, "/v1/nodes/a:drain")
    assert drain["counts"] == {"waiting": 3}
    done = await until(three, drain, *ENDED)
    assert (done["state"], done["progress"], done["counts"]) == ("succeeded", 1.0, {"moved": 3})
    assert {each["source_node"] for each in done["vms"]} == {"a"}
    assert all(each["destination_node"] in "bc" and each["migration_id"] for each in done["vms"])
    assert not any(record.memory for record in three.a.records.values()), "it retains no image"
    assert set((await nodes_of(three)).values()) <= {"b", "c"}
    assert (await three.get("/v1/nodes/a"))["closed_by"] == drain["operation_id"]
    back = await until(three, await begin(three, "/v1/nodes/a:undrain"), *ENDED)
    assert (back["state"], back["counts"]) == ("succeeded", {"moved": 3})
    assert set((await nodes_of(three)).values()) == {"a"}
    assert (await three.get("/v1/nodes/a"))["closed_by"] == ""
    listed = (await three.get("/v1/operations"))["operations"]
    assert [each["kind"] for each in listed] == ["undrain", "drain"]


async def test_a_drain_keeps_to_limits_and_to_max_parallel(three: FakeFleet) -> None:
    three.b.fetching.clear()
    three.agents["c"].fetching.clear()
    drain = await begin(three, "/v1/nodes/a:drain", parallel_max=1)
    moving = await until_counts(three, drain, moving=1, waiting=2)
    assert moving["state"] == "running"
    three.b.fetching.set()
    three.agents["c"].fetching.set()
    assert (await until(three, drain, *ENDED))["state"] == "succeeded"


async def until_counts(fleet: FakeFleet, operation: dict[str, Any], **counts: int) -> Any:
    async def look() -> Any:
        found = await fleet.get(f"/v1/operations/{operation['operation_id']}")
        return found if found["counts"] == counts else None

    return await eventually(look)


async def test_nothing_is_placed_on_a_node_that_is_drained(three: FakeFleet) -> None:
    await until(three, await begin(three, "/v1/nodes/a:drain"), "succeeded")
    migration_id = await three.migrate(to="a")

    async def held() -> bool:
        return bool((await three.migration(migration_id))["reason"] == "NODE_DRAINING")

    await eventually(held)
    undrained = await begin(three, "/v1/nodes/a:undrain", no_return=True)
    assert (await until(three, undrained, *ENDED))["counts"] == {}
    assert (await three.ended(migration_id))["destination_node"] == "a"


async def test_a_dry_run_has_waves_and_changes_nothing(three: FakeFleet) -> None:
    before = await three.dump()
    response = await three.post("/v1/nodes/a:drain", {"dry_run": True})
    assert response.status_code == 200
    plan = response.json()
    assert [step["vm_id"] for step in plan["steps"]] == list(VMS)
    assert [step["wave"] for step in plan["steps"]] == [1, 1, 2]
    assert plan["impossible"] == []
    assert plan["ends_s"] == max(step["ends_s"] for step in plan["steps"]) > 0
    assert await three.dump() == before


async def test_a_dry_run_says_what_cannot_go_and_why(three: FakeFleet) -> None:
    placement = {"placement": {"selector": {"zone": "nowhere"}}}
    await three.http.put("/v1/vms/vm-2/placement", json=placement)
    plan = (await three.post("/v1/nodes/a:drain", {"dry_run": True})).json()
    (impossible,) = plan["impossible"]
    assert (impossible["vm_id"], impossible["check"]) == ("vm-2", "SELECTOR_MISMATCH")
    assert impossible["reason"]
    assert impossible["hint"]


async def test_a_cancelled_drain_stops_and_opens_its_node_again(three: FakeFleet) -> None:
    """One is past its decision and ends; one before it goes back; one was never begun."""
    three.b.fetching.clear()
    three.agents["c"].fetching.clear()
    drain = await begin(three, "/v1/nodes/a:drain", parallel_max=2)
    moving = await until_counts(three, drain, moving=2, waiting=1)
    first = next(each for each in moving["vms"] if each["state"] == "moving")
    await three.in_phase(first["migration_id"], "postcopy")
    gone = await three.post(f"/v1/operations/{drain['operation_id']}:cancel", {})
    assert gone.json()["state"] == "cancelling"
    three.b.fetching.set()
    three.agents["c"].fetching.set()
    ended = await until(three, drain, *ENDED)
    assert ended["state"] == "cancelled"
    assert set(ended["counts"]) <= {"moved", "stayed"}
    assert ended["counts"]["stayed"] >= 1
    assert (await three.get("/v1/nodes/a"))["closed_by"] == ""
    again = await three.post(f"/v1/operations/{drain['operation_id']}:cancel", {})
    assert again.status_code == 200, "idempotent"
    too_late = await three.post(f"/v1/operations/{drain['operation_id']}:pause", {})
    assert too_late.json()["reason"] == "ALREADY_ENDED"


async def test_a_paused_drain_admits_nothing_until_it_is_resumed(three: FakeFleet) -> None:
    await three.post("/v1/queue:freeze", {"because": "x"})
    drain = await begin(three, "/v1/nodes/a:drain")
    await until_counts(three, drain, moving=3)
    paused = await three.post(f"/v1/operations/{drain['operation_id']}:pause", {})
    assert paused.json()["paused"]
    await three.post("/v1/queue:thaw", {})

    async def held() -> bool:
        entries = (await three.get("/v1/queue"))["entries"]
        return [each["reason"] for each in entries] == ["PAUSED"] * 3

    await eventually(held)
    assert set((await nodes_of(three)).values()) == {"a"}
    await three.post(f"/v1/operations/{drain['operation_id']}:resume", {})
    assert (await until(three, drain, *ENDED))["state"] == "succeeded"


async def test_a_drain_goes_on_under_the_next_orchestrator(three: FakeFleet) -> None:
    three.b.fetching.clear()
    three.agents["c"].fetching.clear()
    drain = await begin(three, "/v1/nodes/a:drain")
    await until_counts(three, drain, moving=3)
    await three.restart()
    three.b.fetching.set()
    three.agents["c"].fetching.set()
    done = await until(three, drain, *ENDED)
    assert (done["state"], done["counts"]) == ("succeeded", {"moved": 3})
    assert {each["attempts"] for each in done["vms"]} == {1}, "none was asked for twice"


async def test_a_vm_that_fails_for_good_fails_the_drain_and_the_others_go(
    three: FakeFleet,
) -> None:
    await three.be_patient()
    three.a.immovable.add("vm-2")
    drain = await begin(three, "/v1/nodes/a:drain", retries=0)
    done = await until(three, drain, *ENDED)
    assert (done["state"], done["counts"]) == ("failed", {"moved": 2, "failed": 1})
    (failed,) = (each for each in done["vms"] if each["state"] == "failed")
    assert (failed["vm_id"], failed["attempts"]) == ("vm-2", 1)
    assert (failed["reason"], failed["hint"]) == ("PREFLIGHT_FAILED", "unplug it")
    assert (await three.get("/v1/nodes/a"))["closed_by"] == drain["operation_id"]


async def test_a_deadline_ends_a_drain_as_failed_and_names_what_stayed(three: FakeFleet) -> None:
    await three.post("/v1/queue:freeze", {"because": "x"})
    drain = await begin(three, "/v1/nodes/a:drain", deadline_s=0.001)
    done = await until(three, drain, *ENDED)
    assert (done["state"], done["reason"]) == ("failed", "DEADLINE_EXCEEDED")
    assert done["counts"] == {"stayed": 3}
    assert done["options"]["largest_first"], "the deadline is tight"


async def test_a_second_operation_of_a_node_is_refused_and_names_the_first(
    three: FakeFleet,
) -> None:
    await three.post("/v1/queue:freeze", {"because": "x"})
    key = {"Idempotency-Key": "k1"}
    drain = await three.post("/v1/nodes/a:drain", {}, **key)
    again = await three.post("/v1/nodes/a:drain", {}, **key)
    assert again.json()["operation_id"] == drain.json()["operation_id"], "the same request"
    refused = (await three.post("/v1/nodes/a:undrain", {})).json()
    assert refused["reason"] == "OPERATION_ACTIVE"
    assert refused["metadata"]["operation_id"] == drain.json()["operation_id"]
    assert (await three.post("/v1/nodes/zz:drain", {})).json()["reason"] == "NODE_UNKNOWN"
    wrong = await three.post("/v1/nodes/b:drain", {"windows": ["25:00-26:00"]})
    assert wrong.json()["reason"] == "FIELD_INVALID"


async def test_a_batch_moves_what_it_is_given(three: FakeFleet) -> None:
    body = {"vms": ["vm-3", VM], "destination_node": "c"}
    done = await until(three, await begin(three, "/v1/operations:batch", **body), *ENDED)
    assert (done["state"], done["counts"]) == ("succeeded", {"moved": 2})
    assert await nodes_of(three) == {VM: "c", "vm-2": "a", "vm-3": "c"}
    unknown = await three.post("/v1/operations:batch", {"vms": ["zz"]})
    assert unknown.json()["reason"] == "VM_UNKNOWN"


async def test_outside_its_window_an_operation_begins_nothing(
    three: FakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = False
    monkeypatch.setattr(windows, "is_open", lambda _windows, _now: opened)
    drain = await begin(three, "/v1/nodes/a:drain", windows=["22:00-04:00"])

    async def waits() -> bool:
        found = await three.get(f"/v1/operations/{drain['operation_id']}")
        return bool(found["reason"] == "OUTSIDE_WINDOW")

    await eventually(waits)
    assert set((await nodes_of(three)).values()) == {"a"}
    opened = True
    assert (await until(three, drain, *ENDED))["state"] == "succeeded"
