# SPDX-License-Identifier: Apache-2.0
"""Runs of pages in a bitmap."""

from __future__ import annotations

import re
from collections.abc import Iterator

_ONES = re.compile("1+")


def set_runs(bits: bytes, first_page: int = 0) -> Iterator[tuple[int, int]]:
    """Runs (first page, count) of set bits; bit i (LSB first) = page first_page + i."""
    # Most significant digit first: turned round, character i is bit i.
    text = format(int.from_bytes(bits, "little"), "b")[::-1]
    for match in _ONES.finditer(text):
        yield first_page + match.start(), match.end() - match.start()
