# SPDX-License-Identifier: Apache-2.0
"""What agents say of an arrival: over time, whole, and not too much."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from godwit.agent.v1 import fault_agent_service_pb2 as pb
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import GodwitError
from services.orchestrator import follow, progress_guard, residency
from services.orchestrator.progress_guard import MESSAGES_BURST, MESSAGES_PER_S, ProgressGuard
from services.orchestrator.residency import POINT_COUNT_MAX, Point, Residency, Series
from tests.harness.fake_fleet import VM, FakeFleet, eventually


@given(st.lists(st.integers(0, 400_000_000), max_size=2000))
def test_a_series_is_bounded_and_keeps_its_ends(steps: list[int]) -> None:
    """The points that are kept are points that there were, in order, the newest always."""
    series, at, told = Series(1), 0, []
    for left, step in enumerate(steps):
        at += step
        told.append(Point(at, 10_000 - left))
        series.add(told[-1])
        assert len(series.points) <= POINT_COUNT_MAX
        assert (series.points[0], series.points[-1]) == (told[0], told[-1])
    remaining = iter(told)
    assert all(point in remaining for point in series.points)
    kept = series.points[:-1]
    assert all(b.at_ns - a.at_ns >= series.gap_ns for a, b in itertools.pairwise(kept))


def test_the_vms_that_arrived_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "VM_COUNT_MAX", 2)
    known = Residency()
    for number, name in enumerate("abac"):
        known.add(name, 1, 10, Point(number, 5))
    assert [name for name in "abc" if known.get(name, 1)] == ["a", "c"]
    assert known.get("a", 2) is None
    known.add("a", 2, 10, Point(9, 9))
    series = known.get("a", 2)
    assert series is not None
    assert series.points == [Point(9, 9)]


def said(sequence: int, *, whole: bool | None = None, runs: int = 0) -> pb.WatchProgressResponse:
    delta = pb.BitmapDelta(whole=sequence == 1 if whole is None else whole)
    delta.resident_runs.extend([pb.PageRun(page_count=1)] * runs)
    return pb.WatchProgressResponse(sequence=sequence, bitmap_delta=delta)


def reason(guard: ProgressGuard, message: pb.WatchProgressResponse, now_s: float = 0.0) -> str:
    try:
        guard.check(message, now_s)
    except GodwitError as error:
        return error.reason
    return ""


@pytest.mark.parametrize(
    "messages",
    [[said(2)], [said(1, whole=False)], [said(1), said(3)], [said(1), said(1)], [said(1), said(0)]],
)
def test_what_is_missing_ends_the_stream_and_the_next_one_is_good(
    messages: list[pb.WatchProgressResponse],
) -> None:
    guard = ProgressGuard("b", 0.0)
    *good, bad = messages
    assert [reason(guard, each) for each in good] == [""] * len(good)
    assert reason(guard, bad) == "DELTA_LOST"
    guard.begin()
    assert [reason(guard, said(number)) for number in (1, 2, 3)] == [""] * 3


def test_who_floods_is_cut_and_has_not_more_in_the_next_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    guard, sent = ProgressGuard("b", 0.0), 0
    while not (why := reason(guard, said(sent + 1))):
        sent += 1
    assert (why, sent) == ("AGENT_FLOODS", MESSAGES_BURST)
    guard.begin()
    assert reason(guard, said(1)) == "AGENT_FLOODS"
    allowed = sum(not reason(guard, said(n), 1.0) for n in range(1, int(2 * MESSAGES_PER_S)))
    assert allowed == MESSAGES_PER_S
    monkeypatch.setattr(progress_guard, "RUNS_BURST", 10.0)
    assert reason(ProgressGuard("b", 0.0), said(1, runs=11)) == "AGENT_FLOODS"
    quick = ProgressGuard("b", 0.0)
    assert not any(reason(quick, said(n + 1), n / 50) for n in range(5_000)), "as fast as ours may"


async def test_a_move_is_told_over_time(fleet: FakeFleet) -> None:
    fleet.b.pages_per_tick = 2
    before = await fleet.get(f"/v1/vms/{VM}/residency")
    assert before["points"] == []
    migration_id = await fleet.migrate()
    await fleet.ended(migration_id)
    told = await fleet.get(f"/v1/vms/{VM}/residency")
    counts = [point["absent_count"] for point in told["points"]]
    assert told["epoch"] == (await fleet.vm())["epoch"]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 0
    assert len(counts) >= 2
    assert (await fleet.http.get("/v1/vms/ghost/residency")).status_code == 404


async def test_an_agent_that_floods_is_not_listened_to_and_its_guest_arrives(
    fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told why it waits, counted, and listened to again."""
    monkeypatch.setattr(progress_guard, "MESSAGES_BURST", 2.0)
    # As good as never: a slow machine's messages come slowly too.
    monkeypatch.setattr(progress_guard, "MESSAGES_PER_S", 0.01)
    monkeypatch.setattr(follow, "FLOOD_PAUSE_S", 0.05)
    fleet.b.pages_per_tick = 1
    migration_id = await fleet.migrate()
    cut = fleet.core.context.metrics.progress_cut.labels("AGENT_FLOODS")
    ended: Any = await fleet.ended(migration_id)
    assert ended["phase"] == "succeeded"
    await eventually(lambda: cut._value.get() >= 1)
    assert "AGENT_FLOODS" in {each["kind"] for each in ended["events"]}


def test_nothing_is_kept_of_a_vm_that_is_gone() -> None:
    known = Residency()
    known.add("a", 1, 10, Point(0, 5))
    known.forget("a")
    assert known.get("a", 1) is None
