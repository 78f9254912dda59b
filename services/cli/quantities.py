# SPDX-License-Identifier: Apache-2.0
"""Amounts as people write and read them."""

from __future__ import annotations

import re

_AMOUNT = re.compile(
    r"(?P<number>[0-9]+(?:\.[0-9]+)?)\s*(?P<prefix>[KMGT]?)(?P<binary>i?)B?", re.IGNORECASE
)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_BYTES_MAX = 1 << 60
_MINUTE_S = 60


def parse_rate(text: str) -> int:
    """Bytes a second: "125M" is 125 000 000, as link speeds are told; "125Mi" is 131 072 000.

    Raises:
        ValueError: says what would be right.
    """
    return _parse(text, base=1000, example="125M or 1.5G, in bytes a second")


def parse_memory(text: str) -> int:
    """Bytes of memory: "512M" and "512Mi" are both 512 MiB, as memory is told.

    Raises:
        ValueError: says what would be right.
    """
    return _parse(text, base=1024, example="512M or 2G")


def _parse(text: str, *, base: int, example: str) -> int:
    match = _AMOUNT.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not an amount; write for example {example}")
    if match["binary"]:
        base = 1024
    amount = float(match["number"]) * base ** _POWERS[match["prefix"].upper()]
    if amount < 1:
        raise ValueError(f"{text!r} is less than one byte")
    if amount > _BYTES_MAX:
        raise ValueError(f"{text[:40]!r} is more than anybody has")
    return int(amount)


def memory(size_bytes: int) -> str:
    """512 MiB."""
    size, unit = float(size_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.4g} {unit}"


def duration(ns: int) -> str:
    """23.4 ms; 1.20 s; 3 min 05 s; "-" for 0, which in the API means "not yet"."""
    seconds = ns / 1e9
    if ns == 0:
        return "-"
    if seconds < 0.001:
        return f"{ns / 1e3:.0f} µs"
    if seconds < 1:
        return f"{ns / 1e6:.1f} ms"
    if seconds < _MINUTE_S:
        return f"{seconds:.2f} s"
    return f"{int(seconds // _MINUTE_S)} min {seconds % _MINUTE_S:02.0f} s"


def percent(share: float) -> str:
    """99.9 %; 100 % only for the whole."""
    if share < 1:
        return f"{min(share * 100, 99.9):.1f} %"
    return "100 %"
