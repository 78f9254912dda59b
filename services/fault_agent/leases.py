# SPDX-License-Identifier: Apache-2.0
"""Memory that is promised to guests on their way here: nobody else gets it, and not for ever.

A guest's memory is absent when its shell is made, so that the machine does not miss it yet: what it
has not filled is counted as taken, until it is all here, or the arrival is taken back.

A shell whose orchestrator is heard of no more is taken back when its lease is over, as long as its
device state was not loaded: without LOADED nobody can have decided that the guest comes (I2, I6),
and no command brings it back to life, for GONE is durable before the shell is killed. Past LOADED
only the store's word ends an arrival (I8).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from services.common.errors import GodwitError, ResourceExhaustedError
from services.fault_agent import host
from services.fault_agent.arrival_engine import ArrivalEngines
from services.fault_agent.journal import Decision, Record, Role
from services.fault_agent.node import Node
from services.fault_agent.preflight import MEMORY_SPARE_BYTES
from services.fault_agent.residents import remove_memory
from services.fault_agent.vms import Vm

log = logging.getLogger(__name__)

LOOKS_A_LEASE = 10
"""How often in the length of a lease it is looked whether one is over."""


async def take_back(engines: ArrivalEngines, vm: Vm, record: Record) -> None:
    """Remove what an arrival made here; `record`: what is durable before. Idempotent."""
    await vm.write(record)
    await vm.kill_vmm()
    await engines.stop(vm)
    await remove_memory(vm)


class Leases:
    """One for each agent."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._taking: dict[str, int] = {}
        """Bytes by VM, of arrivals that are being made: their records do not say it yet."""

    def promised_bytes(self, but: str = "") -> int:
        """What guests that come have not filled yet; of all but one."""
        total = 0
        for vm in self._node.known_vms():
            record = vm.record
            if vm.vm_id != but and vm.vm_id not in self._taking and _comes(vm):
                total += max(vm.spec.memory_bytes - _filled_bytes(record.ram_path), 0)
        return total

    @contextlib.contextmanager
    def taking(self, vm_id: str, memory_bytes: int) -> Iterator[None]:
        """Promise memory to an arrival that is made in the block; afterwards its record says it.

        Raises:
            ResourceExhaustedError: MEMORY_SHORT.
        """
        # No await in between: of two that come at once the second one sees the first.
        promised = self.promised_bytes(but=vm_id) + sum(self._taking.values())
        available = host.memory_available_bytes(self._node.config.ram_dir)
        needed = memory_bytes + MEMORY_SPARE_BYTES
        if needed > available - promised:
            raise ResourceExhaustedError(
                "MEMORY_SHORT",
                f"{vm_id} needs {needed} bytes, {available} are available on"
                f" {self._node.config.name} and {promised} of them promised to guests that come",
                hint="wait until those are there, or choose another node",
            )
        self._taking[vm_id] = memory_bytes
        try:
            yield
        finally:
            del self._taking[vm_id]

    async def expire(self, engines: ArrivalEngines) -> None:
        """Take back shells whose lease is over, again and again."""
        lease_s = self._node.config.arrival_lease_s
        began_s = asyncio.get_running_loop().time()
        while True:
            await asyncio.sleep(lease_s / LOOKS_A_LEASE)
            for vm in self._node.known_vms():
                if _is_over(vm, began_s, lease_s):
                    try:
                        await self._expire(engines, vm, began_s)
                    except (GodwitError, OSError) as error:
                        log.warning("the shell of %s cannot be taken back: %s", vm.vm_id, error)

    async def _expire(self, engines: ArrivalEngines, vm: Vm, began_s: float) -> None:
        async with vm.lock:
            if _is_over(vm, began_s, self._node.config.arrival_lease_s):
                log.warning(
                    "%s: nobody was heard of migration %s for %g s: its shell is taken back",
                    vm.vm_id,
                    vm.record.migration_id,
                    self._node.config.arrival_lease_s,
                )
                await take_back(engines, vm, gone(vm.record))


def gone(record: Record) -> Record:
    """The record of an arrival that was taken back."""
    return replace(record, role=Role.GONE)


def _comes(vm: Vm) -> bool:
    record = vm.record
    return (
        vm.same_boot
        and record.role in (Role.ARRIVING, Role.ARRIVED)
        and not record.epoch_memory_complete
    )


def _filled_bytes(ram_path: str) -> int:
    with contextlib.suppress(OSError):
        return Path(ram_path).stat().st_blocks * 512
    return 0


def _is_over(vm: Vm, began_s: float, lease_s: float) -> bool:
    record = vm.record
    waits = record.role is Role.ARRIVING and vm.same_boot and not vm.loading
    loaded = record.epoch_loaded != 0 and record.epoch_loaded == record.epoch_prepared
    if not waits or loaded or record.epoch_activating or record.decision is not Decision.NONE:
        return False
    heard_s = max(vm.heard_s, began_s)
    return asyncio.get_running_loop().time() - heard_s > lease_s
