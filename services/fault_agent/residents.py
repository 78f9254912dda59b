# SPDX-License-Identifier: Apache-2.0
"""VMs that live here: start and stop, and the files that a VM's memory is in."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from godwit.agent.v1 import fault_agent_service_pb2 as pb

from services.common.errors import AlreadyExistsError, InvalidArgumentError
from services.common.vm_spec import VmSpec
from services.fault_agent import kept_state
from services.fault_agent.drivers.api import Driver, Launch, VmmState
from services.fault_agent.fence import Command, Fence, wrong_state
from services.fault_agent.journal import Record, Role
from services.fault_agent.node import Node
from services.fault_agent.preflight import Preflight
from services.fault_agent.processes import Process
from services.fault_agent.vms import Vm


def ram_path(node: Node, vm_id: str, epoch: int) -> Path:
    """Where the memory is that a VM gets under `epoch`."""
    return node.config.ram_dir / f"{vm_id}.{epoch}.ram"


def make_ram_file(path: Path, size_bytes: int) -> int:
    """A file of absent memory; returns its inode. Blocks.

    Raises:
        OSError: EEXIST: something is there, and it is not ours to guess what.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, size_bytes)
        return os.fstat(fd).st_ino
    finally:
        os.close(fd)


def has_data(path: Path) -> bool:
    """True if any page of the file is present."""
    return path.stat().st_blocks > 0


def remove_file(path: str) -> None:
    """Unlink, on tmpfs. Idempotent; nothing for an empty path."""
    if path:
        Path(path).unlink(missing_ok=True)


def remove_page_map(path: str) -> None:
    """A page map and the userfault bitmap that the page core keeps beside it. Idempotent."""
    for name in (path, f"{path}.bitmap"):
        remove_file(name)


async def remove_memory(vm: Vm) -> None:
    """Free what a VM's memory was in. Idempotent; the VMM is proved dead by then.

    The record says GONE already, so that an agent that dies in between goes on here.
    """
    record = vm.record
    remove_file(record.ram_path)
    kept_state.remove(record.ram_path)
    if record.arriving is not None:
        remove_page_map(record.arriving.page_map_path)
    await vm.write(
        replace(
            record,
            version=1,
            ram_path="",
            ram_inode=0,
            process=None,
            arriving=None,
            export=None,
        )
    )


def make_launch(node: Node, vm: Vm, spec: VmSpec, epoch: int) -> Launch:
    """What a VMM of this VM is started with; its record has `ram_path` already."""

    async def on_spawned(process: Process) -> None:
        await vm.write(replace(vm.record, process=process))

    return Launch(
        spec=spec,
        node=node.config.name,
        epoch=epoch,
        directory=vm.directory,
        ram_path=Path(vm.record.ram_path),
        on_spawned=on_spawned,
    )


class Residents:
    """Handles StartVm and StopVm."""

    def __init__(self, node: Node, preflight: Preflight) -> None:
        self._node = node
        self._preflight = preflight

    async def start(self, fence: Fence, spec_json: str) -> pb.Evidence:
        """Start a VM from its spec.

        Raises:
            AlreadyExistsError: VM_EXISTS.
            FailedPreconditionError: PREFLIGHT_FAILED, and the fence's.
            InvalidArgumentError: SPEC_INVALID, FIELD_INVALID, DRIVER_UNKNOWN.
            VmmUnreachableError: the VMM did not start.
        """
        self._node.refuse_if_draining()
        spec = VmSpec.parse(spec_json)
        if spec.vm_id != fence.vm_id:
            raise InvalidArgumentError(
                "FIELD_INVALID", f"the spec is of {spec.vm_id}, the fence of {fence.vm_id}"
            )
        driver = self._node.driver(spec.driver)
        vm = self._node.vm(fence.vm_id)
        async with vm.command(fence, Command.START) as fenced:
            record = vm.record
            if record.role is Role.RESIDENT and record.epoch_owned == fence.epoch:
                await self._go_on(vm, spec)
                return await self._node.evidence(vm)
            await self._refuse_if_here(vm)
            await self._preflight.require_start(spec)
            # A dead VM's memory is worth nothing; under a new epoch it starts from nothing.
            await vm.kill_vmm()
            await remove_memory(vm)
            await self._boot(vm, fenced, fence, spec, driver)
            return await self._node.evidence(vm)

    async def stop(self, fence: Fence) -> pb.Evidence:
        """End a VM that lives here and free its memory. Idempotent.

        Raises:
            NotFoundError: VM_UNKNOWN.
            FailedPreconditionError: WRONG_STATE: it is part of a migration; the fence's.
        """
        vm = self._node.vm(fence.vm_id)
        vm.require_known()
        async with vm.command(fence, Command.STOP) as fenced:
            if vm.record.migrating:
                raise wrong_state(
                    vm.record, Command.STOP, f"migration {vm.record.migration_id} is under way"
                )
            await vm.write(replace(fenced, role=Role.GONE))
            await vm.kill_vmm()
            await remove_memory(vm)
            return await self._node.evidence(vm)

    async def _boot(
        self, vm: Vm, fenced: Record, fence: Fence, spec: VmSpec, driver: Driver
    ) -> None:
        path = ram_path(self._node, vm.vm_id, fence.epoch)
        vm.driver = driver
        # Durable before there is a process that could run: it starts with its vCPUs stopped, and
        # its pid is journaled before they are let go.
        await vm.write(
            replace(
                fenced,
                role=Role.RESIDENT,
                boot_id=self._node.boot_id,
                epoch_owned=fence.epoch,
                spec_json=spec.canonical_json(),
                process=None,
                ram_path=str(path),
                export=None,
                arriving=None,
                transferred=None,
            )
        )
        try:
            await vm.write(replace(vm.record, ram_inode=make_ram_file(path, spec.memory_bytes)))
            await vm.launch(driver.start, make_launch(self._node, vm, spec, fence.epoch))
            await (await vm.hold()).resume()
        except BaseException:
            await vm.write(replace(vm.record, role=Role.GONE))
            await vm.kill_vmm()
            await remove_memory(vm)
            raise

    async def _go_on(self, vm: Vm, spec: VmSpec) -> None:
        if vm.record.spec_json != spec.canonical_json():
            raise AlreadyExistsError(
                "VM_EXISTS", f"{vm.vm_id} runs under this epoch with another spec"
            )
        # Given again after our death between spawn and `cont`.
        if await vm.look() is VmmState.PAUSED:
            await (await vm.hold()).resume()

    async def _refuse_if_here(self, vm: Vm) -> None:
        record = vm.record
        if record.role in (Role.UNKNOWN, Role.GONE):
            return
        if record.role is Role.RESIDENT and await vm.look() is VmmState.DEAD:
            return
        raise AlreadyExistsError(
            "VM_EXISTS",
            f"{vm.vm_id} is here already: {record.role.value} under epoch {record.epoch_owned}",
            hint="stop it first, or end its migration",
            metadata={"role": record.role.value, "epoch_owned": str(record.epoch_owned)},
        )
