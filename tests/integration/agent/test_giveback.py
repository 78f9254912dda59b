# SPDX-License-Identifier: Apache-2.0
"""A guest that was committed and never let run goes back to its source: real QEMUs (ADR 7)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from godwit.agent.v1 import fault_agent_service_pb2 as pb
from godwit.common.v1 import common_pb2

from services.common import grpc_client
from services.common.errors import GodwitError
from services.common.vm_spec import VmSpec
from services.fault_agent import processes
from tests.harness.console import Console
from tests.integration.agent import nodes
from tests.integration.agent.nodes import Agent, CopyingPageCore, Host, Orders, running_agent

pytestmark = pytest.mark.requires("qemu")

MakeSpec = Callable[..., VmSpec]
FRESH = 3


async def recall(
    agent: Agent, orders: Orders, side: pb.Side.ValueType, decision: int, epoch: int = FRESH
) -> pb.Evidence:
    """Recall under a fresh epoch."""
    request = pb.RecallRequest(fence=orders.fence(decision, epoch), side=side)
    answer = await grpc_client.call(agent.channel, agent.stub.Recall, request, timeout_s=60)
    return answer.evidence


async def take_back(agent: Agent, orders: Orders) -> pb.Evidence:
    """Resume under RETURNED."""
    fence = orders.fence(common_pb2.DECISION_RETURNED, FRESH)
    request = pb.ResumeRequest(fence=fence)
    answer = await grpc_client.call(agent.channel, agent.stub.Resume, request, timeout_s=60)
    return answer.evidence


async def reason_of(awaitable: object) -> str:
    with pytest.raises(GodwitError) as refusal:
        await awaitable  # type: ignore[misc]
    return refusal.value.reason


async def kill_vmm(agent: Agent, vm_id: str) -> None:
    process = agent.serving.node.vm(vm_id).record.process
    assert process is not None
    await processes.kill(process)


@pytest.mark.parametrize("left", ["paused", "sealed", "killed"])
async def test_the_source_goes_on_where_it_stopped(
    host_a: Host, host_b: Host, core: CopyingPageCore, make_spec: MakeSpec, left: str
) -> None:
    """Whether its VMM still stands there or was taken down: no beat lost, none twice, no bad page.

    Its agent dies once while the VMM is made again; the next one begins anew.
    """
    spec, orders = make_spec(), Orders(vm_id="guest", epoch=2, migration_id="m2")
    committed = common_pb2.DECISION_COMMITTED
    async with running_agent(host_b, core) as b:
        async with running_agent(host_a, core) as a:
            await nodes.start_vm(a, spec, epoch=1)
            before = Console(a.vm_dir(spec.vm_id) / "console-1.log")
            await before.wait_beat(20)
            await nodes.prepare(a, b, orders)
            await nodes.pause_and_transfer(a, b, orders)
            last = before.last_beat()
            if left == "sealed":
                sealed = await nodes.seal(a, orders)
                assert (sealed.role, sealed.returnable) == (pb.VM_ROLE_SEALED, True)
            elif left == "killed":
                await kill_vmm(a, "guest")
            await kill_vmm(b, "guest")
            # The destination is fenced, and then refuses what is late.
            fenced = await recall(b, orders, pb.SIDE_DESTINATION, committed)
            assert (fenced.role, fenced.vmm_state) == (pb.VM_ROLE_GONE, pb.VMM_STATE_DEAD)
            assert (fenced.epoch_loaded, fenced.epoch_activating) == (2, 0)
            assert await reason_of(nodes.activate(b, orders)) == "STALE_EPOCH"
            kept = await recall(a, orders, pb.SIDE_SOURCE, committed)
            assert kept.returnable
            assert await reason_of(nodes.seal(a, orders)) == "STALE_EPOCH"
        # Another agent of the same node.
        async with running_agent(host_a, core) as a:
            runs = await take_back(a, orders)
            assert (runs.role, runs.vmm_state) == (pb.VM_ROLE_RESIDENT, pb.VMM_STATE_RUNNING)
            assert runs.epoch_owned == FRESH
            again = await take_back(a, orders)
            assert again.vmm_state == pb.VMM_STATE_RUNNING
            after = before
            if left != "paused":
                after = Console(a.vm_dir(spec.vm_id) / f"console-{FRESH}.log")
            sweeps = after.sweeps()
            await after.wait_beat(last + 50)
            await after.wait_sweeps(sweeps + 1)
            assert after.errors() == []
            assert after is before or after.follows(before)
            assert not list(host_a.ram_dir.glob("*.state"))
            assert list(host_a.images_dir.iterdir()) == []
            # It can be moved again.
            orders = Orders(vm_id="guest", epoch=4, migration_id="m4")
            await nodes.prepare(a, b, orders)
            await nodes.pause_and_transfer(a, b, orders)
            assert (await nodes.activate(b, orders)).vmm_state == pb.VMM_STATE_RUNNING


async def test_what_may_have_run_is_not_taken_back(
    host_a: Host, host_b: Host, core: CopyingPageCore, make_spec: MakeSpec
) -> None:
    """ACTIVATING is durable: the recall is refused. Under RETURNED the node is fenced even so."""
    orders = Orders(vm_id="guest", epoch=2, migration_id="m2")
    async with running_agent(host_a, core) as a, running_agent(host_b, core) as b:
        await nodes.start_vm(a, make_spec(), epoch=1)
        await nodes.prepare(a, b, orders)
        await nodes.pause_and_transfer(a, b, orders)
        await nodes.activate(b, orders)
        refused = recall(b, orders, pb.SIDE_DESTINATION, common_pb2.DECISION_COMMITTED)
        assert await reason_of(refused) == "WRONG_STATE"
        assert (await nodes.describe(b, "guest")).vmm_state == pb.VMM_STATE_RUNNING
        written_off = await recall(b, orders, pb.SIDE_DESTINATION, common_pb2.DECISION_RETURNED)
        assert (written_off.role, written_off.vmm_state) == (pb.VM_ROLE_GONE, pb.VMM_STATE_DEAD)
        assert await reason_of(nodes.activate(b, orders)) == "STALE_EPOCH"
