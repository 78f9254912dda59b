# SPDX-License-Identifier: Apache-2.0
"""Promise: a microvm moves unharmed with every fault backend, also if an agent dies on the way.

Its guest judges by itself: each page, each counter, each heartbeat.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import pytest_asyncio
from godwit.client import AsyncClient
from godwit.models import Migration, MigrationPhase

from services.demo.cluster import Cluster, running_cluster
from services.demo.microvm_guest import MicrovmGuest, make_spec
from services.demo.microvm_verdict import MicrovmSetup, judge_microvm
from services.demo.moves import report_of
from services.fault_agent import processes
from services.fault_agent.drivers.microvm import VMM_LOG
from services.fault_agent.handoff_socket import SOCKET
from services.fault_agent.journal import Role
from tests.harness.microvm import BACKENDS, need_backend, why_not

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(300),
]

MIB = 1 << 20
MEMORY_BYTES = 64 * MIB
WORKLOAD_BYTES = 32 * MIB
WAIT_S = 120.0

Start = Callable[..., Awaitable[MicrovmGuest]]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """Two nodes, their hook points on."""
    directory = tmp_path_factory.mktemp("microvm") / "cluster"
    async with running_cluster(directory, hooked=True) as cluster:
        yield cluster


_numbers = itertools.count()


@pytest_asyncio.fixture(loop_scope="module")
async def start(cluster: Cluster) -> AsyncIterator[Start]:
    """Starts microvms on node a; at the end they are stopped."""
    started: list[MicrovmGuest] = []
    async with AsyncClient(cluster.rest_url) as client:

        async def run(accel: str, backend: str, vcpus: int = 2) -> MicrovmGuest:
            spec = make_spec(
                f"m{next(_numbers)}",
                accel=accel,
                memory_bytes=MEMORY_BYTES,
                workload_bytes=WORKLOAD_BYTES,
                vcpus=vcpus,
                fault_backend=backend,
            )
            guest = await MicrovmGuest.start(spec, "a", cluster=cluster, client=client)
            started.append(guest)
            await guest.look()
            return guest

        yield run
        for guest in started:
            await client.stop_vm(guest.vm_id)


async def go_on(_: Migration) -> bool:
    return False


def judged(guest: MicrovmGuest, moves: list[Migration], backend: str) -> dict[str, Any]:
    setup = MicrovmSetup(
        vmm="",
        guest="",
        memory_bytes=MEMORY_BYTES,
        page_count=guest.page_count,
        vcpus=guest.spec.vcpus,
        fault_backend=backend,
    )
    return judge_microvm(setup, guest.stays, [report_of(move) for move in moves])


def describe(guest: MicrovmGuest, move: Migration) -> str:
    """What a failed assertion should show: the history, and the ends of the logs."""
    history = " → ".join(step.phase for step in move.transitions)
    logs = [part.log for part in guest.cluster.parts]
    logs += [node.vm_dir(guest.vm_id) / VMM_LOG for node in guest.cluster.nodes.values()]
    tails = "\n".join(
        f"--- {log}\n{log.read_text(errors='replace')[-1500:]}" for log in logs if log.exists()
    )
    return f"{history}: {move.reason}: {move.message}\n{tails}"


@pytest.mark.parametrize(("accel", "backend"), BACKENDS)
async def test_there_and_back(start: Start, accel: str, backend: str) -> None:
    need_backend(accel, backend)
    guest = await start(accel, backend)
    moves = []
    for destination in ("b", "a"):
        move = await guest.move(destination, on_step=go_on)
        assert move.phase == MigrationPhase.SUCCEEDED, describe(guest, move)
        moves.append(move)
        await guest.look()
    report = judged(guest, moves, backend)
    assert report["reasons"] == []
    for told in report["migrations"]:
        assert told["fault_backend_reason"]
        assert sum(told["blocked_ns"]) > 0 or backend == "uffd"
        if backend == "uffd":
            assert told["exits"] == [0, 0]
    for node in ("a", "b"):
        vm_dir = guest.cluster.nodes[node].vm_dir(guest.vm_id)
        assert not (vm_dir / SOCKET).exists(), "nobody listens where nobody will call"


@pytest.mark.parametrize(("accel", "backend"), BACKENDS)
async def test_the_destinations_agent_dies_in_mid_post_copy(
    start: Start, accel: str, backend: str
) -> None:
    """Killed while the guest runs and nothing comes in bulk: it waits on what it touches.

    The next agent takes the hand-off again, and the requests that the first one has never answered.
    """
    need_backend(accel, backend)
    guest = await start(accel, backend)
    agent = guest.cluster.nodes["b"].agent
    point = "agent.activate.after_cont"
    agent.hooks.hold(point)

    async def kill() -> None:
        async with asyncio.timeout(WAIT_S):
            await agent.hooks.reached(point)
        assert guest.cluster.nodes["b"].record(guest.vm_id).epoch_memory_complete == 0
        await agent.kill()
        agent.hooks.release(point)
        await guest.cluster.start(agent)

    async with asyncio.TaskGroup() as tasks:
        killing = tasks.create_task(kill())
        move = await guest.move("b", on_step=go_on)
        await killing
    assert move.phase == MigrationPhase.SUCCEEDED, describe(guest, move)
    await guest.look()
    # The counters of an arrival are its engine's: those of the dead one went with it.
    reasons = judged(guest, [move], backend)["reasons"]
    assert [reason for reason in reasons if "no page was counted" not in reason] == []


@pytest.mark.parametrize(("accel", "backend"), BACKENDS)
async def test_the_destinations_vmm_dies_before_it_was_let_run(
    start: Start, accel: str, backend: str
) -> None:
    """After the decision, and the source is sealed: it makes its VMM again, by itself."""
    need_backend(accel, backend)
    guest = await start(accel, backend)
    nodes, point = guest.cluster.nodes, "agent.activate.before_activating"
    hooks = nodes["b"].agent.hooks
    hooks.hold(point)

    async def strike() -> None:
        async with asyncio.timeout(WAIT_S):
            await hooks.reached(point)
            while nodes["a"].record(guest.vm_id).role is not Role.SEALED:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        shell = nodes["b"].record(guest.vm_id).process
        assert shell is not None
        await processes.kill(shell)
        hooks.release(point)

    async with asyncio.TaskGroup() as tasks:
        striking = tasks.create_task(strike())
        move = await guest.move("b", on_step=go_on)
        await striking
    assert move.phase == MigrationPhase.RETURNED, describe(guest, move)
    assert move.reason == "DESTINATION_GONE_BEFORE_ACTIVATION"
    await guest.look()
    first, again = guest.stays
    assert again.hello["pid"] != first.hello["pid"]
    assert again.sweep["errors"] == 0
    # Nothing is left behind: it moves as ever.
    move = await guest.move("b", on_step=go_on)
    assert move.phase == MigrationPhase.SUCCEEDED, describe(guest, move)
    await guest.look()
    assert guest.stays[-1].sweep["errors"] == 0


async def test_a_backend_that_the_kernel_lacks_moves_nobody(start: Start) -> None:
    """The destination's VMM says why, before the guest is paused; it runs on."""
    if not why_not("kvm", "kvm-userfault"):
        pytest.skip("this kernel has KVM Userfault")
    if why := why_not("kvm", "uffd"):
        pytest.skip(f"needs KVM: {why}")
    guest = await start("kvm", "kvm-userfault")
    move = await guest.move("b", on_step=go_on)
    assert move.phase == MigrationPhase.FAILED
    assert move.pause_ns == 0
    assert "KVM_MEM_USERFAULT" in move.message
    await guest.look()
    first, again = guest.stays
    assert again.hello["pid"] == first.hello["pid"]
    assert again.sweep["errors"] == 0
