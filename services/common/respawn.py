# SPDX-License-Identifier: Apache-2.0
"""Runs a service in a child of this process, and at once again when the child is killed.

A guest waits for the pages that an agent answers. To start Python and import a service costs most
of a second of processor time, seconds on a busy host; to fork a process that has imported it costs
milliseconds. So the parent imports, and does nothing else: it has no thread, no loop, no socket,
and little that could fail. If it is killed itself its child goes with it (two agents on one journal
would each believe their own), and whoever started it starts both again.

Rejected: a spare that waits for the lock of the state directory. It would have to be started, and
looked after, by somebody as well, and to learn of the death it would poll.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType

_PR_SET_PDEATHSIG = 1
_KILLED = 128 + signal.SIGKILL
"""Exit status that a test's hook point ends a process with, as kill -9 would."""
_SHORT_S = 1.0
_DELAYS_S = (0.0, 0.1, 0.5, 2.0, 5.0)
"""Before the n-th new child in a row whose predecessor lived shorter than _SHORT_S."""
_TOLD_BYTES_MAX = 4096
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)

Tell = Callable[[str], None]
Work = Callable[[str, Tell], int]
"""Called in the child with what its predecessor told its successor, at first "", and with a way to
tell its own; returns the exit status."""


def keep_alive(work: Work) -> int:
    """Run `work` in a child until it ends by itself; its exit status.

    A child that is killed, by whatever signal, is followed by the next. SIGTERM and SIGINT are its
    business; once one has come there is no next. Call it from a process without threads.
    """
    parent = _Parent(work)
    before = {number: signal.signal(number, parent.forward) for number in _FORWARDED}
    # What is imported by now is shared with every child: nobody writes to it. Not collected first:
    # the first child is waited for as well, and there is no garbage.
    gc.freeze()
    try:
        return parent.run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Parent:
    def __init__(self, work: Work) -> None:
        self._work = work
        self._told = ""
        self._child = 0
        self._stopping = False

    def forward(self, number: int, _frame: FrameType | None) -> None:
        """Hand a signal on to the child."""
        self._stopping = self._stopping or number != signal.SIGUSR2
        if self._child:
            os.kill(self._child, number)

    def run(self) -> int:
        """One child after the other."""
        short_lives = 0
        while True:
            began = time.monotonic()
            status = self._one_life()
            killed = os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == _KILLED
            if not killed or self._stopping:
                return _KILLED if killed else os.waitstatus_to_exitcode(status)
            short_lives = short_lives + 1 if time.monotonic() - began < _SHORT_S else 0
            print("the service was killed, it is started again", file=sys.stderr, flush=True)  # noqa: T201
            time.sleep(_DELAYS_S[min(short_lives, len(_DELAYS_S) - 1)])

    def _one_life(self) -> int:
        reader, writer = os.pipe()
        # Blocked until both know of each other: a signal in between would be lost.
        signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
        parent = os.getpid()
        self._child = os.fork()
        if self._child == 0:
            os.close(reader)
            self._live(parent, writer)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
        os.close(writer)
        _, status = os.waitpid(self._child, 0)
        self._child = 0
        if told := os.read(reader, _TOLD_BYTES_MAX):
            self._told = told.decode().splitlines()[-1]
        os.close(reader)
        return status

    def _live(self, parent: int, writer: int) -> None:
        """The child's whole life; it never returns into the parent's frames."""
        status = 1
        try:
            for number in _FORWARDED:
                signal.signal(number, signal.SIG_DFL)
            _die_with(parent)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
            status = self._work(self._told, lambda text: _tell(writer, text))
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        except BaseException:  # noqa: BLE001 - a bug is told as the interpreter would
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)


def _tell(writer: int, text: str) -> None:
    os.write(writer, text.encode() + b"\n")


def _die_with(parent: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before it was said
        os._exit(_KILLED)
