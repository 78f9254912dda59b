# SPDX-License-Identifier: Apache-2.0
"""What all parts of the agent share: who and where it is, its VMs, its journal, its tools."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import re
import uuid
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from godwit.agent.v1 import fault_agent_service_pb2 as pb
from prometheus_client import Counter, Histogram

from services.common.errors import FailedPreconditionError, InvalidArgumentError, UnavailableError
from services.common.peer_tls import PeerTls
from services.common.vm_spec import VM_ID_PATTERN
from services.fault_agent import processes
from services.fault_agent.drivers.api import Driver, VmmState
from services.fault_agent.evidence import evidence
from services.fault_agent.freezer import Freezer
from services.fault_agent.images import Images
from services.fault_agent.journal import MIGRATING, Journal, JournalCorruptError, Record
from services.fault_agent.obeyed_store import ObeyedStore
from services.fault_agent.security import Security
from services.fault_agent.vms import Vm
from services.pagecore.api import PageCore, SandboxMode

log = logging.getLogger(__name__)

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    """What an agent is told from outside."""

    name: str
    """Of the node in the fleet."""
    state_dir: Path
    """Journals, consoles, sockets; a disk that survives a reboot."""
    ram_dir: Path
    """Guest memory and page maps; a tmpfs with huge=never."""
    images_dir: Path
    """Image records, shared with the page server."""
    page_server_control: str
    """host:port of the page server's control port."""
    collapse: bool = False
    """Whether guests that have arrived get huge pages (`collapse.py`)."""
    peer_bytes_per_s_max: int = 0
    """Of bulk from one host, all guests together, shared by their weights; 0: no limit."""
    sandbox: SandboxMode = SandboxMode.ENFORCE
    """Of the threads that answer page faults."""
    arrival_lease_s: float = 900.0
    """How long memory is kept for a guest of which nothing is heard, and whose state has not come.
    Longer than an orchestrator's PREPARING. Seconds, > 0."""


class Node:
    """The agent's state. Made by `open_node`."""

    def __init__(
        self,
        config: NodeConfig,
        *,
        pagecore: PageCore,
        drivers: Mapping[str, Driver],
        violations: Counter,
        tasks: asyncio.TaskGroup,
        held: Histogram | None = None,
        freezer: Freezer | None = None,
        security: Security | None = None,
    ) -> None:
        """`held`: gets each time that a guest was held; None: nobody counts them.

        `freezer`: None: VMMs are never frozen.
        """
        self.held = held
        self.freezer = freezer
        self.config = config
        self.pagecore = pagecore
        self.drivers = drivers
        self.violations = violations
        self.boot_id = processes.boot_id()
        self.incarnation = uuid.uuid4().hex
        self.journal = Journal(config.state_dir)
        self.store = ObeyedStore(config.state_dir)
        self.security = security
        """None: plaintext."""
        own = self.peer_tls(security.certificates.loaded.subject.dns_name) if security else None
        self.images = Images(config.images_dir, config.page_server_control, own)
        self.vms: dict[str, Vm] = {}
        if security is not None:
            security.guests_need = self._is_migrating
        self.corrupt: dict[str, JournalCorruptError] = {}
        self.draining = False
        self._tasks = tasks
        self._running: set[asyncio.Task[None]] = set()

    @property
    def certificate_key(self) -> bytes:
        """By which others may pin this node; empty: without TLS."""
        return self.security.certificates.loaded.key_sha256 if self.security else b""

    def peer_tls(self, name: str) -> PeerTls | None:
        """How somebody of this name is called; None: in plaintext.

        Raises:
            FailedPreconditionError: PEER_NAMELESS: there is TLS, and nobody has said who he is.
        """
        if self.security is None:
            return None
        if not name:
            raise FailedPreconditionError(
                "PEER_NAMELESS",
                f"node {self.config.name} has TLS and was not told the name of its peer",
                hint="install the same release of the orchestrator and give it --tls-dir",
            )
        certificates = self.security.certificates
        # Its page server has the same key: no date parts a node from itself.
        is_own = name == certificates.loaded.subject.dns_name
        return PeerTls(
            certificates=certificates, name=name, pin=certificates.own_pin if is_own else bytes
        )

    def load_journal(self) -> None:
        """Read every record. Blocks; once, at the start."""
        records, self.corrupt = self.journal.read_all()
        for error in self.corrupt.values():
            log.error("%s", error)
        for record in records:
            self.vms[record.vm_id] = self._make(record)

    def vm(self, vm_id: str) -> Vm:
        """The VM, made up as UNKNOWN if it was never here.

        Raises:
            JournalCorruptError: its record cannot be read.
        """
        vm = self.peek(vm_id)
        # Two commands about a new VM must meet at one lock.
        return self.vms.setdefault(vm_id, vm)

    def peek(self, vm_id: str) -> Vm:
        """The same, leaving no trace of one that was never here.

        Raises:
            InvalidArgumentError: FIELD_INVALID: no VM can have that id.
            JournalCorruptError: its record cannot be read.
        """
        if not re.fullmatch(VM_ID_PATTERN, vm_id):
            raise InvalidArgumentError(
                "FIELD_INVALID", f"vm_id must match {VM_ID_PATTERN}, got {vm_id!r}"
            )
        if vm_id in self.corrupt:
            raise self.corrupt[vm_id]
        known = self.vms.get(vm_id)
        return known or self._make(Record(vm_id=vm_id, boot_id=self.boot_id))

    def _is_migrating(self) -> bool:
        # In one step: asked by threads of gRPC.
        return any(vm.record.role in MIGRATING for vm in list(self.vms.values()))

    def known_vms(self) -> list[Vm]:
        """Those with a record, by id."""
        return [vm for _, vm in sorted(self.vms.items()) if vm.record.epoch_seen > 0]

    async def obey(self, store_incarnation: str) -> None:
        """Obey this store only. On return no command of another is under way, or ever admitted."""
        await self.store.adopt(store_incarnation)
        for vm in list(self.vms.values()):
            async with vm.lock:
                pass

    def driver(self, name: str) -> Driver:
        """The driver of that name.

        Raises:
            InvalidArgumentError: DRIVER_UNKNOWN.
        """
        driver = self.drivers.get(name)
        if driver is None:
            raise InvalidArgumentError(
                "DRIVER_UNKNOWN", f"no driver {name!r}, there are {sorted(self.drivers)}"
            )
        return driver

    def refuse_if_draining(self) -> None:
        """Refuse work that would make somebody depend on this process.

        Raises:
            UnavailableError: DRAINING.
        """
        if self.draining:
            raise UnavailableError(
                "DRAINING", f"the agent of node {self.config.name} is told to stop and takes no VM"
            )

    async def evidence(self, vm: Vm, state: VmmState | None = None) -> pb.Evidence:
        """What this node can prove about a VM; `state`: what its VMM said a moment ago."""
        state = state or await vm.look()
        if vm.watch is not None:
            vm.watch.refresh()
        return evidence(
            vm.record,
            node=self.config.name,
            boot_id=self.boot_id,
            incarnation=self.incarnation,
            vmm_state=state,
            counters=vm.counters,
            frozen=vm.frozen_in is not None,
        )

    def start_task(self, work: Coroutine[Any, Any, _T], name: str) -> asyncio.Future[_T]:
        """Run `work` to its end, whoever listens. A failure is in the future, and is logged."""
        done: asyncio.Future[_T] = asyncio.get_running_loop().create_future()

        async def run() -> None:
            try:
                result = await work
            except asyncio.CancelledError:
                done.cancel()
                raise
            except Exception as error:  # noqa: BLE001 - handed on, every one
                if not done.cancelled():
                    done.set_exception(error)
                    done.exception()  # seen: a listener may have gone
            else:
                if not done.cancelled():
                    done.set_result(result)

        task = self._tasks.create_task(run(), name=name)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        # Whoever cancels the future ends the work.
        done.add_done_callback(lambda future: task.cancel() if future.cancelled() else None)
        return done

    def stop_tasks(self) -> None:
        """Cancel what still runs: the process ends, and the journal has what was done."""
        for task in self._running:
            task.cancel()

    async def run_to_end(self, work: Coroutine[Any, Any, _T], name: str) -> _T:
        """Await `work`, which a caller that hangs up does not interrupt.

        A command that stopped half way because its caller's deadline passed would leave the
        journal and the world apart.
        """
        return await asyncio.shield(self.start_task(work, name))

    def _make(self, record: Record) -> Vm:
        vm = Vm(record, journal=self.journal, store=self.store, boot_id=self.boot_id)
        if record.spec_json:
            vm.driver = self.drivers.get(vm.spec.driver)
        return vm


def _open_lock(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        # Guests wait for their pages: those need no journal that can be written.
        if error.errno != errno.EROFS:
            raise
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


@contextlib.contextmanager
def state_dir_lock(state_dir: Path) -> Iterator[None]:
    """Hold the state directory: two agents on one journal would each believe their own.

    Raises:
        FailedPreconditionError: STATE_DIR_LOCKED.
    """
    state_dir.mkdir(parents=True, exist_ok=True)
    fd = _open_lock(state_dir / "agent.lock")
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FailedPreconditionError(
                "STATE_DIR_LOCKED", f"another agent uses {state_dir}", hint="one agent a node"
            ) from None
        yield
    finally:
        os.close(fd)


@contextlib.asynccontextmanager
async def open_node(
    config: NodeConfig,
    *,
    pagecore: PageCore,
    drivers: Mapping[str, Driver],
    violations: Counter,
    held: Histogram | None = None,
    freezer: Freezer | None = None,
    security: Security | None = None,
) -> AsyncIterator[Node]:
    """An agent's state for the length of the block. At its end its VMMs run on.

    Raises:
        FailedPreconditionError: STATE_DIR_LOCKED.
    """
    with state_dir_lock(config.state_dir):
        config.ram_dir.mkdir(parents=True, exist_ok=True)
        async with asyncio.TaskGroup() as tasks:
            node = Node(
                config,
                pagecore=pagecore,
                drivers=drivers,
                violations=violations,
                tasks=tasks,
                held=held,
                freezer=freezer,
                security=security,
            )
            node.load_journal()
            try:
                yield node
            finally:
                node.stop_tasks()
                for vm in node.vms.values():
                    vm.let_go()
                    await vm.leave_peer()
                    if vm.watch is not None:
                        await vm.watch.close()
                await node.images.close()
