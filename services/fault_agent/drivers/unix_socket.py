# SPDX-License-Identifier: Apache-2.0
"""Unix sockets in a VM's directory, however long its path is."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from services.fault_agent.drivers.api import VmmUnreachableError

CONNECT_RETRY_S = 0.005
_READ_BYTES = 64 << 10
_LINE_LEN_MAX = 4 << 20


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


class JsonLines:
    """A connection on which the other side says one JSON value a line, read by the running loop.

    `on_message` gets each value in turn (None for a line that is not JSON), `on_end` the reason,
    once, when the connection has ended by either side.
    """

    def __init__(
        self,
        connection: socket.socket,
        *,
        on_message: Callable[[object], None],
        on_end: Callable[[str], None],
    ) -> None:
        self.socket = connection
        self.closed = False
        self._on_message = on_message
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._received = bytearray()
        self._loop.add_reader(connection.fileno(), self._on_readable)

    def end(self, why: str) -> None:
        """Close the connection. Idempotent."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self.socket.fileno())
        self.socket.close()
        self._on_end(why)

    def _on_readable(self) -> None:
        try:
            data = self.socket.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self.end(f"receive: {error.strerror or error}")
            return
        if not data:
            self.end("closed by the VMM")
            return
        self._received += data
        while not self.closed and (end := self._received.find(b"\n")) >= 0:
            line = bytes(self._received[:end])
            del self._received[: end + 1]
            self._on_message(_value(line))
        if len(self._received) > _LINE_LEN_MAX:
            self.end(f"a line of more than {_LINE_LEN_MAX} bytes")


def _value(line: bytes) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
