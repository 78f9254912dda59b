# SPDX-License-Identifier: Apache-2.0
"""What an agent does at its start with the VMs of its predecessor.

| record says | then |
|---|---|
| another boot | nothing is started or resumed: memory and process are gone; evidence says so |
| RESIDENT, DEPARTING | hold the VMM again; a journaled image is published again |
| SEALED | go on with the seal: the VMM is killed if it lives; the image is published again |
| ARRIVING, not PREPARED | nobody was promised anything: the shell is killed, its files removed |
| ARRIVING, ARRIVED | its faults are taken again, the page map adopted, until it works |
| GONE | what is left of its memory is removed |

A VMM that the policy on a lost link has frozen is thawed first.

A process that was spawned and not journaled is found by its driver; it never ran: it goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import replace

from services.common.errors import GodwitError
from services.fault_agent import hold_policy, processes
from services.fault_agent.arrival_engine import ArrivalEngines
from services.fault_agent.drivers.api import VmmState, VmmUnreachableError
from services.fault_agent.drivers.memory_map import memory_regions
from services.fault_agent.images import PageServerUnreachableError
from services.fault_agent.journal import Role
from services.fault_agent.node import Node
from services.fault_agent.residents import remove_memory
from services.fault_agent.vms import Vm

log = logging.getLogger(__name__)

RETRY_S = 1.0


async def recover(node: Node, engines: ArrivalEngines) -> None:
    """Take up every VM of the journal. Returns when each was tried once; retries go on behind."""
    vms = [vm for vm in node.known_vms() if _of_this_boot(vm)]
    # Arrivals first: a guest may be waiting for a page, and its monitor with it.
    vms.sort(key=lambda vm: vm.record.role not in (Role.ARRIVING, Role.ARRIVED))
    if node.freezer is not None:
        node.freezer.sweep()
    await asyncio.gather(*(_recover_or_retry(node, engines, vm) for vm in vms))


def _of_this_boot(vm: Vm) -> bool:
    if not vm.same_boot and vm.record.role not in (Role.GONE, Role.UNKNOWN):
        log.error(
            "%s was %s under epoch %d when the node went down: its memory here is gone",
            vm.vm_id,
            vm.record.role.value,
            vm.record.epoch_owned,
        )
    return vm.same_boot


async def _recover_or_retry(node: Node, engines: ArrivalEngines, vm: Vm) -> None:
    try:
        await _recover(node, engines, vm)
    except (GodwitError, OSError) as error:
        log.error("%s cannot be taken up yet: %s", vm.vm_id, error)
        node.start_task(_recover_until_done(node, engines, vm), f"recover {vm.vm_id}")


async def _recover_until_done(node: Node, engines: ArrivalEngines, vm: Vm) -> None:
    while True:
        await asyncio.sleep(RETRY_S)
        try:
            await _recover(node, engines, vm)
        except (GodwitError, OSError) as error:
            log.warning("%s cannot be taken up yet: %s", vm.vm_id, error)
        else:
            return


async def _recover(node: Node, engines: ArrivalEngines, vm: Vm) -> None:
    async with vm.lock:
        if node.freezer is not None:
            # Whatever froze it: pages come again, or its vCPUs wait for them.
            hold_policy.thaw(node.freezer, vm)
        await _kill_orphan(vm)
        record = vm.record
        if record.role is Role.ARRIVING and not record.epoch_prepared:
            log.info("%s: the arrival was never prepared, it is taken back", vm.vm_id)
            await vm.write(replace(record, role=Role.GONE))
        if vm.record.role is Role.GONE:
            await vm.kill_vmm()
            await remove_memory(vm)
        elif vm.record.role is Role.SEALED:
            await vm.kill_vmm()
            await vm.write(replace(vm.record, process=None))
    if vm.record.role in (Role.ARRIVING, Role.ARRIVED) and not await _arrival(engines, vm):
        node.start_task(_arrival_until_done(engines, vm), f"take up {vm.vm_id}")
    if vm.record.role in (Role.RESIDENT, Role.DEPARTING, Role.ARRIVED):
        with contextlib.suppress(VmmUnreachableError):
            await vm.hold()
    if vm.record.export is not None and not await _publish(node, vm):
        node.start_task(_publish_until_done(node, vm), f"publish {vm.vm_id}")


async def _kill_orphan(vm: Vm) -> None:
    """End a VMM that was spawned and never journaled."""
    if vm.record.process is not None or not vm.record.ram_path or vm.driver is None:
        return
    orphan = await asyncio.to_thread(vm.driver.find_orphan, vm.directory, vm.record.ram_path)
    if orphan is not None:
        log.warning("%s: process %d was never journaled, it is killed", vm.vm_id, orphan.pid)
        await processes.kill(orphan)


async def _arrival(engines: ArrivalEngines, vm: Vm) -> bool:
    """Take up an arrival; False: try again."""
    arriving = vm.record.arriving
    if arriving is None or arriving.unregistered:
        return True
    async with vm.lock:
        if vm.watch is not None or vm.record.role not in (Role.ARRIVING, Role.ARRIVED):
            return True
        try:
            await engines.take_up(vm)
        except VmmUnreachableError as error:
            log.error("arrival of %s cannot go on: %s", vm.vm_id, error)
            return True
        except (GodwitError, OSError) as error:
            log.error("arrival of %s cannot go on yet: %s", vm.vm_id, error)
            return False
    await _learn_whether_it_runs(vm)
    return True


async def _learn_whether_it_runs(vm: Vm) -> None:
    """ACTIVATING is durable, ARRIVED is not: only the VMM knows whether `cont` was attempted."""
    record = vm.record
    if record.role is Role.ARRIVING and record.epoch_activating:
        state = await vm.look()
        async with vm.lock:
            if state in (VmmState.RUNNING, VmmState.GUEST_ENDED) and vm.record == record:
                await vm.write(replace(record, role=Role.ARRIVED))
                if vm.watch is not None:
                    vm.watch.arrival.start_bulk()


async def _arrival_until_done(engines: ArrivalEngines, vm: Vm) -> None:
    while True:
        await asyncio.sleep(RETRY_S)
        if await _arrival(engines, vm):
            return


async def _publish(node: Node, vm: Vm) -> bool:
    """Publish a journaled image again; False: try again."""
    async with vm.lock:
        record = vm.record
        if record.export is None:
            return True
        try:
            await node.images.publish(record, record.export, memory_regions(vm.spec))
        except PageServerUnreachableError as error:
            log.warning("image of %s: %s", vm.vm_id, error)
            return False
    return True


async def _publish_until_done(node: Node, vm: Vm) -> None:
    while True:
        await asyncio.sleep(RETRY_S)
        if await _publish(node, vm):
            return
