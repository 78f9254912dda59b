# SPDX-License-Identifier: Apache-2.0
"""A microvm on a cluster: start it through the API, move it, ask it how it is."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from godwit.client import AsyncClient
from godwit.models import Migration, MigrationPhase

from services.common.errors import DeadlineExceededError
from services.common.vm_spec import PAGE_BYTES, Microvm, VmSpec
from services.demo import moves
from services.demo.cluster import Cluster
from services.demo.microvm_verdict import Stats, Stay
from services.demo.moves import OnStep
from services.fault_agent import processes
from services.fault_agent.drivers.microvm import CONTROL_SOCKET, LAST_STATS
from services.fault_agent.drivers.microvm_control import ControlClient

SWEEP_S_MAX = 240.0
RELEASE_S_MAX = 60.0
CONNECT_S_MAX = 30.0
_POLL_S = 0.01


def make_spec(
    vm_id: str,
    *,
    accel: str,
    memory_bytes: int,
    workload_bytes: int,
    vcpus: int = 1,
    **microvm: object,
) -> VmSpec:
    """The spec of a microvm; `microvm` are fields of its own."""
    return VmSpec.model_validate(
        {
            "vm_id": vm_id,
            "driver": "microvm",
            "accel": accel,
            "memory_bytes": memory_bytes,
            "vcpus": vcpus,
            "microvm": Microvm.model_validate({"workload_bytes": workload_bytes, **microvm}),
        }
    )


@dataclass(slots=True, kw_only=True)
class MicrovmGuest:
    """A microvm that was started, wherever it is now.

    Attributes:
        stays: what it said on each node, once it was asked; grows with `look`.
    """

    cluster: Cluster
    client: AsyncClient
    spec: VmSpec
    node: str
    stays: list[Stay] = field(default_factory=list)

    @classmethod
    async def start(
        cls, spec: VmSpec, node: str, *, cluster: Cluster, client: AsyncClient
    ) -> MicrovmGuest:
        """Start it on a node, through the API.

        Raises:
            GodwitClientError: the orchestrator refused or did not answer.
        """
        await client.start_vm(node, spec.model_dump(mode="json"))
        return cls(cluster=cluster, client=client, spec=spec, node=node)

    @property
    def vm_id(self) -> str:
        """The guest."""
        return self.spec.vm_id

    @property
    def page_count(self) -> int:
        """Pages that a sweep verifies."""
        assert self.spec.microvm is not None
        return (self.spec.microvm.workload_bytes or self.spec.memory_bytes // 2) // PAGE_BYTES

    @contextlib.asynccontextmanager
    async def control(self, node: str = "") -> AsyncIterator[ControlClient]:
        """A connection of our own to the VMM on `node`, by default where it is.

        Raises:
            VmmUnreachableError: there is none.
        """
        parts = self.cluster.nodes[node or self.node]
        process = parts.record(self.vm_id).process
        control = await ControlClient.connect(
            parts.vm_dir(self.vm_id) / CONTROL_SOCKET,
            timeout_s=CONNECT_S_MAX,
            alive=lambda: process is not None and processes.is_alive(process),
        )
        try:
            yield control
        finally:
            control.close()

    async def look(self) -> Stay:
        """Let it verify every page, and note what it says.

        Raises:
            DeadlineExceededError: GUEST_SILENT.
            GodwitError: it refused, or is gone.
        """
        try:
            async with self.control() as control, asyncio.timeout(SWEEP_S_MAX):
                sweep = await control.ask("verify", timeout_s=None)
                stay = Stay(
                    node=self.node,
                    hello=await self._settled(control),
                    sweep=sweep,
                    stats=await control.ask("stats"),
                )
        except TimeoutError:
            raise DeadlineExceededError(
                "GUEST_SILENT", f"{self.vm_id}: no sweep within {SWEEP_S_MAX:g} s"
            ) from None
        self.stays.append(stay)
        return stay

    async def move(
        self,
        destination: str,
        *,
        on_step: OnStep,
        bulk_bytes_per_s_max: int = 0,
        timeout_s: float = moves.MOVE_S_MAX,
    ) -> Migration:
        """Ask for a move and follow it to its end.

        Raises:
            DeadlineExceededError: MOVE_STALLED.
            GodwitClientError: the orchestrator refused or cannot be reached any more.
        """
        last = await moves.move(
            self.client,
            self.vm_id,
            destination,
            on_step=on_step,
            bulk_bytes_per_s_max=bulk_bytes_per_s_max,
            timeout_s=timeout_s,
        )
        if last.phase == MigrationPhase.SUCCEEDED:
            self.was_moved(destination)
        return last

    def was_moved(self, destination: str) -> None:
        """It is on `destination` now, whoever moved it; note what it said last before."""
        source, self.node = self.node, destination
        if self.stays:
            self.stays[-1] = replace(self.stays[-1], last=self._last(source))

    async def look_again(self) -> Stay:
        """`look`, at a guest that has not moved since: what it says now takes the old one's place.

        What was wrong before stays wrong: errors are counted by the guest itself.
        """
        stay = await self.look()
        if len(self.stays) > 1 and self.stays[-2].node == stay.node:
            del self.stays[-2]
        return stay

    async def _settled(self, control: ControlClient) -> Stats:
        """What it says of itself, once it has let go of its memory.

        SUCCEEDED is told when every page is here; to let go takes a moment longer.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RELEASE_S_MAX):
                while True:
                    hello = await control.ask("hello")
                    if hello.get("faults") not in ("armed", "complete"):
                        return hello
                    await asyncio.sleep(_POLL_S)
        return await control.ask("hello")

    def _last(self, node: str) -> Stats | None:
        """What it said at its last save on `node`, if that was the process we have asked there."""
        path = self.cluster.nodes[node].vm_dir(self.vm_id) / LAST_STATS
        last = _read(path)
        return last if last is not None and last["pid"] == self.stays[-1].hello["pid"] else None


def _read(path: Path) -> Stats | None:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) and "pid" in value else None
