# SPDX-License-Identifier: Apache-2.0
"""A kept device state is read as it was written, for the departure that it is of, or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Self

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.common.errors import DataLossError
from services.fault_agent import kept_state
from services.fault_agent.journal import Export, ExportState, Record, Role

STATE = bytes(range(256)) * 40 + b"\nthe end"


@pytest.fixture
def record(tmp_path: Path) -> Record:
    """A guest that left under epoch 2, its FROZEN memory in place."""
    ram = tmp_path / "vm-1.1.ram"
    ram.write_bytes(bytes(4096))
    return Record(
        vm_id="vm-1",
        boot_id="boot",
        role=Role.SEALED,
        epoch_owned=1,
        epoch_departing=2,
        ram_path=str(ram),
        ram_inode=ram.stat().st_ino,
        generation_last=3,
        export=Export(image_id="vm-1.1.2", epoch=1, generation=3, state=ExportState.FROZEN),
    )


def assert_none(record: Record) -> None:
    """Nothing is kept, and nothing is read."""
    assert not kept_state.is_kept(record)
    assert_unreadable(record)


def assert_unreadable(record: Record) -> None:
    with pytest.raises(DataLossError) as refused:
        kept_state.read(record)
    assert refused.value.reason == "STATE_CORRUPT"


def path_of(record: Record) -> Path:
    return kept_state.path_of(record.ram_path)


def test_what_was_kept_is_read_until_it_is_removed(record: Record) -> None:
    """And nothing else lies about."""
    assert_none(record)
    for state in (b"", STATE):
        kept_state.keep(record, state)
        assert kept_state.is_kept(record)
        assert kept_state.read(record) == state
    ram = Path(record.ram_path)
    assert sorted(ram.parent.iterdir()) == sorted([ram, path_of(record)])
    assert path_of(record).stat().st_mode & 0o777 == 0o600
    path_of(record).with_suffix(".state.new").touch()
    for _ in range(2):
        kept_state.remove(record.ram_path)
        assert_none(record)
        assert list(ram.parent.iterdir()) == [ram]
    kept_state.remove("")


FOREIGN: dict[str, Callable[[Record, Export], Record]] = {
    "vm": lambda record, _: replace(record, vm_id="vm-2"),
    "epoch": lambda record, _: replace(record, epoch_departing=4),
    "generation": lambda record, export: replace(record, export=replace(export, generation=4)),
}


@pytest.mark.parametrize("other", FOREIGN)
def test_a_state_of_another_departure_is_none(record: Record, other: str) -> None:
    """In both directions: the file is of another one, or the record is."""
    assert record.export is not None
    foreign = FOREIGN[other](record, record.export)
    for mine, theirs in ((record, foreign), (foreign, record)):
        kept_state.keep(theirs, STATE)
        assert_none(mine)
        assert kept_state.is_kept(theirs)


def test_without_its_frozen_memory_nothing_is_kept(record: Record) -> None:
    """A state alone is no guest: the memory runs on, is another file, or is gone."""
    assert record.export is not None
    kept_state.keep(record, STATE)
    live = replace(record, export=replace(record.export, state=ExportState.LIVE))
    assert not kept_state.is_kept(live)
    assert not kept_state.is_kept(replace(record, export=None))
    assert not kept_state.is_kept(replace(record, ram_inode=record.ram_inode + 1))
    Path(record.ram_path).unlink()
    assert not kept_state.is_kept(record)


def test_cut_anywhere_it_is_none(record: Record) -> None:
    """Also in its first line, also by one byte; and one byte too many is as bad."""
    kept_state.keep(record, STATE)
    whole = path_of(record).read_bytes()
    head = whole.index(b"\n") + 1
    for len_bytes in [*range(head + 2), len(whole) // 2, len(whole) - 1]:
        path_of(record).write_bytes(whole[:len_bytes])
        assert_none(record)
    path_of(record).write_bytes(whole + b"\0")
    assert_none(record)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    at=st.floats(0, 1, exclude_max=True), to=st.binary(min_size=1, max_size=4), tail=st.booleans()
)
def test_damage_is_found(record: Record, at: float, to: bytes, tail: bool) -> None:
    """Whatever a few bytes of it become: the true state or none. The first line is hit as often."""
    kept_state.keep(record, STATE)
    whole = path_of(record).read_bytes()
    first = int(at * (len(whole) if tail else whole.index(b"\n") + 1))
    path_of(record).write_bytes(whole[:first] + to + whole[first + len(to) :])
    kept_state.is_kept(record)  # says yes or no: the hash is not its business
    try:
        state = kept_state.read(record)
    except DataLossError:
        return
    assert state == STATE


@pytest.mark.parametrize("number", ["-1", "+1", "²", "٣", "1_0", "1.0", " 1", "9" * 5000, ""])
def test_a_length_that_is_no_number_is_none(record: Record, number: str) -> None:
    """`²` is a digit to str.isdigit and none to int; int refuses 4 301 digits."""
    kept_state.keep(record, b"x")
    digest = hashlib.sha256(b"x").hexdigest()
    line = f"godwit-state 1 vm-1 2 3 {number} {digest}\n".encode()
    path_of(record).write_bytes(line + b"x")
    assert_none(record)


def test_swapped_states_of_equal_length_are_told_apart(record: Record) -> None:
    """By the hash; the cheap look may be deceived, the read never."""
    kept_state.keep(record, b"one")
    head, _, _ = path_of(record).read_bytes().partition(b"\n")
    path_of(record).write_bytes(head + b"\ntwo")
    assert_unreadable(record)


@pytest.mark.parametrize("put", [Path.mkdir, lambda path: path.symlink_to(path.name)])
def test_what_cannot_be_opened_is_none(record: Record, put: Callable[[Path], None]) -> None:
    """A directory, a link to itself: root may open all else."""
    put(path_of(record))
    assert_none(record)


def test_without_room_nothing_is_kept(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fits of it does not stay either: the room is the memory's."""

    class Full:
        """A file system with room for the first line."""

        def __init__(self, fd: int) -> None:
            self._file = real(fd, "wb", buffering=0)

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_error: object) -> None:
            self._file.close()

        def write(self, data: bytes) -> None:
            if data == STATE:
                self._file.write(data[:100])
                raise OSError(errno.ENOSPC, "no space left")
            self._file.write(data)

    real = os.fdopen
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdopen", lambda fd, _mode: Full(fd))
        with pytest.raises(OSError, match="no space left"):
            kept_state.keep(record, STATE)
    assert_none(record)
    assert list(path_of(record).parent.iterdir()) == [Path(record.ram_path)]


def test_a_write_that_fails_leaves_what_was_kept(
    record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never a mixture: a file is replaced as a whole."""
    kept_state.keep(record, STATE)

    def fails(_self: Path, _target: Path) -> Path:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="broken"):
        kept_state.keep(record, b"another")
    assert kept_state.read(record) == STATE
