# SPDX-License-Identifier: Apache-2.0
"""Did a microvm's guest move unharmed? Judged by its own sweeps, heartbeats and counters.

Pure, as verdict.py is; "ok" must be earned: what was not seen is a reason too. Every process of a
host has the same clock, so a gap is the destination's first heartbeat less the source's last one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from services.demo.verdict import MigrationReport

Stats = Mapping[str, Any]
"""An answer to `stats`, `verify` or `hello`; native/microvm/README.md."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicrovmSetup:
    """What the guest was given.

    Attributes:
        vmm: name and version of the VMM.
        guest: what runs in it, in words.
        memory_bytes: guest memory.
        page_count: pages of its workload; each must be verified after each move.
        vcpus: of the guest.
        fault_backend: what was asked for; "auto": any.
    """

    vmm: str
    guest: str
    memory_bytes: int
    page_count: int
    vcpus: int
    fault_backend: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stay:
    """What a microvm said of itself on one node.

    Attributes:
        node: where.
        hello: after the move to it, or the start.
        sweep: the answer to `verify`.
        stats: after that sweep.
        last: at its last save, vCPUs stopped; None: it has not left, or nobody saw it.
    """

    node: str
    hello: Stats
    sweep: Stats
    stats: Stats
    last: Stats | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Beats:
    """Heartbeats across a move; gap_ms is None where one side was not seen."""

    gap_ms: float | None
    doubled: int
    reasons: list[str]


def judge_microvm(
    setup: MicrovmSetup, stays: Sequence[Stay], migrations: Sequence[MigrationReport]
) -> dict[str, object]:
    """The demo's report; keys as those of verdict.judge, and what only a microvm can tell.

    Args:
        setup: what the guest was given.
        stays: one a node it was on, in order.
        migrations: the i-th is from stay i to stay i + 1.
    """
    reasons = [] if migrations else ["no migration took place"]
    if len(stays) != len(migrations) + 1:
        reasons.append(f"{len(migrations)} migrations, but the guest was seen {len(stays)} times")
    for stay in stays:
        reasons += [f"on {stay.node}: {reason}" for reason in _wrong_stay(setup, stay)]
    moves: list[dict[str, object]] = []
    doubled = 0
    for before, after, report in zip(stays, stays[1:], migrations, strict=False):
        beats = _beats(before, after)
        wrong = [*beats.reasons, *_wrong_ops(before, after), *_wrong_backend(setup, after)]
        if report.pages_demand + report.pages_bulk + report.pages_zero <= 0:
            wrong.append("no page was counted")
        reasons += [f"{report.source} to {report.destination}: {reason}" for reason in wrong]
        doubled += beats.doubled
        moves.append(_move(report, before, after, beats))
    return {
        "vmm": setup.vmm,
        "guest": setup.guest,
        "memory_bytes": setup.memory_bytes,
        "migrations": moves,
        "pages_verified": min(
            (int(stay.sweep.get("pages_verified", 0)) for stay in stays[1:]), default=0
        ),
        "corrupt_pages": sum(int(stay.sweep.get("errors", 0)) for stay in stays),
        "doubled_beats": doubled,
        "fault_backend": stays[-1].hello.get("fault_backend", "") if stays else "",
        "fault_backend_reason": stays[-1].hello.get("fault_backend_reason", "") if stays else "",
        "accel": stays[-1].hello.get("accel", "") if stays else "",
        "net": False,
        "reasons": reasons,
        "verdict": "failed" if reasons else "ok",
    }


def _move(report: MigrationReport, before: Stay, after: Stay, beats: _Beats) -> dict[str, object]:
    vcpus = _vcpus(after.stats)
    return {
        "from": report.source,
        "to": report.destination,
        "pause_ms": report.pause_ms,
        "guest_gap_ms": beats.gap_ms,
        "total_s": report.total_s,
        "pages_demand": report.pages_demand,
        "pages_bulk": report.pages_bulk,
        "pages_zero": report.pages_zero,
        "fault_p50_us": report.fault_p50_us,
        "fault_p99_us": report.fault_p99_us,
        "pages_verified": int(after.sweep.get("pages_verified", 0)),
        "fault_backend": after.hello.get("fault_backend", ""),
        "fault_backend_reason": after.hello.get("fault_backend_reason", ""),
        "exits": [int(vcpu.get("faults", 0)) for vcpu in vcpus],
        "spurious_exits": [int(vcpu.get("spurious", 0)) for vcpu in vcpus],
        "blocked_ns": [int(vcpu.get("blocked_ns", 0)) for vcpu in vcpus],
        "ops_before": _ops(before.last) if before.last else 0,
        "ops_after": _ops(after.stats),
    }


def _vcpus(stats: Stats) -> list[Stats]:
    return list(stats.get("vcpus", ()))


def _ops(stats: Stats) -> int:
    return sum(int(vcpu["ops"]) for vcpu in _vcpus(stats))


def _wrong_stay(setup: MicrovmSetup, stay: Stay) -> list[str]:
    reasons = []
    if errors := int(stay.sweep.get("errors", 0)):
        reasons.append(f"its sweep found {errors} errors")
    verified = int(stay.sweep.get("pages_verified", 0))
    if verified != setup.page_count:
        reasons.append(f"{verified} pages verified, of {setup.page_count}")
    vcpus = _vcpus(stay.stats)
    if len(vcpus) != setup.vcpus:
        reasons.append(f"{len(vcpus)} vCPUs speak, of {setup.vcpus}")
    for vcpu in (*vcpus, *(_vcpus(stay.last) if stay.last else ())):
        for name, what in (("errors", "errors"), ("beat_jumps", "jumps of the heartbeat")):
            if vcpu.get(name):
                reasons.append(f"vCPU {vcpu.get('id')} tells of {vcpu[name]} {what}")
    state = stay.stats.get("state")
    if state != "running":
        reasons.append(f"it is {state}: {stay.hello.get('failure', 'no reason given')}")
    return reasons


def _beats(before: Stay, after: Stay) -> _Beats:
    """The first heartbeat here must be the one after the last one there."""
    if before.last is None or before.last.get("state") != "paused":
        return _Beats(
            gap_ms=None, doubled=0, reasons=[f"the last heartbeats on {before.node} were not seen"]
        )
    reasons, gaps, doubled = [], [], 0
    for old, new in zip(_vcpus(before.last), _vcpus(after.stats), strict=False):
        last, first = old["last_beat"], new["first_beat"]
        if not last["number"] or not first["number"]:
            reasons.append(f"vCPU {new['id']} has no heartbeat on both sides")
            continue
        step = int(first["number"]) - int(last["number"])
        if step != 1:
            reasons.append(
                f"vCPU {new['id']}: heartbeat {first['number']} came after {last['number']}"
            )
            doubled += max(1 - step, 0)
        gaps.append((int(first["time_ns"]) - int(last["time_ns"])) / 1e6)
    if gaps and min(gaps) <= 0:
        reasons.append("a vCPU ran here before it had stopped there")
    return _Beats(gap_ms=round(max(gaps), 3) if gaps else None, doubled=doubled, reasons=reasons)


def _wrong_ops(before: Stay, after: Stay) -> list[str]:
    """Counters of the guest's own: they go on where they were."""
    if before.last is None:
        return []
    reasons = []
    for old, new in zip(_vcpus(before.last), _vcpus(after.stats), strict=False):
        if int(new["ops"]) < int(old["ops"]):
            reasons.append(f"vCPU {new['id']} had done {old['ops']} ops, now {new['ops']}")
    if _ops(after.stats) <= _ops(before.last):
        reasons.append("the guest has done nothing since")
    return reasons


def _wrong_backend(setup: MicrovmSetup, after: Stay) -> list[str]:
    found, faults = after.hello.get("fault_backend"), after.hello.get("faults")
    reasons = []
    if setup.fault_backend not in ("auto", found):
        reasons.append(f"fault backend {found}, not {setup.fault_backend}")
    if faults != "released":
        reasons.append(f"the VMM's faults are {faults}, not released")
    return reasons
