# SPDX-License-Identifier: Apache-2.0
"""The real thing: agents, page servers, the native page path, a guest that checks itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from godwit.agent.v1 import fault_agent_service_pb2 as pb

from services.common.errors import GodwitError
from services.common.vm_spec import VmSpec
from services.fault_agent import processes
from services.fault_agent.drivers.qemu import QemuVmm
from services.pagecore.api import ArrivalPhase, PageCore
from tests.harness.console import Console
from tests.integration.agent import nodes
from tests.integration.agent.nodes import (
    Agent,
    Host,
    Orders,
    running_agent,
    running_host,
)

pytestmark = pytest.mark.requires("qemu", "uffd", "root")

MakeSpec = Callable[..., VmSpec]
MIB = 1 << 20
BALLOON_LEAVES_BYTES = 112 * MIB
SLOW_BYTES_PER_S = 8 << 20
"""Slow enough that a test can do something while memory arrives."""


@pytest.fixture
def native() -> PageCore:
    """The page core that runs in production."""
    from services.pagecore.native import NativePageCore

    return NativePageCore()


@pytest.fixture
async def hosts(
    native: PageCore, tmp_path: Path, ram_parent: Path
) -> AsyncIterator[tuple[Host, Host]]:
    """Nodes a and b with native page servers."""
    async with (
        running_host("a", tmp_path, ram_parent, native) as a,
        running_host("b", tmp_path, ram_parent, native) as b,
    ):
        yield a, b


async def hand_over(
    source: Agent, destination: Agent, orders: Orders, bulk_bytes_per_s: int = 0
) -> Console:
    """Up to a running guest and a sealed source; the new console."""
    last = Console(source.vm_dir(orders.vm_id) / f"console-{orders.epoch - 1}.log")
    await nodes.prepare(source, destination, orders, bulk_bytes_per_s)
    await nodes.pause(source, orders)
    await nodes.transfer(source, destination, orders)
    await nodes.activate(destination, orders)
    await nodes.seal(source, orders)
    console = Console(destination.vm_dir(orders.vm_id) / f"console-{orders.epoch}.log")
    await console.wait_beat(last.last_beat() + 10)
    assert console.follows(last)
    return console


async def finish(source: Agent, destination: Agent, orders: Orders) -> pb.WatchProgressResponse:
    """Until both sides are released; the last progress."""
    complete = await nodes.wait_phase(destination, orders, pb.ARRIVAL_PHASE_COMPLETE)
    await nodes.release(source, orders, pb.SIDE_SOURCE)
    await nodes.release(destination, orders, pb.SIDE_DESTINATION)
    return complete


async def test_memory_follows_the_guest_both_ways(
    native: PageCore, hosts: tuple[Host, Host], make_spec: MakeSpec
) -> None:
    spec = make_spec()
    async with running_agent(hosts[0], native) as a, running_agent(hosts[1], native) as b:
        await nodes.start_vm(a, spec, epoch=1)
        console = Console(a.vm_dir("guest") / "console-1.log")
        await console.wait_beat(20)
        await console.wait_sweeps(1)
        for source, destination, epoch in ((a, b, 2), (b, a, 3)):
            orders = Orders(vm_id="guest", epoch=epoch, migration_id=f"m{epoch}")
            console = await hand_over(source, destination, orders)
            complete = await finish(source, destination, orders)
            counters = complete.counters
            assert counters.absent_count == 0
            assert counters.demand_page_count > 0
            assert counters.violation_count == 0
            pages = (
                counters.demand_page_count
                + counters.bulk_page_count
                + counters.zero_page_count
                + counters.removed_page_count
            )
            assert pages == counters.page_count == spec.memory_bytes // 4096
            # Two sweeps that began after the move, over every page of the workload.
            await console.wait_sweeps(2)
            assert console.errors() == []
            assert list(source.serving.node.config.ram_dir.iterdir()) == []


async def test_the_agent_goes_and_the_guest_waits_for_the_next(
    native: PageCore, hosts: tuple[Host, Host], make_spec: MakeSpec
) -> None:
    """In the middle of post-copy: the guest never reads zeros, and goes on with the next agent."""
    orders = Orders(vm_id="guest", epoch=2, migration_id="m2")
    async with running_agent(hosts[0], native) as a:
        async with running_agent(hosts[1], native) as b:
            await nodes.start_vm(a, make_spec(), epoch=1)
            await Console(a.vm_dir("guest") / "console-1.log").wait_sweeps(1)
            console = await hand_over(a, b, orders, SLOW_BYTES_PER_S)
            before = await nodes.describe(b, "guest")
            assert before.counters.absent_count > 0
        # Nobody answers its faults now.
        async with running_agent(hosts[1], native) as b:
            after = await nodes.describe(b, "guest")
            assert after.role == pb.VM_ROLE_ARRIVED
            assert after.counters.absent_count > 0
            b.serving.node.vm("guest").watch.arrival.set_bulk_rate(0)  # type: ignore[union-attr]
            await finish(a, b, orders)
            await console.wait_sweeps(2)
            assert console.errors() == []


async def test_an_image_that_is_not_served_for_a_while_is_asked_for_again(
    native: PageCore, hosts: tuple[Host, Host], make_spec: MakeSpec
) -> None:
    """A guest that runs here has no other source: a refusal is never the last word."""
    orders = Orders(vm_id="guest", epoch=2, migration_id="m2")
    async with running_agent(hosts[0], native) as a, running_agent(hosts[1], native) as b:
        await nodes.start_vm(a, make_spec(), epoch=1)
        await Console(a.vm_dir("guest") / "console-1.log").wait_beat(10)
        console = await hand_over(a, b, orders, SLOW_BYTES_PER_S)
        (record,) = hosts[0].images_dir.glob("*.json")
        saved = record.read_bytes()
        record.unlink()
        await a.serving.node.images.reload()
        lost = await nodes.wait_phase(b, orders, pb.ARRIVAL_PHASE_LINK_LOST)
        assert lost.reason.startswith("REFUSED")
        record.write_bytes(saved)
        await a.serving.node.images.reload()
        await nodes.wait_phase(b, orders, pb.ARRIVAL_PHASE_FETCHING)
        b.serving.node.vm("guest").watch.arrival.set_bulk_rate(0)  # type: ignore[union-attr]
        complete = await finish(a, b, orders)
        assert complete.counters.reconnect_count > 0
        await console.wait_sweeps(1)
        assert console.errors() == []


async def test_the_end_of_a_vmm_is_told(
    native: PageCore, hosts: tuple[Host, Host], make_spec: MakeSpec
) -> None:
    """A shell whose process is gone can never complete: the source's memory stays."""
    orders = Orders(vm_id="guest", epoch=2, migration_id="m2")
    async with running_agent(hosts[0], native) as a, running_agent(hosts[1], native) as b:
        await nodes.start_vm(a, make_spec(), epoch=1)
        await nodes.prepare(a, b, orders, SLOW_BYTES_PER_S)
        await nodes.pause(a, orders)
        await nodes.transfer(a, b, orders)
        await nodes.activate(b, orders)
        await nodes.seal(a, orders)
        process = b.serving.node.vm("guest").record.process
        assert process is not None
        await processes.kill(process)
        ended = await nodes.wait_phase(b, orders, pb.ARRIVAL_PHASE_ENDED)
        assert ended.reason
        evidence = await nodes.describe(b, "guest")
        assert (evidence.vmm_state, evidence.epoch_memory_complete) == (pb.VMM_STATE_DEAD, 0)
        assert (await nodes.describe(a, "guest")).retained_bytes > 0


async def test_a_page_server_that_cannot_be_reached_prepares_nothing(
    native: PageCore, hosts: tuple[Host, Host], make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    from services.fault_agent import arrivals

    monkeypatch.setattr(arrivals, "ARM_TIMEOUT_S", 0.3)
    orders = Orders(vm_id="guest", epoch=2, migration_id="m2")
    async with running_agent(hosts[0], native) as a, running_agent(hosts[1], native) as b:
        await nodes.start_vm(a, make_spec(), epoch=1)
        with pytest.raises(GodwitError) as refusal:
            await nodes.prepare(a, b, orders, page_address="127.0.0.1:1")
        assert refusal.value.reason == "PAGE_SERVER_UNREACHABLE"
        evidence = await nodes.describe(b, "guest")
        assert (evidence.role, evidence.vmm_state) == (pb.VM_ROLE_GONE, pb.VMM_STATE_DEAD)
        assert list(hosts[1].ram_dir.iterdir()) == []
        # The way is there now: the same order is obeyed.
        assert (await nodes.prepare(a, b, orders)).epoch_prepared == 2


async def test_no_page_moves_before_the_gate(
    native: PageCore, hosts: tuple[Host, Host], make_spec: MakeSpec
) -> None:
    """PREPARED for as long as one likes: the image is LIVE, nothing of it may be installed."""
    orders = Orders(vm_id="guest", epoch=2, migration_id="m2")
    async with running_agent(hosts[0], native) as a, running_agent(hosts[1], native) as b:
        await nodes.start_vm(a, make_spec(), epoch=1)
        await nodes.prepare(a, b, orders)
        watch = b.serving.node.vm("guest").watch
        assert watch is not None
        await asyncio.sleep(0)
        status = watch.refresh()
        assert (status.phase, status.received_bytes) == (ArrivalPhase.ARMED, 0)
        assert status.absent_count == status.page_count
        path = Path(b.serving.node.vm("guest").record.ram_path)
        assert path.stat().st_blocks == 0  # noqa: ASYNC240
        await nodes.abort(b, orders, pb.SIDE_DESTINATION)


def _pages(ram_path: str) -> int:
    """With memory behind them."""
    return Path(ram_path).stat().st_blocks * 512 // 4096


async def test_what_the_guest_gave_back_before_is_never_fetched(
    native: PageCore, hosts: tuple[Host, Host], make_spec: MakeSpec
) -> None:
    """A balloon is blown up at the source: its pages are holes there, and stay holes here."""
    spec, orders = make_spec(balloon=True), Orders(vm_id="guest", epoch=2, migration_id="m2")
    async with running_agent(hosts[0], native) as a, running_agent(hosts[1], native) as b:
        await nodes.start_vm(a, spec, epoch=1)
        console = Console(a.vm_dir("guest") / "console-1.log")
        await console.wait_sweeps(1)
        source_ram = a.serving.node.vm("guest").record.ram_path
        before = _pages(source_ram)
        vmm = a.serving.node.vm("guest").vmm
        assert isinstance(vmm, QemuVmm)
        await vmm.monitor.execute("balloon", {"value": BALLOON_LEAVES_BYTES})
        # Most of what it gives back it never touched; some it did, while it booted.
        deadline_s = time.monotonic() + 60
        while _pages(source_ram) > before - MIB // 4096:
            assert time.monotonic() < deadline_s, "the guest gives nothing back"
            await asyncio.sleep(0.05)
        await console.wait_sweeps(console.sweeps() + 1)
        pages_with_data = _pages(source_ram)
        console = await hand_over(a, b, orders)
        complete = await nodes.wait_phase(b, orders, pb.ARRIVAL_PHASE_COMPLETE)
        counters = complete.counters
        fetched = counters.demand_page_count + counters.bulk_page_count
        assert fetched <= pages_with_data
        assert counters.zero_page_count >= spec.memory_bytes // 4096 - pages_with_data
        await console.wait_sweeps(2)
        assert console.errors() == []
