# SPDX-License-Identifier: Apache-2.0
"""The feed by itself: nothing is told twice or left out unsaid, and what it keeps is bounded."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from godwit.fleet.v1 import types_pb2
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import ResourceExhaustedError, UnavailableError
from services.orchestrator.changes import Changes
from services.orchestrator.events import feed as feed_module
from services.orchestrator.events.feed import Feed
from services.orchestrator.events.model import Began, Change, Kind, Reset, Silence, Subject, Told
from services.orchestrator.events.ring import GoneError, Ring
from services.orchestrator.events.service import Events
from tests.harness.fake_fleet import eventually

WAIT_S = 20.0
EMPTY_BYTES = types_pb2.Node(name="n").ByteSize()


def change(key: str = "n", *, kind: Kind = Kind.NODE, version: int = 0) -> Change:
    return Change(subject=(kind, key), message=types_pb2.Node(name=key), version=version)


# --- the ring ---


@given(
    sizes=st.lists(st.integers(1, 40), max_size=80),
    count_max=st.integers(1, 20),
    bytes_max=st.integers(1, 300),
)
def test_a_ring_has_the_last_ones_or_says_that_some_are_gone(
    sizes: list[int], count_max: int, bytes_max: int
) -> None:
    ring, given_names = Ring(count_max, bytes_max), []
    for number, size in enumerate(sizes, start=1):
        name = f"{number}".rjust(size, "-")
        given_names.append(name)
        ring.append(change(name))
    assert ring.last == len(sizes)
    kept = 0
    for sequence in range(len(sizes) + 1):
        try:
            found = ring.since(sequence)
        except GoneError:
            assert not kept, "what comes after something that is kept is kept too"
            continue
        kept = max(kept, len(found))
        assert [str(each.subject[1]) for each in found] == given_names[sequence:]
        assert [each.sequence for each in found] == list(range(sequence + 1, len(sizes) + 1))
    assert kept <= count_max
    assert (
        kept <= 1
        or sum(types_pb2.Node(name=name).ByteSize() for name in given_names[-kept:]) <= bytes_max
    )
    for wrong in (-1, len(sizes) + 1):
        with pytest.raises(GoneError):
            ring.since(wrong)


# --- the feed, over a reader that counts ---


class Shelf:
    """What can be read, and how often it was."""

    def __init__(self) -> None:
        self.versions: dict[Subject, int] = {}
        self.ended: set[Subject] = set()
        self.reads: list[Subject] = []
        self.fails = False

    async def read(self, subjects: list[Subject]) -> list[Change]:
        if self.fails:
            raise UnavailableError("STORE_FAILED", "no")
        self.reads += subjects
        return [
            Change(
                subject=each,
                message=types_pb2.Node(name=each[1], message=str(self.versions[each])),
                version=self.versions[each],
                ended=each in self.ended,
            )
            for each in subjects
            if each in self.versions
        ]

    async def unfinished(self) -> dict[Subject, int]:
        return {key: each for key, each in self.versions.items() if key not in self.ended}


class Set:
    """A feed that runs."""

    def __init__(self) -> None:
        self.shelf, self.changes = Shelf(), Changes()
        self.feed = Feed(self.shelf, self.changes)
        self.events = Events(self.feed)

    def write(self, key: str, version: int, *, kind: Kind = Kind.MIGRATION) -> None:
        self.shelf.versions[kind, key] = version
        self.changes.publish(key, kind)


@pytest.fixture
async def running(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Set]:
    monkeypatch.setattr(feed_module, "GATHER_S", 0.001)
    monkeypatch.setattr(feed_module, "RETRY_S", 0.001)
    made = Set()
    task = asyncio.create_task(made.feed.run())
    yield made
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def following(stream: AsyncIterator[Told]) -> Told:
    async with asyncio.timeout(WAIT_S):
        return await anext(stream)


def names(told: Told) -> tuple[str, int]:
    assert isinstance(told.what, Change), told
    return told.what.subject[1], told.what.version


async def test_what_nobody_watches_is_not_read(running: Set) -> None:
    running.write("m", 1)
    await asyncio.sleep(0.05)
    assert running.shelf.reads == []


async def test_a_change_is_read_once_however_many_watch(running: Set) -> None:
    streams = [running.events.fleet() for _ in range(50)]
    for stream in streams:
        assert isinstance((await following(stream)).what, Began)
    running.write("m", 1)
    told = [await following(stream) for stream in streams]
    assert {names(each) for each in told} == {("m", 1)}
    assert len({id(each.what) for each in told}) == 1, "rendered once too: it is the same one"
    assert running.shelf.reads == [(Kind.MIGRATION, "m")]


async def test_who_comes_back_misses_nothing(running: Set) -> None:
    first = running.events.fleet()
    await following(first)
    running.write("m", 1)
    told = await following(first)
    await first.aclose()  # type: ignore[attr-defined]
    running.write("m", 2)
    running.write("o", 1, kind=Kind.OPERATION)
    await eventually(lambda: len(running.shelf.reads) == 3)
    again = running.events.fleet(after=told.position)
    assert isinstance((await following(again)).what, Began)
    assert [names(await following(again)) for _ in range(2)] == [("m", 2), ("o", 1)]


@pytest.mark.parametrize("after", ["x", "x-1", "-", "9" * 40, "01a-99999"])
async def test_an_id_of_another_place_or_time_is_a_reset(running: Set, after: str) -> None:
    stream = running.events.fleet(after=after)
    told = await following(stream)
    assert isinstance(told.what, Reset)
    running.write("m", 1)
    assert names(await following(stream)) == ("m", 1)
    again = running.events.fleet(after=told.position)
    assert isinstance((await following(again)).what, Began)
    assert names(await following(again)) == ("m", 1)


async def test_who_is_away_for_too_long_is_told_to_list_again(
    running: Set, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = running.events.fleet()
    position = (await following(first)).position
    monkeypatch.setattr(running.feed, "_ring", Ring(3, 1 << 20))
    for version in range(1, 9):
        running.write("m", version)
        assert names(await following(first)) == ("m", version)
    assert isinstance((await following(running.events.fleet(after=position))).what, Reset)


async def test_who_does_not_take_what_comes_is_cut_and_told_why(
    running: Set, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one who does is not."""
    slow, quick = running.events.fleet(), running.events.fleet()
    await following(slow)
    await following(quick)
    monkeypatch.setattr(running.feed, "_ring", Ring(3, 1 << 20))
    for version in range(1, 9):
        running.write("m", version)
        assert names(await following(quick)) == ("m", version)
    with pytest.raises(ResourceExhaustedError) as cut:
        await following(slow)
    assert cut.value.reason == "WATCHER_TOO_SLOW"


async def test_one_subject_is_told_as_it_is_now_however_late(running: Set) -> None:
    running.shelf.versions[Kind.MIGRATION, "m"] = 1
    stream, other = running.events.one(Kind.MIGRATION, "m"), running.events.fleet()
    await following(other)
    assert names(await following(stream)) == ("m", 1)
    for version in range(2, 9):
        running.write("m", version)
        running.write("n", version)
        await following(other)
        await following(other)
    running.shelf.ended.add((Kind.MIGRATION, "m"))
    running.write("m", 9)
    await following(other)
    assert names(await following(stream)) == ("m", 9)
    with pytest.raises(StopAsyncIteration):
        await following(stream)


async def test_a_version_that_was_seen_is_not_told_again(running: Set) -> None:
    running.shelf.versions[Kind.MIGRATION, "m"] = 4
    stream = running.events.one(Kind.MIGRATION, "m", seen=4, ping_s=0.01)
    assert isinstance((await following(stream)).what, Silence)
    running.write("m", 5)
    while isinstance((told := await following(stream)).what, Silence):
        pass
    assert names(told) == ("m", 5)
    stream = running.events.one(Kind.MIGRATION, "m", seen=99)
    assert names(await following(stream)) == ("m", 5), "of a store that was restored"


async def test_kinds_are_chosen_and_the_others_cost_no_reset(
    running: Set, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, other = running.events.fleet([Kind.NODE], ping_s=0.01), running.events.fleet()
    await following(stream)
    await following(other)
    monkeypatch.setattr(running.feed, "_ring", Ring(3, 1 << 20))
    for version in range(1, 9):
        running.write("m", version)
        await following(other)
        silence = await following(stream)
        assert isinstance(silence.what, Silence)
    running.write("a", 0, kind=Kind.NODE)
    while isinstance((told := await following(stream)).what, Silence):
        pass
    assert names(told) == ("a", 0)


async def test_a_store_that_does_not_answer_loses_nothing(running: Set) -> None:
    stream = running.events.fleet()
    await following(stream)
    running.shelf.fails = True
    running.write("m", 1)
    running.write("n", 1)
    await asyncio.sleep(0.02)
    running.shelf.fails = False
    assert {names(await following(stream)) for _ in range(2)} == {("m", 1), ("n", 1)}


async def test_what_waits_to_be_read_is_bounded_and_then_all_list_again(
    running: Set, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_module, "DIRTY_MAX", 10)
    stream = running.events.fleet()
    await following(stream)
    running.shelf.fails = True
    for number in range(11):
        running.write(f"m{number}", 1)
    running.shelf.fails = False
    assert isinstance((await following(stream)).what, Reset)


async def test_what_another_process_wrote_is_found(running: Set) -> None:
    """A standby is told nothing: it looks, and an end is seen as well."""
    subject = (Kind.MIGRATION, "m")
    stream = running.events.fleet()
    await following(stream)
    running.shelf.versions[subject] = 1
    running.changes.publish_all()
    assert names(await following(stream)) == ("m", 1)
    running.changes.publish_all()
    running.shelf.versions[subject] = 2
    running.shelf.ended.add(subject)
    running.changes.publish_all()
    told = await following(stream)
    assert names(told) == ("m", 2)
    assert isinstance(told.what, Change)
    assert told.what.ended


async def test_what_ended_elsewhere_before_the_first_look_is_told(running: Set) -> None:
    """Somebody has just begun to watch it on a standby; it was unfinished then, and never again."""
    subject = (Kind.MIGRATION, "m")
    running.shelf.versions[subject] = 1
    stream = running.events.one(*subject)
    assert names(await following(stream)) == ("m", 1)
    running.shelf.versions[subject] = 2
    running.shelf.ended.add(subject)
    running.changes.publish_all()
    assert names(await following(stream)) == ("m", 2)
    with pytest.raises(StopAsyncIteration):
        await following(stream)


async def test_streams_end_with_the_process(running: Set) -> None:
    running.shelf.versions[Kind.MIGRATION, "m"] = 1
    streams = [running.events.fleet(), running.events.one(Kind.MIGRATION, "m")]
    for stream in streams:
        await following(stream)
    waiting = [asyncio.ensure_future(following(stream)) for stream in streams]
    await asyncio.sleep(0)
    running.changes.close()
    for each in waiting:
        with pytest.raises(StopAsyncIteration):
            await each
