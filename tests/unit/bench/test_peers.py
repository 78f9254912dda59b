# SPDX-License-Identifier: Apache-2.0
"""What a move cost, from consoles that are known; bars against peers; peers that cannot be had."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from services.demo.console import Console, Line
from tests.bench.peers import section
from tests.bench.peers.beats import cost

MS = 1_000_000


def console(beats: Sequence[tuple[int, int, int]], errors: int = 0, tail: str = "") -> Console:
    """Heartbeats (ms, number, ops)."""
    lines = [
        Line(
            t_ns=at * MS,
            since_ns=at * MS,
            text=f"HB {number} ops={ops} err={errors} sweeps=0 verified=0",
        )
        for at, number, ops in beats
    ]
    return Console(node="a", epoch=1, lines=lines, tail=tail)


BEFORE = [(at, at // 10 + 1, at * 100) for at in range(0, 2001, 10)]
"""Two seconds, a beat each 10 ms, 100 pages a ms: 100 000 pages/s."""


def test_the_cost_of_a_move() -> None:
    after = [(2050, 202, 200_100), (2150, 203, 210_000), (2990, 204, 225_000), (3010, 205, 900_000)]
    found = cost(console(BEFORE), console(after))
    assert found.gap_ms == 50
    assert found.later_gap_ms == 840
    assert found.full_pages_per_s == pytest.approx(100_000)
    # By 3000 ms the guest had said 225 000, of which 200 000 before.
    assert found.first_second_share == pytest.approx(0.25)
    assert found.error_count == 0


def test_a_beat_that_the_stop_cut_in_two_counts_where_it_ends() -> None:
    after = console([(2100, 203, 200_200), (3500, 204, 200_300)])
    after.lines.insert(
        0, Line(t_ns=2040 * MS, since_ns=0, text="ops=200100 err=0 sweeps=0 verified=0")
    )
    found = cost(console(BEFORE, tail="HB 202 "), after)
    assert found.gap_ms == 40


def test_a_silent_second_is_no_speed() -> None:
    found = cost(console(BEFORE), console([(3500, 202, 300_000), (3600, 203, 400_000)]))
    assert found.first_second_share == 0
    assert found.gap_ms == 1500


@pytest.mark.parametrize(
    ("after", "why"),
    [
        ([(2050, 201, 200_100), (3100, 202, 200_200)], "heartbeat 201 after 201"),
        ([(2050, 1, 0), (3100, 2, 100)], "heartbeat 1 after 201"),
        ([(2050, 202, 200_100)], "1 after it"),
        ([(2050, 202, 200_100), (2100, 203, 200_200)], "not listened to"),
    ],
)
def test_a_guest_that_is_not_one_has_no_cost(after: list[tuple[int, int, int]], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        cost(console(BEFORE), console(after))


def test_errors_are_seen() -> None:
    after = console([(2050, 202, 200_100), (3100, 203, 200_200)], errors=3)
    assert cost(console(BEFORE), after).error_count == 3


def _run(gap_ms: float, share: float, memory_s: float) -> dict[str, Any]:
    return {"gap_ms": gap_ms, "first_second_share": share, "memory_s": memory_s}


def _result(ours: dict[str, Any], old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    moves = {
        section.OURS: [ours] * 7,
        section.OLD_PREEMPT: [old] * 7,
        section.NEW_PREEMPT: [new] * 7,
    }
    return {"versions": {}, "missing": {}, "moves": moves}


def test_bars_of_a_cap() -> None:
    result = _result(_run(90, 0.1, 2), _run(600, 0.02, 2.5), _run(93, 0.02, 2.4))
    found = section.FAST.bars(result)
    assert [round(bar.value.value, 2) for bar in found if bar.value] == [0.97, 0.15, 5.0, 0.83]
    assert all(bar.ok for bar in found)
    slower = _result(_run(200, 0.03, 3), _run(600, 0.02, 2.5), _run(93, 0.02, 2.4))
    assert not any(bar.ok for bar in section.FAST.bars(slower))


def test_a_peer_at_a_standstill_is_no_division_by_zero() -> None:
    result = _result(_run(90, 0.1, 2), _run(600, 0, 2.5), _run(93, 0, 2.4))
    assert section.FAST.bars(result)[2].ok


def test_a_peer_that_cannot_be_had_is_a_bar_missed_with_the_reason() -> None:
    result = _result(_run(90, 0.1, 2), _run(600, 0.02, 2.5), _run(93, 0.02, 2.4))
    result["moves"][section.NEW_PREEMPT] = []
    result["missing"] = {"new": "no such suite"}
    found = section.FAST.bars(result)
    assert [bar.ok for bar in found] == [False, True, False, False]
    assert "no such suite" in found[0].verdict()
