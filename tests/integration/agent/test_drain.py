# SPDX-License-Identifier: Apache-2.0
"""SIGTERM means: take no VM, and answer page faults for as long as a guest here needs it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import pytest
from godwit.agent.v1 import fault_agent_service_pb2 as pb

from services.common.errors import GodwitError
from services.common.lifecycle import ExitStatus
from services.common.vm_spec import VmSpec
from services.fault_agent import main
from tests.integration.agent import nodes
from tests.integration.agent.nodes import Agent, CopyingPageCore, Host, Orders, running_agent

pytestmark = pytest.mark.requires("qemu")

MakeSpec = Callable[..., VmSpec]
ORDERS = Orders(vm_id="guest", epoch=2, migration_id="m2")


@dataclass(frozen=True, slots=True)
class Arrived:
    """A guest that runs at b, its memory at a."""

    a: Agent
    b: Agent
    spec: VmSpec


@pytest.fixture
async def arrived(
    host_a: Host, host_b: Host, core: CopyingPageCore, make_spec: MakeSpec
) -> AsyncIterator[Arrived]:
    """In post-copy."""
    core.complete_at_once = False
    async with running_agent(host_a, core) as a, running_agent(host_b, core) as b:
        spec = make_spec()
        await nodes.start_vm(a, spec, epoch=1)
        await nodes.prepare(a, b, ORDERS)
        await nodes.pause(a, ORDERS)
        await nodes.transfer(a, b, ORDERS)
        await nodes.activate(b, ORDERS)
        yield Arrived(a, b, spec)


async def test_it_ends_when_the_last_page_is_here(arrived: Arrived, core: CopyingPageCore) -> None:
    async with asyncio.TaskGroup() as group:
        drain = group.create_task(main.drain(arrived.b.serving, 60, asyncio.Event()))
        await asyncio.sleep(0)
        with pytest.raises(GodwitError, match="DRAINING"):
            await nodes.start_vm(arrived.b, arrived.spec.model_copy(update={"vm_id": "other"}), 1)
        assert not drain.done()
        # What an arrival needs is answered: replays, evidence, progress.
        assert (await nodes.activate(arrived.b, ORDERS)).role == pb.VM_ROLE_ARRIVED
        core.arrivals[-1].install_all()
    assert drain.result() is ExitStatus.OK


async def test_a_second_signal_and_the_deadline_end_it_and_say_who_waits(
    arrived: Arrived, caplog: pytest.LogCaptureFixture
) -> None:
    again = asyncio.Event()
    again.set()
    assert await main.drain(arrived.b.serving, 60, again) is ExitStatus.GUESTS_DEPEND
    assert await main.drain(arrived.b.serving, 0.01, asyncio.Event()) is ExitStatus.GUESTS_DEPEND
    assert "guest waits for its memory" in caplog.text


async def test_a_source_needs_nobody(arrived: Arrived) -> None:
    """Its page server serves the memory; its agent may go at once."""
    await nodes.seal(arrived.a, ORDERS)
    assert await main.drain(arrived.a.serving, 60, asyncio.Event()) is ExitStatus.OK
