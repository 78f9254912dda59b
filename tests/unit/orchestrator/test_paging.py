# SPDX-License-Identifier: Apache-2.0
"""No list without pages: REST by its OpenAPI, gRPC by its protos, and each page after page."""

from __future__ import annotations

import asyncio
import importlib
import pkgutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import godwit.fleet.v1
import grpc.aio
import pytest
from godwit.agent.v1 import fault_agent_service_pb2 as agent_pb2
from godwit.client import Client
from godwit.fleet.v1 import (
    node_service_pb2,
    node_service_pb2_grpc,
    schedule_service_pb2,
    schedule_service_pb2_grpc,
    vm_service_pb2,
    vm_service_pb2_grpc,
)
from google.protobuf.descriptor import FieldDescriptor, FileDescriptor, MethodDescriptor

from services.common import grpc_client
from services.orchestrator import paging
from tests.harness.fake_fleet import VM, FakeFleet, fake_fleet

WHOLE = {
    "GET /v1/nodes/{name}": "vm_ids: as many as a node has VMs",
    "GET /v1/vms/{vm}/residency": "256 points",
    "GET /v1/migrations/{migration_id}": "its phases; of its events 100 are kept",
    "GET /v1/operations/{operation_id}": "1000 of its VMs: /vms has all",
}
"""One thing, whose parts are bounded; why."""


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[FakeFleet]:
    async with fake_fleet(tmp_path, listening=True) as running:
        yield running


def lists_of(schema: Any, schemas: dict[str, Any]) -> list[str]:
    """Properties of an answer that are lists."""
    schema = schemas[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    return [
        name for name, each in schema.get("properties", {}).items() if each.get("type") == "array"
    ]


async def test_no_answer_of_rest_is_a_list_without_pages(fleet: FakeFleet) -> None:
    described = await fleet.get("/openapi.json")
    schemas, paged = described["components"]["schemas"], 0
    for path, methods in described["paths"].items():
        asked = methods.get("get")
        content = asked and asked["responses"]["200"].get("content", {}).get("application/json")
        if not content or f"GET {path}" in WHOLE or not lists_of(content["schema"], schemas):
            continue
        paged += 1
        parameters = {each["name"]: each["schema"] for each in asked["parameters"]}
        assert parameters["page_size"]["maximum"] <= 100_000, path
        assert "page_token" in parameters, path
        name = content["schema"]["$ref"].rpartition("/")[2]
        assert "next_page_token" in schemas[name]["required"], path
    assert paged == 9, "a walk that finds nothing proves nothing"
    assert all(path.removeprefix("GET ") in described["paths"] for path in WHOLE)


def methods() -> list[MethodDescriptor]:
    found: list[MethodDescriptor] = []
    for module in pkgutil.walk_packages(godwit.fleet.v1.__path__, "godwit.fleet.v1."):
        if module.name.endswith("_pb2"):
            file: FileDescriptor = importlib.import_module(module.name).DESCRIPTOR
            for service in file.services_by_name.values():
                found += service.methods
    return found


def test_no_answer_of_grpc_is_a_list_without_pages() -> None:
    paged = 0
    for method in methods():
        listed = [
            field
            for field in method.output_type.fields
            if field.is_repeated and field.type == FieldDescriptor.TYPE_MESSAGE
        ]
        if not listed or method.name == "GetResidency":  # 256 points
            continue
        assert "next_page_token" in method.output_type.fields_by_name, method.full_name
        if method.name.startswith(("List", "Get")):
            paged += 1
            asked = {*method.input_type.fields_by_name}
            assert {"page_size", "page_token"} <= asked, method.full_name
    assert paged == 9, "a walk that finds nothing proves nothing"


async def by_pages(fleet: FakeFleet, path: str, key: str, size: int) -> list[Any]:
    found: list[Any] = []
    token, turns = "", 0
    while True:
        page = await fleet.get(f"{path}?page_size={size}&page_token={token}")
        assert len(page[key]) <= size
        found += page[key]
        token, turns = page["next_page_token"], turns + 1
        if not token:
            assert turns == max(-(-len(found) // size), 1), "no page is empty but an only one"
            return found


async def test_each_list_is_the_same_page_by_page(fleet: FakeFleet) -> None:
    await fleet.core.fleet.scheduling.freeze("a test")
    for number in range(2, 7):
        await fleet.start_vm(f"vm-{number}", "ab"[number % 2])
        answer = await fleet.http.put(f"/v1/policies/p-{number}", json={"retries": number})
        assert answer.status_code == 200
    limits = {f"node-in:{name}": 3 for name in "abc"}
    assert (await fleet.http.patch("/v1/limits", json={"values": limits})).status_code == 200
    begun = await fleet.http.post("/v1/operations:batch", json={"vms": [VM, "vm-2", "vm-3"]})
    operation_id = begun.json()["operation_id"]
    await fleet.until_queued(3)
    for path, key, count in (
        ("/v1/nodes", "nodes", 3),
        ("/v1/vms", "vms", 6),
        ("/v1/policies", "policies", 5),
        ("/v1/limits", "limits", 8),
        ("/v1/queue", "entries", 3),
        ("/v1/migrations", "migrations", 3),
        ("/v1/operations", "operations", 1),
        (f"/v1/operations/{operation_id}/vms", "vms", 3),
    ):
        whole = (await fleet.get(path))[key]
        assert len(whole) == count, path
        names = next(iter(whole[0]))
        for size in (1, 2, count, count + 1):
            found = await by_pages(fleet, path, key, size)
            assert [each[names] for each in found] == [each[names] for each in whole], path
        foreign = await fleet.http.get(f"{path}?page_token=bm9uZS9h")
        assert (foreign.status_code, foreign.json()["reason"]) == (422, "FIELD_INVALID"), path
    assert (await fleet.get("/v1/operations?unfinished=true"))["operations"][0]["vms"] == []
    assert len((await fleet.get("/v1/migrations?unfinished=true"))["migrations"]) == 3
    assert (await fleet.http.get("/v1/operations/none/vms")).status_code == 404


async def test_a_page_begins_after_an_item_that_has_gone(fleet: FakeFleet) -> None:
    for number in range(2, 6):
        await fleet.start_vm(f"vm-{number}")
    page = await fleet.get("/v1/vms?page_size=2")
    assert (await fleet.http.delete("/v1/vms/vm-2")).status_code == 204
    rest = await fleet.get(f"/v1/vms?page_token={page['next_page_token']}")
    assert [each["vm_id"] for each in rest["vms"]] == ["vm-3", "vm-4", "vm-5"]


async def test_grpc_has_the_same_pages(fleet: FakeFleet) -> None:
    await fleet.start_vm("vm-2")
    async with grpc_client.open_channel(str(fleet.grpc)) as channel:
        vms = vm_service_pb2_grpc.VmServiceStub(channel)
        first = await vms.ListVms(vm_service_pb2.ListVmsRequest(page_size=1))
        rest = await vms.ListVms(vm_service_pb2.ListVmsRequest(page_token=first.next_page_token))
        assert [vm.vm_id for vm in [*first.vms, *rest.vms]] == [VM, "vm-2"]
        assert rest.next_page_token == ""
        nodes = node_service_pb2_grpc.NodeServiceStub(channel)
        page = await nodes.ListNodes(node_service_pb2.ListNodesRequest(page_size=2))
        assert [node.name for node in page.nodes] == ["a", "b"]
        assert page.nodes[0].vm_ids == [VM, "vm-2"]
        schedule = schedule_service_pb2_grpc.ScheduleServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await schedule.GetLimits(schedule_service_pb2.GetLimitsRequest(page_size=1001))
        assert grpc_client.to_error(refused.value).reason == "FIELD_INVALID"


async def test_a_bitmap_is_read_by_pages(fleet: FakeFleet) -> None:
    runs = [agent_pb2.PageRun(first_page=2 * n, page_count=1) for n in range(7)]
    delta = agent_pb2.BitmapDelta(whole=True, page_count=20, absent_runs=runs)
    await fleet.core.context.bitmaps.apply(VM, 1, 4096, delta)
    path = f"/v1/vms/{VM}/userfault-bitmap"
    whole = await fleet.get(path)
    assert whole["absent_runs"] == [[2 * n, 1] for n in range(7)]
    for size in (1, 3, 7, 8):
        assert await by_pages(fleet, path, "absent_runs", size) == whole["absent_runs"]
    assert (await fleet.http.get(f"{path}?page_size=100001")).status_code == 422
    assert (await fleet.http.get(f"{path}?page_token=cnVucy9h")).status_code == 422


async def test_the_client_reads_every_page(
    fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However small the server's pages are."""
    for number in range(2, 5):
        await fleet.start_vm(f"vm-{number}")
    monkeypatch.setattr(paging, "PAGE_SIZE_DEFAULT", 1)
    with Client(str(fleet.http.base_url)) as client:
        vms = await asyncio.to_thread(client.vms)
        nodes = await asyncio.to_thread(client.nodes)
    assert [vm.vm_id for vm in vms] == [VM, "vm-2", "vm-3", "vm-4"]
    assert [node.name for node in nodes] == ["a", "b", "c"]
