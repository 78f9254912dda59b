# SPDX-License-Identifier: Apache-2.0
"""Amounts are read as the tables say and nothing else is."""

from __future__ import annotations

import pytest

from services.cli import quantities


@pytest.mark.parametrize(
    ("text", "rate", "memory"),
    [
        ("512", 512, 512),
        ("125M", 125_000_000, 125 << 20),
        ("1.5G", 1_500_000_000, 3 << 29),
        ("2Gi", 2 << 30, 2 << 30),
        ("64kB", 64_000, 64 << 10),
    ],
)
def test_amounts(text: str, rate: int, memory: int) -> None:
    assert quantities.parse_rate(text) == rate
    assert quantities.parse_memory(text) == memory


@pytest.mark.parametrize("text", ["", "fast", "-1", "0", "1e9", "1 M M", "512MM", "nan"])
def test_what_is_no_amount(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not an amount|less than one byte"):
        quantities.parse_rate(text)


@pytest.mark.parametrize(
    ("ns", "text"),
    [
        (0, "-"),
        (900, "1 µs"),
        (31_400_000, "31.4 ms"),
        (1_230_000_000, "1.23 s"),
        (185_000_000_000, "3 min 05 s"),
    ],
)
def test_durations(ns: int, text: str) -> None:
    assert quantities.duration(ns) == text
