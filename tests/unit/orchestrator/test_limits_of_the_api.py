# SPDX-License-Identifier: Apache-2.0
"""What one caller can take of an orchestrator, and that others are served meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest
from godwit.fleet.v1 import migration_service_pb2, migration_service_pb2_grpc

from services.common import grpc_client, grpc_server
from services.common.auth import access
from services.common.listen import parse_address
from services.orchestrator.auth import connection, middleware
from tests.harness.fake_fleet import FakeFleet, eventually, fake_fleet

WAIT_S = 30.0


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[FakeFleet]:
    """A fleet whose REST and gRPC are real servers."""
    async with fake_fleet(tmp_path, listening=True) as running:
        yield running


@contextlib.asynccontextmanager
async def raw(fleet: FakeFleet) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to REST on which anything can be said."""
    at = parse_address(fleet.http.base_url.netloc.decode())
    reader, writer = await asyncio.open_connection(at.host, at.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def heard(reader: asyncio.StreamReader) -> bytes:
    """All that is said until it hangs up."""
    async with asyncio.timeout(WAIT_S):
        try:
            return await reader.read()
        except ConnectionError:
            return b""


def assert_problem(response: httpx.Response, status: int, reason: str) -> None:
    assert (response.status_code, response.json()["reason"]) == (status, reason), response.text


async def is_served(fleet: FakeFleet) -> None:
    assert (await fleet.http.get("/v1/vms")).status_code == 200


async def test_a_body_is_bounded(fleet: FakeFleet) -> None:
    """Said to be too long, or found to be: refused, before it is kept."""
    too_long = b" " * (middleware.BODY_BYTES_MAX + 1)

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(17):
            yield b" " * (64 << 10)

    for content in (too_long, pieces()):
        response = await fleet.http.post("/v1/vms", content=content)
        assert_problem(response, 413, "BODY_TOO_LARGE")
    response = await fleet.http.post("/v1/vms", content=too_long[:-1])
    assert response.status_code == 422
    await is_served(fleet)


async def test_a_body_that_drips_is_given_up(
    fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(middleware, "BODY_S_MAX", 0.2)
    async with raw(fleet) as (reader, writer):
        writer.write(b"POST /v1/vms HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        assert b"408 Request Timeout" in await asyncio.wait_for(reader.readline(), WAIT_S)
    await is_served(fleet)


async def test_a_caller_who_hangs_up_in_his_body_costs_nothing(
    fleet: FakeFleet, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(20):
        async with raw(fleet) as (_reader, writer):
            writer.write(b"POST /v1/vms HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
            await writer.drain()
    await is_served(fleet)
    assert "Exception" not in caplog.text


async def test_a_head_is_bounded(fleet: FakeFleet) -> None:
    async with raw(fleet) as (reader, writer):
        writer.write(b"GET /v1/vms HTTP/1.1\r\nHost: x\r\n")
        with contextlib.suppress(OSError):
            for number in range(2 * connection.HEAD_BYTES_MAX // 1024):
                writer.write(b"X-%d: %s\r\n" % (number, b"a" * 1000))
                await writer.drain()
        assert b"200 OK" not in await heard(reader)
    await is_served(fleet)


async def test_a_head_that_drips_is_given_up(
    fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a new connection, and on one that has asked before."""
    monkeypatch.setattr(connection, "HEAD_S_MAX", 0.2)
    async with raw(fleet) as (reader, writer):
        writer.write(b"GET /v1/vms HTTP/1.1\r\nHo")
        assert await heard(reader) == b""
    async with raw(fleet) as (reader, writer):
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /healthz HT")
        assert (await heard(reader)).count(b"200 OK") == 1
    await is_served(fleet)


async def test_connections_are_bounded(fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "CONNECTION_COUNT_MAX", 10)
    async with contextlib.AsyncExitStack() as stack:
        readers = [(await stack.enter_async_context(raw(fleet)))[0] for _ in range(20)]
        hung_up: list[bool] = []
        for reader in readers:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    hung_up.append(await reader.read() == b"")
            if hung_up:
                break
        assert hung_up, "more than it takes, and nobody was refused"
    await eventually(lambda: _served_now(fleet))


async def _served_now(fleet: FakeFleet) -> bool:
    try:
        return (await fleet.http.get("/v1/vms")).status_code == 200
    except httpx.HTTPError:
        return False


async def test_requests_under_way_are_bounded(
    fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    going_on, held = asyncio.Event(), asyncio.Event()

    async def slow(**_page: Any) -> tuple[list[Any], str]:
        held.set()
        await going_on.wait()
        return [], ""

    monkeypatch.setattr(middleware, "REQUEST_COUNT_MAX", 1)
    monkeypatch.setattr(fleet.core.fleet, "list_nodes", slow)
    async with asyncio.TaskGroup() as group:
        first = group.create_task(fleet.http.get("/v1/nodes"))
        await held.wait()
        refused = await fleet.http.get("/v1/vms")
        assert_problem(refused, 429, "TOO_MANY_REQUESTS")
        assert refused.headers["retry-after"]
        going_on.set()
        assert (await first).status_code == 200
    await is_served(fleet)


async def test_watchers_are_bounded(fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over both faces together; one who ends leaves his place to the next."""
    monkeypatch.setattr(access, "WATCHER_COUNT_MAX", 2)
    fleet.b.fetching.clear()
    migration_id = await fleet.migrate()
    path = f"/v1/migrations/{migration_id}/events"
    request = migration_service_pb2.WatchMigrationRequest(migration_id=migration_id)
    async with grpc_client.open_channel(str(fleet.grpc)) as channel:
        stub = migration_service_pb2_grpc.MigrationServiceStub(channel)
        watch = stub.WatchMigration(request)
        await watch.read()
        async with fleet.http.stream("GET", path) as stream:
            assert stream.status_code == 200
            refused = await fleet.http.get(path)
            assert_problem(refused, 429, "TOO_MANY_WATCHERS")
            assert refused.headers["retry-after"]
            with pytest.raises(grpc.aio.AioRpcError) as too_many:
                await stub.WatchMigration(request).read()
            assert too_many.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert grpc_client.to_error(too_many.value).reason == "TOO_MANY_WATCHERS"
            await is_served(fleet)
        watch.cancel()

        async def there_is_room() -> bool:
            async with fleet.http.stream("GET", path) as next_one:
                return next_one.status_code == 200

        await eventually(there_is_room)
    fleet.b.fetching.set()
    await fleet.ended(migration_id)


async def test_messages_and_metadata_of_grpc_are_bounded(fleet: FakeFleet) -> None:
    options = [("grpc.max_send_message_length", -1), ("grpc.max_metadata_size", 1 << 20)]
    async with grpc.aio.insecure_channel(str(fleet.grpc), options=options) as channel:
        stub = migration_service_pb2_grpc.MigrationServiceStub(channel)
        huge = "x" * (grpc_server.MESSAGE_MAX_BYTES + 1)
        for request, metadata in (
            (migration_service_pb2.GetMigrationRequest(migration_id=huge), ()),
            (
                migration_service_pb2.GetMigrationRequest(migration_id="x"),
                tuple((f"x-{n}", "y" * 1000) for n in range(100)),
            ),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.GetMigration(request, metadata=metadata, timeout=WAIT_S)
            assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    await is_served(fleet)
