# SPDX-License-Identifier: Apache-2.0
"""Nodes in one process, each an agent over gRPC and a page server, with real QEMUs.

Two page cores can be under them. `CopyingPageCore` moves memory by copying the source's RAM file
when the gate opens: it proves nothing about the page path and everything about the hand-over. The
native one is the real thing.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from godwit.agent.v1 import fault_agent_service_pb2 as pb
from godwit.agent.v1 import fault_agent_service_pb2_grpc
from godwit.common.v1 import common_pb2

from services.common import grpc_client
from services.common.listen import parse_listen
from services.common.vm_spec import VmSpec
from services.fault_agent import journal, processes
from services.fault_agent import main as agent_main
from services.fault_agent.main import Serving
from services.fault_agent.node import NodeConfig
from services.page_server import main as page_server_main
from services.pagecore.api import ArrivalConfig, ArrivalRegion, Injection, PageCore
from services.pagecore.fake import FakeArrival, FakePageCore

ANY_PORT = parse_listen("127.0.0.1:0")
CALL_S = 60.0


class CopyingArrival(FakeArrival):
    """All memory comes at once, when the gate opens."""

    def __init__(self, config: ArrivalConfig, core: CopyingPageCore) -> None:
        super().__init__(config, core.maps)
        core.maps[config.page_map_path].auto_connect = core.auto_connect
        self._core = core
        self._ram_fd = os.dup(config.ram_fd)

    def open_gate(self, generation: int) -> None:
        """Copy the data of the source's file; holes stay holes."""
        super().open_gate(generation)
        record = self._core.find_record(self.config.image_id)
        assert (record["generation"], record["state"]) == (generation, "frozen")
        copy_data(Path(str(record["ram_path"])), self._ram_fd)

    def start_bulk(self) -> None:
        """Say that it is all here."""
        super().start_bulk()
        if self._core.complete_at_once:
            self.install_all()

    def close(self) -> None:
        """Idempotent."""
        if not self.closed:
            os.close(self._ram_fd)
        super().close()


def copy_data(source: Path, target_fd: int) -> None:
    """Copy a sparse file."""
    with source.open("rb") as file:
        end, position = os.fstat(file.fileno()).st_size, 0
        while position < end:
            try:
                start = os.lseek(file.fileno(), position, os.SEEK_DATA)
            except OSError:  # no data behind
                return
            position = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            while start < position:
                data = os.pread(file.fileno(), min(position - start, 1 << 20), start)
                os.pwrite(target_fd, data, start)
                start += len(data)


class CopyingPageCore(FakePageCore):
    """No userfaultfd: injects nothing and says it did."""

    def __init__(self, images_dirs: list[Path]) -> None:
        super().__init__()
        self._images_dirs = images_dirs
        self.complete_at_once = True

    def find_record(self, image_id: str) -> dict[str, object]:
        """The image record of whichever node has it."""
        for directory in self._images_dirs:
            with contextlib.suppress(FileNotFoundError):
                found: dict[str, object] = json.loads((directory / f"{image_id}.json").read_text())
                return found
        raise AssertionError(f"no image record {image_id}")

    def inject_uffd(self, *, pid: int, ram_fd: int, minor: bool = False) -> Injection:
        """The whole file, somewhere."""
        size = os.fstat(ram_fd).st_size
        self.add_process(pid, ArrivalRegion(offset=0, host_addr=1 << 40, len_bytes=size))
        return super().inject_uffd(pid=pid, ram_fd=ram_fd, minor=minor)

    def create_arrival(self, config: ArrivalConfig) -> FakeArrival:
        """One that copies."""
        arrival = CopyingArrival(config, self)
        self.arrivals.append(arrival)
        return arrival


@dataclass(slots=True)
class Agent:
    """One node's agent, and a client of it."""

    serving: Serving
    stub: fault_agent_service_pb2_grpc.FaultAgentServiceStub
    channel: grpc_client.grpc.aio.Channel  # type: ignore[name-defined]

    @property
    def address(self) -> str:
        """Where it listens."""
        return str(self.serving.grpc)

    def vm_dir(self, vm_id: str) -> Path:
        """Where it keeps a VM's files."""
        return self.serving.node.config.state_dir / "vms" / vm_id


@dataclass(slots=True)
class Host:
    """Where a node lives: survives its agent."""

    name: str
    directory: Path
    ram_dir: Path
    control: str = ""
    vmms: set[processes.Process] = field(default_factory=set)

    @property
    def images_dir(self) -> Path:
        """Image records."""
        return self.directory / "images"


@contextlib.asynccontextmanager
async def running_host(
    name: str, parent: Path, ram_parent: Path, page_core: PageCore | None = None
) -> AsyncIterator[Host]:
    """A node without its agent: directories and a page server, on a fake page core or another."""
    host = Host(name=name, directory=parent / name, ram_dir=ram_parent / name)
    host.directory.mkdir(parents=True)
    host.ram_dir.mkdir(parents=True)
    config = page_server_main.Config(
        listen=ANY_PORT,
        control=ANY_PORT,
        metrics=ANY_PORT,
        images_dir=host.images_dir,
        drain_s=1,
        connection_count_max=16,
    )
    async with page_server_main.serving(config, page_core or FakePageCore()) as serving:
        host.control = str(serving.control)
        try:
            yield host
        finally:
            await kill_vmms(host)


async def kill_vmms(host: Host) -> None:
    """End every VMM that a journal of this host names."""
    for path in host.directory.glob(f"vms/*/{journal.FILE}"):
        process = journal.read(path).process
        if process is not None:
            await processes.kill(process)


@contextlib.asynccontextmanager
async def running_agent(
    host: Host,
    core: PageCore,
    *,
    peer_bytes_per_s_max: int = 0,
    collapse: bool = False,
    arrival_lease_s: float = 900.0,
) -> AsyncIterator[Agent]:
    """The agent of a node; its VMMs outlive it."""
    config = agent_main.Config(
        node=NodeConfig(
            name=host.name,
            state_dir=host.directory,
            ram_dir=host.ram_dir,
            images_dir=host.images_dir,
            page_server_control=host.control,
            peer_bytes_per_s_max=peer_bytes_per_s_max,
            collapse=collapse,
            arrival_lease_s=arrival_lease_s,
        ),
        listen=ANY_PORT,
        metrics=ANY_PORT,
        orchestrator="",
        qemu="qemu-system-x86_64",
        drain_s=1,
    )
    async with (
        agent_main.serving(config, core) as serving,
        grpc_client.open_channel(str(serving.grpc)) as channel,
    ):
        stub = fault_agent_service_pb2_grpc.FaultAgentServiceStub(channel)
        yield Agent(serving=serving, stub=stub, channel=channel)


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """What an orchestrator says about one migration of one VM."""

    vm_id: str
    epoch: int
    migration_id: str

    def fence(
        self, decision: int = common_pb2.DECISION_UNSPECIFIED, epoch: int = 0
    ) -> common_pb2.Fence:
        """The fence of a command."""
        return common_pb2.Fence(
            vm_id=self.vm_id,
            epoch=epoch or self.epoch,
            migration_id=self.migration_id,
            decision=common_pb2.Decision.ValueType(decision),
        )

    @property
    def committed(self) -> common_pb2.Fence:
        """After COMMITTED."""
        return self.fence(common_pb2.DECISION_COMMITTED)

    def aborted(self, epoch: int = 0) -> common_pb2.Fence:
        """After ABORTED."""
        return self.fence(common_pb2.DECISION_ABORTED, epoch)


async def start_vm(agent: Agent, spec: VmSpec, epoch: int) -> pb.Evidence:
    """StartVm."""
    answer = await grpc_client.call(
        agent.channel,
        agent.stub.StartVm,
        pb.StartVmRequest(
            fence=common_pb2.Fence(vm_id=spec.vm_id, epoch=epoch), spec_json=spec.canonical_json()
        ),
        timeout_s=CALL_S,
    )
    return answer.evidence


async def prepare(
    source: Agent,
    destination: Agent,
    orders: Orders,
    bulk_bytes_per_s_max: int = 0,
    page_address: str = "",
    freeze_after_ms: int = 0,
) -> pb.Evidence:
    """Prepare on both sides; the destination's evidence."""
    departure = await grpc_client.call(
        source.channel,
        source.stub.Prepare,
        pb.PrepareRequest(fence=orders.fence(), departure=pb.PrepareDeparture()),
        timeout_s=CALL_S,
    )
    arrival = await grpc_client.call(
        destination.channel,
        destination.stub.Prepare,
        pb.PrepareRequest(
            fence=orders.fence(),
            arrival=pb.PrepareArrival(
                spec_json=departure.spec_json,
                spec_hash=departure.spec_hash,
                image=departure.evidence.image,
                page_address=page_address or departure.page_address,
                bulk_bytes_per_s_max=bulk_bytes_per_s_max,
                on_link_loss=common_pb2.LinkLossPolicy(freeze_after_ms=freeze_after_ms),
            ),
        ),
        timeout_s=CALL_S,
    )
    return arrival.evidence


async def pause(agent: Agent, orders: Orders) -> pb.Evidence:
    """Pause."""
    request = pb.PauseRequest(fence=orders.fence())
    answer = await grpc_client.call(agent.channel, agent.stub.Pause, request, timeout_s=CALL_S)
    return answer.evidence


async def pause_and_transfer(source: Agent, destination: Agent, orders: Orders) -> pb.PauseResponse:
    """Both in one command, as the orchestrator does it."""
    request = pb.PauseRequest(fence=orders.fence(), transfer_to=destination.address)
    return await grpc_client.call(source.channel, source.stub.Pause, request, timeout_s=CALL_S)


async def transfer(
    source: Agent, destination: Agent, orders: Orders
) -> pb.TransferDeviceStateResponse:
    """TransferDeviceState."""
    request = pb.TransferDeviceStateRequest(
        fence=orders.fence(), destination_address=destination.address
    )
    return await grpc_client.call(
        source.channel, source.stub.TransferDeviceState, request, timeout_s=CALL_S
    )


async def activate(agent: Agent, orders: Orders) -> pb.Evidence:
    """Activate."""
    request = pb.ActivateRequest(fence=orders.committed)
    answer = await grpc_client.call(agent.channel, agent.stub.Activate, request, timeout_s=CALL_S)
    return answer.evidence


async def seal(agent: Agent, orders: Orders) -> pb.Evidence:
    """Seal."""
    request = pb.SealRequest(fence=orders.committed)
    answer = await grpc_client.call(agent.channel, agent.stub.Seal, request, timeout_s=CALL_S)
    return answer.evidence


async def abort(agent: Agent, orders: Orders, side: pb.Side.ValueType) -> pb.Evidence:
    """Abort under ABORTED."""
    request = pb.AbortRequest(fence=orders.aborted(), side=side)
    answer = await grpc_client.call(agent.channel, agent.stub.Abort, request, timeout_s=CALL_S)
    return answer.evidence


async def resume(agent: Agent, orders: Orders, epoch: int) -> pb.Evidence:
    """Resume under ABORTED and a fresh epoch."""
    request = pb.ResumeRequest(fence=orders.aborted(epoch))
    answer = await grpc_client.call(agent.channel, agent.stub.Resume, request, timeout_s=CALL_S)
    return answer.evidence


async def release(
    agent: Agent, orders: Orders, side: pb.Side.ValueType, *, memory_complete: bool = True
) -> pb.Evidence:
    """Release."""
    request = pb.ReleaseRequest(
        fence=orders.committed,
        side=side,
        memory_complete=memory_complete and side == pb.SIDE_SOURCE,
    )
    answer = await grpc_client.call(agent.channel, agent.stub.Release, request, timeout_s=CALL_S)
    return answer.evidence


async def describe(agent: Agent, vm_id: str) -> pb.Evidence:
    """Describe."""
    request = pb.DescribeRequest(vm_id=vm_id)
    answer = await grpc_client.call(agent.channel, agent.stub.Describe, request, timeout_s=CALL_S)
    return answer.evidence


async def wait_phase(agent: Agent, orders: Orders, phase: int) -> pb.WatchProgressResponse:
    """Follow WatchProgress until a phase."""
    request = pb.WatchProgressRequest(vm_id=orders.vm_id, epoch=orders.epoch, interval_ms=20)
    async with contextlib.aclosing(
        grpc_client.stream(agent.channel, agent.stub.WatchProgress, request)
    ) as steps:
        async for step in steps:
            if step.phase == phase:
                return step
    raise AssertionError(f"the stream ended without phase {phase}")
