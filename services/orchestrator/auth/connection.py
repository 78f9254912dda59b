# SPDX-License-Identifier: Apache-2.0
"""One HTTP connection: who its other end is by certificate, and how long it may say nothing.

uvicorn does not tell an application about the peer's certificate. It takes a protocol class of
ours, though, and each connection has an application of its own there: it is wrapped so that each
request's scope has what the TLS layer has verified. The place is the one of the ASGI specification,
the extension "tls"; the names are beside it, ready to be used.
Source: https://asgi.readthedocs.io/en/latest/specs/tls.html.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from typing import Any, cast

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

log = logging.getLogger(__name__)

HEAD_BYTES_MAX = 32 << 10
"""Of a request's line and headers."""
HEAD_S_MAX = 15.0
"""From the connection, or from the end of the last answer, until a request's head is there."""
CONNECTION_COUNT_MAX = 2048

_TLS = "tls"
_HANG_UP = "godwit.hang_up"
_DNS_NAMES = "godwit.client_dns_names"


def dns_names(scope: Scope) -> tuple[str, ...]:
    """DNS names of the caller's certificate; empty: he has shown none."""
    tls = (scope.get("extensions") or {}).get(_TLS) or {}
    return cast(tuple[str, ...], tls.get(_DNS_NAMES, ()))


def hang_up(scope: Scope) -> None:
    """End the request's connection at once, whatever waits to be sent on it."""
    if end := (scope.get("extensions") or {}).get(_HANG_UP):
        cast(Callable[[], None], end)()


class Connection(H11Protocol):
    """See the module. Give it to uvicorn.Config(http=...)."""

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A caller is there."""
        super().connection_made(transport)
        if len(self.connections) > CONNECTION_COUNT_MAX:
            log.warning("more than %d connections: one is refused", CONNECTION_COUNT_MAX)
            transport.close()
            return
        tls = transport.get_extra_info("ssl_object")
        extensions: dict[str, Any] = {_HANG_UP: transport.abort}
        if tls is not None:
            extensions[_TLS] = _extension(tls)
        self.app = _told(self.app, extensions)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Some of a request."""
        super().data_received(data)
        self._await_head()

    def on_response_complete(self) -> None:
        """The next request may come; until then uvicorn's keep-alive timer counts."""
        super().on_response_complete()
        self._stop_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """The caller is gone."""
        self._stop_timer()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        cycle: RequestResponseCycle | None = self.cycle  # None until there was a request
        if cycle is not None and not cycle.response_complete:
            self._stop_timer()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_S_MAX, self._head_is_late)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        log.info("a request's head has not come within %g s: hung up", HEAD_S_MAX)
        self.transport.close()


def _extension(tls: ssl.SSLObject) -> dict[str, Any]:
    certificate: Any = tls.getpeercert() or {}  # empty also for one that was not verified
    names = tuple(value for kind, value in certificate.get("subjectAltName", ()) if kind == "DNS")
    common = [
        value
        for part in certificate.get("subject", ())
        for key, value in part
        if key == "commonName"
    ]
    return {
        "client_cert_name": f"CN={common[0]}" if common else None,
        "client_cert_error": None,
        "tls_version": None,
        "cipher_suite": None,
        _DNS_NAMES: names,
    }


def _told(app: ASGIApp, extensions: dict[str, Any]) -> ASGIApp:
    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        scope["extensions"] = {**(scope.get("extensions") or {}), **extensions}
        await app(scope, receive, send)

    return call
