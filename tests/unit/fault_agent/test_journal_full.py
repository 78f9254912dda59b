# SPDX-License-Identifier: Apache-2.0
"""A journal on a disk that is really full, or read-only: a reason, nothing lost, tried again."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from services.fault_agent.journal import Journal, JournalWriteError, Record
from services.fault_agent.node import state_dir_lock
from tests.harness.small_disk import fill, mounted

pytestmark = pytest.mark.requires("root")

RECORD = Record(vm_id="web-1", boot_id="b", epoch_seen=1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for a few journals."""
    with mounted(tmp_path / "disk", "1M") as directory:
        yield directory


def remount(disk: Path, how: str) -> None:
    """Remount it, "ro" or "rw"."""
    subprocess.run(["mount", "-o", f"remount,{how}", disk], check=True)


async def test_a_full_disk_is_a_reason_and_nothing_is_half_written(small_disk: Path) -> None:
    """A new VM is refused; one that has a journal goes on: its marks need no room."""
    journal = Journal(small_disk)
    await journal.write(RECORD)
    ballast = fill(small_disk)
    other = replace(RECORD, vm_id="web-2")
    for _ in range(2):
        with pytest.raises(JournalWriteError) as refused:
            await journal.write(other)
        assert refused.value.reason == "JOURNAL_FULL"
        assert refused.value.retryable
        assert "free space" in refused.value.hint
    for epoch in range(2, 9):
        await journal.write(replace(RECORD, epoch_seen=epoch))
    ballast.unlink()
    await journal.write(other)
    records, corrupt = Journal(small_disk).read_all()
    assert corrupt == {}
    assert records == [replace(RECORD, epoch_seen=8), other]


async def test_a_read_only_disk_is_a_reason_and_what_is_there_is_read(small_disk: Path) -> None:
    """An agent starts on it, as pages need no journal, and does nothing that a mark would name."""
    await Journal(small_disk).write(RECORD)
    with state_dir_lock(small_disk):
        pass
    remount(small_disk, "ro")
    with state_dir_lock(small_disk):
        journal = Journal(small_disk)
        assert journal.read_all() == ([RECORD], {})
        for _ in range(2):
            with pytest.raises(JournalWriteError) as refused:
                await journal.write(replace(RECORD, epoch_seen=2))
            assert refused.value.reason == "JOURNAL_READ_ONLY"
        remount(small_disk, "rw")
        await journal.write(replace(RECORD, epoch_seen=2))
    assert Journal(small_disk).read_all() == ([replace(RECORD, epoch_seen=2)], {})
