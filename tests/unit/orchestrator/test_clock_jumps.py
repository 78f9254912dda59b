# SPDX-License-Identifier: Apache-2.0
"""No decision, deadline or key depends on CLOCK_REALTIME: it may jump a year in mid migration."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from pathlib import Path

import pytest

from tests.harness.fake_fleet import VM, FakeFleet, eventually
from tests.harness.moved_clock import YEAR_S, MovedClock

YEAR_NS = YEAR_S * 10**9


def set_clock(fleet: FakeFleet, clock: object) -> None:
    """Give the running orchestrator another wall clock."""
    object.__setattr__(fleet.core.context, "now_ns", clock)


async def test_a_clock_that_jumps_at_every_look(fleet: FakeFleet) -> None:
    """A year ahead or back between any two looks at it: the move is what it would be."""
    chance = random.Random(7)
    base_ns = 2_000_000_000 * 10**9
    set_clock(fleet, lambda: base_ns + chance.randint(-1, 1) * YEAR_NS)
    fleet.b.pages_per_tick = 1
    migration_id = await fleet.migrate()
    await fleet.in_phase(migration_id, "postcopy")
    fleet.a.page_server_up = False
    await fleet.in_phase(migration_id, "postcopy_paused")
    fleet.a.page_server_up = True
    ended = await fleet.ended(migration_id)
    assert (ended["phase"], ended["reason"]) == ("succeeded", "")
    assert fleet.world.broken == []
    assert fleet.world.owners(VM) == ["b"]


@pytest.mark.parametrize("years", [-1, 1])
async def test_a_request_that_is_repeated_after_a_jump_is_done_once(
    fleet: FakeFleet, years: int
) -> None:
    base_ns = 2_000_000_000 * 10**9
    now_ns = base_ns
    set_clock(fleet, lambda: now_ns)
    create = fleet.core.fleet.create_migration
    first = await create(VM, "b", key="once")
    await fleet.ended(first.migration_id)
    now_ns = base_ns + years * YEAR_NS
    again = await create(VM, "b", key="once")
    assert again.migration_id == first.migration_id
    migrations, _ = await fleet.core.fleet.list_migrations()
    assert len(migrations) == 1


# --- the whole process ---


@pytest.mark.parametrize("years", [-1, 1])
async def test_the_clock_of_a_whole_orchestrator_jumps(
    fleet: FakeFleet, hooks: Path, tmp_path: Path, years: int
) -> None:
    """Every library in the process sees the jump: before the decision, and in mid post-copy."""
    clock = await asyncio.to_thread(MovedClock, tmp_path)
    for name in ("preparing.entered", "postcopy.entered"):
        (hooks / f"orchestrator.{name}.hold").touch()
    fleet.b.pages_per_tick = 1
    migration_id = await fleet.migrate()
    await eventually((hooks / "orchestrator.preparing.entered.reached").exists)
    await fleet.stop()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.orchestrator",
        "--rest=127.0.0.1:0",
        "--grpc=127.0.0.1:0",
        f"--store={fleet.store}",
        *(f"--node={name}={agent.address}" for name, agent in fleet.agents.items()),
        env=os.environ | {"GODWIT_HOOKS_DIR": str(hooks)} | clock.environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert process.stdout
    await process.stdout.readline()
    (hooks / "orchestrator.preparing.entered.hold").unlink()
    clock.move(years * YEAR_S)
    await eventually((hooks / "orchestrator.postcopy.entered.reached").exists)
    clock.move(-years * YEAR_S)
    (hooks / "orchestrator.postcopy.entered.hold").unlink()
    await eventually(lambda: fleet.b.calls["ReleaseDestination"] > 0)
    process.send_signal(signal.SIGTERM)
    assert await process.wait() == 0
    await fleet.start()
    ended = await fleet.ended(migration_id)
    assert ended["phase"] == "succeeded"
    # It was seen: the phases before and after the jumps are years apart.
    stamps = [step["at"] for step in ended["transitions"]]
    assert len({stamp[:4] for stamp in stamps}) > 1
    assert fleet.world.broken == []
    assert fleet.world.owners(VM) == ["b"]
