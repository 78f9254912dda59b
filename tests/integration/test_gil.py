# SPDX-License-Identifier: Apache-2.0
"""No Python on the page path: agent or page server hold their GIL, faults go on being served."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest
from godwit.models import MigrationPhase

from services.demo.console import Heartbeat, parse
from services.demo.live_guest import LiveGuest
from services.demo.part import Part
from tests.harness.cluster import describe, node_of, other_node, small_guest, wait_phase

pytestmark = [
    pytest.mark.requires("uffd", "qemu", "root"),
    pytest.mark.slow,
    pytest.mark.timeout(300),
]

HELD_S_MAX = 60.0
BULK_BYTES_PER_S = 1 << 20
"""So little that what arrives is what the guest waits for."""


def absent_pages(page_map_path: str) -> int:
    """Pages that the userfault bitmap still says are absent; read from its file, past the agent."""
    return Path(f"{page_map_path}.bitmap").read_bytes().count(b"\xff")


def work_done(guest: LiveGuest) -> int:
    """Pages that the guest says it has rewritten."""
    records = (parse(line.text) for line in reversed(guest.console.lines))
    return next(record.ops for record in records if isinstance(record, Heartbeat))


async def progress_while_held(guest: LiveGuest, part: Part, page_map_path: str) -> tuple[int, int]:
    """Hold the GIL of a part for 2 s: pages rewritten meanwhile, and bitmap bytes that changed."""
    hooks = part.hooks
    (hooks.directory / "gil.hold_ms").write_text("2000")
    (hooks.directory / "gil.released.reached").unlink(missing_ok=True)
    part.signal(signal.SIGUSR2)
    async with asyncio.timeout(HELD_S_MAX):
        await hooks.reached("gil.held")
        work, absent = work_done(guest), absent_pages(page_map_path)
        done = 0, 0
        while not hooks.is_reached("gil.released"):
            done = work_done(guest) - work, absent - absent_pages(page_map_path)
            await asyncio.sleep(0.02)
    return done


async def test_faults_are_served_while_the_gil_is_held(tmp_path: Path) -> None:
    async with small_guest(tmp_path, dirty_rate=500) as guest:
        source, destination = await node_of(guest), await other_node(guest)
        migration = await guest.client.migrate(
            guest.vm_id, destination, bulk_bytes_per_s_max=BULK_BYTES_PER_S
        )
        step = await wait_phase(guest, migration.migration_id, {MigrationPhase.POSTCOPY})
        console = guest.follow(destination, step.epoch)
        nodes = guest.cluster.nodes
        arriving = nodes[destination].record(guest.vm_id).arriving
        assert arriving is not None
        async with asyncio.timeout(HELD_S_MAX):
            await guest.follower.wait_for(console, lambda record: isinstance(record, Heartbeat))
        for part in (nodes[destination].agent, nodes[source].page_server):
            work, bytes_settled = await progress_while_held(guest, part, arriving.page_map_path)
            assert work > 0, part.name
            assert bytes_settled > 0, part.name
        now = await guest.client.migration(migration.migration_id)
        assert now.phase == MigrationPhase.POSTCOPY, "it was over before the GIL was held"
        # Not waited for the end: what the guest has not touched is of no interest here.
        assert await guest.prove() == [], describe(guest, now)
