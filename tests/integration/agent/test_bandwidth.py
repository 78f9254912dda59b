# SPDX-License-Identifier: Apache-2.0
"""Two guests arrive from one host at once: they share its bandwidth by their weights."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from godwit.agent.v1 import fault_agent_service_pb2 as pb

from services.common.vm_spec import VmSpec
from services.demo.microvm_guest import make_spec
from services.pagecore.native import NativePageCore
from tests.harness.microvm import need_microvm
from tests.integration.agent import nodes
from tests.integration.agent.nodes import Agent, Orders, running_agent, running_host

MIB = 1 << 20
PAGES_PER_MIB = 256
RATE = 16 * MIB
ENOUGH_PAGES = 12 * PAGES_PER_MIB
"""Of the heavier: a second of its share, of the 24 MiB that its guest has filled."""
WEIGHTS = {"light": 100, "heavy": 300}
FILLED_S = 60.0


def _spec(vm_id: str) -> VmSpec:
    spec = make_spec(
        vm_id,
        accel="thread",
        memory_bytes=64 * MIB,
        workload_bytes=24 * MIB,
        workload="idle",
        fault_backend="exit-sigsegv",
    )
    return spec.model_copy(update={"bandwidth_weight": WEIGHTS[vm_id]})


def _wait_filled(path: Path) -> None:
    """Until the guest has filled its memory."""
    deadline_s = time.monotonic() + FILLED_S
    while path.stat().st_blocks * 512 < 24 * MIB:
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


async def _hand_over(a: Agent, b: Agent, orders: Orders) -> None:
    await nodes.prepare(a, b, orders)
    await nodes.pause(a, orders)
    await nodes.transfer(a, b, orders)


async def _is_whole(a: Agent, b: Agent, orders: Orders) -> None:
    await nodes.wait_phase(b, orders, pb.ARRIVAL_PHASE_COMPLETE)
    await nodes.release(a, orders, pb.SIDE_SOURCE)
    await nodes.release(b, orders, pb.SIDE_DESTINATION)


async def test_guests_from_one_host_share_by_weight(tmp_path: Path, ram_parent: Path) -> None:
    """Weights 1 to 3 through one limit; what the first to be whole leaves is the other's."""
    need_microvm()
    core = NativePageCore()
    orders = {vm: Orders(vm_id=vm, epoch=2, migration_id=f"m-{vm}") for vm in WEIGHTS}
    async with (
        running_host("a", tmp_path, ram_parent, core) as host_a,
        running_host("b", tmp_path, ram_parent, core) as host_b,
        running_agent(host_a, core) as a,
        running_agent(host_b, core, peer_bytes_per_s_max=RATE) as b,
    ):
        for vm in WEIGHTS:
            await nodes.start_vm(a, _spec(vm), epoch=1)
            ram = Path(a.serving.node.vm(vm).record.ram_path)
            await asyncio.to_thread(_wait_filled, ram)
        for vm in WEIGHTS:
            await _hand_over(a, b, orders[vm])
        await asyncio.gather(*(nodes.activate(b, orders[vm]) for vm in WEIGHTS))
        watches = {vm: b.serving.node.vm(vm).watch for vm in WEIGHTS}
        bulk = dict.fromkeys(WEIGHTS, 0)
        while bulk["heavy"] < ENOUGH_PAGES:
            await asyncio.sleep(0.01)
            for vm, watch in watches.items():
                assert watch is not None
                bulk[vm] = watch.refresh().bulk_page_count
        assert bulk["light"] * 2 < bulk["heavy"] < bulk["light"] * 4.5, bulk
        for vm in WEIGHTS:
            await nodes.seal(a, orders[vm])
        await asyncio.gather(*(_is_whole(a, b, orders[vm]) for vm in WEIGHTS))
