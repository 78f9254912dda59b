# SPDX-License-Identifier: Apache-2.0
"""Processes that say a line when they are ready, and go with us."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REPO = Path(__file__).parents[2]
_END_S = 30.0


def line(process: subprocess.Popen[bytes]) -> str:
    """Its next line.

    Raises:
        RuntimeError: it ended instead.
    """
    assert process.stdout is not None
    text = process.stdout.readline().decode().strip()
    if not text:
        raise RuntimeError(f"{process.args!r} said nothing, exit {process.wait(_END_S)}")
    return text


@contextmanager
def process(*args: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run it for the length of the block."""
    running = subprocess.Popen(
        [str(arg) for arg in args], stdout=subprocess.PIPE, cwd=REPO, stdin=subprocess.PIPE
    )
    try:
        yield running
    finally:
        running.kill()
        running.communicate()
