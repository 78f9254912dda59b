# SPDX-License-Identifier: Apache-2.0
"""The destination's half of a hand-over."""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

from godwit.agent.v1 import fault_agent_service_pb2 as pb

from services.common.errors import (
    FailedPreconditionError,
    GodwitError,
    InvalidArgumentError,
    UnavailableError,
)
from services.common.hooks import reach
from services.common.vm_spec import PAGE_BYTES, VmSpec
from services.fault_agent.arrival_engine import ArrivalEngines
from services.fault_agent.device_state import Incoming
from services.fault_agent.drivers.api import Vmm, VmmState
from services.fault_agent.drivers.memory_map import memory_regions
from services.fault_agent.evidence import read_fence
from services.fault_agent.fence import Command, Fence, wrong_state
from services.fault_agent.journal import Arriving, Decision, Record, Role
from services.fault_agent.leases import Leases, gone, take_back
from services.fault_agent.node import Node
from services.fault_agent.preflight import Preflight
from services.fault_agent.private_map import refuse_private_pages
from services.fault_agent.residents import (
    has_data,
    make_launch,
    make_ram_file,
    ram_path,
    remove_page_map,
)
from services.fault_agent.vms import Vm

log = logging.getLogger(__name__)

ARM_TIMEOUT_S = 15.0
FREEZE_AFTER_MS_MAX = 86_400_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrivalOrder:
    """What Prepare tells a destination, checked."""

    spec: VmSpec
    image_id: str
    page_address: str
    traceparent: str
    bulk_bytes_per_s_max: int
    freeze_after_ms: int
    page_server_name: str
    token: bytes = field(repr=False)

    @classmethod
    def read(cls, fence: Fence, message: pb.PrepareArrival) -> ArrivalOrder:
        """Check what the orchestrator sends.

        Raises:
            InvalidArgumentError: FIELD_INVALID, SPEC_INVALID.
            FailedPreconditionError: SPEC_MISMATCH: this node reads the spec differently;
                PRIVATE_MEMORY_UNSUPPORTED.
        """
        spec, image = VmSpec.parse(message.spec_json), message.image
        if spec.vm_id != fence.vm_id or image.vm_id != fence.vm_id:
            raise _field("spec_json and image", f"must be of {fence.vm_id}")
        if not image.image_id or not 1 <= image.epoch < fence.epoch:
            raise _field("image", f"needs an id and an epoch of 1..{fence.epoch - 1}")
        if spec.spec_hash != message.spec_hash:
            raise FailedPreconditionError(
                "SPEC_MISMATCH",
                f"the spec's hash is {spec.spec_hash} here, {message.spec_hash} at the source",
                hint="install the same release on both nodes",
            )
        regions = [(region.gpa_bytes, region.size_bytes) for region in image.regions]
        own = [(region.gpa, region.size_bytes) for region in memory_regions(spec)]
        if regions != own:
            raise FailedPreconditionError(
                "SPEC_MISMATCH", f"the image has regions {regions}, the spec makes {own}"
            )
        freeze_after_ms = message.on_link_loss.freeze_after_ms
        if freeze_after_ms > FREEZE_AFTER_MS_MAX:
            raise _field("on_link_loss.freeze_after_ms", f"must be 0..{FREEZE_AFTER_MS_MAX}")
        refuse_private_pages(message.private_map, spec.memory_bytes // PAGE_BYTES)
        return cls(
            spec=spec,
            image_id=image.image_id,
            page_address=message.page_address,
            traceparent=message.traceparent,
            bulk_bytes_per_s_max=message.bulk_bytes_per_s_max,
            freeze_after_ms=freeze_after_ms,
            page_server_name=message.page_server_name,
            token=message.fetch_token,
        )


def _field(name: str, must: str) -> InvalidArgumentError:
    return InvalidArgumentError("FIELD_INVALID", f"arrival.{name} {must}")


class Arrivals:
    """Handles Prepare, LoadDeviceState, Activate, Abort and Release of a destination."""

    def __init__(self, node: Node, preflight: Preflight, engines: ArrivalEngines) -> None:
        self.leases = Leases(node)
        self._node = node
        self._preflight = preflight
        self._engines = engines

    async def prepare(self, fence: Fence, message: pb.PrepareArrival) -> pb.Evidence:
        """Start a shell with absent memory, arm it, connect both lanes; fsync PREPARED.

        Given again for an arrival that is under way, with another page server, it fetches from
        that one from now on.

        Raises:
            FailedPreconditionError: PREFLIGHT_FAILED, SPEC_MISMATCH, WRONG_STATE; the fence's.
            UnavailableError: PAGE_SERVER_UNREACHABLE, VMM_UNREACHABLE, DRAINING.
            ResourceExhaustedError: MEMORY_SHORT: others that come were promised it.
        """
        vm = self._node.vm(fence.vm_id)
        async with vm.command(fence, Command.PREPARE_ARRIVAL) as fenced:
            order = ArrivalOrder.read(fence, message)
            record = vm.record
            under_way = record.role in (Role.ARRIVING, Role.ARRIVED)
            if under_way and record.epoch_prepared == fence.epoch:
                await self._redirect(vm, order)
                return await self._node.evidence(vm)
            self._node.refuse_if_draining()
            if record.role is Role.ARRIVING:
                # Only of this migration, by the fence: an attempt that died half way.
                await self._take_back(vm)
            elif record.role not in (Role.UNKNOWN, Role.GONE):
                raise wrong_state(record, Command.PREPARE_ARRIVAL, "it is here already")
            with self.leases.taking(vm.vm_id, order.spec.memory_bytes):
                await self._preflight.require_arrival(order.spec)
                try:
                    await self._make_shell(vm, fenced, fence, order)
                except BaseException:
                    await self._take_back(vm)
                    raise
            return await self._node.evidence(vm)

    async def load(
        self, requests: AsyncIterator[pb.LoadDeviceStateRequest]
    ) -> pb.LoadDeviceStateResponse:
        """Load a device state into the shell, paused; fsync LOADED.

        Raises:
            DataLossError: STATE_CORRUPT.
            FailedPreconditionError: LOAD_FAILED, WRONG_STATE, NODE_REBOOTED; the fence's.
        """
        incoming = Incoming(requests)
        header = await incoming.header()
        fence = read_fence(header.fence)
        vm = self._node.vm(fence.vm_id)
        vm.require_known()
        async with vm.command(fence, Command.LOAD):
            if vm.record.epoch_loaded == fence.epoch:
                # The mark alone is no guest: what it was loaded into may have died since.
                vm.require_same_boot(Command.LOAD)
                if await vm.look() is VmmState.DEAD:
                    raise wrong_state(vm.record, Command.LOAD, "its VMM died after the load")
                await incoming.drain()
                return pb.LoadDeviceStateResponse(evidence=await self._node.evidence(vm))
            self._require_arriving(vm, fence, Command.LOAD)
            state = await vm.look()
            if vm.loading or state is not VmmState.INCOMING:
                raise wrong_state(
                    vm.record, Command.LOAD, f"its shell is {state.value}: it was used, or died"
                )
            vmm = await vm.hold()

            def open_gate() -> None:
                self._require_arriving(vm, fence, Command.LOAD)
                self._engines.require(vm).arrival.open_gate(header.generation)

            if header.image_pending:
                incoming.when_served(open_gate)
            else:
                open_gate()
            vm.loading = True
        # Without the lock: it may wait for its source, and for pages, and an Abort must be able to
        # end it. What never began has not touched the shell, which stays good for another attempt.
        try:
            await incoming.wait_first()
            self._require_arriving(vm, fence, Command.LOAD)
        except BaseException:
            vm.loading = False
            raise
        try:
            async with contextlib.aclosing(incoming.chunks()) as chunks:
                await vmm.load(chunks)
        except BaseException:
            await self._give_up(vm, fence)
            raise
        finally:
            vm.loading = False
        load_ns = time.monotonic_ns() - incoming.first_byte_ns
        await reach("agent.load.before_loaded")
        async with vm.lock:
            # An Abort may have come between.
            self._require_arriving(vm, fence, Command.LOAD)
            await vm.write(replace(vm.record, epoch_loaded=fence.epoch))
        await reach("agent.load.after_loaded")
        evidence = await self._node.evidence(vm, VmmState.PAUSED)
        return pb.LoadDeviceStateResponse(evidence=evidence, load_ns=load_ns)

    async def activate(self, fence: Fence) -> pb.Evidence:
        """Let the guest run here: fsync ACTIVATING, `cont`, announce, start the bulk lane.

        Raises:
            FailedPreconditionError: WRONG_STATE, DECISION_MISSING, NODE_REBOOTED; VMM_REFUSED:
                give it again, a disk may still have been locked; the fence's.
            UnavailableError: VMM_UNREACHABLE: it may run or not; give it again.
        """
        vm = self._node.vm(fence.vm_id)
        vm.require_known()
        async with vm.command(fence, Command.ACTIVATE) as fenced:
            record = vm.record
            if record.role is Role.RESIDENT and record.epoch_owned == fence.epoch:
                return await self._node.evidence(vm)
            if record.role is Role.ARRIVED and record.epoch_owned == fence.epoch:
                # Given again after our death between the mark and `cont`, say.
                if await vm.look() is VmmState.PAUSED:
                    await self._let_run(vm)
                return await self._node.evidence(vm)
            self._require_arriving(vm, fence, Command.ACTIVATE)
            if record.epoch_loaded != fence.epoch:
                raise wrong_state(record, Command.ACTIVATE, "its device state is not loaded")
            await reach("agent.activate.before_activating")
            # Last of all: a VMM that is dead by now has not run, and the guest can go back.
            await vm.require_process(Command.ACTIVATE)
            self._engines.require(vm)
            await vm.write(replace(fenced, epoch_activating=fence.epoch, epoch_owned=fence.epoch))
            await self._require_still_alive(vm, record)
            await reach("agent.activate.after_activating")
            await self._let_run(vm)
            return await self._node.evidence(vm, VmmState.RUNNING)

    async def abort(self, fence: Fence) -> pb.Evidence:
        """Prove the shell dead and forget the arrival. One that never came is remembered.

        Raises:
            FailedPreconditionError: WRONG_STATE: ACTIVATING is durable, the guest may have run
                here; the fence's.
        """
        vm = self._node.vm(fence.vm_id)
        async with vm.command(fence, Command.ABORT_DESTINATION) as fenced:
            record = vm.record
            if record.role in (Role.UNKNOWN, Role.GONE):
                return await self._node.evidence(vm)
            if record.role is not Role.ARRIVING or was_activated(record):
                raise wrong_state(record, Command.ABORT_DESTINATION, "the guest may have run here")
            await reach("agent.abort.before")
            await vm.write(fenced)
            await self._take_back(vm)
            return await self._node.evidence(vm)

    async def recall(self, fence: Fence) -> pb.Evidence:
        """Take the guest back from here, for ever: its VMM is proved dead, Activate is stale.

        Under COMMITTED only if the guest never ran here (I5). Under RETURNED whatever it did: the
        store has given it to its source, so that what may be left of it here is nobody's.

        Raises:
            FailedPreconditionError: WRONG_STATE: ACTIVATING is durable, or it lives here; the
                fence's.
        """
        vm = self._node.vm(fence.vm_id)
        async with vm.command(fence, Command.RECALL_DESTINATION) as fenced:
            record = vm.record
            if record.role in (Role.UNKNOWN, Role.GONE):
                return await self._node.evidence(vm)
            if record.role not in (Role.ARRIVING, Role.ARRIVED):
                raise wrong_state(record, Command.RECALL_DESTINATION, "it did not come from there")
            if was_activated(record) and fence.decision is not Decision.RETURNED:
                raise wrong_state(record, Command.RECALL_DESTINATION, "the guest may have run here")
            await reach("agent.recall.before")
            # Durable before the kill: no Activate is admitted from here on.
            await vm.write(fenced)
            await self._take_back(vm)
            return await self._node.evidence(vm)

    async def release(self, fence: Fence) -> pb.Evidence:
        """End the arrival's bookkeeping: from now on the VM simply lives here.

        Under LOST the guest is given up: its VMM is killed, its memory removed.

        A guest that has ended needs no memory: what is left of it here is removed.

        Raises:
            FailedPreconditionError: MEMORY_INCOMPLETE, WRONG_STATE; the fence's.
        """
        vm = self._node.vm(fence.vm_id)
        vm.require_known()
        async with vm.command(fence, Command.RELEASE) as fenced:
            record = vm.record
            over = record.role in (Role.RESIDENT, Role.GONE)
            if fence.decision is Decision.LOST:
                return await self._give_up_guest(vm, fenced)
            if over and record.epoch_owned == fence.epoch:
                return await self._node.evidence(vm)
            if record.role is not Role.ARRIVED or record.epoch_owned != fence.epoch:
                raise wrong_state(record, Command.RELEASE, "it did not arrive under this epoch")
            # MEMORY_COMPLETE is told before the memory is let go: that may still be under way.
            await self._engines.settle(vm)
            record = vm.record
            arriving = record.arriving
            complete = record.epoch_memory_complete == fence.epoch
            needs_nobody = complete and arriving is not None and arriving.unregistered
            ended = await vm.look() in (VmmState.DEAD, VmmState.GUEST_ENDED)
            if not needs_nobody and not ended:
                raise FailedPreconditionError(
                    "MEMORY_INCOMPLETE", f"pages of {vm.vm_id} are still at the source"
                )
            await reach("agent.release.before")
            if needs_nobody and arriving is not None:
                await self._engines.stop(vm)
                complete_epoch = record.epoch_memory_complete
                resident = replace(fenced, version=1, role=Role.RESIDENT, arriving=None)
                await vm.write(replace(resident, epoch_memory_complete=complete_epoch))
                remove_page_map(arriving.page_map_path)
            else:
                await vm.write(fenced)
                await self._take_back(vm)
            return await self._node.evidence(vm)

    async def _give_up_guest(self, vm: Vm, fenced: Record) -> pb.Evidence:
        record = vm.record
        if record.role is Role.RESIDENT:
            raise wrong_state(record, Command.RELEASE, "it lives here: StopVm ends it")
        if record.role is not Role.GONE:
            await reach("agent.release.before")
            await vm.write(fenced)
            await self._take_back(vm)
        return await self._node.evidence(vm)

    async def _make_shell(self, vm: Vm, fenced: Record, fence: Fence, order: ArrivalOrder) -> None:
        node = self._node
        driver = node.driver(order.spec.driver)
        vm.driver = driver
        path = ram_path(node, vm.vm_id, fence.epoch)
        arriving = Arriving(
            image_id=order.image_id,
            page_address=order.page_address,
            session_id=uuid.uuid4().hex,
            page_map_path=str(path.with_suffix(".map")),
            traceparent=order.traceparent,
            bulk_bytes_per_s_max=order.bulk_bytes_per_s_max,
            freeze_after_ms=order.freeze_after_ms,
            page_server_name=order.page_server_name,
            token=order.token.hex(),
        )
        # Names first: what is made from here on can be found and removed after a crash.
        await vm.write(
            replace(
                fenced,
                version=2 if order.freeze_after_ms else 1,
                role=Role.ARRIVING,
                boot_id=node.boot_id,
                epoch_prepared=0,
                epoch_loaded=0,
                epoch_activating=0,
                epoch_memory_complete=0,
                spec_json=order.spec.canonical_json(),
                process=None,
                ram_path=str(path),
                ram_inode=0,
                export=None,
                transferred=None,
                arriving=arriving,
            )
        )
        await vm.write(replace(vm.record, ram_inode=make_ram_file(path, order.spec.memory_bytes)))
        await vm.launch(driver.start_incoming, make_launch(node, vm, order.spec, fence.epoch))
        if has_data(path):
            raise FailedPreconditionError(
                "MEMORY_TOUCHED",
                f"the shell of {vm.vm_id} has touched its memory before it was armed",
                hint="no mem-lock, no prealloc: every page must be absent",
            )
        await self._engines.arm(vm, fence.epoch)
        status = await self._engines.require(vm).wait_up(ARM_TIMEOUT_S)
        if status.phase.name != "ARMED":
            raise UnavailableError(
                "PAGE_SERVER_UNREACHABLE",
                f"the lanes to {order.page_address} are {status.phase.name.lower()}"
                f" after {ARM_TIMEOUT_S:g} s: {status.reason or 'no reason given'}",
                hint="check the page server of the source and the network between the nodes",
            )
        await reach("agent.prepare.before_prepared")
        # By which key its memory comes, durable with the promise that it will.
        arriving = self._engines.with_server_key(vm)
        await vm.write(replace(vm.record, epoch_prepared=fence.epoch, arriving=arriving))

    async def _require_still_alive(self, vm: Vm, before: Record) -> None:
        """Take ACTIVATING back if the VMM died before it was durable: `cont` was not attempted.

        Only whoever wrote the mark, and has done nothing since, can know that. If we die first it
        stays, and the guest is held for a person.
        """
        try:
            await vm.require_process(Command.ACTIVATE)
        except FailedPreconditionError:
            owned = before.epoch_owned
            await vm.write(replace(vm.record, epoch_activating=0, epoch_owned=owned))
            raise

    async def _let_run(self, vm: Vm) -> None:
        """Only after ACTIVATING is durable."""
        vmm = await vm.hold()
        if not await reach("agent.activate.before_cont"):
            await vmm.resume()
            vm.runs_since_ns = time.monotonic_ns()
        await reach("agent.activate.after_cont")
        self._engines.require(vm).arrival.start_bulk()
        # ACTIVATING is durable and says it all; the role is for the next agent of this boot.
        await vm.write(replace(vm.record, role=Role.ARRIVED), durable=False)
        # Behind the answer: the guest runs, and its network hears of it within a millisecond.
        self._node.start_task(self._announce(vm, vmm), f"announce {vm.vm_id}")
        self._engines.check_complete(vm)

    async def _announce(self, vm: Vm, vmm: Vmm) -> None:
        try:
            await vmm.announce()
        except GodwitError as error:
            log.warning("%s runs here and is not announced: %s", vm.vm_id, error)

    async def _give_up(self, vm: Vm, fence: Fence) -> None:
        """A shell that got a wrong state, or half of one, is of no use: nobody shall wonder."""
        async with vm.lock:
            record = vm.record
            if record.role is Role.ARRIVING and record.epoch_prepared == fence.epoch:
                await vm.kill_vmm()
                await vm.write(replace(vm.record, process=None))

    async def _redirect(self, vm: Vm, order: ArrivalOrder) -> None:
        arriving = vm.record.arriving
        if arriving is None:
            return
        token = order.token.hex() or arriving.token
        wanted = replace(arriving, page_address=order.page_address, token=token)
        if wanted == arriving:
            return
        await vm.write(replace(vm.record, arriving=wanted))
        await self._engines.redirect(vm)

    async def _take_back(self, vm: Vm) -> None:
        """Remove what an arrival made here. Idempotent."""
        await take_back(self._engines, vm, gone(vm.record))

    def _require_arriving(self, vm: Vm, fence: Fence, command: Command) -> None:
        record = vm.record
        if record.role is not Role.ARRIVING or record.epoch_prepared != fence.epoch:
            raise wrong_state(record, command, "no arrival was prepared under this epoch")


def was_activated(record: Record) -> bool:
    """True if `cont` may have been attempted for the arrival that the record is about."""
    return record.epoch_activating != 0
