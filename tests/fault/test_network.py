# SPDX-License-Identifier: Apache-2.0
"""Promise: whatever the network does to a move, one guest is left, whole, without a command.

Real processes on three hosts, a real guest that verifies its pages, counters and heartbeats by
itself. Past the decision it arrives; before it, it arrives or runs on at its source. Each test also
proves that its fault took place: the link must have lost or delayed packets.

The short form is part of `make test`, the rest is `make test-network`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import pytest
from godwit.models import Migration, MigrationPhase

from tests.fault.conftest import Start, Traveller
from tests.harness import link
from tests.harness.linked_cluster import LinkedCluster

pytestmark = [
    pytest.mark.requires(*link.NEEDS, "uffd"),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(900),
]

WAIT_S = 120.0
BULK = 4 << 20
"""Bytes a second of the bulk lane: so that memory is still on its way when the fault comes."""

Fault = Callable[[LinkedCluster], Awaitable[object]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """What happens to the network in mid post-copy, for how long, and what shows that it did."""

    begin: Fault
    length_s: float
    links: tuple[str, ...] = ("a-b",)
    is_noticed: bool = True
    """The move says POSTCOPY_PAUSED meanwhile."""


async def _sleep(seconds: float) -> None:
    # The length of a fault is the fault: not a synchronisation.
    await asyncio.sleep(seconds)


def cut(*names: str, sender: str = "") -> Fault:
    """Cut links, all of them, or what `sender` sends."""

    async def begin(linked: LinkedCluster) -> None:
        for name in names:
            await linked.links[name].cut(sender)

    return begin


def shape(**values: float) -> Fault:
    """Make the link between the nodes bad, both ways."""

    async def begin(linked: LinkedCluster) -> None:
        await linked.links["a-b"].shape(**values)  # type: ignore[arg-type]

    return begin


async def _harmed_count(linked: LinkedCluster, names: tuple[str, ...]) -> int:
    """Packets that never arrived, or late."""
    counters = [await linked.links[name].counters() for name in names]
    return sum(
        c.cut + c.lost + c.overflowed + c.delayed for each in counters for c in each.values()
    )


async def _in_phase(linked: LinkedCluster, migration_id: str, *phases: MigrationPhase) -> None:
    async with asyncio.timeout(WAIT_S):
        while (await linked.client.migration(migration_id)).phase not in phases:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def _go(_: Migration) -> bool:
    return False


async def _post_copy_under(traveller: Traveller, trouble: Trouble) -> None:
    linked, guest = traveller.linked, traveller.guest
    running = asyncio.Event()
    ids: list[str] = []

    async def on_step(migration: Migration) -> bool:
        if migration.phase == MigrationPhase.POSTCOPY:
            ids[:] = [migration.migration_id]
            running.set()
        return False

    before = await _harmed_count(linked, trouble.links)
    async with asyncio.TaskGroup() as group:
        moving = group.create_task(
            guest.move(
                "b",
                on_step=on_step,
                bulk_bytes_per_s_max=BULK,
                timeout_s=trouble.length_s + 3 * WAIT_S,
            )
        )
        async with asyncio.timeout(WAIT_S):
            await running.wait()
        await trouble.begin(linked)
        if trouble.is_noticed:
            await _in_phase(linked, ids[0], MigrationPhase.POSTCOPY_PAUSED)
        await _sleep(trouble.length_s)
        await linked.net.reset()
        last = await moving
    assert await _harmed_count(linked, trouble.links) > before, "the fault did not take place"
    await traveller.arrive(last)


SHORT = {
    "cut for a second": Trouble(begin=cut("a-b"), length_s=1, is_noticed=False),
    "only the source is heard": Trouble(begin=cut("a-b", sender="b"), length_s=0.5),
    "only the destination is heard": Trouble(begin=cut("a-b", sender="a"), length_s=0.5),
    "lossy": Trouble(begin=shape(loss=0.05), length_s=1.5, is_noticed=False),
    "the orchestrator is cut off": Trouble(
        begin=cut("o-a", "o-b"), length_s=5, links=("o-a", "o-b"), is_noticed=False
    ),
}
LONG = {
    "cut for half a minute": Trouble(begin=cut("a-b"), length_s=30),
    "only the source is heard, long": Trouble(begin=cut("a-b", sender="b"), length_s=20),
    "only the destination is heard, long": Trouble(begin=cut("a-b", sender="a"), length_s=20),
    "slow": Trouble(
        begin=shape(rate_bytes_per_s=1 << 20, queue_bytes_max=256 << 10),
        length_s=20,
        is_noticed=False,
    ),
    "slow, far and lossy": Trouble(
        begin=shape(
            rate_bytes_per_s=1 << 20, queue_bytes_max=256 << 10,
            delay_ms=40, jitter_ms=20, loss=0.02,
        ),
        length_s=20,
        is_noticed=False,
    ),
    "very lossy": Trouble(begin=shape(loss=0.3), length_s=20, is_noticed=False),
    "the orchestrator is cut off, long": Trouble(
        begin=cut("o-a", "o-b"), length_s=30, links=("o-a", "o-b"), is_noticed=False
    ),
    "the orchestrator hears nobody": Trouble(
        begin=cut("o-a", "o-b", sender="o"), length_s=10, links=("o-a", "o-b"), is_noticed=False
    ),
    "everything is cut": Trouble(
        begin=cut("o-a", "o-b", "a-b"), length_s=15, links=("o-a", "o-b", "a-b"), is_noticed=False
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHORT)
async def test_post_copy_goes_on(start: Start, name: str) -> None:
    await _post_copy_under(await start(), SHORT[name])


@pytest.mark.long
@pytest.mark.parametrize("name", LONG)
async def test_post_copy_goes_on_after_long_trouble(start: Start, name: str) -> None:
    await _post_copy_under(await start(memory_mib=128, workload_mib=96), LONG[name])


@pytest.mark.long
async def test_post_copy_goes_on_after_five_minutes(start: Start) -> None:
    trouble = Trouble(begin=cut("a-b"), length_s=300)
    await _post_copy_under(await start(), trouble)


# --- around the decision --------------------------------------------------------------------------


async def _move_with_fault_at(
    traveller: Traveller, hooks: str, point: str, fault: Fault, *, until: Fault
) -> Migration:
    """Hold a part at a point, break the network there, let the part go, mend after `until`."""
    linked = traveller.linked
    cluster = linked.cluster
    part = cluster.orchestrator if hooks == "o" else cluster.nodes[hooks].agent
    part.hooks.hold(point)
    async with asyncio.TaskGroup() as group:
        moving = group.create_task(traveller.guest.move("b", on_step=_go))
        async with asyncio.timeout(WAIT_S):
            await part.hooks.reached(point)
        await fault(linked)
        part.hooks.release(point)
        await until(linked)
        await linked.net.reset()
        return await moving


async def test_cut_in_the_device_state_and_the_source_runs_on(
    start: Start, linked: LinkedCluster
) -> None:
    """The state's last bytes vanish: given up; the guest runs on, and moves when asked again."""
    traveller = await start()

    async def until_the_guest_runs(linked: LinkedCluster) -> None:
        # Without the link: what is undone needs the way from the orchestrator alone.
        migration = (await linked.client.migrations(traveller.guest.vm_id))[0]
        await _in_phase(linked, migration.migration_id, MigrationPhase.FAILED)

    last = await _move_with_fault_at(
        traveller, "a", "agent.transfer.after_save", cut("a-b"), until=until_the_guest_runs
    )
    await traveller.stay(last)
    await traveller.arrive(await traveller.guest.move("b", on_step=_go))


async def test_no_way_between_the_nodes_and_the_guest_is_not_paused(
    start: Start, linked: LinkedCluster
) -> None:
    """The connection was made at Prepare and looks alive: it is asked before the guest stops."""
    traveller = await start()

    async def until_it_has_failed(linked: LinkedCluster) -> None:
        migration = (await linked.client.migrations(traveller.guest.vm_id))[0]
        await _in_phase(linked, migration.migration_id, MigrationPhase.FAILED)

    last = await _move_with_fault_at(
        traveller, "o", "orchestrator.pause.before", cut("a-b"), until=until_it_has_failed
    )
    hooks = linked.cluster.nodes["a"].agent.hooks
    assert not hooks.is_reached("agent.pause.after"), "its vCPUs were stopped"
    await traveller.stay(last)


def after(seconds: float) -> Fault:
    async def wait(_: LinkedCluster) -> None:
        await _sleep(seconds)

    return wait


@pytest.mark.parametrize("point", ["decision.before", "decision.after"])
async def test_cut_off_around_the_decision(start: Start, point: str) -> None:
    """LOADED at the destination, the orchestrator decides and nobody hears of it: both wait."""
    traveller = await start()
    last = await _move_with_fault_at(
        traveller, "o", f"orchestrator.{point}", cut("o-a", "o-b"), until=after(4)
    )
    await traveller.arrive(last)


@pytest.mark.long
@pytest.mark.parametrize("names", [("o-a",), ("o-b",), ("a-b",), ("o-a", "o-b", "a-b")])
@pytest.mark.parametrize(
    ("hooks", "point"),
    [
        ("a", "agent.pause.after"),
        ("a", "agent.transfer.after_save"),
        ("b", "agent.load.before_loaded"),
        ("b", "agent.load.after_loaded"),
        ("o", "orchestrator.decision.before"),
        ("o", "orchestrator.decision.after"),
        ("b", "agent.activate.after_activating"),
        ("b", "agent.activate.after_cont"),
        ("a", "agent.seal.before"),
    ],
)
async def test_cut_anywhere_in_the_switchover(
    start: Start, hooks: str, point: str, names: tuple[str, ...]
) -> None:
    """Whatever is cut, wherever: it arrives, or it runs on at its source."""
    traveller = await start()
    last = await _move_with_fault_at(traveller, hooks, point, cut(*names), until=after(8))
    if last.phase == MigrationPhase.FAILED:
        await traveller.stay(last)
    else:
        await traveller.arrive(last)
