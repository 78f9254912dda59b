# SPDX-License-Identifier: Apache-2.0
"""A service that is killed is there again at once, without what its start costs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

_WAIT_S = 60
_SERVICE = """
import os, signal, sys
SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR2}
from services.common import respawn

def work(told, tell):
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    tell(f"{told}x")
    print(os.getpid(), told, flush=True)
    return 3 if signal.sigwait(SIGNALS) == signal.SIGTERM else 0

sys.exit(respawn.keep_alive(work))
"""


@contextmanager
def service() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVICE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=_WAIT_S)


def says(process: subprocess.Popen[str]) -> tuple[int, str]:
    """What the next child says: its pid, and what its predecessor told it."""
    assert process.stdout is not None
    pid, _, told = process.stdout.readline().strip().partition(" ")
    return int(pid), told


@pytest.mark.timeout(120)
def test_the_next_one_follows_and_knows_what_it_was_told() -> None:
    with service() as process:
        pids = []
        for told in ("", "x", "xx"):
            pid, heard = says(process)
            assert heard == told
            pids.append(pid)
            os.kill(pid, signal.SIGKILL)
        assert process.pid not in pids
        assert len({*pids, says(process)[0]}) == 4


@pytest.mark.timeout(120)
def test_what_ends_by_itself_is_not_started_again() -> None:
    """SIGTERM to the parent is the child's, and its exit status the parent's."""
    with service() as process:
        says(process)
        process.terminate()
        assert process.wait(timeout=_WAIT_S) == 3


@pytest.mark.timeout(120)
def test_the_child_goes_with_its_parent() -> None:
    """Two services on one state would each believe their own."""
    with service() as process:
        says(process)
        process.kill()
        # Its end of the pipe is closed when it is dead: nobody else has one.
        assert process.stdout is not None
        assert process.stdout.read() == ""
