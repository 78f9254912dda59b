# SPDX-License-Identifier: Apache-2.0
"""Promise: what is kept about a guest's first touches comes back whole, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.fault_agent import first_touch
from services.pagecore.api import ArrivalConfig, ArrivalRegion
from services.pagecore.fake import FakeArrival, FakePageCore

PAGE = 4096
PAGE_COUNT = 1000


@pytest.fixture
def arrival() -> FakeArrival:
    region = ArrivalRegion(offset=0, host_addr=1 << 40, len_bytes=PAGE_COUNT * PAGE)
    config = ArrivalConfig(
        page_size_bytes=PAGE,
        epoch=1,
        page_map_path="/map",
        session_id="s",
        image_id="i",
        page_host="127.0.0.1",
        page_port=1,
        uffds=(),
        ram_fd=-1,
        regions=(region,),
    )
    core = FakePageCore()
    core.create_arrival(config)
    return core.arrivals[-1]


def test_what_is_kept_comes_back(tmp_path: Path, arrival: FakeArrival) -> None:
    arrival.touched = [(7, 3), (1, 1), (999, 1)]
    first_touch.keep(tmp_path, arrival)
    assert first_touch.read(tmp_path, PAGE_COUNT) == arrival.touched
    arrival.touched = [(5, 1)]
    first_touch.keep(tmp_path, arrival)
    assert first_touch.read(tmp_path, PAGE_COUNT) == [(5, 1)]


def test_the_beginning_is_kept(tmp_path: Path, arrival: FakeArrival) -> None:
    arrival.touched = [(page % PAGE_COUNT, 1) for page in range(0, 10_000, 3)]
    first_touch.keep(tmp_path, arrival)
    kept = first_touch.read(tmp_path, PAGE_COUNT)
    assert kept == arrival.touched[: first_touch.RUNS_MAX]


def test_nothing_is_kept_of_a_guest_that_was_never_here(tmp_path: Path) -> None:
    assert first_touch.read(tmp_path, PAGE_COUNT) == []


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"godwit-order 1",
        b"godwit-order 2\n1000 0\n",
        b"godwit-order 1\n1000 1\n",
        b"godwit-order 1\n1000 x\n",
        b"godwit-order 1\n1001 0\n",
        b"godwit-order 1\n1000 1\n" + (999).to_bytes(8, "little") + (2).to_bytes(8, "little"),
        b"godwit-order 1\n1000 1\n" + (1).to_bytes(8, "little") + bytes(8),
        bytes(1 << 20),
    ],
)
def test_what_is_damaged_or_of_another_guest_is_not_used(tmp_path: Path, data: bytes) -> None:
    (tmp_path / first_touch.FILE).write_bytes(data)
    assert first_touch.read(tmp_path, PAGE_COUNT) == []


def test_no_room_for_it_is_no_failure(tmp_path: Path, arrival: FakeArrival) -> None:
    first_touch.keep(tmp_path / "missing", arrival)
