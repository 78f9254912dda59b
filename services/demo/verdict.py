# SPDX-License-Identifier: Apache-2.0
"""Did the guest move unharmed? Judged by what it said on its consoles, and by nothing else.

Pure: consoles and reports in, a JSON object out. "ok" must be earned: what was not seen is a
reason, just as what was seen wrong is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar

from services.demo.console import (
    Boot,
    Console,
    DiskReport,
    Heartbeat,
    Line,
    NetReport,
    PageError,
    Panic,
    Record,
    Sweep,
    parse,
)

_RecordT = TypeVar("_RecordT", bound=Record)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What the guest was given, so that its absence can be told from its failure.

    Attributes:
        vmm: name and version of the VMM.
        guest: what runs in it, in words.
        memory_bytes: guest memory.
        page_count: pages that the workload fills; each must be verified after each move.
        disk: the guest has a disk, it must go on working.
        net: the guest has a network card, its pings must be answered.
    """

    vmm: str
    guest: str
    memory_bytes: int
    page_count: int
    disk: bool = True
    net: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationReport:
    """What the system says about one move; the i-th is from console i to console i + 1.

    Attributes:
        source: node it left.
        destination: node it came to.
        pause_ms: the VMM's pause.
        total_s: from the request to SUCCEEDED.
        pages_demand: pages that came because a vCPU waited for them.
        pages_bulk: pages that came in the background.
        pages_zero: pages of zeros, of which no bytes came.
        fault_p50_us: time from a fault to its wake, median.
        fault_p99_us: the same, 99th percentile.
    """

    source: str
    destination: str
    pause_ms: float
    total_s: float
    pages_demand: int
    pages_bulk: int
    pages_zero: int
    fault_p50_us: float
    fault_p99_us: float


@dataclass(frozen=True, slots=True)
class _Said:
    """A record and the line it was on."""

    line: Line
    record: Record


@dataclass(frozen=True, slots=True)
class _Run:
    """One stay on one node, its first line made whole."""

    name: str
    said: list[_Said]

    def of(self, kind: type[_RecordT]) -> list[_RecordT]:
        return [said.record for said in self.said if isinstance(said.record, kind)]

    def beats(self) -> list[tuple[Line, Heartbeat]]:
        return [(s.line, s.record) for s in self.said if isinstance(s.record, Heartbeat)]


@dataclass(frozen=True, slots=True)
class _Move:
    """What the consoles tell about one move; guest_gap_ms is None without beats on both sides."""

    guest_gap_ms: float | None
    doubled_beats: int
    pages_verified: int
    reasons: list[str]


def judge(
    setup: Setup, consoles: Sequence[Console], migrations: Sequence[MigrationReport]
) -> dict[str, object]:
    """The demo's report, as the object that --json prints.

    Args:
        setup: what the guest was given.
        consoles: one per run, in the order the guest came by.
        migrations: one per move.

    Returns:
        JSON-ready; "verdict" is "ok" or "failed", "reasons" says in words why it is not ok.
        "pages_verified" is the smallest number of different pages verified after a move.
    """
    runs = _runs(consoles)
    reasons = _wrong_sequence(consoles, migrations)
    reasons += _wrong_boots(runs)
    reasons += _wrong_numbers(runs)
    reasons += [f"{run.name}: {panic.text}" for run in runs for panic in run.of(Panic)]
    corrupt = _corrupt_pages(runs)
    if corrupt:
        first = next((error for run in runs for error in run.of(PageError)), None)
        where = f", first page {first.page} ({first.kind})" if first else ""
        reasons.append(f"{corrupt} corrupt pages{where}")
    reasons += _wrong_disk(runs) if setup.disk else []

    moves = []
    for index, report in enumerate(migrations):
        move = _judge_move(setup, runs, index, report)
        reasons += [
            f"move {index + 1} ({report.source} to {report.destination}): {reason}"
            for reason in move.reasons
        ]
        moves.append(move)
    return {
        "vmm": setup.vmm,
        "guest": setup.guest,
        "memory_bytes": setup.memory_bytes,
        "migrations": [
            {
                "from": report.source,
                "to": report.destination,
                "pause_ms": report.pause_ms,
                "guest_gap_ms": move.guest_gap_ms,
                "total_s": report.total_s,
                "pages_demand": report.pages_demand,
                "pages_bulk": report.pages_bulk,
                "pages_zero": report.pages_zero,
                "fault_p50_us": report.fault_p50_us,
                "fault_p99_us": report.fault_p99_us,
                "pages_verified": move.pages_verified,
            }
            for report, move in zip(migrations, moves, strict=True)
        ],
        "pages_verified": min((move.pages_verified for move in moves), default=0),
        "corrupt_pages": corrupt,
        "doubled_beats": sum(move.doubled_beats for move in moves),
        "net": setup.net,
        "reasons": reasons,
        "verdict": "failed" if reasons else "ok",
    }


def evidence_missing(setup: Setup, console: Console) -> list[str]:
    """What a run at a destination has not shown yet; empty: no need to wait any longer."""
    return _missing(setup, _Run(console.node, _said(console.lines)))


def _runs(consoles: Sequence[Console]) -> list[_Run]:
    """Join the line that a stop cut in two: it counts where it was ended."""
    runs = []
    tail = ""
    for console in consoles:
        lines = list(console.lines)
        if tail and lines:
            lines[0] = replace(lines[0], text=tail.rstrip("\r") + lines[0].text)
        tail = console.tail
        runs.append(_Run(f"{console.node} (epoch {console.epoch})", _said(lines)))
    return runs


def _said(lines: Iterable[Line]) -> list[_Said]:
    return [_Said(line, parse(line.text)) for line in lines]


def _wrong_sequence(
    consoles: Sequence[Console], migrations: Sequence[MigrationReport]
) -> list[str]:
    reasons = []
    if not migrations:
        reasons.append("no migration took place")
    if len(consoles) != len(migrations) + 1:
        reasons.append(f"{len(migrations)} migrations, but the guest ran {len(consoles)} times")
    for (before, after), report in zip(pairwise(consoles), migrations, strict=False):
        if (before.node, after.node) != (report.source, report.destination):
            reasons.append(
                f"reported {report.source} to {report.destination}, but the guest went "
                f"{before.node} to {after.node}"
            )
        if after.epoch <= before.epoch:
            reasons.append(f"epoch {after.epoch} after epoch {before.epoch}")
    return reasons


def _wrong_boots(runs: Sequence[_Run]) -> list[str]:
    boots = [(run.name, boot.boot_id) for run in runs for boot in run.of(Boot)]
    if not boots:
        return ["the guest's workload never started"]
    return [f"the guest booted again on {name} ({boot_id})" for name, boot_id in boots[1:]]


def _wrong_numbers(runs: Sequence[_Run]) -> list[str]:
    """Heartbeats rise by exactly one, within each run and from run to run."""
    reasons = []
    last: int | None = None
    for run in runs:
        wrong = []
        for _, beat in run.beats():
            if last is not None and beat.number != last + 1:
                kind = "hole" if beat.number > last + 1 else "repeat"
                wrong.append(f"heartbeat {beat.number} after {last} ({kind})")
            last = beat.number
        if wrong:
            more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            reasons.append(f"{run.name}: {wrong[0]}{more}")
    return reasons


def _corrupt_pages(runs: Sequence[_Run]) -> int:
    """The guest's own total; single lines are bounded, and totals may lag behind them."""
    lines = sum(len(run.of(PageError)) for run in runs)
    totals = [beat.errors for run in runs for beat in run.of(Heartbeat)]
    sweeps = [sweep.errors for run in runs for sweep in run.of(Sweep)]
    return max([lines, *totals, *sweeps])


def _wrong_disk(runs: Sequence[_Run]) -> list[str]:
    bad = max((report.bad for run in runs for report in run.of(DiskReport)), default=0)
    errors = max((report.errors for run in runs for report in run.of(DiskReport)), default=0)
    reasons = []
    if bad:
        reasons.append(f"{bad} wrong blocks read back from the disk")
    if errors:
        reasons.append(f"{errors} failed calls on the disk")
    return reasons


def _judge_move(setup: Setup, runs: Sequence[_Run], index: int, report: MigrationReport) -> _Move:
    reasons = []
    if report.pages_demand <= 0:
        reasons.append("no page came on demand")
    if index + 1 >= len(runs):
        return _Move(None, 0, 0, [*reasons, "the guest never ran at the destination"])
    source, destination = runs[index], runs[index + 1]
    beats_before, beats_after = source.beats(), destination.beats()
    gap_ms: float | None = None
    doubled = 0
    if not beats_before:
        reasons.append("no heartbeat before the move")
    if beats_before and beats_after:
        first_line, first = beats_after[0]
        doubled = sum(_is_doubled(line, beat, first_line, first) for line, beat in beats_before)
        stopped = [line for line, beat in beats_before if beat.number < first.number]
        gap_ms = (first_line.t_ns - stopped[-1].t_ns) / 1e6 if stopped else None
        if doubled:
            reasons.append(f"{doubled} heartbeats at the source after the first at the destination")
    reasons += _missing(setup, destination)
    return _Move(gap_ms, doubled, _swept(destination), reasons)


def _missing(setup: Setup, run: _Run) -> list[str]:
    """What every run at a destination must show: life, work, every page, disk, network."""
    reasons = []
    beats = [beat.ops for _, beat in run.beats()]
    if not beats:
        reasons.append("no heartbeat after the move")
    elif not _rises(beats):
        reasons.append("the workload wrote no page after the move")
    verified = _swept(run)
    if verified != setup.page_count:
        reasons.append(f"{verified} of {setup.page_count} pages verified after the move")
    if setup.disk and not _rises([disk.rounds for disk in run.of(DiskReport)]):
        reasons.append("the disk made no progress after the move")
    if setup.net and not _rises([net.answered for net in run.of(NetReport)]):
        reasons.append("no ping was answered after the move")
    return reasons


def _is_doubled(line: Line, beat: Heartbeat, first_line: Line, first: Heartbeat) -> bool:
    """Did the source beat after the destination began?

    By number, which needs no clock: the guest that moved carries its counter along, so a source
    that goes on says numbers the destination says too. And by time, where the order is proved.
    """
    return beat.number >= first.number or line.since_ns > first_line.t_ns


def _swept(run: _Run) -> int:
    """See pages_verified: a sweep that began before the move proves nothing about the move."""
    begun: int | None = None
    largest = 0
    for sweep in run.of(Sweep):
        if sweep.state == "begin":
            begun = sweep.number
        elif sweep.state == "end" and sweep.number == begun:
            largest = max(largest, sweep.verified)
    return largest


def _rises(values: Sequence[int]) -> bool:
    return len(values) > 1 and values[-1] > values[0]
