# SPDX-License-Identifier: Apache-2.0
"""The faults: how each strikes, and which outcomes are right (docs/design/handover.md says why)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Coroutine
from typing import Any

from services.demo.cluster import NodeParts
from services.demo.part import Part
from services.fault_agent import processes
from tests.chaos.case import Case, Kind, Outcome
from tests.chaos.ground import Mount

MOVED = frozenset({Outcome.MOVED})
STAYED = frozenset({Outcome.STAYED})
EITHER = MOVED | STAYED
ATTENTION = frozenset({Outcome.ATTENTION})
ENDED = frozenset({Outcome.ENDED})

LINKS = frozenset({"links"})
MOUNTS = frozenset({"mounts"})
CLOCK = frozenset({"clock"})

SLOW = (16, 32)
CRAWL = (2,)

WAIT_POINT = "agent.activate.after_cont"
DECIDED = "orchestrator.decision.after"

Strike = Callable[[Case], Coroutine[Any, Any, None]]
Choose = Callable[[Case], Part]


def source_agent(case: Case) -> Part:
    """The agent that the guest leaves."""
    return case.source.agent


def destination_agent(case: Case) -> Part:
    """The agent that it comes to."""
    return case.destination.agent


def source_page_server(case: Case) -> Part:
    """The page server that its memory comes from."""
    return case.source.page_server


def orchestrator(case: Case) -> Part:
    """The orchestrator."""
    return case.orchestrator


async def reached(part: Part, point: str) -> None:
    """Return once a part has reached a point; the end of the migration ends the wait."""
    await part.hooks.reached(point)


async def some_time(case: Case, s_max: float) -> None:
    """Return after a random time."""
    delay_s = case.random.uniform(0, s_max)
    case.detail += f"+{delay_s * 1000:.0f} ms"
    await asyncio.sleep(delay_s)


async def a_while(case: Case, s_max: float) -> None:
    """As long as the fault lasts."""
    await some_time(case, s_max / 3 if case.brief else s_max)


async def anytime(case: Case) -> None:
    """A random moment of the move: while it is prepared and decided, or while memory comes."""
    if case.random.random() < 0.5:
        case.detail = "asked"
        await some_time(case, 0.4)
    else:
        await running_there(case)


async def running_there(case: Case) -> None:
    """A random moment while the guest runs at its destination and memory comes."""
    case.detail = "post-copy"
    await reached(case.destination.agent, WAIT_POINT)
    await some_time(case, 0.6)


# --- processes killed ---


def killed(choose: Choose, moment: Strike) -> Strike:
    """`kill -9`; the keeper starts it again, its parent if it has one."""

    async def strike(case: Case) -> None:
        await moment(case)
        case.struck()
        signal_worker(choose(case), signal.SIGKILL)

    return strike


def killed_with_parent(choose: Choose, moment: Strike) -> Strike:
    """`kill -9` to all of it; the keeper starts it again."""

    async def strike(case: Case) -> None:
        await moment(case)
        case.struck()
        choose(case).signal(signal.SIGKILL)

    return strike


def signal_worker(part: Part, number: signal.Signals) -> None:
    """Send the process that does the work a signal; nothing if there is none just now."""
    with contextlib.suppress(ProcessLookupError):
        if part.is_running and (pid := part.worker_pid):
            os.kill(pid, number)


def exits_at(choose: Choose, points: tuple[str, ...]) -> Callable[[Case], None]:
    """The process dies at one of these points; the case notices it by the keeper."""

    def arm(case: Case) -> None:
        case.detail = case.random.choice(points)
        choose(case).hooks.exit(case.detail)

    return arm


def rolled_back(
    arm: Callable[[Case], None], at: str = "agent.load.before_loaded"
) -> Callable[[Case], None]:
    """The move fails as well, at a point of some part: the fault strikes what undoes it."""

    def both(case: Case) -> None:
        part = case.orchestrator if at.startswith("orchestrator.") else case.destination.agent
        part.hooks.fail(at)
        arm(case)

    return both


async def nothing(_case: Case) -> None:
    """It strikes by itself."""


# --- processes stopped ---


def stopped(choose: Choose, moment: Strike, s_max: float) -> Strike:
    """SIGSTOP, for a random time."""

    async def strike(case: Case) -> None:
        await moment(case)
        part = choose(case)
        signal_worker(part, signal.SIGSTOP)
        case.struck()
        try:
            await a_while(case, s_max)
        finally:
            case.back()
            signal_worker(part, signal.SIGCONT)

    return strike


# --- VMMs killed ---


def vmm_killed(node: Callable[[Case], NodeParts], moment: Strike) -> Strike:
    """The VMM of the guest is killed on one node."""

    async def strike(case: Case) -> None:
        await moment(case)
        await kill_vmm(case, node(case))

    return strike


async def kill_vmm(case: Case, node: NodeParts) -> None:
    """Kill it, if it is there; dead on return: one that is dying could still be let run."""
    process = case.guest.process(node.name)
    if process is not None and processes.is_alive(process):
        case.struck()
        await processes.kill(process)


def vmm_killed_at(
    choose: Choose, point: str, node: Callable[[Case], NodeParts]
) -> tuple[Callable[[Case], None], Strike]:
    """A part is held at a point, the VMM on a node killed, the part let go."""

    def arm(case: Case) -> None:
        case.detail = point
        choose(case).hooks.hold(point)

    async def strike(case: Case) -> None:
        part = choose(case)
        try:
            await reached(part, point)
            await kill_vmm(case, node(case))
        finally:
            part.hooks.release(point)

    return arm, strike


def source(case: Case) -> NodeParts:
    """Where the guest leaves."""
    return case.source


def destination(case: Case) -> NodeParts:
    """Where it comes to."""
    return case.destination


def _vmm_kind(
    name: str,
    choose: Choose,
    point: str,
    node: Callable[[Case], NodeParts],
    right: frozenset[Outcome],
) -> Kind:
    arm, strike = vmm_killed_at(choose, point, node)
    return Kind(name=name, strike=strike, arm=arm, right=right, slow=SLOW)


# --- the guest ---


async def power_off(case: Case) -> None:
    """The guest powers itself off in mid post-copy."""
    await running_there(case)
    async with case.guest.control(case.destination_name) as control:
        await control.ask("power-off")
        case.struck()


# --- the network ---


def worse(
    moment: Strike, make: Callable[[Case], Coroutine[Any, Any, object]], s_max: float
) -> Strike:
    """Links are made worse for a random time, then perfect again."""

    async def strike(case: Case) -> None:
        await moment(case)
        try:
            await make(case)
            case.struck()
            await a_while(case, s_max)
        finally:
            await case.world.ground.network.reset()
            case.back()

    return strike


async def cut(case: Case) -> None:
    """Between the nodes, both ways: packets vanish, nobody is told."""
    await case.world.ground.network.links["a-b"].cut()


async def cut_one_way(case: Case) -> None:
    """Between the nodes, one way."""
    sender = case.random.choice("ab")
    case.detail += f" from {sender}"
    await case.world.ground.network.links["a-b"].cut(sender)


async def lossy(case: Case) -> None:
    """Slow, late and lossy between the nodes."""
    loss = case.random.choice((0.02, 0.1))
    case.detail += f" loss {loss}"
    await case.world.ground.network.links["a-b"].shape(
        delay_ms=5, jitter_ms=3, loss=loss, rate_bytes_per_s=20_000_000
    )


async def orchestrator_cut_off(case: Case) -> None:
    """The orchestrator reaches nobody."""
    await case.world.ground.network.cut_off("o")


async def one_node_unheard(case: Case) -> None:
    """Between the orchestrator and one node, both ways or one."""
    node, sender = case.random.choice("ab"), case.random.choice(("", "node", "o"))
    case.detail += f" o-{node} {sender}"
    await case.world.ground.network.links[f"o-{node}"].cut(node if sender == "node" else sender)


# --- disks, memory, clocks ---


def full(moment: Strike, choose: Callable[[Case], Mount], s_max: float) -> Strike:
    """A file system has no room for a random time."""

    async def strike(case: Case) -> None:
        await moment(case)
        mount = choose(case)
        mount.fill()
        case.struck()
        try:
            await a_while(case, s_max)
        finally:
            mount.free()
            case.back()

    return strike


def store_disk(case: Case) -> Mount:
    """Under the orchestrator's store."""
    return case.world.ground.mounts["store"]


def node_disk(case: Case) -> Mount:
    """Under an agent's journal."""
    node = case.random.choice("ab")
    case.detail += f" {node}"
    return case.world.ground.mounts[node]


def memory(case: Case) -> Mount:
    """Under the guests' memory."""
    return case.world.ground.mounts["ram"]


async def clock_jumps(case: Case) -> None:
    """The wall clock of one part jumps, and back at the end of the case."""
    await anytime(case)
    part = case.random.choice(case.world.cluster.parts)
    jump_s = case.random.choice((-86400, -3600, -30, 30, 3600, 86400))
    case.detail += f" {part.name} {jump_s} s"
    case.world.ground.set_clock(part, jump_s)
    case.struck()


# --- the table ---

AGENT_LEAVES = (
    "agent.pause.after",
    "agent.transfer.after_save",
    "agent.seal.before",
    "agent.seal.before_kill",
    "agent.release.before",
)
AGENT_ARRIVES = (
    "agent.prepare.before_prepared",
    "agent.load.before_loaded",
    "agent.load.after_loaded",
    "agent.activate.before_activating",
    "agent.activate.after_activating",
    "agent.activate.before_cont",
    "agent.activate.after_cont",
    "agent.release.before",
)
BEFORE = (
    *("orchestrator.pending.done", "orchestrator.validating.entered"),
    *("orchestrator.validating.done", "orchestrator.reserving.entered"),
    *("orchestrator.reserving.done", "orchestrator.preparing.entered"),
    *("orchestrator.prepare.source_done", "orchestrator.preparing.done"),
    *("orchestrator.ready.entered", "orchestrator.ready.done"),
    *("orchestrator.switchover.entered", "orchestrator.pause.before"),
    *("orchestrator.pause.after", "orchestrator.transfer.after"),
    "orchestrator.decision.before",
)
AFTER = (
    *("orchestrator.decision.after", "orchestrator.switchover.done"),
    *("orchestrator.committed.entered", "orchestrator.activate.before"),
    *("orchestrator.activate.after", "orchestrator.committed.done"),
    *("orchestrator.postcopy.entered", "orchestrator.seal.before", "orchestrator.seal.after"),
    *("orchestrator.postcopy.done", "orchestrator.finalizing.entered"),
    *("orchestrator.release.before", "orchestrator.release.side_source"),
    *("orchestrator.release.side_destination", "orchestrator.finalizing.done"),
    "orchestrator.succeeded.entered",
)
UNDOING = (
    *("orchestrator.switchover.done", "orchestrator.rolling_back.entered"),
    *("orchestrator.decision.before", "orchestrator.decision.after"),
    *("orchestrator.rolling_back.done", "orchestrator.aborted.entered"),
    *("orchestrator.undo.destination_done", "orchestrator.resume.before"),
    *("orchestrator.resume.after", "orchestrator.aborted.done", "orchestrator.failed.entered"),
)

KINDS = (
    Kind(
        name="page-server-killed",
        strike=killed(source_page_server, anytime),
        right=EITHER,
        slow=SLOW,
    ),
    Kind(
        name="page-server-stopped",
        strike=stopped(source_page_server, running_there, 3.0),
        right=MOVED,
        slow=SLOW,
    ),
    Kind(
        name="destination-agent-killed",
        strike=killed(destination_agent, running_there),
        right=MOVED,
        slow=SLOW,
    ),
    Kind(
        name="destination-agent-killed-with-parent",
        strike=killed_with_parent(destination_agent, running_there),
        right=MOVED,
        slow=SLOW,
    ),
    Kind(
        name="destination-agent-dies-at-point",
        strike=nothing,
        arm=exits_at(destination_agent, AGENT_ARRIVES),
        right=EITHER,
        slow=SLOW,
    ),
    Kind(
        name="destination-agent-dies-undoing",
        strike=nothing,
        arm=rolled_back(exits_at(destination_agent, ("agent.abort.before",))),
        right=STAYED,
    ),
    Kind(
        name="destination-agent-stopped",
        strike=stopped(destination_agent, anytime, 4.0),
        right=EITHER,
        slow=SLOW,
    ),
    Kind(
        name="source-agent-killed",
        strike=killed(source_agent, anytime),
        right=EITHER,
        slow=SLOW,
    ),
    Kind(
        name="source-agent-dies-at-point",
        strike=nothing,
        arm=exits_at(source_agent, AGENT_LEAVES),
        right=EITHER,
    ),
    Kind(
        name="source-agent-dies-undoing",
        strike=nothing,
        # Before the pause: a guest that was paused is resumed, and nothing is aborted.
        arm=rolled_back(
            exits_at(source_agent, ("agent.abort.before",)), "orchestrator.prepare.source_done"
        ),
        right=STAYED,
    ),
    Kind(
        name="source-agent-stopped",
        strike=stopped(source_agent, anytime, 4.0),
        right=EITHER,
        slow=SLOW,
    ),
    Kind(
        name="orchestrator-killed",
        strike=killed(orchestrator, anytime),
        right=EITHER,
        slow=SLOW,
    ),
    Kind(
        name="orchestrator-dies-before-decision",
        strike=nothing,
        arm=exits_at(orchestrator, BEFORE),
        right=EITHER,
    ),
    Kind(
        name="orchestrator-dies-after-decision",
        strike=nothing,
        arm=exits_at(orchestrator, AFTER),
        right=MOVED,
    ),
    Kind(
        name="orchestrator-dies-undoing",
        strike=nothing,
        arm=rolled_back(exits_at(orchestrator, UNDOING)),
        right=STAYED,
    ),
    Kind(
        name="orchestrator-stopped",
        strike=stopped(orchestrator, anytime, 4.0),
        right=EITHER,
        slow=SLOW,
    ),
    # The state is loaded, the memory is a file: nothing of the guest died with its VMM.
    _vmm_kind(
        "source-vmm-killed-after-load",
        orchestrator,
        "orchestrator.decision.before",
        source,
        MOVED,
    ),
    # The guest dies with its VMM, as it would have without a migration, unless its state was saved.
    _vmm_kind(
        "source-vmm-killed-saving",
        source_agent,
        "agent.pause.after",
        source,
        EITHER | {Outcome.GONE},
    ),
    _vmm_kind("source-vmm-killed-after-decision", orchestrator, DECIDED, source, MOVED),
    _vmm_kind(
        "destination-vmm-killed-before-load", source_agent, "agent.pause.after", destination, STAYED
    ),
    _vmm_kind(
        "destination-vmm-killed-after-load",
        destination_agent,
        "agent.load.after_loaded",
        destination,
        STAYED,
    ),
    # It never ran there: it is given back (ADR 7).
    _vmm_kind("destination-vmm-killed-after-decision", orchestrator, DECIDED, destination, STAYED),
    Kind(
        name="destination-vmm-killed-running",
        strike=vmm_killed(destination, running_there),
        # Gone: all of its memory had arrived by then, and the migration was over.
        right=ATTENTION | {Outcome.GONE},
        slow=SLOW,
    ),
    Kind(
        name="link-cut",
        strike=worse(anytime, cut, 3.0),
        right=EITHER,
        slow=SLOW,
        needs=LINKS,
    ),
    Kind(
        name="link-cut-one-way",
        strike=worse(anytime, cut_one_way, 3.0),
        right=EITHER,
        slow=SLOW,
        needs=LINKS,
    ),
    Kind(
        name="link-lossy",
        strike=worse(anytime, lossy, 3.0),
        right=EITHER,
        slow=SLOW,
        needs=LINKS,
    ),
    Kind(
        name="orchestrator-cut-off",
        strike=worse(anytime, orchestrator_cut_off, 4.0),
        right=EITHER,
        slow=SLOW,
        needs=LINKS,
    ),
    Kind(
        name="orchestrator-node-cut",
        strike=worse(anytime, one_node_unheard, 4.0),
        right=EITHER,
        slow=SLOW,
        needs=LINKS,
    ),
    Kind(
        name="store-disk-full",
        strike=full(anytime, store_disk, 2.0),
        right=EITHER,
        slow=SLOW,
        needs=MOUNTS,
    ),
    Kind(
        name="agent-disk-full",
        strike=full(anytime, node_disk, 2.0),
        right=EITHER,
        slow=SLOW,
        needs=MOUNTS,
        hides_consoles=True,
    ),
    Kind(
        name="no-memory-for-pages",
        strike=full(running_there, memory, 2.0),
        right=MOVED,
        slow=SLOW,
        needs=MOUNTS,
    ),
    Kind(
        name="clock-jumps",
        strike=clock_jumps,
        right=MOVED,
        slow=SLOW,
        needs=CLOCK,
    ),
    Kind(
        name="guest-powers-off",
        strike=power_off,
        right=ENDED,
        slow=CRAWL,
        needs=frozenset({"microvm"}),
    ),
)
