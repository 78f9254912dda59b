# SPDX-License-Identifier: Apache-2.0
"""Times of day in which an operation may begin moves."""

from __future__ import annotations

import re
from collections.abc import Iterable

from services.common.errors import InvalidArgumentError

DAY_MIN = 24 * 60
_PATTERN = re.compile(r"^([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-4]):([0-5]\d)$")


def read(text: str) -> tuple[int, int]:
    """(first, last) minute of the day of "22:00-04:00", UTC; the last one is outside.

    Raises:
        InvalidArgumentError: WINDOW_INVALID.
    """
    found = _PATTERN.match(text)
    if found:
        numbers = [int(part) for part in found.groups()]
        first, last = numbers[0] * 60 + numbers[1], numbers[2] * 60 + numbers[3]
        if first != last and last <= DAY_MIN:
            return first, last
    raise InvalidArgumentError(
        "WINDOW_INVALID", f"{text!r} is not HH:MM-HH:MM", hint="for example 22:00-04:00, UTC"
    )


def is_open(windows: Iterable[str], now_s: float) -> bool:
    """Whether one of them is open at a time of the wall clock; none at all is always open."""
    minute = now_s % 86_400 / 60
    any_window = False
    for first, last in map(read, windows):
        any_window = True
        if first < last:
            if first <= minute < last:
                return True
        elif minute >= first or minute < last:  # over midnight
            return True
    return not any_window
