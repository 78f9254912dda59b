# SPDX-License-Identifier: Apache-2.0
"""A network in place of gRPC: it delays, reorders, loses, repeats. The handlers are the real ones.

Stands in for `services.common.grpc_client` where that is imported: the same functions, the same
errors. What a call may come to is what gRPC allows, and duplicates on top: nothing was sent; it was
done and the answer is lost; it was lost; it is done later than the caller waits, or twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable
from typing import Any

from services.common.errors import (
    DeadlineExceededError,
    GodwitError,
    InternalError,
    UnavailableError,
)
from services.common.grpc_client import NotExecutedError, outcome_unknown
from tests.sim.machinery import CURRENT, SimProcess, VirtualLoop

__all__ = ["Channel", "Network", "NotExecutedError", "Stub", "outcome_unknown"]

NETWORK: contextvars.ContextVar[Network] = contextvars.ContextVar("NETWORK")

DELAY_S = 0.002
LATE_S = 8.0
"""How late a message may come at the most."""


class Channel:
    """A way to an address."""

    def __init__(self, address: str) -> None:
        self.address = address

    def get_state(self, *, try_to_connect: bool) -> None:
        """Of no matter here."""

    async def close(self) -> None:
        """Of no matter here."""


class Stub:
    """Methods by name."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def __getattr__(self, name: str) -> tuple[Channel, str]:
        return self._channel, name


class Network:
    """Who can reach whom, and what becomes of messages."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self._chance = loop.chance
        self.servers: dict[str, tuple[SimProcess, Any]] = {}
        """By address: who listens, and his servicer."""
        self.names: dict[str, str] = {}
        """Of addresses, for `cuts`."""
        self.cuts: set[tuple[str, str]] = set()
        """(from, to): nothing gets through."""
        self.loss = 0.0
        self.duplication = 0.0
        self.lateness = 0.0

    def up(self, source: str, target: str) -> bool:
        """A message can get from one to the other."""
        return (source, target) not in self.cuts

    def delay_s(self) -> float:
        """Of one message."""
        if self._chance.random() < self.lateness:
            return self._chance.uniform(0, LATE_S)
        return self._chance.uniform(0.2, 2) * DELAY_S

    def lost(self) -> bool:
        """One message."""
        return self._chance.random() < self.loss


def _me() -> str:
    process = CURRENT.get()
    return process.name if process else "test"


def open_channel(address: str, tls: object = None) -> Channel:
    """As grpc_client.open_channel, in plaintext."""
    assert tls is None
    return Channel(address)


async def wait_connected(channel: Channel, *, timeout_s: float, peer: str = "") -> None:
    """As grpc_client.wait_connected."""
    network = NETWORK.get()
    loop = asyncio.get_running_loop()
    until = loop.time() + timeout_s
    while True:
        name = network.names.get(channel.address, "")
        both_ways = network.up(_me(), name) and network.up(name, _me())
        if channel.address in network.servers and both_ways:
            return
        if loop.time() >= until:
            raise NotExecutedError("PEER_UNREACHABLE", f"no connection to {peer or name}")
        await asyncio.sleep(min(0.2, max(until - loop.time(), 0.001)))


async def call(
    channel: Channel,
    method: tuple[Channel, str],
    request: Any,
    *,
    timeout_s: float,
    connect_s: float = 5.0,
    traceparent: str = "",
    peer: str = "",
) -> Any:
    """As grpc_client.call."""
    loop = asyncio.get_running_loop()
    until = loop.time() + timeout_s
    await wait_connected(channel, timeout_s=min(connect_s, timeout_s), peer=peer)
    if process := CURRENT.get():
        process.effect()
    answer: asyncio.Future[Any] = loop.create_future()
    if isinstance(request, AsyncIterable):
        request = _pull(request, CURRENT.get(), network_name(channel.address))
    work = _exchange(channel.address, method[1], request, answer, _me())
    exchange = loop.create_task(work, context=_nobodys())
    try:
        async with asyncio.timeout(max(until - loop.time(), 0.001)):
            return await answer
    except TimeoutError:
        raise DeadlineExceededError("PEER_DEADLINE_EXCEEDED", f"{peer}: {method[1]}") from None
    finally:
        if isinstance(request, AsyncIterable):
            exchange.cancel()


async def beat(channel: Channel, *, timeout_s: float, peer: str = "") -> None:
    """As grpc_client.beat: is there anybody?"""
    network = NETWORK.get()
    name = network.names.get(channel.address, "")
    await wait_connected(channel, timeout_s=timeout_s, peer=peer)
    await asyncio.sleep(network.delay_s())
    if network.lost() or not (network.up(_me(), name) and network.up(name, _me())):
        raise DeadlineExceededError("PEER_DEADLINE_EXCEEDED", f"{peer}: no beat")


def _nobodys(process: SimProcess | None = None) -> contextvars.Context:
    context = contextvars.copy_context()
    context.run(CURRENT.set, process)
    return context


async def _exchange(
    address: str, method: str, request: Any, answer: asyncio.Future[Any], source: str
) -> None:
    """A message, what it causes, and the way back; belongs to the network, not to the caller."""
    network = NETWORK.get()
    chance = network._chance
    stream = isinstance(request, AsyncIterable)
    if not stream:
        request = type(request).FromString(request.SerializeToString())
        if chance.random() < network.duplication:
            twin: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            twin.add_done_callback(lambda done: done.cancelled() or done.exception())
            late_s = chance.uniform(0, LATE_S)
            later = _later(late_s, lambda: _deliver(address, method, request, twin, source))
            asyncio.get_running_loop().create_task(later, context=_nobodys())
    await asyncio.sleep(network.delay_s())
    if network.lost() or not network.up(source, network_name(address)):
        if chance.random() < 0.5:
            _fail(answer, UnavailableError("PEER_UNAVAILABLE", "connection reset"))
        return
    await _deliver(address, method, request, answer, source)


async def _pull(
    messages: AsyncIterable[Any], sender: SimProcess | None, target: str
) -> AsyncIterator[Any]:
    """A stream of requests at its receiver: it ends where its sender does."""
    network, loop = NETWORK.get(), asyncio.get_running_loop()
    source = sender.name if sender else "test"
    iterator = aiter(messages)
    while True:
        step = loop.create_task(_next(iterator), context=_nobodys(sender))
        while not step.done():
            await asyncio.wait({step}, timeout=0.5)
            if sender and not sender.alive:
                return
        if step.cancelled() or step.exception() is not None or step.result() is None:
            return
        await asyncio.sleep(network.delay_s())
        while not network.up(source, target):  # noqa: ASYNC110 - a cut is no event
            await asyncio.sleep(0.1)
        yield step.result()


def network_name(address: str) -> str:
    """Who should listen at an address."""
    return NETWORK.get().names.get(address, "")


async def _later(delay_s: float, work: Callable[[], Awaitable[None]]) -> None:
    await asyncio.sleep(delay_s)
    await work()


def _fail(answer: asyncio.Future[Any], error: Exception) -> None:
    if not answer.done():
        answer.set_exception(error)
        answer.exception()


async def _deliver(
    address: str, method: str, request: Any, answer: asyncio.Future[Any], source: str
) -> None:
    network = NETWORK.get()
    if address not in network.servers:
        _fail(answer, UnavailableError("PEER_UNAVAILABLE", "connection refused"))
        return
    process, servicer = network.servers[address]
    handler = process.spawn(_handle(servicer, method, request))
    try:
        done, _ = await asyncio.wait({handler})
    except asyncio.CancelledError:
        handler.cancel()
        raise
    await asyncio.sleep(network.delay_s())
    cut = not network.up(network_name(address), source)
    if network.lost() or cut or not done or handler.cancelled() or not process.alive:
        if network._chance.random() < 0.5:
            _fail(answer, UnavailableError("PEER_UNAVAILABLE", "connection reset"))
        return
    error = handler.exception()
    if error is None:
        if not answer.done():
            answer.set_result(handler.result())
    elif isinstance(error, GodwitError):
        _fail(answer, error)
    else:
        _fail(answer, InternalError("PEER_BUG", repr(error)))


async def _handle(servicer: Any, method: str, request: Any) -> Any:
    return await getattr(servicer, method)(request, None)


async def stream(
    channel: Channel,
    method: tuple[Channel, str],
    request: Any,
    *,
    connect_s: float = 5.0,
    silence_s_max: float | None = None,
    traceparent: str = "",
    peer: str = "",
) -> AsyncGenerator[Any, None]:
    """As grpc_client.stream."""
    network, me = NETWORK.get(), _me()
    await wait_connected(channel, timeout_s=connect_s, peer=peer)
    broken = UnavailableError("PEER_UNAVAILABLE", "stream broken")
    process, servicer = network.servers[channel.address]
    name = network.names[channel.address]
    context = _nobodys(process)
    loop = asyncio.get_running_loop()
    answers = context.run(getattr(servicer, method[1]), request, None)
    try:
        while True:
            step = loop.create_task(_next(answers), context=context)
            while not step.done():
                await asyncio.wait({step}, timeout=0.5)
                cut = not (network.up(me, name) and network.up(name, me))
                if not process.alive or cut:
                    step.cancel()
                    raise broken
            if step.cancelled() or not process.alive:
                raise broken
            error = step.exception()
            if isinstance(error, GodwitError):
                raise error
            if error is not None:
                raise broken
            message = step.result()
            if message is None:
                return
            await asyncio.sleep(network.delay_s())
            yield message
    finally:
        if process.alive:
            with contextlib.suppress(BaseException):
                await loop.create_task(answers.aclose(), context=context)


async def _next(answers: AsyncIterator[Any]) -> Any:
    return await anext(answers, None)
