# SPDX-License-Identifier: Apache-2.0
"""Unix sockets in a VM's directory, however long its path is."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from services.fault_agent.drivers.api import VmmUnreachableError

CONNECT_RETRY_S = 0.005


@contextlib.contextmanager
def short_name(path: Path) -> Iterator[str]:
    """A name for `path` of at most 107 bytes, which is all that a socket's address holds."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


async def connected(path: Path, alive: Callable[[], bool]) -> socket.socket:
    """A non-blocking connection, as soon as somebody listens. Bound it with asyncio.timeout.

    Raises:
        VmmUnreachableError: `alive()` is False.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.setblocking(False)
    try:
        with short_name(path) as name:
            while True:
                try:
                    # Connecting to one that listens does not wait; a full backlog is EAGAIN.
                    connection.connect(name)
                except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
                    if not alive():
                        raise VmmUnreachableError(f"the VMM ended before it made {path}") from None
                    await asyncio.sleep(CONNECT_RETRY_S)
                else:
                    return connection
    except BaseException:
        connection.close()
        raise
