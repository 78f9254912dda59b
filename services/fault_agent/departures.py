# SPDX-License-Identifier: Apache-2.0
"""The source's half of a hand-over. Until Seal everything here can be taken back (I6)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator
from dataclasses import replace

from godwit.agent.v1 import fault_agent_service_pb2 as pb

from services.common.errors import FailedPreconditionError
from services.common.grpc_client import NotExecutedError
from services.common.hooks import reach
from services.fault_agent import kept_state
from services.fault_agent.device_state import CHUNK_BYTES_MAX, Outgoing, Peer
from services.fault_agent.drivers.api import Vmm, VmmRefusedError, VmmState
from services.fault_agent.drivers.memory_map import memory_regions
from services.fault_agent.fence import Command, Fence, wrong_state
from services.fault_agent.journal import Decision, Export, ExportState, Record, Role, Transferred
from services.fault_agent.node import Node
from services.fault_agent.preflight import Preflight, require
from services.fault_agent.residents import make_launch, remove_memory
from services.fault_agent.vms import Vm

log = logging.getLogger(__name__)


def image_id(record: Record, epoch: int) -> str:
    """A name that no other departure of any VM has had."""
    return f"{record.vm_id}.{record.epoch_owned}.{epoch}"


def _frozen(record: Record) -> tuple[Export, int]:
    """The image of a paused guest and its generation: the one that it has, or the next."""
    export = record.export
    assert export is not None, "a departing VM has an image"
    if export.state is ExportState.FROZEN:
        return export, export.generation
    generation = record.generation_last + 1
    return replace(export, generation=generation, state=ExportState.FROZEN), generation


def _never_began(transfer: asyncio.Future[Transferred]) -> bool:
    """True if an attempt failed before anything was saved: there was no way to the destination."""
    return transfer.done() and isinstance(transfer.exception(), NotExecutedError)


async def _chunks(state: bytes) -> AsyncGenerator[bytes, None]:
    for start in range(0, len(state), CHUNK_BYTES_MAX):
        yield state[start : start + CHUNK_BYTES_MAX]


class Departures:
    """Handles Prepare, Pause, TransferDeviceState, Resume, Seal, Abort and Release of a source."""

    def __init__(self, node: Node, preflight: Preflight) -> None:
        self._node = node
        self._preflight = preflight

    async def prepare(self, fence: Fence, order: pb.PrepareDeparture) -> pb.PrepareResponse:
        """Export the memory as a LIVE image; begin to connect. The guest runs on.

        Raises:
            NotFoundError: VM_UNKNOWN.
            FailedPreconditionError: PREFLIGHT_FAILED, WRONG_STATE, and the fence's.
            PageServerUnreachableError: the image is not served.
        """
        vm = self._node.vm(fence.vm_id)
        vm.require_known()
        async with vm.command(fence, Command.PREPARE_DEPARTURE) as fenced:
            record = vm.record
            if record.role is Role.RESIDENT:
                self._node.refuse_if_draining()
                vm.require_same_boot(Command.PREPARE_DEPARTURE)
                require(await self._preflight.source(vm))
                vm.transfer = None
                generation = record.generation_last + 1
                await vm.write(
                    replace(
                        fenced,
                        role=Role.DEPARTING,
                        epoch_departing=fence.epoch,
                        generation_last=generation,
                        export=Export(
                            image_id=image_id(record, fence.epoch),
                            epoch=record.epoch_owned,
                            generation=generation,
                            state=ExportState.LIVE,
                            destination=order.destination_name,
                            destination_epoch=fence.epoch if order.destination_name else 0,
                            token_key=order.token_key.hex(),
                        ),
                        transferred=None,
                    )
                )
            elif record.role is not Role.DEPARTING or record.epoch_departing != fence.epoch:
                raise wrong_state(record, Command.PREPARE_DEPARTURE, "it does not live here")
            else:
                await self._take_token_key(vm, order.token_key.hex())
            if order.destination_address:
                await self._meet_peer(vm, order.destination_address)
            await self._publish(vm)
            spec = vm.spec
            return pb.PrepareResponse(
                evidence=await self._node.evidence(vm),
                page_address=self._node.images.page_address,
                spec_json=vm.record.spec_json,
                spec_hash=spec.spec_hash,
            )

    async def _take_token_key(self, vm: Vm, token_key: str) -> None:
        """An orchestrator that came after signs with a key of its own."""
        export = vm.record.export
        if export is not None and export.state is ExportState.LIVE and token_key:
            export = replace(export, token_key=token_key)
            if export != vm.record.export:
                await vm.write(replace(vm.record, export=export), durable=False)

    async def _meet_peer(self, vm: Vm, address: str) -> Peer:
        export = vm.record.export
        name = export.destination if export is not None else ""
        return await vm.meet_peer(address, self._node.peer_tls(name))

    async def pause(
        self, fence: Fence, transfer_to: str = "", destination_key: str = ""
    ) -> tuple[pb.Evidence, Transferred | None]:
        """Stop the vCPUs and freeze the image. Given again it goes on where it stopped.

        With `transfer_to`, the address of the destination's agent, the device state goes there at
        once, see `transfer`: saved while the page server is told.

        Raises:
            FailedPreconditionError: WRONG_STATE, and the fence's.
            VmmUnreachableError: it may be paused or not: resume it, or pause again.
            PageServerUnreachableError: it is paused, and the frozen image is not served yet.
            GodwitError: as `transfer`. Before the pause if there is no way to the destination.
        """
        vm = self._node.vm(fence.vm_id)
        vm.require_known()
        async with vm.command(fence, Command.PAUSE):
            self._require_departing(vm, fence, Command.PAUSE)
            vmm = await vm.require_process(Command.PAUSE)
            export, generation = _frozen(vm.record)
            # Durable with FROZEN: from here on a guest may depend on it.
            if destination_key:
                export = replace(export, destination_key=destination_key)
            outgoing = None
            if transfer_to:
                outgoing = await self._begin(vm, vmm, fence, generation, transfer_to)
            try:
                if export != vm.record.export:
                    vm.stop_began_ns = time.monotonic_ns()
                await self._stop(vm, vmm)
                await reach("agent.pause.after")
                if export != vm.record.export:
                    frozen = replace(vm.record, export=export, generation_last=generation)
                    await vm.write(frozen, durable=False)
                if outgoing is not None:
                    outgoing.save()
                await self._publish(vm)
            except BaseException:
                if outgoing is not None:
                    await vm.stop_transfer()
                raise
            if outgoing is not None:
                outgoing.image_served()
            transfer = vm.transfer if transfer_to else None
            evidence = await self._node.evidence(vm, VmmState.PAUSED)
        # Without the lock: the destination may be slow, and a Resume must be able to end this.
        return evidence, await transfer if transfer is not None else None

    async def transfer(self, fence: Fence, destination_address: str) -> Transferred:
        """Save the device state into the destination's VMM; done when LOADED is durable there.

        Raises:
            FailedPreconditionError: WRONG_STATE: not paused, or saved once already; the fence's.
            GodwitError: what the destination said.
        """
        vm = self._node.vm(fence.vm_id)
        vm.require_known()
        async with vm.command(fence, Command.TRANSFER):
            self._require_departing(vm, fence, Command.TRANSFER)
            record = vm.record
            if record.transferred is not None and record.transferred.epoch == fence.epoch:
                return record.transferred
            export = record.export
            if export is None or export.state is not ExportState.FROZEN:
                raise wrong_state(record, Command.TRANSFER, "it is not paused")
            if vm.transfer is None or _never_began(vm.transfer):
                vmm = await vm.require_vmm(Command.TRANSFER)
                to = destination_address
                outgoing = await self._begin(vm, vmm, fence, export.generation, to)
                if outgoing is not None:
                    outgoing.save()
                    outgoing.image_served()
            transfer = vm.transfer
            assert transfer is not None, "begun"
        # Without the lock: the destination may be slow, and a Resume must be able to end this.
        return await transfer

    async def _stop(self, vm: Vm, vmm: Vmm) -> None:
        """Stop the vCPUs. What the VMM does is asked only if it refuses: a look takes its time."""
        try:
            await vmm.pause()
        except VmmRefusedError:
            await vm.require_vmm(Command.PAUSE)  # a guest that has ended is told as such
            raise

    async def _begin(
        self, vm: Vm, vmm: Vmm, fence: Fence, generation: int, address: str
    ) -> Outgoing | None:
        """Open the way of the device state; None if one is under way, or over.

        Raises:
            GodwitError: there is no way.
        """
        if vm.transfer is not None and not _never_began(vm.transfer):
            return None
        peer = await self._meet_peer(vm, address)
        # FROZEN is journaled before a save begins, by whichever agent of this boot.
        export = vm.record.export
        saved = export is not None and export.state is ExportState.FROZEN
        outgoing = Outgoing(
            vmm,
            fence,
            generation,
            peer,
            may_have_saved=saved,
            keep=lambda state: kept_state.keep(vm.record, state),
        )
        vm.transfer = self._node.start_task(outgoing.run(), f"transfer {vm.vm_id}")
        await outgoing.ready.wait()
        if _never_began(vm.transfer):
            await vm.transfer
        return outgoing

    async def resume(self, fence: Fence) -> pb.Evidence:
        """Let the guest run on here under a fresh epoch.

        Raises:
            FailedPreconditionError: DECISION_MISSING; WRONG_STATE: sealed and not given back, or
                the epoch is not fresh; NODE_REBOOTED; the fence's.
            DataLossError: STATE_CORRUPT: its VMM is gone, and so is its device state.
            VmmRefusedError: it does not run: a disk is locked, say.
        """
        vm = self._node.vm(fence.vm_id)
        vm.require_known()
        async with vm.command(fence, Command.RESUME) as fenced:
            record = vm.record
            returned = fence.decision is Decision.RETURNED
            mine = record.role in (Role.RESIDENT, Role.DEPARTING)
            if not mine and not (record.role is Role.SEALED and returned):
                raise wrong_state(record, Command.RESUME, "the guest is not this node's to run")
            again = record.role is Role.RESIDENT and record.epoch_owned == fence.epoch
            if not again:
                self._check_fresh(record, fence)
            if await self._needs_a_vmm(vm):
                await vm.stop_transfer()
                vmm = await self._rebuild(vm, fenced, fence)
            else:
                vmm = await vm.require_vmm(Command.RESUME)
                await vm.stop_transfer()
            if not again:
                # Durable before the guest runs under it.
                await vm.write(
                    replace(
                        fenced,
                        role=Role.RESIDENT,
                        epoch_owned=fence.epoch,
                        process=vm.record.process,  # it may be another by now
                        export=None,
                        transferred=None,
                    )
                )
            # From here on the guest may run, and its memory is no longer what the state belongs to.
            kept_state.remove(record.ram_path)
            if record.export is not None:
                # Not a condition: the source owns the guest, so nobody installs a page of it.
                await self._node.images.withdraw(record.export.image_id)
            if await vm.look() is not VmmState.RUNNING:
                await vmm.resume()
                await vmm.announce()
            return await self._node.evidence(vm)

    async def _needs_a_vmm(self, vm: Vm) -> bool:
        """True if the guest's VMM is gone, or half made again, and the guest is kept all the same.

        Never of a RESIDENT one: it may have run since.
        """
        record = vm.record
        if record.role is Role.SEALED:
            return True
        if record.role is not Role.DEPARTING or not vm.same_boot:
            return False
        gone = await vm.look() in (VmmState.DEAD, VmmState.INCOMING)
        return gone and kept_state.is_kept(record)

    async def _rebuild(self, vm: Vm, fenced: Record, fence: Fence) -> Vmm:
        """A VMM on the kept memory with the kept device state in it, paused.

        Given again after our death in the middle it begins anew: neither the memory nor the state
        has changed, because no vCPU has run. What the record says stays as it was until the caller
        writes RESIDENT: a SEALED guest's half-made VMM is killed by the next agent.
        """
        vm.require_same_boot(Command.RESUME)
        state = await asyncio.to_thread(kept_state.read, vm.record)
        await vm.kill_vmm()
        # The right by which it is done is durable before there is a process.
        await vm.write(replace(fenced, process=None))
        driver = self._node.driver(vm.spec.driver)
        launch = make_launch(self._node, vm, vm.spec, fence.epoch)
        try:
            await vm.launch(driver.start_incoming, replace(launch, memory_present=True))
            vmm = await vm.hold()
            async with contextlib.aclosing(_chunks(state)) as chunks:
                await vmm.load(chunks)
            await reach("agent.resume.rebuilt")
        except BaseException:
            await vm.kill_vmm()
            await vm.write(replace(vm.record, process=None))
            raise
        log.info("%s: its VMM was made again from memory and device state", vm.vm_id)
        return vmm

    async def recall(self, fence: Fence) -> pb.Evidence:
        """From now on no Seal of before is admitted; evidence says whether it could run on here.

        Raises:
            FailedPreconditionError: WRONG_STATE: it did not depart under an epoch before this one;
                the fence's.
        """
        vm = self._node.vm(fence.vm_id)
        vm.require_known()
        async with vm.command(fence, Command.RECALL_SOURCE) as fenced:
            record = vm.record
            departed = record.role in (Role.DEPARTING, Role.SEALED)
            if not departed or record.epoch_departing >= fence.epoch:
                raise wrong_state(record, Command.RECALL_SOURCE, "it has not departed from here")
            await vm.stop_transfer()
            await vm.write(fenced)
            return await self._node.evidence(vm)

    async def seal(self, fence: Fence) -> pb.Evidence:
        """Make sure that the guest never runs here again. Its memory stays, FROZEN.

        Raises:
            FailedPreconditionError: WRONG_STATE: it was not paused for this migration; the fence's.
        """
        vm = self._node.vm(fence.vm_id)
        vm.require_known()
        async with vm.command(fence, Command.SEAL) as fenced:
            record = vm.record
            if record.role is Role.GONE and record.epoch_sealed == fence.epoch:
                return await self._node.evidence(vm)
            if record.role is not Role.SEALED:
                self._require_departing(vm, fence, Command.SEAL)
                if record.export is None or record.export.state is not ExportState.FROZEN:
                    raise wrong_state(record, Command.SEAL, "it was not paused: nothing was moved")
                await reach("agent.seal.before")
                # Durable before the kill: if we die now, the next agent goes on with it and never
                # resumes the guest.
                await vm.write(replace(fenced, role=Role.SEALED, epoch_sealed=fence.epoch))
            await vm.stop_transfer()
            if not await reach("agent.seal.before_kill"):
                await vm.kill_vmm()
                await vm.write(replace(vm.record, process=None))
            return await self._node.evidence(vm)

    async def abort(self, fence: Fence) -> pb.Evidence:
        """Take back what Prepare did. A paused guest stays paused: Resume is another command.

        Raises:
            FailedPreconditionError: WRONG_STATE: sealed; DECISION_MISSING: it is paused for a
                switchover, and the store may still commit it; the fence's.
        """
        vm = self._node.vm(fence.vm_id)
        async with vm.command(fence, Command.ABORT_SOURCE) as fenced:
            record = vm.record
            if record.role in (Role.RESIDENT, Role.GONE, Role.UNKNOWN):
                return await self._node.evidence(vm)
            if record.role is not Role.DEPARTING:
                raise wrong_state(record, Command.ABORT_SOURCE, "it is past taking back")
            export = record.export
            frozen = export is not None and export.state is ExportState.FROZEN
            if frozen and fence.decision is not Decision.ABORTED:
                raise FailedPreconditionError(
                    "DECISION_MISSING",
                    f"{vm.vm_id} is paused for its switchover: Abort needs the decision ABORTED",
                )
            await reach("agent.abort.before")
            await vm.stop_transfer()
            await vm.write(replace(fenced, role=Role.RESIDENT, export=None, transferred=None))
            if export is not None:
                await self._node.images.withdraw(export.image_id)
            return await self._node.evidence(vm)

    async def release(self, fence: Fence, *, memory_complete: bool) -> pb.Evidence:
        """Free the sealed guest's memory (I3). Under LOST also of one that was never sealed.

        A departure that ended with its boot needs no seal: nothing of it can run. Its record goes,
        or the guest could never come back here.

        Raises:
            FailedPreconditionError: MEMORY_INCOMPLETE; WRONG_STATE: not sealed; the fence's.
        """
        vm = self._node.vm(fence.vm_id)
        vm.require_known()
        async with vm.command(fence, Command.RELEASE) as fenced:
            record = vm.record
            if record.role is Role.GONE and record.epoch_sealed == fence.epoch:
                return await self._node.evidence(vm)
            lost = fence.decision is Decision.LOST
            if lost and record.role is Role.GONE:
                return await self._node.evidence(vm)
            of_another_boot = not vm.same_boot and record.epoch_departing == fence.epoch
            if record.role is Role.DEPARTING and (lost or of_another_boot):
                await vm.stop_transfer()
            elif record.role is not Role.SEALED or (
                record.epoch_sealed != fence.epoch and not lost
            ):
                raise wrong_state(record, Command.RELEASE, "it is not sealed under this epoch")
            if not memory_complete and not lost:
                raise FailedPreconditionError(
                    "MEMORY_INCOMPLETE",
                    f"the memory of {vm.vm_id} is kept until the destination has all of it",
                    hint="wait for the destination's MEMORY_COMPLETE to be durable",
                )
            await reach("agent.release.before")
            await vm.kill_vmm()
            await vm.write(replace(fenced, role=Role.GONE, process=None))
            if record.export is not None:
                await self._node.images.withdraw(record.export.image_id)
            await remove_memory(vm)
            return await self._node.evidence(vm)

    async def _publish(self, vm: Vm) -> None:
        export = vm.record.export
        assert export is not None, "a departing VM has an image"
        await self._node.images.publish(vm.record, export, memory_regions(vm.spec))

    def _require_departing(self, vm: Vm, fence: Fence, command: Command) -> None:
        record = vm.record
        if record.role is not Role.DEPARTING or record.epoch_departing != fence.epoch:
            raise wrong_state(record, command, "no departure was prepared under this epoch")

    def _check_fresh(self, record: Record, fence: Fence) -> None:
        decided = fence.decision in (Decision.ABORTED, Decision.RETURNED)
        if record.role is Role.DEPARTING and not decided:
            raise FailedPreconditionError(
                "DECISION_MISSING",
                f"migration {record.migration_id} of {record.vm_id} is under way: Resume needs"
                " the decision ABORTED or RETURNED",
            )
        used = max(record.epoch_owned, record.epoch_departing)
        if fence.epoch <= used:
            raise wrong_state(
                record, Command.RESUME, f"epoch {fence.epoch} is not fresh, {used} was used"
            )
