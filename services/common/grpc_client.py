# SPDX-License-Identifier: Apache-2.0
"""Calls to other Godwit services.

A failed call is one of three things, and past a decision only their difference keeps a guest
single (I8, "on doubt ask"):
  - NotExecutedError: nothing left this process, the peer has not done it;
  - an answer of the peer: a GodwitError with the peer's own reason;
  - no answer: `outcome_unknown(error)` is True; ask the peer for evidence.
gRPC retries by itself only what the peer's HTTP/2 layer said it never saw (REFUSED_STREAM, GOAWAY).

A peer that the network has swallowed is noticed within 3 s, and found again within about 1 s of its
return. Noticed: bytes that nobody acknowledges for UNACKNOWLEDGED_MS end a connection (that is how
gRPC sets TCP_USER_TIMEOUT: by keepalive_timeout_ms), and while a call is under way there are such
bytes: a heartbeat each second, a Check of the health service. HTTP/2 PINGs as often would do it,
and make a stock server hang up: it takes more than one in five minutes without data for abuse
(ENHANCE_YOUR_CALM, too_many_pings). Ours are 20 s apart, and our servers are told to bear that
(grpc_server.OPTIONS). What is judged is the network, not the process: one that answers late on a
busy host is not dead, and a new connection to it would not help.
Found: an attempt to connect is given up after a second at most, and made again, so that nobody
waits for TCP's own repetitions of a lost SYN after 1, 3, 7 s.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable
from typing import TypeAlias, TypeVar

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2

from services.common import grpc_status, telemetry
from services.common.errors import (
    DeadlineExceededError,
    GodwitError,
    InternalError,
    UnavailableError,
)
from services.common.grpc_server import MESSAGE_MAX_BYTES, METADATA_MAX_BYTES
from services.common.health import SERVICE_NAME
from services.common.peer_tls import PeerTls

CONNECT_S = 5.0
HEARTBEAT_S = 1.0
UNACKNOWLEDGED_MS = 2_500

OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MESSAGE_MAX_BYTES),
    ("grpc.max_send_message_length", MESSAGE_MAX_BYTES),
    ("grpc.max_metadata_size", METADATA_MAX_BYTES),
    # For a silent stream without heartbeats. Only while a call is open, and far above the 5 s that
    # grpc_server.OPTIONS tolerate.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", UNACKNOWLEDGED_MS),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.max_pings_without_data", 0),
    # A peer that was restarted is found again at once, not after the default of up to two minutes.
    # The smallest is also how long the first attempt may take; it grows to the largest.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Nodes of a test share addresses with what ran there before; a channel is its own.
    ("grpc.use_local_subchannel_pool", 1),
    # A proxy from the environment is for the way out, never for the fleet.
    ("grpc.enable_http_proxy", 0),
)

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")

_Beat: TypeAlias = (
    "grpc.aio.UnaryUnaryCall[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse]"
)

_UNANSWERED = frozenset(
    {"PEER_UNAVAILABLE", "PEER_CANCELLED", "PEER_DEADLINE_EXCEEDED", "PEER_SILENT"}
)


class NotExecutedError(UnavailableError):
    """No connection to the peer: nothing was sent. Raised here only, never by a peer's word."""


def open_channel(address: str, tls: PeerTls | None = None) -> grpc.aio.Channel:
    """A channel to `address` (host:port). Connects when it is used; close it, or `async with`.

    `tls`: who is expected there; without it plaintext is spoken.
    """
    if tls is None:
        return grpc.aio.insecure_channel(address, options=OPTIONS)
    # Late: who speaks plaintext needs none of it.
    from services.common.tls_channel import TlsChannel

    return TlsChannel(address, tls, OPTIONS)


def outcome_unknown(error: GodwitError) -> bool:
    """True if the peer may have done what was asked, or a part of it, and `error` cannot tell."""
    if isinstance(error, NotExecutedError):
        return False
    return error.reason in _UNANSWERED or isinstance(error, InternalError | DeadlineExceededError)


def to_error(error: grpc.aio.AioRpcError) -> GodwitError:
    """The GodwitError that a failed call stands for."""
    details_bin: bytes | None = None
    for key, value in error.trailing_metadata() or ():
        if key == grpc_status.DETAILS_KEY and isinstance(value, bytes):
            details_bin = value
    return grpc_status.from_status(error.code(), error.details() or "", details_bin)


def _metadata(traceparent: str, bearer: str = "") -> tuple[tuple[str, str], ...]:
    traceparent = traceparent or telemetry.current_traceparent()
    traced = ((telemetry.TRACEPARENT, traceparent),) if traceparent else ()
    return (*traced, ("authorization", f"Bearer {bearer}")) if bearer else traced


async def wait_connected(channel: grpc.aio.Channel, *, timeout_s: float, peer: str = "") -> None:
    """Return once `channel` has a connection.

    Raises:
        NotExecutedError: PEER_UNREACHABLE: it has none after `timeout_s`.
    """
    try:
        async with asyncio.timeout(timeout_s):
            await channel.channel_ready()
    except TimeoutError:
        raise NotExecutedError(
            "PEER_UNREACHABLE",
            f"no connection to {peer or 'the peer'} within {timeout_s:g} s; nothing was sent",
            hint="check that the service runs there and that the address is the right one",
        ) from None


def _check(channel: grpc.aio.Channel, timeout_s: float) -> _Beat:
    # Under way from now on, whether or not it is awaited.
    method: grpc.aio.UnaryUnaryMultiCallable[
        health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse
    ] = channel.unary_unary(
        f"/{SERVICE_NAME}/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    return method(health_pb2.HealthCheckRequest(), timeout=timeout_s)


async def beat(channel: grpc.aio.Channel, *, timeout_s: float, peer: str = "") -> None:
    """A message there and back.

    Raises:
        NotExecutedError: there is no connection.
        GodwitError: no answer came.
    """
    began = time.monotonic()
    await wait_connected(channel, timeout_s=timeout_s, peer=peer)
    try:
        await _check(channel, max(timeout_s - (time.monotonic() - began), 0.001))
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.UNIMPLEMENTED:
            raise _with_peer(to_error(error), peer) from error


async def _with_heartbeats(channel: grpc.aio.Channel, answer: Awaitable[_Response]) -> _Response:
    """Wait for `answer`; see the module on why there are bytes under way meanwhile."""
    waiting = asyncio.ensure_future(answer)
    heartbeat: _Beat | None = None
    try:
        while not (await asyncio.wait({waiting}, timeout=HEARTBEAT_S))[0]:
            if heartbeat is None or heartbeat.done():
                heartbeat = _check(channel, 2 * HEARTBEAT_S)
        return waiting.result()
    finally:
        if heartbeat is not None:
            heartbeat.cancel()
        if not waiting.done():
            waiting.cancel()
            await asyncio.wait({waiting})


async def call(
    channel: grpc.aio.Channel,
    method: (
        grpc.aio.UnaryUnaryMultiCallable[_Request, _Response]
        | grpc.aio.StreamUnaryMultiCallable[_Request, _Response]
    ),
    request: _Request | AsyncIterable[_Request],
    *,
    timeout_s: float,
    connect_s: float = CONNECT_S,
    traceparent: str = "",
    peer: str = "",
    bearer: str = "",
) -> _Response:
    """Call `method` of a stub on `channel`; `timeout_s` includes connecting, at most `connect_s`.

    `peer` names the other side in messages, `bearer` is a token that says who asks. The traceparent
    is the current span's if it is not given. Cancelling the caller cancels the call, which leaves
    its outcome unknown.

    Raises:
        NotExecutedError: nothing was sent.
        GodwitError: see the module's docstring.
    """
    began = time.monotonic()
    await wait_connected(channel, timeout_s=min(connect_s, timeout_s), peer=peer)
    left_s = max(timeout_s - (time.monotonic() - began), 0.001)
    try:
        # The union's two members differ only in what they are called with.
        metadata = _metadata(traceparent, bearer)
        answer = method(request, timeout=left_s, metadata=metadata)  # type: ignore[arg-type]
        return await _with_heartbeats(channel, answer)
    except grpc.aio.AioRpcError as error:
        raise _with_peer(to_error(error), peer) from error


async def stream(
    channel: grpc.aio.Channel,
    method: grpc.aio.UnaryStreamMultiCallable[_Request, _Response],
    request: _Request,
    *,
    connect_s: float = CONNECT_S,
    silence_s_max: float | None = None,
    traceparent: str = "",
    peer: str = "",
) -> AsyncGenerator[_Response, None]:
    """The answers of a server-streaming call, without a deadline.

    Use it under `contextlib.aclosing`: closing it cancels the call. A peer that promises to speak
    at least now and then is given up after `silence_s_max` without a word.

    Raises:
        NotExecutedError: nothing was sent.
        GodwitError: the stream ended with an error. UnavailableError, PEER_SILENT: see above.
    """
    await wait_connected(channel, timeout_s=connect_s, peer=peer)
    answers = method(request, metadata=_metadata(traceparent))
    try:
        while True:
            async with asyncio.timeout(silence_s_max):
                answer = await answers.read()
            if answer is grpc.aio.EOF:
                return
            yield answer  # type: ignore[misc]
    except TimeoutError:
        raise _with_peer(
            UnavailableError("PEER_SILENT", f"{peer or 'the peer'} said nothing for a while"), peer
        ) from None
    except grpc.aio.AioRpcError as error:
        raise _with_peer(to_error(error), peer) from error
    finally:
        answers.cancel()


def _with_peer(error: GodwitError, peer: str) -> GodwitError:
    if peer:
        error.metadata.setdefault("peer", peer)
    return error
