# SPDX-License-Identifier: Apache-2.0
"""A whole cluster with a small real guest, for integration tests.

    @pytest_asyncio.fixture(scope="module", loop_scope="module")
    async def guest(tmp_path_factory):
        async with small_guest(tmp_path_factory.mktemp("cluster")) as guest:
            yield guest

    @pytest.mark.asyncio(loop_scope="module")
    async def test_...(guest):
        await migrate(guest, other(guest))

The guest takes some ten seconds to boot, so a module shares one; each test leaves it running on
some node, all parts running and no hook ordered (`settle`). Points to hold, fail or kill a part at:
`guest.cluster.nodes["a"].agent.hooks`, docs/testing.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path

import pytest
from godwit.client import AsyncClient
from godwit.errors import GodwitClientError
from godwit.models import Migration, MigrationPhase

from services.demo import guest_image
from services.demo.cluster import Cluster, running_cluster
from services.demo.console import ConsoleFollower
from services.demo.errors import KernelUnavailableError, ToolMissingError
from services.demo.live_guest import LiveGuest, make_spec
from services.demo.network import Network, demo_network
from services.demo.run import cache_directory
from services.demo.verdict import Setup
from tests.harness.require import missing, required_names

VM_ID = "guest"
MEMORY_MIB = 192
WORKLOAD_MIB = 64
PHASE_S_MAX = 60.0


def small_image() -> guest_image.GuestImage:
    """What the guest boots from; a skip where this machine cannot make it and need not."""
    try:
        return guest_image.build(cache_directory())
    except (KernelUnavailableError, ToolMissingError) as error:
        if "qemu" in required_names(os.environ):
            raise
        pytest.skip(str(error))


@asynccontextmanager
async def small_guest(
    directory: Path,
    *,
    memory_mib: int = MEMORY_MIB,
    workload_mib: int = WORKLOAD_MIB,
    dirty_rate: int = 1000,
    vcpus: int = 1,
    environment: Mapping[str, str] | None = None,
) -> AsyncIterator[LiveGuest]:
    """A cluster below `directory`, and on its node a a guest whose workload is up.

    With a disk; with a network card where this machine lets us make one (`guest.setup.net`).
    """
    await asyncio.to_thread(small_image)  # a skip, before anything is started
    async with (
        running_cluster(directory / "cluster", environment=environment, hooked=True) as cluster,
        cluster.client() as client,
        small_guest_on(
            cluster,
            client,
            disk=directory / "disk.raw",
            memory_mib=memory_mib,
            workload_mib=workload_mib,
            dirty_rate=dirty_rate,
            vcpus=vcpus,
        ) as guest,
    ):
        yield guest


@asynccontextmanager
async def small_guest_on(
    cluster: Cluster,
    client: AsyncClient,
    *,
    disk: Path,
    memory_mib: int = MEMORY_MIB,
    workload_mib: int = WORKLOAD_MIB,
    dirty_rate: int = 1000,
    vcpus: int = 1,
) -> AsyncIterator[LiveGuest]:
    """The same on node a of a cluster that is there; `disk` is made. At the end it is stopped."""
    image = await asyncio.to_thread(small_image)
    async with AsyncExitStack() as stack:
        network: Network | None = None
        if missing("tap") is None and missing("netns") is None:
            network = stack.enter_context(demo_network())
        guest_image.make_disk(disk)
        stack.callback(disk.unlink)
        follower = await stack.enter_async_context(ConsoleFollower())
        workload = guest_image.Workload(
            mib=workload_mib,
            dirty_rate=dirty_rate,
            sweep_ms=1000,
            disk="vda",
            address=network.guest_address if network else None,
            peer=network.bridge_address if network else None,
        )
        guest = await LiveGuest.start(
            make_spec(
                VM_ID,
                image=image,
                workload=workload,
                memory_bytes=memory_mib << 20,
                vcpus=vcpus,
                disk=disk,
                network=network,
            ),
            "a",
            setup=Setup(
                vmm="QEMU",
                guest=f"Linux {image.release}",
                memory_bytes=memory_mib << 20,
                page_count=workload.page_count,
                net=network is not None,
            ),
            cluster=cluster,
            client=client,
            follower=follower,
        )
        try:
            await guest.wait_filled()
            yield guest
        finally:
            with contextlib.suppress(GodwitClientError):
                await client.stop_vm(VM_ID)


async def node_of(guest: LiveGuest) -> str:
    """Where the store places it."""
    return (await guest.client.vm(guest.vm_id)).node


async def other_node(guest: LiveGuest) -> str:
    """Where it is not."""
    here = await node_of(guest)
    return next(name for name in guest.cluster.nodes if name != here)


async def migrate(guest: LiveGuest, destination: str, **options: int) -> Migration:
    """Move it and wait for the end; the test fails unless it succeeds."""

    async def go_on(_: Migration) -> bool:
        return False

    last = await guest.move(destination, on_step=go_on, **options)
    assert last.phase == MigrationPhase.SUCCEEDED, describe(guest, last)
    return last


async def wait_phase(guest: LiveGuest, migration_id: str, phases: Collection[str]) -> Migration:
    """Wait until a migration is in one of `phases`; the test fails if it ends elsewhere."""
    async with (
        asyncio.timeout(PHASE_S_MAX),
        aclosing(guest.client.watch(migration_id)) as steps,
    ):
        async for step in steps:
            if step.phase in phases:
                return step
    raise AssertionError(f"{migration_id} was never in {sorted(phases)}")


def settle(guest: LiveGuest) -> None:
    """Let go of every hook: for the end of a test, whatever became of it."""
    for part in guest.cluster.parts:
        # Not the directory itself: a confined page server may write to this one, not to another.
        for path in part.hooks.directory.iterdir():
            path.unlink()


def describe(guest: LiveGuest, migration: Migration) -> str:
    """What a failed assertion should show: the history, and the ends of the logs."""
    history = " → ".join(step.phase for step in migration.transitions)
    logs = "\n".join(
        f"--- {part.name}\n{part.log.read_text(errors='replace')[-1500:]}"
        for part in guest.cluster.parts
    )
    return f"{migration.migration_id}: {history}: {migration.reason}: {migration.message}\n{logs}"
