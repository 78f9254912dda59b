# SPDX-License-Identifier: Apache-2.0
"""The same guest moved by ours and by QEMU's own post-copy, in turns; one section a cap.

A Linux guest of 512 MiB under TCG that rewrites and checks 256 MiB as fast as it can and beats each
5 ms; ours under the system's QEMU with real agents, page servers and orchestrator. Each mover's
guest goes from VMM to VMM, and is stopped while another is measured. A cap holds for what nobody
waits for (bulk; QEMU's max-postcopy-bandwidth). "1st second": what the guest rewrote in the second
after its last heartbeat at the source, as a share of its full speed there.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from godwit.client import AsyncClient
from godwit.errors import GodwitClientError

from services.demo import guest_image
from services.demo.cluster import running_cluster
from services.demo.console import ConsoleFollower
from services.demo.run import cache_directory
from services.fault_agent.drivers.qmp import QmpError
from tests.bench.bars import Bar
from tests.bench.estimate import estimate, median, ratio
from tests.bench.peers import criu
from tests.bench.peers import guest as guests
from tests.bench.peers.guest import Guest
from tests.bench.peers.ours import OurGuest
from tests.bench.peers.qemu import Qemu, QemuGuest, newest_qemu, system_qemu
from tests.bench.section import Result, Rows, Scale, figure, why_failed

OURS = "ours"
OLD, OLD_PREEMPT = "system QEMU", "system QEMU, preempt"
NEW, NEW_PREEMPT = "newest QEMU", "newest QEMU, preempt"
_GUEST_OF = {OURS: OURS, OLD: "old", OLD_PREEMPT: "old", NEW: "new", NEW_PREEMPT: "new"}

_FAILURES = (RuntimeError, ValueError, OSError, GodwitClientError, QmpError)
"""Of a move: its guest is not moved again; the others are measured on."""

Pick = Callable[[dict[str, Any]], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerSection:
    """One cap."""

    name: str
    title: str
    cap: int
    variants: tuple[str, ...]
    __doc__: str = __doc__ or ""

    def run(self, scale: Scale) -> Result:
        """Measure."""
        return asyncio.run(self._run(scale.choose(7, 3), time.monotonic() + scale.seconds))

    async def _run(self, round_count: int, end_s: float) -> Result:
        moves: dict[str, list[dict[str, Any]]] = {variant: [] for variant in self.variants}
        failures: dict[str, str] = {}
        async with _guests({_GUEST_OF[variant] for variant in self.variants}) as place:
            variants = [v for v in self.variants if _GUEST_OF[v] in place.guests]
            for number in range(round_count):
                if number > 0 and time.monotonic() > end_s:
                    break
                shift = number % len(variants)
                for variant in [*variants[shift:], *variants[:shift]]:
                    if _GUEST_OF[variant] in failures:
                        continue
                    try:
                        moves[variant].append(await self._move(place, variant))
                    except _FAILURES as error:
                        failures[_GUEST_OF[variant]] = f"{variant}: {error}"
                        print(f"{self.name}: {variant}: {error!r}", file=sys.stderr, flush=True)
                print(f"{self.name}: round {number + 1} of {round_count}", file=sys.stderr)
            missing = {**place.missing, **failures}
            return {
                "versions": place.versions,
                "missing": missing,
                "skipped": {criu.NAME: criu.why_skipped()},
                "moves": moves,
            }

    async def _move(self, place: _Place, variant: str) -> dict[str, Any]:
        guest = place.guests[_GUEST_OF[variant]]
        move, cost = await guests.measure(guest, self.cap, preempt=variant.endswith("preempt"))
        if cost.error_count:
            raise RuntimeError(f"{variant}: the guest found {cost.error_count} wrong pages")
        return {**asdict(move), **asdict(cost)}

    def bars(self, result: Result) -> list[Bar]:
        """Judge."""
        moves, label = result.get("moves", {}), self.title.split(": ")[1]
        missing: dict[str, str] = result.get("missing", {})

        def bar(what: str, limit: float, pick: Pick, peer: str, *, at_most: bool = True) -> Bar:
            ours, theirs = moves.get(OURS, []), moves.get(peer, [])
            name = f"{what}, {label}: ours / {peer}"
            # A move of ours that fails is no move that was quick.
            if not ours or not theirs or OURS in missing:
                why = why_failed(result) or "; ".join(missing.values()) or "no runs"
                return Bar(name=name, limit=limit, at_most=at_most, why_not=why)
            count = min(len(ours), len(theirs))
            value = estimate(
                count,
                ratio(
                    median([pick(run) for run in ours[:count]]),
                    median([max(pick(run), 1e-9) for run in theirs[:count]]),
                ),
            )
            return Bar(name=name, limit=limit, at_most=at_most, value=value)

        found = [bar("guest gap", 1, lambda run: float(run["gap_ms"]), NEW_PREEMPT)]
        if self.cap:
            found.append(bar("guest gap", 0.2, lambda run: float(run["gap_ms"]), OLD_PREEMPT))
        if self.cap == CAP_FAST:
            found.append(
                bar(
                    "speed in the first second",
                    2,
                    lambda run: float(run["first_second_share"]),
                    NEW_PREEMPT,
                    at_most=False,
                )
            )
        if not self.cap:
            found.append(_agent_memory(moves.get(OURS, [])))
        found.append(bar("memory there", 1, lambda run: float(run["memory_s"]), NEW_PREEMPT))
        return found

    def rows(self, result: Result) -> Rows:
        """Tell."""
        table = [
            [
                *("mover", "n", "gap ms", "later gap ms", "1st second %"),
                *("switch to done s", "request to done s", "says of itself"),
            ]
        ]
        for variant, runs in result["moves"].items():
            if not runs:
                table.append([variant, "0", "-", "-", "-", "-", "-", "-"])
                continue
            version = result["versions"].get(_GUEST_OF[variant], "")
            table.append([variant.replace("QEMU", f"QEMU {version}"), *_cells(runs)])
        table += [[what, "0", *"-----", why] for what, why in result.get("skipped", {}).items()]
        return table


def _agent_memory(ours: list[dict[str, Any]]) -> Bar:
    allowed_kib = guests.MEMORY_MIB * 256 * 2 / 1024
    name = "agent process above idle and 2 bytes a page, a whole move"
    if not ours:
        return Bar(name=name, limit=32, unit="MiB", why_not="no runs")
    above_mib = [max(0.0, run["said"]["agent_kib"] - allowed_kib) / 1024 for run in ours]
    return Bar(name=name, limit=32, unit="MiB", value=estimate(len(ours), median(above_mib)))


def _cells(runs: list[dict[str, Any]]) -> list[str]:
    def of(name: str, digits: int, factor: float = 1) -> str:
        values = [run[name] * factor for run in runs]
        return figure(estimate(len(runs), median(values)), digits)

    return [
        str(len(runs)),
        of("gap_ms", 0),
        of("later_gap_ms", 0),
        of("first_second_share", 1, 100),
        of("memory_s", 2),
        of("total_s", 2),
        _said([run["said"] for run in runs]),
    ]


def _said(said: list[dict[str, Any]]) -> str:
    names = [name for name, value in said[0].items() if isinstance(value, int | float)]
    parts = []
    for name in names:
        middle = estimate(len(said), median([one.get(name, 0) for one in said])).value
        parts.append(f"{name} {middle:,.0f}")
    return ", ".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    guests: dict[str, Guest]
    versions: dict[str, str]
    missing: dict[str, str]


def _qemus(wanted: set[str]) -> tuple[dict[str, Qemu], dict[str, str]]:
    qemus: dict[str, Qemu] = {}
    missing: dict[str, str] = {}
    if "old" in wanted:
        if old := system_qemu():
            qemus["old"] = old
        else:
            missing["old"] = "there is no qemu-system-x86_64"
    if "new" in wanted:
        new, why_not = newest_qemu()
        if new:
            qemus["new"] = new
        else:
            missing["new"] = why_not
    for name, why in missing.items():
        print(f"peers: without the {name} QEMU: {why}", file=sys.stderr)
    return qemus, missing


@asynccontextmanager
async def _guests(wanted: set[str]) -> AsyncIterator[_Place]:
    """Each wanted mover's guest, up and stopped."""
    qemus, missing = await asyncio.to_thread(_qemus, wanted)
    image = await asyncio.to_thread(guest_image.build, cache_directory())
    # Not the directory for temporary files: that may be tmpfs, and a journal wants a disk.
    directory = Path(tempfile.mkdtemp(prefix="godwit-bench-", dir="/var/tmp"))
    async with AsyncExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        follower = await stack.enter_async_context(ConsoleFollower())
        found: dict[str, Guest] = {}
        for name, qemu in qemus.items():
            spec = guests.spec(f"peer-{name}", image)
            theirs = QemuGuest(qemu, spec, directory / name, follower)
            stack.push_async_callback(theirs.close)
            await theirs.start()
            found[name] = theirs
            await guests.wait_up(follower, theirs.consoles[-1])
            guests.sleep(theirs)
        cluster = await stack.enter_async_context(running_cluster(directory / "cluster"))
        client = await stack.enter_async_context(AsyncClient(cluster.rest_url))
        ours = await OurGuest.start(guests.spec("ours", image), cluster, client, follower)
        # Before the cluster is taken down, which asks the VMM.
        stack.callback(lambda: guests.wake(ours))
        found[OURS] = ours
        await guests.wait_up(follower, ours.consoles[-1])
        guests.sleep(ours)
        versions = {name: qemu.version for name, qemu in qemus.items()}
        yield _Place(guests=found, versions=versions, missing=missing)


_ALL = (OURS, OLD, OLD_PREEMPT, NEW, NEW_PREEMPT)
CAP_FAST = 125_000_000
CAP_SLOW = 10 << 20
UNCAPPED = PeerSection(
    name="peers", title="Whole moves, against QEMU: without a cap", cap=0, variants=_ALL
)
FAST = PeerSection(
    name="peers-125",
    title="Whole moves, against QEMU: capped at 125 MB/s",
    cap=CAP_FAST,
    variants=_ALL,
)
SLOW = PeerSection(
    name="peers-10",
    title="Whole moves, against QEMU: capped at 10 MiB/s",
    cap=CAP_SLOW,
    variants=(OURS, OLD_PREEMPT, NEW_PREEMPT),
)
