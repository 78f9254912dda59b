# SPDX-License-Identifier: Apache-2.0
"""A gRPC channel whose next connection uses the certificates of that moment.

gRPC's own channel keeps the certificates that it was made with for as long as it lives. This one
has another made when they have changed and the connection that was there is no more: one that
lives goes on, also over the end of a certificate (DESIGN 3.4).

Where the peer is pinned (services.common.continuation) and no connection can be made by
certificates, one by keys alone is tried beside it, and used while the other cannot be had.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

import grpc
import grpc.aio

from services.common.continuation import pinned_name
from services.common.peer_tls import PeerTls

log = logging.getLogger(__name__)

LOOK_S = 0.3
PATIENCE_S = 1.2
"""How long a connection by keys stands before it is used: one by certificates is tried again within
a second, and where a link has come back it is there by then."""

_FAILED = grpc.ChannelConnectivity.TRANSIENT_FAILURE
_READY = grpc.ChannelConnectivity.READY


class TlsChannel(grpc.aio.Channel):
    """See the module."""

    def __init__(
        self, address: str, tls: PeerTls, options: Sequence[tuple[str, int | str]]
    ) -> None:
        self._address = address
        self._tls = tls
        self._options = tuple(options)
        self._version = 0
        self._retired: list[grpc.aio.Channel] = []
        self._failed = False
        self._by_key: grpc.aio.Channel | None = None
        self._by_key_since = float("inf")
        self._pin = b""
        self.is_by_pin = False
        """The last call went to a peer that was known by its key alone: its certificate, or ours,
        or a clock, wants looking after."""
        self._inner = self._make()

    def _make(self) -> grpc.aio.Channel:
        self._version = self._tls.certificates.version
        return self._open(self._tls.name)

    def _open(self, name: str, pin: bytes = b"") -> grpc.aio.Channel:
        credentials = self._tls.certificates.channel_credentials(pin)
        options = (*self._options, ("grpc.ssl_target_name_override", name))
        return grpc.aio.secure_channel(self._address, credentials, options=options)

    def current(self) -> grpc.aio.Channel:
        """The channel for a call that begins now."""
        if self._version != self._tls.certificates.version and (
            self._inner.get_state() is not _READY
        ):
            # Calls may be under way on it, on a connection that comes back: closed at the end.
            self._retired.append(self._inner)
            self._inner = self._make()
            self._drop_by_key()
        state = self._inner.get_state()
        if state is _READY:
            self._failed = self.is_by_pin = False
            return self._inner
        self._failed = self._failed or state is _FAILED
        if not self._failed:
            return self._inner
        self._make_by_key()
        if self._by_key is None:
            return self._inner
        self._inner.get_state(try_to_connect=True)  # it goes on looking
        if self._by_key.get_state(try_to_connect=True) is not _READY:
            self._by_key_since = float("inf")
            return self._inner
        self._by_key_since = min(self._by_key_since, time.monotonic())
        if time.monotonic() < self._by_key_since + PATIENCE_S:
            return self._inner
        if not self.is_by_pin:
            self.is_by_pin = True
            log.error("%s at %s is known by its pinned key alone", self._tls.name, self._address)
        return self._by_key

    def _make_by_key(self) -> None:
        """Have a channel by keys, if the peer is pinned."""
        pin = self._tls.pin()
        if self._by_key is None or pin != self._pin:
            self._drop_by_key()
            if pin and self._tls.certificates.loaded.continuation_der:
                self._pin = pin
                self._by_key = self._open(pinned_name(self._tls.name), pin)

    def _drop_by_key(self) -> None:
        if self._by_key is not None:
            self._retired.append(self._by_key)
            self._by_key = None
            self._by_key_since = float("inf")

    # --- grpc.aio.Channel

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        """Close it; calls under way end after `grace` seconds."""
        self._drop_by_key()
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
            if state is _READY:
                return
            try:
                # Not for long: certificates may change, or keys be enough, while nothing else does.
                async with asyncio.timeout(LOOK_S):
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
