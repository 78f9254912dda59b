# SPDX-License-Identifier: Apache-2.0
"""Follow something over a stream that may break: sans-IO, for both clients.

Wire (server-sent events): each event's data is JSON; a client that comes back sends the last id it
saw as Last-Event-ID. Comments keep the connection alive. Of one migration or operation an event's
id is the version; of the fleet the id is the server's business, and where the events after it are
gone the server says `reset`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from godwit.errors import GodwitApiError, GodwitClientError
from godwit.models import Migration, Node
from godwit.operations import Operation

RETRY_FIRST_S = 0.1
RETRY_MAX_S = 2.0
_CUT = 429
"""HTTP status that stands for a stream which the server has cut: it takes too much."""


class Versioned(Protocol):
    """A migration or an operation."""

    @property
    def version(self) -> int:
        """Rises with every change; 0: it is none."""


VersionedT = TypeVar("VersionedT", bound=Versioned)
NewsT = TypeVar("NewsT")


class Stream(Generic[NewsT]):
    """Where a stream is, and when to try again.

    Args:
        unreachable_s_max: how long nothing may be heard while the stream is broken.
    """

    def __init__(self, unreachable_s_max: float) -> None:
        self._unreachable_s_max = unreachable_s_max
        self._last_id = ""
        self._lost_s: float | None = None
        self._delay_s = RETRY_FIRST_S

    @property
    def is_over(self) -> bool:
        """The last event was the last one."""
        return False

    def accept(self, name: str, event_id: str, data: str) -> tuple[NewsT, object] | None:
        """An event: what it says and its JSON, or None where it is nothing new.

        Raises:
            GodwitApiError: the server has cut the stream, and says why.
        """
        self._delay_s = RETRY_FIRST_S
        try:
            decoded = json.loads(data)
        except ValueError:
            return None  # not one of ours; newer servers may say more than we know
        if name == "problem":
            raise GodwitApiError.from_problem(_CUT, decoded, data)
        news = self._read(name, decoded)
        if news is None:
            return None
        self._last_id = event_id or self._last_id
        return news, decoded

    def _read(self, name: str, decoded: Any) -> NewsT | None:
        raise NotImplementedError

    def headers(self) -> dict[str, str]:
        """For the request that opens the stream."""
        headers = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
        return {**headers, "Last-Event-ID": self._last_id} if self._last_id else headers

    def connected(self) -> None:
        """The stream is open."""
        self._lost_s = None

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


class WatchState(Stream[VersionedT]):
    """One subject, to its end.

    Args:
        read: from JSON.
        is_last: whether it will not change any more.
        unreachable_s_max: see Stream.
    """

    def __init__(
        self,
        read: Callable[[Any], VersionedT],
        is_last: Callable[[VersionedT], bool],
        unreachable_s_max: float,
    ) -> None:
        super().__init__(unreachable_s_max)
        self._from_json = read
        self._is_last = is_last
        self._last: VersionedT | None = None

    @classmethod
    def of_migration(cls, unreachable_s_max: float) -> WatchState[Migration]:
        """Until it is terminal."""
        return WatchState(Migration.from_json, lambda each: each.is_terminal, unreachable_s_max)

    @classmethod
    def of_operation(cls, unreachable_s_max: float) -> WatchState[Operation]:
        """Until it has ended."""
        return WatchState(Operation.from_json, lambda each: each.has_ended, unreachable_s_max)

    @property
    def is_over(self) -> bool:
        """The last event was the last one."""
        return self._last is not None and self._is_last(self._last)

    def _read(self, name: str, decoded: Any) -> VersionedT | None:  # noqa: ARG002
        """After a reconnection the server may begin with what we have seen.

        Progress that runs backwards would be our fault (I12).
        """
        found = self._from_json(decoded)
        if found.version <= (self._last.version if self._last is not None else 0):
            return None
        self._last = found
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetEvent:
    """Something that changed in the fleet.

    Attributes:
        name: migration, operation, node; began: nothing was missed; reset: list again.
        value: of the first three: as it was then.
    """

    name: str
    value: Migration | Operation | Node | None = None


_READ: dict[str, Callable[[Any], Migration | Operation | Node]] = {
    "migration": Migration.from_json,
    "operation": Operation.from_json,
    "node": Node.from_json,
}


class FleetState(Stream[FleetEvent]):
    """The fleet, for ever."""

    def _read(self, name: str, decoded: Any) -> FleetEvent | None:
        if name in ("began", "reset"):
            return FleetEvent(name=name)
        read = _READ.get(name)  # None: of a kind that we do not know
        return FleetEvent(name=name, value=read(decoded)) if read else None
