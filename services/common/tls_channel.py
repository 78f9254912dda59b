# SPDX-License-Identifier: Apache-2.0
"""A gRPC channel whose next connection uses the certificates of that moment.

gRPC's own channel keeps the certificates that it was made with for as long as it lives. This one
has another made when they have changed and the connection that was there is no more: one that
lives goes on, also over the end of a certificate (DESIGN 3.4).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Self

import grpc
import grpc.aio

from services.common.peer_tls import PeerTls


class TlsChannel(grpc.aio.Channel):
    """See the module."""

    def __init__(
        self, address: str, tls: PeerTls, options: Sequence[tuple[str, int | str]]
    ) -> None:
        self._address = address
        self._tls = tls
        self._options = (*options, ("grpc.ssl_target_name_override", tls.name))
        self._version = 0
        self._retired: list[grpc.aio.Channel] = []
        self._inner = self._make()

    def _make(self) -> grpc.aio.Channel:
        self._version = self._tls.certificates.version
        return grpc.aio.secure_channel(
            self._address, self._tls.certificates.channel_credentials(), options=self._options
        )

    def current(self) -> grpc.aio.Channel:
        """The channel for a call that begins now."""
        if self._version != self._tls.certificates.version and (
            self._inner.get_state() is not grpc.ChannelConnectivity.READY
        ):
            # Calls may be under way on it, on a connection that comes back: closed at the end.
            self._retired.append(self._inner)
            self._inner = self._make()
        return self._inner

    # --- grpc.aio.Channel

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        """Close it; calls under way end after `grace` seconds."""
        channels = [*self._retired, self._inner]
        await asyncio.gather(*(channel.close(grace) for channel in channels))

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """Of the connection that a call would use now."""
        return self.current().get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """Wait until it is no longer that."""
        await self.current().wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """Wait for a connection, also over a change of certificates."""
        while True:
            inner = self.current()
            state = inner.get_state(try_to_connect=True)
            if state is grpc.ChannelConnectivity.READY:
                return
            try:
                # A second at most: certificates may change while nothing else does.
                async with asyncio.timeout(1.0):
                    await inner.wait_for_state_change(state)
            except TimeoutError:
                continue

    def _late(self, make: Callable[[grpc.aio.Channel], Any]) -> Any:
        # By channel: a stub is made once and called for as long as the process lives.
        made: dict[int, Any] = {}

        def call(*arguments: Any, **keywords: Any) -> Any:
            inner = self.current()
            method = made.get(id(inner))
            if method is None:
                made.clear()
                method = made[id(inner)] = make(inner)
            return method(*arguments, **keywords)

        return call

    def unary_unary(self, *arguments: Any, **keywords: Any) -> Any:
        """A method, for any number of calls."""
        return self._late(lambda inner: inner.unary_unary(*arguments, **keywords))

    def unary_stream(self, *arguments: Any, **keywords: Any) -> Any:
        """A method, for any number of calls."""
        return self._late(lambda inner: inner.unary_stream(*arguments, **keywords))

    def stream_unary(self, *arguments: Any, **keywords: Any) -> Any:
        """A method, for any number of calls."""
        return self._late(lambda inner: inner.stream_unary(*arguments, **keywords))

    def stream_stream(self, *arguments: Any, **keywords: Any) -> Any:
        """A method, for any number of calls."""
        return self._late(lambda inner: inner.stream_stream(*arguments, **keywords))
