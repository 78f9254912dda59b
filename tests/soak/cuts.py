# SPDX-License-Identifier: Apache-2.0
"""Cut the network between the nodes again and again in post-copy, and time what comes after.

    python -m tests.soak.cuts --cuts 40 [--cut-s 0.7 5] [--delay-ms 0.2] [--ways both|a|b|all]
    python -m tests.soak.cuts --cuts 20 --decision

A microvm of one vCPU moves from a to b; its memory is kept away by a limit on the bulk lane. Each
cut lasts for a random time of --cut-s, and until the guest is known to wait for a page. Timed: from
the link's return until the vCPU goes on, which is the first outstanding fault served, and from the
cut until the migration says that the link is lost. A move that is over is followed by another one.

With --decision the orchestrator is cut off instead, once in each move, between its decision and the
first word of it to the nodes: the guest stands still. Timed: from the return until it runs.

Progress goes to stderr; the last line of stdout is a JSON object. Exit status 1 unless every page
was verified and no heartbeat was lost or doubled.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from godwit.models import Migration, MigrationPhase

from services.demo.microvm_guest import MicrovmGuest
from services.demo.microvm_verdict import MicrovmSetup, judge_microvm
from services.demo.moves import report_of, why_not_succeeded
from services.fault_agent.drivers.microvm_control import ControlClient
from tests.harness.linked_cluster import LinkedCluster, linked_cluster

MIB = 1 << 20
BLOCKED_S = 0.1
"""A guest that touches a page each millisecond and has not for so long waits for one."""
MOVE_S_MAX = 3600.0
PAUSE_S = 0.4
"""Between cuts."""
LOST = (MigrationPhase.POSTCOPY_PAUSED, MigrationPhase.RECOVERING)


@dataclass(slots=True)
class Course:
    """What was seen. Times in ms."""

    served: list[float] = field(default_factory=list)
    noticed: list[float] = field(default_factory=list)
    unnoticed: int = 0
    """Cuts that were over before anybody had to notice."""
    long: int = 0
    """Cuts of more than 4 s."""
    moves: list[Migration] = field(default_factory=list)
    trouble: str = ""


async def _ops(control: ControlClient) -> int:
    return sum(int(vcpu["ops"]) for vcpu in (await control.ask("stats"))["vcpus"])


async def _blocked(control: ControlClient, until: float) -> int:
    """Its ops, once it is `until` and they have not changed for BLOCKED_S."""
    ops, since = await _ops(control), time.monotonic()
    while time.monotonic() < max(until, since + BLOCKED_S):
        await asyncio.sleep(0.01)
        now = await _ops(control)
        if now != ops:
            ops, since = now, time.monotonic()
    return ops


async def _lost(linked: LinkedCluster, migration_id: str) -> float:
    """When the migration has said that its link is lost."""
    while (await linked.client.migration(migration_id)).phase not in LOST:  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    return time.monotonic()


async def _cut(
    linked: LinkedCluster,
    control: ControlClient,
    migration_id: str,
    args: argparse.Namespace,
    course: Course,
    choose: random.Random,
) -> None:
    link = linked.links["a-b"]
    way = choose.choice(["", "a", "b"]) if args.ways == "all" else args.ways.replace("both", "")
    length_s = choose.uniform(*args.cut_s)
    async with asyncio.TaskGroup() as group:
        began = await link.cut(way) / 1e9
        noticing = group.create_task(_lost(linked, migration_id))
        ops = await _blocked(control, began + length_s)
        if noticing.done():
            course.noticed.append((noticing.result() - began) * 1000)
        else:
            course.unnoticed += 1
        healed = await link.heal() / 1e9
        while await _ops(control) == ops:  # noqa: ASYNC110 - a guest has no event
            await asyncio.sleep(0.002)
        course.served.append((time.monotonic() - healed) * 1000)
        noticing.cancel()
    course.long += healed - began > 4
    print(
        f"cut {len(course.served)} of {way or 'both'}: {healed - began:.1f} s,"
        f" served after {course.served[-1]:.0f} ms",
        file=sys.stderr,
        flush=True,
    )
    await asyncio.sleep(PAUSE_S)


async def _move(
    linked: LinkedCluster,
    guest: MicrovmGuest,
    args: argparse.Namespace,
    course: Course,
    choose: random.Random,
) -> None:
    started = asyncio.Event()
    ids: list[str] = []

    async def on_step(migration: Migration) -> bool:
        if migration.phase == MigrationPhase.POSTCOPY:
            ids[:] = [migration.migration_id]
            started.set()
        return False

    other = "b" if guest.node == "a" else "a"
    async with asyncio.TaskGroup() as group:
        moving = group.create_task(
            guest.move(
                other,
                on_step=on_step,
                bulk_bytes_per_s_max=args.bulk_kib << 10,
                timeout_s=MOVE_S_MAX,
            )
        )
        await started.wait()
        async with guest.control(other) as control:
            while len(course.served) < args.cuts:
                seen = await linked.client.migration(ids[0])
                if seen.phase not in (MigrationPhase.POSTCOPY, *LOST) or seen.progress > args.until:
                    break
                await _cut(linked, control, ids[0], args, course, choose)
        last = await moving
    course.moves.append(last)
    course.trouble = why_not_succeeded(last)
    await guest.look()


async def _decide(
    linked: LinkedCluster,
    guest: MicrovmGuest,
    args: argparse.Namespace,
    course: Course,
    choose: random.Random,
) -> None:
    """A move whose orchestrator is cut off at the decision."""

    async def on_step(_: Migration) -> bool:
        return False

    other, hooks = "b" if guest.node == "a" else "a", linked.cluster.orchestrator.hooks
    hooks.hold("orchestrator.decision.after")
    async with asyncio.TaskGroup() as group:
        moving = group.create_task(guest.move(other, on_step=on_step))
        await hooks.reached("orchestrator.decision.after")
        await linked.net.cut_off("o")
        hooks.release("orchestrator.decision.after")
        length_s = choose.uniform(*args.cut_s)
        async with guest.control(other) as control:
            await asyncio.sleep(length_s)  # the fault itself, not a synchronisation
            assert (await control.ask("hello"))["state"] == "paused"
            healed = await linked.net.rejoin("o") / 1e9
            while (await control.ask("hello"))["state"] != "running":  # noqa: ASYNC110
                await asyncio.sleep(0.002)
            course.served.append((time.monotonic() - healed) * 1000)
        last = await moving
    course.long += length_s > 4
    print(
        f"cut {len(course.served)}: {length_s:.1f} s, runs after {course.served[-1]:.0f} ms",
        file=sys.stderr,
        flush=True,
    )
    course.moves.append(last)
    course.trouble = why_not_succeeded(last)
    await guest.look()


def _quantiles(values: list[float]) -> dict[str, Any]:
    if not values:
        return {"n": 0}
    ordered = sorted(values)
    return {
        "n": len(ordered),
        "p50": round(statistics.median(ordered)),
        "p95": round(ordered[min(len(ordered) * 95 // 100, len(ordered) - 1)]),
        "max": round(ordered[-1]),
    }


async def _main(args: argparse.Namespace) -> int:
    choose, course = random.Random(args.seed), Course()
    async with AsyncExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(dir="/var/tmp"))
        linked = await stack.enter_async_context(linked_cluster(Path(directory) / "cluster"))
        await linked.links["a-b"].shape(delay_ms=args.delay_ms)
        guest = await linked.start_microvm(
            "cuts",
            memory_mib=args.memory_mib,
            workload_mib=args.memory_mib - 16,
            vcpus=1,
            ops_per_second=1000,
        )
        await guest.look()
        while len(course.served) < args.cuts and not course.trouble:
            one = _decide if args.decision else _move
            await one(linked, guest, args, course, choose)
        setup = MicrovmSetup(
            vmm="",
            guest="",
            memory_bytes=guest.spec.memory_bytes,
            page_count=guest.page_count,
            vcpus=1,
            fault_backend="uffd",
        )
        report = judge_microvm(setup, guest.stays, [report_of(move) for move in course.moves])
    reasons = [*([course.trouble] if course.trouble else []), *report["reasons"]]  # type: ignore[misc]
    print(
        json.dumps(
            {
                "cuts": len(course.served),
                "cut_s": args.cut_s,
                "of": "orchestrator" if args.decision else args.ways,
                "round_trip_ms": 2 * args.delay_ms,
                "longer_than_4_s": course.long,
                "moves": len(course.moves),
                "served_ms": _quantiles(course.served),
                "noticed_ms": _quantiles(course.noticed),
                "over_before_noticed": course.unnoticed,
                "corrupt_pages": report["corrupt_pages"],
                "doubled_beats": report["doubled_beats"],
                "reasons": reasons,
                "verdict": "failed" if reasons else "ok",
            }
        )
    )
    return 1 if reasons else 0


def main() -> None:
    """Run; exit with the verdict."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--cuts", type=int, default=40)
    parser.add_argument("--cut-s", type=float, nargs=2, default=[0.3, 6.0], metavar=("MIN", "MAX"))
    parser.add_argument("--ways", choices=["both", "a", "b", "all"], default="all")
    parser.add_argument("--decision", action="store_true")
    parser.add_argument("--delay-ms", type=float, default=0.25, help="of the link, one way")
    parser.add_argument("--memory-mib", type=int, default=256)
    parser.add_argument("--bulk-kib", type=int, default=512, help="a second, of the bulk lane")
    parser.add_argument("--until", type=float, default=0.9, help="progress; then no more cuts")
    parser.add_argument("--seed", type=int, default=1)
    sys.exit(asyncio.run(_main(parser.parse_args())))


if __name__ == "__main__":
    main()
