# SPDX-License-Identifier: Apache-2.0
"""Userfault bitmaps: deltas as the contract says, runs, the store's copy."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path

import pytest
from godwit.agent.v1 import fault_agent_service_pb2 as pb
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import InvalidArgumentError
from services.orchestrator.bitmaps import Bitmap, Bitmaps, unpack
from services.orchestrator.store import open_store
from services.orchestrator.store.rows import BitmapRow

PAGES = 200


def bitmap() -> Bitmap:
    return Bitmap(vm_id="vm-1", epoch=4, page_size_bytes=4096)


def runs(pairs: Iterable[tuple[int, int]]) -> list[pb.PageRun]:
    return [pb.PageRun(first_page=first, page_count=count) for first, count in pairs]


def delta(
    absent: Iterable[tuple[int, int]] = (),
    resident: Iterable[tuple[int, int]] = (),
    *,
    whole: bool = False,
    page_count: int = PAGES,
) -> pb.BitmapDelta:
    return pb.BitmapDelta(
        whole=whole,
        page_count=page_count,
        absent_runs=runs(absent),
        resident_runs=runs(resident),
    )


def test_absent_runs_come_before_resident_runs() -> None:
    """The order of the contract: what is in both is resident."""
    subject = bitmap()
    subject.apply(delta([(0, 10)], [(4, 2)], whole=True))
    assert list(subject.absent_runs()) == [(0, 4), (6, 4)]
    assert subject.absent_count == 8
    assert subject.resident_share == 1 - 8 / PAGES


def test_whole_forgets_what_was_there() -> None:
    subject = bitmap()
    subject.apply(delta([(0, PAGES)], whole=True))
    subject.apply(delta([(7, 1)], whole=True))
    assert list(subject.absent_runs()) == [(7, 1)]


def test_resident_guest_costs_nothing() -> None:
    subject = bitmap()
    subject.apply(delta([(0, PAGES)], whole=True))
    subject.apply(delta([], [(0, PAGES)]))
    assert (subject.absent_count, subject.resident_share) == (0, 1.0)
    assert (len(subject.pages), subject.packed()) == (0, b"")


@pytest.mark.parametrize(
    "wrong",
    [
        delta([(PAGES, 1)]),
        delta([(0, PAGES + 1)]),
        delta([(3, 0)]),
        delta([], [(PAGES - 1, 2)]),
        delta(page_count=1 << 40),
        delta([((1 << 63), 1 << 63)]),
    ],
)
def test_impossible_runs_are_refused_whole(wrong: pb.BitmapDelta) -> None:
    subject = bitmap()
    subject.apply(delta([(0, 5)], whole=True))
    with pytest.raises(InvalidArgumentError, match="BITMAP_INVALID"):
        subject.apply(wrong)
    assert list(subject.absent_runs()) == [(0, 5)]


RUN = st.integers(0, PAGES - 1).flatmap(
    lambda first: st.tuples(st.just(first), st.integers(1, PAGES - first))
)
DELTA = st.tuples(st.booleans(), st.lists(RUN, max_size=6), st.lists(RUN, max_size=6))


@given(st.lists(DELTA, max_size=8))
def test_any_deltas_are_what_a_set_says(
    deltas: list[tuple[bool, list[tuple[int, int]], list[tuple[int, int]]]],
) -> None:
    """The runs are those of a plain set of absent pages, and survive the store."""
    subject, absent = bitmap(), set[int]()
    for whole, absent_runs, resident_runs in deltas:
        subject.apply(delta(absent_runs, resident_runs, whole=whole))
        absent = set() if whole else absent
        for first, count in absent_runs:
            absent |= set(range(first, first + count))
        for first, count in resident_runs:
            absent -= set(range(first, first + count))
        found = list(subject.absent_runs())
        assert {page for first, count in found for page in range(first, first + count)} == absent
        assert subject.absent_count == len(absent)
        assert all(a + n < b for (a, n), (b, _m) in itertools.pairwise(found))
        row = BitmapRow(
            vm_id="vm-1",
            epoch=4,
            page_size_bytes=4096,
            page_count=subject.page_count,
            absent_count=subject.absent_count,
            packed=subject.packed(),
        )
        assert list(unpack(row).absent_runs()) == found


async def test_kept_after_a_restart(tmp_path: Path) -> None:
    async with open_store(tmp_path / "s.db") as store:
        bitmaps = Bitmaps(store.bitmaps)
        await bitmaps.apply("vm-1", 4, 4096, delta([(3, 9)], whole=True))
        await bitmaps.apply("vm-1", 4, 4096, delta([], [(3, 1)]))
        assert bitmaps.get("vm-1", 5) is None
        await bitmaps.write("vm-1")
    async with open_store(tmp_path / "s.db") as store:
        again = Bitmaps(store.bitmaps)
        await again.load()
        found = again.get("vm-1", 4)
        assert found is not None
        assert list(found.absent_runs()) == [(4, 8)]


async def test_writes_are_bounded(tmp_path: Path) -> None:
    """A stream of deltas is not a stream of fsyncs."""
    async with open_store(tmp_path / "s.db") as store:
        bitmaps = Bitmaps(store.bitmaps)
        for page in range(20):
            await bitmaps.apply("vm-1", 4, 4096, delta([(0, 20)], [(0, page + 1)]))
        (row,) = await store.bitmaps.all()
        assert row.absent_count == 19
        await bitmaps.write("vm-1")
        (row,) = await store.bitmaps.all()
        assert row.absent_count == 0
