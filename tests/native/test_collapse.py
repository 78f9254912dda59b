# SPDX-License-Identifier: Apache-2.0
"""Promise: memory is made huge where it is whole, holes stay holes, and not a byte changes."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from services.fault_agent.collapse import HUGE_BYTES, collapse
from services.pagecore.native import NativePageCore

PAGE = 4096
RANGES = 6
HOLE = 3 * HUGE_BYTES + 5 * PAGE
"""One page, in the fourth range."""


def _huge_kib() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("ShmemHugePages:"):
            return int(line.split()[1])
    return 0


def test_whole_ranges_become_huge_under_their_user() -> None:
    path = Path(f"/dev/shm/godwit-test-collapse-{os.getpid()}")
    try:
        with path.open("w+b") as file:
            file.truncate(RANGES * HUGE_BYTES)
            for start in range(0, RANGES * HUGE_BYTES, PAGE):
                if start != HOLE:
                    os.pwrite(file.fileno(), start.to_bytes(8, "little") * (PAGE // 8), start)
            before, blocks, huge_kib = path.read_bytes(), path.stat().st_blocks, _huge_kib()
            with mmap.mmap(file.fileno(), RANGES * HUGE_BYTES) as guest:
                done = collapse(NativePageCore(), str(path), stop=lambda: False)
                if done.why_not:
                    pytest.skip(f"needs MADV_COLLAPSE: {done.why_not}")
                assert done.huge_bytes + done.left_bytes == (RANGES - 1) * HUGE_BYTES
                assert done.huge_bytes > 0
                assert _huge_kib() - huge_kib >= done.huge_bytes >> 10
                assert path.stat().st_blocks == blocks
                assert guest[:] == before
                guest[HOLE] = 7
                guest[0] = 9
            assert (os.pread(file.fileno(), 1, HOLE), os.pread(file.fileno(), 1, 0)) == (
                b"\x07",
                b"\x09",
            )
    finally:
        path.unlink()
