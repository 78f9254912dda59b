# SPDX-License-Identifier: Apache-2.0
"""Promise: a record is read whole or refused, whatever a crash left of its write."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pydantic
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
    Held,
    Journal,
    JournalCorruptError,
    Record,
    Role,
    Transferred,
)
from services.fault_agent.processes import Process

_EPOCHS = st.integers(min_value=0, max_value=2**63 - 1)
_COUNTS = st.integers(min_value=0, max_value=2**64 - 1)

_HELD = st.builds(Held, number=_COUNTS, cause=st.integers(0, 4), outage_ns=_COUNTS, held_ns=_COUNTS)
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
        | st.builds(
            Counters,
            **(
                dict.fromkeys(Counters.__annotations__, _COUNTS)
                | {
                    "holds": st.lists(_HELD, max_size=8).map(tuple),
                    "hold_now": st.none() | _HELD,
                }
            ),
        ),
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
    path = Path("/x/web-1/journal")
    assert journal.decode(journal.encode(record), path) == record


@given(record=_RECORDS, data=st.data())
def test_a_torn_record_is_refused(record: Record, data: st.DataObject) -> None:
    whole = journal.encode(record).rstrip()
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(JournalCorruptError):
        journal.decode(whole[:cut], Path("/x/web-1/journal"))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"version": 0}, "version"),
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
        journal.decode(data, Path("/x/web-1/journal"))


_NEW_COUNTERS = ("held_total_ns", "holds", "hold_now")


def _of_before(record: Record) -> bytes:
    """As the release before wrote it."""
    fields = json.loads(journal.encode(record))
    arriving = fields["arriving"]
    del arriving["freeze_after_ms"]
    for name in _NEW_COUNTERS:
        arriving["counters"].pop(name, None)
    return json.dumps(fields | {"version": 1}, indent=1).encode() + b"\n"


def test_a_record_of_the_release_before_is_read() -> None:
    """An agent that was upgraded in mid arrival takes it over as it is."""
    known = [name for name in Counters.__annotations__ if name not in _NEW_COUNTERS]
    counters: Counters = pydantic.TypeAdapter(Counters).validate_python(dict.fromkeys(known, 7))
    arriving = Arriving(
        image_id="i", page_address="h:1", session_id="s", page_map_path="/m", counters=counters
    )
    record = Record(vm_id="web-1", boot_id="b", role=Role.ARRIVED, arriving=arriving)
    assert journal.decode(_of_before(record), Path("/x/web-1/journal")) == record


def test_a_record_of_a_later_release_is_refused_as_such() -> None:
    """Whatever fields it has: it is not called corrupt, and what to do is said."""
    fields = json.loads(journal.encode(Record(vm_id="web-1", boot_id="b")))
    data = json.dumps({**fields, "version": 3, "unheard_of": 1}, indent=1).encode()
    with pytest.raises(journal.JournalNewerError, match="version 3") as refused:
        journal.decode(data, Path("/x/web-1/journal"))
    assert refused.value.reason == "JOURNAL_NEWER"
    assert "newer agent" in refused.value.hint


async def test_what_a_crash_left_beside_the_record_is_ignored(tmp_path: Path) -> None:
    store = Journal(tmp_path)
    record = Record(vm_id="web-1", boot_id="b", epoch_seen=1)
    await store.write(record)
    (store.vm_dir("web-1") / ".journal.new").write_bytes(b"godwit-jour")
    (store.vm_dir("web-1") / "console-1.log").write_text("boot")
    (tmp_path / "vms" / "never-written").mkdir()
    assert Journal(tmp_path).read_all() == ([record], {})


async def test_a_corrupt_record_is_kept_and_does_not_hide_the_others(tmp_path: Path) -> None:
    store = Journal(tmp_path)
    for vm_id in ("a", "b"):
        await store.write(Record(vm_id=vm_id, boot_id="b", epoch_seen=1))
    path = store.vm_dir("a") / journal.FILE
    path.write_bytes(b"\0" * 100)
    store = Journal(tmp_path)
    records, corrupt = store.read_all()
    assert [record.vm_id for record in records] == ["b"]
    assert list(corrupt) == ["a"]
    assert corrupt["a"].reason == "JOURNAL_CORRUPT"
    with pytest.raises(JournalCorruptError):
        await store.write(Record(vm_id="a", boot_id="b", epoch_seen=2))
    assert path.read_bytes() == b"\0" * 100


async def test_the_form_before_is_read_once_and_replaced(tmp_path: Path) -> None:
    record = Record(vm_id="web-1", boot_id="b", epoch_seen=7)
    directory = tmp_path / "vms" / "web-1"
    directory.mkdir(parents=True)
    (directory / "journal.json").write_bytes(journal.encode(record))
    assert Journal(tmp_path).read_all() == ([record], {})
    assert [path.name for path in directory.iterdir()] == [journal.FILE]
    assert journal.read(directory / journal.FILE) == record


async def test_the_form_before_is_not_believed_beside_the_new_one(tmp_path: Path) -> None:
    """As a crash between the new file and the end of the old one leaves them."""
    store, record = Journal(tmp_path), Record(vm_id="web-1", boot_id="b", epoch_seen=7)
    await store.write(record)
    old = store.vm_dir("web-1") / "journal.json"
    old.write_bytes(journal.encode(replace(record, epoch_seen=6)))
    assert Journal(tmp_path).read_all() == ([record], {})
    assert not old.exists()


async def test_a_record_outgrows_its_slots(tmp_path: Path) -> None:
    store, record = Journal(tmp_path), Record(vm_id="web-1", boot_id="b")
    await store.write(record)
    for epoch, length in enumerate((100, 200_000, 300), start=1):
        record = replace(record, epoch_seen=epoch, spec_json="x" * length)
        await store.write(record)
        assert journal.read(store.vm_dir("web-1") / journal.FILE) == record
        assert Journal(tmp_path).read_all() == ([record], {})


async def test_a_cancelled_write_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread is parked in the fdatasync; the next write comes after it, not into it."""
    store, record = Journal(tmp_path), Record(vm_id="web-1", boot_id="b")
    await store.write(record)
    parked, go_on, real = threading.Event(), threading.Event(), os.fdatasync

    def fdatasync(fd: int) -> None:
        parked.set()
        assert go_on.wait(60)
        real(fd)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    first = asyncio.create_task(store.write(replace(record, epoch_seen=1)))
    assert await asyncio.to_thread(parked.wait, 60)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    second = asyncio.create_task(store.write(replace(record, epoch_seen=2)))
    go_on.set()
    await second
    assert Journal(tmp_path).read_all() == ([replace(record, epoch_seen=2)], {})


async def test_people_can_read_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, record = Journal(tmp_path), Record(vm_id="web-1", boot_id="b", epoch_seen=3)
    await store.write(record)
    path = store.vm_dir("web-1") / journal.FILE
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["journal", str(path)])
        assert journal.main() == 0
    assert json.loads(capsys.readouterr().out)["epoch_seen"] == 3
