# SPDX-License-Identifier: Apache-2.0
"""Watching over real connections: REST and gRPC tell the same, and who does not read is let go."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import httpx_sse
import pytest
from godwit.fleet.v1 import (
    event_service_pb2,
    event_service_pb2_grpc,
    operation_service_pb2,
    operation_service_pb2_grpc,
)

from services.common import grpc_client
from services.common.listen import parse_address
from services.orchestrator import rest_events
from services.orchestrator.rest_events import EventsReset
from tests.harness.fake_fleet import VM, FakeFleet, eventually, fake_fleet

WAIT_S = 30.0


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[FakeFleet]:
    async with fake_fleet(tmp_path, listening=True) as running:
        yield running


Stream = AsyncGenerator[httpx_sse.ServerSentEvent, None]


@contextlib.asynccontextmanager
async def watching(fleet: FakeFleet, path: str, after: str = "") -> AsyncIterator[Stream]:
    """The events of a path."""
    headers = {"Last-Event-ID": after} if after else {}
    async with (
        httpx_sse.aconnect_sse(fleet.http, "GET", path, headers=headers) as source,
        aclosing(source.aiter_sse()) as events,
    ):
        assert source.response.headers["content-type"].startswith("text/event-stream")
        yield events


async def until(
    events: Stream, name: str, holds: Any = lambda _data: True
) -> list[httpx_sse.ServerSentEvent]:
    """Every event up to the first `name` whose data it holds of."""
    seen = []
    async with asyncio.timeout(WAIT_S):
        async for event in events:
            seen.append(event)
            if event.event == name and holds(json.loads(event.data)):
                return seen
    raise AssertionError(f"it ended without such a {name}: {[each.event for each in seen]}")


async def read(watch: Any) -> Any:
    """The next message."""
    async with asyncio.timeout(WAIT_S):
        return await watch.read()


def ended(data: Any) -> bool:
    return bool(data["phase"] == "succeeded")


async def test_the_fleet_is_told_and_who_comes_back_misses_nothing(fleet: FakeFleet) -> None:
    async with watching(fleet, "/v1/events") as source:
        await until(source, "began")
        migration_id = await fleet.migrate()
        seen = await until(source, "migration", ended)
    first = seen[0]
    assert json.loads(first.data)["migration_id"] == migration_id
    versions = [json.loads(each.data)["version"] for each in seen if each.event == "migration"]
    assert versions == sorted(set(versions))
    async with watching(fleet, "/v1/events", first.id) as source:
        again = await until(source, "migration", ended)
    assert again[0].event == "began"
    assert [(each.id, each.data) for each in again[1:]] == [
        (each.id, each.data) for each in seen[1:]
    ]
    assert json.loads(again[-1].data) == await fleet.migration(migration_id)


async def test_an_id_that_is_too_old_is_a_reset_that_says_what_to_do(fleet: FakeFleet) -> None:
    async with watching(fleet, "/v1/events", "01k0-7") as source:
        [reset] = await until(source, "reset")
        assert EventsReset.model_validate_json(reset.data).reason == "EVENTS_GONE"
        assert "list again" in reset.data
        await fleet.core.nodes.put("d", "127.0.0.1:1", ask=False)
        [told] = await until(source, "node")
        assert json.loads(told.data)["name"] == "d"


async def test_only_what_is_wanted_is_told(fleet: FakeFleet) -> None:
    async with watching(fleet, "/v1/events?kind=operation&kind=node") as source:
        await until(source, "began")
        body = {"dry_run": False}
        begun = await fleet.http.post("/v1/nodes/a:drain", json=body)
        assert begun.status_code == 202
        seen = await until(source, "operation", lambda data: data["state"] == "succeeded")
    assert {each.event for each in seen} == {"operation", "node"}
    nodes = [json.loads(each.data) for each in seen if each.event == "node"]
    assert nodes[0]["closed_by"] == begun.json()["operation_id"]
    assert (await fleet.http.get("/v1/events?kind=weather")).status_code == 422


async def test_an_operation_is_watched_to_its_end_by_both(fleet: FakeFleet) -> None:
    fleet.b.fetching.clear()
    fleet.agents["c"].fetching.clear()
    begun = await fleet.http.post("/v1/nodes/a:drain", json={})
    operation_id = begun.json()["operation_id"]
    request = operation_service_pb2.WatchOperationRequest(operation_id=operation_id)
    async with (
        grpc_client.open_channel(str(fleet.grpc)) as channel,
        watching(fleet, f"/v1/operations/{operation_id}/events") as source,
    ):
        stub = operation_service_pb2_grpc.OperationServiceStub(channel)
        watch = stub.WatchOperation(request)
        told = [await read(watch)]
        assert told[0].operation.operation_id == operation_id
        fleet.b.fetching.set()
        fleet.agents["c"].fetching.set()
        seen = await until(source, "operation", lambda data: data["state"] == "succeeded")
        while (each := await watch.read()) is not grpc.aio.EOF:
            told.append(each)
    last = told[-1].operation
    assert last.state == operation_service_pb2.OPERATION_STATE_SUCCEEDED
    assert seen[-1].id == str(last.version)
    whole = await fleet.get(f"/v1/operations/{operation_id}")
    assert json.loads(seen[-1].data) == whole | {"vms": []}
    path = "/v1/operations/none/events"
    assert (await fleet.http.get(path)).json()["reason"] == "OPERATION_UNKNOWN"


async def test_grpc_tells_the_same(fleet: FakeFleet) -> None:
    async with grpc_client.open_channel(str(fleet.grpc)) as channel:
        stub = event_service_pb2_grpc.EventServiceStub(channel)
        watch = stub.WatchEvents(event_service_pb2.WatchEventsRequest())
        began = await read(watch)
        assert began.WhichOneof("event") == "began"
        migration_id = await fleet.migrate()
        await fleet.ended(migration_id)
        async with asyncio.timeout(WAIT_S):
            seen = [await read(watch)]
            while not seen[-1].migration.HasField("ended_at"):
                seen.append(await read(watch))
        assert {each.migration.migration_id for each in seen} == {migration_id}
        request = event_service_pb2.WatchEventsRequest(after=seen[0].event_id)
        again = stub.WatchEvents(request)
        assert (await read(again)).WhichOneof("event") == "began"
        assert [await read(again) for _ in seen[1:]] == seen[1:]
        gone = stub.WatchEvents(event_service_pb2.WatchEventsRequest(after="x"))
        assert (await read(gone)).reset.reason == "EVENTS_GONE"
        wrong = stub.WatchEvents(event_service_pb2.WatchEventsRequest(kinds=[0]))  # type: ignore[list-item]
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await wrong.read()
        assert grpc_client.to_error(refused.value).reason == "FIELD_INVALID"


async def test_a_watcher_who_does_not_read_is_hung_up_on(
    fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """He holds no place, and the memory of what he did not take."""
    monkeypatch.setattr(rest_events, "SEND_S_MAX", 0.1)
    monkeypatch.setattr(rest_events, "PING_S", 0.01)
    monkeypatch.setattr(rest_events, "_frame", lambda _told: b": " + b"x" * (4 << 20) + b"\n\n")
    at = parse_address(fleet.http.base_url.netloc.decode())
    with socket.socket() as deaf:
        deaf.connect((at.host, at.port))
        deaf.sendall(b"GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n")
        await eventually(lambda: fleet.core.events.count == 1)
        await eventually(lambda: fleet.core.events.count == 0)
        assert not _read_all(deaf).endswith(b"0\r\n\r\n"), "hung up on, not told that it is over"


def _read_all(deaf: socket.socket) -> bytes:
    last = b""
    with contextlib.suppress(ConnectionError):
        while data := deaf.recv(1 << 20):
            last = (last + data)[-5:]
    return last


async def test_a_watcher_who_leaves_leaves_nothing(fleet: FakeFleet) -> None:
    for _ in range(3):
        async with fleet.http.stream("GET", "/v1/events") as response:
            assert (await anext(response.aiter_lines())).startswith("id: ")
            assert fleet.core.events.count >= 1
    await eventually(lambda: fleet.core.events.count == 0)
    async with httpx.AsyncClient(base_url=fleet.http.base_url) as client:
        assert (await client.get(f"/v1/vms/{VM}")).status_code == 200
