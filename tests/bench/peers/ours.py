# SPDX-License-Identifier: Apache-2.0
"""Our move: two nodes with real agents and page servers, an orchestrator, asked through REST."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from godwit.client import AsyncClient
from godwit.models import Migration, MigrationPhase

from services.common.vm_spec import VmSpec
from services.demo.cluster import Cluster
from services.demo.console import Console, ConsoleFollower
from services.demo.live_guest import LiveGuest
from services.demo.moves import why_not_succeeded
from services.demo.verdict import Setup
from services.fault_agent.drivers.command_line import PID_FILE
from tests.bench.peers.guest import MEMORY_MIB, Move, workload


@dataclass(slots=True)
class _Memory:
    """Of a process, KiB."""

    above_kib: int = field(default=0)


def _kib(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/{pid}/status has no {name}")


@contextmanager
def _peak(pid: int) -> Iterator[_Memory]:
    """The most that its resident set grew in the block."""
    memory = _Memory()
    before = _kib(pid, "VmRSS")
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    yield memory
    memory.above_kib = _kib(pid, "VmHWM") - before


class OurGuest:
    """A guest of the cluster."""

    def __init__(self, guest: LiveGuest) -> None:
        self._guest = guest

    @classmethod
    async def start(
        cls, spec: VmSpec, cluster: Cluster, client: AsyncClient, follower: ConsoleFollower
    ) -> OurGuest:
        """Boot it on node a; it is not up yet."""
        setup = Setup(
            vmm="QEMU",
            guest="Linux",
            memory_bytes=MEMORY_MIB << 20,
            page_count=workload().page_count,
            disk=False,
            net=False,
        )
        return cls(
            await LiveGuest.start(
                spec, "a", setup=setup, cluster=cluster, client=client, follower=follower
            )
        )

    @property
    def consoles(self) -> list[Console]:
        """Of its runs."""
        return self._guest.consoles

    def vmm_pid(self) -> int:
        """Of the QEMU that it runs in."""
        node = self._guest.cluster.nodes[self._guest.console.node]
        return int((node.vm_dir(self._guest.vm_id) / PID_FILE).read_text())

    async def move(self, cap: int, *, preempt: bool) -> Move:
        """To the other node.

        Raises:
            RuntimeError: it did not succeed.
        """
        destination = "b" if self._guest.console.node == "a" else "a"
        agent = self._guest.cluster.nodes[destination].agent

        async def on_step(_: Migration) -> bool:
            return False

        assert agent.pid is not None
        with _peak(agent.pid) as memory:
            done = await self._guest.move(destination, on_step=on_step, bulk_bytes_per_s_max=cap)
        if done.phase != MigrationPhase.SUCCEEDED:
            raise RuntimeError(why_not_succeeded(done))
        assert done.created_at is not None
        switched = entered(done, MigrationPhase.SWITCHOVER)
        whole = entered(done, MigrationPhase.FINALIZING)
        counters = done.counters
        return Move(
            memory_s=(whole - switched).total_seconds(),
            total_s=(whole - done.created_at).total_seconds(),
            said={
                "pause_ms": done.pause_ns / 1e6,
                "agent_kib": memory.above_kib,
                "demand_pages": counters.demand_page_count if counters else 0,
                "fault_p50_us": counters.fault_latency.p50_ns / 1e3 if counters else 0.0,
                "fault_p99_us": counters.fault_latency.p99_ns / 1e3 if counters else 0.0,
            },
        )

    async def close(self) -> None:
        """The cluster ends it."""


def entered(migration: Migration, phase: str) -> datetime:
    """When it entered a phase.

    Raises:
        RuntimeError: it never did.
    """
    for transition in migration.transitions:
        if transition.phase == phase and transition.at is not None:
            return transition.at
    raise RuntimeError(f"{migration.migration_id} never was {phase}")
