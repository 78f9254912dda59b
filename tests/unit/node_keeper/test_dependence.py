# SPDX-License-Identifier: Apache-2.0
"""A node is not said to be free while a guest needs it."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.common.lifecycle import ExitStatus
from services.fault_agent import processes
from services.fault_agent.journal import FILE, Arriving, Journal, Record, Role
from services.node_keeper import dependence, wait
from services.node_keeper.condition import Condition
from services.node_keeper.dependence import IN_FLIGHT, Dependence, Why

BOOT = "boot-1"


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    (tmp_path / "state").mkdir()
    return tmp_path / "state"


def _write(state_dir: Path, **fields: object) -> Record:
    record = dataclasses.replace(Record(vm_id="vm", boot_id=BOOT, epoch_seen=1), **fields)  # type: ignore[arg-type]
    asyncio.run(Journal(state_dir).write(record))
    return record


def _arriving(*, unregistered: bool) -> Arriving:
    fields = {
        field.name: "" if field.type in ("str", str) else 0
        for field in dataclasses.fields(Arriving)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    return Arriving(**{**fields, "unregistered": unregistered})  # type: ignore[arg-type]


def _look(state_dir: Path) -> list[Why]:
    return [each.why for each in dependence.of_state(state_dir, BOOT)]


def test_a_node_that_never_had_a_guest_is_free(state_dir: Path) -> None:
    assert _look(state_dir) == []
    assert _look(state_dir / "nowhere") == []


def test_retained_memory_counts_while_it_is_there(state_dir: Path, tmp_path: Path) -> None:
    ram = tmp_path / "vm.ram"
    ram.write_bytes(b"x" * 8192)
    _write(state_dir, role=Role.SEALED, ram_path=str(ram))
    (found,) = dependence.of_state(state_dir, BOOT)
    assert (found.why, found.size_bytes) == (Why.RETAINED, ram.stat().st_blocks * 512)
    ram.unlink()
    assert _look(state_dir) == []


def test_retained_memory_counts_where_nobody_can_see_it(state_dir: Path, tmp_path: Path) -> None:
    """A RAM directory that is not mounted here proves nothing."""
    _write(state_dir, role=Role.SEALED, ram_path=str(tmp_path / "not-mounted" / "vm.ram"))
    assert _look(state_dir) == [Why.RETAINED]


@pytest.mark.parametrize(
    ("role", "unregistered", "wanted"),
    [
        (Role.DEPARTING, False, [Why.DEPARTING]),
        (Role.ARRIVING, False, [Why.ARRIVING]),
        (Role.ARRIVED, False, [Why.ARRIVING]),
        (Role.ARRIVED, True, []),
        (Role.GONE, False, []),
        (Role.UNKNOWN, False, []),
    ],
)
def test_a_guest_in_flight_counts(
    state_dir: Path, role: Role, unregistered: bool, wanted: list[Why]
) -> None:
    _write(state_dir, role=role, arriving=_arriving(unregistered=unregistered))
    assert _look(state_dir) == wanted


def test_what_another_boot_had_is_gone(state_dir: Path) -> None:
    _write(state_dir, role=Role.DEPARTING)
    assert dependence.of_state(state_dir, "boot-2") == []


def test_a_journal_that_cannot_be_read_counts(state_dir: Path) -> None:
    _write(state_dir, role=Role.GONE)
    path = state_dir / "vms" / "vm" / FILE
    path.write_bytes(path.read_bytes()[:-4096])
    assert _look(state_dir) == [Why.UNREADABLE]


@pytest.fixture
def vmm() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


def test_a_guest_that_merely_runs_counts_for_who_would_end_it(
    state_dir: Path, vmm: subprocess.Popen[bytes]
) -> None:
    """For a pod's end, not for the node's condition."""
    _write(state_dir, role=Role.RESIDENT, process=processes.identify(vmm.pid))
    found = dependence.of_state(state_dir, BOOT)
    assert [each.why for each in found] == [Why.RUNNING]
    assert not Condition.of(found).holds
    vmm.kill()
    vmm.wait()
    assert _look(state_dir) == []


def test_image_records_count(tmp_path: Path) -> None:
    assert dependence.of_images(tmp_path / "none") == []
    (tmp_path / "vm-3.json").write_text("{}")
    (tmp_path / "vm-3.json.tmp").write_text("")
    assert [str(each) for each in dependence.of_images(tmp_path)] == ["vm-3 (retained)"]


def test_the_wait_ends_when_the_last_one_is_gone() -> None:
    left = [[Dependence(vm_id="vm", why=Why.ARRIVING)], []]
    assert wait.wait(lambda: left.pop(0), timeout_s=60) is ExitStatus.OK
    assert left == []


def test_the_wait_names_who_is_left(caplog: pytest.LogCaptureFixture) -> None:
    found = [Dependence(vm_id="web-1", why=Why.RETAINED, size_bytes=64 << 20)]
    with caplog.at_level(logging.INFO):
        assert wait.wait(lambda: found, timeout_s=0) is ExitStatus.GUESTS_DEPEND
    assert "web-1 (retained, 64 MiB)" in caplog.text


def test_the_command_waits_for_a_real_journal(state_dir: Path, tmp_path: Path) -> None:
    """As a preStop hook runs it."""
    record = _write(state_dir, boot_id=processes.boot_id(), role=Role.DEPARTING)
    with subprocess.Popen(
        [sys.executable, "-m", "services.node_keeper.wait", f"--state-dir={state_dir}"],
        stderr=subprocess.PIPE,
        text=True,
    ) as waiting:
        assert waiting.stderr is not None
        assert any("waiting for vm (departing)" in line for line in waiting.stderr)
        asyncio.run(_end(state_dir, record))
        assert waiting.wait() == ExitStatus.OK


async def _end(state_dir: Path, record: Record) -> None:
    journal = Journal(state_dir)
    journal.read_all()
    await journal.write(dataclasses.replace(record, role=Role.GONE))


@pytest.mark.parametrize(
    ("whys", "reason"),
    [
        ([Why.RETAINED], "MemoryRetained"),
        ([Why.RETAINED, Why.ARRIVING], "GuestsInFlight"),
        ([Why.UNREADABLE, Why.RETAINED], "JournalUnreadable"),
        ([Why.RUNNING], "NothingRetained"),
        ([], "NothingRetained"),
    ],
)
def test_the_condition_says_why(whys: list[Why], reason: str) -> None:
    condition = Condition.of([Dependence(vm_id="vm", why=why) for why in whys])
    assert condition.reason == reason
    assert condition.holds is bool(IN_FLIGHT & set(whys))
