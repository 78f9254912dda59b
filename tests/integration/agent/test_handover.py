# SPDX-License-Identifier: Apache-2.0
"""The hand-over between two agents with real QEMUs; memory is copied, not fetched."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from godwit.agent.v1 import fault_agent_service_pb2 as pb
from godwit.common.v1 import common_pb2

from services.common.vm_spec import VmSpec
from tests.harness.console import Console
from tests.integration.agent.nodes import (
    CopyingPageCore,
    Host,
    Orders,
    activate,
    describe,
    pause,
    prepare,
    release,
    running_agent,
    seal,
    start_vm,
    transfer,
    wait_phase,
)

pytestmark = pytest.mark.requires("qemu")

MakeSpec = Callable[..., VmSpec]


async def test_a_guest_moves_and_moves_back(
    host_a: Host, host_b: Host, core: CopyingPageCore, make_spec: MakeSpec
) -> None:
    """Every heartbeat of the guest is on exactly one console, in order, over two moves."""
    spec = make_spec()
    async with running_agent(host_a, core) as a, running_agent(host_b, core) as b:
        await start_vm(a, spec, epoch=1)
        consoles = [Console(a.vm_dir(spec.vm_id) / "console-1.log")]
        await consoles[0].wait_beat(20)

        for source, destination, epoch in ((a, b, 2), (b, a, 3)):
            orders = Orders(vm_id=spec.vm_id, epoch=epoch, migration_id=f"m{epoch}")
            prepared = await prepare(source, destination, orders)
            assert prepared.role == pb.VM_ROLE_ARRIVING
            assert prepared.vmm_state == pb.VMM_STATE_INCOMING
            assert prepared.epoch_prepared == epoch

            paused = await pause(source, orders)
            assert paused.vmm_state == pb.VMM_STATE_PAUSED
            assert paused.image.state == common_pb2.IMAGE_STATE_FROZEN
            moved = await transfer(source, destination, orders)
            assert moved.len_bytes > 0
            loaded = await describe(destination, spec.vm_id)
            assert (loaded.epoch_loaded, loaded.vmm_state) == (epoch, pb.VMM_STATE_PAUSED)
            last = consoles[-1].last_beat()

            arrived = await activate(destination, orders)
            assert arrived.role == pb.VM_ROLE_ARRIVED
            assert arrived.epoch_owned == epoch
            sealed = await seal(source, orders)
            assert (sealed.role, sealed.vmm_state) == (pb.VM_ROLE_SEALED, pb.VMM_STATE_DEAD)
            assert sealed.retained_bytes > 0

            consoles.append(Console(destination.vm_dir(spec.vm_id) / f"console-{epoch}.log"))
            await consoles[-1].wait_beat(last + 50)
            assert consoles[-1].follows(consoles[-2])
            assert consoles[-2].last_beat() == last
            await wait_phase(destination, orders, pb.ARRIVAL_PHASE_COMPLETE)
            released = await release(source, orders, pb.SIDE_SOURCE)
            assert (released.role, released.retained_bytes) == (pb.VM_ROLE_GONE, 0)
            kept = await release(destination, orders, pb.SIDE_DESTINATION)
            assert (kept.role, kept.vmm_state) == (pb.VM_ROLE_RESIDENT, pb.VMM_STATE_RUNNING)
        for console in consoles:
            assert console.errors() == []
        assert list(host_b.ram_dir.iterdir()) == []
        assert list(host_a.images_dir.iterdir()) == []
