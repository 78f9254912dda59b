# SPDX-License-Identifier: Apache-2.0
"""Bars: what must be reached, and whether it was. A bar that was not measured is missed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench.estimate import Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One of them."""

    name: str
    limit: float
    at_most: bool = True
    """Else: at least."""
    unit: str = "x"
    """x: a ratio within one run."""
    value: Estimate | None = None
    why_not: str = ""
    """Why there is no value."""

    @property
    def ok(self) -> bool:
        """Reached. The interval does not excuse; NaN is never ok."""
        if self.value is None:
            return False
        return self.value.value <= self.limit if self.at_most else self.value.value >= self.limit

    @property
    def is_close(self) -> bool:
        """Another run may well say the opposite: the limit is within the interval."""
        return self.value is not None and self.value.low < self.limit < self.value.high

    def verdict(self) -> str:
        """In a word, or a few."""
        if self.value is None:
            return f"MISSED (not measured: {self.why_not})"
        return ("ok" if self.ok else "MISSED") + (", within the noise" if self.is_close else "")


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table(bars: Sequence[Bar]) -> list[str]:
    """Markdown."""
    lines = ["| bar | value | 95 % | n | limit | verdict |", "|---|--:|--:|--:|--:|---|"]
    for bar in bars:
        sign = "≤" if bar.at_most else "≥"
        limit = f"{sign} {_number(bar.limit)} {bar.unit}"
        if bar.value is None:
            lines.append(f"| {bar.name} | - | - | 0 | {limit} | {bar.verdict()} |")
            continue
        value = bar.value
        lines.append(
            f"| {bar.name} | {_number(value.value)} {bar.unit}"
            f" | {_number(value.low)}–{_number(value.high)} | {value.n}"  # noqa: RUF001
            f" | {limit} | {bar.verdict()} |"
        )
    return lines


def write(bars: Sequence[Bar], path: Path) -> None:
    """As JSON: a list of {name, value, limit, ok}."""
    rows = [
        {
            "name": bar.name,
            "value": bar.value.value if bar.value else None,
            "limit": bar.limit,
            "ok": bar.ok,
        }
        for bar in bars
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n")


def exit_status(bars: Sequence[Bar]) -> int:
    """1 if one is missed."""
    return 0 if all(bar.ok for bar in bars) else 1
