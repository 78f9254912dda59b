# SPDX-License-Identifier: Apache-2.0
"""Promise: a record is read whole or refused, whatever a crash left of its write."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.fault_agent import journal
from services.fault_agent.journal import (
    Arriving,
    Counters,
    Decision,
    Export,
    ExportState,
    Journal,
    JournalCorruptError,
    Record,
    Role,
    Transferred,
)
from services.fault_agent.processes import Process

_EPOCHS = st.integers(min_value=0, max_value=2**63 - 1)
_COUNTS = st.integers(min_value=0, max_value=2**64 - 1)

_RECORDS = st.builds(
    Record,
    vm_id=st.just("web-1"),
    boot_id=st.text(max_size=40),
    version=st.just(1),
    role=st.sampled_from(Role),
    epoch_seen=_EPOCHS,
    epoch_owned=_EPOCHS,
    migration_id=st.text(max_size=30),
    decision=st.sampled_from(Decision),
    epoch_prepared=_EPOCHS,
    epoch_loaded=_EPOCHS,
    epoch_activating=_EPOCHS,
    epoch_memory_complete=_EPOCHS,
    epoch_sealed=_EPOCHS,
    spec_json=st.text(),
    process=st.none() | st.builds(Process, pid=st.integers(1, 2**22), start_ticks=_COUNTS),
    ram_path=st.text(max_size=60),
    ram_inode=_COUNTS,
    generation_last=_COUNTS,
    export=st.none()
    | st.builds(
        Export,
        image_id=st.text(max_size=30),
        epoch=_EPOCHS,
        generation=_COUNTS,
        state=st.sampled_from(ExportState),
    ),
    arriving=st.none()
    | st.builds(
        Arriving,
        image_id=st.text(max_size=30),
        page_address=st.text(max_size=30),
        session_id=st.text(max_size=30),
        page_map_path=st.text(max_size=30),
        remote_fd=st.integers(-1, 2**20),
        unregistered=st.booleans(),
        counters=st.none()
        | st.builds(Counters, **dict.fromkeys(Counters.__annotations__, _COUNTS)),
    ),
    transferred=st.none()
    | st.builds(
        Transferred,
        epoch=_EPOCHS,
        len_bytes=_COUNTS,
        sha256=st.text(max_size=64),
        save_ns=_COUNTS,
        load_ns=_COUNTS,
    ),
)


@given(record=_RECORDS)
def test_what_is_written_is_read(record: Record) -> None:
    path = Path("/x/web-1/journal.json")
    assert journal.decode(journal.encode(record), path) == record


@given(record=_RECORDS, data=st.data())
def test_a_torn_record_is_refused(record: Record, data: st.DataObject) -> None:
    whole = journal.encode(record).rstrip()
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(JournalCorruptError):
        journal.decode(whole[:cut], Path("/x/web-1/journal.json"))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"version": 2}, "version"),
        ({"role": "elsewhere"}, "role"),
        ({"epoch_seen": "many"}, "epoch_seen"),
        ({"process": {"pid": 1}}, "start_ticks"),
        ({"unheard_of": 1}, "unheard_of"),
        ({"vm_id": "web-2"}, "web-2"),
    ],
)
def test_a_record_that_is_not_ours_is_refused(change: dict[str, object], why: str) -> None:
    fields = json.loads(journal.encode(Record(vm_id="web-1", boot_id="b")))
    data = json.dumps({**fields, **change}).encode()
    with pytest.raises(JournalCorruptError, match=why):
        journal.decode(data, Path("/x/web-1/journal.json"))


async def test_a_crash_at_any_step_leaves_the_old_record_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each system call of a write fails once; what is read afterwards is whole."""
    old = Record(vm_id="web-1", boot_id="b", epoch_seen=1)
    new = replace(old, epoch_seen=2)
    for name in ("open", "write", "fsync", "rename"):
        store = Journal(tmp_path / name)
        await store.write(old)
        calls = {"rename": Path} if name == "rename" else {name: os}
        with monkeypatch.context() as patched:

            def fail(*_: object, **__: object) -> int:
                raise OSError(28, "No space left on device")

            patched.setattr(calls[name], name, fail)
            with pytest.raises(OSError, match="No space"):
                await store.write(new)
        records, corrupt = store.read_all()
        assert not corrupt
        assert records[0] in (old, new)


async def test_what_a_crash_left_beside_the_record_is_ignored(tmp_path: Path) -> None:
    store = Journal(tmp_path)
    record = Record(vm_id="web-1", boot_id="b", epoch_seen=1)
    await store.write(record)
    (store.vm_dir("web-1") / ".journal.json.new").write_bytes(b'{"vm_id": "we')
    (store.vm_dir("web-1") / "console-1.log").write_text("boot")
    assert store.read_all() == ([record], {})


async def test_a_corrupt_record_is_kept_and_does_not_hide_the_others(tmp_path: Path) -> None:
    store = Journal(tmp_path)
    for vm_id in ("a", "b"):
        await store.write(Record(vm_id=vm_id, boot_id="b", epoch_seen=1))
    path = store.vm_dir("a") / "journal.json"
    path.write_bytes(b"\0" * 100)
    records, corrupt = store.read_all()
    assert [record.vm_id for record in records] == ["b"]
    assert list(corrupt) == ["a"]
    assert corrupt["a"].reason == "JOURNAL_CORRUPT"
    assert path.read_bytes() == b"\0" * 100


async def test_the_directory_is_synced_after_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it the rename itself may not survive a power cut."""
    store, order = Journal(tmp_path), []
    await store.write(Record(vm_id="web-1", boot_id="b"))
    real_fsync, real_rename = os.fsync, Path.rename

    def fsync(fd: int) -> None:
        order.append("dir" if Path(f"/proc/self/fd/{fd}").resolve().is_dir() else "file")
        real_fsync(fd)

    def rename(self: Path, target: Path) -> Path:
        order.append("rename")
        return real_rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    await store.write(Record(vm_id="web-1", boot_id="b", epoch_seen=1))
    assert order == ["file", "rename", "dir"]
