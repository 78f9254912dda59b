# SPDX-License-Identifier: Apache-2.0
"""Promise: of several orchestrators the leader is found, in bounded attempts, each change once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from godwit import route
from godwit.client import AsyncClient, Client
from godwit.errors import GodwitApiError, GodwitConnectionError
from godwit.route import Attempts, Route, split_urls
from hypothesis import given
from hypothesis import strategies as st

from tests.harness.fake_api import FakeApi, event, serving_api

NOBODY = "http://127.0.0.1:1"
PATH = ("POST", "/v1/migrations")
DONE = {"migration_id": "01M", "phase": "pending", "version": 1}


@pytest.fixture
def apis() -> Iterator[list[FakeApi]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(serving_api()) for _ in range(3)]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route, "PAUSE_S", 0.0)


def stands_by(api: FakeApi, leader: FakeApi | None = None) -> None:
    rest = leader.url.removeprefix("http://") if leader else ""
    api.problem(*PATH, 503, "NOT_LEADER", "another leads", metadata={"rest": rest})


def test_the_one_that_is_named_is_asked_next_and_first_from_then_on(apis: list[FakeApi]) -> None:
    one, two, three = apis
    stands_by(one, three)
    three.answers[PATH] = (202, DONE)
    with Client(f"{one.url}, {two.url}") as client:
        assert client.migrate("x", "b").migration_id == "01M"
        assert client.url == three.url
        client.migrate("x", "b")
    assert [len(api.requests) for api in apis] == [1, 0, 2]


def test_one_that_is_not_there_is_passed_by(apis: list[FakeApi]) -> None:
    one, two, _ = apis
    stands_by(one)
    two.answers[PATH] = (202, DONE)
    with Client([NOBODY, one.url, two.url]) as client:
        client.migrate("x", "b")
    assert [len(api.requests) for api in apis] == [1, 1, 0]


def test_a_leader_that_went_away_is_looked_for_anew(apis: list[FakeApi]) -> None:
    one, two, _ = apis
    one.answers[PATH] = (202, DONE)
    with Client([one.url, two.url]) as client:
        client.migrate("x", "b")
        stands_by(one)
        two.answers[PATH] = (202, DONE)
        client.migrate("x", "b")
        assert client.url == two.url


def test_it_is_given_up_and_says_why(apis: list[FakeApi]) -> None:
    """Also where they name each other in a circle."""
    one, two, three = apis
    for api, named in ((one, two), (two, three), (three, one)):
        stands_by(api, named)
    with Client([one.url, two.url]) as client, pytest.raises(GodwitApiError, match="NOT_LEADER"):
        client.migrate("x", "b")
    assert sum(len(api.requests) for api in apis) <= 3 * route.ROUNDS + route.HINTS_MAX
    with Client([NOBODY, NOBODY + "1"]) as client, pytest.raises(GodwitConnectionError):
        client.migrate("x", "b")


def test_an_answer_that_was_lost_is_not_asked_for_elsewhere(apis: list[FakeApi]) -> None:
    """It may have been done; a refusal is final too."""
    one, two, _ = apis
    one.problem(*PATH, 503, "NODE_UNREACHABLE", "no answer")
    with Client([one.url, two.url]) as client, pytest.raises(GodwitApiError):
        client.migrate("x", "b")
    one.streams[PATH[1]] = [["{"]]  # it breaks off
    with (
        Client([one.url, two.url]) as client,
        pytest.raises(GodwitConnectionError, match=one.url),
    ):
        client.migrate("x", "b")
    assert two.requests == []


async def test_the_async_client_does_the_same(apis: list[FakeApi]) -> None:
    one, two, _ = apis
    stands_by(one, two)
    two.answers[PATH] = (202, DONE)
    async with AsyncClient([NOBODY, one.url]) as client:
        await client.migrate("x", "b")
        assert client.url == two.url


def test_a_watch_goes_on_at_another(apis: list[FakeApi]) -> None:
    one, two, _ = apis
    path = "/v1/migrations/01M/events"
    one.streams[path] = [[event(DONE)]]
    two.streams[path] = [[event(DONE | {"phase": "succeeded", "version": 2})]]
    with Client([one.url, two.url]) as client:
        assert [step.phase for step in client.watch("01M")] == ["pending", "succeeded"]


def test_urls_are_read() -> None:
    with pytest.raises(ValueError, match="no orchestrator"):
        Client(" ,")
    assert split_urls(" http://a/ ,http://b,,http://a") == ("http://a", "http://b")


@given(
    names=st.lists(st.sampled_from(["http://a:1", "http://b:1", "http://c:1"]), min_size=1),
    hints=st.lists(st.sampled_from(["", "a:1", "b:1", "x:1", "y:1"]), max_size=60),
)
def test_attempts_always_end(names: list[str], hints: list[str]) -> None:
    attempts, asked = Attempts(Route(split_urls(names))), 0
    for hint in [*hints, *[""] * 60]:
        url = attempts.take()
        asked += 1
        if attempts.goes_on(url, hint) is None:
            break
    assert asked <= route.ROUNDS * (len({*names}) + 1) + route.HINTS_MAX
