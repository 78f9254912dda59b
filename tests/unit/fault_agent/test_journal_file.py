# SPDX-License-Identifier: Apache-2.0
"""Promise: what was acknowledged is read, or the file is refused; whatever a crash left of a write.

A crash is simulated on the bytes: a kill leaves the head of a write in the page cache, a power cut
any mixture of sectors of what was not synced.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.fault_agent import journal_file
from services.fault_agent.journal_file import HEAD_BYTES, SLOT_BYTES_MIN, DamagedError, Place

SECTOR_BYTES = 512


def text_of(path: Path) -> bytes:
    return journal_file.read(path.read_bytes())[0]


def slot_start(slot: int) -> int:
    return HEAD_BYTES + slot * SLOT_BYTES_MIN


def written(before: bytes, after: bytes) -> range:
    """The bytes that differ, from the first to the last."""
    differing = [at for at in range(len(before)) if before[at] != after[at]]
    return range(differing[0], differing[-1] + 1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


def without_head(data: bytes, head_of: bytes) -> bytes:
    return head_of[:HEAD_BYTES] + data[HEAD_BYTES:]


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("history", [1, 2, 3, 4, 7])
def test_a_write_torn_at_any_byte_leaves_the_old_text_or_the_new(
    path: Path, history: int, durable: bool
) -> None:
    """Cut off anywhere: before the cut the new bytes, behind it the old ones, the head the old."""
    place = journal_file.create(path, b"text 0")
    for number in range(1, history):
        journal_file.write(path, place, b"text %d" % number * number, durable=number % 2 == 0)
    before, old = path.read_bytes(), text_of(path)
    new = b"new text " * 30
    journal_file.write(path, place, new, durable=durable)
    after = path.read_bytes()
    assert text_of(path) == new
    # From here on the acknowledgement has not been written: the writer never got there.
    whole = without_head(after, before)
    changed = written(before, whole)
    for cut in changed:
        text, _ = journal_file.read(before[:cut] + whole[cut:])  # the tail came first
        assert text == old or cut == changed.start
        text, _ = journal_file.read(whole[:cut] + before[cut:])
        assert text == old


@given(seed=st.integers(0, 2**32), steps=st.lists(st.booleans(), min_size=1, max_size=12))
def test_a_power_cut_keeps_what_was_durable(
    tmp_path_factory: pytest.TempPathFactory, seed: int, steps: list[bool]
) -> None:
    """Any sectors of what was written since the last fdatasync are on disk, or are not."""
    path = tmp_path_factory.mktemp("cut") / "journal"
    place = journal_file.create(path, b"text 0")
    synced, later = path.read_bytes(), [b"text 0"]
    for number, durable in enumerate(steps, start=1):
        text = b"text %d " % number * (number * 40)
        journal_file.write(path, place, text, durable=durable)
        later.append(text)
        if durable:
            # The head is written after the fdatasync and may be lost with the power.
            synced = without_head(path.read_bytes(), synced)
            later = [text]
    now, draw = path.read_bytes(), random.Random(seed)
    disk = bytearray(synced)
    for at in range(0, len(now), SECTOR_BYTES):
        if draw.random() < 0.5:
            disk[at : at + SECTOR_BYTES] = now[at : at + SECTOR_BYTES]
    text, _ = journal_file.read(bytes(disk))
    assert text in later, "older than the last durable one"


@pytest.mark.parametrize("step", ["open", "pwrite", "fdatasync", "acknowledge"])
def test_a_write_that_fails_can_be_tried_again(
    path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Each system call fails once: what is read is whole, and the next write does not harm it."""
    place = journal_file.create(path, b"old")
    real = {name: getattr(os, name) for name in ("open", "pwrite", "fdatasync")}
    calls = {"pwrite": 0}

    def fail(*arguments: object) -> int:
        if step == "acknowledge":
            calls["pwrite"] += 1
            if calls["pwrite"] == 1:
                return int(real["pwrite"](*arguments))
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite" if step == "acknowledge" else step, fail)
        with pytest.raises(OSError, match="No space"):
            journal_file.write(path, place, b"new", durable=True)
    assert text_of(path) in (b"old", b"new")
    before = path.read_bytes()
    journal_file.write(path, place, b"again", durable=True)
    assert text_of(path) == b"again"
    # The old text was the last durable one: the second attempt has not touched it.
    old_slot = before[slot_start(0) : slot_start(1)]
    assert path.read_bytes()[slot_start(0) : slot_start(1)] == old_slot


def test_the_order_of_a_durable_write(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text, fdatasync, acknowledgement: acknowledged before, a power cut would look like damage."""
    place = journal_file.create(path, b"old")
    order: list[str] = []
    real_pwrite, real_sync = os.pwrite, os.fdatasync

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        order.append("head" if offset == 0 else "text")
        return real_pwrite(fd, data, offset)

    def fdatasync(fd: int) -> None:
        order.append("sync")
        real_sync(fd)

    monkeypatch.setattr(os, "pwrite", pwrite)
    monkeypatch.setattr(os, "fdatasync", fdatasync)
    journal_file.write(path, place, b"new", durable=True)
    assert order == ["text", "sync", "head"]
    order.clear()
    journal_file.write(path, place, b"newer", durable=False)
    assert order == ["text"]


def test_a_new_file_and_its_name_are_synced(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    real_fsync, real_rename = os.fsync, Path.rename

    def fsync(fd: int) -> None:
        order.append("dir" if Path(f"/proc/self/fd/{fd}").resolve().is_dir() else "file")
        real_fsync(fd)

    def rename(self: Path, target: Path) -> Path:
        order.append("rename")
        return real_rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    journal_file.create(path, b"text")
    assert order == ["file", "rename", "dir"]


def test_an_acknowledged_text_that_rots_is_not_replaced_by_an_older_one(path: Path) -> None:
    """Every byte of the newest slot, and of the head, flipped."""
    place = journal_file.create(path, b"text 0")
    for number in range(1, 5):
        journal_file.write(path, place, b"text %d" % number, durable=True)
    data = path.read_bytes()
    start = slot_start(place.newest_slot)
    used = data[start : start + SLOT_BYTES_MIN].rstrip(b"\0")
    head = data[:HEAD_BYTES].rstrip(b"\0")
    for at in (*range(len(head)), *range(start, start + len(used))):
        rotten = bytearray(data)
        rotten[at] ^= 0x20
        with pytest.raises(DamagedError):
            journal_file.read(bytes(rotten))


def test_an_older_text_that_rots_does_no_harm(path: Path) -> None:
    place = journal_file.create(path, b"text 0")
    for number in range(1, 5):
        journal_file.write(path, place, b"text %d" % number, durable=True)
    data = bytearray(path.read_bytes())
    for slot in range(3):
        if slot != place.newest_slot:
            data[slot_start(slot) + 5] ^= 1
    assert journal_file.read(bytes(data))[0] == b"text 4"


@pytest.mark.parametrize("length", [0, 100, HEAD_BYTES, HEAD_BYTES + 3 * SLOT_BYTES_MIN - 1])
def test_a_file_of_another_length_is_refused(path: Path, length: int) -> None:
    journal_file.create(path, b"text")
    with pytest.raises(DamagedError):
        journal_file.read(path.read_bytes()[:length])


def test_a_blank_file_is_refused() -> None:
    with pytest.raises(DamagedError):
        journal_file.read(bytes(HEAD_BYTES + 3 * SLOT_BYTES_MIN))


def test_a_number_given_twice_is_refused(path: Path) -> None:
    place = journal_file.create(path, b"text 0")
    journal_file.write(path, place, b"text 1", durable=True)
    data = bytearray(path.read_bytes())
    twin = data[slot_start(place.newest_slot) : slot_start(place.newest_slot) + SLOT_BYTES_MIN]
    data[slot_start(2) : slot_start(3)] = twin
    with pytest.raises(DamagedError, match="two slots"):
        journal_file.read(bytes(data))


def test_the_next_process_acknowledges_what_it_acts_on(path: Path) -> None:
    """It reads a text that was never acknowledged; from then on it must not be lost either."""
    place = journal_file.create(path, b"old")
    journal_file.write(path, place, b"new", durable=False)
    text, place = journal_file.open_for_writing(path)
    assert (text, place) == (
        b"new",
        Place(seq=2, newest_slot=1, durable_slot=1, slot_bytes=SLOT_BYTES_MIN),
    )
    data = bytearray(path.read_bytes())
    data[slot_start(1) + 5] ^= 1
    with pytest.raises(DamagedError, match="2 was acknowledged"):
        journal_file.read(bytes(data))


@given(durable=st.lists(st.booleans(), max_size=10))
def test_neither_the_newest_nor_the_durable_text_is_written_over(
    tmp_path_factory: pytest.TempPathFactory, durable: list[bool]
) -> None:
    path = tmp_path_factory.mktemp("slots") / "journal"
    place = journal_file.create(path, b"0")
    for number, each in enumerate(durable, start=1):
        kept = {place.newest_slot, place.durable_slot}
        journal_file.write(path, place, b"%d" % number, durable=each)
        assert place.newest_slot not in kept
        assert text_of(path) == b"%d" % number
