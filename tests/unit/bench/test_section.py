# SPDX-License-Identifier: Apache-2.0
"""Turns, and each section's bars from results that are known."""

from __future__ import annotations

import json

from tests.bench import counts, lanes, streams
from tests.bench.section import in_turns, joined


def test_each_is_measured_once_a_round_and_each_is_first_in_turn() -> None:
    order: list[str] = []

    def measure(name: str) -> int:
        order.append(name)
        return len(order)

    taken = in_turns(
        "test",
        3,
        [(key, lambda key=key: measure(key)) for key in "abc"],  # type: ignore[misc]
    )
    assert "".join(order) == "abcbcacab"
    assert taken == {"a": [1, 6, 8], "b": [2, 4, 9], "c": [3, 5, 7]}


def test_bars_of_lanes() -> None:
    us = {"tcp": 20.0, "uffd": 10.0, "idle": 45.0, "bulk": 90.0, "capped": 45.0}
    found = lanes.bars({"us": {key: [[at] * 10] * 5 for key, at in us.items()}})
    assert [round(bar.value.value, 3) for bar in found if bar.value] == [1.5, 1.5, 2.0, 1.0]
    assert [bar.ok for bar in found] == [False, True, True, True]


def test_bars_of_streams() -> None:
    mbs = {"stream": 2000.0, "wire": 1600.0, "raw_2": 900.0, "grpcio": 200.0}
    found = streams.bars({"mbs": {key: [at] * 5 for key, at in mbs.items()}})
    assert [bar.value.value for bar in found if bar.value] == [0.8, 0.45, 4.5]
    assert [bar.ok for bar in found] == [True, False, True]


def test_runs_are_joined_round_by_round() -> None:
    before = {"us": {"idle": [[1, 2]]}, "versions": {"new": "11.1"}, "own": True}
    after = {"us": {"idle": [[3, 4]]}, "versions": {"new": "11.1"}, "own": False}
    assert joined(before, after) == {
        "us": {"idle": [[1, 2], [3, 4]]},
        "versions": {"new": "11.1"},
        "own": False,
    }


def test_bars_of_counts() -> None:
    """A page that costs more than the reference allows is missed; so is one not counted."""
    reference = json.loads(counts.REFERENCE.read_text())
    dear = {label: [at * 1.2] for label, at in reference.items()}
    assert not any(bar.ok for bar in counts.bars({"counts": dear}))
    same = {label: [at] for label, at in reference.items()}
    assert all(bar.ok for bar in counts.bars({"counts": same}))
    assert all("no valgrind" in bar.verdict() for bar in counts.bars({"why_not": "no valgrind"}))
