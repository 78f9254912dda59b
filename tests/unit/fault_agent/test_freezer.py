# SPDX-License-Identifier: Apache-2.0
"""Real processes are frozen and thawed, by a cgroup and by a signal; a dead one is no problem."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.fault_agent import processes
from services.fault_agent.freezer import Freezer, How, find_cgroup2
from services.fault_agent.processes import Process

COUNTING = "import time\nwhile True:\n    open('beat', 'a').write('.')\n    time.sleep(0.001)\n"


@pytest.fixture
def beating(tmp_path: Path) -> Iterator[Process]:
    """A process that goes on, visibly, in `tmp_path / "beat"`."""
    child = subprocess.Popen([sys.executable, "-c", COUNTING], cwd=tmp_path)
    process = processes.identify(child.pid)
    assert process is not None
    try:
        yield process
    finally:
        child.kill()
        child.wait()


def _beats(tmp_path: Path) -> int:
    beat = tmp_path / "beat"
    return beat.stat().st_size if beat.exists() else 0


def _wait_beats(tmp_path: Path, than: int) -> None:
    until = time.monotonic() + 60
    while _beats(tmp_path) <= than:
        assert time.monotonic() < until
        time.sleep(0.005)


def _wait_still(process: Process, how: How, tmp_path: Path) -> int:
    """Return its beats once every thread of it has stopped, as the kernel says."""
    until = time.monotonic() + 60
    while not _stands(process, how):
        assert time.monotonic() < until
        time.sleep(0.002)
    return _beats(tmp_path)


def _stands(process: Process, how: How) -> bool:
    if how is How.SIGNAL:
        return "State:\tT" in Path(f"/proc/{process.pid}/status").read_text()
    root = find_cgroup2()
    assert root is not None
    for line in Path(f"/proc/{process.pid}/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            events = (root / line[4:].lstrip("/") / "cgroup.events").read_text()
            return "frozen 1" in events
    return False


def _can_write_cgroup2() -> bool:
    root = find_cgroup2()
    if root is None:
        return False
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            return os.access(root / line[3:].lstrip("/"), os.W_OK)
    return False


def _freezer(how: How) -> Freezer:
    if how is How.SIGNAL:
        return Freezer(None)
    if not _can_write_cgroup2():
        pytest.skip("no cgroup v2 hierarchy that can be written: run as root on a host with one")
    return Freezer(find_cgroup2())


@pytest.mark.parametrize("how", How)
def test_freeze_stops_and_thaw_lets_go_on(how: How, beating: Process, tmp_path: Path) -> None:
    """Frozen twice it is frozen once; another freezer, as of the next agent, thaws it."""
    freezer = _freezer(how)
    _wait_beats(tmp_path, 0)
    assert not freezer.is_frozen(beating)
    assert freezer.freeze(beating) is how
    assert freezer.freeze(beating) is how
    still = _wait_still(beating, how, tmp_path)
    time.sleep(0.05)
    assert _beats(tmp_path) == still
    assert processes.is_alive(beating)
    next_one = _freezer(how)
    assert next_one.is_frozen(beating)
    next_one.thaw(beating)
    assert not next_one.is_frozen(beating)
    _wait_beats(tmp_path, still)
    next_one.thaw(beating)


@pytest.mark.parametrize("how", How)
def test_a_frozen_process_can_be_killed(how: How, beating: Process, tmp_path: Path) -> None:
    """A seal or an abort never waits for a thaw; what is left of the cgroup is swept."""
    freezer = _freezer(how)
    _wait_beats(tmp_path, 0)
    freezer.freeze(beating)
    _wait_still(beating, how, tmp_path)
    os.kill(beating.pid, 9)
    os.waitpid(beating.pid, 0)
    assert not freezer.is_frozen(beating)
    freezer.thaw(beating)
    assert freezer.freeze(beating) is None
    freezer.sweep()
    root = find_cgroup2()
    if how is How.CGROUP and root is not None:
        assert not list(root.rglob(f"godwit-vmm-{beating.pid}-*"))


def test_what_others_froze_is_not_ours(tmp_path: Path) -> None:
    """Where the hierarchy is mounted is read from mountinfo, blanks and all."""
    text = (
        "24 1 0:22 / /sys rw - sysfs sysfs rw\n"
        "31 24 0:27 / /sys/fs/cgroup/uni\\040fied rw,relatime shared:5 - cgroup2 cgroup2 rw\n"
    )
    assert find_cgroup2(text) == Path("/sys/fs/cgroup/uni fied")
    assert find_cgroup2("24 1 0:22 / /sys rw - sysfs sysfs rw\n") is None
