# SPDX-License-Identifier: Apache-2.0
"""Tells who waits that something was written. They read it again: nothing is handed on here."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator

from services.orchestrator.events.model import Kind, Subject


class Changes:
    """Who waits for which migration, and who hears of everything."""

    def __init__(self) -> None:
        self._waiting: dict[str, set[asyncio.Event]] = defaultdict(set)
        self.on_publish: list[Callable[[Subject | None], None]] = []
        """Hear of everything that was written; None: anything may have been."""
        self.on_close: list[Callable[[], None]] = []
        self.closed = False
        """True once the process drains: watchers end."""

    def publish(self, key: str, kind: Kind = Kind.MIGRATION) -> None:
        """It was written."""
        if kind is Kind.MIGRATION:
            for event in self._waiting.get(key, ()):
                event.set()
        for hear in self.on_publish:
            hear((kind, key))

    def publish_all(self) -> None:
        """Anything may have been written, by another process."""
        for events in self._waiting.values():
            for event in events:
                event.set()
        for hear in self.on_publish:
            hear(None)

    @contextlib.contextmanager
    def subscribe(self, migration_id: str) -> Iterator[asyncio.Event]:
        """An event that every write of the migration sets. The caller clears it."""
        event = asyncio.Event()
        self._waiting[migration_id].add(event)
        try:
            yield event
        finally:
            self._waiting[migration_id].discard(event)
            if not self._waiting[migration_id]:
                del self._waiting[migration_id]

    def close(self) -> None:
        """End every watch."""
        self.closed = True
        for hear in self.on_close:
            hear()
