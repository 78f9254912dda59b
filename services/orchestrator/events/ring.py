# SPDX-License-Identifier: Apache-2.0
"""The last changes, in order, bounded by number and by size. Sans-IO."""

from __future__ import annotations

import itertools
from collections import deque

from services.orchestrator.events.model import Change


class GoneError(Exception):
    """Changes were let go of that the asker has not seen."""


class Ring:
    """Numbers changes from 1, without gaps, and keeps the last ones.

    Args:
        count_max: how many are kept.
        bytes_max: of their messages together; the newest is kept whatever its size.
    """

    def __init__(self, count_max: int, bytes_max: int) -> None:
        self._count_max = count_max
        self._bytes_max = bytes_max
        self._changes: deque[tuple[Change, int]] = deque()
        self._bytes = 0
        self.last = 0
        """Number of the newest there was; 0: none yet."""

    def append(self, change: Change) -> None:
        """Add the newest, and let go of the oldest beyond the bounds."""
        self.last += 1
        change.sequence = self.last
        size = change.message.ByteSize()
        self._changes.append((change, size))
        self._bytes += size
        while len(self._changes) > self._count_max or (
            self._bytes > self._bytes_max and len(self._changes) > 1
        ):
            self._bytes -= self._changes.popleft()[1]

    def since(self, sequence: int) -> list[Change]:
        """All after number `sequence`, in order.

        Raises:
            GoneError: not all of them are there any more, or it is a number that was never given.
        """
        missing = self.last - sequence
        if not 0 <= missing <= len(self._changes):
            raise GoneError
        newest = itertools.islice(reversed(self._changes), missing)
        return [change for change, _size in newest][::-1]
