# SPDX-License-Identifier: Apache-2.0
"""HTTP, with or without TLS, for the length of a block."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Iterator

import uvicorn
from fastapi import FastAPI

from services.common.errors import UnavailableError
from services.common.listen import Address
from services.orchestrator.auth.connection import HEAD_BYTES_MAX, Connection

GRACE_S = 2


class _Uvicorn(uvicorn.Server):
    """Signals are the process's business, not the HTTP server's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def serving_http(
    app: FastAPI, listen: Address, context: ssl.SSLContext | None
) -> AsyncIterator[Address]:
    """Serve; where, with the port that the kernel chose for port 0.

    `context`: ours, not one of uvicorn's, so that it may follow its files.

    Raises:
        UnavailableError: LISTEN_FAILED.
    """
    family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((listen.host, listen.port))
        except OSError as error:
            raise UnavailableError(
                "LISTEN_FAILED", f"cannot bind {listen}: {error.strerror}"
            ) from error
        config = uvicorn.Config(
            app,
            http=Connection,
            h11_max_incomplete_event_size=HEAD_BYTES_MAX,
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=GRACE_S,
        )
        config.load()
        config.ssl = context
        server = _Uvicorn(config)
        async with asyncio.TaskGroup() as group:
            group.create_task(server.serve(sockets=[listener]))
            try:
                yield Address(host=listen.host, port=listener.getsockname()[1])
            finally:
                server.should_exit = True
