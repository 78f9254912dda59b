# SPDX-License-Identifier: Apache-2.0
"""Pause that goes on with the transfer: one command, and what it must not do too early."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from godwit.agent.v1 import fault_agent_service_pb2 as pb
from godwit.common.v1 import common_pb2

from services.common import grpc_client
from services.common.errors import GodwitError
from services.common.vm_spec import VmSpec
from services.fault_agent import device_state
from tests.harness.console import Console
from tests.integration.agent import nodes
from tests.integration.agent.nodes import Agent, CopyingPageCore, Host, Orders, running_agent

pytestmark = pytest.mark.requires("qemu")

MakeSpec = Callable[..., VmSpec]
ORDERS = Orders(vm_id="guest", epoch=2, migration_id="m2")
REACHED_S_MAX = 60


@pytest.fixture
async def a(host_a: Host, core: CopyingPageCore) -> AsyncIterator[Agent]:
    """The source's agent."""
    async with running_agent(host_a, core) as agent:
        yield agent


@pytest.fixture
async def b(host_b: Host, core: CopyingPageCore) -> AsyncIterator[Agent]:
    """The destination's agent."""
    async with running_agent(host_b, core) as agent:
        yield agent


async def reached(path: Path) -> None:
    """A hook point was reached."""
    async with asyncio.timeout(REACHED_S_MAX):
        while not path.exists():  # noqa: ASYNC110, ASYNC240
            await asyncio.sleep(0.01)


async def test_a_guest_moves(a: Agent, b: Agent, make_spec: MakeSpec) -> None:
    """And the command given again says what it said."""
    await nodes.start_vm(a, make_spec(), epoch=1)
    left = Console(a.vm_dir("guest") / "console-1.log")
    await left.wait_beat(10)
    await nodes.prepare(a, b, ORDERS)
    once = await nodes.pause_and_transfer(a, b, ORDERS)
    assert once.evidence.image.state == common_pb2.IMAGE_STATE_FROZEN
    assert once.transferred.len_bytes > 0
    assert once.before_stop_ns > 0
    # But for the time that it ran after the request: then it stood already.
    once.before_stop_ns = 0
    twice = await nodes.pause_and_transfer(a, b, ORDERS)
    assert twice == once
    assert await nodes.transfer(a, b, ORDERS) == once.transferred
    loaded = await nodes.describe(b, "guest")
    assert (loaded.epoch_loaded, loaded.vmm_state) == (2, pb.VMM_STATE_PAUSED)
    await nodes.activate(b, ORDERS)
    await nodes.seal(a, ORDERS)
    console = Console(b.vm_dir("guest") / "console-2.log")
    await console.wait_beat(left.last_beat() + 20)
    assert console.follows(left)
    assert console.errors() == []


async def test_no_way_to_the_destination_and_the_guest_is_not_paused(
    a: Agent, b: Agent, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_state, "ASK_TIMEOUT_S", 0.2)
    await nodes.start_vm(a, make_spec(), epoch=1)
    await nodes.prepare(a, b, ORDERS)
    nowhere = pb.PauseRequest(fence=ORDERS.fence(), transfer_to="127.0.0.1:1")
    with pytest.raises(GodwitError, match="nothing was sent"):
        await grpc_client.call(a.channel, a.stub.Pause, nowhere, timeout_s=30)
    evidence = await nodes.describe(a, "guest")
    assert evidence.vmm_state == pb.VMM_STATE_RUNNING
    assert evidence.image.state == common_pb2.IMAGE_STATE_LIVE
    # Nothing was spoiled by that: the way that there is will do.
    assert (await nodes.pause_and_transfer(a, b, ORDERS)).transferred.len_bytes > 0


async def test_nothing_is_loaded_before_the_frozen_image_is_served(
    a: Agent,
    b: Agent,
    core: CopyingPageCore,
    make_spec: MakeSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The page server is parked in front of the FROZEN record, the save does not wait for it."""
    await nodes.start_vm(a, make_spec(), epoch=1)
    await nodes.prepare(a, b, ORDERS)
    monkeypatch.setenv("GODWIT_HOOKS_DIR", str(tmp_path))
    hold = tmp_path / "page_server.reload.hold"
    hold.touch()
    async with asyncio.TaskGroup() as group:
        command = group.create_task(nodes.pause_and_transfer(a, b, ORDERS))
        await reached(hold.with_suffix(".reached"))
        async with asyncio.timeout(REACHED_S_MAX):
            while not b.serving.node.vm("guest").loading:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        # Parked for as long as we look: it cannot get further.
        for _ in range(20):
            await asyncio.sleep(0.01)
            assert core.arrivals[-1].generation() == 0
            assert not (tmp_path / "agent.transfer.after_save.reached").exists()
            assert b.serving.node.vm("guest").record.epoch_loaded == 0
        hold.unlink()
        answer = await command
    generation = answer.evidence.image.generation
    assert core.arrivals[-1].generation() == generation
    assert (await nodes.describe(b, "guest")).epoch_loaded == 2


async def test_a_page_server_that_fails_ends_the_transfer(
    a: Agent, b: Agent, make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest is paused and nothing is LOADED; aborted, it runs on at the source."""
    await nodes.start_vm(a, make_spec(), epoch=1)
    console = Console(a.vm_dir("guest") / "console-1.log")
    await console.wait_beat(5)
    await nodes.prepare(a, b, ORDERS)
    monkeypatch.setenv("GODWIT_HOOKS_DIR", str(tmp_path))
    (tmp_path / "page_server.reload.fail").touch()
    with pytest.raises(GodwitError) as refusal:
        await nodes.pause_and_transfer(a, b, ORDERS)
    assert refusal.value.reason == "PAGE_SERVER_UNREACHABLE"
    assert (await nodes.describe(a, "guest")).vmm_state == pb.VMM_STATE_PAUSED
    assert (await nodes.describe(b, "guest")).epoch_loaded == 0
    await nodes.abort(b, ORDERS, pb.SIDE_DESTINATION)
    last = console.last_beat()
    await nodes.resume(a, ORDERS, epoch=3)
    await console.wait_beat(last + 10)
    assert console.errors() == []


async def test_a_pause_that_fails_leaves_the_shell_good(
    a: Agent, b: Agent, make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream was open and no byte was in it: the next attempt uses the same shell."""
    await nodes.start_vm(a, make_spec(), epoch=1)
    await nodes.prepare(a, b, ORDERS)
    shell = b.serving.node.vm("guest").record.process
    monkeypatch.setenv("GODWIT_HOOKS_DIR", str(tmp_path))
    (tmp_path / "agent.pause.after.fail").touch()
    with pytest.raises(GodwitError):
        await nodes.pause_and_transfer(a, b, ORDERS)
    async with asyncio.timeout(REACHED_S_MAX):
        while b.serving.node.vm("guest").loading:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    evidence = await nodes.describe(b, "guest")
    assert (evidence.role, evidence.vmm_state) == (pb.VM_ROLE_ARRIVING, pb.VMM_STATE_INCOMING)
    assert (await nodes.pause_and_transfer(a, b, ORDERS)).transferred.len_bytes > 0
    assert b.serving.node.vm("guest").record.process == shell
