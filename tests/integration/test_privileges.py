# SPDX-License-Identifier: Apache-2.0
"""Promise: each process gives up at its start what it does not need, and guests move all the same.

The processes are started as root here, with everything that root may do.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from godwit.client import AsyncClient
from godwit.models import Migration, MigrationPhase

from services.common.privileges.capabilities import Capability, Held, held
from services.demo.cluster import Cluster, running_cluster
from services.demo.microvm_guest import MicrovmGuest, make_spec
from services.demo.part import Part
from services.fault_agent import processes
from services.fault_agent.main import KEPT
from tests.harness.cluster import MEMORY_MIB, WORKLOAD_MIB
from tests.harness.microvm import need_backend

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(300),
    pytest.mark.requires("root"),
]

MIB = 1 << 20
BULK_BYTES_PER_S = 32 * MIB
"""Slow enough that its threads are seen at work."""
PORTS = frozenset({int(Capability.NET_BIND_SERVICE)})
AGENT = frozenset(int(item) for item in KEPT)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """Two nodes as they are installed; the agents keep nothing that they are not known to need."""
    directory = tmp_path_factory.mktemp("privileges") / "cluster"
    async with running_cluster(
        directory, agent_flags=("--respawn",), kept_capabilities=()
    ) as cluster:
        yield cluster


def _threads(pid: int) -> dict[str, Held]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return {(task / "comm").read_text().strip(): held(task / "status") for task in tasks}


def _require_only(part: Part, pid: int, wanted: frozenset[int]) -> None:
    mine = held()
    for name, thread in _threads(pid).items():
        assert thread.permitted == wanted & mine.permitted, f"{part.name}, {name}"
        assert thread.bounding == wanted & mine.bounding, f"{part.name}, {name}"
        assert thread.no_new_privs, f"{part.name}, {name}"


async def test_every_thread_of_every_process_keeps_only_what_it_says(cluster: Cluster) -> None:
    for part in cluster.parts:
        wanted = PORTS if part is cluster.orchestrator else frozenset[int]()
        if part.name.endswith(".agent"):
            wanted = AGENT
            _require_only(part, part.pid, wanted)
        _require_only(part, part.worker_pid, wanted)
        assert "no new privileges" in part.log.read_text(), part.name
    agent = cluster.nodes["a"].agent
    assert "CAP_SYS_PTRACE (a userfaultfd inside a VMM" in agent.log.read_text()


async def _moves(cluster: Cluster, guest: MicrovmGuest, *destinations: str) -> set[tuple[str, str]]:
    """Move it; which threads of the receiving agents were filtered: (name, mode)."""
    seen: set[tuple[str, str]] = set()
    for destination in destinations:
        pid = cluster.nodes[destination].agent.worker_pid

        async def look(_: Migration, pid: int = pid) -> bool:
            seen.update(_filters(pid))
            return False

        last = await guest.move(destination, on_step=look, bulk_bytes_per_s_max=BULK_BYTES_PER_S)
        assert last.phase == MigrationPhase.SUCCEEDED, last.message
    return seen


def _filters(pid: int) -> set[tuple[str, str]]:
    found = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            mode = re.search(r"^Seccomp:\s*(\d)", (task / "status").read_text(), re.MULTILINE)
            assert mode is not None
            found.add(((task / "comm").read_text().strip(), mode[1]))
    return found


async def test_a_microvm_moves_there_and_back(cluster: Cluster) -> None:
    """The page threads are filtered, the agent is not; a VMM has no more than its agent kept."""
    await asyncio.to_thread(need_backend, "thread", "uffd")
    async with AsyncClient(cluster.rest_url) as client:
        spec = make_spec(
            "m1",
            accel="thread",
            memory_bytes=MEMORY_MIB * MIB,
            workload_bytes=WORKLOAD_MIB * MIB,
            vcpus=1,
            fault_backend="uffd",
        )
        guest = await MicrovmGuest.start(spec, "a", cluster=cluster, client=client)
        try:
            seen = await _moves(cluster, guest, "b", "a")
            assert {("gw-demand", "2"), ("gw-bulk", "2"), ("python", "0")} <= seen
            assert ("gw-demand", "0") not in seen
            process = cluster.nodes["a"].record("m1").process
            assert process is not None
            assert processes.is_alive(process)
            vmm = held(Path(f"/proc/{process.pid}/status"))
            assert vmm.permitted <= AGENT
            assert vmm.no_new_privs
        finally:
            await client.stop_vm("m1")
