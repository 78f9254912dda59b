# SPDX-License-Identifier: Apache-2.0
"""A shutdown is held off by a child that ends with the keeper. logind itself is not here."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from services.node_keeper import inhibitor
from services.node_keeper.inhibitor import Inhibitor

STAND_IN = """#!/bin/sh
# Does as systemd-inhibit does: runs the command that comes after its options, and waits for it.
echo "$$ $@" >>"{log}"
while [ "${{1#--}}" != "$1" ]; do shift; done
"$@"
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "systemd-inhibit"
    path.write_text(STAND_IN.format(log=tmp_path / "log"))
    path.chmod(0o755)
    return path


def _asked(program: Path) -> list[str]:
    log = program.with_name("log")
    for _ in range(1000):
        if log.exists() and log.read_text().endswith("\n"):
            return log.read_text().splitlines()
        os.sched_yield()
        subprocess.run(["sleep", "0.01"], check=True)
    raise AssertionError("it was never started")


def test_it_is_held_while_there_is_a_reason(program: Path) -> None:
    lock = Inhibitor(str(program))
    lock.set("web-1 (retained)")
    assert lock.held
    (line,) = _asked(program)
    assert "--what=shutdown --mode=block --who=godwit --why=web-1 (retained) cat" in line
    lock.set("another reason, the same lock")
    assert len(_asked(program)) == 1
    lock.set("")
    assert not lock.held
    lock.set("")


def test_a_lock_that_was_lost_is_taken_again(program: Path) -> None:
    lock = Inhibitor(str(program))
    lock.set("why")
    (line,) = _asked(program)
    assert lock._child is not None
    os.kill(int(line.split()[0]), signal.SIGKILL)
    lock._child.wait()
    assert not lock.held
    program.with_name("log").unlink()
    lock.set("why")
    assert lock.held
    _asked(program)
    lock.release()


def test_it_goes_with_a_keeper_that_is_killed(program: Path) -> None:
    script = (
        "import os, signal; from services.node_keeper.inhibitor import Inhibitor;"
        f"Inhibitor({str(program)!r}).set('why');"
        "input(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE) as keeper:
        (line,) = _asked(program)
        child = int(line.split()[0])
        pidfd = os.pidfd_open(child)
        keeper.communicate(b"\n")
    try:
        import select

        assert select.select([pidfd], [], [], 60)[0], "the lock outlives its keeper"
    finally:
        os.close(pidfd)


def test_where_there_is_no_logind_it_says_so(program: Path, tmp_path: Path) -> None:
    assert "not on PATH" in inhibitor.why_not("no-such-program")
    assert "is not there" in inhibitor.why_not(str(program), tmp_path / "bus")
    with socket.socket(socket.AF_UNIX) as bus:
        bus.bind(str(tmp_path / "bus"))
        assert inhibitor.why_not(str(program), tmp_path / "bus") == ""
