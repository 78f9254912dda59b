# SPDX-License-Identifier: Apache-2.0
"""Follow the consoles of a guest, one file a run, and read what the workload says.

A run is one stay of the guest on one node: (node, epoch). Its VMM appends to a file of its own.
Source: guest/workload.c has the lines.
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

_POLL_S = 0.001
_READ_BYTES = 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One complete line.

    Attributes:
        t_ns: CLOCK_MONOTONIC, latest time it can have been complete: when it was read.
        since_ns: earliest time: when the file was last read without it. Two runs' lines are in
            an order that is proved only if these intervals do not overlap.
        text: without line end.
    """

    t_ns: int
    since_ns: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """Attributes: number (from 1, by one), totals so far of pages dirtied, wrong, verified."""

    number: int
    ops: int
    errors: int
    sweeps: int
    verified: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """A pass over all pages: `state` is "begin", "end" or "cut" (restarted by command)."""

    number: int
    state: str
    verified: int
    errors: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskReport:
    """Totals so far: rounds of write and read back, wrong blocks, failed calls."""

    rounds: int
    bad: int
    errors: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NetReport:
    """Totals so far: pings sent, answered, not answered."""

    sent: int
    answered: int
    lost: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PageError:
    """A page that does not hold what was written; `kind` is zero, stale or torn."""

    page: int
    generation: int
    found: int
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Boot:
    """The workload started: once in a guest's life."""

    boot_id: str
    pages: int
    workers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Panic:
    """The guest's kernel is in trouble: panic, BUG, oops, stall."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Other:
    """A line that is none of the above, the kernel's or half a line."""

    text: str


Record = Heartbeat | Sweep | DiskReport | NetReport | PageError | Boot | Panic | Other


@dataclass(slots=True, kw_only=True)
class Console:
    """What one run has said.

    Attributes:
        node: node name.
        epoch: the ownership it ran under.
        lines: complete lines, in order.
        tail: bytes after the last line end. A guest stopped in the middle of a line says the
            rest of it at the destination: verdict.py joins the two.
    """

    node: str
    epoch: int
    lines: list[Line] = field(default_factory=list)
    tail: str = ""


_PANIC = re.compile(r"Kernel panic|\bBUG:|\bOops\b|general protection fault|rcu.*\bstall")
_PATTERNS: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], Record]], ...] = (
    (
        re.compile(r"HB (\d+) ops=(\d+) err=(\d+) sweeps=(\d+) verified=(\d+)"),
        lambda m: Heartbeat(
            number=int(m[1]), ops=int(m[2]), errors=int(m[3]), sweeps=int(m[4]), verified=int(m[5])
        ),
    ),
    (
        re.compile(r"SWEEP (\d+) (begin|end|cut) verified=(\d+) err=(\d+)"),
        lambda m: Sweep(number=int(m[1]), state=m[2], verified=int(m[3]), errors=int(m[4])),
    ),
    (
        re.compile(r"DISK n=(\d+) bad=(\d+) err=(\d+)"),
        lambda m: DiskReport(rounds=int(m[1]), bad=int(m[2]), errors=int(m[3])),
    ),
    (
        re.compile(r"NET sent=(\d+) ok=(\d+) lost=(\d+)"),
        lambda m: NetReport(sent=int(m[1]), answered=int(m[2]), lost=int(m[3])),
    ),
    (
        re.compile(r"WL ERR page=(\d+) gen=(\d+) found=(\d+) kind=(\w+)"),
        lambda m: PageError(page=int(m[1]), generation=int(m[2]), found=int(m[3]), kind=m[4]),
    ),
    (
        re.compile(r"BOOT (\S+) pages=(\d+) workers=(\d+)"),
        lambda m: Boot(boot_id=m[1], pages=int(m[2]), workers=int(m[3])),
    ),
)


def parse(text: str) -> Record:
    """What a line says; Other where it is not, from first to last character, one of ours."""
    for pattern, make in _PATTERNS:
        if match := pattern.fullmatch(text):
            return make(match)
    return Panic(text=text) if _PANIC.search(text) else Other(text=text)


class LineSplitter:
    """Bytes in, lines out; keeps the unfinished rest."""

    def __init__(self) -> None:
        self._rest = b""

    @property
    def tail(self) -> str:
        """The unfinished rest."""
        return self._rest.decode(errors="replace")

    def feed(self, data: bytes, *, t_ns: int, since_ns: int) -> list[Line]:
        """The lines that `data` completes; for the times see Line."""
        *complete, self._rest = (self._rest + data).split(b"\n")
        return [
            Line(t_ns=t_ns, since_ns=since_ns, text=line.rstrip(b"\r").decode(errors="replace"))
            for line in complete
        ]


class _Followed:
    def __init__(self, path: Path, console: Console) -> None:
        self.path = path
        self.console = console
        self.fd: int | None = None
        self.splitter = LineSplitter()
        self.drained_ns = 0  # when the last round that read everything began

    def poll(self) -> bool:
        """Read all that is new; whether a line was."""
        began_ns = time.monotonic_ns()
        before = len(self.console.lines)
        try:
            if self.fd is None:
                self.fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            while data := os.read(self.fd, _READ_BYTES):
                self.console.lines += self.splitter.feed(
                    data, t_ns=time.monotonic_ns(), since_ns=self.drained_ns
                )
        except FileNotFoundError:
            pass  # its VMM has not started
        self.drained_ns = began_ns
        self.console.tail = self.splitter.tail
        return len(self.console.lines) > before

    def close(self) -> None:
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


class ConsoleFollower:
    """Stamps lines as they arrive, in a thread: a busy event loop does not move the stamps.

    By polling each millisecond: QEMU writes a console byte by byte, and inotify would wake us for
    each. Use as an async context manager; methods are for the event loop's thread.
    """

    def __init__(self) -> None:
        self._followed: list[_Followed] = []
        self._stop = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="console-follower")

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop.set()
        await asyncio.to_thread(self._thread.join)
        for followed in self._followed:
            followed.poll()
            followed.close()

    def add(self, path: Path, *, node: str, epoch: int) -> Console:
        """Follow a file, which need not exist yet, as the next run; it grows as lines arrive."""
        console = Console(node=node, epoch=epoch)
        self._followed.append(_Followed(path, console))
        return console

    @property
    def consoles(self) -> list[Console]:
        """All runs in the order they were added."""
        return [followed.console for followed in self._followed]

    async def wait_for(
        self, console: Console, wanted: Callable[[Record], bool], *, start: int = 0
    ) -> int:
        """Index of the first line from `start` on whose record is wanted; waits for it."""
        position = start
        while True:
            changed = self._changed  # taken before the look: no line can fall in between
            while position < len(console.lines):
                if wanted(parse(console.lines[position].text)):
                    return position
                position += 1
            await changed.wait()

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _run(self) -> None:
        assert self._loop is not None
        while not self._stop.wait(_POLL_S):
            news = [followed.poll() for followed in tuple(self._followed)]
            if any(news):
                self._loop.call_soon_threadsafe(self._notify)
