# SPDX-License-Identifier: Apache-2.0
"""Where a VMM hands its faults off, and the connection that stays (docs/exit-channel.md 1).

The VMM connects again whenever the connection breaks before it has let go; such connections wait in
the listener's backlog until somebody needs one: it lives as long as the arrival.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import json
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

from services.fault_agent import handoff, processes
from services.fault_agent.drivers.api import Faults, VmmUnreachableError
from services.fault_agent.drivers.unix_socket import short_name
from services.fault_agent.handoff import Expected, HandoffRefusedError

log = logging.getLogger(__name__)

SOCKET = "faults.sock"
MESSAGE_TIMEOUT_S = 10.0
LET_GO_TIMEOUT_S = 10.0
_BACKLOG = 8
_FD_SPACE = socket.CMSG_SPACE((handoff.FD_COUNT_MAX + 1) * array.array("i").itemsize)
"""Room for one more than there may be: too many are seen as such."""
_PEER = struct.Struct("3i")  # struct ucred: pid, uid, gid
_LINE_LEN_MAX = 4096
_LOOK_AGAIN_S = 0.2

Released = Callable[[], Awaitable[bool]]
"""Whether the VMM says elsewhere that it has let go."""


class _EndedError(Exception):
    """The other side has closed the connection."""


class Connection:
    """One connection of a VMM. Used by one task at a time."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._received = bytearray()
        self._fds: list[int] = []

    @property
    def peer_pid(self) -> int:
        """Who connected, by the kernel's word."""
        credentials = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
        return int(_PEER.unpack(credentials)[0])

    async def handoff(self, expected: Expected) -> Faults:
        """The first message.

        Raises:
            HandoffRefusedError: it is none, or not one of this VMM's.
            _EndedError: the connection broke before it was whole.
        """
        try:
            async with asyncio.timeout(MESSAGE_TIMEOUT_S):
                while b"\n" not in self._received:
                    if len(self._received) > handoff.MESSAGE_LEN_MAX:
                        raise HandoffRefusedError(f"more than {handoff.MESSAGE_LEN_MAX} bytes")
                    await self._receive()
        except TimeoutError:
            raise HandoffRefusedError(f"not whole after {MESSAGE_TIMEOUT_S:g} s") from None
        message, _, rest = bytes(self._received).partition(b"\n")
        if rest:
            raise HandoffRefusedError(f"{len(rest)} bytes behind it")
        self._received.clear()
        fds, self._fds = self._fds, []
        return handoff.accept(message, fds, expected)

    async def line(self) -> dict[str, object]:
        """The next line after the hand-off.

        Raises:
            HandoffRefusedError: it is no JSON object, or brings descriptors.
            _EndedError: there will be none.
        """
        while (end := self._received.find(b"\n")) < 0:
            if len(self._received) > _LINE_LEN_MAX:
                raise HandoffRefusedError(f"a line of more than {_LINE_LEN_MAX} bytes")
            await self._receive()
            if self._fds:
                raise HandoffRefusedError("descriptors behind the hand-off")
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        # Deep enough, it is a RecursionError.
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(line)
            if isinstance(value, dict):
                return value
        raise HandoffRefusedError("a line that is no JSON object")

    async def send(self, message: dict[str, object]) -> None:
        """Send a line.

        Raises:
            _EndedError: nobody is there any more.
        """
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_sendall(self._socket, json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise _EndedError from error

    async def _receive(self) -> None:
        await _readable(self._socket)
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(
                handoff.MESSAGE_LEN_MAX, _FD_SPACE, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        except OSError as error:
            raise _EndedError from error
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                whole = len(content) - len(content) % array.array("i").itemsize
                self._fds += array.array("i", content[:whole])
        if flags & socket.MSG_CTRUNC or len(self._fds) > handoff.FD_COUNT_MAX:
            raise HandoffRefusedError(f"more than {handoff.FD_COUNT_MAX} descriptors")
        if not data:
            raise _EndedError
        self._received += data

    def close(self) -> None:
        """Close it, and descriptors that nobody has taken. Idempotent."""
        fds, self._fds = self._fds, []
        handoff.close_all(fds)
        self._socket.close()


class Listener:
    """Listens for the VMM of one directory; 0600, so that nobody else's can connect."""

    def __init__(self, directory: Path) -> None:
        """Listen.

        Raises:
            OSError: the socket cannot be made.
        """
        self._path = directory / SOCKET
        self._path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.setblocking(False)
            with short_name(self._path) as name:
                self._socket.bind(name)
            # Nobody can connect before `listen`.
            self._path.chmod(0o600)
            self._socket.listen(_BACKLOG)
        except BaseException:
            self.close()
            raise

    async def accept(self, expected: Expected) -> tuple[Connection, Faults]:
        """The hand-off of the process that is expected. Bound it with asyncio.timeout.

        Others are hung up on, and so are connections that break before they have said anything.

        Raises:
            HandoffRefusedError: it hands off what it may not.
        """
        loop = asyncio.get_running_loop()
        while True:
            accepted, _ = await loop.sock_accept(self._socket)
            connection = Connection(accepted)
            try:
                if connection.peer_pid != expected.pid:
                    log.warning(
                        "process %d connected to %s, which is for %d",
                        *(connection.peer_pid, self._path, expected.pid),
                    )
                    connection.close()
                    continue
                return connection, await connection.handoff(expected)
            except _EndedError:
                connection.close()
            except BaseException:
                connection.close()
                raise

    def close(self) -> None:
        """Stop listening. Idempotent."""
        if self._socket.fileno() >= 0:
            self._socket.close()
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)


class HandedOff:
    """An Armed: a VMM that has handed its faults off."""

    def __init__(
        self,
        *,
        process: processes.Process,
        expected: Expected,
        listener: Listener,
        connection: Connection,
        faults: Faults,
        released: Released,
    ) -> None:
        self.faults = faults
        self._process = process
        self._expected = expected
        self._listener = listener
        self._connection: Connection | None = connection
        self._released = released
        self._fds_open = True
        self._let_go = False

    def close_fds(self) -> None:
        """The engine has duplicates, the VMM the originals."""
        if self._fds_open:
            self._fds_open = False
            handoff.close_fds(self.faults)

    async def let_go(self) -> None:
        """Say `complete` until the VMM says `released`, there or elsewhere, or is dead."""
        try:
            async with asyncio.timeout(LET_GO_TIMEOUT_S):
                while not self._let_go and processes.is_alive(self._process):
                    self._let_go = await self._try_to_let_go()
        except TimeoutError:
            # It connects again, and hears a `complete` once a connection.
            self._hang_up()
            raise VmmUnreachableError(
                f"process {self._process.pid} has all its memory and does not let go of it"
            ) from None

    async def _try_to_let_go(self) -> bool:
        try:
            if self._connection is None:
                if await self._released():
                    return True
                async with asyncio.timeout(_LOOK_AGAIN_S):
                    self._connection, faults = await self._listener.accept(self._expected)
                # The same descriptors once more: the engine has them.
                handoff.close_fds(faults)
            await self._connection.send({"event": "complete"})
            while (await self._connection.line()).get("event") != "released":
                pass
        except (_EndedError, HandoffRefusedError, TimeoutError) as error:
            if isinstance(error, HandoffRefusedError):
                log.warning("%s", error)
            self._hang_up()
            return False
        return True

    def _hang_up(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def close(self) -> None:
        """Hang up, stop listening. Idempotent."""
        self.close_fds()
        self._hang_up()
        self._listener.close()


async def _readable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(connection.fileno(), readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(connection.fileno())


def expect(pid: int, ram_fd: int, vcpu_count: int) -> Expected:
    """What the hand-off of a VMM with this RAM file has to agree with."""
    status = os.fstat(ram_fd)
    return Expected(
        pid=pid,
        memory=(status.st_dev, status.st_ino),
        memory_bytes=status.st_size,
        vcpu_count=vcpu_count,
    )
