# SPDX-License-Identifier: Apache-2.0
"""Ways to harm the guest on purpose, so that tests can see the verdict turn red.

A verdict that was never seen to fail proves nothing. Each harm is the real thing, done from outside
to an otherwise unchanged system: bytes flipped in guest memory, the last userfaultfd closed inside
the VMM, the source's VMM told to run on.
"""

from __future__ import annotations

import asyncio
import os
from enum import StrEnum
from pathlib import Path

from godwit.models import Migration, MigrationPhase

from services.common.errors import InternalError
from services.demo.live_guest import LiveGuest
from services.demo.remote_close import close_in
from services.fault_agent import processes
from services.fault_agent.drivers.qmp import QmpClient

PAGE_BYTES = 4096
_PAGE_MAGIC = b"GW_PAGE1"
_SCAN_BYTES = 1 << 20
_SLOW_BYTES_PER_S = 4 << 20
_MONITOR_TIMEOUT_S = 10.0
_SETTLED_LINES = 30
"""So much said, its kernel has the pages that it needs to tell of the loss of others."""
_SEAL_POINT = "agent.seal.before_kill"
_RELEASE_POINT = "agent.release.before"


class Harm(StrEnum):
    """What is done."""

    CORRUPT_PAGE = "corrupt-page"
    """One byte of an installed workload page is flipped at the destination."""
    DROP_UFFD = "drop-uffd"
    """In post-copy the agent dies and the VMM loses its own userfaultfd: absent pages read zero."""
    DOUBLE_RUN = "double-run"
    """The source's VMM is spared by the seal and let run on once the destination has all memory:
    before that, the source's writes would spoil pages that are still to come, and the destination
    would die of that. Without a disk: its lock, which the destination has, would forbid it."""

    @property
    def spares_disk(self) -> bool:
        """The guest must have no disk."""
        return self is Harm.DOUBLE_RUN


class Sabotage:
    """One harm to one move. Called by the demo at the points of the move; acts at its own, once."""

    def __init__(self, harm: Harm, guest: LiveGuest) -> None:
        self.harm = harm
        self._guest = guest
        self._cluster = guest.cluster
        self._vm_id = guest.vm_id
        self._done = False

    @property
    def bulk_bytes_per_s_max(self) -> int:
        """Limit of the bulk lane that it needs; 0 = none."""
        return _SLOW_BYTES_PER_S if self.harm is Harm.DROP_UFFD else 0

    def before_move(self, source: str) -> None:
        """The move has not been asked for."""
        if self.harm is Harm.DOUBLE_RUN:
            hooks = self._cluster.nodes[source].agent.hooks
            hooks.skip(_SEAL_POINT)
            hooks.hold(_RELEASE_POINT)

    async def on_step(self, migration: Migration) -> bool:
        """The migration has changed; True: it will not end any more, do not wait for it."""
        if self._done:
            return False
        if (
            self.harm is Harm.DROP_UFFD
            and migration.phase == MigrationPhase.POSTCOPY
            and len(self._guest.console.lines) >= _SETTLED_LINES
        ):
            self._done = True
            await self._drop_uffd(migration.destination_node)
            return True
        if self.harm is Harm.DOUBLE_RUN and migration.phase == MigrationPhase.FINALIZING:
            self._done = True
            await self._run_on(migration.source_node)
        return False

    async def after_move(self, destination: str) -> None:
        """The migration is over."""
        if self.harm is Harm.CORRUPT_PAGE and not self._done:
            self._done = True
            ram_path = Path(self._cluster.nodes[destination].record(self._vm_id).ram_path)
            await asyncio.to_thread(flip_byte, ram_path)

    async def _drop_uffd(self, destination: str) -> None:
        node = self._cluster.nodes[destination]
        record = node.record(self._vm_id)
        if record.process is None or record.arriving is None or record.arriving.remote_fd < 0:
            raise InternalError("SABOTAGE_FAILED", f"{destination} has no userfaultfd journaled")
        await node.agent.kill()
        await asyncio.to_thread(close_in, record.process.pid, record.arriving.remote_fd)

    async def _run_on(self, source: str) -> None:
        node = self._cluster.nodes[source]
        async with asyncio.timeout(_MONITOR_TIMEOUT_S):
            await node.agent.hooks.reached(_RELEASE_POINT)
        process = node.record(self._vm_id).process
        if process is None:
            raise InternalError("SABOTAGE_FAILED", f"{source} journals no VMM to let run on")
        monitor = await QmpClient.connect(
            node.monitor(self._vm_id),
            timeout_s=_MONITOR_TIMEOUT_S,
            alive=lambda: processes.is_alive(process),
        )
        try:
            await monitor.execute("cont")
        finally:
            monitor.close()
        source_console = self._guest.consoles[-2]
        enough = len(source_console.lines) + _SETTLED_LINES
        async with asyncio.timeout(_MONITOR_TIMEOUT_S):
            while len(source_console.lines) < enough:  # noqa: ASYNC110 - a thread adds them
                await asyncio.sleep(0.01)
        node.agent.hooks.release(_RELEASE_POINT)


def flip_byte(ram_path: Path) -> int:
    """Change the last byte of a page of the guest's workload; that page's number in the file.

    The guest checks a page before it writes it anew, so the change cannot go unseen.

    Raises:
        InternalError: there is no page of the workload.
    """
    fd = os.open(ram_path, os.O_RDWR | os.O_CLOEXEC)
    try:
        first = _workload_page(fd)
        if first is None:
            raise InternalError("SABOTAGE_FAILED", f"no page of the workload in {ram_path}")
        last = first + PAGE_BYTES - 1
        os.pwrite(fd, bytes([os.pread(fd, 1, last)[0] ^ 0xFF]), last)
        return first // PAGE_BYTES
    finally:
        os.close(fd)


def _workload_page(fd: int) -> int | None:
    """Offset of a page that the workload has in one copy only.

    Of two copies one is what the guest's kernel left when it moved the page: nobody reads it.
    """
    seen: dict[bytes, int | None] = {}
    for start in range(0, os.fstat(fd).st_size, _SCAN_BYTES):
        chunk = os.pread(fd, _SCAN_BYTES, start)
        for offset in range(0, len(chunk), PAGE_BYTES):
            if chunk.startswith(_PAGE_MAGIC, offset):
                number = chunk[offset + 8 : offset + 16]
                seen[number] = None if number in seen else start + offset
    return next((offset for offset in seen.values() if offset is not None), None)
