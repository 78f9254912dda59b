# SPDX-License-Identifier: Apache-2.0
"""A gRPC server with health, reflection, traces and errors that say what to do.

Handlers raise GodwitError and nothing else on purpose; whatever else leaves one is a bug: logged
with its trace, answered with INTERNAL, reason BUG.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2_grpc

from services.common import grpc_handlers, grpc_status, health, telemetry
from services.common.errors import GodwitError, InternalError, UnavailableError
from services.common.grpc_handlers import Continuation, Handler
from services.common.listen import Address

if TYPE_CHECKING:
    from services.common.tls import Certificates

log = logging.getLogger(__name__)

MESSAGE_MAX_BYTES = 8 << 20
"""Of control messages, both ways: a userfault bitmap of 64 GiB is 2 MiB."""
METADATA_MAX_BYTES = 32 << 10
CONNECTION_STREAM_COUNT_MAX = 1024
"""Calls under way on one connection; more wait at the caller's end, they are not refused."""
STOP_GRACE_S = 2.0

OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MESSAGE_MAX_BYTES),
    ("grpc.max_send_message_length", MESSAGE_MAX_BYTES),
    ("grpc.max_metadata_size", METADATA_MAX_BYTES),
    ("grpc.absolute_max_metadata_size", METADATA_MAX_BYTES),
    ("grpc.max_concurrent_streams", CONNECTION_STREAM_COUNT_MAX),
    ("grpc.keepalive_time_ms", 20_000),
    # Also how long what we send may go unacknowledged: see grpc_client.
    ("grpc.keepalive_timeout_ms", 2_500),
    # The default hangs up (GOAWAY, too_many_pings) on a client that pings more than once in five
    # minutes, in the middle of its streams. Ours ping every 20 s (grpc_client.OPTIONS).
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    # Two processes on one port would share its connections at random.
    ("grpc.so_reuseport", 0),
)

# Quoted: generic in the stubs only. What a servicer annotates its context with.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A service to be served."""

    name: str
    """Its full name, e.g. "godwit.page.v1.ImageAdminService"."""
    add: Callable[[grpc.aio.Server], None]
    """Registers its servicer: `lambda server: add_XServicer_to_server(servicer, server)`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A server that takes calls."""

    address: Address
    """What was bound, with the real port."""
    health: health.Health


async def _abort(context: Context, method: str, error: Exception) -> None:
    """End the call with the status that `error` stands for. Always raises."""
    if isinstance(error, NotImplementedError):  # a generated servicer's, for what we do not serve
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{method} is not served here")
    if isinstance(error, GodwitError):
        known = error
        log.info("%s refused: %s", method, error)
    else:
        log.error("%s failed", method, exc_info=error)
        known = InternalError(
            "BUG",
            f"{type(error).__name__}: {error}",
            hint="the server's log has the stack; report it",
        )
    status = grpc_status.to_status(known)
    await context.abort(
        known.grpc_status,
        status.message,
        ((grpc_status.DETAILS_KEY, status.SerializeToString()),),
    )


def _unary(method: str, behavior: Callable[[Any, Context], Awaitable[Any]]) -> Any:
    async def handle(request: Any, context: Context) -> Any:
        with telemetry.span(method, traceparent=_traceparent(context)):
            try:
                return await behavior(request, context)
            except grpc.aio.AbortError:  # the handler has ended the call itself
                raise
            except Exception as error:  # noqa: BLE001 - every failure becomes a status
                await _abort(context, method, error)

    return handle


def _streaming(method: str, behavior: Callable[[Any, Context], Any]) -> Any:
    # No span: a stream lives as long as what it watches.
    async def handle(request: Any, context: Context) -> AsyncIterator[Any]:
        try:
            answers = behavior(request, context)
            if hasattr(answers, "__aiter__"):
                # Closed here, not by the garbage collector: its finally blocks hold resources.
                async with contextlib.aclosing(answers):
                    async for answer in answers:
                        yield answer
            else:  # a coroutine that calls context.write(), as the health service's Watch
                await answers
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001
            await _abort(context, method, error)

    return handle


def _traceparent(context: Context) -> str:
    return telemetry.traceparent_of(cast(dict[str, str], dict(context.invocation_metadata() or ())))


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Maps what leaves a handler to a status, for all four shapes of call."""

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        """Wrap the handler of one call."""
        handler = await continuation(handler_call_details)
        if handler is None:  # no such method: gRPC answers UNIMPLEMENTED
            return handler
        method = handler_call_details.method.lstrip("/")
        return grpc_handlers.wrapped(
            handler,
            streaming=lambda behavior: _streaming(method, behavior),
            unary=lambda behavior: _unary(method, behavior),
        )


def preload() -> ModuleType:
    """Import what is imported late, and return the reflection service.

    Late, since a client of ours needs none of it, and an agent not before it has taken up what its
    predecessor left behind.
    """
    from grpc_reflection.v1alpha import reflection

    return reflection


@contextlib.asynccontextmanager
async def serving(
    listen: Address,
    services: Sequence[Service],
    *,
    stop_grace_s: float = STOP_GRACE_S,
    certificates: Certificates | None = None,
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
) -> AsyncIterator[Running]:
    """Serve `services`, health and reflection for the length of the block.

    `certificates`: callers must show one that ours knows; None: plaintext.
    `interceptors` stand around each handler, inside of what makes statuses of errors. Without any,
    a server that speaks TLS asks who calls, by the table of rules, as a node's (auth.interceptor).
    Every service is SERVING at once; `Running.health` changes that. At the end calls under way have
    `stop_grace_s` seconds. Whether `listen` may be bound is `parse_listen`'s question.

    Raises:
        UnavailableError: LISTEN_FAILED: the address is taken or not this machine's.
    """
    if certificates is not None and not interceptors:
        # Late: who speaks plaintext needs none of it.
        from services.common.auth.interceptor import node_door

        interceptors = (node_door(certificates.loaded.subject.name),)
    server = grpc.aio.server(interceptors=(ErrorInterceptor(), *interceptors), options=OPTIONS)
    names = [service.name for service in services]
    status = health.Health(names)
    for service in services:
        service.add(server)
    health_pb2_grpc.add_HealthServicer_to_server(status.servicer, server)
    reflection = preload()
    reflection.enable_server_reflection(
        (*names, health.SERVICE_NAME, str(reflection.SERVICE_NAME)), server
    )
    try:
        port = (
            server.add_secure_port(str(listen), certificates.server_credentials())
            if certificates
            else server.add_insecure_port(str(listen))
        )
    except RuntimeError as error:
        raise UnavailableError(
            "LISTEN_FAILED", f"cannot bind {listen}", hint="is another process listening there?"
        ) from error
    await status.set_serving(True)
    await server.start()
    try:
        yield Running(address=Address(host=listen.host, port=port), health=status)
    finally:
        await status.drain()
        await server.stop(stop_grace_s)
