# SPDX-License-Identifier: Apache-2.0
"""What `make chaos` judges by can turn red: whatever is wrong with heartbeats is seen."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.chaos.beats import BeatLog

MS = 1_000_000
SOURCE, DESTINATION = 11, 22

Say = Callable[..., None]


@pytest.fixture
def log(tmp_path: Path) -> Iterator[BeatLog]:
    path = tmp_path / "beats"
    path.touch()
    log = BeatLog(path, 2)
    yield log
    log.close()


def say(log: BeatLog, number: int, at_ms: float, *, pid: int = SOURCE, vcpu: int = 0) -> None:
    with log.path.open("ab") as file:
        file.write(struct.pack("=QQII", number, int(at_ms * MS), pid, vcpu))


def moved(log: BeatLog) -> None:
    """Both vCPUs beat here, then there."""
    for number in (1, 2):
        for vcpu in (0, 1):
            say(log, number, number, vcpu=vcpu)
    for vcpu in (0, 1):
        say(log, 3, 103 + vcpu, pid=DESTINATION, vcpu=vcpu)


def test_a_whole_move(log: BeatLog) -> None:
    moved(log)
    log.poll()
    assert (log.window.doubled, log.window.missing, log.trouble) == (0, 0, [])
    assert log.window.pids == [SOURCE, DESTINATION]
    assert log.window.held_ns == 102 * MS
    assert log.went_on_after(50 * MS) == 54 * MS, "the vCPU that was held longest counts"
    assert log.went_on_after(110 * MS) is None


def test_the_source_speaks_after_the_destination(log: BeatLog) -> None:
    """Whether it repeats a number or goes on with the next."""
    for number in (3, 4):
        log.open_window()
        moved(log)
        say(log, number, 104, vcpu=0)
        log.poll()
        assert log.window.doubled >= 1
        log.last = [None, None]


def test_a_guest_that_runs_from_an_old_state(log: BeatLog) -> None:
    moved(log)
    say(log, 2, 200, pid=33)
    log.poll()
    assert log.window.doubled == 1


def test_a_beat_that_nobody_made(log: BeatLog) -> None:
    say(log, 1, 1)
    say(log, 4, 4)
    log.poll()
    assert (log.window.doubled, log.window.missing) == (0, 2)


def test_half_a_record_is_read_when_it_is_whole(log: BeatLog) -> None:
    with log.path.open("ab") as file:
        file.write(struct.pack("=QQII", 1, MS, SOURCE, 0)[:10])
        file.flush()
        assert log.poll() == []
        file.write(struct.pack("=QQII", 1, MS, SOURCE, 0)[10:])
    assert [beat.number for beat in log.poll()] == [1]
