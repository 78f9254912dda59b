# SPDX-License-Identifier: Apache-2.0
"""Promise: the verdict on a microvm is "ok" only for what was seen, and seen unharmed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from services.demo.microvm_verdict import MicrovmSetup, Stay, judge_microvm
from services.demo.verdict import MigrationReport

MS = 1_000_000
SETUP = MicrovmSetup(
    vmm="godwit-microvm", guest="verify", memory_bytes=64 << 20, page_count=100, vcpus=2
)
MOVE = MigrationReport(
    source="a",
    destination="b",
    pause_ms=5.0,
    total_s=0.5,
    pages_demand=7,
    pages_bulk=90,
    pages_zero=3,
    fault_p50_us=80.0,
    fault_p99_us=200.0,
)


def vcpu(number: int, first: int, last: int, ops: int, time_ms: int) -> dict[str, Any]:
    return {
        "id": number,
        "ops": ops,
        "errors": 0,
        "beat_jumps": 0,
        "faults": 3,
        "spurious": 1,
        "blocked_ns": 9 * MS,
        "first_beat": {"number": first, "time_ns": time_ms * MS},
        "last_beat": {"number": last, "time_ns": (time_ms + 50) * MS},
    }


def stats(state: str, *vcpus: dict[str, Any]) -> dict[str, Any]:
    return {"ok": True, "state": state, "vcpus": list(vcpus)}


def course() -> list[dict[str, Any]]:
    """The fields of the two stays of a move without fault."""
    hello = {"pid": 1, "accel": "kvm", "faults": "released"}
    sweep = {"pages_verified": 100, "errors": 0, "ops": 1000}
    there = (vcpu(0, 1, 40, 500, 100), vcpu(1, 1, 50, 600, 100))
    here = (vcpu(0, 41, 90, 800, 160), vcpu(1, 51, 90, 900, 170))
    return [
        {
            "node": "a",
            "hello": {**hello, "faults": "none"},
            "sweep": sweep,
            "stats": stats("running", *there),
            "last": stats("paused", *there),
        },
        {
            "node": "b",
            "hello": {**hello, "fault_backend": "uffd", "fault_backend_reason": "why"},
            "sweep": sweep,
            "stats": stats("running", *here),
            "last": None,
        },
    ]


def judge(change: Callable[[list[dict[str, Any]]], object] | None = None) -> dict[str, Any]:
    stays = copy.deepcopy(course())
    if change:
        change(stays)
    return judge_microvm(SETUP, [Stay(**stay) for stay in stays], [MOVE])


def test_a_move_without_fault() -> None:
    report = judge()
    assert (report["verdict"], report["reasons"]) == ("ok", [])
    assert (report["pages_verified"], report["corrupt_pages"], report["doubled_beats"]) == (
        100,
        0,
        0,
    )
    assert (report["fault_backend"], report["fault_backend_reason"]) == ("uffd", "why")
    (move,) = report["migrations"]
    assert (move["exits"], move["blocked_ns"]) == ([3, 3], [9 * MS, 9 * MS])
    assert move["guest_gap_ms"] == 20.0, "of the vCPU that stood still longest: 150 to 170"
    assert (move["ops_before"], move["ops_after"]) == (1100, 1700)


def at(index: int, *path: Any, to: object) -> Callable[[list[dict[str, Any]]], None]:
    def change(stays: list[dict[str, Any]]) -> None:
        place: Any = stays[index]
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (at(1, "sweep", "errors", to=2), "2 errors"),
        (at(1, "sweep", "pages_verified", to=99), "99 pages verified"),
        (at(0, "sweep", "errors", to=1), "1 errors"),
        (at(1, "stats", "state", to="failed"), "it is failed"),
        (at(1, "stats", "vcpus", 0, "errors", to=1), "1 errors"),
        (at(1, "stats", "vcpus", 1, "beat_jumps", to=1), "jumps of the heartbeat"),
        (at(0, "last", "vcpus", 0, "beat_jumps", to=4), "jumps of the heartbeat"),
        (at(1, "stats", "vcpus", 0, "first_beat", "number", to=40), "40 came after 40"),
        (at(1, "stats", "vcpus", 0, "first_beat", "number", to=42), "42 came after 40"),
        (at(1, "stats", "vcpus", 0, "first_beat", "number", to=0), "no heartbeat"),
        (at(1, "stats", "vcpus", 0, "first_beat", "time_ns", to=5), "before it had stopped"),
        (at(0, "last", to=None), "were not seen"),
        (at(0, "last", "state", to="running"), "were not seen"),
        (at(1, "stats", "vcpus", 0, "ops", to=499), "had done 500 ops"),
        (at(1, "hello", "faults", to="armed"), "faults are armed"),
        (lambda stays: stays[1]["stats"]["vcpus"].pop(), "1 vCPUs speak"),
        (lambda stays: stays.pop(), "seen 1 times"),
    ],
)
def test_what_went_wrong_is_a_reason(
    change: Callable[[list[dict[str, Any]]], object], why: str
) -> None:
    report = judge(change)
    assert report["verdict"] == "failed"
    assert any(why in reason for reason in report["reasons"]), report["reasons"]


def test_a_beat_that_came_twice_is_counted() -> None:
    report = judge(at(1, "stats", "vcpus", 0, "first_beat", "number", to=38))
    assert report["doubled_beats"] == 3


def test_a_backend_that_was_not_asked_for() -> None:
    stays = [Stay(**stay) for stay in course()]
    setup = MicrovmSetup(
        vmm="v", guest="g", memory_bytes=1, page_count=100, vcpus=2, fault_backend="exit-sigsegv"
    )
    report = judge_microvm(setup, stays, [MOVE])
    assert report["reasons"] == ["a to b: fault backend uffd, not exit-sigsegv"]


def test_a_guest_that_never_moved() -> None:
    report: dict[str, Any] = judge_microvm(SETUP, [], [])
    assert report["verdict"] == "failed"
    assert "no migration took place" in report["reasons"]
