# SPDX-License-Identifier: Apache-2.0
"""Calls to other Godwit services.

A failed call is one of three things, and past a decision only their difference keeps a guest
single (I8, "on doubt ask"):
  - NotExecutedError: nothing left this process, the peer has not done it;
  - an answer of the peer: a GodwitError with the peer's own reason;
  - no answer: `outcome_unknown(error)` is True; ask the peer for evidence.
gRPC retries by itself only what the peer's HTTP/2 layer said it never saw (REFUSED_STREAM, GOAWAY).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterable
from typing import TypeVar

import grpc
import grpc.aio

from services.common import grpc_status, telemetry
from services.common.errors import (
    DeadlineExceededError,
    GodwitError,
    InternalError,
    UnavailableError,
)
from services.common.grpc_server import MESSAGE_MAX_BYTES, METADATA_MAX_BYTES

CONNECT_S = 5.0

OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MESSAGE_MAX_BYTES),
    ("grpc.max_send_message_length", MESSAGE_MAX_BYTES),
    ("grpc.max_metadata_size", METADATA_MAX_BYTES),
    # Finds a dead peer under a silent stream within half a minute. Only while a call is open, and
    # far above the 5 s that grpc_server.OPTIONS tolerate.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.max_pings_without_data", 0),
    # A peer that was restarted is found again at once, not after the default of up to two minutes.
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

_UNANSWERED = frozenset({"PEER_UNAVAILABLE", "PEER_CANCELLED", "PEER_DEADLINE_EXCEEDED"})


class NotExecutedError(UnavailableError):
    """No connection to the peer: nothing was sent. Raised here only, never by a peer's word."""


def open_channel(address: str) -> grpc.aio.Channel:
    """A channel to `address` (host:port). Connects when it is used; close it, or `async with`."""
    return grpc.aio.insecure_channel(address, options=OPTIONS)


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


def _metadata(traceparent: str) -> tuple[tuple[str, str], ...]:
    traceparent = traceparent or telemetry.current_traceparent()
    return ((telemetry.TRACEPARENT, traceparent),) if traceparent else ()


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
) -> _Response:
    """Call `method` of a stub on `channel`; `timeout_s` includes connecting, at most `connect_s`.

    `peer` names the other side in messages. The traceparent is the current span's if it is not
    given. Cancelling the caller cancels the call, which leaves its outcome unknown.

    Raises:
        NotExecutedError: nothing was sent.
        GodwitError: see the module's docstring.
    """
    began = time.monotonic()
    await wait_connected(channel, timeout_s=min(connect_s, timeout_s), peer=peer)
    left_s = max(timeout_s - (time.monotonic() - began), 0.001)
    try:
        # The union's two members differ only in what they are called with.
        return await method(request, timeout=left_s, metadata=_metadata(traceparent))  # type: ignore[arg-type]
    except grpc.aio.AioRpcError as error:
        raise _with_peer(to_error(error), peer) from error


async def stream(
    channel: grpc.aio.Channel,
    method: grpc.aio.UnaryStreamMultiCallable[_Request, _Response],
    request: _Request,
    *,
    connect_s: float = CONNECT_S,
    traceparent: str = "",
    peer: str = "",
) -> AsyncGenerator[_Response, None]:
    """The answers of a server-streaming call, without a deadline.

    Use it under `contextlib.aclosing`: closing it cancels the call.

    Raises:
        NotExecutedError: nothing was sent.
        GodwitError: the stream ended with an error.
    """
    await wait_connected(channel, timeout_s=connect_s, peer=peer)
    answers = method(request, metadata=_metadata(traceparent))
    try:
        async for answer in answers:
            yield answer
    except grpc.aio.AioRpcError as error:
        raise _with_peer(to_error(error), peer) from error
    finally:
        answers.cancel()


def _with_peer(error: GodwitError, peer: str) -> GodwitError:
    if peer:
        error.metadata.setdefault("peer", peer)
    return error
