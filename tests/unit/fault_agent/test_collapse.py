# SPDX-License-Identifier: Apache-2.0
"""Promise: memory is made huge where it is whole, holes stay holes, and not a byte changes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.fault_agent.collapse import HUGE_BYTES, collapse, whole_ranges, why_refused
from services.pagecore.fake import FakePageCore

PAGE = 4096
HOLE = 3 * HUGE_BYTES + 5 * PAGE
"""One page, in the fourth range."""
LEN_BYTES = 8 * HUGE_BYTES
END = 7 * HUGE_BYTES
"""No data behind."""


@pytest.fixture
def ram() -> Iterator[Path]:
    path = Path(f"/dev/shm/godwit-test-collapse-{os.getpid()}")
    with path.open("wb") as file:
        file.truncate(LEN_BYTES)
        for start in range(0, END, PAGE):
            if start != HOLE:
                os.pwrite(file.fileno(), start.to_bytes(8, "little") * (PAGE // 8), start)
    yield path
    path.unlink()


def never() -> bool:
    return False


def test_ranges_without_holes(ram: Path) -> None:
    with ram.open("rb") as file:
        found = list(whole_ranges(file.fileno(), LEN_BYTES))
    assert found == [n * HUGE_BYTES for n in (0, 1, 2, 4, 5, 6)]


def test_a_kernel_that_cannot_is_asked_once(ram: Path) -> None:
    done = collapse(FakePageCore(), str(ram), stop=never)
    assert (done.huge_bytes, done.left_bytes) == (0, HUGE_BYTES)
    assert "MADV_COLLAPSE" in done.why_not


def test_it_can_be_stopped(ram: Path) -> None:
    done = collapse(FakePageCore(), str(ram), stop=lambda: True)
    assert (done.huge_bytes, done.left_bytes, done.why_not) == (0, 0, "stopped")


def test_what_cannot_become_huge_says_why() -> None:
    assert "4 KiB" in why_refused("kvm-userfault")
    assert why_refused("uffd") == why_refused("exit-emulation") == ""
