# SPDX-License-Identifier: Apache-2.0
"""Tells watchers that a migration was written. They read it again: nothing is handed on here."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator


class Changes:
    """Who waits for which migration."""

    def __init__(self) -> None:
        self._waiting: dict[str, set[asyncio.Event]] = defaultdict(set)
        self.on_publish: list[Callable[[str], None]] = []
        """Hear the id of every migration that was written."""
        self.closed = False
        """True once the process drains: watchers end."""

    def publish(self, migration_id: str) -> None:
        """The migration was written."""
        for event in self._waiting.get(migration_id, ()):
            event.set()
        for hear in self.on_publish:
            hear(migration_id)

    def publish_all(self) -> None:
        """Any of them may have been written, by another process."""
        for events in self._waiting.values():
            for event in events:
                event.set()

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
        self.publish_all()
