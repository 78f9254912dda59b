# SPDX-License-Identifier: Apache-2.0
"""The hand-over of a real guest: all of its memory, and never two of it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from godwit.errors import GodwitApiError
from godwit.models import Migration, MigrationPhase

from services.demo.live_guest import MAC, LiveGuest
from services.demo.network import RARP, FrameRecorder
from services.fault_agent import processes
from services.fault_agent.drivers.qmp import QmpClient
from tests.harness.cluster import describe, node_of, other_node, settle, small_guest, wait_phase
from tests.harness.console import beats_in

pytestmark = [
    pytest.mark.requires("uffd", "qemu", "root"),
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.asyncio(loop_scope="module"),
]

REACHED_S_MAX = 60.0
COMPARE_BYTES = 1 << 20


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_guest(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LiveGuest]:
    async with small_guest(tmp_path_factory.mktemp("cluster")) as guest:
        yield guest


@pytest_asyncio.fixture(loop_scope="module")
async def guest(shared_guest: LiveGuest) -> AsyncIterator[LiveGuest]:
    """The guest, with every hook let go afterwards."""
    yield shared_guest
    settle(shared_guest)


def said(guest: LiveGuest, node: str, epoch: int) -> str:
    """The console of a run of the guest so far."""
    console = guest.cluster.nodes[node].console(guest.vm_id, epoch)
    return console.read_text(errors="replace") if console.exists() else ""


def beats(guest: LiveGuest, node: str, epoch: int) -> list[int]:
    """Numbers of the heartbeats that a run of the guest has said so far."""
    return beats_in(said(guest, node, epoch))


async def more_beats(guest: LiveGuest, node: str, epoch: int, count: int) -> list[int]:
    """All heartbeats of a run, once there are more than `count`: it runs."""
    async with asyncio.timeout(REACHED_S_MAX):
        while len(seen := beats(guest, node, epoch)) < count + 20:  # noqa: ASYNC110 - a file
            await asyncio.sleep(0.05)
    return seen


def pages_apart(one: str, other: str) -> list[int]:
    """Numbers of the pages in which two RAM files differ. Holes are zeros."""
    apart = []
    with open(one, "rb") as left, open(other, "rb") as right:  # noqa: PTH123 - two at once
        assert os.fstat(left.fileno()).st_size == os.fstat(right.fileno()).st_size
        for start in range(0, os.fstat(left.fileno()).st_size, COMPARE_BYTES):
            a, b = left.read(COMPARE_BYTES), right.read(COMPARE_BYTES)
            if a != b:
                apart += [
                    (start + at) // 4096
                    for at in range(0, len(a), 4096)
                    if a[at : at + 4096] != b[at : at + 4096]
                ]
    return apart


async def end(guest: LiveGuest, migration: Migration) -> Migration:
    """Its last state."""
    terminal = {MigrationPhase.SUCCEEDED, MigrationPhase.FAILED, MigrationPhase.CANCELLED}
    return await wait_phase(guest, migration.migration_id, terminal)


async def test_all_memory_is_the_same(guest: LiveGuest) -> None:
    """With the destination held paused, every page of both RAM files is compared: 0 apart."""
    source, destination = await node_of(guest), await other_node(guest)
    nodes, orchestrator = guest.cluster.nodes, guest.cluster.orchestrator
    nodes[destination].agent.hooks.skip("agent.activate.before_cont")
    orchestrator.hooks.hold("orchestrator.release.before")
    migration = await guest.client.migrate(guest.vm_id, destination)
    async with asyncio.timeout(REACHED_S_MAX):
        await orchestrator.hooks.reached("orchestrator.release.before")
    here, there = nodes[source].record(guest.vm_id), nodes[destination].record(guest.vm_id)
    assert there.epoch_memory_complete == there.epoch_prepared > 0
    apart = await asyncio.to_thread(pages_apart, here.ram_path, there.ram_path)
    assert apart == []
    process = there.process
    assert process is not None
    monitor = await QmpClient.connect(
        nodes[destination].monitor(guest.vm_id),
        timeout_s=10,
        alive=lambda: processes.is_alive(process),
    )
    assert (await monitor.execute("query-status"))["status"] == "paused"
    await monitor.execute("cont")
    monitor.close()
    orchestrator.hooks.release("orchestrator.release.before")
    last = await end(guest, migration)
    assert last.phase == MigrationPhase.SUCCEEDED, describe(guest, last)
    guest.follow(destination, last.epoch)
    assert await guest.prove() == [], describe(guest, last)


async def test_no_announcement_before_activation(guest: LiveGuest) -> None:
    """Loaded and paused, the destination sends no frame at all; activated, it announces itself."""
    destination = await other_node(guest)
    if not guest.setup.net:
        pytest.skip("needs a network namespace and /dev/net/tun: run as root")
    spec = json.loads(guest.cluster.nodes[await node_of(guest)].record(guest.vm_id).spec_json)
    hooks = guest.cluster.nodes[destination].agent.hooks
    hooks.hold("agent.activate.after_activating")
    with FrameRecorder(spec["nics"][0]["tap"]["netns"]) as recorder:
        migration = await guest.client.migrate(guest.vm_id, destination)
        async with asyncio.timeout(REACHED_S_MAX):
            await hooks.reached("agent.activate.after_activating")
        seen = len(recorder.frames)
        quiet = [frame for frame in recorder.frames if frame.ethertype == RARP]
        hooks.release("agent.activate.after_activating")
        last = await end(guest, migration)
        after = recorder.frames[seen:]
    assert last.phase == MigrationPhase.SUCCEEDED, describe(guest, last)
    assert quiet == []
    assert any(frame.ethertype == RARP and frame.source == MAC for frame in after)
    guest.follow(destination, last.epoch)
    assert await guest.prove() == []


async def test_the_destinations_vmm_dies_before_the_decision(guest: LiveGuest) -> None:
    """The source runs on, under a fresh epoch, from the very next heartbeat."""
    source, destination = await node_of(guest), await other_node(guest)
    leaves, node = guest.cluster.nodes[source].agent, guest.cluster.nodes[destination]
    epoch = guest.console.epoch
    leaves.hooks.hold("agent.pause.after")
    migration = await guest.client.migrate(guest.vm_id, destination)
    async with asyncio.timeout(REACHED_S_MAX):
        await leaves.hooks.reached("agent.pause.after")
    process = node.record(guest.vm_id).process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    before = beats(guest, source, epoch)
    leaves.hooks.release("agent.pause.after")
    last = await end(guest, migration)
    assert last.phase == MigrationPhase.FAILED, describe(guest, last)
    after = await more_beats(guest, source, epoch, len(before))
    assert after == list(range(after[0], after[0] + len(after)))
    assert beats(guest, destination, last.epoch) == []
    vm = await guest.client.vm(guest.vm_id)
    assert vm.node == source
    assert vm.epoch > last.epoch


@pytest.mark.parametrize("how", ["killed", "mute"])
async def test_cut_off_right_after_the_load_there_are_never_two(guest: LiveGuest, how: str) -> None:
    """The destination has loaded, and nobody hears of it: one of the two runs, no beat twice.

    QEMU's own hand-over lets both sides start here (design, section 4).
    """
    source, destination = await node_of(guest), await other_node(guest)
    agent = guest.cluster.nodes[destination].agent
    epoch = guest.console.epoch
    if how == "killed":
        agent.hooks.exit("agent.load.after_loaded")
    else:
        agent.hooks.hold("agent.load.after_loaded")
    migration = await guest.client.migrate(guest.vm_id, destination)
    async with asyncio.timeout(REACHED_S_MAX):
        await agent.hooks.reached("agent.load.after_loaded")
    if how == "killed":
        await agent.kill()
        await guest.cluster.start(agent)
        last = await end(guest, migration)
    else:
        # Nothing is heard of the destination until the orchestrator has given up.
        last = await end(guest, migration)
        assert last.phase == MigrationPhase.FAILED, describe(guest, last)
        agent.hooks.release("agent.load.after_loaded")
    here, there = beats(guest, source, epoch), beats(guest, destination, last.epoch)
    if last.phase == MigrationPhase.SUCCEEDED:
        guest.follow(destination, last.epoch)
        assert await guest.prove() == [], describe(guest, last)
        here, there = beats(guest, source, epoch), beats(guest, destination, last.epoch)
        assert there
    else:
        here = await more_beats(guest, source, epoch, len(here))
        assert there == []
    together = beats_in(said(guest, source, epoch) + said(guest, destination, last.epoch))
    assert together == list(range(together[0], together[0] + len(together)))


async def test_refusals_change_nothing(guest: LiveGuest) -> None:
    """Unknown guest, unknown node, its own node, a node that is down: typed, and nothing else."""
    source, destination = await node_of(guest), await other_node(guest)
    before = await guest.client.vm(guest.vm_id)
    count = len(await guest.client.migrations())

    async def refusal(vm: str, node: str) -> tuple[int, str]:
        with pytest.raises(GodwitApiError) as refused:
            await guest.client.migrate(vm, node)
        return refused.value.status, refused.value.reason

    assert await refusal("nobody", destination) == (404, "VM_UNKNOWN")
    assert await refusal(guest.vm_id, "nowhere") == (404, "NODE_UNKNOWN")
    assert await refusal(guest.vm_id, source) == (409, "SAME_NODE")
    agent = guest.cluster.nodes[destination].agent
    await agent.kill()
    assert await refusal(guest.vm_id, destination) == (503, "NODE_UNREACHABLE")
    await guest.cluster.start(agent)
    after = await guest.client.vm(guest.vm_id)
    assert (after.node, after.epoch, after.migration_id) == (before.node, before.epoch, "")
    assert len(await guest.client.migrations()) == count
