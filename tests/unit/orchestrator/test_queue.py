# SPDX-License-Identifier: Apache-2.0
"""Promise: the live queue admits within limits, in one transaction, and says what holds others."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from services.common.errors import FailedPreconditionError
from services.orchestrator import nodes
from services.orchestrator.scheduling.model import Priority
from services.orchestrator.store import open_store
from services.orchestrator.store.rows import MigrationRow
from services.orchestrator.store.schedule import Grant
from tests.harness.fake_fleet import VM, FakeFleet, eventually


@pytest.fixture
def fleet(stored_fleet: FakeFleet) -> FakeFleet:
    """Everything here runs on SQLite and on a real PostgreSQL."""
    return stored_fleet


async def queue(fleet: FakeFleet) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await fleet.get("/v1/queue"))["entries"]
    return found


async def limit(fleet: FakeFleet, **values: int) -> None:
    body = {"values": {key.replace("_", "-"): value for key, value in values.items()}}
    response = await fleet.http.patch("/v1/limits", json=body)
    assert response.status_code == 200, response.text


async def test_without_a_destination_the_best_node_is_taken_and_it_is_said_why(
    fleet: FakeFleet,
) -> None:
    await fleet.start_vm("crowd", "b")
    migration = await fleet.ended(await fleet.migrate(to=""))
    assert (migration["phase"], migration["destination_node"]) == ("succeeded", "c")
    assert migration["because"].startswith("best of 2: ")
    assert fleet.world.owners(VM) == ["c"]


async def test_what_waits_says_which_limit_holds_it_and_goes_when_it_is_raised(
    fleet: FakeFleet,
) -> None:
    for number in (2, 3):
        await fleet.start_vm(f"vm-{number}")
    await limit(fleet, node_out=1)
    fleet.b.fetching.clear()
    first = await fleet.migrate("b")
    await fleet.in_phase(first, "postcopy")
    second, third = await fleet.migrate("c", "vm-2"), await fleet.migrate("", "vm-3")
    waits = await eventually(lambda: queue(fleet))
    assert [(each["migration_id"], each["place"]) for each in waits] == [(second, 1), (third, 2)]
    assert {each["reason"] for each in waits} == {"NODE_OUTBOUND_LIMIT"}
    assert waits[0]["message"] == "node-out:a 1/1"

    async def told() -> bool:
        return bool((await fleet.migration(third))["reason"] == "NODE_OUTBOUND_LIMIT")

    await eventually(told)
    assert "(place 2)" in (await fleet.migration(third))["message"]
    await limit(fleet, node_out=3)
    assert (await fleet.ended(second))["phase"] == "succeeded"
    assert (await fleet.ended(third))["phase"] == "succeeded"
    fleet.b.fetching.set()
    await fleet.ended(first)
    used = {each["key"]: each["used"] for each in (await fleet.get("/v1/limits"))["limits"]}
    assert not any(used.values()), "every token came back"


async def test_the_emergency_stop_admits_nothing_and_serves_pages(fleet: FakeFleet) -> None:
    fleet.b.fetching.clear()
    under_way = await fleet.migrate("b")
    await fleet.in_phase(under_way, "postcopy")
    await fleet.start_vm("vm-2")
    assert (await fleet.post("/v1/queue:freeze", {"because": "fire"})).status_code == 204
    held = await fleet.migrate("c", "vm-2")
    fleet.b.fetching.set()
    assert (await fleet.ended(under_way))["phase"] == "succeeded"
    assert [each["reason"] for each in await queue(fleet)] == ["FROZEN"]
    await fleet.restart()
    assert (await fleet.get("/v1/queue"))["frozen"] == "fire", "it outlives the orchestrator"
    assert (await fleet.migration(held))["phase"] == "pending"
    assert (await fleet.post("/v1/queue:thaw", {})).status_code == 204
    assert (await fleet.ended(held))["phase"] == "succeeded"


async def test_what_waits_can_be_cancelled_and_holds_nothing(fleet: FakeFleet) -> None:
    await fleet.post("/v1/queue:freeze", {"because": "x"})
    migration_id = await fleet.migrate(to="")
    await fleet.cancel(migration_id)
    ended = await fleet.ended(migration_id)
    assert (ended["phase"], ended["destination_node"]) == ("cancelled", "")
    assert await queue(fleet) == []
    await fleet.post("/v1/queue:thaw", {})
    assert (await fleet.ended(await fleet.migrate(to="")))["phase"] == "succeeded"


async def test_a_node_with_a_taint_or_without_a_label_is_not_chosen(fleet: FakeFleet) -> None:
    node = {"labels": {"zone": "x"}, "taints": [], "link": "rack-1"}
    assert (await fleet.http.put("/v1/nodes/b/placement", json=node)).status_code == 200
    vm = {"labels": {"app": "db"}, "placement": {"selector": {"zone": "x"}}}
    said = (await fleet.http.put(f"/v1/vms/{VM}/placement", json=vm)).json()
    assert (said["labels"], said["placement"]["selector"]) == ({"app": "db"}, {"zone": "x"})
    node["taints"] = ["gpu"]
    await fleet.http.put("/v1/nodes/b/placement", json=node)
    migration_id = await fleet.migrate(to="")
    (waits,) = await eventually(lambda: queue(fleet))
    assert waits["reason"] in ("TAINTED", "SELECTOR_MISMATCH")
    assert waits["hint"]
    node["taints"] = []
    await fleet.http.put("/v1/nodes/b/placement", json=node)
    assert (await fleet.ended(migration_id))["destination_node"] == "b"


async def test_policies_count_and_are_kept_with_the_migration(fleet: FakeFleet) -> None:
    policy = {"match_labels": {"app": "db"}, "bulk_bytes_per_s_max": 7 << 20, "priority": "system"}
    answer = await fleet.http.put("/v1/policies/db", json=policy)
    assert answer.status_code == 200, answer.text
    await fleet.http.put("/v1/policies/all", json={"freeze_after_ms": 9000, "pause_ms_max": 2500})
    await fleet.http.put(f"/v1/vms/{VM}/placement", json={"labels": {"app": "db"}})
    await fleet.post("/v1/queue:freeze", {"because": "x"})
    migration_id = await fleet.migrate()
    assert (await fleet.http.delete("/v1/policies/db")).status_code == 204
    (waits,) = await queue(fleet)
    assert waits["priority"] == "system"
    await fleet.post("/v1/queue:thaw", {})
    ended = await fleet.ended(migration_id)
    assert ended["policies"] == ["db", "all"]
    assert ended["on_link_loss"] == {"freeze_after_ms": 9000}
    row = await fleet.core.context.store.migrations.get(migration_id)
    assert row is not None
    assert row.bulk_bytes_per_s_max == 7 << 20
    kept = await fleet.core.context.queue.settings(migration_id)
    assert (kept.pause_ms_max, kept.priority) == (2500, Priority.SYSTEM)
    names = [each["name"] for each in (await fleet.get("/v1/policies"))["policies"]]
    assert names == ["all"]
    assert (await fleet.http.delete("/v1/policies/db")).json()["reason"] == "POLICY_UNKNOWN"


@pytest.mark.parametrize(
    ("method", "path", "body", "reason"),
    [
        ("PATCH", "/v1/limits", {"values": {"speed": 1}}, "LIMIT_INVALID"),
        ("PUT", "/v1/policies/X_y", {}, "FIELD_INVALID"),
        ("PUT", "/v1/policies/x", {"retries": 101}, "FIELD_INVALID"),
        ("PUT", "/v1/nodes/zz/placement", {}, "NODE_UNKNOWN"),
        ("PUT", "/v1/vms/zz/placement", {}, "VM_UNKNOWN"),
        ("PUT", f"/v1/vms/{VM}/placement", {"placement": {"apart": "a b"}}, "FIELD_INVALID"),
        ("POST", "/v1/queue:freeze", {"because": " "}, "FIELD_INVALID"),
    ],
)
async def test_what_makes_no_sense_is_refused(
    fleet: FakeFleet, method: str, path: str, body: Any, reason: str
) -> None:
    before = await fleet.dump()
    assert (await fleet.http.request(method, path, json=body)).json()["reason"] == reason
    assert await fleet.dump() == before


async def test_an_orchestrator_that_dies_between_admission_and_its_beginning(
    fleet: FakeFleet,
) -> None:
    """The next one finds it admitted, and does not admit it again."""
    await fleet.post("/v1/queue:freeze", {"because": "x"})
    migration_id = await fleet.migrate(to="")
    await fleet.stop()
    async with open_store(fleet.place) as store:
        await store.schedule.freeze("")
        grant = Grant(
            migration_id=migration_id, target="c", because="so", keys=("cluster", "node-in:c")
        )
        assert len(await store.schedule.admit([grant], now_ns=1)) == 1
        assert await store.schedule.admit([grant], now_ns=2) == [], "once"
    await fleet.start()
    ended = await fleet.ended(migration_id)
    assert (ended["phase"], ended["destination_node"], ended["because"]) == ("succeeded", "c", "so")


async def test_of_two_that_see_one_token_one_takes_it(fleet: FakeFleet) -> None:
    """I9: tokens are counted in the transaction that takes them, all or none."""
    for number in (2, 3):
        await fleet.start_vm(f"vm-{number}")
    await fleet.post("/v1/queue:freeze", {"because": "x"})
    ids = [await fleet.migrate(to="", vm_id=f"vm-{number}") for number in (1, 2, 3)]
    await fleet.stop()
    async with open_store(fleet.place) as store:
        await store.schedule.freeze("")
        await store.schedule.set_limits({"node-in:b": 1, "node-out": 2})

        def grant(migration_id: str, target: str) -> Grant:
            keys = ("cluster", "node-out:a", f"node-in:{target}")
            return Grant(migration_id=migration_id, target=target, because="", keys=keys)

        one, two = await asyncio.gather(
            store.schedule.admit([grant(ids[0], "b")], now_ns=1),
            store.schedule.admit([grant(ids[1], "b"), grant(ids[2], "c")], now_ns=1),
        )
        assert len(one) + len(two) == 2
        _limits, used = await store.schedule.limits()
        assert used["cluster"] == used["node-out:a"] == 2
        assert used["node-in:b"] == 1
    await fleet.start()
    for migration_id in ids:
        assert (await fleet.ended(migration_id))["phase"] == "succeeded"


async def test_a_migration_of_the_time_before_the_queue_goes_on(fleet: FakeFleet) -> None:
    vm = await fleet.core.context.store.fleet.vm(VM)
    assert vm is not None
    row = MigrationRow.new(
        migration_id="01M8FS19XVS0B6778GKH6WMXST",
        vm=vm,
        destination_node="b",
        bulk_bytes_per_s_max=0,
        traceparent="",
        now_ns=1,
    )
    await fleet.core.context.store.migrations.create(row, None)
    await fleet.restart()
    assert (await fleet.ended(row.migration_id))["phase"] == "succeeded"


async def test_a_vm_that_failed_somewhere_goes_elsewhere(fleet: FakeFleet) -> None:
    fleet.b.refuse("Preflight", FailedPreconditionError("NO", "no"))
    assert (await fleet.ended(await fleet.migrate("b")))["phase"] == "failed"
    migration_id = await fleet.migrate(to="")
    (waits,) = await eventually(lambda: queue(fleet))
    assert waits["reason"] == "BACK_OFF"
    found = await fleet.core.queue.fleet()
    (request,) = found.schedule.requests()
    assert request.avoid == frozenset({"b"})
    named = replace(request, not_before_s=0.0)
    found.schedule.withdraw(named.request_id)
    found.schedule.put(named)
    assert [each.target for each in found.schedule.admit(request.created_s)] == ["c"]
    await fleet.cancel(migration_id)


async def test_metrics_say_what_the_queue_says(fleet: FakeFleet) -> None:
    registry = fleet.core.context.metrics.registry

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"godwit_{name}", labels)

    fleet.b.fetching.clear()
    under_way = await fleet.migrate("b")
    await fleet.in_phase(under_way, "postcopy")
    await fleet.start_vm("vm-2")
    await limit(fleet, node_in=1)
    await fleet.migrate("b", "vm-2")
    await eventually(lambda: value("queue_held", reason="NODE_INBOUND_LIMIT") == 1)
    assert value("queue_depth", priority="user") == 1
    assert value("admissions_total", priority="user") == 1
    assert value("limit_tokens", kind="node-in", state="held") == 1
    assert value("limit_tokens", kind="node-in", state="limit") == 1
    assert (value("node_reserved_bytes", node="b") or 0) > 0
    assert value("queue_frozen") == 0
    await fleet.post("/v1/queue:freeze", {"because": "x"})
    await eventually(lambda: value("queue_frozen") == 1)
    assert value("queue_held", reason="FROZEN") == 1
    await fleet.post("/v1/queue:thaw", {})
    fleet.b.fetching.set()
    await fleet.ended(under_way)
    await eventually(lambda: value("queue_wait_seconds_count") == 2)
    assert value("queue_held", reason="NODE_INBOUND_LIMIT") is None


async def test_who_takes_over_plans_with_a_fresh_view(
    fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not among those nodes that happened to answer first; and without waiting for a round."""
    monkeypatch.setattr(nodes, "VIEW_S_MAX", 600.0)
    for number in range(4):
        await fleet.start_vm(f"crowd-{number}", "c")
    await fleet.post("/v1/queue:freeze", {"because": "x"})
    migration_id = await fleet.migrate(to="")
    await fleet.stop()
    gate = fleet.b.hold("Hello")
    fleet.deadlines = replace(fleet.deadlines, hello_s=600.0)
    await fleet.start()
    await gate.reached.wait()
    await fleet.core.context.store.schedule.freeze("")
    fleet.core.queue.wake()
    await fleet.reachable("c")
    plan = asyncio.create_task(fleet.post("/v1/nodes/a:drain", {"dry_run": True}))
    assert (await fleet.migration(migration_id))["phase"] == "pending"
    gate.opened.set()
    assert [step["destination_node"] for step in (await plan).json()["steps"]] in (["b"], [])
    assert (await fleet.ended(migration_id))["destination_node"] == "b"
