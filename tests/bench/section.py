# SPDX-License-Identifier: Apache-2.0
"""What a section of the benchmark is: it measures, names its bars, and tells its figures.

Measuring and judging are apart: a result is plain JSON, so that bars and tables can be made again
from a file, and tested without a machine.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from tests.bench.bars import Bar
from tests.bench.estimate import Estimate

Result = dict[str, Any]
Rows = list[list[str]]
"""Of a Markdown table, the head first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much is measured."""

    quick: bool = False
    rounds: int | None = None
    """Instead of what a section would do."""
    seconds: float = math.inf
    """After which no section of whole moves begins another round."""

    def choose(self, whole: int, quick: int) -> int:
        """Rounds."""
        return self.rounds or (quick if self.quick else whole)


class Section(Protocol):
    """A part that can be run alone."""

    name: str
    title: str

    def run(self, scale: Scale) -> Result:
        """Measure."""
        ...

    def bars(self, result: Result) -> list[Bar]:
        """Judge."""
        ...

    def rows(self, result: Result) -> Rows:
        """Tell."""
        ...


def in_turns(
    name: str, round_count: int, variants: Sequence[tuple[str, Callable[[], Any]]]
) -> dict[str, list[Any]]:
    """Each variant once a round; each round begins with another, so that none is always first."""
    taken: dict[str, list[Any]] = {key: [] for key, _ in variants}
    for number in range(round_count):
        shift = number % len(variants)
        for key, measure in [*variants[shift:], *variants[:shift]]:
            taken[key].append(measure())
        if (number + 1) % max(1, round_count // 5) == 0:
            print(f"{name}: round {number + 1} of {round_count}", file=sys.stderr, flush=True)
    return taken


def joined(before: Result, after: Result) -> Result:
    """The rounds of two runs of one section: lists are put together, other values are the later's.

    Samples of one round are a list of numbers in a list, and stay one round.
    """
    whole: Result = dict(before)
    for key, value in after.items():
        old = before.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            whole[key] = joined(old, value)
        elif isinstance(old, list) and isinstance(value, list):
            whole[key] = [*old, *value]
        else:
            whole[key] = value
    return whole


def failed(why: str) -> Result:
    """Of a section that has none."""
    return {"why_not": why}


def why_failed(result: Result) -> str:
    """Empty: there is a result."""
    return str(result.get("why_not", ""))


def judged(
    bars: Sequence[Bar], values: Callable[[], Sequence[Estimate]], result: Result
) -> list[Bar]:
    """Each with its value; without one, and with the reason, where the section has failed."""
    if why := why_failed(result):
        return [replace(bar, why_not=why) for bar in bars]
    return [replace(bar, value=value) for bar, value in zip(bars, values(), strict=True)]


def figure(value: Estimate, digits: int = 1) -> str:
    """With its interval."""
    return f"{value.value:,.{digits}f} ({value.low:,.{digits}f}–{value.high:,.{digits}f})"  # noqa: RUF001
