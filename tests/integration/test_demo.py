# SPDX-License-Identifier: Apache-2.0
"""Promise: `godwit demo --json` moves a real guest to b and back, unharmed, and cleans up."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from services.cli.exit_status import ExitStatus
from services.demo.leftovers import PREFIX, journaled_vmms
from services.demo.network import PREFIX as NETNS_PREFIX
from services.fault_agent import processes
from services.fault_agent.drivers.tap import NAMESPACES
from tests.harness.cluster import small_image

pytestmark = [
    pytest.mark.requires("uffd", "qemu", "root"),
    pytest.mark.slow,
    pytest.mark.timeout(420),
]

DEMO = [sys.executable, "-m", "services.cli.main", "demo"]
RAM = Path("/dev/shm")


@pytest.fixture(scope="module", autouse=True)
def _image() -> None:
    small_image()


async def run_demo(directory: Path, *arguments: str) -> tuple[int, list[str], str]:
    """Run it; exit status, lines on stdout, stderr."""
    process = await asyncio.create_subprocess_exec(
        *DEMO,
        *("--dir", str(directory)),
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    return process.returncode or 0, out.decode().splitlines(), err.decode()


async def started(directory: Path, until: str) -> asyncio.subprocess.Process:
    """A small demo that has come as far as to say `until`."""
    process = await asyncio.create_subprocess_exec(
        *DEMO,
        *("--dir", str(directory), "--memory", "192M", "--workload-mib", "64"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    async with asyncio.timeout(120):
        while until.encode() not in (line := await process.stderr.readline()):
            assert line, f"the demo ended before {until!r}"
    return process


def left_behind(directory: Path) -> list[str]:
    """What a run in `directory` has left on this machine, but for the directory itself."""
    left = [str(path) for path in RAM.glob(f"{PREFIX}cluster-*") if names(path, directory)]
    left += [f"VMM {vmm}" for vmm in journaled_vmms(directory / "cluster") if is_there(vmm)]
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(directory).encode() in cmdline.read_bytes():
                left.append(str(cmdline))
        except OSError:
            continue  # it has ended meanwhile
    return left


def names(claim: Path, directory: Path) -> bool:
    try:
        return str(directory) in (claim / "owner.json").read_text()
    except OSError:
        return False


def is_there(vmm: processes.Process) -> bool:
    return processes.is_alive(vmm)


async def test_demo_end_to_end(tmp_path: Path) -> None:
    """The whole job with the issue's own report, key by key."""
    directory = tmp_path / "demo"
    arguments = ("--memory", "256M", "--workload-mib", "128", "--json")
    status, out, err = await run_demo(directory, *arguments)
    assert out, err
    report: dict[str, Any] = json.loads(out[-1])
    assert report["reasons"] == [], err
    assert (report["verdict"], status) == ("ok", ExitStatus.OK)
    assert report["vmm"].startswith("QEMU ")
    assert report["guest"].startswith("Linux ")
    assert report["memory_bytes"] == 256 << 20
    assert [(move["from"], move["to"]) for move in report["migrations"]] == [("a", "b"), ("b", "a")]
    for move in report["migrations"]:
        for key in ("pause_ms", "guest_gap_ms", "total_s", "fault_p50_us", "fault_p99_us"):
            assert move[key] > 0, key
        assert move["pages_demand"] > 0
        pages = move["pages_demand"] + move["pages_bulk"] + move["pages_zero"]
        assert pages <= (256 << 20) // 4096
    assert report["pages_verified"] == 128 * 256
    assert (report["corrupt_pages"], report["doubled_beats"]) == (0, 0)
    assert left_behind(directory) == []
    assert not directory.exists(), "nothing is kept of a good run"


async def test_interrupted_demo_cleans_up(tmp_path: Path) -> None:
    """Ctrl-C in the middle, twice: VMMs, processes, namespaces and memory are gone."""
    directory = tmp_path / "demo"
    process = await started(directory, "move: a to b")
    namespace = NAMESPACES / f"{NETNS_PREFIX}{process.pid}"
    assert left_behind(directory) != []
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    out, err = await process.communicate()
    assert process.returncode == ExitStatus.INTERRUPTED, err.decode()
    assert out == b""
    assert left_behind(directory) == []
    assert not namespace.exists()


async def test_demo_that_was_killed_is_cleaned_up_by_the_next(tmp_path: Path) -> None:
    """Kill -9 leaves everything; the next run ends it before it begins."""
    first, second = tmp_path / "first", tmp_path / "second"
    process = await started(first, "guest: boots")
    process.kill()
    await process.communicate()
    assert left_behind(first) != []
    process = await started(second, "guest: boots")
    assert left_behind(first) == []
    process.send_signal(signal.SIGTERM)
    await process.communicate()
    assert process.returncode == ExitStatus.INTERRUPTED
    assert left_behind(second) == []


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--memory", "192M", "--workload-mib", "150"), "FIELD_INVALID"),
        (("--memory", "much"), "not an amount"),
        (("--memory", "191M", "--workload-mib", "64"), "multiple of 2 MiB"),
    ],
)
async def test_refusals(tmp_path: Path, arguments: tuple[str, ...], reason: str) -> None:
    status, out, err = await run_demo(tmp_path / "demo", *arguments)
    assert status == ExitStatus.USAGE
    assert out == []
    assert reason in err
