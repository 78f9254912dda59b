# SPDX-License-Identifier: Apache-2.0
"""A file system of its own that is soon full. Needs root."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def mounted(directory: Path, size: str) -> Iterator[Path]:
    """A tmpfs of `size` (mount's spelling, e.g. "1M") at a new directory, for the block."""
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", directory], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)


def fill(disk: Path) -> Path:
    """Take every byte that is left; unlink it to give them back."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return ballast
