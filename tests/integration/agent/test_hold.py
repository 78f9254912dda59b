# SPDX-License-Identifier: Apache-2.0
"""A guest that is held for too long is frozen whole, and goes on whole; its clock has gone on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from godwit.agent.v1 import fault_agent_service_pb2 as pb

from services.common.vm_spec import VmSpec
from services.fault_agent.drivers.command_line import CONSOLE_PIPE
from services.fault_agent.freezer import Freezer, find_cgroup2
from services.pagecore.api import NO_HOLD, ArrivalPhase, Hold, HoldCause
from services.pagecore.fake import FakeArrival
from tests.harness.console import Console
from tests.integration.agent import nodes
from tests.integration.agent.nodes import Agent, CopyingPageCore, Host, Orders, running_agent

pytestmark = pytest.mark.requires("qemu")

MakeSpec = Callable[..., VmSpec]
ORDERS = Orders(vm_id="guest", epoch=2, migration_id="m2")
AFTER_MS = 200
FROZEN_S = 2.0
"""How long the guest stands still in the clock's test; what is compared is measured, not this."""


@pytest.fixture
async def a(host_a: Host, core: CopyingPageCore) -> AsyncIterator[Agent]:
    """The source's agent."""
    async with running_agent(host_a, core) as agent:
        yield agent


async def arrive(a: Agent, b: Agent, core: CopyingPageCore, spec: VmSpec) -> Console:
    """Up to a guest that runs at b, with the policy; none of its memory comes by itself."""
    core.complete_at_once = False
    await nodes.start_vm(a, spec, epoch=1)
    await Console(a.vm_dir("guest") / "console-1.log").wait_beat(5)
    await nodes.prepare(a, b, ORDERS, freeze_after_ms=AFTER_MS)
    await nodes.pause(a, ORDERS)
    await nodes.transfer(a, b, ORDERS)
    await nodes.activate(b, ORDERS)
    await nodes.seal(a, ORDERS)
    console = Console(b.vm_dir("guest") / "console-2.log")
    await console.wait_beat(1)
    return console


def lose(arrival: FakeArrival, held_ms: int) -> None:
    """The link is lost, and the guest has been held for so long."""
    hold = Hold(
        number=1,
        cause=HoldCause.LINK_LOST,
        outage_ns=(held_ms + 1) * 1_000_000,
        held_ns=held_ms * 1_000_000,
    )
    arrival.update(phase=ArrivalPhase.LINK_LOST, held_fault_count=1, hold_now=hold)


def find(arrival: FakeArrival, waiting: int) -> None:
    """The link is back; so many faults are still to be served."""
    arrival.update(phase=ArrivalPhase.FETCHING, held_fault_count=waiting, hold_now=NO_HOLD)


def stands_still(agent: Agent) -> bool:
    """The kernel's word."""
    process = agent.serving.node.vm("guest").record.process
    return process is not None and Freezer(find_cgroup2()).is_frozen(process)


async def wait_frozen(agent: Agent, frozen: bool) -> pb.Evidence:
    """Until evidence says so; and the kernel."""
    while (evidence := await nodes.describe(agent, "guest")).frozen != frozen:  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    assert stands_still(agent) == frozen
    return evidence


async def goes_on(console: Console) -> None:
    """It lives, and has lost nothing."""
    await console.wait_beat(console.reached() + 10)
    assert console.errors() == []


async def test_frozen_when_held_thawed_when_served_and_by_the_next_agent(
    a: Agent, host_b: Host, core: CopyingPageCore, make_spec: MakeSpec
) -> None:
    """Not before its time, not twice, not for ever: nor after a death of the agent, nor at the end.

    Frozen it is neither dead nor ended: the evidence says what it did, and goes on to do.
    """
    async with running_agent(host_b, core) as b:
        console = await arrive(a, b, core, make_spec())
        arrival = core.arrivals[-1]
        lose(arrival, AFTER_MS - 100)
        await goes_on(console)
        assert not stands_still(b)
        lose(arrival, AFTER_MS)
        evidence = await wait_frozen(b, True)
        assert (evidence.vmm_state, evidence.role) == (pb.VMM_STATE_RUNNING, pb.VM_ROLE_ARRIVED)
        lose(arrival, AFTER_MS * 10)
        # The link is there, one fault is not served: it waits for that one.
        find(arrival, waiting=1)
        assert stands_still(b)
        find(arrival, waiting=0)
        await wait_frozen(b, False)
        await goes_on(console)
        lose(arrival, AFTER_MS)
        await wait_frozen(b, True)
    async with running_agent(host_b, core) as b:
        assert not stands_still(b), "thawed before anybody is answered"
        evidence = await nodes.describe(b, "guest")
        assert (evidence.vmm_state, evidence.frozen) == (pb.VMM_STATE_RUNNING, False)
        await goes_on(console)
        arrival = core.arrivals[-1]
        lose(arrival, AFTER_MS)
        await wait_frozen(b, True)
        arrival.update(held_fault_count=0, hold_now=NO_HOLD)
        arrival.install_all()
        await nodes.wait_phase(b, ORDERS, pb.ARRIVAL_PHASE_COMPLETE)
        await nodes.release(a, ORDERS, pb.SIDE_SOURCE)
        evidence = await nodes.release(b, ORDERS, pb.SIDE_DESTINATION)
        assert (evidence.role, evidence.frozen) == (pb.VM_ROLE_RESIDENT, False)
        assert not stands_still(b)
        await goes_on(console)


_CLOCK = re.compile(r"^CLOCK mono_ns=(\d+) real_ns=(\d+)$", re.MULTILINE)


async def clocks(vm_dir: Path, console: Console) -> tuple[int, int, int, int]:
    """The guest's two clocks, and ours before and after it looked. Nanoseconds."""
    seen = len(_CLOCK.findall(console.text()))
    before = time.monotonic_ns()
    fifo = os.open(vm_dir / f"{CONSOLE_PIPE}.in", os.O_WRONLY | os.O_NONBLOCK)
    try:
        os.write(fifo, b"clock\n")
    finally:
        os.close(fifo)
    while len(found := _CLOCK.findall(console.text())) == seen:  # noqa: ASYNC110 - a file
        await asyncio.sleep(0.005)
    monotonic, real = found[-1]
    return int(monotonic), int(real), before, time.monotonic_ns()


async def test_the_clock_of_a_frozen_guest_goes_on(
    a: Agent, host_b: Host, core: CopyingPageCore, make_spec: MakeSpec
) -> None:
    """Both of its clocks have advanced, after the thaw, by as much as ours: none stood still."""
    async with running_agent(host_b, core) as b:
        console = await arrive(a, b, core, make_spec())
        vm_dir = b.vm_dir("guest")
        mono_then, real_then, before_then, _ = await clocks(vm_dir, console)
        lose(core.arrivals[-1], AFTER_MS)
        await wait_frozen(b, True)
        frozen_at = time.monotonic_ns()
        await asyncio.sleep(FROZEN_S)
        beats = console.reached()
        thaw_at = time.monotonic_ns()
        find(core.arrivals[-1], waiting=0)
        await wait_frozen(b, False)
        mono, real, _, after = await clocks(vm_dir, console)
        frozen_ns = thaw_at - frozen_at
        assert mono - mono_then >= frozen_ns
        assert real - real_then >= frozen_ns
        # And no faster than ours, but for 1 % of a clock that is calibrated in a busy guest.
        assert mono - mono_then <= (after - before_then) * 1.01 + 2e8
        await console.wait_beat(beats + 10)
        assert console.errors() == []


async def test_a_guest_that_powers_off_ends_the_watch(
    a: Agent, host_b: Host, core: CopyingPageCore, make_spec: MakeSpec
) -> None:
    """In mid post-copy, with nothing lost: nobody but a look at the VMM would notice."""
    async with running_agent(host_b, core) as b:
        await arrive(a, b, core, make_spec())
        with contextlib.closing(
            os.fdopen(
                os.open(b.vm_dir("guest") / f"{CONSOLE_PIPE}.in", os.O_WRONLY | os.O_NONBLOCK), "wb"
            )
        ) as fifo:
            fifo.write(b"end\n")
        step = await nodes.wait_phase(b, ORDERS, pb.ARRIVAL_PHASE_ENDED)
        assert step.counters.absent_count > 0
        evidence = await nodes.describe(b, "guest")
        assert evidence.vmm_state == pb.VMM_STATE_GUEST_ENDED
        await nodes.release(a, ORDERS, pb.SIDE_SOURCE)
        gone = await nodes.release(b, ORDERS, pb.SIDE_DESTINATION)
        assert (gone.role, gone.vmm_state) == (pb.VM_ROLE_GONE, pb.VMM_STATE_DEAD)
        for agent in (a, b):
            assert list(agent.serving.node.config.ram_dir.iterdir()) == []
