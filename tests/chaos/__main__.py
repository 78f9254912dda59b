# SPDX-License-Identifier: Apache-2.0
"""Migrations with a random fault in each: `make chaos N=300 [SEED=...]`.

Guests that verify their own memory go to and fro between two nodes, every part a process of its
own. In each move one fault strikes, at a random or a named moment; a part that died is started
again, as its supervisor would; nobody gives a command. Then the guest must run in exactly one
place, whole, no beat twice, none missing. A case is drawn from its number alone: what failed
prints how to run it again. The last line is JSON; exit status 0 only if nothing was corrupt,
doubled or lost, and everything recovered.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from services.common.errors import GodwitError
from services.demo.cluster import RAM_PARENT
from services.demo.console import ConsoleFollower
from services.demo.guest_image import GuestImage, build
from services.demo.microvm_run import why_no_kvm
from services.demo.run import cache_directory
from tests.chaos.case import Case, Kind, Outcome, Result, World
from tests.chaos.ground import own_mounts, standing
from tests.chaos.guests import BACKENDS, Guest
from tests.chaos.keeper import keeping
from tests.chaos.kinds import KINDS
from tests.chaos.qemu_guest import QemuGuest
from tests.harness.link import NEEDS
from tests.harness.microvm import why_not
from tests.harness.require import missing

CASES_A_CLUSTER = 50
"""Then another: what a case leaves where the table says that a guest is gone adds up."""
_numbers = itertools.count(1)
GONE = (Outcome.GONE, Outcome.ENDED, Outcome.ATTENTION)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A case to be run."""

    number: int
    seed: int
    kind: Kind


def plan(count: int, seed: int, kinds: Sequence[Kind], *, each: bool) -> list[Plan]:
    """What `count` cases from `seed` on are; with `each`, the kinds one after the other."""
    return [
        Plan(
            number=number,
            seed=seed + number,
            kind=kinds[number % len(kinds)] if each else random.Random(seed + number).choice(kinds),
        )
        for number in range(count)
    ]


def guest_image() -> GuestImage:
    """What a Linux guest boots from."""
    return build(cache_directory())


def possible(args: argparse.Namespace) -> set[str]:
    """What kinds may need, as far as this machine has it."""
    has = {"microvm", "clock"} if shutil.which("cc") or shutil.which("gcc") else {"microvm"}
    if args.mounts:
        has.add("mounts")
    if args.links and not any(missing(need) for need in NEEDS):
        has.add("links")
    return has


def backends(wanted: Sequence[str]) -> list[tuple[str, str]]:
    """Accelerators and fault backends that are possible here."""
    no_kvm = why_no_kvm()
    return [
        (accel, backend)
        for accel, backend in BACKENDS
        if (not wanted or f"{accel}/{backend}" in wanted)
        and not (accel == "kvm" and no_kvm)
        and not why_not(accel, backend)
    ]


async def run_cases(
    plans: Sequence[Plan], args: argparse.Namespace, directory: Path, found: list[Result]
) -> None:
    """Run some cases in one cluster; every result goes into `found`."""
    async with AsyncExitStack() as stack:
        beats = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-", dir=RAM_PARENT))
        )
        cluster, client, ground = await stack.enter_async_context(
            standing(directory, mounts=args.mounts, links=args.links)
        )
        guests = [
            await Guest.start(
                accel, backend, "ab"[index % 2], cluster=cluster, client=client, logs=beats
            )
            for index, (accel, backend) in enumerate(backends(args.backend))
        ]
        image = await asyncio.to_thread(guest_image) if args.qemu else None
        follower = await stack.enter_async_context(ConsoleFollower())

        async def boot(node: str) -> QemuGuest:
            assert image is not None
            return await QemuGuest.boot(
                node, image, follower, cluster=cluster, client=client, number=next(_numbers)
            )

        linux: list[Guest] = [await boot("a")] if image else []
        keeper = await stack.enter_async_context(keeping(cluster))
        world = World(cluster=cluster, client=client, keeper=keeper, guests=[], ground=ground)
        for each in plans:
            rng = random.Random(each.seed)
            index, share = rng.randrange(len(guests)), rng.random()
            of_qemu = bool(linux) and share < args.qemu and "microvm" not in each.kind.needs
            chosen, at = (linux, 0) if of_qemu else (guests, index)
            world.guests[:] = [*guests, *linux]
            case = Case(
                number=each.number,
                seed=each.seed,
                kind=each.kind,
                random=rng,
                world=world,
                guest=chosen[at],
                brief=args.brief,
            )
            result = await case.run()
            found.append(result)
            tell(result)
            if args.results:
                with args.results.open("a") as file:
                    file.write(json.dumps(dataclasses.asdict(result)) + "\n")
            if not result.recovered:
                await asyncio.to_thread(ground.keep, directory)
                return  # the next case begins on clean ground, and this one's logs stay
            if result.outcome in GONE:
                gone = chosen[at]
                accel, _, backend = gone.kind.partition("/")
                chosen[at] = (
                    await boot(gone.node)
                    if of_qemu
                    else await Guest.start(
                        accel, backend, gone.node, cluster=cluster, client=client, logs=beats
                    )
                )
                gone.log.close()


def tell(result: Result) -> None:
    """A line a case; more where it went wrong."""
    times = " ".join(
        f"{name} {value:.0f} ms"
        for name, value in (
            ("recovery", result.recovery_ms),
            ("restart", result.restart_ms),
            ("start", result.start_ms),
            ("held", result.held_ms),
            ("others", result.others_held_ms),
        )
        if value is not None
    )
    word = "ok  " if result.recovered else "FAIL"
    struck = "" if result.struck else " (never struck)"
    print(
        f"{word} {result.number} seed {result.seed} {result.kind} [{result.detail}]{struck}"
        f" {result.guest}: {result.outcome}; {times}; {result.took_s:.1f} s",
        file=sys.stderr,
        flush=True,
    )
    if not result.recovered:
        for what in [result.phases, *result.trouble]:
            print(f"       {what}", file=sys.stderr, flush=True)


def quantiles(values: Iterable[float | None]) -> dict[str, Any]:
    """p50 and max; n of those that there are."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return {"n": 0}
    return {
        "n": len(known),
        "p50": round(statistics.median(known), 1),
        "max": round(known[-1], 1),
    }


def summary(results: Sequence[Result], wanted: int, seed: int, has: set[str]) -> dict[str, Any]:
    """The last line."""
    struck = [result for result in results if result.struck]
    return {
        "n": len(results),
        "wanted": wanted,
        "faults": dict(sorted(Counter(result.kind for result in struck).items())),
        "never_struck": len(results) - len(struck),
        "impossible_here": sorted(kind.name for kind in KINDS if not kind.needs <= has),
        "outcomes": dict(sorted(Counter(result.outcome for result in results).items())),
        "corrupt": sum(result.corrupt for result in results),
        "doubled": sum(result.doubled for result in results),
        "lost": sum(result.lost for result in results),
        "gone_by_table": sum(
            result.outcome in (Outcome.GONE, Outcome.ATTENTION) and not result.lost
            for result in results
        ),
        "recovered": sum(result.recovered for result in results),
        "recovery_ms": quantiles(result.recovery_ms for result in struck),
        "restart_ms": quantiles(result.restart_ms for result in struck),
        "start_ms": quantiles(result.start_ms for result in struck),
        "held_ms": quantiles(result.held_ms for result in struck),
        "others_held_ms": quantiles(result.others_held_ms for result in results),
        "seed": seed,
    }


async def run(args: argparse.Namespace) -> int:
    """Run all cases; the exit status."""
    has = possible(args)
    kinds = [
        kind for kind in KINDS if kind.needs <= has and (not args.kind or kind.name in args.kind)
    ]
    if not kinds:
        print(f"no such kind of fault is possible here; there are {sorted(has)}", file=sys.stderr)
        return 2
    if args.each and not args.n:
        args.n = len(kinds)
    todo = plan(args.n, args.seed, kinds, each=args.each)
    results: list[Result] = []
    # Not the directory for temporary files: that may be tmpfs, and a journal wants a disk.
    place = args.dir or Path(tempfile.mkdtemp(prefix="godwit-chaos-", dir="/var/tmp"))
    kept: list[Path] = []
    number = 0
    while len(results) < len(todo):
        directory = place / f"cluster-{number}"
        number += 1
        before = len(results)
        chunk = todo[before : before + CASES_A_CLUSTER]
        try:
            await run_cases(chunk, args, directory, results)
        except GodwitError as error:
            print(f"FAIL the cluster: {error}", file=sys.stderr, flush=True)
            kept.append(directory)
            break
        if all(result.recovered for result in results[before:]):
            shutil.rmtree(directory, ignore_errors=True)
        else:
            kept.append(directory)
            bad = results[-1]
            print(
                f"       logs: {directory}\n"
                f"       again: make chaos N=1 SEED={bad.seed} ARGS='--kind {bad.kind}'",
                file=sys.stderr,
                flush=True,
            )
    if not kept:
        shutil.rmtree(place, ignore_errors=True)
    report = summary(results, args.n, args.seed, has)
    print(json.dumps(report))
    whole = report["n"] == args.n == report["recovered"]
    return 0 if whole and not (report["corrupt"] or report["doubled"] or report["lost"]) else 1


def main() -> None:
    """Run; exit with the verdict."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("-n", type=int, default=0, help="cases; with --each: one of each kind")
    parser.add_argument("--seed", type=int, default=None, help="of the first case; default: new")
    parser.add_argument("--each", action="store_true", help="the kinds one after the other")
    parser.add_argument("--kind", action="append", help="only this kind; repeat it")
    parser.add_argument("--backend", action="append", help="accel/backend; default: all")
    parser.add_argument("--dir", type=Path, help="where state and logs go")
    parser.add_argument("--brief", action="store_true", help="faults last a third as long")
    parser.add_argument("--results", type=Path, help="append a line of JSON a case")
    parser.add_argument(
        "--qemu", type=float, default=0.0, metavar="SHARE", help="of the moves, by a Linux guest"
    )
    parser.add_argument("--no-links", dest="links", action="store_false", help="on one host")
    args = parser.parse_args()
    args.mounts = own_mounts()
    args.n = args.n or (0 if args.each else 300)
    if args.seed is None:
        args.seed = time.time_ns() // 1_000_000 % 1_000_000_000
    sys.exit(asyncio.run(run(args)))


if __name__ == "__main__":
    main()
