# SPDX-License-Identifier: Apache-2.0
"""Moves of one guest that a module shares, with parts held and killed on the way."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from godwit.errors import GodwitApiError
from godwit.models import Migration, MigrationPhase

from services.demo.live_guest import LiveGuest
from tests.harness.cluster import (
    VM_ID,
    describe,
    migrate,
    other_node,
    settle,
    small_guest,
    wait_phase,
)

pytestmark = [
    pytest.mark.requires("uffd", "qemu", "root"),
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.asyncio(loop_scope="module"),
]

SLOW_BYTES_PER_S = 8 << 20
"""Bulk limit under which a post-copy lasts for seconds."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_guest(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LiveGuest]:
    async with small_guest(tmp_path_factory.mktemp("cluster")) as guest:
        yield guest


@pytest_asyncio.fixture(loop_scope="module")
async def guest(shared_guest: LiveGuest) -> AsyncIterator[LiveGuest]:
    """The guest, with every hook let go afterwards."""
    yield shared_guest
    settle(shared_guest)


async def test_a_second_migration_is_refused_and_names_the_first(guest: LiveGuest) -> None:
    """I7: one migration per VM. The first goes on as if nobody had asked."""
    hooks = guest.cluster.orchestrator.hooks
    destination = await other_node(guest)
    hooks.hold("orchestrator.decision.before")
    first = await guest.client.migrate(guest.vm_id, destination)
    async with asyncio.timeout(60):
        await hooks.reached("orchestrator.decision.before")
    with pytest.raises(GodwitApiError) as refused:
        await guest.client.migrate(guest.vm_id, destination)
    assert (refused.value.status, refused.value.reason) == (409, "MIGRATION_ACTIVE")
    assert refused.value.metadata["migration_id"] == first.migration_id
    hooks.release("orchestrator.decision.before")
    last = await wait_phase(guest, first.migration_id, {MigrationPhase.SUCCEEDED})
    guest.follow(destination, last.epoch)
    assert await guest.prove() == []


async def test_agent_killed_in_postcopy(guest: LiveGuest) -> None:
    """The guest waits on absent pages, never reads zeros; the next agent goes on."""
    destination = await other_node(guest)
    node = guest.cluster.nodes[destination]
    killed = False

    async def kill_once(step: Migration) -> bool:
        nonlocal killed
        if step.phase == MigrationPhase.POSTCOPY and not killed:
            killed = True
            await node.agent.kill()
            await guest.cluster.start(node.agent)
        return False

    last = await guest.move(destination, on_step=kill_once, bulk_bytes_per_s_max=SLOW_BYTES_PER_S)
    assert last.phase == MigrationPhase.SUCCEEDED, describe(guest, last)
    assert killed
    assert await guest.prove() == [], describe(guest, last)


async def test_there_and_back_again(guest: LiveGuest) -> None:
    """What two moves left behind is in nobody's way: a third and a fourth are like the first."""
    for _ in range(2):
        last = await migrate(guest, await other_node(guest))
        assert last.counters is not None
        assert last.counters.demand_page_count > 0
        assert last.counters.violation_count == 0
        assert await guest.prove() == [], describe(guest, last)


async def test_the_command_line_moves_it(guest: LiveGuest) -> None:
    """What a person does: look, move with --watch and a limit, look at the holes, look again."""
    destination = await other_node(guest)
    assert f"{VM_ID} " in await godwit(guest, "vms")
    watching = asyncio.create_task(
        godwit(guest, "migrate", VM_ID, "--to", destination, "--watch", "--bandwidth", "32M")
    )
    drawn = await godwit(guest, "bitmap", VM_ID)
    while " 0 absent" in drawn:
        assert not watching.done(), "memory arrived before anybody could look"
        drawn = await godwit(guest, "bitmap", VM_ID)
    assert "one cell = " in drawn
    assert "succeeded in" in await watching
    [last] = json.loads(await godwit(guest, "migrations", "-o", "json"))["migrations"][:1]
    shown = await godwit(guest, "migrations", "show", last["migration_id"])
    assert f"to:        {destination}" in shown
    assert "postcopy" in shown
    assert " 0 absent" in await godwit(guest, "bitmap", VM_ID)
    guest.follow(destination, last["epoch"])
    assert await guest.prove() == []


async def godwit(guest: LiveGuest, *arguments: str) -> str:
    """What `godwit ARGUMENTS` prints on stdout; it must succeed."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.cli.main", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "GODWIT_ORCHESTRATOR": guest.cluster.rest_url},
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode()
