# SPDX-License-Identifier: Apache-2.0
"""A wall clock that a test moves, in every process that it gives the environment."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

_SHIM = Path(__file__).with_name("clock_shim.c")
YEAR_S = 365 * 86400


class MovedClock:
    """See clock_shim.c. Blocks while it is made: a C file is compiled."""

    def __init__(self, directory: Path) -> None:
        """`directory`: where its two files go."""
        library = directory / "clock_shim.so"
        subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, _SHIM], check=True)
        self._offset = directory / "clock_offset"
        self._offset.write_bytes(struct.pack("q", 0))
        self.environment = {
            "LD_PRELOAD": str(library),
            "GODWIT_CLOCK_OFFSET_FILE": str(self._offset),
        }

    def move(self, seconds: int) -> None:
        """So far from the true time, now and in processes that start later.

        In place: those that run have the file mapped, and one that is cut short for a moment ends
        by SIGBUS whoever looks at the clock then.
        """
        with self._offset.open("r+b") as file:
            file.write(struct.pack("q", seconds))
