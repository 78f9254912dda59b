# SPDX-License-Identifier: Apache-2.0
"""Pipes between the agent and a VMM: one way, so that the VMM cannot learn what the peer thinks."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import select
import struct
import termios
from types import TracebackType
from typing import Self

DRAIN_POLL_S_MIN = 0.0002
DRAIN_POLL_S_MAX = 0.02
"""A pipe does not tell when it is empty; a guest stands still meanwhile."""


class _Pipe:
    """Both ends of a pipe; one is handed to the VMM and then closed here."""

    def __init__(self, size_bytes: int, *, ours: int) -> None:
        ends = os.pipe2(os.O_CLOEXEC)
        self._ours, self.other_end = ends[ours], ends[1 - ours]
        os.set_blocking(self._ours, False)
        # The VMM shall not wait for us; the default stays where the user's limit is reached.
        with contextlib.suppress(PermissionError):
            fcntl.fcntl(self._ours, fcntl.F_SETPIPE_SZ, size_bytes)
        self._size_bytes = size_bytes

    def close_other_end(self) -> None:
        """The VMM has its own reference now; ours would hide its death. Idempotent."""
        if self.other_end >= 0:
            os.close(self.other_end)
            self.other_end = -1

    def close(self) -> None:
        """End our side. Idempotent."""
        if self._ours >= 0:
            os.close(self._ours)
            self._ours = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close_other_end()
        self.close()


class PipeReader(_Pipe):
    """We read what the VMM writes."""

    def __init__(self, size_bytes: int) -> None:
        super().__init__(size_bytes, ours=0)

    async def read(self) -> bytes:
        """Some bytes; empty at the end."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                return os.read(self._ours, self._size_bytes)
            except BlockingIOError:
                readable = asyncio.Event()
                loop.add_reader(self._ours, readable.set)
                try:
                    await readable.wait()
                finally:
                    loop.remove_reader(self._ours)


class PipeWriter(_Pipe):
    """The VMM reads what we write."""

    def __init__(self, size_bytes: int) -> None:
        super().__init__(size_bytes, ours=1)

    async def write(self, data: bytes) -> None:
        """Write all of it.

        Raises:
            BrokenPipeError: the VMM has closed its end.
        """
        loop = asyncio.get_running_loop()
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._ours, view) :]
            except BlockingIOError:
                writable = asyncio.Event()
                loop.add_writer(self._ours, writable.set)
                try:
                    await writable.wait()
                finally:
                    loop.remove_writer(self._ours)

    async def drained(self) -> None:
        """Return once the VMM has read all of it.

        Raises:
            BrokenPipeError: the VMM has closed its end.
        """
        poll = select.poll()
        poll.register(self._ours, 0)
        delay_s = DRAIN_POLL_S_MIN
        while struct.unpack("i", fcntl.ioctl(self._ours, termios.FIONREAD, bytes(4)))[0]:
            if poll.poll(0):
                raise BrokenPipeError
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 2, DRAIN_POLL_S_MAX)
