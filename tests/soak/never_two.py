# SPDX-License-Identifier: Apache-2.0
"""Cut the network right after the load, again and again: there must never be two guests.

    python -m tests.soak.never_two --runs 50

QEMU's own hand-over fails this: with the link cut once the destination has loaded, the destination
starts itself and the source resumes itself. Here a Linux guest under QEMU moves between two nodes,
each on a host of its own; each run holds one part at a point after LOADED, before or after the
decision, cuts some links, in one direction or both, lets the part go on into the cut, and heals
after some seconds. Then the guest must have arrived, or run on at its source, verify every page,
and have said each heartbeat exactly once: a second guest would say the same numbers again.

Progress goes to stderr; the last line of stdout is a JSON object; exit status 1 on any fault.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path

from godwit.models import Migration, MigrationPhase

from services.demo.live_guest import LiveGuest
from tests.harness.cluster import describe, small_guest_on
from tests.harness.console import beats_in
from tests.harness.linked_cluster import LinkedCluster, linked_cluster

POINTS = (
    ("destination", "agent.load.after_loaded"),
    ("orchestrator", "orchestrator.transfer.after"),
    ("orchestrator", "orchestrator.decision.before"),
    ("orchestrator", "orchestrator.decision.after"),
    ("destination", "agent.activate.before_activating"),
    ("destination", "agent.activate.after_activating"),
    ("destination", "agent.activate.after_cont"),
    ("source", "agent.seal.before"),
)
CUTS = (
    ("a-b",),
    ("o-a",),
    ("o-b",),
    ("o-a", "o-b"),
    ("o-a", "o-b", "a-b"),
)
REACHED_S_MAX = 120.0
MORE_BEATS = 50


def _beats(guest: LiveGuest, node: str, epoch: int) -> list[int]:
    console = guest.cluster.nodes[node].console(guest.vm_id, epoch)
    return beats_in(console.read_text(errors="replace") if console.exists() else "")


async def _more(guest: LiveGuest, node: str, epoch: int) -> None:
    """It goes on there; the run's time-out ends a wait in vain."""
    count = len(_beats(guest, node, epoch)) + MORE_BEATS
    while len(_beats(guest, node, epoch)) < count:  # noqa: ASYNC110 - a file has no event
        await asyncio.sleep(0.05)


async def _under_fault(
    linked: LinkedCluster, guest: LiveGuest, destination: str, choose: random.Random, number: int
) -> tuple[Migration, str]:
    side, point = POINTS[number % len(POINTS)]
    names, sender = choose.choice(CUTS), choose.choice(["", "", "first", "second"])
    nodes, source = linked.cluster.nodes, guest.console.node
    parts = {
        "orchestrator": linked.cluster.orchestrator,
        "source": nodes[source].agent,
        "destination": nodes[destination].agent,
    }
    hooks = parts[side].hooks
    hooks.hold(point)

    async def go_on(_: Migration) -> bool:
        return False

    async with asyncio.TaskGroup() as group:
        moving = group.create_task(guest.move(destination, on_step=go_on))
        async with asyncio.timeout(REACHED_S_MAX):
            await hooks.reached(point)
        for name in names:
            link = linked.links[name]
            await link.cut({"": "", "first": link.ends[0], "second": link.ends[1]}[sender])
        hooks.release(point)
        # How long is the fault itself, not a synchronisation.
        await asyncio.sleep(choose.uniform(0.5, 8))
        await linked.net.reset()
        last = await moving
    return last, f"{point} {'+'.join(names)} {sender or 'both'}"


async def _run(
    linked: LinkedCluster, guest: LiveGuest, choose: random.Random, number: int
) -> tuple[str, list[str]]:
    """One move: how it ended, and what is wrong."""
    source, epoch = guest.console.node, guest.console.epoch
    destination = "b" if source == "a" else "a"
    began = time.monotonic()
    last, what = await _under_fault(linked, guest, destination, choose, number)
    wrong: list[str] = []
    if last.phase == MigrationPhase.SUCCEEDED:
        wrong += await guest.prove()
    elif last.phase == MigrationPhase.FAILED:
        await _more(guest, source, epoch)
    else:
        wrong.append(f"it ended {last.phase}: {describe(guest, last)}")
    here, there = _beats(guest, source, epoch), _beats(guest, destination, last.epoch)
    if last.phase == MigrationPhase.FAILED and there:
        wrong.append(f"it failed, and {len(there)} beats at the destination")
    joined = beats_in(
        "".join(
            console.read_text(errors="replace")
            for node, run in ((source, epoch), (destination, last.epoch))
            if (console := guest.cluster.nodes[node].console(guest.vm_id, run)).exists()
        )
    )
    if sorted(set(joined)) != sorted(joined):
        wrong.append(f"doubled: {len(joined) - len(set(joined))} heartbeats twice")
    if joined != list(range(joined[0], joined[0] + len(joined))):
        wrong.append(f"not in sequence: {len(here)} here, {len(there)} there")
    print(
        f"{number + 1} {what}: {last.phase} after {time.monotonic() - began:.1f} s"
        f" {'; '.join(wrong)}",
        file=sys.stderr,
        flush=True,
    )
    return str(last.phase), wrong


async def _main(args: argparse.Namespace) -> int:
    choose, ends, wrong = random.Random(args.seed), Counter[str](), list[str]()
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/var/tmp")))
        linked = await stack.enter_async_context(linked_cluster(directory / "cluster"))
        guest = await stack.enter_async_context(
            small_guest_on(
                linked.cluster, linked.client, disk=directory / "disk.raw", workload_mib=32
            )
        )
        for number in range(args.runs):
            async with asyncio.timeout(args.run_s_max):
                phase, found = await _run(linked, guest, choose, number)
            ends[phase] += 1
            wrong += [f"run {number + 1}: {each}" for each in found]
            if found:
                break
            await linked.reset()
    print(
        json.dumps(
            {
                "runs": sum(ends.values()),
                "doubled": sum("doubled" in each for each in wrong),
                "ends": dict(ends),
                "reasons": wrong,
                "verdict": "failed" if wrong or sum(ends.values()) < args.runs else "ok",
            }
        )
    )
    return 1 if wrong else 0


def main() -> None:
    """Run; exit with the verdict."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--run-s-max", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=1)
    sys.exit(asyncio.run(_main(parser.parse_args())))


if __name__ == "__main__":
    main()
