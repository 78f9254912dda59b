# SPDX-License-Identifier: Apache-2.0
"""A node without a VMM: a real gRPC server of FaultAgentService over an in-memory journal.

It enforces every fence, refuses what the contract forbids, and can lose requests and replies, hold
a command before or after its act, die and come back, lose its host. `World` is the one truth beside
all agents: which guests execute where, checked at every start (I1), and whether memory was freed
that somebody still needed (I3). It judges; the agents only report what their journals say.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc
import grpc.aio
from godwit.agent.v1 import fault_agent_service_pb2 as pb
from godwit.agent.v1 import fault_agent_service_pb2_grpc as pb_grpc
from godwit.common.v1 import common_pb2

from services.common import grpc_client, grpc_server
from services.common.errors import (
    AlreadyExistsError,
    DataLossError,
    FailedPreconditionError,
    GodwitError,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
)
from services.common.listen import Address

# ruff: noqa: N802
_T = TypeVar("_T")
_Context = grpc.aio.ServicerContext[Any, Any]

PAGE_BYTES = 4096
TICK_S = 0.005
STATE = b"device state" * 100
_FOLLOWS = {
    (common_pb2.DECISION_COMMITTED, common_pb2.DECISION_RETURNED),
    (common_pb2.DECISION_COMMITTED, common_pb2.DECISION_LOST),
    (common_pb2.DECISION_RETURNED, common_pb2.DECISION_LOST),
}


@dataclass(slots=True, kw_only=True)
class Record:
    """What a node's journal and its processes say about one VM. Survives the agent."""

    vm_id: str
    role: pb.VmRole.ValueType = pb.VM_ROLE_UNKNOWN
    vmm: pb.VmmState.ValueType = pb.VMM_STATE_DEAD
    epoch_seen: int = 0
    epoch_owned: int = 0
    epoch_departure: int = 0
    epoch_prepared: int = 0
    epoch_loaded: int = 0
    epoch_activating: int = 0
    epoch_memory_complete: int = 0
    epoch_sealed: int = 0
    migration_id: str = ""
    decisions: dict[str, int] = field(default_factory=dict)
    generation: int = 0
    frozen: bool = False
    exported: bool = False
    spec_json: str = ""
    memory: dict[int, int] = field(default_factory=dict)
    """Page → content; a page that is not there is absent."""
    page_count: int = 0
    source_node: str = ""
    link_lost: bool = False
    kept: bool = False
    """The device state of its last departure is there."""
    no_room: bool = False
    """Pages come and find no memory, until it is False again."""
    holds: list[common_pb2.Hold] = field(default_factory=list)
    """Outages that are over."""
    counters: Counter[str] = field(default_factory=Counter)


class World:
    """The truth."""

    def __init__(self) -> None:
        self.agents: dict[str, FakeAgent] = {}
        self.executing: dict[str, dict[str, int]] = defaultdict(dict)
        """VM → node → epoch."""
        self.history: list[tuple[str, str, int]] = []
        """(VM, node, epoch) of every start and `cont`."""
        self.broken: list[str] = []
        """Every invariant that broke."""

    def run(self, vm_id: str, node: str, epoch: int) -> None:
        """VCPUs begin to execute."""
        others = {name for name in self.executing[vm_id] if name != node}
        if others:
            self.broken.append(f"I1: {vm_id} runs on {node} and {sorted(others)}")
        if any(epoch < seen for _vm, _node, seen in self.history if _vm == vm_id):
            self.broken.append(f"I1: {vm_id} runs on {node} under old epoch {epoch}")
        self.executing[vm_id][node] = epoch
        self.history.append((vm_id, node, epoch))

    def stop(self, vm_id: str, node: str) -> None:
        """VCPUs stop."""
        self.executing[vm_id].pop(node, None)

    def owners(self, vm_id: str) -> list[str]:
        """Nodes on which the guest executes."""
        return sorted(self.executing[vm_id])


@dataclass(slots=True)
class Gate:
    """Holds a command until it is opened."""

    reached: asyncio.Event = field(default_factory=asyncio.Event)
    opened: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self) -> None:
        """Pass."""
        self.reached.set()
        await self.opened.wait()


class FakeAgent(pb_grpc.FaultAgentServiceServicer):
    """One node."""

    def __init__(self, node: str, world: World) -> None:
        self.node = node
        self.world = world
        world.agents[node] = self
        self.boot_id = f"boot-{node}-1"
        self.incarnation = 0
        self.records: dict[str, Record] = {}
        self.address: Address | None = None
        self.obeys = ""
        """Incarnation of the store that it obeys; journaled."""
        self.calls: Counter[str] = Counter()
        self.page_server_up = True
        self.fetching = asyncio.Event()
        """Clear it to hold back the pages."""
        self.fetching.set()
        self.pages_per_tick = 16
        self.page_count = 64
        self.keeps_states = True
        """False: what is sealed cannot be made again."""
        self.carries_on = True
        """Pause goes on with the transfer. False: an agent that does not know `transfer_to`."""
        self.failed_checks: list[common_pb2.Check] = []
        self.immovable: set[str] = set()
        """VMs that no preflight passes."""
        self._before: dict[str, list[Callable[[], Awaitable[None]]]] = defaultdict(list)
        self._after: dict[str, list[Callable[[], Awaitable[None]]]] = defaultdict(list)
        self._stalled: dict[str, Gate] = {}
        self._stack: contextlib.AsyncExitStack | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    # --- life and death ---

    async def start(self) -> None:
        """Listen, on the port of last time if there was one, and adopt what is in flight."""
        self.incarnation += 1
        stack = contextlib.AsyncExitStack()
        running = await stack.enter_async_context(
            grpc_server.serving(
                self.address or Address(host="127.0.0.1", port=0),
                [
                    grpc_server.Service(
                        name="godwit.agent.v1.FaultAgentService",
                        add=lambda server: pb_grpc.add_FaultAgentServiceServicer_to_server(
                            self, server
                        ),
                    )
                ],
                stop_grace_s=0,
            )
        )
        self._stack, self.address = stack, running.address
        for record in self.records.values():
            if record.role in (pb.VM_ROLE_ARRIVING, pb.VM_ROLE_ARRIVED):
                self._fetch(record)

    async def kill(self) -> None:
        """Kill -9 of the agent: VMMs, their memory and the journal stay."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        if self._stack:
            stack, self._stack = self._stack, None
            await stack.aclose()

    async def reboot(self) -> None:
        """The host is restarted: processes and memory are gone, the journal stays."""
        await self.kill()
        self.boot_id += "'"
        for record in self.records.values():
            self.kill_vmm(record.vm_id)
            record.memory.clear()
        await self.start()

    def kill_vmm(self, vm_id: str) -> None:
        """The VMM of a VM dies."""
        self.records[vm_id].vmm = pb.VMM_STATE_DEAD
        self.world.stop(vm_id, self.node)

    def end_guest(self, vm_id: str) -> None:
        """The guest shuts itself down."""
        self.records[vm_id].vmm = pb.VMM_STATE_GUEST_ENDED
        self.world.stop(vm_id, self.node)

    # --- faults ---

    def before(self, rpc: str, fault: Callable[[], Awaitable[None]]) -> None:
        """Do this at the next call of `rpc`, before its act."""
        self._before[rpc].append(fault)

    def after(self, rpc: str, fault: Callable[[], Awaitable[None]]) -> None:
        """Do this at the next call of `rpc`, after its act, before its reply."""
        self._after[rpc].append(fault)

    def drop_request(self, rpc: str) -> None:
        """The next one does not arrive."""
        self.before(rpc, _lost)

    def drop_reply(self, rpc: str) -> None:
        """The next one is carried out; its answer is lost."""
        self.after(rpc, _lost)

    def refuse(self, rpc: str, error: GodwitError) -> None:
        """The next one is refused."""

        async def fault() -> None:
            raise error

        self.before(rpc, fault)

    def hold(self, rpc: str) -> Gate:
        """The next one waits before its act."""
        gate = Gate()
        self.before(rpc, gate)
        return gate

    def stall(self, rpc: str) -> Gate:
        """Every one waits before its act, until the gate is opened."""
        gate = self._stalled[rpc] = Gate()
        return gate

    async def _do(self, rpc: str, context: _Context, act: Callable[[], Awaitable[_T] | _T]) -> _T:
        self.calls[rpc] += 1
        try:
            if rpc in self._stalled:
                await self._stalled[rpc]()
            if self._before[rpc]:
                await self._before[rpc].pop(0)()
            result = act()
            answer: _T = await result if isinstance(result, Awaitable) else result
            if self._after[rpc]:
                await self._after[rpc].pop(0)()
        except _LostError:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "Connection reset by peer")
            raise
        return answer

    # --- fences ---

    def _admit(self, fence: common_pb2.Fence, *decisions: int, migration: bool = True) -> Record:
        self.obeys = self.obeys or fence.store_incarnation
        if fence.store_incarnation not in ("", self.obeys):
            raise FailedPreconditionError(
                "STORE_IN_DOUBT",
                f"{self.node} obeys {self.obeys}, not {fence.store_incarnation}",
                metadata={"store_incarnation": self.obeys},
            )
        if not fence.vm_id or not fence.epoch or bool(fence.migration_id) is not migration:
            raise InvalidArgumentError("FIELD_INVALID", f"fence {fence}")
        record = self.records.setdefault(fence.vm_id, Record(vm_id=fence.vm_id))
        if fence.epoch < record.epoch_seen:
            raise FailedPreconditionError(
                "STALE_EPOCH", f"{fence.epoch} < {record.epoch_seen} on {self.node}"
            )
        if fence.decision not in decisions:
            raise FailedPreconditionError("DECISION_MISSING", f"{fence.decision}")
        told = record.decisions.get(fence.migration_id, 0)
        follows = (told, fence.decision) in _FOLLOWS and fence.epoch > max(
            record.epoch_departure, record.epoch_prepared
        )
        if told and fence.decision != told and not follows:
            raise FailedPreconditionError("DECISION_CONFLICT", f"{fence.decision}, was {told}")
        record.epoch_seen = fence.epoch
        if fence.decision:
            record.decisions[fence.migration_id] = fence.decision
        return record

    def _state(self, record: Record, fence: common_pb2.Fence, *roles: int) -> None:
        same = record.migration_id == fence.migration_id
        if record.role not in roles or not same:
            raise FailedPreconditionError(
                "WRONG_STATE",
                f"{pb.VmRole.Name(record.role)} in migration {record.migration_id!r} "
                f"on {self.node}",
            )

    # --- the contract ---

    async def Hello(self, request: pb.HelloRequest, context: _Context) -> pb.HelloResponse:
        """See the proto."""
        return await self._do("Hello", context, lambda: self._hello(request))

    def _hello(self, request: pb.HelloRequest) -> pb.HelloResponse:
        if request.adopt_store:
            self.obeys = request.store_incarnation
        return pb.HelloResponse(
            version=1,
            store_incarnation=self.obeys,
            node=self.node,
            boot_id=self.boot_id,
            incarnation=str(self.incarnation),
            page_address=f"fake:{self.node}",
            capabilities=pb.Capabilities(
                kernel_release="6.12", drivers=["qemu"], memory_total_bytes=1 << 36
            ),
        )

    async def ListVms(self, request: pb.ListVmsRequest, context: _Context) -> pb.ListVmsResponse:
        """See the proto."""
        return await self._do(
            "ListVms",
            context,
            lambda: pb.ListVmsResponse(
                vms=[self.evidence(vm_id) for vm_id in sorted(self.records)]
            ),
        )

    async def Describe(self, request: pb.DescribeRequest, context: _Context) -> pb.DescribeResponse:
        """See the proto."""
        return await self._do(
            "Describe",
            context,
            lambda: pb.DescribeResponse(evidence=self.evidence(request.vm_id)),
        )

    async def Preflight(
        self, request: pb.PreflightRequest, context: _Context
    ) -> pb.PreflightResponse:
        """See the proto."""
        checks = [common_pb2.Check(check="uffd", passed=True), *self.failed_checks]
        if request.vm_id in self.immovable:
            checks.append(common_pb2.Check(check="devices", reason="VFIO", hint="unplug it"))
        return await self._do("Preflight", context, lambda: pb.PreflightResponse(checks=checks))

    async def StartVm(self, request: pb.StartVmRequest, context: _Context) -> pb.StartVmResponse:
        """See the proto."""
        return await self._do("StartVm", context, lambda: self._start_vm(request))

    def _start_vm(self, request: pb.StartVmRequest) -> pb.StartVmResponse:
        record = self._admit(request.fence, 0, migration=False)
        if record.role not in (pb.VM_ROLE_UNKNOWN, pb.VM_ROLE_GONE):
            if record.epoch_owned != request.fence.epoch:
                raise AlreadyExistsError("VM_EXISTS", f"{record.vm_id} under another epoch")
            return pb.StartVmResponse(evidence=self.evidence(record.vm_id))
        record.role, record.vmm = pb.VM_ROLE_RESIDENT, pb.VMM_STATE_RUNNING
        record.epoch_owned = request.fence.epoch
        record.spec_json = request.spec_json
        record.page_count = self.page_count
        record.memory = {page: page * 7 + 1 for page in range(self.page_count)}
        self.world.run(record.vm_id, self.node, request.fence.epoch)
        return pb.StartVmResponse(evidence=self.evidence(record.vm_id))

    async def StopVm(self, request: pb.StopVmRequest, context: _Context) -> pb.StopVmResponse:
        """See the proto."""
        return await self._do("StopVm", context, lambda: self._stop_vm(request))

    def _stop_vm(self, request: pb.StopVmRequest) -> pb.StopVmResponse:
        if request.fence.vm_id not in self.records:
            raise NotFoundError("VM_UNKNOWN", request.fence.vm_id)
        record = self._admit(request.fence, 0, migration=False)
        if record.role not in (pb.VM_ROLE_RESIDENT, pb.VM_ROLE_GONE):
            raise FailedPreconditionError("WRONG_STATE", pb.VmRole.Name(record.role))
        record.role = pb.VM_ROLE_GONE
        record.memory.clear()
        self.kill_vmm(record.vm_id)
        return pb.StopVmResponse(evidence=self.evidence(record.vm_id))

    async def Prepare(self, request: pb.PrepareRequest, context: _Context) -> pb.PrepareResponse:
        """See the proto."""
        if request.WhichOneof("side") == "departure":
            return await self._do("PrepareSource", context, lambda: self._depart(request))
        return await self._do("PrepareDestination", context, lambda: self._arrive(request))

    def _depart(self, request: pb.PrepareRequest) -> pb.PrepareResponse:
        record = self._admit(request.fence, 0)
        if record.role == pb.VM_ROLE_RESIDENT:
            record.role, record.migration_id = pb.VM_ROLE_DEPARTING, request.fence.migration_id
            record.epoch_departure = request.fence.epoch
            record.exported, record.frozen = True, False
            record.generation += 1
        self._state(record, request.fence, pb.VM_ROLE_DEPARTING)
        return pb.PrepareResponse(
            evidence=self.evidence(record.vm_id),
            page_address=f"fake:{self.node}",
            spec_json=record.spec_json,
            spec_hash="hash",
        )

    def _arrive(self, request: pb.PrepareRequest) -> pb.PrepareResponse:
        record = self._admit(request.fence, 0)
        if record.role in (pb.VM_ROLE_UNKNOWN, pb.VM_ROLE_GONE):
            record.role, record.vmm = pb.VM_ROLE_ARRIVING, pb.VMM_STATE_INCOMING
            record.migration_id = request.fence.migration_id
            record.epoch_prepared = request.fence.epoch
            record.spec_json = request.arrival.spec_json
            record.source_node = request.arrival.page_address.removeprefix("fake:")
            record.page_count = sum(
                region.size_bytes // region.page_size_bytes
                for region in request.arrival.image.regions
            )
            record.memory = {}
            record.counters.clear()
            record.link_lost = False
        self._state(record, request.fence, pb.VM_ROLE_ARRIVING)
        return pb.PrepareResponse(evidence=self.evidence(record.vm_id))

    async def Pause(self, request: pb.PauseRequest, context: _Context) -> pb.PauseResponse:
        """See the proto. What befalls a TransferDeviceState befalls the one in here too."""
        answer = await self._do("Pause", context, lambda: self._pause(request))
        if request.transfer_to and self.carries_on:
            transfer = pb.TransferDeviceStateRequest(
                fence=request.fence, destination_address=request.transfer_to
            )
            answer.transferred.CopyFrom(await self.TransferDeviceState(transfer, context))
        return answer

    def _pause(self, request: pb.PauseRequest) -> pb.PauseResponse:
        record = self._admit(request.fence, 0)
        self._state(record, request.fence, pb.VM_ROLE_DEPARTING)
        if record.vmm == pb.VMM_STATE_RUNNING:
            record.vmm, record.frozen = pb.VMM_STATE_PAUSED, True
            record.generation += 1
            self.world.stop(record.vm_id, self.node)
        if record.vmm != pb.VMM_STATE_PAUSED:
            raise UnavailableError("VMM_UNREACHABLE", pb.VmmState.Name(record.vmm))
        return pb.PauseResponse(evidence=self.evidence(record.vm_id))

    async def Resume(self, request: pb.ResumeRequest, context: _Context) -> pb.ResumeResponse:
        """See the proto."""
        return await self._do("Resume", context, lambda: self._resume(request))

    def _resume(self, request: pb.ResumeRequest) -> pb.ResumeResponse:
        decisions = common_pb2.DECISION_ABORTED, common_pb2.DECISION_RETURNED
        record = self._admit(request.fence, *decisions)
        roles = [pb.VM_ROLE_DEPARTING, pb.VM_ROLE_RESIDENT]
        if request.fence.decision == common_pb2.DECISION_RETURNED:
            roles.append(pb.VM_ROLE_SEALED)
        self._state(record, request.fence, *roles)
        if record.vmm == pb.VMM_STATE_DEAD and self._is_returnable(record):
            record.vmm = pb.VMM_STATE_PAUSED  # made again
        if request.fence.epoch <= record.epoch_departure:
            self.world.broken.append(f"I1: resume under {request.fence.epoch}, not a fresh epoch")
        if record.vmm == pb.VMM_STATE_PAUSED:
            record.vmm = pb.VMM_STATE_RUNNING
            self.world.run(record.vm_id, self.node, request.fence.epoch)
            record.epoch_owned = request.fence.epoch
        record.role = pb.VM_ROLE_RESIDENT
        record.exported = record.frozen = False
        return pb.ResumeResponse(evidence=self.evidence(record.vm_id))

    async def Recall(self, request: pb.RecallRequest, context: _Context) -> pb.RecallResponse:
        """See the proto."""
        if request.side == pb.SIDE_SOURCE:
            return await self._do("RecallSource", context, lambda: self._recall_source(request))
        return await self._do("RecallDestination", context, lambda: self._recall_arrival(request))

    def _recall_source(self, request: pb.RecallRequest) -> pb.RecallResponse:
        record = self._admit(request.fence, common_pb2.DECISION_COMMITTED)
        self._state(record, request.fence, pb.VM_ROLE_DEPARTING, pb.VM_ROLE_SEALED)
        return pb.RecallResponse(evidence=self.evidence(record.vm_id))

    def _recall_arrival(self, request: pb.RecallRequest) -> pb.RecallResponse:
        decisions = common_pb2.DECISION_COMMITTED, common_pb2.DECISION_RETURNED
        record = self._admit(request.fence, *decisions)
        if record.role not in (pb.VM_ROLE_UNKNOWN, pb.VM_ROLE_GONE):
            self._state(record, request.fence, pb.VM_ROLE_ARRIVING, pb.VM_ROLE_ARRIVED)
            if record.epoch_activating and request.fence.decision != decisions[1]:
                raise FailedPreconditionError("WRONG_STATE", "the guest may have run here")
            record.role = pb.VM_ROLE_GONE
            self.kill_vmm(record.vm_id)
        return pb.RecallResponse(evidence=self.evidence(record.vm_id))

    def _is_returnable(self, record: Record) -> bool:
        left = record.role in (pb.VM_ROLE_DEPARTING, pb.VM_ROLE_SEALED)
        whole = record.frozen and bool(record.memory)
        paused = record.role == pb.VM_ROLE_DEPARTING and record.vmm == pb.VMM_STATE_PAUSED
        kept = record.vmm == pb.VMM_STATE_DEAD and record.kept
        return left and whole and (paused or kept)

    async def TransferDeviceState(
        self, request: pb.TransferDeviceStateRequest, context: _Context
    ) -> pb.TransferDeviceStateResponse:
        """See the proto."""
        return await self._do("TransferDeviceState", context, lambda: self._transfer(request))

    async def _transfer(
        self, request: pb.TransferDeviceStateRequest
    ) -> pb.TransferDeviceStateResponse:
        record = self._admit(request.fence, 0)
        self._state(record, request.fence, pb.VM_ROLE_DEPARTING)
        if record.vmm != pb.VMM_STATE_PAUSED:
            raise FailedPreconditionError("WRONG_STATE", pb.VmmState.Name(record.vmm))

        async def messages() -> AsyncIterator[pb.LoadDeviceStateRequest]:
            yield pb.LoadDeviceStateRequest(
                header=pb.DeviceStateHeader(fence=request.fence, generation=record.generation)
            )
            yield pb.LoadDeviceStateRequest(chunk=STATE)
            yield pb.LoadDeviceStateRequest(trailer=pb.DeviceStateTrailer(len_bytes=len(STATE)))

        async with grpc_client.open_channel(request.destination_address) as channel:
            try:
                await grpc_client.call(
                    channel,
                    pb_grpc.FaultAgentServiceStub(channel).LoadDeviceState,
                    messages(),
                    timeout_s=10,
                    connect_s=0.2,
                )
            except GodwitError as error:
                raise UnavailableError("DESTINATION_UNREACHABLE", str(error)) from error
        record.kept = self.keeps_states
        return pb.TransferDeviceStateResponse(len_bytes=len(STATE))

    async def LoadDeviceState(
        self, request_iterator: AsyncIterator[pb.LoadDeviceStateRequest], context: _Context
    ) -> pb.LoadDeviceStateResponse:
        """See the proto."""
        return await self._do("LoadDeviceState", context, lambda: self._load(request_iterator))

    async def _load(
        self, requests: AsyncIterator[pb.LoadDeviceStateRequest]
    ) -> pb.LoadDeviceStateResponse:
        messages = [message async for message in requests]
        fence = messages[0].header.fence
        record = self._admit(fence, 0)
        self._state(record, fence, pb.VM_ROLE_ARRIVING)
        if fence.epoch != record.epoch_prepared or record.vmm == pb.VMM_STATE_DEAD:
            raise FailedPreconditionError("WRONG_STATE", f"prepared {record.epoch_prepared}")
        if b"".join(message.chunk for message in messages[1:-1]) != STATE:
            raise DataLossError("STATE_CORRUPT", "the state differs")
        record.vmm, record.epoch_loaded = pb.VMM_STATE_PAUSED, fence.epoch
        return pb.LoadDeviceStateResponse(evidence=self.evidence(record.vm_id))

    async def Activate(self, request: pb.ActivateRequest, context: _Context) -> pb.ActivateResponse:
        """See the proto."""
        return await self._do("Activate", context, lambda: self._activate(request))

    def _activate(self, request: pb.ActivateRequest) -> pb.ActivateResponse:
        record = self._admit(request.fence, common_pb2.DECISION_COMMITTED)
        self._state(record, request.fence, pb.VM_ROLE_ARRIVING, pb.VM_ROLE_ARRIVED)
        if record.epoch_loaded != request.fence.epoch:
            raise FailedPreconditionError("WRONG_STATE", "no state is loaded")
        if record.role == pb.VM_ROLE_ARRIVING:
            if record.vmm != pb.VMM_STATE_PAUSED:
                raise UnavailableError("VMM_UNREACHABLE", pb.VmmState.Name(record.vmm))
            record.epoch_activating = request.fence.epoch
            record.role, record.vmm = pb.VM_ROLE_ARRIVED, pb.VMM_STATE_RUNNING
            record.epoch_owned = request.fence.epoch
            self.world.run(record.vm_id, self.node, request.fence.epoch)
            self._fetch(record)
        return pb.ActivateResponse(evidence=self.evidence(record.vm_id))

    async def Seal(self, request: pb.SealRequest, context: _Context) -> pb.SealResponse:
        """See the proto."""
        return await self._do("Seal", context, lambda: self._seal(request))

    def _seal(self, request: pb.SealRequest) -> pb.SealResponse:
        record = self._admit(request.fence, common_pb2.DECISION_COMMITTED)
        self._state(record, request.fence, pb.VM_ROLE_DEPARTING, pb.VM_ROLE_SEALED)
        record.role, record.epoch_sealed = pb.VM_ROLE_SEALED, request.fence.epoch
        self.kill_vmm(record.vm_id)
        return pb.SealResponse(evidence=self.evidence(record.vm_id))

    async def Abort(self, request: pb.AbortRequest, context: _Context) -> pb.AbortResponse:
        """See the proto."""
        if request.side == pb.SIDE_SOURCE:
            return await self._do("AbortSource", context, lambda: self._abort_source(request))
        return await self._do("AbortDestination", context, lambda: self._abort_arrival(request))

    def _abort_source(self, request: pb.AbortRequest) -> pb.AbortResponse:
        record = self._admit(request.fence, 0, common_pb2.DECISION_ABORTED)
        if record.role == pb.VM_ROLE_DEPARTING:
            self._state(record, request.fence, pb.VM_ROLE_DEPARTING)
            record.role = pb.VM_ROLE_RESIDENT
            record.exported = record.frozen = False
        elif record.role != pb.VM_ROLE_RESIDENT:
            raise FailedPreconditionError("WRONG_STATE", pb.VmRole.Name(record.role))
        return pb.AbortResponse(evidence=self.evidence(record.vm_id))

    def _abort_arrival(self, request: pb.AbortRequest) -> pb.AbortResponse:
        record = self._admit(request.fence, common_pb2.DECISION_ABORTED)
        if record.role == pb.VM_ROLE_ARRIVING:
            self._state(record, request.fence, pb.VM_ROLE_ARRIVING)
            record.role = pb.VM_ROLE_GONE
            self.kill_vmm(record.vm_id)
        elif record.role not in (pb.VM_ROLE_UNKNOWN, pb.VM_ROLE_GONE):
            self.world.broken.append(f"abort of {pb.VmRole.Name(record.role)}")
            raise FailedPreconditionError("WRONG_STATE", pb.VmRole.Name(record.role))
        return pb.AbortResponse(evidence=self.evidence(record.vm_id))

    async def Release(self, request: pb.ReleaseRequest, context: _Context) -> pb.ReleaseResponse:
        """See the proto."""
        if request.side == pb.SIDE_SOURCE:
            return await self._do("ReleaseSource", context, lambda: self._release_source(request))
        return await self._do("ReleaseDestination", context, lambda: self._release_arrival(request))

    def _release_source(self, request: pb.ReleaseRequest) -> pb.ReleaseResponse:
        lost = common_pb2.DECISION_LOST
        record = self._admit(request.fence, common_pb2.DECISION_COMMITTED, lost)
        if request.fence.decision == lost:
            return self._give_up(record)
        self._state(record, request.fence, pb.VM_ROLE_SEALED, pb.VM_ROLE_GONE)
        if not request.memory_complete:
            raise FailedPreconditionError("MEMORY_NEEDED", "memory_complete is not set")
        for agent in self.world.agents.values():
            arrival = agent.records.get(record.vm_id)
            if (
                arrival
                and arrival.role == pb.VM_ROLE_ARRIVED
                and arrival.vmm != pb.VMM_STATE_GUEST_ENDED
                and len(arrival.memory) < arrival.page_count
            ):
                self.world.broken.append(f"I3: {record.vm_id} needs memory that was released")
        record.role = pb.VM_ROLE_GONE
        record.memory.clear()
        record.exported = False
        return pb.ReleaseResponse(evidence=self.evidence(record.vm_id))

    def _release_arrival(self, request: pb.ReleaseRequest) -> pb.ReleaseResponse:
        lost = common_pb2.DECISION_LOST
        record = self._admit(request.fence, common_pb2.DECISION_COMMITTED, lost)
        if request.fence.decision == lost:
            return self._give_up(record)
        self._state(record, request.fence, pb.VM_ROLE_ARRIVED, pb.VM_ROLE_RESIDENT)
        record.role = pb.VM_ROLE_RESIDENT
        return pb.ReleaseResponse(evidence=self.evidence(record.vm_id))

    def _give_up(self, record: Record) -> pb.ReleaseResponse:
        record.role = pb.VM_ROLE_GONE
        record.memory.clear()
        self.kill_vmm(record.vm_id)
        return pb.ReleaseResponse(evidence=self.evidence(record.vm_id))

    async def WatchProgress(
        self, request: pb.WatchProgressRequest, context: _Context
    ) -> AsyncIterator[pb.WatchProgressResponse]:
        """See the proto."""
        record = self.records.get(request.vm_id)
        if record is None:
            raise NotFoundError("VM_UNKNOWN", request.vm_id)
        if request.epoch != record.epoch_prepared:
            raise FailedPreconditionError("STALE_EPOCH", f"{record.epoch_prepared}")
        self.calls["WatchProgress"] += 1
        said: tuple[int, int] | None = None
        known: set[int] = set()
        sequence = 0
        while True:
            if self._before["WatchProgress"]:
                try:
                    await self._before["WatchProgress"].pop(0)()
                except _LostError:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "Connection reset by peer")
            phase = self._phase(record)
            now = (phase, len(record.memory))
            if now != said:
                sequence += 1
                delta = pb.BitmapDelta(whole=said is None, page_count=record.page_count)
                if said is None:
                    absent = sorted(set(range(record.page_count)) - set(record.memory))
                    delta.absent_runs.extend(_runs(absent))
                else:
                    delta.resident_runs.extend(_runs(sorted(set(record.memory) - known)))
                known, said = set(record.memory), now
                yield pb.WatchProgressResponse(
                    sequence=sequence,
                    phase=phase,
                    counters=self._counters(record),
                    bitmap_delta=delta,
                    reason="connection refused" if record.link_lost else "",
                )
                if phase in (pb.ARRIVAL_PHASE_COMPLETE, pb.ARRIVAL_PHASE_ENDED):
                    return
            await asyncio.sleep(TICK_S)

    # --- what it says ---

    def _phase(self, record: Record) -> pb.ArrivalPhase.ValueType:
        if record.epoch_memory_complete == record.epoch_prepared:
            return pb.ARRIVAL_PHASE_COMPLETE
        if record.vmm in (pb.VMM_STATE_GUEST_ENDED, pb.VMM_STATE_DEAD):
            return pb.ARRIVAL_PHASE_ENDED
        if record.role == pb.VM_ROLE_ARRIVING:
            return pb.ARRIVAL_PHASE_ARMED
        if record.no_room:
            return pb.ARRIVAL_PHASE_NO_MEMORY
        return pb.ARRIVAL_PHASE_LINK_LOST if record.link_lost else pb.ARRIVAL_PHASE_FETCHING

    def _counters(self, record: Record) -> common_pb2.ArrivalCounters:
        return common_pb2.ArrivalCounters(
            page_count=record.page_count,
            absent_count=record.page_count - len(record.memory),
            demand_page_count=min(len(record.memory), 1),
            bulk_page_count=max(len(record.memory) - 1, 0),
            received_bytes=len(record.memory) * PAGE_BYTES,
            held_total_ns=sum(hold.held_ns for hold in record.holds),
            holds=record.holds,
        )

    def evidence(self, vm_id: str) -> pb.Evidence:
        """What the node can prove."""
        record = self.records.get(vm_id, Record(vm_id=vm_id))
        evidence = pb.Evidence(
            vm_id=vm_id,
            node=self.node,
            boot_id=self.boot_id,
            incarnation=str(self.incarnation),
            role=record.role,
            vmm_state=record.vmm,
            epoch_seen=record.epoch_seen,
            epoch_owned=record.epoch_owned,
            migration_id=record.migration_id,
            epoch_prepared=record.epoch_prepared,
            epoch_loaded=record.epoch_loaded,
            epoch_activating=record.epoch_activating,
            epoch_memory_complete=record.epoch_memory_complete,
            epoch_sealed=record.epoch_sealed,
            returnable=self._is_returnable(record),
            spec_json=record.spec_json,
            memory_bytes=record.page_count * PAGE_BYTES,
            decision=common_pb2.Decision.ValueType(record.decisions.get(record.migration_id, 0)),
            retained_bytes=len(record.memory) * PAGE_BYTES
            if record.role == pb.VM_ROLE_SEALED
            else 0,
        )
        if record.exported:
            evidence.image.CopyFrom(
                common_pb2.Image(
                    image_id=f"{vm_id}-{record.epoch_departure}",
                    vm_id=vm_id,
                    epoch=record.epoch_owned,
                    boot_id=self.boot_id,
                    generation=record.generation,
                    state=common_pb2.IMAGE_STATE_FROZEN
                    if record.frozen
                    else common_pb2.IMAGE_STATE_LIVE,
                    regions=[
                        common_pb2.Region(
                            size_bytes=record.page_count * PAGE_BYTES, page_size_bytes=PAGE_BYTES
                        )
                    ],
                )
            )
        return evidence

    # --- pages ---

    def _fetch(self, record: Record) -> None:
        task = asyncio.get_running_loop().create_task(self._fetch_loop(record))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _fetch_loop(self, record: Record) -> None:
        epoch = record.epoch_prepared
        while record.epoch_prepared == epoch and record.vmm == pb.VMM_STATE_RUNNING:
            await asyncio.sleep(TICK_S)
            await self.fetching.wait()
            source = self.world.agents[record.source_node]
            offered = source.records[record.vm_id]
            absent = sorted(set(range(record.page_count)) - set(record.memory))
            if not absent:
                record.epoch_memory_complete = epoch
                return
            before = record.link_lost
            record.link_lost = not (source.page_server_up and offered.exported and offered.memory)
            if record.link_lost or record.no_room:
                continue
            if before:
                number = len(record.holds) + 1
                record.holds.append(
                    common_pb2.Hold(
                        number=number,
                        cause=common_pb2.HOLD_CAUSE_LINK_LOST,
                        outage_ns=number * 2_000_000_000,
                        held_ns=number * 1_500_000_000,
                    )
                )
            if not offered.frozen:
                self.world.broken.append("a LIVE page was installed")
            for page in absent[: self.pages_per_tick]:
                record.memory[page] = offered.memory[page]


class _LostError(Exception):
    """The connection breaks here."""


async def _lost() -> None:
    raise _LostError


def _runs(pages: list[int]) -> list[pb.PageRun]:
    runs: list[pb.PageRun] = []
    for page in pages:
        if runs and runs[-1].first_page + runs[-1].page_count == page:
            runs[-1].page_count += 1
        else:
            runs.append(pb.PageRun(first_page=page, page_count=1))
    return runs


def spec(vm_id: str = "vm-1") -> dict[str, Any]:
    """A spec that is valid."""
    return {"vm_id": vm_id, "memory_bytes": 64 << 20, "kernel": "/boot/vmlinuz"}


def spec_json(vm_id: str = "vm-1") -> str:
    """The same as JSON."""
    return json.dumps(spec(vm_id))
