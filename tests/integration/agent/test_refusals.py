# SPDX-License-Identifier: Apache-2.0
"""What an agent refuses, and what it does when it is told the same thing twice or too late."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable

import pytest
from godwit.agent.v1 import fault_agent_service_pb2 as pb
from godwit.common.v1 import common_pb2

from services.common import grpc_client
from services.common.errors import GodwitError
from services.common.vm_spec import VmSpec
from services.fault_agent import processes
from services.fault_agent.drivers.command_line import INSPECTION_SOCKET
from services.fault_agent.drivers.qmp import QmpClient
from services.fault_agent.processes import Process
from tests.harness.console import Console
from tests.integration.agent import nodes
from tests.integration.agent.nodes import Agent, CopyingPageCore, Host, Orders, running_agent

pytestmark = pytest.mark.requires("qemu")

MakeSpec = Callable[..., VmSpec]


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


async def reason_of(awaitable: object) -> str:
    """Of the refusal."""
    with pytest.raises(GodwitError) as refusal:
        await awaitable  # type: ignore[misc]
    return refusal.value.reason


def vmm_of(agent: Agent, vm_id: str) -> Process:
    """The process that its journal names."""
    process = agent.serving.node.vm(vm_id).record.process
    assert process is not None
    return process


async def test_every_command_can_be_given_twice(a: Agent, b: Agent, make_spec: MakeSpec) -> None:
    spec, orders = make_spec(), Orders(vm_id="guest", epoch=2, migration_id="m2")
    first = await nodes.start_vm(a, spec, epoch=1)
    assert await nodes.start_vm(a, spec, epoch=1) == first
    assert await nodes.prepare(a, b, orders) == await nodes.prepare(a, b, orders)
    paused = await nodes.pause(a, orders)
    assert await nodes.pause(a, orders) == paused
    moved = await nodes.transfer(a, b, orders)
    assert await nodes.transfer(a, b, orders) == moved
    for step in (nodes.activate, nodes.seal):
        agent = b if step is nodes.activate else a
        once, twice = await step(agent, orders), await step(agent, orders)
        for evidence in (once, twice):
            # The memory arrives meanwhile.
            evidence.ClearField("counters")
            evidence.ClearField("epoch_memory_complete")
        assert once == twice
    await nodes.wait_phase(b, orders, pb.ARRIVAL_PHASE_COMPLETE)
    for agent, side in ((a, pb.SIDE_SOURCE), (b, pb.SIDE_DESTINATION)):
        assert await nodes.release(agent, orders, side) == await nodes.release(agent, orders, side)
    # Late duplicates of everything, from before the decision.
    assert await reason_of(nodes.pause(a, orders)) == "DECISION_CONFLICT"
    assert await reason_of(nodes.prepare(a, b, orders)) == "DECISION_CONFLICT"
    assert (await nodes.describe(b, "guest")).vmm_state == pb.VMM_STATE_RUNNING


async def test_a_lower_epoch_is_refused_for_everything(a: Agent, make_spec: MakeSpec) -> None:
    spec = make_spec()
    await nodes.start_vm(a, spec, epoch=5)
    stale = Orders(vm_id="guest", epoch=4, migration_id="m4")
    assert await reason_of(nodes.pause(a, stale)) == "STALE_EPOCH"
    assert await reason_of(nodes.seal(a, stale)) == "STALE_EPOCH"
    assert await reason_of(nodes.abort(a, stale, pb.SIDE_SOURCE)) == "STALE_EPOCH"
    assert await reason_of(nodes.resume(a, stale, epoch=4)) == "STALE_EPOCH"
    assert await reason_of(nodes.start_vm(a, spec, epoch=4)) == "STALE_EPOCH"
    evidence = await nodes.describe(a, "guest")
    assert (evidence.epoch_seen, evidence.vmm_state) == (5, pb.VMM_STATE_RUNNING)


async def test_a_resume_needs_a_fresh_epoch(a: Agent, b: Agent, make_spec: MakeSpec) -> None:
    """Under the epoch of the departure itself the guest could run on both sides."""
    orders = Orders(vm_id="guest", epoch=2, migration_id="m2")
    await nodes.start_vm(a, make_spec(), epoch=1)
    await nodes.prepare(a, b, orders)
    await nodes.pause(a, orders)
    assert await reason_of(nodes.resume(a, orders, epoch=2)) == "WRONG_STATE"
    assert (await nodes.describe(a, "guest")).vmm_state == pb.VMM_STATE_PAUSED
    assert (await nodes.resume(a, orders, epoch=3)).vmm_state == pb.VMM_STATE_RUNNING


async def test_steps_out_of_order_are_refused(a: Agent, b: Agent, make_spec: MakeSpec) -> None:
    orders = Orders(vm_id="guest", epoch=2, migration_id="m2")
    assert await reason_of(nodes.pause(a, orders)) == "VM_UNKNOWN"
    await nodes.start_vm(a, make_spec(), epoch=1)
    assert await reason_of(nodes.pause(a, orders)) == "WRONG_STATE"
    assert await reason_of(nodes.seal(a, orders)) == "WRONG_STATE"
    await nodes.prepare(a, b, orders)
    # Never paused: nothing was moved, and a kill would lose the guest.
    assert await reason_of(nodes.seal(a, orders)) == "WRONG_STATE"
    assert await reason_of(nodes.transfer(a, b, orders)) == "WRONG_STATE"
    assert await reason_of(nodes.activate(b, orders)) == "WRONG_STATE"
    await nodes.pause(a, orders)
    assert await reason_of(nodes.activate(b, orders)) == "WRONG_STATE"
    # Undecided: neither resumed nor taken back.
    undecided = pb.ResumeRequest(fence=orders.fence(epoch=3))
    call = grpc_client.call(a.channel, a.stub.Resume, undecided, timeout_s=10)
    assert await reason_of(call) == "DECISION_MISSING"
    undone = pb.AbortRequest(fence=orders.fence(epoch=3), side=pb.SIDE_SOURCE)
    call2 = grpc_client.call(a.channel, a.stub.Abort, undone, timeout_s=10)
    assert await reason_of(call2) == "DECISION_MISSING"
    # Both were heard, so the epoch of the pause is over.
    assert await reason_of(nodes.pause(a, orders)) == "STALE_EPOCH"


async def test_an_abort_that_overtakes_its_prepare_wins(
    a: Agent, b: Agent, make_spec: MakeSpec
) -> None:
    orders = Orders(vm_id="guest", epoch=2, migration_id="m2")
    await nodes.start_vm(a, make_spec(), epoch=1)
    evidence = await nodes.abort(b, orders, pb.SIDE_DESTINATION)
    assert evidence.vmm_state == pb.VMM_STATE_DEAD
    assert await reason_of(nodes.prepare(a, b, orders)) == "DECISION_CONFLICT"


async def test_a_destination_that_dies_before_the_decision_costs_nothing(
    a: Agent, b: Agent, make_spec: MakeSpec
) -> None:
    orders = Orders(vm_id="guest", epoch=2, migration_id="m2")
    await nodes.start_vm(a, make_spec(), epoch=1)
    console = Console(a.vm_dir("guest") / "console-1.log")
    await console.wait_beat(10)
    await nodes.prepare(a, b, orders)
    await nodes.pause(a, orders)
    await processes.kill(vmm_of(b, "guest"))
    # The second: gRPC reset the stream before the answer that ended it was read (1 run in 60).
    assert await reason_of(nodes.transfer(a, b, orders)) in {"WRONG_STATE", "PEER_INTERNAL"}
    assert (await nodes.describe(b, "guest")).epoch_loaded == 0

    gone = await nodes.abort(b, orders, pb.SIDE_DESTINATION)
    assert (gone.role, gone.vmm_state) == (pb.VM_ROLE_GONE, pb.VMM_STATE_DEAD)
    last = console.last_beat()
    resumed = await nodes.resume(a, orders, epoch=3)
    assert (resumed.role, resumed.epoch_owned) == (pb.VM_ROLE_RESIDENT, 3)
    await console.wait_beat(last + 20)
    assert console.errors() == []
    # And it can go, under a new migration, to the same node.
    await move(a, b, Orders(vm_id="guest", epoch=4, migration_id="m4"))


async def move(source: Agent, destination: Agent, orders: Orders) -> None:
    """A whole hand-over."""
    await nodes.prepare(source, destination, orders)
    await nodes.pause(source, orders)
    await nodes.transfer(source, destination, orders)
    await nodes.activate(destination, orders)
    await nodes.seal(source, orders)
    await nodes.wait_phase(destination, orders, pb.ARRIVAL_PHASE_COMPLETE)
    await nodes.release(source, orders, pb.SIDE_SOURCE)
    await nodes.release(destination, orders, pb.SIDE_DESTINATION)


async def test_loaded_on_both_sides_and_undecided_nothing_runs(
    a: Agent, b: Agent, make_spec: MakeSpec
) -> None:
    """The moment where QEMU's own hand-over makes two guests. ABORTED, then the source goes on."""
    orders = Orders(vm_id="guest", epoch=2, migration_id="m2")
    await nodes.start_vm(a, make_spec(), epoch=1)
    console = Console(a.vm_dir("guest") / "console-1.log")
    await console.wait_beat(10)
    await nodes.prepare(a, b, orders)
    await nodes.pause(a, orders)
    await nodes.transfer(a, b, orders)
    for agent in (a, b):
        assert (await nodes.describe(agent, "guest")).vmm_state == pb.VMM_STATE_PAUSED
    last = console.last_beat()
    there = vmm_of(b, "guest")
    await nodes.abort(b, orders, pb.SIDE_DESTINATION)
    assert not processes.is_alive(there)
    assert console.last_beat() == last
    await nodes.resume(a, orders, epoch=3)
    await console.wait_beat(last + 20)
    assert console.errors() == []
    assert Console(b.vm_dir("guest") / "console-2.log").beats() == []


async def test_after_activating_there_is_no_abort_and_after_a_seal_no_resume(
    a: Agent, b: Agent, make_spec: MakeSpec
) -> None:
    orders = Orders(vm_id="guest", epoch=2, migration_id="m2")
    await nodes.start_vm(a, make_spec(), epoch=1)
    await nodes.prepare(a, b, orders)
    await nodes.pause(a, orders)
    await nodes.transfer(a, b, orders)
    await nodes.activate(b, orders)
    await nodes.seal(a, orders)
    assert await reason_of(nodes.abort(b, orders, pb.SIDE_DESTINATION)) == "DECISION_CONFLICT"
    assert await reason_of(nodes.resume(a, orders, epoch=9)) == "DECISION_CONFLICT"
    forgotten = pb.ResumeRequest(fence=common_pb2.Fence(vm_id="guest", epoch=9))
    call = grpc_client.call(a.channel, a.stub.Resume, forgotten, timeout_s=10)
    assert await reason_of(call) == "WRONG_STATE"
    evidence = await nodes.describe(a, "guest")
    assert (evidence.role, evidence.vmm_state) == (pb.VM_ROLE_SEALED, pb.VMM_STATE_DEAD)


async def test_memory_is_kept_until_the_destination_has_it(
    a: Agent, b: Agent, core: CopyingPageCore, make_spec: MakeSpec
) -> None:
    core.complete_at_once = False
    orders = Orders(vm_id="guest", epoch=2, migration_id="m2")
    await nodes.start_vm(a, make_spec(), epoch=1)
    await nodes.prepare(a, b, orders)
    await nodes.pause(a, orders)
    await nodes.transfer(a, b, orders)
    await nodes.activate(b, orders)
    await nodes.seal(a, orders)
    refused = nodes.release(a, orders, pb.SIDE_SOURCE, memory_complete=False)
    assert await reason_of(refused) == "MEMORY_INCOMPLETE"
    assert await reason_of(nodes.release(b, orders, pb.SIDE_DESTINATION)) == "MEMORY_INCOMPLETE"
    stop = pb.StopVmRequest(fence=common_pb2.Fence(vm_id="guest", epoch=2))
    for agent in (a, b):
        call = grpc_client.call(agent.channel, agent.stub.StopVm, stop, timeout_s=10)
        assert await reason_of(call) == "WRONG_STATE"
    assert (await nodes.describe(a, "guest")).retained_bytes > 0
    core.arrivals[-1].install_all()
    complete = await nodes.wait_phase(b, orders, pb.ARRIVAL_PHASE_COMPLETE)
    assert complete.counters.absent_count == 0
    assert (await nodes.describe(b, "guest")).epoch_memory_complete == 2
    await nodes.release(a, orders, pb.SIDE_SOURCE)
    assert list(a.serving.node.config.ram_dir.iterdir()) == []


@pytest.mark.parametrize("wrong", ["hash", "cut"])
async def test_a_wrong_device_state_ends_the_shell(
    a: Agent, b: Agent, make_spec: MakeSpec, wrong: str
) -> None:
    """Whoever sends it: the destination's agent alone decides what is LOADED."""
    orders = Orders(vm_id="guest", epoch=2, migration_id="m2")
    await nodes.start_vm(a, make_spec(), epoch=1)
    await nodes.prepare(a, b, orders)
    generation = (await nodes.pause(a, orders)).image.generation
    vmm = a.serving.node.vm("guest").vmm
    assert vmm is not None
    state = b"".join([chunk async for chunk in vmm.save()])

    async def messages() -> AsyncIterator[pb.LoadDeviceStateRequest]:
        yield pb.LoadDeviceStateRequest(
            header=pb.DeviceStateHeader(fence=orders.fence(), generation=generation)
        )
        yield pb.LoadDeviceStateRequest(chunk=state[:-1])
        yield pb.LoadDeviceStateRequest(chunk=state[-1:])
        if wrong == "hash":
            digest = hashlib.sha256(b"another").digest()
            trailer = pb.DeviceStateTrailer(len_bytes=len(state), sha256=digest)
            yield pb.LoadDeviceStateRequest(trailer=trailer)

    call = grpc_client.call(b.channel, b.stub.LoadDeviceState, messages(), timeout_s=30)
    assert await reason_of(call) == "STATE_CORRUPT"
    evidence = await nodes.describe(b, "guest")
    assert (evidence.epoch_loaded, evidence.vmm_state) == (0, pb.VMM_STATE_DEAD)
    assert await reason_of(nodes.activate(b, orders)) == "WRONG_STATE"


async def test_a_loaded_state_is_not_confirmed_by_a_dead_vmm(
    a: Agent, b: Agent, make_spec: MakeSpec
) -> None:
    """The load was answered, the answer lost, the VMM died: asked again, it is no success."""
    orders = Orders(vm_id="guest", epoch=2, migration_id="m2")
    await nodes.start_vm(a, make_spec(), epoch=1)
    await nodes.prepare(a, b, orders)
    await nodes.pause(a, orders)
    generation = (await nodes.describe(a, "guest")).image.generation
    await nodes.transfer(a, b, orders)

    async def messages() -> AsyncIterator[pb.LoadDeviceStateRequest]:
        header = pb.DeviceStateHeader(fence=orders.fence(), generation=generation)
        yield pb.LoadDeviceStateRequest(header=header)

    async def load() -> pb.LoadDeviceStateResponse:
        return await grpc_client.call(b.channel, b.stub.LoadDeviceState, messages(), timeout_s=30)

    assert (await load()).evidence.epoch_loaded == 2
    await processes.kill(vmm_of(b, "guest"))
    assert await reason_of(load()) == "WRONG_STATE"


async def test_looking_never_gets_in_the_way(a: Agent, b: Agent, make_spec: MakeSpec) -> None:
    """A VMM's monitor serves one client: a Describe in the middle must not be that client."""
    orders = Orders(vm_id="guest", epoch=2, migration_id="m2")
    over = asyncio.Event()

    async def look(agent: Agent) -> None:
        while not over.is_set():
            await nodes.describe(agent, "guest")

    async with asyncio.TaskGroup() as group:
        for agent in (a, b, a, b):
            group.create_task(look(agent))
        await nodes.start_vm(a, make_spec(), epoch=1)
        await nodes.prepare(a, b, orders)
        await nodes.pause(a, orders)
        await nodes.transfer(a, b, orders)
        await nodes.activate(b, orders)
        await nodes.seal(a, orders)
        over.set()


async def test_a_vm_that_cannot_start_leaves_nothing(a: Agent, make_spec: MakeSpec) -> None:
    spec = make_spec(cpu="no-such-cpu")
    assert await reason_of(nodes.start_vm(a, spec, epoch=1)) == "VMM_START_FAILED"
    evidence = await nodes.describe(a, "guest")
    assert (evidence.role, evidence.vmm_state) == (pb.VM_ROLE_GONE, pb.VMM_STATE_DEAD)
    assert list(a.serving.node.config.ram_dir.iterdir()) == []
    await nodes.start_vm(a, make_spec(), epoch=2)


async def test_start_refuses_what_is_here(a: Agent, make_spec: MakeSpec) -> None:
    await nodes.start_vm(a, make_spec(), epoch=1)
    assert await reason_of(nodes.start_vm(a, make_spec(), epoch=2)) == "VM_EXISTS"
    # Dead, it may start anew: from nothing, under a fresh epoch.
    await processes.kill(vmm_of(a, "guest"))
    evidence = await nodes.start_vm(a, make_spec(), epoch=3)
    assert (evidence.epoch_owned, evidence.vmm_state) == (3, pb.VMM_STATE_RUNNING)
    stop = pb.StopVmRequest(fence=common_pb2.Fence(vm_id="guest", epoch=3))
    for _ in range(2):
        answer = await grpc_client.call(a.channel, a.stub.StopVm, stop, timeout_s=10)
        assert answer.evidence.role == pb.VM_ROLE_GONE
    assert list(a.serving.node.config.ram_dir.iterdir()) == []


async def test_hello_and_inventory(a: Agent, make_spec: MakeSpec) -> None:
    hello = await grpc_client.call(
        a.channel, a.stub.Hello, pb.HelloRequest(version_min=1, version_max=9), timeout_s=30
    )
    assert (hello.version, hello.node) == (1, "a")
    assert hello.page_address
    assert hello.capabilities.vmm_versions["qemu"]
    newer = pb.HelloRequest(version_min=2, version_max=9)
    call = grpc_client.call(a.channel, a.stub.Hello, newer, timeout_s=10)
    assert await reason_of(call) == "VERSION_UNSUPPORTED"

    unknown = await nodes.describe(a, "nobody")
    assert (unknown.role, unknown.vmm_state) == (pb.VM_ROLE_UNKNOWN, pb.VMM_STATE_DEAD)
    assert await reason_of(nodes.describe(a, "../x")) == "FIELD_INVALID"
    await nodes.start_vm(a, make_spec(), epoch=1)
    answer = await grpc_client.call(a.channel, a.stub.ListVms, pb.ListVmsRequest(), timeout_s=10)
    assert [vm.vm_id for vm in answer.vms] == ["guest"]


async def test_a_guest_that_ends_on_arrival_leaves_nothing(
    a: Agent, b: Agent, core: CopyingPageCore, make_spec: MakeSpec
) -> None:
    """It needs no memory any more: both sides are released although pages were never fetched."""
    core.complete_at_once = False
    orders = Orders(vm_id="guest", epoch=2, migration_id="m2")
    await nodes.start_vm(a, make_spec(), epoch=1)
    await nodes.prepare(a, b, orders)
    await nodes.pause(a, orders)
    await nodes.transfer(a, b, orders)
    await nodes.activate(b, orders)
    await nodes.seal(a, orders)
    vm = b.serving.node.vm("guest")
    inspector = await QmpClient.connect(
        vm.directory / INSPECTION_SOCKET, timeout_s=5, alive=lambda: True
    )
    with inspector.events("SHUTDOWN") as ended:
        await inspector.execute("system_reset")
        await ended.next()
    inspector.close()
    # The event comes first, the state a moment later.
    while (await nodes.describe(b, "guest")).vmm_state == pb.VMM_STATE_RUNNING:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert (await nodes.describe(b, "guest")).vmm_state == pb.VMM_STATE_GUEST_ENDED
    await nodes.release(a, orders, pb.SIDE_SOURCE)
    for _ in range(2):
        gone = await nodes.release(b, orders, pb.SIDE_DESTINATION)
        assert (gone.role, gone.vmm_state) == (pb.VM_ROLE_GONE, pb.VMM_STATE_DEAD)
    for agent in (a, b):
        assert list(agent.serving.node.config.ram_dir.iterdir()) == []
