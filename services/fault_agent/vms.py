# SPDX-License-Identifier: Apache-2.0
"""One VM on this node: its record, its lock, its VMM, its arrival.

Locking: `Vm.lock` is held by every command from its admission to its last write, except while a
device state travels (TransferDeviceState, LoadDeviceState): those take it at both ends only, so
that an Abort or Resume can end them. Looks (Describe, WatchProgress, metrics) never take it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path

from services.common.errors import FailedPreconditionError, NotFoundError
from services.common.peer_tls import PeerTls
from services.common.vm_spec import VmSpec
from services.fault_agent import processes
from services.fault_agent.arrival_watch import ArrivalWatch
from services.fault_agent.collapse import Collapsed
from services.fault_agent.device_state import Peer
from services.fault_agent.drivers.api import Driver, Launch, Vmm, VmmState, VmmUnreachableError
from services.fault_agent.fence import Command, Fence, admit, wrong_state
from services.fault_agent.journal import Counters, Journal, Record, Role, Transferred
from services.fault_agent.obeyed_store import ObeyedStore


class Vm:
    """What this process holds of a VM. `record` is what is durable, nothing else."""

    def __init__(
        self, record: Record, *, journal: Journal, store: ObeyedStore, boot_id: str
    ) -> None:
        self._journal = journal
        self._store = store
        self._boot_id = boot_id
        self.record = record
        self.lock = asyncio.Lock()
        self.driver: Driver | None = None
        self.vmm: Vmm | None = None
        self.watch: ArrivalWatch | None = None
        self.connecting = asyncio.Lock()
        """Held while somebody connects to the monitor: a VMM serves one client, and a second one
        would keep the first from ever being served."""
        self.stop_began_ns = 0
        """Monotonic, of the last order to stop its vCPUs here."""
        self.runs_since_ns = 0
        """Monotonic, of its VMM's last word that they run."""
        self.frozen_in: VmmState | None = None
        """What its VMM did when the policy on a lost link froze it; None: it is not frozen."""
        self.collapsed: Collapsed | None = None
        """What --collapse made of its memory, once it was whole."""
        self.heard_s = 0.0
        """When a command for it was admitted last, by the event loop's clock."""
        self.loading = False
        """A device state is on its way into the VMM."""
        self.peer: Peer | None = None
        """The way to the destination's agent, while it departs."""
        self.transfer: asyncio.Future[Transferred] | None = None
        """The device state's way out, under way or over."""

    @property
    def vm_id(self) -> str:
        """The guest."""
        return self.record.vm_id

    @property
    def directory(self) -> Path:
        """Where its journal, sockets and logs are."""
        return self._journal.vm_dir(self.vm_id)

    @property
    def spec(self) -> VmSpec:
        """Its spec. Only for a VM that has one."""
        return VmSpec.parse(self.record.spec_json)

    @property
    def same_boot(self) -> bool:
        """False: its process and its memory went with the last boot."""
        return self.record.boot_id == self._boot_id

    @property
    def counters(self) -> Counters | None:
        """Of its arrival, now or as it ended."""
        if self.watch is not None:
            return self.watch.counters
        return self.record.arriving.counters if self.record.arriving else None

    async def write(self, record: Record, *, durable: bool = True) -> None:
        """Make a record durable, then believe it. Only under the lock.

        Not durable only what says nothing after the end of the node: see Journal.write.
        """
        if record != self.record:
            await self._journal.write(record, durable=durable)
            self.record = record

    @contextlib.asynccontextmanager
    async def command(self, fence: Fence, command: Command) -> AsyncIterator[Record]:
        """Admit a command and hold the lock for it; gives the record with the fence in it.

        The handler makes that durable with its own first mark. What it does not write is written
        at the end: all of it if the handler was content, the epoch alone if it refused.
        """
        async with self.lock:
            # Under the lock: `Node.obey` returns once no command of another store is under way.
            await self._store.require(fence.store_incarnation)
            known = self.record.epoch_seen > 0
            fenced = admit(self.record, fence, command)
            self.heard_s = asyncio.get_running_loop().time()
            try:
                yield fenced
            except BaseException:
                # A VM never heard of stays so: refused commands make no records.
                if known:
                    await self.write(replace(self.record, epoch_seen=fenced.epoch_seen))
                raise
            await self.write(
                replace(
                    self.record,
                    epoch_seen=fenced.epoch_seen,
                    migration_id=fenced.migration_id,
                    decision=fenced.decision,
                )
            )

    def require_known(self) -> None:
        """Refuse a command about a VM that was never here.

        Raises:
            NotFoundError: VM_UNKNOWN.
        """
        if self.record.role is Role.UNKNOWN:
            raise NotFoundError("VM_UNKNOWN", f"no VM {self.vm_id} on this node")

    def require_same_boot(self, command: Command) -> None:
        """Refuse to act on a VM whose memory went with the last boot.

        Raises:
            FailedPreconditionError: NODE_REBOOTED.
        """
        if not self.same_boot:
            raise FailedPreconditionError(
                "NODE_REBOOTED",
                f"{command.value} of {self.vm_id}: the node has been rebooted since; the guest's"
                " VMM and its memory here are gone",
                hint="what ran here last is lost; the store knows whether another node has it",
                metadata={"boot_id": self._boot_id, "boot_id_then": self.record.boot_id},
            )

    async def look(self) -> VmmState:
        """What its VMM does, now."""
        process = self.record.process
        if process is None or not self.same_boot or not processes.is_alive(process):
            return VmmState.DEAD
        if self.frozen_in is not None:
            return self.frozen_in  # it cannot answer; nor can it have gone on
        if self.vmm is None and not self.connecting.locked():
            with contextlib.suppress(VmmUnreachableError):
                await self.hold()
        return VmmState.UNRESPONSIVE if self.vmm is None else await self.vmm.state()

    async def launch(self, start: Callable[[Launch], Awaitable[Vmm]], launch: Launch) -> None:
        """Start its VMM and hold it; nobody else connects meanwhile."""
        async with self.connecting:
            self.vmm = await start(launch)

    async def hold(self) -> Vmm:
        """Its VMM, taken hold of if need be.

        Raises:
            VmmUnreachableError: there is none, or it does not answer.
        """
        async with self.connecting:
            if self.vmm is None:
                process = self.record.process
                if process is None or self.driver is None or not self.same_boot:
                    raise VmmUnreachableError(f"{self.vm_id} has no VMM here")
                self.vmm = await self.driver.adopt(process, self.directory)
            return self.vmm

    async def require_vmm(self, command: Command) -> Vmm:
        """Its VMM, answering, and not ended.

        Raises:
            VmmUnreachableError: it does not answer.
            FailedPreconditionError: NODE_REBOOTED; WRONG_STATE: it is dead, or the guest ended.
        """
        self.require_same_boot(command)
        state = await self.look()
        if state in (VmmState.DEAD, VmmState.GUEST_ENDED):
            why = "its VMM is dead" if state is VmmState.DEAD else "the guest has shut itself down"
            raise wrong_state(self.record, command, why)
        return await self.hold()

    async def require_process(self, command: Command) -> Vmm:
        """Its VMM, whose process lives; what it does is not asked: the guest stands still.

        Raises:
            VmmUnreachableError: it was let go of and does not answer.
            FailedPreconditionError: NODE_REBOOTED; WRONG_STATE: it is dead.
        """
        self.require_same_boot(command)
        process = self.record.process
        if process is None or not processes.is_alive(process):
            raise wrong_state(self.record, command, "its VMM is dead")
        return await self.hold()

    async def kill_vmm(self) -> None:
        """SIGKILL to its VMM; proved dead on return. The caller writes the record."""
        process = self.record.process
        self.let_go()
        if process is not None and self.same_boot:
            await processes.kill(process)
        self.frozen_in = None

    def let_go(self) -> None:
        """Let go of its VMM, which runs on."""
        vmm, self.vmm = self.vmm, None
        if vmm is not None:
            vmm.close()

    async def stop_transfer(self) -> None:
        """End a transfer under way; what QEMU still does of it ends by itself."""
        transfer, self.transfer = self.transfer, None
        if transfer is not None and not transfer.done():
            transfer.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await transfer
        await self.leave_peer()

    async def meet_peer(self, address: str, tls: PeerTls | None = None) -> Peer:
        """The connection to the destination's agent at `address`, made if need be."""
        if self.peer is None or self.peer.address != address:
            await self.leave_peer()
            self.peer = Peer(address, tls)
        return self.peer

    async def leave_peer(self) -> None:
        """Close the connection to the destination's agent. Idempotent."""
        peer, self.peer = self.peer, None
        if peer is not None:
            await peer.close()
