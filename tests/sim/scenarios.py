# SPDX-License-Identifier: Apache-2.0
"""What may happen to a cluster, as data that Hypothesis can draw, shrink and print."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

from hypothesis import strategies as st

from services.common.errors import GodwitError
from services.fault_agent.drivers.api import VmmState
from services.orchestrator.main import Core
from tests.sim.cluster import VM, Cluster
from tests.sim.machinery import HungError


@dataclass(frozen=True, slots=True)
class Op:
    """One thing that an operator or fate does, and how long nothing else does then."""

    kind: str
    """What; see `_do`."""
    who: str = ""
    """To whom, a process or a way."""
    number: int = 0
    """How far, in the unit of the kind."""
    then_ms: int = 0
    """Virtual time until the next one."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """An example. Equal ones play alike."""

    seed: int
    """Of delays, losses and repetitions."""
    weather: str
    """How bad the network is: calm, lossy, late, wild."""
    down_ms: int
    """How long a process that died is away."""
    ops: tuple[Op, ...]

    async def __call__(self, cluster: Cluster) -> None:
        """Play it; faults that last are ended by `heal`."""
        network = cluster.network
        network.loss = {"lossy": 0.15, "wild": 0.1}.get(self.weather, 0.0)
        network.duplication = {"late": 0.3, "wild": 0.3}.get(self.weather, 0.0)
        network.lateness = {"late": 0.15, "wild": 0.1}.get(self.weather, 0.0)
        keeper = asyncio.get_running_loop().create_task(cluster.keep_running(self.down_ms / 1000))
        try:
            await _move(cluster)
            for op in self.ops:
                await _do(cluster, op)
                await asyncio.sleep(op.then_ms / 1000)
        finally:
            keeper.cancel()


async def _move(cluster: Cluster) -> None:
    """Ask for a move to the other node until it is admitted, for a while."""
    for _ in range(20):
        if cluster.core:
            with contextlib.suppress(GodwitError, TimeoutError):
                async with asyncio.timeout(30):
                    await cluster.ask(_ask_for_move(cluster.core))
                return
        await asyncio.sleep(0.1)


async def _ask_for_move(core: Core) -> None:
    vm = await core.fleet.get_vm(VM)
    await core.fleet.create_migration(VM, "b" if vm.node == "a" else "a")


async def _cancel_all(core: Core) -> None:
    views, _ = await core.fleet.list_migrations()
    for view in views:
        with contextlib.suppress(GodwitError):
            await core.fleet.cancel_migration(view.migration_id)


async def _do(cluster: Cluster, op: Op) -> None:
    process = cluster.processes.get(op.who)
    loop = asyncio.get_running_loop()
    match op.kind:
        case "crash":
            assert process is not None
            process.die_in = op.number
        case "kill":
            cluster.kill(op.who)
        case "twin":
            cluster.twin(op.number)
        case "cut":
            way = (op.who[0], op.who[1])
            cluster.network.cuts.add(way)
            loop.call_later(op.number, cluster.network.cuts.discard, way)
        case "page_server":
            host = cluster.hosts[op.who]
            host.page_server_up = False
            loop.call_later(op.number, setattr, host, "page_server_up", True)
        case "cancel":
            if cluster.core:
                with contextlib.suppress(GodwitError):
                    await cluster.ask(_cancel_all(cluster.core))
        case "move":
            await _move(cluster)
        case "backup":
            cluster.backup()
        case "restore":
            await cluster.restore()
            if op.number and cluster.restored:  # at once, or once somebody has noticed
                await cluster.rebuild()
        case "end_shell":
            for vmm in cluster.hosts[op.who].vmms.values():
                if vmm.now in (VmmState.INCOMING, VmmState.PAUSED) and vmm.arrived:
                    record = cluster.hosts[op.who].records[VM]
                    cluster.truth.lost_by_us |= record.epoch_activating == record.epoch_prepared
                    # Paused and decided: nobody lets it run, and nobody else may.
                    cluster.truth.lost_by_us |= vmm.now is VmmState.PAUSED
                    cluster.hosts[op.who].kill_vmm(vmm.process.pid)
        case _:
            raise AssertionError(op.kind)


_THEN_MS = st.one_of(st.integers(0, 60), st.integers(0, 3000))
_WAYS = st.sampled_from(["oa", "ao", "ob", "bo", "ab", "ba"])

_PARTS: dict[str, st.SearchStrategy[Op]] = {
    "crash": st.builds(
        Op,
        st.just("crash"),
        st.sampled_from("oab"),
        st.one_of(st.integers(0, 15), st.integers(0, 120)),
        _THEN_MS,
    ),
    "kill": st.builds(Op, st.just("kill"), st.sampled_from("oab"), st.just(0), _THEN_MS),
    "twin": st.builds(Op, st.just("twin"), st.just(""), st.integers(1, 20), _THEN_MS),
    "cut": st.builds(Op, st.just("cut"), _WAYS, st.integers(1, 12), _THEN_MS),
    "page_server": st.builds(
        Op, st.just("page_server"), st.sampled_from("ab"), st.integers(1, 8), _THEN_MS
    ),
    "cancel": st.builds(Op, st.just("cancel"), st.just(""), st.just(0), _THEN_MS),
    "move": st.builds(Op, st.just("move"), st.just(""), st.just(0), _THEN_MS),
    "backup": st.builds(Op, st.just("backup"), st.just(""), st.just(0), _THEN_MS),
    "restore": st.builds(Op, st.just("restore"), st.just(""), st.integers(0, 1), _THEN_MS),
    "end_shell": st.builds(Op, st.just("end_shell"), st.sampled_from("ab"), st.just(0), _THEN_MS),
}
WEATHER = ("calm", "lossy", "late", "wild")


def scenarios(
    *kinds: str, weather: tuple[str, ...] = WEATHER, at_least: int = 0
) -> st.SearchStrategy[Scenario]:
    """Scenarios of these kinds of things; of all, if none is named."""
    ops = st.one_of([_PARTS[kind] for kind in kinds or _PARTS])
    return st.builds(
        Scenario,
        st.integers(0, 2**32 - 1),
        st.sampled_from(weather),
        st.sampled_from([20, 200, 2000]),
        st.lists(ops, min_size=at_least, max_size=8).map(tuple),
    )


SCENARIOS = scenarios()

__all__ = ["SCENARIOS", "HungError", "Op", "Scenario", "scenarios"]
