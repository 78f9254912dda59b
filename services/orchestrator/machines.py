# SPDX-License-Identifier: Apache-2.0
"""Starts and stops VMs.

The record is written before the agent hears of it and removed only after the agent has refused, or
has stopped the VM; an orchestrator that ends in between finds it STARTING or STOPPING and gives the
command again, under the same epoch, until it is answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Iterator

from godwit.agent.v1 import fault_agent_service_pb2 as agent_pb2
from godwit.common.v1 import common_pb2

from services.common.errors import GodwitError, NotFoundError
from services.common.grpc_client import outcome_unknown
from services.common.vm_spec import VmSpec
from services.orchestrator.evidence import holds_nothing
from services.orchestrator.move import Context
from services.orchestrator.store.rows import VmRow, VmState

log = logging.getLogger(__name__)


class Machines:
    """The VMs' lives outside migrations."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.settled_count = 0
        """How often it was looked for what is left undone."""
        self._in_hand: Counter[str] = Counter()
        """VMs of which a caller waits for the answer: what he is told must be what became of it."""

    @contextlib.contextmanager
    def _taken(self, vm_id: str) -> Iterator[None]:
        self._in_hand[vm_id] += 1
        try:
            yield
        finally:
            self._in_hand[vm_id] -= 1
            if not self._in_hand[vm_id]:
                del self._in_hand[vm_id]

    async def start(self, spec: VmSpec, node: str) -> VmRow:
        """Start a VM.

        Raises:
            GodwitError: what the agent refused: there is no such VM then; or no answer: it is
                STARTING then, and an equal call goes on with it.
        """
        fleet = self._context.store.fleet
        with self._taken(spec.vm_id):
            vm = await fleet.begin_start(spec, node, now_ns=self._context.now_ns())
            await self._start(vm)
            return await fleet.finish_start(vm.vm_id, vm.epoch) or vm

    async def _start(self, vm: VmRow) -> None:
        agent = self._context.agents.get(vm.node)
        fence = common_pb2.Fence(vm_id=vm.vm_id, epoch=vm.epoch)
        try:
            await agent.start_vm(agent_pb2.StartVmRequest(fence=fence, spec_json=vm.spec_json))
        except GodwitError as error:
            if not error.retryable and not outcome_unknown(error):
                await self._refused(vm)
            raise

    async def _refused(self, vm: VmRow) -> None:
        """The agent said no. The record goes only if nothing of the VM runs under its epoch."""
        evidence = await self._context.agents.describe(vm.node, vm.vm_id)
        if evidence and (holds_nothing(evidence) or evidence.epoch_owned != vm.epoch):
            await self._context.store.fleet.forget(vm.vm_id, vm.epoch, VmState.STARTING)

    async def stop(self, vm_id: str) -> None:
        """End a VM and forget it.

        Raises:
            NotFoundError: VM_UNKNOWN.
            AlreadyExistsError: MIGRATION_ACTIVE.
            GodwitError: the agent refused, or did not answer: it is STOPPING and will be stopped.
        """
        with self._taken(vm_id):
            await self._stop(await self._context.store.fleet.begin_stop(vm_id))

    async def _stop(self, vm: VmRow) -> None:
        fence = common_pb2.Fence(vm_id=vm.vm_id, epoch=vm.epoch)
        # An agent that has never heard of it has nothing to stop.
        with contextlib.suppress(NotFoundError):
            await self._context.agents.get(vm.node).stop_vm(agent_pb2.StopVmRequest(fence=fence))
        await self._context.store.fleet.forget(vm.vm_id, vm.epoch, VmState.STOPPING)
        self._context.bitmaps.forget(vm.vm_id)
        self._context.residency.forget(vm.vm_id)

    async def settle(self) -> None:
        """Go on with starts and stops that were not answered, again and again."""
        while True:
            self.settled_count += 1
            try:
                for vm in () if self._context.doubt.why else await self._context.store.fleet.vms():
                    if vm.state is not VmState.RUNNING and vm.vm_id not in self._in_hand:
                        await self._settle_one(vm)
            except GodwitError:
                log.exception("VMs could not be listed")
            await asyncio.sleep(self._context.limits.settle_s)

    async def _settle_one(self, vm: VmRow) -> None:
        try:
            if vm.state is VmState.STARTING:
                await self._start(vm)
                await self._context.store.fleet.finish_start(vm.vm_id, vm.epoch)
            else:
                await self._stop(vm)
        except GodwitError as error:
            log.warning("VM %s stays %s: %s", vm.vm_id, vm.state, error)
