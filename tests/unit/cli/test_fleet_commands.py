# SPDX-License-Identifier: Apache-2.0
"""Promise: the fleet's commands say what they did, against a real orchestrator over fake agents."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from godwit.client import Client

from services.cli import top
from services.cli.exit_status import ExitStatus
from tests.harness.fake_fleet import VM, WAIT_S, FakeFleet, eventually, fake_fleet


class Shell:
    """Runs `godwit ARGUMENTS` as a process of its own."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def __call__(self, *arguments: str, status: int = ExitStatus.OK) -> str:
        """Its stdout; it must end with `status`."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "services.cli.main", "--orchestrator", self._url, *arguments),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
        assert process.returncode == status, (arguments, out.decode(), err.decode())
        return out.decode()


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[FakeFleet]:
    async with fake_fleet(tmp_path, listening=True) as running:
        await running.start_vm("vm-2")
        yield running
        assert running.world.broken == []


@pytest.fixture
def godwit(fleet: FakeFleet) -> Shell:
    return Shell(str(fleet.http.base_url))


async def test_drain_and_back(fleet: FakeFleet, godwit: Shell) -> None:
    planned = await godwit("-o", "wide", "drain", "a", "--dry-run")
    assert "BECAUSE" in planned
    assert "2 moves in 1 waves, about" in planned
    plan = json.loads(await godwit("-o", "json", "plan", VM, "--to", "c"))
    assert [step["destination_node"] for step in plan["steps"]] == ["c"]
    drained = await godwit("drain", "a", "--watch", "--deadline", "1h")
    assert "succeeded" in drained
    assert (await godwit("-o", "name", "operations")).count("\n") == 1
    screen = await godwit("top", "--once")
    assert "3 nodes, 2 VMs, 0/64 moves, 0 waiting" in screen
    assert "drained" in screen
    await godwit("drain", "zz", status=ExitStatus.NOT_FOUND)
    back = json.loads(await godwit("-o", "json", "undrain", "a", "--watch"))
    assert (back["state"], back["counts"]) == ("succeeded", {"moved": 2})


async def test_queue_limits_policies_and_an_operation_that_is_cancelled(
    fleet: FakeFleet, godwit: Shell
) -> None:
    await godwit("queue", "freeze", "--because", "fire")
    assert "node-in:b" in await godwit("limits", "set", "node-in:b=1", "cluster=8")
    await godwit("limits", "set", "speed=1", status=ExitStatus.USAGE)
    assert "retries 1" in await godwit("policy", "set", "db", "--match", "app=db", "--retries", "1")
    await godwit("place", "vm", VM, "--label", "app=db", "--apart", "db")
    await godwit("place", "node", "b", "--link", "rack-1")
    begun = json.loads(await godwit("-o", "json", "drain", "a"))
    await fleet.until_queued(2)
    queue = await godwit("queue")
    assert "admissions are frozen: fire" in queue
    assert queue.count("FROZEN") == 2
    assert "FROZEN: fire" in await godwit("top", "--once")
    operation_id = begun["operation_id"]
    assert "paused" in await godwit("operations", "pause", operation_id)
    await godwit("operations", "resume", operation_id)
    await godwit("operations", "cancel", operation_id)
    shown = await godwit(
        "operations", "show", operation_id, "--watch", status=ExitStatus.MIGRATION_FAILED
    )
    assert "cancelled" in shown
    await godwit("queue", "thaw")
    await godwit("policy", "delete", "db")
    await godwit("operations", "cancel", "zz", status=ExitStatus.NOT_FOUND)


async def test_top_hears_of_changes(fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks again when something changes, not when a time is over."""
    monkeypatch.setattr(top, "LOOK_S", 100 * WAIT_S)
    with Client(str(fleet.http.base_url)) as client:
        changed = top.Changed(client)
        await eventually(lambda: fleet.core.events.count == 1)
        changed.wait()  # that it has begun
        waiting = asyncio.create_task(asyncio.to_thread(changed.wait))
        await asyncio.sleep(0)
        assert not waiting.done()
        await fleet.core.nodes.put("d", "127.0.0.1:1", ask=False)
        async with asyncio.timeout(WAIT_S):
            await waiting
