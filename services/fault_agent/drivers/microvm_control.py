# SPDX-License-Identifier: Apache-2.0
"""A client of godwit-microvm's control socket: JSON lines, one answer a line, in order.

Several lines may be under way: their answers come in the order in which they were sent.
Source: native/microvm/README.md.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from services.fault_agent.drivers.api import VmmRefusedError, VmmUnreachableError
from services.fault_agent.drivers.unix_socket import JsonLines, connected

TIMEOUT_S = 15.0
"""Longer than the VMM gives a pause."""

Reply = dict[str, Any]


class RefusedError(VmmRefusedError):
    """The microvm refused a command; nothing has changed."""

    def __init__(self, command: str, code: str, why: str) -> None:
        super().__init__(f"{command}: {why} ({code})")
        self.code = code


class ControlClient:
    """One connection. Use it from one event loop; `close` it, or the process leaks a socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._waiting: deque[tuple[str, asyncio.Future[Reply]]] = deque()
        self._loop = asyncio.get_running_loop()
        self._lines = JsonLines(connection, on_message=self._on_answer, on_end=self._on_end)

    @classmethod
    async def connect(
        cls, path: Path, *, timeout_s: float, alive: Callable[[], bool]
    ) -> ControlClient:
        """Connect as soon as the microvm listens.

        Raises:
            VmmUnreachableError: `alive()` is False, or nobody listens within `timeout_s`.
        """
        try:
            async with asyncio.timeout(timeout_s):
                return cls(await connected(path, alive))
        except TimeoutError:
            raise VmmUnreachableError(f"nobody at {path} within {timeout_s:g} s") from None

    def send(
        self, command: str, *, fds: Sequence[int] = (), **members: object
    ) -> asyncio.Future[Reply]:
        """Send a command; its answer, or what became of it, is in the future.

        `fds` stay the caller's. A future that is cancelled leaves the command running.

        Raises:
            VmmUnreachableError: no connection.
        """
        if self._lines.closed:
            raise VmmUnreachableError("the control connection has ended")
        line = json.dumps({"cmd": command, **members}).encode() + b"\n"
        try:
            # A line is short: what does not take it has read nothing for hundreds of them.
            sent = socket.send_fds(self._lines.socket, [line], list(fds))
        except OSError as error:
            self._lines.end(f"send: {error.strerror or error}")
            raise VmmUnreachableError(f"the control connection broke: {error}") from error
        if sent != len(line):
            self._lines.end("it does not read")
            raise VmmUnreachableError("the microvm does not read its commands")
        reply: asyncio.Future[Reply] = self._loop.create_future()
        self._waiting.append((command, reply))
        return reply

    async def ask(
        self,
        command: str,
        *,
        fds: Sequence[int] = (),
        timeout_s: float | None = TIMEOUT_S,
        **members: object,
    ) -> Reply:
        """Send a command and return its answer.

        Raises:
            RefusedError: the microvm refused it.
            VmmUnreachableError: no answer within `timeout_s` (None: wait), or no connection.
        """
        reply = self.send(command, fds=fds, **members)
        try:
            async with asyncio.timeout(timeout_s):
                return await reply
        except TimeoutError:
            raise VmmUnreachableError(f"{command}: no answer within {timeout_s:g} s") from None

    def close(self) -> None:
        """End the connection; the microvm runs on. Idempotent."""
        self._lines.end("closed by the agent")

    def _on_answer(self, answer: object) -> None:
        if not isinstance(answer, dict) or not self._waiting:
            self._lines.end("what it sent is no answer")
            return
        command, reply = self._waiting.popleft()
        if reply.done():
            return
        if answer.get("ok") is True:
            reply.set_result(answer)
        else:
            reply.set_exception(
                RefusedError(command, str(answer.get("code")), str(answer.get("error")))
            )
            reply.exception()  # seen: nobody may be waiting any more

    def _on_end(self, why: str) -> None:
        while self._waiting:
            _, reply = self._waiting.popleft()
            if not reply.done():
                reply.set_exception(VmmUnreachableError(f"the control connection: {why}"))
                reply.exception()
