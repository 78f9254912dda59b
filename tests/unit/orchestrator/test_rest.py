# SPDX-License-Identifier: Apache-2.0
"""REST: shapes, problems for every refusal with proof that nothing changed, idempotency, events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import httpx_sse
import pytest
from godwit.agent.v1 import fault_agent_service_pb2 as pb

from services.common.errors import FailedPreconditionError
from services.orchestrator import rest_events
from tests.harness.fake_agent import spec
from tests.harness.fake_fleet import VM, FakeFleet, eventually, fake_fleet


@pytest.fixture
async def listening(tmp_path: Path) -> AsyncIterator[FakeFleet]:
    """A fleet whose REST is a real server."""
    async with fake_fleet(tmp_path, listening=True) as running:
        yield running


def assert_problem(response: httpx.Response, status: int, reason: str) -> Any:
    """RFC 9457, with a type that follows from the reason."""
    body = response.json()
    assert (response.status_code, body["reason"]) == (status, reason), body
    assert response.headers["content-type"] == "application/problem+json"
    assert body["type"] == f"https://godwit.io/errors/{reason.lower().replace('_', '-')}"
    assert body["status"] == status
    assert body["title"]
    assert body["detail"]
    assert set(body) == {"type", "title", "status", "detail", "reason", "hint", "metadata"}
    return body


async def state_of(fleet: FakeFleet) -> tuple[list[str], Any, list[tuple[str, str, int]]]:
    """Everything that a refusal must not change: the store's rows, and what the agents hold."""
    records = {
        name: {vm: agent.evidence(vm).SerializeToString() for vm in sorted(agent.records)}
        for name, agent in fleet.agents.items()
    }
    return await fleet.dump(), records, list(fleet.world.history)


REFUSALS: list[tuple[str, dict[str, Any], int, str]] = [
    ("unknown VM", {"vm": "ghost", "destination_node": "b"}, 404, "VM_UNKNOWN"),
    ("unknown node", {"vm": VM, "destination_node": "zz"}, 404, "NODE_UNKNOWN"),
    ("same node", {"vm": VM, "destination_node": "a"}, 409, "SAME_NODE"),
    ("unknown field", {"vm": VM, "destination_node": "b", "force": True}, 422, "FIELD_INVALID"),
    ("wrong type", {"vm": 7, "destination_node": "b"}, 422, "FIELD_INVALID"),
    ("no name", {"vm": "Not a name", "destination_node": "b"}, 422, "FIELD_INVALID"),
    (
        "negative limit",
        {"vm": VM, "destination_node": "b", "bulk_bytes_per_s_max": -1},
        422,
        "FIELD_INVALID",
    ),
]


@pytest.mark.parametrize("case", REFUSALS, ids=[case[0] for case in REFUSALS])
async def test_refused_migration_changes_nothing(
    fleet: FakeFleet, case: tuple[str, dict[str, Any], int, str]
) -> None:
    _name, body, status, reason = case
    before = await state_of(fleet)
    response = await fleet.post("/v1/migrations", body, **{"Idempotency-Key": "k"})
    assert_problem(response, status, reason)
    assert await state_of(fleet) == before


@pytest.mark.parametrize(
    ("content", "status", "reason"),
    [
        (b"{", 400, "BODY_MALFORMED"),
        (b"\xff\xfe", 400, "BODY_MALFORMED"),
        (b"", 422, "FIELD_INVALID"),
        (b"[]", 422, "FIELD_INVALID"),
        (b"null", 422, "FIELD_INVALID"),
        (b'"b"', 422, "FIELD_INVALID"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/migrations", "/v1/vms", "/v1/nodes"])
async def test_malformed_body_is_a_problem(
    fleet: FakeFleet, path: str, content: bytes, status: int, reason: str
) -> None:
    before = await state_of(fleet)
    response = await fleet.http.post(
        path, content=content, headers={"Content-Type": "application/json"}
    )
    assert_problem(response, status, reason)
    assert await state_of(fleet) == before


@pytest.mark.parametrize("node", ["a", "b"])
async def test_unreachable_node_is_refused_before_anything_is_written(
    fleet: FakeFleet, node: str
) -> None:
    await fleet.agents[node].kill()
    before = await state_of(fleet)
    response = await fleet.post("/v1/migrations", {"vm": VM, "destination_node": "b"})
    problem = assert_problem(response, 503, "NODE_UNREACHABLE")
    assert problem["metadata"]["node"] == node
    assert response.headers["retry-after"]
    assert await state_of(fleet) == before
    assert (await fleet.get(f"/v1/nodes/{node}"))["reachable"] is False
    await fleet.agents[node].start()
    await fleet.reachable(node)
    await fleet.ended(await fleet.migrate())


async def test_address_of_another_node_is_no_node(fleet: FakeFleet) -> None:
    """A command for b never reaches c."""
    await fleet.post("/v1/nodes", {"name": "b", "agent_address": str(fleet.agents["c"].address)})
    response = await fleet.post("/v1/migrations", {"vm": VM, "destination_node": "b"})
    problem = assert_problem(response, 503, "NODE_UNREACHABLE")
    assert "is node 'c'" in problem["detail"]


async def test_second_migration_is_refused_and_names_the_first(fleet: FakeFleet) -> None:
    fleet.b.fetching.clear()
    first = await fleet.migrate()
    await fleet.in_phase(first, "postcopy")
    rows = (await fleet.get("/v1/migrations"))["migrations"]
    for destination in ("a", "c"):
        response = await fleet.post("/v1/migrations", {"vm": VM, "destination_node": destination})
        problem = assert_problem(response, 409, "MIGRATION_ACTIVE")
        assert problem["metadata"]["migration_id"] == first
    response = await fleet.http.delete(f"/v1/vms/{VM}")
    assert_problem(response, 409, "MIGRATION_ACTIVE")
    after = (await fleet.get("/v1/migrations"))["migrations"]
    assert [row["migration_id"] for row in after] == [row["migration_id"] for row in rows]
    assert (await fleet.get(f"/v1/vms/{VM}"))["migration_id"] == first
    fleet.b.fetching.set()
    await fleet.ended(first)


async def test_cancel(fleet: FakeFleet) -> None:
    """Before the decision 200 with the migration, again and again; past it 409."""
    gate = fleet.b.hold("PrepareDestination")
    migration_id = await fleet.migrate()
    await gate.reached.wait()
    response = await fleet.post(f"/v1/migrations/{migration_id}:cancel", None)
    assert (response.status_code, response.json()["cancel_requested"]) == (200, True)
    gate.opened.set()
    await fleet.ended(migration_id)
    again = await fleet.post(f"/v1/migrations/{migration_id}:cancel", None)
    assert (again.status_code, again.json()["phase"]) == (200, "cancelled")
    moved = await fleet.migrate()
    await fleet.ended(moved)
    response = await fleet.post(f"/v1/migrations/{moved}:cancel", None)
    problem = assert_problem(response, 409, "PAST_COMMIT")
    assert problem["hint"] == "let it finish and move it back"


async def test_two_requests_at_once_admit_one(fleet: FakeFleet) -> None:
    fleet.b.fetching.clear()
    body = {"vm": VM, "destination_node": "b"}
    responses = await asyncio.gather(*(fleet.post("/v1/migrations", body) for _ in range(4)))
    assert sorted(response.status_code for response in responses) == [202, 409, 409, 409]
    winner = next(r.json()["migration_id"] for r in responses if r.status_code == 202)
    for response in responses:
        if response.status_code == 409:
            problem = assert_problem(response, 409, "MIGRATION_ACTIVE")
            assert problem["metadata"]["migration_id"] == winner
    fleet.b.fetching.set()
    await fleet.ended(winner)


@pytest.mark.parametrize(
    ("method", "path", "status", "reason"),
    [
        ("GET", "/v1/vms/ghost", 404, "VM_UNKNOWN"),
        ("DELETE", "/v1/vms/ghost", 404, "VM_UNKNOWN"),
        ("GET", "/v1/vms/ghost/userfault-bitmap", 404, "VM_UNKNOWN"),
        ("GET", "/v1/nodes/zz", 404, "NODE_UNKNOWN"),
        ("GET", "/v1/migrations/none", 404, "MIGRATION_UNKNOWN"),
        ("GET", "/v1/migrations/none/events", 404, "MIGRATION_UNKNOWN"),
        ("POST", "/v1/migrations/none:cancel", 404, "MIGRATION_UNKNOWN"),
        ("GET", "/v1/nothing", 404, "ROUTE_UNKNOWN"),
        ("GET", "/", 404, "ROUTE_UNKNOWN"),
        ("GET", "/v1/migrations/", 404, "ROUTE_UNKNOWN"),
        ("PUT", "/v1/vms", 405, "METHOD_NOT_ALLOWED"),
        ("DELETE", "/v1/migrations", 405, "METHOD_NOT_ALLOWED"),
        ("GET", "/v1/migrations?page_size=-1", 422, "FIELD_INVALID"),
        ("GET", "/v1/migrations?page_size=many", 422, "FIELD_INVALID"),
        ("GET", "/v1/migrations?page_token=%00%ff", 422, "FIELD_INVALID"),
        ("GET", "/v1/migrations?page_token=AAAA", 422, "FIELD_INVALID"),
    ],
)
async def test_every_refusal_is_a_problem(
    fleet: FakeFleet, method: str, path: str, status: int, reason: str
) -> None:
    before = await state_of(fleet)
    response = await fleet.http.request(method, path)
    assert_problem(response, status, reason)
    if status == 405:
        assert response.headers["allow"]
    assert await state_of(fleet) == before


async def test_bug_is_a_problem(fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(**_page: int | str) -> None:
        raise RuntimeError("oops")

    monkeypatch.setattr(fleet.core.fleet, "list_nodes", broken)
    problem = assert_problem(await fleet.http.get("/v1/nodes"), 500, "BUG")
    assert "RuntimeError" in problem["detail"]


# --- idempotency ---


async def test_repeated_request_is_one_migration(fleet: FakeFleet) -> None:
    """Same key, same body: the same answer, also when it is long over; other body: refused."""
    body = {"vm": VM, "destination_node": "b"}
    key = {"Idempotency-Key": "6f1d"}
    first = await fleet.post("/v1/migrations", body, **key)
    assert first.status_code == 202
    migration_id = first.json()["migration_id"]
    assert first.headers["location"] == f"/v1/migrations/{migration_id}"
    again = await fleet.post("/v1/migrations", body, **key)
    assert (again.status_code, again.json()) == (202, first.json())
    assert again.headers["location"] == first.headers["location"]
    await fleet.ended(migration_id)
    late = await fleet.post("/v1/migrations", {**body, "bulk_bytes_per_s_max": 0}, **key)
    assert late.json() == first.json()
    other = await fleet.post("/v1/migrations", {**body, "destination_node": "c"}, **key)
    assert_problem(other, 422, "IDEMPOTENCY_KEY_REUSED")
    assert len((await fleet.get("/v1/migrations"))["migrations"]) == 1


async def test_repeated_request_survives_a_restart(fleet: FakeFleet) -> None:
    body, key = {"vm": VM, "destination_node": "b"}, {"Idempotency-Key": "k"}
    first = await fleet.post("/v1/migrations", body, **key)
    await fleet.restart()
    again = await fleet.post("/v1/migrations", body, **key)
    assert again.json() == first.json()
    await fleet.ended(first.json()["migration_id"])


async def test_same_key_at_once_is_one_migration(fleet: FakeFleet) -> None:
    body, key = {"vm": VM, "destination_node": "b"}, {"Idempotency-Key": "k"}
    responses = await asyncio.gather(*(fleet.post("/v1/migrations", body, **key) for _ in range(4)))
    ids = {response.json().get("migration_id") for response in responses}
    assert {response.status_code for response in responses} == {202}
    assert len(ids) == 1
    await fleet.ended(ids.pop())


async def test_refusal_is_not_remembered(fleet: FakeFleet) -> None:
    """A key that was refused is free: the retry is judged anew."""
    body, key = {"vm": VM, "destination_node": "b"}, {"Idempotency-Key": "k"}
    await fleet.b.kill()
    assert_problem(await fleet.post("/v1/migrations", body, **key), 503, "NODE_UNREACHABLE")
    await fleet.b.start()
    await fleet.reachable("b")
    response = await fleet.post("/v1/migrations", body, **key)
    assert response.status_code == 202
    await fleet.ended(response.json()["migration_id"])


# --- VMs and nodes ---


async def test_life_of_a_vm(fleet: FakeFleet) -> None:
    body, key = {"node": "b", "spec": spec("vm-2")}, {"Idempotency-Key": "k"}
    started = await fleet.post("/v1/vms", body, **key)
    assert started.status_code == 201
    assert started.headers["location"] == "/v1/vms/vm-2"
    vm = started.json()
    assert (vm["node"], vm["epoch"], vm["vmm_state"]) == ("b", 1, "running")
    assert (vm["resident_share"], vm["migration_id"]) == (1.0, None)
    assert (await fleet.post("/v1/vms", body, **key)).json() == vm
    assert_problem(await fleet.post("/v1/vms", body), 409, "VM_EXISTS")
    assert [each["vm_id"] for each in (await fleet.get("/v1/vms"))["vms"]] == [VM, "vm-2"]
    assert (await fleet.get("/v1/nodes/b"))["vm_ids"] == ["vm-2"]
    bitmap = await fleet.get("/v1/vms/vm-2/userfault-bitmap")
    assert (bitmap["page_count"], bitmap["absent_runs"]) == ((64 << 20) // 4096, [])
    gone = await fleet.http.delete("/v1/vms/vm-2")
    assert (gone.status_code, gone.content) == (204, b"")
    assert fleet.world.owners("vm-2") == []
    assert_problem(await fleet.http.get("/v1/vms/vm-2"), 404, "VM_UNKNOWN")


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"memory_bytes": 1}, "memory_bytes"),
        ({"memory_bytes": "much"}, "memory_bytes"),
        ({"vm_id": "Not a name"}, "vm_id"),
        ({"colour": "red"}, "colour"),
        ({"kernel": None}, "kernel"),
    ],
)
async def test_wrong_spec_names_the_field(
    fleet: FakeFleet, change: dict[str, Any], names: str
) -> None:
    before = await state_of(fleet)
    response = await fleet.post("/v1/vms", {"node": "b", "spec": spec("vm-2") | change})
    problem = assert_problem(response, 422, "SPEC_INVALID")
    assert names in problem["detail"]
    assert await state_of(fleet) == before


async def test_refused_start_leaves_no_vm(fleet: FakeFleet) -> None:
    fleet.b.refuse("StartVm", FailedPreconditionError("PREFLIGHT_FAILED", "no kvm", hint="load"))
    response = await fleet.post("/v1/vms", {"node": "b", "spec": spec("vm-2")})
    assert assert_problem(response, 409, "PREFLIGHT_FAILED")["hint"] == "load"
    assert_problem(await fleet.http.get("/v1/vms/vm-2"), 404, "VM_UNKNOWN")
    await fleet.start_vm("vm-2", "b")
    assert (await fleet.get("/v1/vms/vm-2"))["vmm_state"] == "running"


async def test_a_start_that_is_under_way_is_nobody_elses(fleet: FakeFleet) -> None:
    """Who settles what was left undone started it as well: refused to its caller, and it ran."""
    gate = fleet.b.hold("StartVm")
    fleet.b.refuse("StartVm", FailedPreconditionError("PREFLIGHT_FAILED", "not the second one"))
    asked = asyncio.create_task(fleet.post("/v1/vms", {"node": "b", "spec": spec("vm-2")}))
    await gate.reached.wait()
    looks = fleet.core.machines.settled_count

    await eventually(lambda: fleet.core.machines.settled_count >= looks + 2)
    assert fleet.b.calls["StartVm"] == 1
    gate.opened.set()
    assert (await asked).status_code == 201


@pytest.mark.parametrize("lost", ["request", "reply"])
async def test_start_without_an_answer_goes_on(fleet: FakeFleet, lost: str) -> None:
    """The caller hears that the outcome is unknown; the VM is started once, by itself."""
    (fleet.b.drop_request if lost == "request" else fleet.b.drop_reply)("StartVm")
    response = await fleet.post("/v1/vms", {"node": "b", "spec": spec("vm-2")})
    assert response.status_code == 503
    assert response.json()["reason"] == "PEER_UNAVAILABLE"
    await eventually(lambda: fleet.world.owners("vm-2") == ["b"])

    async def movable() -> bool:
        answer = await fleet.post("/v1/migrations", {"vm": "vm-2", "destination_node": "a"})
        return answer.status_code == 202

    await eventually(movable)
    assert [node for vm, node, _epoch in fleet.world.history if vm == "vm-2"] == ["b"]
    migration_id = (await fleet.get("/v1/migrations?vm=vm-2"))["migrations"][0]["migration_id"]
    await fleet.ended(migration_id)


async def test_stop_without_an_answer_goes_on(fleet: FakeFleet) -> None:
    fleet.a.drop_reply("StopVm")
    response = await fleet.http.delete(f"/v1/vms/{VM}")
    assert response.status_code == 503

    async def gone() -> bool:
        return (await fleet.http.get(f"/v1/vms/{VM}")).status_code == 404

    await eventually(gone)
    assert fleet.world.owners(VM) == []


async def test_stop_on_an_unreachable_node_changes_nothing(fleet: FakeFleet) -> None:
    await fleet.a.kill()
    before = await state_of(fleet)
    assert_problem(await fleet.http.delete(f"/v1/vms/{VM}"), 503, "NODE_UNREACHABLE")
    assert await state_of(fleet) == before


async def test_nodes(fleet: FakeFleet) -> None:
    new = await fleet.post("/v1/nodes", {"name": "d", "agent_address": "127.0.0.1:1"})
    assert (new.status_code, new.headers["location"]) == (201, "/v1/nodes/d")
    assert new.json()["reachable"] is False
    assert new.json()["message"]
    known = await fleet.post("/v1/nodes", {"name": "d", "agent_address": str(fleet.b.address)})
    assert known.status_code == 200
    nodes = (await fleet.get("/v1/nodes"))["nodes"]
    assert [node["name"] for node in nodes] == ["a", "b", "c", "d"]
    for name, address in (("Bad name", "h:1"), ("ok", "nowhere"), ("ok", "h:0")):
        response = await fleet.post("/v1/nodes", {"name": name, "agent_address": address})
        assert_problem(response, 422, "FIELD_INVALID")

    async def seen() -> bool:
        node = await fleet.get("/v1/nodes/a")
        return bool(node["reachable"] and node["capabilities"]["drivers"] == ["qemu"])

    await eventually(seen)


# --- lists and events ---


async def test_list_is_paged_newest_first(fleet: FakeFleet) -> None:
    ids = []
    for to in "bab":
        ids.append(await fleet.migrate(to))
        await fleet.ended(ids[-1])
    first = await fleet.get("/v1/migrations?page_size=2")
    rest_of_them = await fleet.get(
        f"/v1/migrations?page_size=2&page_token={first['next_page_token']}"
    )
    found = [row["migration_id"] for row in first["migrations"] + rest_of_them["migrations"]]
    assert found == ids[::-1]
    assert rest_of_them["next_page_token"] == ""
    assert (await fleet.get("/v1/migrations?vm=ghost"))["migrations"] == []


async def test_events_tell_every_change_and_end(listening: FakeFleet) -> None:
    """SSE: phases in order, versions and progress that never fall, the end of the stream."""
    fleet = listening
    fleet.b.pages_per_tick = 2
    migration_id = await fleet.migrate()
    seen: list[Any] = []
    async with httpx_sse.aconnect_sse(
        fleet.http, "GET", f"/v1/migrations/{migration_id}/events"
    ) as source:
        assert source.response.headers["content-type"].startswith("text/event-stream")
        async for event in source.aiter_sse():
            assert event.event == "migration"
            seen.append(json.loads(event.data))
            assert event.id == str(seen[-1]["version"])
    assert seen[-1]["phase"] == "succeeded"
    assert len(seen) > 1
    versions = [each["version"] for each in seen]
    progresses = [each["progress"] for each in seen]
    assert versions == sorted(set(versions))
    assert progresses == sorted(progresses)
    assert seen[-1] == await fleet.migration(migration_id)


async def test_silent_events_are_pinged(
    listening: FakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rest_events, "PING_S", 0.02)
    fleet = listening
    fleet.b.fetching.clear()
    migration_id = await fleet.migrate()
    await fleet.in_phase(migration_id, "postcopy")
    async with fleet.http.stream("GET", f"/v1/migrations/{migration_id}/events") as response:
        async for line in response.aiter_lines():
            if line == ": ping":
                break
    fleet.b.fetching.set()
    await fleet.ended(migration_id)


async def test_events_end_with_the_process(listening: FakeFleet) -> None:
    """A watch does not hold up the stop of an orchestrator."""
    fleet = listening
    fleet.b.fetching.clear()
    migration_id = await fleet.migrate()
    await fleet.in_phase(migration_id, "postcopy")
    async with (
        httpx.AsyncClient(base_url=fleet.http.base_url) as client,
        client.stream("GET", f"/v1/migrations/{migration_id}/events") as response,
    ):
        lines = response.aiter_lines()
        assert (await anext(lines)).startswith("id: ")
        stopping = asyncio.create_task(fleet.stop())
        async for _line in lines:
            pass
        await stopping
    fleet.b.fetching.set()


# --- the process ---


async def test_health_and_metrics(fleet: FakeFleet) -> None:
    assert await fleet.get("/healthz") == {"status": "ok"}
    ready = await fleet.get("/readyz")
    assert (ready["status"], ready["leads"], ready["term"]) == ("ready", True, 1)
    fleet.a.refuse("Pause", FailedPreconditionError("BOOM", "no"))
    await fleet.ended(await fleet.migrate())
    await fleet.ended(await fleet.migrate())
    text = (await fleet.http.get("/metrics")).text
    assert 'godwit_migrations_total{reason="",result="succeeded"} 1.0' in text
    assert 'godwit_migrations_total{reason="BOOM",result="failed"} 1.0' in text
    assert "godwit_migration_pause_seconds_count 1.0" in text
    assert 'godwit_migration_phase_seconds_count{phase="switchover"} 2.0' in text

    async def idle() -> bool:
        metrics = (await fleet.http.get("/metrics")).text
        return "godwit_migrations_active 0.0" in metrics

    await eventually(idle)
    assert 'godwit_node_reachable{node="a"} 1.0' in text


async def test_not_ready_while_draining(fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet.core.runner, "_group", None)
    assert_problem(await fleet.http.get("/readyz"), 503, "NOT_READY")
    response = await fleet.post("/v1/migrations", {"vm": VM, "destination_node": "b"})
    assert_problem(response, 503, "SHUTTING_DOWN")


async def test_openapi_describes_problems(fleet: FakeFleet) -> None:
    """3.1, every route with its problem, no FastAPI default body."""
    document = await fleet.get("/openapi.json")
    assert document["openapi"].startswith("3.1")
    assert "/v1/migrations/{migration_id}:cancel" in document["paths"]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            content = operation["responses"]["default"]["content"]
            assert "application/problem+json" in content, (path, method)
            assert "422" not in operation["responses"], (path, method)


async def test_times_and_words(fleet: FakeFleet) -> None:
    """RFC 3339 with a zone; enums as lower-case words; absent things are null."""
    ended = await fleet.ended(await fleet.migrate())
    for stamp in (ended["created_at"], ended["ended_at"], ended["transitions"][0]["at"]):
        assert stamp.endswith("Z")
    assert ended["decision"] == "committed"
    assert pb.VmmState.Name(pb.VMM_STATE_RUNNING).endswith("RUNNING")
    assert (await fleet.get(f"/v1/vms/{VM}"))["vmm_state"] == "running"
    assert len(ended["migration_id"]) == 26
