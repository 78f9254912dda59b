# SPDX-License-Identifier: Apache-2.0
"""The userfault bitmap of every VM in flight, as the destinations' agents report it.

In memory one byte a page (1 = absent): runs are set, counted and found at memory speed by bytes'
own methods, where a list of runs would cost a Python loop over every hole of a scattered guest at
each delta. It is there only while pages are absent: a resident guest costs nothing. The store has
it deflated, which is a run-length code of exactly such bytes, written at a bounded rate; it may be
older than what was shown last, and is replaced by the first message of the next stream, which has
the bitmap whole.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from godwit.agent.v1 import fault_agent_service_pb2 as agent_pb2

from services.common.errors import InvalidArgumentError
from services.orchestrator.store.records import BitmapTable
from services.orchestrator.store.rows import BitmapRow

PAGE_BYTES_DEFAULT = 4096
PAGE_COUNT_MAX = 1 << 32
"""16 TiB of 4 KiB pages: more is not a message of ours."""
WRITE_INTERVAL_S = 2.0

_ABSENT = b"\x01"
_RESIDENT = b"\x00"


@dataclass(slots=True, kw_only=True)
class Bitmap:
    """One VM's userfault bitmap under one epoch."""

    vm_id: str
    epoch: int
    page_size_bytes: int
    page_count: int = 0
    absent_count: int = 0
    pages: bytearray = field(default_factory=bytearray)
    """One byte a page; empty while nothing is absent."""

    @property
    def resident_share(self) -> float:
        """0..1; 1 where there are no pages at all."""
        return 1.0 - self.absent_count / self.page_count if self.page_count else 1.0

    def apply(self, delta: agent_pb2.BitmapDelta) -> None:
        """Take over what changed: absent runs first, then resident runs.

        Raises:
            InvalidArgumentError: BITMAP_INVALID; nothing was changed.
        """
        page_count = delta.page_count or self.page_count
        self._check(delta, page_count)
        if delta.whole or page_count != self.page_count:
            self.pages = bytearray()
        self.page_count = page_count
        if delta.absent_runs and not self.pages:
            self.pages = bytearray(page_count)
        for run in delta.absent_runs:
            self.pages[run.first_page : run.first_page + run.page_count] = _ABSENT * run.page_count
        if self.pages:
            for run in delta.resident_runs:
                self.pages[run.first_page : run.first_page + run.page_count] = bytes(run.page_count)
        self.absent_count = self.pages.count(_ABSENT)
        if not self.absent_count:
            self.pages = bytearray()

    def _check(self, delta: agent_pb2.BitmapDelta, page_count: int) -> None:
        if page_count > PAGE_COUNT_MAX:
            raise _invalid(f"{page_count} pages")
        for run in (*delta.absent_runs, *delta.resident_runs):
            if not run.page_count or run.first_page + run.page_count > page_count:
                raise _invalid(f"run of {run.page_count} pages at {run.first_page} of {page_count}")

    def absent_runs(self, first_page: int = 0) -> Iterator[tuple[int, int]]:
        """(first page, how many) from a page on, ascending, never adjacent."""
        first = self.pages.find(_ABSENT, first_page)
        while first >= 0:
            end = self.pages.find(_RESIDENT, first)
            end = len(self.pages) if end < 0 else end
            yield first, end - first
            first = self.pages.find(_ABSENT, end)

    def packed(self) -> bytes:
        """For the store. b"" while nothing is absent."""
        return zlib.compress(self.pages, level=1) if self.pages else b""


def _invalid(what: str) -> InvalidArgumentError:
    return InvalidArgumentError("BITMAP_INVALID", f"an agent reported an impossible bitmap: {what}")


def unpack(row: BitmapRow) -> Bitmap:
    """The bitmap that the store has."""
    return Bitmap(
        vm_id=row.vm_id,
        epoch=row.epoch,
        page_size_bytes=row.page_size_bytes,
        page_count=row.page_count,
        absent_count=row.absent_count,
        pages=bytearray(zlib.decompress(row.packed)) if row.packed else bytearray(),
    )


class Bitmaps:
    """All of them."""

    def __init__(self, table: BitmapTable) -> None:
        self._table = table
        self._bitmaps: dict[str, Bitmap] = {}
        self._written_at: dict[str, float] = {}

    async def load(self) -> None:
        """Read what the store has."""
        for row in await self._table.all():
            self._bitmaps[row.vm_id] = unpack(row)

    def get(self, vm_id: str, epoch: int) -> Bitmap | None:
        """The VM's bitmap under the epoch of its owner; an older epoch's says nothing."""
        bitmap = self._bitmaps.get(vm_id)
        return bitmap if bitmap and bitmap.epoch == epoch else None

    async def apply(
        self, vm_id: str, epoch: int, page_size_bytes: int, delta: agent_pb2.BitmapDelta
    ) -> Bitmap:
        """Take over a delta, and write the result if the last write is long enough ago."""
        bitmap = self.get(vm_id, epoch)
        if bitmap is None:
            bitmap = Bitmap(
                vm_id=vm_id, epoch=epoch, page_size_bytes=page_size_bytes or PAGE_BYTES_DEFAULT
            )
            self._bitmaps[vm_id] = bitmap
        bitmap.apply(delta)
        now = asyncio.get_running_loop().time()
        if now - self._written_at.get(vm_id, -WRITE_INTERVAL_S) >= WRITE_INTERVAL_S:
            await self.write(vm_id)
        return bitmap

    async def write(self, vm_id: str) -> None:
        """Write a VM's bitmap now."""
        bitmap = self._bitmaps.get(vm_id)
        if bitmap is None:
            return
        self._written_at[vm_id] = asyncio.get_running_loop().time()
        row = BitmapRow(
            vm_id=vm_id,
            epoch=bitmap.epoch,
            page_size_bytes=bitmap.page_size_bytes,
            page_count=bitmap.page_count,
            absent_count=bitmap.absent_count,
            packed=bitmap.packed(),
        )
        await self._table.put(row)

    def forget(self, vm_id: str) -> None:
        """The VM is gone."""
        self._bitmaps.pop(vm_id, None)
        self._written_at.pop(vm_id, None)
