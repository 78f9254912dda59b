# SPDX-License-Identifier: Apache-2.0
"""The Prometheus metrics of a process and the small HTTP endpoint that shows them.

Rejected: prometheus_client's own server, a thread with a WSGI stack per process, where thirty
lines on the loop that is there already do.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

from prometheus_client import CollectorRegistry, Counter, GCCollector, ProcessCollector
from prometheus_client.exposition import choose_encoder

from services.common.listen import Address

log = logging.getLogger(__name__)

REQUEST_HEAD_MAX = 16 << 10
REQUEST_S_MAX = 10.0

FAULT_SECONDS_BUCKETS = tuple(round(25e-6 * 2**step, 9) for step in range(16))
"""25 µs to 0.8 s: from a page in the same host to one over a bad link."""


def new_registry() -> CollectorRegistry:
    """A registry with what every process reports about itself."""
    registry = CollectorRegistry(auto_describe=True)
    ProcessCollector(registry=registry)
    GCCollector(registry=registry)
    return registry


def invariant_violations(registry: CollectorRegistry) -> Counter:
    """Broken invariants of DESIGN 4, by number. More than 0 pages somebody."""
    return Counter(
        "godwit_invariant_violations",
        "Broken invariants, by their number in the design",
        ["invariant"],
        registry=registry,
    )


class _Endpoint:
    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def _answer(self, method: bytes, target: bytes, accept: str) -> tuple[str, str, bytes]:
        path = target.split(b"?", 1)[0]
        if method not in (b"GET", b"HEAD"):
            return "405 Method Not Allowed", "text/plain", b"GET only\n"
        if path != b"/metrics":
            return "404 Not Found", "text/plain", b"metrics are at /metrics\n"
        encode, content_type = choose_encoder(accept)
        try:
            return "200 OK", content_type, encode(self._registry)
        except Exception:  # a collector's bug is no reason to hide the next scrape
            log.exception("metrics cannot be collected")
            return "500 Internal Server Error", "text/plain", b"see the log\n"

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request, then close: scrapers come seconds apart."""
        try:
            async with asyncio.timeout(REQUEST_S_MAX):
                head = await reader.readuntil(b"\r\n\r\n")
                request, *headers = head.split(b"\r\n")
                method, target, _version = request.split(b" ", 2)
                accept = ",".join(
                    value.decode("latin-1").strip()
                    for name, _, value in (line.partition(b":") for line in headers)
                    if name.lower() == b"accept"
                )
                status, content_type, body = self._answer(method, target, accept)
                writer.write(
                    f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\n"
                    f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
                )
                if method != b"HEAD":
                    writer.write(body)
                await writer.drain()
        except (ValueError, OSError, EOFError, asyncio.LimitOverrunError) as error:
            log.debug("metrics request given up: %r", error)
        finally:
            writer.close()


@contextlib.asynccontextmanager
async def serving(registry: CollectorRegistry, listen: Address) -> AsyncIterator[Address]:
    """Serve `registry` at http://ADDRESS/metrics, OpenMetrics or text, for the length of the block.

    Raises:
        OSError: `listen` could not be bound.
    """
    server = await asyncio.start_server(
        _Endpoint(registry).handle, listen.host, listen.port, limit=REQUEST_HEAD_MAX
    )
    try:
        yield Address(host=listen.host, port=int(server.sockets[0].getsockname()[1]))
    finally:
        server.close()
        await server.wait_closed()
