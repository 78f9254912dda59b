# SPDX-License-Identifier: Apache-2.0
"""Guests on a cluster whose network is broken."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import pytest
import pytest_asyncio
from godwit.models import Migration, MigrationPhase

from services.demo.microvm_guest import MicrovmGuest
from services.demo.microvm_verdict import MicrovmSetup, judge_microvm
from services.demo.moves import report_of
from services.fault_agent.drivers.microvm import VMM_LOG
from tests.harness.linked_cluster import LinkedCluster, linked_cluster

_numbers = itertools.count()


@dataclass(slots=True, kw_only=True)
class Traveller:
    """A microvm and its journey."""

    linked: LinkedCluster
    guest: MicrovmGuest
    moves: list[Migration] = field(default_factory=list)

    def judge(self) -> list[str]:
        """What is wrong with it: pages, beats and counters, over all of its moves."""
        guest = self.guest
        setup = MicrovmSetup(
            vmm="",
            guest="",
            memory_bytes=guest.spec.memory_bytes,
            page_count=guest.page_count,
            vcpus=guest.spec.vcpus,
            fault_backend="uffd",
        )
        reasons = judge_microvm(setup, guest.stays, [report_of(move) for move in self.moves])[
            "reasons"
        ]
        assert isinstance(reasons, list)
        return reasons

    async def arrive(self, last: Migration) -> None:
        """It must have moved, whole."""
        assert last.phase == MigrationPhase.SUCCEEDED, self.describe(last)
        self.moves.append(last)
        await self.guest.look()
        assert self.judge() == []

    async def stay(self, last: Migration) -> None:
        """It must run on where it was, whole, and as the same process."""
        assert last.phase == MigrationPhase.FAILED, self.describe(last)
        before = self.guest.stays.pop()
        here = await self.guest.look()
        assert here.hello["pid"] == before.hello["pid"]
        assert here.hello["state"] == "running"
        assert here.sweep["errors"] == 0
        assert here.sweep["pages_verified"] == self.guest.page_count
        for old, new in zip(before.stats["vcpus"], here.stats["vcpus"], strict=True):
            assert new["beat_jumps"] == 0
            assert new["last_beat"]["number"] > old["last_beat"]["number"]

    def describe(self, move: Migration) -> str:
        """What a failed assertion should show: the history, and the ends of the logs."""
        history = " → ".join(step.phase for step in move.transitions)
        cluster = self.guest.cluster
        logs = [part.log for part in cluster.parts]
        logs += [node.vm_dir(self.guest.vm_id) / VMM_LOG for node in cluster.nodes.values()]
        tails = "\n".join(
            f"--- {log}\n{log.read_text(errors='replace')[-1500:]}" for log in logs if log.exists()
        )
        return f"{history}: {move.reason}: {move.message}\n{tails}"


Start = Callable[..., Awaitable[Traveller]]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LinkedCluster]:
    async with linked_cluster(tmp_path_factory.mktemp("fault") / "cluster") as linked:
        yield linked


@pytest_asyncio.fixture(loop_scope="module")
async def linked(shared: LinkedCluster) -> AsyncIterator[LinkedCluster]:
    """The cluster, whole again afterwards."""
    yield shared
    await shared.reset()


@pytest_asyncio.fixture(loop_scope="module")
async def start(linked: LinkedCluster) -> AsyncIterator[Start]:
    """Starts a guest on node a, verified; at the end it is stopped."""
    started: list[str] = []

    async def run(**options: int) -> Traveller:
        vm_id = f"n{next(_numbers)}"
        guest = await linked.start_microvm(vm_id, **options)  # type: ignore[arg-type]
        started.append(vm_id)
        await guest.look()
        return Traveller(linked=linked, guest=guest)

    yield run
    await linked.reset()
    for vm_id in started:
        await linked.client.stop_vm(vm_id)
