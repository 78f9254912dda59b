# SPDX-License-Identifier: Apache-2.0
"""Which pages of a confidential guest are private, as it is sent ahead of the switchover.

The same rules are checked by who sends and by who receives: a page that the two sides do not call
the same would be installed where it has to be imported, and the guest would read it as zeros. No
driver here has private memory yet: `refuse_private_pages` is what arrivals do with a map that names
some.

Source: docs/design/private-pages.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from godwit.agent.v1 import fault_agent_service_pb2 as pb

from services.common.errors import FailedPreconditionError, InvalidArgumentError
from services.fault_agent.page_runs import set_runs

RUNS_MAX = 200_000
"""A run is 12 bytes or so on the wire; gRPC's usual limit of a message is 4 MiB."""
PAGES_MAX = 1 << 52
"""4096 bytes each, this is every address there is."""
_CHUNK_BYTES = 64 << 10
"""Of a bitmap, looked at in one go."""


class PrivateMapError(InvalidArgumentError):
    """PRIVATE_MAP_INVALID: a map that breaks a rule; says which, and where."""

    def __init__(self, message: str) -> None:
        super().__init__("PRIVATE_MAP_INVALID", message)


class PrivateMemoryUnsupportedError(FailedPreconditionError):
    """PRIVATE_MEMORY_UNSUPPORTED: a guest with private pages, and a VMM that cannot import any."""

    def __init__(self, private_count: int) -> None:
        super().__init__(
            "PRIVATE_MEMORY_UNSUPPORTED",
            f"{private_count} pages are private; no driver of this node can import them",
            hint="move this guest while it is shut down",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivateMap:
    """A map that keeps the rules; another one cannot be made.

    Raises:
        PrivateMapError: a run is empty, out of order, overlaps or touches the one before it, leaves
            the guest; there are too many.
    """

    page_count: int
    """Pages of the guest. 1..PAGES_MAX."""
    runs: tuple[tuple[int, int], ...]
    """(first page, count > 0): ascending, at least one shared page between two."""

    def __post_init__(self) -> None:
        if not 1 <= self.page_count <= PAGES_MAX:
            raise PrivateMapError(f"page_count is {self.page_count}, not 1..{PAGES_MAX}")
        if len(self.runs) > RUNS_MAX:
            raise PrivateMapError(f"{len(self.runs)} runs are more than {RUNS_MAX}")
        free = 0
        for index, (first, count) in enumerate(self.runs):
            what = f"run {index} of {count} pages at {first}"
            if count < 1:
                raise PrivateMapError(f"{what} is empty")
            if first < free:
                raise PrivateMapError(f"{what} must begin at {free} or later")
            if first + count > self.page_count:
                raise PrivateMapError(f"{what} ends after the guest's {self.page_count} pages")
            free = first + count + 1

    @classmethod
    def of_bitmap(cls, bitmap: bytes, page_count: int) -> PrivateMap:
        """From `bitmap`: bit i (LSB first) = page i, set = private; none past the end.

        Raises:
            PrivateMapError: its length is another; a bit past the end; the rest.
        """
        if len(bitmap) != (page_count + 7) // 8:
            raise PrivateMapError(f"{len(bitmap)} bytes are no bitmap of {page_count} pages")
        runs: list[tuple[int, int]] = []
        for start in range(0, len(bitmap), _CHUNK_BYTES):
            for first, count in set_runs(bitmap[start : start + _CHUNK_BYTES], start * 8):
                # A run that a chunk's edge has cut.
                before = runs.pop() if runs and sum(runs[-1]) == first else (first, 0)
                runs.append((before[0], before[1] + count))
        return cls(page_count=page_count, runs=tuple(runs))

    @classmethod
    def read(cls, message: pb.PrivateMap, page_count: int) -> PrivateMap:
        """What a peer sent, of a guest of `page_count` pages.

        Raises:
            PrivateMapError: it is of another size, or breaks a rule.
        """
        if message.page_count != page_count:
            raise PrivateMapError(
                f"it is of {message.page_count} pages, the guest has {page_count}"
            )
        runs = tuple((run.first_page, run.page_count) for run in message.private_runs)
        return cls(page_count=page_count, runs=runs)

    def message(self) -> pb.PrivateMap:
        """For the wire."""
        return pb.PrivateMap(
            page_count=self.page_count,
            private_runs=[pb.PageRun(first_page=f, page_count=n) for f, n in self.runs],
        )

    def bitmap(self) -> bytes:
        """What `of_bitmap` takes."""
        found = bytearray((self.page_count + 7) // 8)
        for first, count in self.runs:
            begin, end = first // 8, (first + count + 7) // 8
            bits = ((1 << count) - 1) << first % 8
            bits |= int.from_bytes(found[begin:end], "little")
            found[begin:end] = bits.to_bytes(end - begin, "little")
        return bytes(found)

    @property
    def private_count(self) -> int:
        """Pages that are private."""
        return sum(count for _, count in self.runs)

    def changed_since(self, before: PrivateMap) -> Iterator[tuple[int, int]]:
        """Runs of pages that the guest has converted, either way, since an earlier map of it.

        Raises:
            PrivateMapError: the other one is of another guest.
        """
        if before.page_count != self.page_count:
            raise PrivateMapError(f"maps of {before.page_count} and {self.page_count} pages")
        # Every edge of either map turns "differs" on or off; two edges at one place do nothing.
        edges: set[int] = set()
        for first, count in (*before.runs, *self.runs):
            edges ^= {first, first + count}
        places = iter(sorted(edges))
        for first, end in zip(places, places, strict=True):
            yield first, end - first


def refuse_private_pages(message: pb.PrivateMap, page_count: int | None = None) -> None:
    """Refuse a guest with private pages: to install them as if they were shared would lose them.

    `page_count`: the guest's, where it is known; else that of the message.

    Raises:
        PrivateMapError: the map itself is wrong.
        PrivateMemoryUnsupportedError: it names private pages.
    """
    if message == pb.PrivateMap():
        return
    found = PrivateMap.read(message, message.page_count if page_count is None else page_count)
    if found.runs:
        raise PrivateMemoryUnsupportedError(found.private_count)
