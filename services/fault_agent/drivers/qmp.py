# SPDX-License-Identifier: Apache-2.0
"""A client of QEMU's monitor protocol (QMP) on a Unix socket.

Written for a monitor that may be mute for a long time: QEMU's main loop answers nobody while it
waits for a page during a load. So every command has its own deadline and id, an answer that comes
after its deadline is dropped, and later commands queue behind it in order. Descriptors are passed
beside a command by SCM_RIGHTS.

Rejected: the qemu.qmp package; it cannot pass descriptors, and brings a state machine of its own.
Source: QEMU docs/interop/qmp-spec.rst.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from services.fault_agent.drivers.api import VmmRefusedError, VmmUnreachableError
from services.fault_agent.drivers.unix_socket import JsonLines, connected

TIMEOUT_S = 10.0


class QmpError(VmmRefusedError):
    """QEMU answered a command with an error."""

    def __init__(self, command: str, error_class: str, description: str) -> None:
        super().__init__(f"{command}: {description}")
        self.error_class = error_class
        self.description = description


class EventQueue:
    """The events of one name, from the moment it was made."""

    def __init__(self) -> None:
        self._events: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

    async def next(self) -> dict[str, Any]:
        """The data of the next event.

        Raises:
            VmmUnreachableError: the connection has ended and no event is left.
        """
        data = await self._events.get()
        if data is None:
            self._events.put_nowait(None)
            raise VmmUnreachableError("the monitor's connection has ended")
        return data

    def put(self, data: dict[str, Any] | None) -> None:
        """Add an event's data; None: there will be no more."""
        self._events.put_nowait(data)


class QmpClient:
    """One connection. Use it from one event loop; `close` it, or the process leaks a socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        self._replies: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._watchers: dict[str, list[EventQueue]] = {}
        self._greeting: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self._last_id = 0
        # A command is one write: two that interleave would be neither.
        self._sending = asyncio.Lock()
        self._lines = JsonLines(connection, on_message=self._on_message, on_end=self._on_end)

    @classmethod
    async def connect(cls, path: Path, *, timeout_s: float, alive: Callable[[], bool]) -> QmpClient:
        """Connect as soon as QEMU listens, and negotiate.

        Raises:
            VmmUnreachableError: `alive()` is False, or no greeting within `timeout_s`: another
                client may hold the monitor.
        """
        client: QmpClient | None = None
        try:
            async with asyncio.timeout(timeout_s):
                client = cls(await connected(path, alive))
                await client._greeting
                await client.execute("qmp_capabilities", timeout_s=timeout_s)
                return client
        except TimeoutError:
            if client is not None:
                client.close()
            raise VmmUnreachableError(f"no monitor at {path} within {timeout_s:g} s") from None
        except BaseException:
            if client is not None:
                client.close()
            raise

    @property
    def closed(self) -> bool:
        """True once the connection has ended, by us or by QEMU."""
        return self._lines.closed

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        fds: Sequence[int] = (),
        timeout_s: float = TIMEOUT_S,
    ) -> Any:
        """Run a command and return what it returned.

        `fds` stay the caller's. Cancelling or a deadline leaves the command running in QEMU.

        Raises:
            QmpError: QEMU refused it.
            VmmUnreachableError: no answer within `timeout_s`, or no connection.
        """
        self._last_id += 1
        number = self._last_id
        message: dict[str, object] = {"execute": command, "id": number}
        if arguments:
            message["arguments"] = arguments
        reply: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self._replies[number] = reply
        try:
            async with asyncio.timeout(timeout_s):
                await self._send(json.dumps(message).encode() + b"\n", fds)
                answer = await reply
        except TimeoutError:
            raise VmmUnreachableError(f"{command}: no answer within {timeout_s:g} s") from None
        finally:
            self._replies.pop(number, None)
        if "error" in answer:
            error = answer["error"]
            raise QmpError(command, str(error.get("class")), str(error.get("desc")))
        return answer["return"]

    @contextlib.contextmanager
    def events(self, name: str) -> Iterator[EventQueue]:
        """Collect the events of `name` for the length of the block."""
        queue = EventQueue()
        if self._lines.closed:
            queue.put(None)
        self._watchers.setdefault(name, []).append(queue)
        try:
            yield queue
        finally:
            self._watchers[name].remove(queue)

    def close(self) -> None:
        """End the connection; QEMU runs on. Idempotent."""
        self._lines.end("closed by the agent")

    async def _send(self, data: bytes, fds: Sequence[int]) -> None:
        async with self._sending:
            if self._lines.closed:
                raise VmmUnreachableError("the monitor's connection has ended")
            try:
                if fds:
                    # Descriptors go with the first byte. A full buffer means that QEMU has read
                    # nothing for tens of commands: mute, not slow.
                    sent = socket.send_fds(self._lines.socket, [data], list(fds))
                    data = data[sent:]
                await self._loop.sock_sendall(self._lines.socket, data)
            except OSError as error:
                self._lines.end(f"send: {error.strerror or error}")
                raise VmmUnreachableError(f"the monitor's connection broke: {error}") from error

    def _on_message(self, message: object) -> None:
        if not isinstance(message, dict):
            self._lines.end("what it sent is not QMP")
        elif "event" in message:
            for queue in self._watchers.get(str(message["event"]), ()):
                queue.put(message.get("data") or {})
        elif "QMP" in message:
            if not self._greeting.done():
                self._greeting.set_result(message)
        else:
            reply = self._replies.get(message.get("id", 0))
            if reply is not None and not reply.done():
                reply.set_result(message)

    def _on_end(self, why: str) -> None:
        for waiting in (self._greeting, *self._replies.values()):
            if not waiting.done():
                waiting.set_exception(VmmUnreachableError(f"the monitor's connection: {why}"))
                waiting.exception()  # seen: nobody may be waiting for the greeting any more
        for queues in self._watchers.values():
            for queue in queues:
                queue.put(None)
