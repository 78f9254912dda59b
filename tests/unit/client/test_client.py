# SPDX-License-Identifier: Apache-2.0
"""Promise: a client of release N understands a server of N+1; a watcher survives lost streams."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any

import pytest
from godwit.client import AsyncClient, Client
from godwit.errors import GodwitApiError, GodwitConnectionError
from godwit.models import Migration, MigrationPhase, Vm

from tests.harness.fake_api import FakeApi, event, serving_api

EVENTS = "/v1/migrations/01M/events"


@pytest.fixture
def api() -> Iterator[FakeApi]:
    """An orchestrator of canned answers."""
    with serving_api() as fake:
        yield fake


def migration(phase: str, version: int, **more: Any) -> dict[str, Any]:
    return {"migration_id": "01M", "phase": phase, "version": version, **more}


def test_reading_is_tolerant() -> None:
    """Unknown fields, unknown words, nulls and missing fields: none of them is an error."""
    read = Migration.from_json(
        {
            "phase": "teleporting",
            "counters": {"page_count": 5, "new": 1, "fault_latency": {"p50_ns": 7}},
            "ended_at": None,
            "created_at": "2026-11-22T19:00:00Z",
            "transitions": [{"phase": "pending", "at": ""}],
            "novelty": {},
        }
    )
    assert read.phase == "teleporting"
    assert not read.is_terminal
    assert read.counters is not None
    assert (read.counters.page_count, read.counters.fault_latency.p50_ns) == (5, 7)
    assert read.created_at is not None
    assert read.created_at.year == 2026
    assert read.transitions[0].at is None
    assert Vm.from_json(None) == Vm()


def test_typed_errors(api: FakeApi) -> None:
    api.problem(
        "GET", "/v1/vms/x", 404, "VM_UNKNOWN", "no VM x", hint="see godwit vms", metadata={"vm": 1}
    )
    with Client(api.url) as client, pytest.raises(GodwitApiError) as raised:
        client.vm("x")
    error = raised.value
    assert (error.status, error.reason, error.detail) == (404, "VM_UNKNOWN", "no VM x")
    assert (error.hint, error.metadata) == ("see godwit vms", {"vm": "1"})


def test_reason_is_read_from_the_type_where_it_is_not_said(api: FakeApi) -> None:
    api.answers["GET", "/v1/vms"] = (409, {"type": "https://godwit.io/errors/queue-paused"})
    with Client(api.url) as client, pytest.raises(GodwitApiError) as raised:
        client.vms()
    assert raised.value.reason == "QUEUE_PAUSED"


def test_an_answer_that_is_not_ours(api: FakeApi) -> None:
    api.answers["GET", "/v1/vms"] = (502, ["bad gateway"])
    with Client(api.url) as client, pytest.raises(GodwitApiError) as raised:
        client.vms()
    assert raised.value.reason == "NOT_A_PROBLEM"
    assert "bad gateway" in raised.value.detail


def test_watch_reconnects_and_never_runs_backwards(api: FakeApi) -> None:
    """A broken stream is taken up after the last event; what was seen is not shown again."""
    first, second = migration("pending", 1), migration("postcopy", 2)
    done = migration("succeeded", 3)
    api.streams[EVENTS] = [
        [event(first), ": a comment\n\n", event(second)],
        [],
        [event(first), event(second), "data: not json\n\n", event(done)],
    ]
    with Client(api.url) as client:
        seen = [step.phase for step in client.watch("01M")]
    assert seen == ["pending", "postcopy", "succeeded"]
    ids = [request.headers.get("last-event-id") for request in api.requests]
    assert ids == [None, "2", "2"]


def test_watch_gives_up_when_nobody_answers(api: FakeApi) -> None:
    api.streams[EVENTS] = [[event(migration("pending", 1))]]
    api.answers["GET", EVENTS] = (503, {"detail": "starting"})
    with Client(api.url) as client:
        steps = client.watch("01M", unreachable_s_max=0.2)
        assert next(steps).phase == "pending"
        with pytest.raises(GodwitConnectionError, match="503"):
            next(steps)


def test_watch_of_an_unknown_migration(api: FakeApi) -> None:
    api.problem("GET", EVENTS, 404, "MIGRATION_UNKNOWN", "no migration 01M")
    with Client(api.url) as client, pytest.raises(GodwitApiError, match="MIGRATION_UNKNOWN"):
        next(client.watch("01M"))
    assert len(api.requests) == 1, "a refusal is not retried"


async def test_async_client_is_the_same(api: FakeApi) -> None:
    api.answers["POST", "/v1/migrations"] = (202, migration("pending", 1))
    api.answers["DELETE", "/v1/vms/x"] = (204, None)
    api.problem("GET", "/v1/vms/x", 404, "VM_UNKNOWN", "no VM x")
    api.streams[EVENTS] = [
        [event(migration("pending", 1))],
        [event(migration("pending", 1)), event(migration("failed", 2))],
    ]
    async with AsyncClient(api.url) as client:
        begun = await client.migrate("x", "b")
        async with aclosing(client.watch(begun.migration_id)) as steps:
            assert [step.phase async for step in steps] == ["pending", MigrationPhase.FAILED]
        await client.stop_vm("x")
        with pytest.raises(GodwitApiError, match="VM_UNKNOWN"):
            await client.vm("x")
    async with AsyncClient("http://127.0.0.1:1") as client:
        with pytest.raises(GodwitConnectionError):
            await client.vms()


def test_the_fleet_is_followed_over_lost_streams(api: FakeApi) -> None:
    """What cannot be taken up is told as a reset; what we do not know is left out."""
    began = "id: t-1\nevent: began\ndata: {}\n\n"
    told = f"id: t-2\nevent: migration\ndata: {json.dumps(migration('pending', 1))}\n\n"
    novelty = 'id: t-3\nevent: weather\ndata: {"rain": true}\n\n'
    reset = 'id: u-9\nevent: reset\ndata: {"reason": "EVENTS_GONE"}\n\n'
    cut = 'event: problem\ndata: {"status": 429, "reason": "WATCHER_TOO_SLOW", "detail": "x"}\n\n'
    path = "/v1/events?kind=migration&kind=node"
    api.streams[path] = [[began, told, novelty], [], [reset, cut]]
    with Client(api.url) as client:
        events = client.events("migration", "node")
        assert [next(events).name for _ in range(3)] == ["began", "migration", "reset"]
        with pytest.raises(GodwitApiError, match="WATCHER_TOO_SLOW"):
            next(events)
    ids = [request.headers.get("last-event-id") for request in api.requests]
    assert ids == [None, "t-2", "t-2"]


def test_an_operation_is_watched_to_its_end(api: FakeApi) -> None:
    steps = [{"operation_id": "01O", "state": "running", "version": 1}]
    steps.append(steps[0] | {"state": "cancelled", "version": 2})
    api.streams["/v1/operations/01O/events"] = [[event(each) for each in steps]]
    with Client(api.url) as client:
        seen = [(step.state, data) for step, data in client.watch_operation("01O")]
    assert seen == [("running", steps[0]), ("cancelled", steps[1])]
