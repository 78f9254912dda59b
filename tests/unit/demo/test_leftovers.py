# SPDX-License-Identifier: Apache-2.0
"""Promise: what a killed run leaves is ended by the next one, and nothing else is."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from services.demo import leftovers
from services.fault_agent import journal, journal_file, processes

Sleep = Callable[[], subprocess.Popen[bytes]]


@pytest.fixture
def sleeper() -> Iterator[Sleep]:
    """Start processes that sleep; those still there are ended."""
    started: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(["sleep", "1000"]))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def identity(process: subprocess.Popen[bytes]) -> processes.Process:
    found = processes.identify(process.pid)
    assert found is not None
    return found


def make_claim(path: Path, state_dir: Path, parts: list[processes.Process]) -> None:
    path.mkdir()
    (path / "guest.ram").write_bytes(b"memory")
    owner = {"state_dir": str(state_dir), "parts": [asdict(part) for part in parts]}
    (path / "owner.json").write_text(json.dumps(owner))


def make_journal(
    state_dir: Path, vm_id: str, process: processes.Process, boot_id: str | None = None
) -> None:
    directory = state_dir / "a" / "vms" / vm_id
    directory.mkdir(parents=True)
    record = journal.Record(
        vm_id=vm_id, boot_id=boot_id or processes.boot_id(), process=process, ram_path="x"
    )
    journal_file.create(directory / journal.FILE, journal.encode(record))


async def test_a_dead_run_is_ended(tmp_path: Path, sleeper: Sleep) -> None:
    """Its parts and its VMMs are killed, its memory removed."""
    part, vmm = identity(sleeper()), identity(sleeper())
    state_dir = tmp_path / "state"
    make_journal(state_dir, "web", vmm)
    claim = tmp_path / "godwit-demo-1"
    make_claim(claim, state_dir, [part])
    assert await leftovers.remove_stale(tmp_path) == [claim]
    assert not claim.exists()
    assert not processes.is_alive(part)
    assert not processes.is_alive(vmm)


async def test_a_living_run_is_left_alone(tmp_path: Path, sleeper: Sleep) -> None:
    part = identity(sleeper())
    claim = tmp_path / "godwit-demo-1"
    make_claim(claim, tmp_path / "state", [part])
    lock = os.open(claim, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert await leftovers.remove_stale(tmp_path) == []
    finally:
        os.close(lock)
    assert claim.exists()
    assert processes.is_alive(part)


async def test_others_are_left_alone(tmp_path: Path, sleeper: Sleep) -> None:
    """A pid that was used again, a VMM of another boot, a directory that only looks like ours."""
    reused, other_boot = identity(sleeper()), identity(sleeper())
    state_dir = tmp_path / "state"
    make_journal(state_dir, "web", other_boot, boot_id="another")
    older = replace(reused, start_ticks=reused.start_ticks - 1)
    make_claim(tmp_path / "godwit-demo-1", state_dir, [older])
    (tmp_path / "godwit-notes").mkdir()
    (tmp_path / "godwit-file").touch()
    await leftovers.remove_stale(tmp_path)
    assert processes.is_alive(reused)
    assert processes.is_alive(other_boot)
    assert (tmp_path / "godwit-notes").exists()
    assert (tmp_path / "godwit-file").exists()


async def test_a_claim_ends_with_its_block(tmp_path: Path, sleeper: Sleep) -> None:
    part = identity(sleeper())
    with contextlib.suppress(ZeroDivisionError):
        async with leftovers.claimed(tmp_path, tmp_path / "demo") as claim:
            claim.add(part)
            assert await leftovers.remove_stale(tmp_path) == [], "it is ours and locked"
            _ = 1 // 0
    assert not claim.path.exists()
    assert not processes.is_alive(part)
