# SPDX-License-Identifier: Apache-2.0
"""Promise: `godwit demo --vmm microvm` does the whole job without QEMU, and without privilege."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from services.cli.exit_status import ExitStatus
from services.demo.leftovers import PREFIX, journaled_vmms
from services.fault_agent import processes
from tests.harness.microvm import need_microvm

pytestmark = pytest.mark.timeout(300)

DEMO = [sys.executable, "-m", "services.cli.main", "demo", "--json"]
SMALL = ("--memory", "64M", "--workload-mib", "32", "--vcpus", "2")
NO_CAPABILITY = ("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs")


async def run_demo(
    directory: Path, *arguments: str, prefix: tuple[str, ...] = (), path: str | None = None
) -> tuple[int, dict[str, Any], str]:
    """Run it; exit status, report, stderr."""
    need_microvm()
    process = await asyncio.create_subprocess_exec(
        *prefix,
        *DEMO,
        *("--dir", str(directory)),
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **({"PATH": path} if path is not None else {})},
    )
    out, err = await process.communicate()
    lines = out.decode().splitlines()
    assert lines, err.decode()
    return process.returncode or 0, json.loads(lines[-1]), err.decode()


def check(status: int, report: dict[str, Any], err: str) -> None:
    assert report["reasons"] == [], err
    assert (report["verdict"], status) == ("ok", ExitStatus.OK)
    assert report["vmm"].startswith("godwit-microvm ")
    assert [(move["from"], move["to"]) for move in report["migrations"]] == [("a", "b"), ("b", "a")]
    for move in report["migrations"]:
        for key in ("pause_ms", "guest_gap_ms", "total_s", "ops_before"):
            assert move[key] > 0, key
        assert move["ops_after"] > move["ops_before"]
        assert len(move["exits"]) == len(move["blocked_ns"]) == 2
        assert move["fault_backend"] == report["fault_backend"]
        assert move["fault_backend_reason"]
    assert report["pages_verified"] == 32 * 256
    assert (report["corrupt_pages"], report["doubled_beats"]) == (0, 0)


def left_behind(directory: Path) -> list[str]:
    claims = Path("/dev/shm").glob(f"{PREFIX}cluster-*/owner.json")
    left = [str(path) for path in claims if str(directory) in path.read_text()]
    vmms = journaled_vmms(directory / "cluster")
    return left + [f"VMM {vmm}" for vmm in vmms if processes.is_alive(vmm)]


@pytest.mark.parametrize(
    "accel", ["thread", pytest.param("kvm", marks=pytest.mark.requires("kvm", "uffd"))]
)
async def test_the_whole_job(tmp_path: Path, accel: str) -> None:
    directory = tmp_path / "demo"
    status, report, err = await run_demo(directory, "--vmm", "microvm", "--accel", accel, *SMALL)
    check(status, report, err)
    assert report["accel"] == accel
    assert left_behind(directory) == []
    assert not directory.exists(), "nothing is kept of a good run"


@pytest.mark.requires("root")
async def test_the_whole_job_without_any_capability(tmp_path: Path) -> None:
    """No ptrace, no userfaultfd, no KVM: PROT_NONE and signals are left, and are enough."""
    status, report, err = await run_demo(
        tmp_path / "demo",
        *("--vmm", "microvm", "--accel", "thread", "--fault-backend", "exit-sigsegv"),
        *SMALL,
        prefix=NO_CAPABILITY,
    )
    check(status, report, err)
    assert report["fault_backend"] == "exit-sigsegv"
    for move in report["migrations"]:
        assert sum(move["exits"]) > 0
        assert sum(move["blocked_ns"]) > 0


async def test_where_there_is_no_qemu_a_microvm_is_taken(tmp_path: Path) -> None:
    """And it is said: nobody shall take the one for the other."""
    empty = tmp_path / "bin"
    empty.mkdir()
    status, report, err = await run_demo(tmp_path / "demo", *SMALL, path=str(empty))
    check(status, report, err)
    assert "a microvm instead of QEMU: " in err
    assert "qemu-system-x86_64 is not installed" in err
