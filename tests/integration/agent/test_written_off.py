# SPDX-License-Identifier: Apache-2.0
"""A node that was written off comes back and runs nothing of before: real QEMUs.

What it had is nobody's by then: its guest was given back, aborted or given up while it was away.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

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
ORDERS = Orders(vm_id="guest", epoch=2, migration_id="m2")
FRESH = 3
COMMITTED = common_pb2.DECISION_COMMITTED
RETURNED = common_pb2.DECISION_RETURNED
LOST = common_pb2.DECISION_LOST


async def reason_of(awaitable: Awaitable[object]) -> str:
    with pytest.raises(GodwitError) as refusal:
        await awaitable
    return refusal.value.reason


def vmms_of(host: Host) -> list[int]:
    """Processes of this node's VMs, by their memory, whatever any journal says."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if str(host.ram_dir).encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


async def lose_power(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of a node whose agent is gone: its disk. Its next agent is of another boot."""
    await nodes.kill_vmms(host)
    for path in host.ram_dir.iterdir():
        path.unlink()
    assert vmms_of(host) == []
    monkeypatch.setattr(processes, "boot_id", lambda: "another-boot")


async def recall(agent: Agent, side: pb.Side.ValueType, decision: int) -> pb.Evidence:
    request = pb.RecallRequest(fence=ORDERS.fence(decision, FRESH), side=side)
    answer = await grpc_client.call(agent.channel, agent.stub.Recall, request, timeout_s=60)
    return answer.evidence


async def resume(agent: Agent, decision: int, epoch: int) -> pb.Evidence:
    request = pb.ResumeRequest(fence=ORDERS.fence(decision, epoch))
    answer = await grpc_client.call(agent.channel, agent.stub.Resume, request, timeout_s=60)
    return answer.evidence


async def give_up(agent: Agent, side: pb.Side.ValueType) -> pb.Evidence:
    request = pb.ReleaseRequest(fence=ORDERS.fence(LOST, FRESH), side=side)
    answer = await grpc_client.call(agent.channel, agent.stub.Release, request, timeout_s=60)
    return answer.evidence


async def load(agent: Agent) -> None:
    """What an agent of before still had on its way."""

    async def messages() -> AsyncIterator[pb.LoadDeviceStateRequest]:
        header = pb.DeviceStateHeader(fence=ORDERS.fence(), generation=2)
        yield pb.LoadDeviceStateRequest(header=header)

    await grpc_client.call(agent.channel, agent.stub.LoadDeviceState, messages(), timeout_s=60)


async def assert_nothing_of_before_is_obeyed(agent: Agent, other: Agent, spec: VmSpec) -> None:
    """Each order of epochs 1 and 2, as late as can be: stale."""
    late = [
        nodes.activate(agent, ORDERS),
        nodes.seal(agent, ORDERS),
        nodes.pause(agent, ORDERS),
        nodes.transfer(agent, other, ORDERS),
        load(agent),
        nodes.abort(agent, ORDERS, pb.SIDE_SOURCE),
        nodes.abort(agent, ORDERS, pb.SIDE_DESTINATION),
        nodes.release(agent, ORDERS, pb.SIDE_SOURCE),
        nodes.release(agent, ORDERS, pb.SIDE_DESTINATION),
        resume(agent, common_pb2.DECISION_UNSPECIFIED, 1),
        resume(agent, common_pb2.DECISION_ABORTED, 2),
        resume(agent, RETURNED, 2),
        nodes.start_vm(agent, spec, epoch=1),
        nodes.start_vm(agent, spec, epoch=2),
        nodes.prepare(agent, other, ORDERS),
    ]
    assert [await reason_of(order) for order in late] == ["STALE_EPOCH"] * len(late)


async def paused_and_loaded(a: Agent, b: Agent, spec: VmSpec) -> None:
    await nodes.start_vm(a, spec, epoch=1)
    await nodes.prepare(a, b, ORDERS)
    await nodes.pause_and_transfer(a, b, ORDERS)


@pytest.mark.parametrize("came_to", ["loaded", "activated"])
async def test_a_destination_that_lost_its_power_never_runs_it(
    host_a: Host,
    host_b: Host,
    core: CopyingPageCore,
    make_spec: MakeSpec,
    monkeypatch: pytest.MonkeyPatch,
    came_to: str,
) -> None:
    """Before it is told anything, and after it is told that the guest went back."""
    spec = make_spec()
    async with running_agent(host_a, core) as a:
        async with running_agent(host_b, core) as b:
            await paused_and_loaded(a, b, spec)
            if came_to == "activated":
                await nodes.activate(b, ORDERS)
        await lose_power(host_b, monkeypatch)
        async with running_agent(host_b, core) as b:
            before = await nodes.describe(b, "guest")
            assert (before.boot_id, before.vmm_state) == ("another-boot", pb.VMM_STATE_DEAD)
            assert before.epoch_loaded == 2
            assert before.epoch_activating == (2 if came_to == "activated" else 0)
            assert (before.retained_bytes, before.returnable) == (0, False)
            # Under its own epoch still: it says that it cannot, by refusal or by evidence.
            if came_to == "loaded":
                assert await reason_of(nodes.activate(b, ORDERS)) == "NODE_REBOOTED"
                assert await reason_of(load(b)) == "NODE_REBOOTED"
            else:
                assert (await nodes.activate(b, ORDERS)).vmm_state == pb.VMM_STATE_DEAD
            after = await nodes.describe(b, "guest")
            assert after.epoch_activating == before.epoch_activating, "no mark without an act"
            assert vmms_of(host_b) == []
            fenced = await recall(b, pb.SIDE_DESTINATION, RETURNED)
            assert (fenced.role, fenced.vmm_state) == (pb.VM_ROLE_GONE, pb.VMM_STATE_DEAD)
            await assert_nothing_of_before_is_obeyed(b, a, spec)
        # The fence outlives this agent, too.
        async with running_agent(host_b, core) as b:
            await assert_nothing_of_before_is_obeyed(b, a, spec)
            assert (await nodes.describe(b, "guest")).epoch_seen == FRESH
            assert vmms_of(host_b) == []
            assert list(host_b.ram_dir.iterdir()) == []


@pytest.mark.parametrize("came_to", ["paused", "sealed"])
async def test_a_source_that_lost_its_power_never_runs_it(
    host_a: Host,
    host_b: Host,
    core: CopyingPageCore,
    make_spec: MakeSpec,
    monkeypatch: pytest.MonkeyPatch,
    came_to: str,
) -> None:
    """Its memory went with the boot: neither ABORTED nor RETURNED makes it run what is left."""
    spec = make_spec()
    async with running_agent(host_b, core) as b:
        async with running_agent(host_a, core) as a:
            await paused_and_loaded(a, b, spec)
            if came_to == "sealed":
                await nodes.seal(a, ORDERS)
        await lose_power(host_a, monkeypatch)
        async with running_agent(host_a, core) as a:
            evidence = await nodes.describe(a, "guest")
            assert (evidence.boot_id, evidence.vmm_state) == ("another-boot", pb.VMM_STATE_DEAD)
            assert (evidence.retained_bytes, evidence.returnable) == (0, False)
            if came_to == "sealed":
                assert not (await recall(a, pb.SIDE_SOURCE, COMMITTED)).returnable
                assert await reason_of(resume(a, RETURNED, FRESH)) == "NODE_REBOOTED"
            else:
                pause = nodes.pause(a, ORDERS)
                assert await reason_of(pause) == "NODE_REBOOTED"
                undone = resume(a, common_pb2.DECISION_ABORTED, FRESH)
                assert await reason_of(undone) == "NODE_REBOOTED"
            assert vmms_of(host_a) == []
            # Given up: its record goes, and nothing of before is obeyed.
            assert (await give_up(a, pb.SIDE_SOURCE)).role == pb.VM_ROLE_GONE
            await assert_nothing_of_before_is_obeyed(a, b, spec)
            assert vmms_of(host_a) == []


async def test_a_destination_written_off_alive_is_fenced_when_it_is_back(
    host_a: Host, host_b: Host, core: CopyingPageCore, make_spec: MakeSpec
) -> None:
    """By force: the guest went back while b, loaded and paused, could not be asked.

    The first word that b hears kills the VMM, and what came late from before is stale; a runs on.
    """
    spec = make_spec()
    async with running_agent(host_a, core) as a:
        async with running_agent(host_b, core) as b:
            await paused_and_loaded(a, b, spec)
        assert (await recall(a, pb.SIDE_SOURCE, COMMITTED)).returnable
        runs = await resume(a, RETURNED, FRESH)
        assert (runs.role, runs.vmm_state) == (pb.VM_ROLE_RESIDENT, pb.VMM_STATE_RUNNING)
        async with running_agent(host_b, core) as b:
            # It takes its shell up again, and lets nothing run by itself.
            assert (await nodes.describe(b, "guest")).vmm_state == pb.VMM_STATE_PAUSED
            assert len(vmms_of(host_b)) == 1
            fenced = await recall(b, pb.SIDE_DESTINATION, RETURNED)
            assert (fenced.role, fenced.vmm_state) == (pb.VM_ROLE_GONE, pb.VMM_STATE_DEAD)
            assert vmms_of(host_b) == []
            await assert_nothing_of_before_is_obeyed(b, a, spec)
            # Nor under the epoch of the return: there is nothing here that it could be about.
            forged = pb.ActivateRequest(fence=ORDERS.fence(COMMITTED, FRESH))
            call = grpc_client.call(b.channel, b.stub.Activate, forged, timeout_s=60)
            assert await reason_of(call) == "DECISION_CONFLICT"
        console = Console(a.vm_dir("guest") / "console-1.log")
        await console.wait_beat(20)
        assert console.errors() == []
