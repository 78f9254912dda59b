# SPDX-License-Identifier: Apache-2.0
"""Promise: applying the deltas in order gives the bitmap, whatever its size and history."""

from __future__ import annotations

import pytest
from godwit.agent.v1 import fault_agent_service_pb2 as pb
from hypothesis import given
from hypothesis import strategies as st

from services.fault_agent import progress
from services.fault_agent.page_runs import set_runs
from services.fault_agent.progress import Deltas


def apply(absent: set[int], delta: pb.BitmapDelta) -> set[int]:
    result = set() if delta.whole else set(absent)
    for run in delta.absent_runs:
        result |= set(range(run.first_page, run.first_page + run.page_count))
    for run in delta.resident_runs:
        result -= set(range(run.first_page, run.first_page + run.page_count))
    return result


def to_bitmap(absent: set[int], page_count: int) -> bytes:
    bits = bytearray((page_count + 7) // 8)
    for page in absent:
        bits[page // 8] |= 1 << page % 8
    return bytes(bits)


@given(data=st.data(), page_count=st.integers(1, 300), room=st.integers(1, 5))
def test_deltas_rebuild_every_snapshot(data: st.DataObject, page_count: int, room: int) -> None:
    absent = data.draw(st.sets(st.integers(0, page_count - 1)))
    deltas, seen, whole = Deltas(page_count=page_count), set[int](), True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "RUNS_PER_MESSAGE_MAX", room)
        patch.setattr(progress, "_CHUNK_BYTES", 4)
        for _ in range(4):
            deltas.look(to_bitmap(absent, page_count))
            while True:
                delta = deltas.next(whole=whole)
                assert delta.page_count == page_count
                assert len(delta.absent_runs) + len(delta.resident_runs) <= room
                seen, whole = apply(seen, delta), False
                if not deltas.pending:
                    break
            assert seen == absent
            if absent:
                absent -= data.draw(st.sets(st.sampled_from(sorted(absent))))


def test_runs_of_a_bitmap() -> None:
    assert list(set_runs(b"\xff\x01\x80", first_page=8)) == [(8, 9), (31, 1)]
    assert list(set_runs(bytes(3))) == []


def test_a_large_guest_that_did_not_change_costs_comparisons_only() -> None:
    """64 GiB: 16 million pages; no run is made, and none of the chunks is looked into."""
    deltas = Deltas(page_count=16 << 20)
    deltas.look(bytes(2 << 20))
    deltas.next(whole=True)
    deltas.look(bytes(2 << 20))
    assert not deltas.pending
