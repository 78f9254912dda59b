# SPDX-License-Identifier: Apache-2.0
"""The guests that are moved: microvms that judge their own memory and log every heartbeat."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from godwit.client import AsyncClient

from services.common.errors import GodwitError
from services.common.vm_spec import PAGE_BYTES, VmSpec
from services.demo.cluster import Cluster
from services.demo.microvm_guest import make_spec
from services.fault_agent import processes
from services.fault_agent.drivers.microvm import CONTROL_SOCKET
from services.fault_agent.drivers.microvm_control import ControlClient
from services.fault_agent.journal import Record, Role
from tests.chaos.beats import BeatLog, Beats

MIB = 1 << 20
MEMORY_BYTES = 64 * MIB
WORKLOAD_BYTES = 24 * MIB
VCPUS = 2
TICK_US = 2000
OPS_PER_SECOND = 1000
"""Of each vCPU. Few: what it touches is fetched at once, and a post-copy is to last for a while."""

BACKENDS = (
    ("kvm", "kvm-userfault"),
    ("kvm", "exit-emulation"),
    ("kvm", "uffd"),
    ("thread", "uffd"),
    ("thread", "exit-sigsegv"),
)
_numbers = itertools.count(1)


@dataclass(slots=True, kw_only=True)
class Sweep:
    """What a guest found in its own memory. Attributes: pages verified, errors found."""

    pages: int
    errors: int


@dataclass(slots=True, kw_only=True)
class Guest:
    """A microvm that was started. Attributes: node (where it was last seen running)."""

    cluster: Cluster
    client: AsyncClient
    spec: VmSpec
    node: str
    log: Beats

    is_heard_on_disk: ClassVar[bool] = False
    """Its beats are written beside the journal of its node."""
    is_swept_beside: ClassVar[bool] = True
    """It verifies its memory after each case, not only after its own."""
    tells_restarts: ClassVar[bool] = True
    """It beats so regularly that a silence means that it is held."""

    @classmethod
    async def start(
        cls,
        accel: str,
        backend: str,
        node: str,
        *,
        cluster: Cluster,
        client: AsyncClient,
        logs: Path,
    ) -> Guest:
        """Start one and wait until it beats."""
        vm_id = f"{accel}-{backend}-{next(_numbers)}"
        path = logs / f"{vm_id}.beats"
        path.touch()
        spec = make_spec(
            vm_id,
            accel=accel,
            memory_bytes=MEMORY_BYTES,
            workload_bytes=WORKLOAD_BYTES,
            vcpus=VCPUS,
            fault_backend=backend,
            ops_per_second=OPS_PER_SECOND,
            tick_us=TICK_US,
            beat_log=str(path),
        )
        await client.start_vm(node, spec.model_dump(mode="json"))
        log = BeatLog(path, VCPUS)
        guest = cls(cluster=cluster, client=client, spec=spec, node=node, log=log)
        await guest.sweep()
        return guest

    @property
    def vm_id(self) -> str:
        """Its name."""
        return self.spec.vm_id

    @property
    def kind(self) -> str:
        """accel/backend."""
        assert self.spec.microvm is not None
        return f"{self.spec.accel}/{self.spec.microvm.fault_backend}"

    @property
    def page_count(self) -> int:
        """Pages that a sweep verifies."""
        return WORKLOAD_BYTES // PAGE_BYTES

    def other(self) -> str:
        """The node where it is not."""
        return next(name for name in self.cluster.nodes if name != self.node)

    def record(self, node: str) -> Record | None:
        """What a node's journal says of it; None: nothing."""
        try:
            return self.cluster.nodes[node].record(self.vm_id)
        except (FileNotFoundError, GodwitError):
            return None

    def process(self, node: str) -> processes.Process | None:
        """Its VMM on a node, if the journal there names one that lives."""
        record = self.record(node)
        if record is None or record.process is None or not processes.is_alive(record.process):
            return None
        return record.process

    def is_cleared(self, node: str) -> bool:
        """A node has nothing of it any more."""
        record = self.record(node)
        return record is None or record.role in (Role.UNKNOWN, Role.GONE)

    @contextlib.asynccontextmanager
    async def control(
        self, node: str = "", *, timeout_s: float = 20.0
    ) -> AsyncIterator[ControlClient]:
        """A connection of our own to its VMM.

        Raises:
            VmmUnreachableError: there is none.
        """
        process = self.process(node or self.node)
        control = await ControlClient.connect(
            self.cluster.nodes[node or self.node].vm_dir(self.vm_id) / CONTROL_SOCKET,
            timeout_s=timeout_s,
            alive=lambda: process is not None and processes.is_alive(process),
        )
        try:
            yield control
        finally:
            control.close()

    async def sweep(self) -> Sweep:
        """Have it verify every page."""
        async with self.control() as control:
            said: dict[str, Any] = await control.ask("verify", timeout_s=None)
        return Sweep(pages=int(said["pages_verified"]), errors=int(said["errors"]))

    async def wait_beat(self, after_ns: int) -> None:
        """Return once every vCPU has beaten after `after_ns`."""
        while True:
            self.log.poll()
            if all(beat is not None and beat.t_ns > after_ns for beat in self.log.last):
                return
            await asyncio.sleep(0.01)
