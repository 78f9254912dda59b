# SPDX-License-Identifier: Apache-2.0
"""The part of the service layer that is about watching."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable

from services.orchestrator.events.feed import Feed, begin, tell_since
from services.orchestrator.events.model import Kind, Silence, Told
from services.orchestrator.store.migrations import migration_unknown
from services.orchestrator.store.operations import operation_unknown

_UNKNOWN = {Kind.MIGRATION: migration_unknown, Kind.OPERATION: operation_unknown}


class Events:
    """What can be watched."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed

    @property
    def count(self) -> int:
        """How many watch."""
        return self._feed.count

    async def fleet(
        self, kinds: Iterable[Kind] = (), after: str = "", *, ping_s: float | None = None
    ) -> AsyncIterator[Told]:
        """What changes from now on, or after a position; Silence after each `ping_s` of it.

        Begins with Began or Reset. A Reset may come later as well.

        Raises:
            ResourceExhaustedError: WATCHER_TOO_SLOW.
        """
        wanted = frozenset(kinds) or frozenset(Kind)
        with self._feed.watching() as watcher:
            told = begin(self._feed, after)
            position = told.position
            yield told
            while not self._feed.closed:
                # What was not wanted is passed by too: nobody has to look through it again.
                news, position = tell_since(self._feed, position, wanted)
                for told in news:
                    yield told
                if self._feed.closed:
                    return
                if not await watcher.wait(ping_s):
                    yield Told(what=Silence(), position=position)

    async def one(
        self, kind: Kind, key: str, *, seen: int = 0, ping_s: float | None = None
    ) -> AsyncIterator[Told]:
        """A migration or an operation at every change until it has ended, its present state first.

        `seen`: the version that the caller has.

        Raises:
            NotFoundError: MIGRATION_UNKNOWN, OPERATION_UNKNOWN.
        """
        subject = (kind, key)
        with self._feed.watching(subject) as watcher:
            change = next(iter(await self._feed.reader.read([subject])), None)
            if change is None:
                raise _UNKNOWN[kind](key)
            if change.version < seen:
                seen = 0  # of another life of this store
            while True:
                if change is not None and change.version > seen:
                    seen = change.version
                    yield Told(what=change, position=str(seen))
                if (change is not None and change.ended) or self._feed.closed:
                    return
                heard = await watcher.wait(ping_s)
                change, watcher.latest = watcher.latest, None
                if not heard:
                    yield Told(what=Silence(), position=str(seen))

    async def require(self, kind: Kind, key: str) -> None:
        """Refuse to watch what is not there.

        Raises:
            NotFoundError: MIGRATION_UNKNOWN, OPERATION_UNKNOWN.
        """
        if not await self._feed.reader.read([(kind, key)]):
            raise _UNKNOWN[kind](key)
