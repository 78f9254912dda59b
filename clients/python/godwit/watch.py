# SPDX-License-Identifier: Apache-2.0
"""Follow a migration over a stream that may break: sans-IO, for both clients.

Wire (server-sent events): each event's data is a migration as JSON, its id the version; a client
that comes back sends the last id it saw as Last-Event-ID. Comments keep the connection alive.
"""

from __future__ import annotations

import json

from godwit.errors import GodwitClientError
from godwit.models import Migration

RETRY_FIRST_S = 0.1
RETRY_MAX_S = 2.0


class WatchState:
    """What has been seen, and when to try again.

    Args:
        unreachable_s_max: how long nothing may be heard while the stream is broken.
    """

    def __init__(self, unreachable_s_max: float) -> None:
        self._unreachable_s_max = unreachable_s_max
        self._last: Migration | None = None
        self._last_id = ""
        self._lost_s: float | None = None
        self._delay_s = RETRY_FIRST_S

    @property
    def is_over(self) -> bool:
        """The last event was the last one."""
        return self._last is not None and self._last.is_terminal

    def headers(self) -> dict[str, str]:
        """For the request that opens the stream."""
        headers = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
        return {**headers, "Last-Event-ID": self._last_id} if self._last_id else headers

    def connected(self) -> None:
        """The stream is open."""
        self._lost_s = None

    def accept(self, event_id: str, data: str) -> tuple[Migration, object] | None:
        """An event: the migration and its JSON, or None where it is nothing new.

        After a reconnection the server may begin with what we have seen: progress that runs
        backwards would be our fault (I12).
        """
        self._delay_s = RETRY_FIRST_S
        try:
            decoded = json.loads(data)
        except ValueError:
            return None  # not one of ours; newer servers may say more than we know
        migration = Migration.from_json(decoded)
        if not migration.migration_id:
            return None
        if self._last is not None and migration.version <= self._last.version:
            return None
        self._last, self._last_id = migration, event_id or str(migration.version)
        return migration, decoded

    def broken(self, now_s: float, error: GodwitClientError) -> float:
        """The stream has ended; how long to wait before the next attempt.

        Args:
            now_s: any monotonic clock.
            error: what to raise when it has been too long.
        """
        if self._lost_s is None:
            self._lost_s = now_s
        if now_s - self._lost_s >= self._unreachable_s_max:
            raise error
        delay_s = self._delay_s
        self._delay_s = min(2 * delay_s, RETRY_MAX_S)
        return delay_s
