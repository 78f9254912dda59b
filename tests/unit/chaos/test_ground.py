# SPDX-License-Identifier: Apache-2.0
"""A clock that `make chaos` lets jump does jump, and only the wall clock."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.ground import clock_library

HOUR_S = 3600
_SAY = "import time; print(time.time(), time.monotonic())"


def test_the_wall_clock_jumps_and_no_other(tmp_path: Path) -> None:
    with clock_library() as library:
        if library is None:
            pytest.skip("needs a C compiler")

        def clocks(jump_s: int) -> tuple[float, float]:
            (tmp_path / "part.clock").write_bytes(struct.pack("=q", jump_s * 1_000_000_000))
            done = subprocess.run(
                [sys.executable, "-c", _SAY],
                env={
                    **os.environ,
                    "LD_PRELOAD": str(library),
                    "GODWIT_HOOKS_DIR": str(tmp_path / "part"),
                },
                capture_output=True,
                text=True,
                check=True,
            )
            wall, monotonic = done.stdout.split()
            return float(wall), float(monotonic)

        wall, monotonic = clocks(0)
        jumped, later = clocks(HOUR_S)
    assert HOUR_S <= jumped - wall < 2 * HOUR_S
    assert 0 <= later - monotonic < HOUR_S
