# SPDX-License-Identifier: Apache-2.0
"""Promise: with TLS nothing of a guest is readable on the way, and no date freezes a guest.

No date, key, authority or absent orchestrator ever keeps one from the memory that it was promised
(DESIGN 3.4). Each of these happens in the middle of post-copy, while nothing comes in bulk; the
page server is started again then, so that every connection has to be made anew. Real processes,
one cluster.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import itertools
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
from godwit.client import AsyncClient
from godwit.errors import GodwitConnectionError
from godwit.models import Migration, MigrationPhase

from services.common.certificates import AUTHORITY, Pair, make_authority
from services.demo.cluster import Cluster, running_cluster
from services.demo.cluster_tls import DAYS, ClusterTls
from services.demo.live_guest import LiveGuest
from services.demo.microvm_guest import MicrovmGuest, make_spec
from services.demo.part import Part
from services.fault_agent.journal import Role
from tests.harness.cluster import small_guest_on
from tests.harness.microvm import why_not
from tests.harness.moved_clock import YEAR_S, MovedClock
from tests.harness.require import require
from tests.harness.sniffer import Sniffer

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

MIB = 1 << 20
PAGE = 4096
WAIT_S = 120.0
POINT = "agent.activate.after_cont"
"""The guest runs at b, and nothing comes in bulk yet."""

Middle = Callable[[MicrovmGuest], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """A cluster with certificates whose wall clock is ours."""

    cluster: Cluster
    clock: MovedClock

    @property
    def tls(self) -> ClusterTls:
        """Its certificates."""
        assert self.cluster.tls is not None
        return self.cluster.tls


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def ground(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Ground]:
    """Two nodes with certificates, their hook points on."""
    directory = tmp_path_factory.mktemp("tls")
    clock = await asyncio.to_thread(MovedClock, directory)
    async with running_cluster(
        directory / "cluster", hooked=True, environment=clock.environment, tls=True
    ) as cluster:
        yield Ground(cluster=cluster, clock=clock)


_numbers = itertools.count()


async def start_guest(cluster: Cluster, stack: contextlib.AsyncExitStack) -> MicrovmGuest:
    """A microvm on node a; it is stopped at the end."""
    accel = "thread" if why_not("kvm", "exit-emulation") else "kvm"
    backend = "exit-sigsegv" if accel == "thread" else "exit-emulation"
    spec = make_spec(
        f"t{next(_numbers)}",
        accel=accel,
        memory_bytes=64 * MIB,
        workload_bytes=16 * MIB,
        vcpus=1,
        fault_backend=backend,
    )
    client = await stack.enter_async_context(cluster.client())
    guest = await MicrovmGuest.start(spec, "a", cluster=cluster, client=client)
    stack.push_async_callback(client.stop_vm, guest.vm_id)
    await guest.look()
    return guest


async def go_on(_: Migration) -> bool:
    return False


def describe(guest: MicrovmGuest | LiveGuest, move: Migration) -> str:
    """What a failed assertion should show."""
    history = " → ".join(step.phase for step in move.transitions)
    tails = "\n".join(
        f"--- {part.log}\n{part.log.read_text(errors='replace')[-2000:]}"
        for part in guest.cluster.parts
    )
    return f"{history}: {move.reason}: {move.message}\n{tails}"


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - processes and files
            await asyncio.sleep(0.05)


async def restart(cluster: Cluster, part: Part) -> None:
    await part.kill()
    await cluster.start(part)


def is_whole_at(guest: MicrovmGuest | LiveGuest, node: str) -> bool:
    record = guest.cluster.nodes[node].record(guest.vm_id)
    return record.epoch_memory_complete == record.epoch_owned


async def ended(client: AsyncClient, begun: Migration) -> Migration:
    """Its last state. Nobody has watched it: certificates have dates, and our clock is another."""
    over = (MigrationPhase.SUCCEEDED, MigrationPhase.FAILED, MigrationPhase.CANCELLED)
    async with asyncio.timeout(WAIT_S):
        while True:
            # A connection from before the jump may be found closed, once.
            with contextlib.suppress(GodwitConnectionError):
                if (move := await client.migration(begun.migration_id)).phase in over:
                    return move
            await asyncio.sleep(0.1)


async def move_with(ground: Ground, middle: Middle) -> Migration:
    """Move a guest to b, with `middle` in the middle; it arrives whole and the move succeeds."""
    async with contextlib.AsyncExitStack() as stack:
        guest = await start_guest(ground.cluster, stack)
        # Also where something fails: the next test's calls have dates.
        stack.callback(ground.clock.move, 0)
        agent = ground.cluster.nodes["b"].agent
        agent.hooks.hold(POINT)
        begun = await guest.client.migrate(guest.vm_id, "b")
        try:
            async with asyncio.timeout(WAIT_S):
                await agent.hooks.reached(POINT)
            assert not is_whole_at(guest, "b")
            await middle(guest)
        finally:
            agent.hooks.release(POINT)
        await until(lambda: is_whole_at(guest, "b"))
        ground.clock.move(0)
        move = await ended(guest.client, begun)
        assert move.phase == MigrationPhase.SUCCEEDED, describe(guest, move)
        guest.was_moved("b")
        await guest.look()
        first, again = guest.stays
        assert again.hello["pid"] != first.hello["pid"]
        assert again.sweep["errors"] == 0
        return move


def renew_all(ground: Ground, **how: object) -> None:
    for name in ("orchestrator", "operator", *ground.cluster.nodes):
        ground.tls.renew(name, **how)  # type: ignore[arg-type]


def trust_all(ground: Ground, *authorities: Pair) -> None:
    for name in ("orchestrator", "operator", *ground.cluster.nodes):
        ground.tls.trust(name, *authorities)


async def await_taken(ground: Ground, change: Callable[[], None]) -> None:
    """Change files, and wait until every part has taken them."""

    def counts() -> list[int]:
        logs = [part.log.read_text(errors="replace") for part in ground.cluster.parts]
        return [log.count("are read again") for log in logs]

    before = counts()
    change()
    await until(lambda: all(now > old for now, old in zip(counts(), before, strict=True)))


async def test_keys_and_authority_are_rotated(ground: Ground) -> None:
    """An overlap: both are trusted, everybody gets a new key, the old authority is dropped."""

    async def rotate(_: MicrovmGuest) -> None:
        old = ground.tls.authority
        new = make_authority(days=DAYS, now=dt.datetime.now(dt.UTC))
        await await_taken(ground, lambda: trust_all(ground, old, new))
        ground.tls.authority = new
        await await_taken(ground, lambda: renew_all(ground))
        await await_taken(ground, lambda: trust_all(ground, new))
        await restart(ground.cluster, ground.cluster.nodes["a"].page_server)

    await move_with(ground, rotate)


async def test_the_orchestrator_is_down(ground: Ground) -> None:
    """Nobody is asked: the guest has all of its memory before there is an orchestrator again."""

    async def stop(guest: MicrovmGuest) -> None:
        await ground.cluster.orchestrator.kill()
        await restart(ground.cluster, ground.cluster.nodes["a"].page_server)
        ground.cluster.nodes["b"].agent.hooks.release(POINT)
        await until(lambda: is_whole_at(guest, "b"))
        await ground.cluster.start(ground.cluster.orchestrator)

    await move_with(ground, stop)


@pytest.mark.parametrize("years", [1, -1])
async def test_the_clock_jumps(ground: Ground, years: int) -> None:
    """Every certificate is of another time at once; page lanes are made anew by pinned keys."""

    async def jump(_: MicrovmGuest) -> None:
        ground.clock.move(years * YEAR_S)
        await restart(ground.cluster, ground.cluster.nodes["a"].page_server)

    await move_with(ground, jump)


async def test_certificates_have_ended_and_every_process_of_the_page_path_is_new(
    ground: Ground,
) -> None:
    """What is pinned is in journals and image records, not in the memory of a process."""

    async def end(guest: MicrovmGuest) -> None:
        ground.clock.move(YEAR_S)
        nodes = ground.cluster.nodes
        await nodes["b"].agent.kill()
        await nodes["a"].page_server.kill()
        nodes["b"].agent.hooks.release(POINT)
        await ground.cluster.start(nodes["a"].page_server)
        await ground.cluster.start(nodes["b"].agent)
        await until(lambda: is_whole_at(guest, "b"))
        # And somebody is told.
        await until(lambda: "HAS ENDED" in nodes["b"].agent.log.read_text(errors="replace"))

    await move_with(ground, end)


async def metrics(ground: Ground) -> str:
    """What the orchestrator counts. Everybody may ask, without a certificate that has dates."""
    authority = ground.tls.member("operator") / AUTHORITY
    context = ssl.create_default_context(cafile=str(authority))
    context.check_hostname = False
    url = f"{ground.cluster.rest_url}/metrics"
    async with httpx.AsyncClient(verify=context, trust_env=False) as http:
        return (await http.get(url)).text


async def test_certificates_have_ended_and_nobody_is_connected(ground: Ground) -> None:
    """A year later every process of both nodes is another one; the move goes on to its end by keys.

    That the source is released takes the orchestrator, both agents, and connections that are new.
    """

    async def end(guest: MicrovmGuest) -> None:
        ground.clock.move(YEAR_S)
        nodes = ground.cluster.nodes
        parts = (nodes["a"].agent, nodes["b"].agent, nodes["a"].page_server)
        for part in parts:
            await part.kill()
        nodes["b"].agent.hooks.release(POINT)
        for part in parts:
            await ground.cluster.start(part)
        await until(lambda: is_whole_at(guest, "b"))
        await until(lambda: nodes["a"].record(guest.vm_id).role is Role.GONE)
        said = ""
        async with asyncio.timeout(WAIT_S):
            while 'godwit_node_by_pin{node="b"} 1.0' not in said:
                await asyncio.sleep(0.2)
                said = await metrics(ground)
        assert re.search(r'godwit_node_certificate_expiry_seconds{node="b"} -', said)
        assert re.search(r'godwit_certificate_expiry_seconds{file="tls.crt"} -', said)

    move = await move_with(ground, end)
    kinds = {(event.node, event.kind) for event in move.events}
    assert {("", "CERTIFICATE_ENDED"), ("a", "PEER_BY_PIN"), ("b", "PEER_BY_PIN")} <= kinds


@pytest.mark.requires("uffd", "qemu", "root")
@pytest.mark.slow
async def test_a_linux_guest_under_qemu(ground: Ground, tmp_path: Path) -> None:
    """A year later in mid post-copy: its memory comes by pinned keys, and it proves all of it."""
    nodes = ground.cluster.nodes
    async with (
        ground.cluster.client() as client,
        small_guest_on(ground.cluster, client, disk=tmp_path / "disk.raw") as guest,
        contextlib.AsyncExitStack() as stack,
    ):
        stack.callback(ground.clock.move, 0)
        nodes["b"].agent.hooks.hold(POINT)
        begun = await client.migrate(guest.vm_id, "b")
        try:
            async with asyncio.timeout(WAIT_S):
                await nodes["b"].agent.hooks.reached(POINT)
            guest.follow("b", nodes["b"].record(guest.vm_id).epoch_prepared)
            assert not is_whole_at(guest, "b")
            ground.clock.move(YEAR_S)
            await restart(ground.cluster, nodes["a"].page_server)
        finally:
            nodes["b"].agent.hooks.release(POINT)
        await until(lambda: is_whole_at(guest, "b"))
        ground.clock.move(0)
        move = await ended(client, begun)
        assert move.phase == MigrationPhase.SUCCEEDED, describe(guest, move)
        assert await guest.prove() == [], describe(guest, move)


# --- on the wire ------------------------------------------------------------------------------


def needles(path: str, count: int = 64) -> list[bytes]:
    """Pieces of a guest's memory, no two alike: not of pages that are all one byte."""
    found: list[bytes] = []
    with Path(path).open("rb") as memory:
        while len(found) < count and (page := memory.read(PAGE)):
            piece = page[1024 : 1024 + 64]
            if len(set(piece)) > 8 and piece not in found:
                found.append(piece)
    return found


async def sniffed_move(cluster: Cluster) -> tuple[int, int, int]:
    """Move a guest: pieces of memory looked for, pieces found on the link, bytes that went by."""
    async with contextlib.AsyncExitStack() as stack:
        guest = await start_guest(cluster, stack)
        source, destination = cluster.nodes["a"], cluster.nodes["b"]
        destination.agent.hooks.hold(POINT)
        ports = {
            int(part.addresses[name].rpartition(":")[2])
            for part, name in ((source.page_server, "page"), (destination.agent, "grpc"))
        }
        with Sniffer("lo", ports) as sniffer:
            moving = asyncio.ensure_future(guest.move("b", on_step=go_on))
            try:
                async with asyncio.timeout(WAIT_S):
                    await destination.agent.hooks.reached(POINT)
                # Read where it is kept: the guest has gone on from this at b.
                sought = needles(source.record(guest.vm_id).ram_path)
            finally:
                destination.agent.hooks.release(POINT)
            move = await moving
        assert move.phase == MigrationPhase.SUCCEEDED, describe(guest, move)
        assert sniffer.dropped == 0
        found = sum(piece in sniffer.payload for piece in sought)
        return len(sought), found, len(sniffer.payload)


async def test_no_memory_is_readable_on_the_link(ground: Ground, tmp_path: Path) -> None:
    """And the same look at a move in plaintext finds it, so that it could be found."""
    require("net_raw")
    sought, found, byte_count = await sniffed_move(ground.cluster)
    assert sought >= 16
    assert byte_count >= 8 * MIB, "the memory went by here"
    assert found == 0
    async with running_cluster(tmp_path / "plain", hooked=True) as plain:
        sought, found, _ = await sniffed_move(plain)
    assert found >= 0.9 * sought
