# SPDX-License-Identifier: Apache-2.0
"""A disk that is really full under the store: nothing is decided, nothing is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.fake_fleet import VM, FakeFleet, eventually, fake_fleet
from tests.harness.small_disk import fill, mounted

pytestmark = [pytest.mark.requires("root")]

SIZE = "2M"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own that is soon full."""
    with mounted(tmp_path / "disk", SIZE) as directory:
        yield directory


async def assert_moved(fleet: FakeFleet, migration_id: str) -> None:
    ended = await fleet.ended(migration_id)
    assert ended["phase"] == "succeeded", ended
    assert fleet.world.broken == []
    assert fleet.world.owners(VM) == ["b"]


async def test_full_at_the_decision_nothing_is_decided(small_disk: Path, hooks: Path) -> None:
    """No agent hears of a decision until there is room; then one is taken, and one guest runs."""
    async with fake_fleet(small_disk) as fleet:
        hold = hooks / "orchestrator.decision.before.hold"
        hold.touch()
        migration_id = await fleet.migrate()
        await eventually((hooks / "orchestrator.decision.before.reached").exists)
        ballast = fill(small_disk)
        hold.unlink()
        # It tries, and tries again: each attempt is one of these.
        await asyncio.sleep(1)
        assert fleet.world.owners(VM) == []
        assert fleet.b.calls["Activate"] == fleet.a.calls["Seal"] == fleet.a.calls["Resume"] == 0
        found = await fleet.migration(migration_id)
        assert found["decision"] is None
        ballast.unlink()
        ended = await fleet.ended(migration_id)
        assert ended["phase"] in ("succeeded", "failed")
        owner = "b" if ended["phase"] == "succeeded" else "a"
        assert fleet.world.owners(VM) == [owner]
        assert fleet.world.broken == []


async def test_full_in_mid_post_copy_the_move_goes_on_by_itself(small_disk: Path) -> None:
    """Pages need no store; the phases wait for room, and a new orchestrator finds all of them."""
    async with fake_fleet(small_disk) as fleet:
        fleet.b.pages_per_tick = 1
        migration_id = await fleet.migrate()
        await fleet.in_phase(migration_id, "postcopy")
        ballast = fill(small_disk)
        await eventually(lambda: fleet.b.records[VM].epoch_memory_complete > 0)
        await asyncio.sleep(0.5)
        assert (await fleet.migration(migration_id))["phase"] != "succeeded"
        assert fleet.a.calls["ReleaseSource"] == 0
        ballast.unlink()
        await assert_moved(fleet, migration_id)


async def test_a_full_store_admits_nothing_and_says_why(small_disk: Path) -> None:
    async with fake_fleet(small_disk) as fleet:
        ballast = fill(small_disk)
        answer = await fleet.post("/v1/migrations", {"vm": VM, "destination_node": "b"})
        assert answer.status_code == 503, answer.text
        assert answer.json()["type"].endswith("/store-full")
        assert "free space" in answer.text
        ballast.unlink()
        await assert_moved(fleet, await fleet.migrate())
