# SPDX-License-Identifier: Apache-2.0
"""What may happen to a cluster, as data that Hypothesis can draw, shrink and print."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
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
            ops = list(self.ops)
            # What waits for a decision is there before the first one.
            while ops and ops[0].kind.endswith("_at_commit"):
                await _do(cluster, ops.pop(0))
            await _move(cluster)
            for op in ops:
                await _do(cluster, op)
                await asyncio.sleep(op.then_ms / 1000)
            if any(op.kind.endswith("_at_commit") for op in self.ops):
                await asyncio.sleep(DECIDES_S)
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


async def _recover_all(core: Core) -> None:
    views, _ = await core.fleet.list_migrations()
    for view in views:
        with contextlib.suppress(GodwitError):
            await core.fleet.recover_migration(view.migration_id)


async def _abandon_all(core: Core) -> None:
    """As a person would who has read no runbook; the refusals are what is tested."""
    views, _ = await core.fleet.list_migrations()
    for view in views:
        with contextlib.suppress(GodwitError):
            await core.fleet.abandon_migration(view.migration_id, epoch=view.epoch, confirm=True)


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
        case "recover" | "abandon":
            order = _recover_all if op.kind == "recover" else _abandon_all
            for again in range(op.number + 1):
                await asyncio.sleep(0.5 if again else 0)
                if cluster.core and not cluster.truth.abandoned:
                    with contextlib.suppress(GodwitError):
                        await cluster.ask(order(cluster.core))
        case "move":
            await _move(cluster)
        case "backup":
            cluster.backup()
        case "restore":
            await cluster.restore()
            if op.number and cluster.restored:  # at once, or once somebody has noticed
                await cluster.rebuild()
        case "end_shell" | "end_paused" | "end_vmm":
            for vmm in cluster.hosts[op.who].vmms.values():
                if vmm.now in _ENDED_BY[op.kind] and (vmm.arrived or op.kind != "end_shell"):
                    cluster.hosts[op.who].strike(vmm)
        case "reboot":
            _reboot(cluster, op.who)
        case "end_at_commit":
            _at_commit(cluster, op.number, lambda: _end_paused(cluster, op.who))
        case "reboot_at_commit":
            _at_commit(cluster, op.number, lambda: _reboot(cluster, op.who))
        case _:
            raise AssertionError(op.kind)


DECIDES_S = 3.0
"""In this time most moves are decided."""


def _reboot(cluster: Cluster, name: str) -> None:
    cluster.kill(name)
    cluster.hosts[name].reboot()


def _end_paused(cluster: Cluster, name: str) -> None:
    for vmm in cluster.hosts[name].vmms.values():
        if vmm.now in _ENDED_BY["end_paused"]:
            cluster.hosts[name].strike(vmm)


def _at_commit(cluster: Cluster, after_ms: int, act: Callable[[], None]) -> None:
    def strike() -> None:
        if not cluster.healing:
            act()

    def begin() -> None:
        asyncio.get_running_loop().call_later(after_ms / 1000, strike)

    cluster.witness.at_commit.append(begin)


_ENDED_BY = {
    "end_shell": (VmmState.INCOMING, VmmState.PAUSED),
    "end_paused": (VmmState.INCOMING, VmmState.PAUSED),
    "end_vmm": (VmmState.INCOMING, VmmState.PAUSED, VmmState.RUNNING),
}
"""In which states a VMM is killed. Most guests that die in mid-run tell nothing."""

_THEN_MS = st.one_of(st.integers(0, 60), st.integers(0, 3000))
_SOON_MS = st.one_of(st.integers(0, 12), st.integers(0, 300))
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
    "recover": st.builds(Op, st.just("recover"), st.just(""), st.just(0), _THEN_MS),
    "abandon": st.builds(Op, st.just("abandon"), st.just(""), st.integers(0, 12), _THEN_MS),
    "move": st.builds(Op, st.just("move"), st.just(""), st.just(0), _THEN_MS),
    "backup": st.builds(Op, st.just("backup"), st.just(""), st.just(0), _THEN_MS),
    "restore": st.builds(Op, st.just("restore"), st.just(""), st.integers(0, 1), _THEN_MS),
    "end_paused": st.builds(Op, st.just("end_paused"), st.sampled_from("ab"), st.just(0), _THEN_MS),
    "end_vmm": st.builds(Op, st.just("end_vmm"), st.sampled_from("ab"), st.just(0), _THEN_MS),
    "reboot": st.builds(Op, st.just("reboot"), st.sampled_from("ab"), st.just(0), _THEN_MS),
    "end_at_commit": st.builds(
        Op, st.just("end_at_commit"), st.sampled_from("ab"), _SOON_MS, _THEN_MS
    ),
    "reboot_at_commit": st.builds(
        Op, st.just("reboot_at_commit"), st.sampled_from("ab"), _SOON_MS, _THEN_MS
    ),
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
