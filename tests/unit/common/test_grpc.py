# SPDX-License-Identifier: Apache-2.0
"""An error crosses a connection whole, and the caller can tell what it says about the work."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import grpc
import grpc.aio
import pytest
from godwit.agent.v1 import fault_agent_service_pb2 as agent
from godwit.page.v1 import image_admin_service_pb2 as admin
from godwit.page.v1 import image_admin_service_pb2_grpc as admin_grpc
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from services.common import errors, grpc_client, grpc_server, grpc_status, telemetry
from services.common.listen import Address

LOOPBACK = Address(host="127.0.0.1", port=0)
SHAPES = "test.v1.ShapesService"
ADMIN = "godwit.page.v1.ImageAdminService"

_Unary: TypeAlias = "grpc.aio.UnaryUnaryMultiCallable[agent.DescribeRequest, agent.DescribeRequest]"
_Out: TypeAlias = "grpc.aio.UnaryStreamMultiCallable[agent.DescribeRequest, agent.DescribeRequest]"
_Into: TypeAlias = "grpc.aio.StreamUnaryMultiCallable[agent.DescribeRequest, agent.DescribeRequest]"
_Both: TypeAlias = (
    "grpc.aio.StreamStreamMultiCallable[agent.DescribeRequest, agent.DescribeRequest]"
)


class Shapes:
    """One method of each shape; each raises `error` if there is one."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.answer_count = 0
        self.traceparent = ""
        self.entered = asyncio.Event()
        self.closed = asyncio.Event()

    def _fail(self) -> None:
        if self.error is not None:
            raise self.error

    async def unary(
        self, request: agent.DescribeRequest, context: grpc_server.Context
    ) -> agent.DescribeRequest:
        self.entered.set()
        self.traceparent = telemetry.current_traceparent()
        if request.vm_id == "hang":
            await asyncio.Event().wait()
        self._fail()
        return agent.DescribeRequest(vm_id=request.vm_id + "!")

    async def out(
        self, request: agent.DescribeRequest, context: grpc_server.Context
    ) -> AsyncIterator[agent.DescribeRequest]:
        try:
            for number in range(self.answer_count):
                yield agent.DescribeRequest(vm_id=str(number))
            self._fail()
            if request.vm_id == "hang":
                await asyncio.Event().wait()
        finally:
            self.closed.set()

    async def into(
        self, requests: AsyncIterator[agent.DescribeRequest], context: grpc_server.Context
    ) -> agent.DescribeRequest:
        names = [request.vm_id async for request in requests]
        self._fail()
        return agent.DescribeRequest(vm_id="+".join(names))

    async def both(
        self, requests: AsyncIterator[agent.DescribeRequest], context: grpc_server.Context
    ) -> AsyncIterator[agent.DescribeRequest]:
        async for request in requests:
            yield request
        self._fail()

    def add(self, server: grpc.aio.Server) -> None:
        codec: dict[str, Any] = {
            "request_deserializer": agent.DescribeRequest.FromString,
            "response_serializer": agent.DescribeRequest.SerializeToString,
        }
        handlers: dict[str, Any] = {
            "Unary": grpc.unary_unary_rpc_method_handler(self.unary, **codec),
            "Out": grpc.unary_stream_rpc_method_handler(self.out, **codec),
            "Into": grpc.stream_unary_rpc_method_handler(self.into, **codec),
            "Both": grpc.stream_stream_rpc_method_handler(self.both, **codec),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SHAPES, handlers),))


class Stub:
    """The client half of Shapes."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        codec: dict[str, Any] = {
            "request_serializer": agent.DescribeRequest.SerializeToString,
            "response_deserializer": agent.DescribeRequest.FromString,
        }
        self.channel = channel
        self.unary: _Unary = channel.unary_unary(f"/{SHAPES}/Unary", **codec)
        self.out: _Out = channel.unary_stream(f"/{SHAPES}/Out", **codec)
        self.into: _Into = channel.stream_unary(f"/{SHAPES}/Into", **codec)
        self.both: _Both = channel.stream_stream(f"/{SHAPES}/Both", **codec)
        self.missing: _Unary = channel.unary_unary(f"/{SHAPES}/Missing", **codec)


@contextlib.asynccontextmanager
async def shapes_pair() -> AsyncIterator[tuple[Shapes, Stub, grpc_server.Running]]:
    shapes = Shapes()
    service = grpc_server.Service(name=SHAPES, add=shapes.add)
    async with (
        grpc_server.serving(LOOPBACK, [service], stop_grace_s=0.2) as running,
        grpc_client.open_channel(str(running.address)) as channel,
    ):
        yield shapes, Stub(channel), running


KNOWN = errors.FailedPreconditionError(
    "STALE_EPOCH", "epoch 3 is below 7", hint="ask the store", metadata={"vm": "db-1", "seen": "7"}
)


async def raised_by(stub: Stub, shape: str) -> errors.GodwitError:
    request = agent.DescribeRequest(vm_id="a")

    async def requests() -> AsyncIterator[agent.DescribeRequest]:
        yield request

    async def drive() -> None:
        if shape == "unary":
            await grpc_client.call(stub.channel, stub.unary, request, timeout_s=10)
        elif shape == "into":
            await grpc_client.call(stub.channel, stub.into, requests(), timeout_s=10)
        else:
            async for _answer in grpc_client.stream(stub.channel, stub.out, request):
                pass

    with pytest.raises(errors.GodwitError) as caught:
        await drive()
    return caught.value


@pytest.mark.parametrize("shape", ["unary", "out", "into"])
@pytest.mark.parametrize(
    "error",
    [
        KNOWN,
        errors.NotFoundError("VM_UNKNOWN", "no vm"),
        errors.UnavailableError("VMM_UNREACHABLE", "qmp is gone", hint="try again"),
        errors.DataLossError("STATE_CORRUPT", "hash differs: ü≠u"),
        errors.InvalidArgumentError("FIELD_INVALID", "x" * 20_000, hint="y" * 20_000),
    ],
    ids=lambda error: error.reason,
)
async def test_error_crosses_whole(shape: str, error: errors.GodwitError) -> None:
    """Class, reason, message, hint and metadata arrive; what is too long arrives shortened."""
    async with shapes_pair() as (shapes, stub, _):
        shapes.error = error
        got = await raised_by(stub, shape)
    assert type(got) is type(error)
    assert (got.reason, got.metadata) == (error.reason, error.metadata)
    assert got.message == error.message or got.message[:-1] == error.message[: len(got.message) - 1]
    assert got.hint == error.hint or got.hint[:-1] == error.hint[: len(got.hint) - 1]
    assert not grpc_client.outcome_unknown(got), "the peer answered"


async def test_stream_stream_error_carries_details() -> None:
    async with shapes_pair() as (shapes, stub, _):
        shapes.error = KNOWN
        call = stub.both()
        await call.write(agent.DescribeRequest(vm_id="a"))
        await call.done_writing()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _answer in call:
                pass
        got = grpc_client.to_error(caught.value)
    assert (got.reason, got.hint) == (KNOWN.reason, KNOWN.hint)


async def test_wire_form_is_google_rpc_status() -> None:
    """What a foreign client sees: the standard details, RetryInfo where a retry may help."""
    async with shapes_pair() as (shapes, stub, _):
        shapes.error = errors.UnavailableError("VMM_UNREACHABLE", "gone", hint="wait")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.unary(agent.DescribeRequest())
    trailers = dict(caught.value.trailing_metadata() or ())
    status = status_pb2.Status.FromString(trailers[grpc_status.DETAILS_KEY])
    assert status.code == grpc.StatusCode.UNAVAILABLE.value[0]
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(info)
    assert status.details[1].Unpack(retry)
    assert (info.reason, info.domain) == ("VMM_UNREACHABLE", "godwit.io")
    assert dict(info.metadata) == {"hint": "wait"}
    assert retry.retry_delay.seconds == grpc_status.RETRY_DELAY_S


@pytest.mark.parametrize("shape", ["unary", "out", "into"])
async def test_unexpected_exception_is_a_logged_bug(
    shape: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with shapes_pair() as (shapes, stub, _):
        shapes.error = KeyError("oops")
        with caplog.at_level(logging.ERROR):
            got = await raised_by(stub, shape)
    assert isinstance(got, errors.InternalError)
    assert got.reason == "BUG"
    assert grpc_client.outcome_unknown(got), "it may have done half of it"
    assert any(record.exc_info for record in caplog.records)


async def test_answers_before_an_error_arrive() -> None:
    async with shapes_pair() as (shapes, stub, _):
        shapes.error, shapes.answer_count = KNOWN, 3
        async with contextlib.aclosing(
            grpc_client.stream(stub.channel, stub.out, agent.DescribeRequest())
        ) as answers:
            assert [(await anext(answers)).vm_id for _ in range(3)] == ["0", "1", "2"]
            with pytest.raises(errors.FailedPreconditionError):
                await anext(answers)


async def test_closing_a_stream_ends_the_handler() -> None:
    async with shapes_pair() as (shapes, stub, _):
        shapes.answer_count = 1
        request = agent.DescribeRequest(vm_id="hang")
        async with contextlib.aclosing(
            grpc_client.stream(stub.channel, stub.out, request)
        ) as answers:
            await anext(answers)
        await shapes.closed.wait()


async def test_calls_beyond_a_connections_limit_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is refused: who has a place gives it to the next."""
    options = dict(grpc_server.OPTIONS) | {"grpc.max_concurrent_streams": 1}
    monkeypatch.setattr(grpc_server, "OPTIONS", tuple(options.items()))
    async with shapes_pair() as (shapes, stub, _):
        shapes.answer_count = 1
        first = stub.out(agent.DescribeRequest(vm_id="hang"))
        await first.read()
        second = asyncio.ensure_future(stub.unary(agent.DescribeRequest(vm_id="x"), timeout=30))
        # Its deadline, and no other, says that it waits: it cannot be heard before there is room.
        assert not shapes.entered.is_set()
        first.cancel()
        assert (await second).vm_id == "x!"


async def test_nobody_there_is_not_executed() -> None:
    # A port that was free a moment ago: bound once, so that nobody else is given it meanwhile.
    async with shapes_pair() as (_, _stub, running):
        address = running.address
    async with grpc_client.open_channel(str(address)) as channel:
        with pytest.raises(grpc_client.NotExecutedError) as caught:
            await grpc_client.call(
                channel, Stub(channel).unary, agent.DescribeRequest(), timeout_s=0.2, peer="node b"
            )
    assert not grpc_client.outcome_unknown(caught.value)
    assert "node b" in caught.value.message


async def test_deadline_says_nothing_about_the_outcome() -> None:
    async with shapes_pair() as (shapes, stub, _):
        with pytest.raises(errors.DeadlineExceededError) as caught:
            await grpc_client.call(
                stub.channel, stub.unary, agent.DescribeRequest(vm_id="hang"), timeout_s=0.3
            )
        assert shapes.entered.is_set()
    assert grpc_client.outcome_unknown(caught.value)


async def test_connection_lost_says_nothing_about_the_outcome() -> None:
    """The handler ran, and the server went away before it answered."""
    shapes = Shapes()
    service = grpc_server.Service(name=SHAPES, add=shapes.add)
    async with contextlib.AsyncExitStack() as clients, asyncio.TaskGroup() as group:
        async with grpc_server.serving(LOOPBACK, [service], stop_grace_s=0) as running:
            channel = await clients.enter_async_context(
                grpc_client.open_channel(str(running.address))
            )

            async def lose() -> errors.GodwitError:
                request = agent.DescribeRequest(vm_id="hang")
                with pytest.raises(errors.UnavailableError) as caught:
                    await grpc_client.call(channel, Stub(channel).unary, request, timeout_s=60)
                return caught.value

            hanging = group.create_task(lose())
            await shapes.entered.wait()
        error = await hanging
    assert grpc_client.outcome_unknown(error)


async def test_unknown_method_is_a_definite_answer() -> None:
    async with shapes_pair() as (_, stub, _running):
        with pytest.raises(errors.FailedPreconditionError) as caught:
            await grpc_client.call(
                stub.channel, stub.missing, agent.DescribeRequest(), timeout_s=10
            )
    assert caught.value.reason == "PEER_UNIMPLEMENTED"
    assert not grpc_client.outcome_unknown(caught.value)


def test_forwarded_reason_is_not_taken_for_ours() -> None:
    """A peer that could not reach somebody else says PEER_UNREACHABLE too; it did run our call."""
    status = grpc_status.to_status(grpc_client.NotExecutedError("PEER_UNREACHABLE", "no way"))
    got = grpc_status.from_status(grpc.StatusCode.UNAVAILABLE, "no way", status.SerializeToString())
    assert type(got) is errors.UnavailableError


def test_foreign_details_are_not_ours() -> None:
    status = status_pb2.Status(code=5, message="m")
    info = error_details_pb2.ErrorInfo(reason="IMAGE_UNKNOWN", domain="example.com")
    status.details.add().Pack(info)
    got = grpc_status.from_status(grpc.StatusCode.NOT_FOUND, "m", status.SerializeToString())
    assert (type(got), got.reason) == (errors.NotFoundError, "PEER_NOT_FOUND")


@pytest.mark.parametrize("code", list(grpc.StatusCode), ids=lambda code: code.name)
def test_every_status_maps_to_an_error(code: grpc.StatusCode) -> None:
    got = grpc_status.from_status(code, "", None)
    assert got.reason == f"PEER_{code.name}"
    assert got.message


async def test_health_per_service_and_reflection() -> None:
    async with shapes_pair() as (_, stub, running):
        health: Any = health_pb2_grpc.HealthStub(stub.channel)

        async def status_of(service: str) -> int:
            answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
            return int(answer.status)

        serving = health_pb2.HealthCheckResponse.SERVING
        not_serving = health_pb2.HealthCheckResponse.NOT_SERVING
        assert [await status_of(name) for name in ("", SHAPES)] == [serving, serving]
        await running.health.set_serving(False, SHAPES)
        assert [await status_of(name) for name in ("", SHAPES)] == [serving, not_serving]

        watch = health.Watch(health_pb2.HealthCheckRequest(service=""))
        assert (await watch.read()).status == serving
        await running.health.drain()
        assert (await watch.read()).status == not_serving
        await running.health.set_serving(True)
        assert await status_of("") == not_serving, "a drain is for good"
        watch.cancel()


async def test_reflection_lists_services() -> None:
    class Admin(admin_grpc.ImageAdminServiceServicer):
        async def ReloadImages(  # noqa: N802
            self,
            request: admin.ReloadImagesRequest,
            context: grpc_server.Context,
        ) -> admin.ReloadImagesResponse:
            return admin.ReloadImagesResponse(page_address="here")

    service = grpc_server.Service(
        name=ADMIN,
        add=lambda server: admin_grpc.add_ImageAdminServiceServicer_to_server(Admin(), server),
    )
    async with (
        grpc_server.serving(LOOPBACK, [service]) as running,
        grpc_client.open_channel(str(running.address)) as channel,
    ):
        channel_any: Any = channel  # the stubs know the synchronous API only
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel_any)
        call = stub.ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        answer = await call.read()
        await call.done_writing()
        names = {item.name for item in answer.list_services_response.service}
        assert {ADMIN, "grpc.health.v1.Health"} <= names
        stub_admin = admin_grpc.ImageAdminServiceStub(channel)
        response = await grpc_client.call(
            channel, stub_admin.ReloadImages, admin.ReloadImagesRequest(), timeout_s=10
        )
    assert response.page_address == "here"


async def test_taken_port_says_so() -> None:
    async with shapes_pair() as (_, _stub, running):
        with pytest.raises(errors.UnavailableError) as caught:
            async with grpc_server.serving(running.address, []):
                pass
    assert caught.value.reason == "LISTEN_FAILED"
    assert str(running.address) in caught.value.message


class Beaten:
    """A bare server: one call that waits for `enough` heartbeats; Check as a stock server's."""

    def __init__(self, *, has_health: bool = True) -> None:
        self.beats = 0
        self.enough = asyncio.Event()
        self.has_health = has_health

    async def check(self, _request: object, context: grpc_server.Context) -> object:
        self.beats += 1
        if self.beats >= 3:
            self.enough.set()
        if not self.has_health:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "no such service")
        return health_pb2.HealthCheckResponse()

    async def unary(self, request: agent.DescribeRequest, _context: object) -> object:
        await self.enough.wait()
        return request

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[Stub]:
        server = grpc.aio.server()
        check = grpc.unary_unary_rpc_method_handler(
            self.check,
            request_deserializer=health_pb2.HealthCheckRequest.FromString,
            response_serializer=health_pb2.HealthCheckResponse.SerializeToString,
        )
        unary = grpc.unary_unary_rpc_method_handler(
            self.unary,
            request_deserializer=agent.DescribeRequest.FromString,
            response_serializer=agent.DescribeRequest.SerializeToString,
        )
        server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": check}),
                grpc.method_handlers_generic_handler(SHAPES, {"Unary": unary}),
            )
        )
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc_client.open_channel(f"127.0.0.1:{port}") as channel:
                yield Stub(channel)
        finally:
            await server.stop(None)


@pytest.mark.parametrize("has_health", [True, False])
async def test_a_call_that_lasts_carries_heartbeats(
    monkeypatch: pytest.MonkeyPatch, has_health: bool
) -> None:
    """Bytes on their way, so that a peer behind a cut is noticed; refused, they serve as well."""
    monkeypatch.setattr(grpc_client, "HEARTBEAT_S", 0.02)
    beaten = Beaten(has_health=has_health)
    async with beaten.serving() as stub:
        request = agent.DescribeRequest(vm_id="a")
        answer = await grpc_client.call(stub.channel, stub.unary, request, timeout_s=30)
        await grpc_client.beat(stub.channel, timeout_s=30)
    assert answer == request
    assert beaten.beats >= 3


async def test_a_cancelled_call_is_cancelled_at_the_peer_too() -> None:
    async with shapes_pair() as (shapes, stub, _):
        request = agent.DescribeRequest(vm_id="hang")
        calling = asyncio.ensure_future(
            grpc_client.call(stub.channel, stub.unary, request, timeout_s=30)
        )
        await shapes.entered.wait()
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling


async def test_a_beat_needs_somebody() -> None:
    async with grpc_client.open_channel("127.0.0.1:1") as channel:
        with pytest.raises(grpc_client.NotExecutedError):
            await grpc_client.beat(channel, timeout_s=0.3)


async def test_a_stream_that_falls_silent_is_given_up() -> None:
    """As unanswered: whoever reads it asks for evidence and begins again."""
    async with shapes_pair() as (shapes, stub, _):
        shapes.answer_count = 2
        request, got = agent.DescribeRequest(vm_id="hang"), []
        answers = grpc_client.stream(
            stub.channel, stub.out, request, silence_s_max=1.0, peer="node b"
        )

        async def read() -> None:
            async for answer in answers:
                got.append(answer.vm_id)  # noqa: PERF401 - what came before the silence counts

        with pytest.raises(errors.UnavailableError) as caught:
            await read()
        assert got == ["0", "1"]
        assert caught.value.reason == "PEER_SILENT"
        assert grpc_client.outcome_unknown(caught.value)
        await asyncio.wait_for(shapes.closed.wait(), 30)


def test_our_pings_are_tolerated_by_our_servers() -> None:
    """Else the server hangs up with too_many_pings in the middle of a progress stream."""
    client, server = dict(grpc_client.OPTIONS), dict(grpc_server.OPTIONS)
    tolerated_ms = server["grpc.http2.min_recv_ping_interval_without_data_ms"]
    assert client["grpc.keepalive_time_ms"] >= 2 * tolerated_ms
    assert server["grpc.http2.max_ping_strikes"] == 0
