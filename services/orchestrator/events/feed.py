# SPDX-License-Identifier: Apache-2.0
"""Hears that subjects were written, reads them again, tells all who watch.

However many watch, a subject is read and rendered once a change, and of its changes within GATHER_S
only the last. What a watcher costs is bounded whatever he does: one of the fleet has a position in
the ring that all share, and is cut when the ring has gone on beyond it; one of a single subject has
that subject's last change. While nobody watches, and nobody may come back, nothing is read.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import Iterator
from typing import Protocol

from ulid import ULID

from services.common.errors import GodwitError, ResourceExhaustedError
from services.orchestrator.changes import Changes
from services.orchestrator.events.model import (
    Began,
    Change,
    Kind,
    Reset,
    Subject,
    Told,
)
from services.orchestrator.events.ring import GoneError, Ring

log = logging.getLogger(__name__)

COUNT_MAX = 4096
BYTES_MAX = 8 << 20
"""Of the messages that the ring keeps. Rendered they take some four times as much beside."""
GATHER_S = 0.1
KEEP_S = 300.0
"""How long changes are kept for somebody to come back when nobody watches any more."""
RETRY_S = 1.0
DIRTY_MAX = 20_000
"""Subjects that wait to be read, of a store that does not answer; beyond it all list again."""
READ_MAX = 200
"""Subjects that are read in one go."""
WAKE_MAX = 32
"""Watchers that are woken in one go: requests come in between."""


class Reader(Protocol):
    """Where subjects are read."""

    async def read(self, subjects: list[Subject]) -> list[Change]:
        """As they are now, in the order given; what is not there is left out."""

    async def unfinished(self) -> dict[Subject, int]:
        """Versions of what may change without this process' hearing of it."""


class Feed:
    """What changes. `run` is its life."""

    def __init__(self, reader: Reader, changes: Changes) -> None:
        self.reader = reader
        self._changes = changes
        self._watchers: dict[Subject | None, set[Watcher]] = {}
        self.count = 0
        """How many watch."""
        self._until = 0.0
        """Until when changes are kept though nobody watches; monotonic."""
        self._token = ""
        self._ring = Ring(COUNT_MAX, BYTES_MAX)
        self._told: dict[Subject, tuple[int, bytes]] = {}
        """Version and digest of what was told last of each subject that may still change."""
        self._dirty: dict[Subject, None] = {}
        self._look_at_all = False
        self._wake = asyncio.Event()
        changes.on_publish.append(self._published)
        changes.on_close.append(self._closed)

    @property
    def closed(self) -> bool:
        """The process drains: watches end."""
        return self._changes.closed

    def position(self, sequence: int | None = None) -> str:
        """The name of a place in the ring; of its end."""
        return f"{self._token}-{self._ring.last if sequence is None else sequence}"

    # --- what is heard ---

    def _published(self, subject: Subject | None) -> None:
        if not self.count and time.monotonic() >= self._until:
            self._forget()
            return
        if subject is None:
            self._look_at_all = True
        elif len(self._dirty) < DIRTY_MAX or subject in self._dirty:
            self._dirty[subject] = None
        else:
            log.warning("more than %d subjects wait to be read: watchers list again", DIRTY_MAX)
            self._dirty.clear()
            self._begin_anew()
        self._wake.set()

    def _closed(self) -> None:
        for watchers in self._watchers.values():
            for watcher in watchers:
                watcher.wake()

    def _forget(self) -> None:
        if self._token:
            self._token = ""
            self._told.clear()
            self._dirty.clear()
            self._ring = Ring(COUNT_MAX, BYTES_MAX)

    def _begin_anew(self) -> None:
        """Every position there was leads to a Reset."""
        self._token = str(ULID()).lower()
        self._ring = Ring(COUNT_MAX, BYTES_MAX)

    # --- telling ---

    async def run(self) -> None:
        """For ever."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                await self._tell()
            except GodwitError as error:
                log.warning("changes could not be read: %s", error)
                self._wake.set()
                await asyncio.sleep(RETRY_S)
            await asyncio.sleep(GATHER_S)

    async def _tell(self) -> None:
        if self._look_at_all:
            there = await self.reader.unfinished()
            self._look_at_all = False
            known = {each: version for each, (version, _) in self._told.items() if version}
            changed = [each for each, version in there.items() if known.get(each) != version]
            # What is not unfinished any more has ended: it is read once more. So is what somebody
            # watches of which nothing was told yet: it may have ended since he began.
            watched = {each for each in self._watchers if each is not None}
            ended = (known.keys() | watched) - there.keys()
            self._dirty |= dict.fromkeys([*changed, *ended])
        while self._dirty:
            subjects = list(self._dirty)[:READ_MAX]
            for subject in subjects:
                del self._dirty[subject]
            try:
                changes = await self.reader.read(subjects)
            except GodwitError:
                self._dirty |= dict.fromkeys(subjects)
                raise
            news = [change for change in changes if self._is_news(change)]
            self._dirty |= {change.moves: None for change in news if change.moves}
            await self._tell_all(news)

    def _is_news(self, change: Change) -> bool:
        whole = change.message.SerializeToString(deterministic=True)
        told = change.version, hashlib.blake2b(whole, digest_size=16).digest()
        if self._told.get(change.subject) == told:
            return False
        if change.ended:
            self._told.pop(change.subject, None)
        else:
            self._told[change.subject] = told
        return True

    async def _tell_all(self, changes: list[Change]) -> None:
        woken: dict[Watcher, None] = {}
        for change in changes:
            self._ring.append(change)
            for watcher in self._watchers.get(change.subject, ()):
                watcher.latest = change
                woken[watcher] = None
        if changes:
            woken |= dict.fromkeys(self._watchers.get(None, ()))
        for number, watcher in enumerate(woken, start=1):
            watcher.wake()
            if number % WAKE_MAX == 0:
                await asyncio.sleep(0)

    # --- watching ---

    @contextlib.contextmanager
    def watching(self, subject: Subject | None = None) -> Iterator[Watcher]:
        """Watch one subject, or (None) the fleet, for the length of the block."""
        if not self._token:
            self._begin_anew()
        watcher = Watcher(self)
        self._watchers.setdefault(subject, set()).add(watcher)
        self.count += 1
        try:
            yield watcher
        finally:
            self.count -= 1
            self._until = time.monotonic() + KEEP_S
            self._watchers[subject].discard(watcher)
            if not self._watchers[subject]:
                del self._watchers[subject]

    def since(self, position: str) -> list[Change]:
        """What came after a position.

        Raises:
            GoneError: it is not kept any more, or was never a position of this feed.
        """
        token, _, number = position.rpartition("-")
        if token != self._token or not (number.isascii() and number.isdecimal()):
            raise GoneError
        return self._ring.since(int(number))


class Watcher:
    """One who watches. Of one subject `latest` is there, of the fleet everything is in the ring."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._event = asyncio.Event()
        self.latest: Change | None = None
        """The subject's last change that was not taken yet."""

    def wake(self) -> None:
        """Something may be there."""
        self._event.set()

    async def wait(self, wait_s: float | None) -> bool:
        """Until something may be there; False: nothing was for so long."""
        try:
            async with asyncio.timeout(wait_s):
                await self._event.wait()
        except TimeoutError:
            return False
        self._event.clear()
        return True


def begin(feed: Feed, after: str) -> Told:
    """How a watch of the fleet begins."""
    if not after:
        return Told(what=Began(), position=feed.position())
    try:
        feed.since(after)
    except GoneError:
        return Told(what=Reset(), position=feed.position())
    return Told(what=Began(), position=after)


def tell_since(feed: Feed, position: str, kinds: frozenset[Kind]) -> tuple[list[Told], str]:
    """What came after a position, of some kinds, and the position after all that came.

    Raises:
        ResourceExhaustedError: WATCHER_TOO_SLOW.
    """
    end = feed.position()
    try:
        changes = feed.since(position)
    except GoneError:
        if position.rpartition("-")[0] != end.rpartition("-")[0]:
            return [Told(what=Reset(), position=end)], end
        raise ResourceExhaustedError(
            "WATCHER_TOO_SLOW",
            f"more than {COUNT_MAX} changes, or {BYTES_MAX >> 20} MiB, came before they were taken",
            hint="come back, and list again; watch fewer kinds, or read faster",
        ) from None
    return [
        Told(what=change, position=feed.position(change.sequence))
        for change in changes
        if change.subject[0] in kinds
    ], end
