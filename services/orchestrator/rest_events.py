# SPDX-License-Identifier: Apache-2.0
"""Server-sent events: /v1/events, and /events of a migration and of an operation.

Each event is rendered once, whoever watches. A watcher who does not read is hung up on.
Source: https://html.spec.whatwg.org/multipage/server-sent-events.html.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Message, Receive, Scope, Send

from services.common.errors import GodwitError
from services.orchestrator import problems, rest_models
from services.orchestrator.auth.connection import hang_up
from services.orchestrator.events.model import Began, Change, Kind, Reset, Silence, Told
from services.orchestrator.events.service import Events
from services.orchestrator.rest_operations import Operation

log = logging.getLogger(__name__)

PING_S = 15.0
"""A comment this often keeps proxies from closing a silent event stream."""
SEND_S_MAX = 30.0
"""How long a watcher may read nothing while the buffers of his connection are full."""
_FORM = "sse"
_MODELS: dict[Kind, Any] = {
    Kind.MIGRATION: rest_models.Migration,
    Kind.OPERATION: Operation,
    Kind.NODE: rest_models.Node,
}

LastEventId = Annotated[
    str, Header(max_length=128, description="the `id` of the last event that was seen")
]


class EventsReset(BaseModel):
    """Data of `event: reset`: list again, then go on with what comes."""

    reason: str
    message: str
    hint: str


def _event(name: str, data: str) -> bytes:
    return f"event: {name}\ndata: {data}\n\n".encode()


def _frame(told: Told) -> bytes:
    what = told.what
    if isinstance(what, Silence):
        # An id without an event: whoever comes back need not be told what he did not want.
        return f": ping\nid: {told.position}\n\n".encode()
    if isinstance(what, Began):
        frame = _event("began", "{}")
    elif isinstance(what, Reset):
        frame = _event("reset", json.dumps(asdict(what)))
    else:
        frame = _rendered(what)
    return b"id: " + told.position.encode() + b"\n" + frame


def _rendered(change: Change) -> bytes:
    if _FORM not in change.rendered:
        kind, _key = change.subject
        change.rendered[_FORM] = _event(kind, _MODELS[kind].of(change.message).model_dump_json())
    return change.rendered[_FORM]


async def _frames(stream: AsyncIterator[Told]) -> AsyncGenerator[bytes, None]:
    """Ends with `event: problem` where the watcher is cut."""
    async with aclosing(stream):  # type: ignore[type-var]
        try:
            async for told in stream:
                yield _frame(told)
        except GodwitError as error:
            yield _event("problem", bytes(problems.of(error).body).decode())


class EventStream(StreamingResponse):
    """A stream of events, of which each must be taken in time."""

    media_type = "text/event-stream"

    def __init__(self, stream: AsyncIterator[Told]) -> None:
        self._rendered = _frames(stream)
        super().__init__(
            self._rendered, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request."""

        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(SEND_S_MAX):
                await send(message)

        try:
            await super().__call__(scope, receive, send_in_time)
        except TimeoutError:
            log.info("a watcher has not read for %g s: hung up", SEND_S_MAX)
            hang_up(scope)
            await asyncio.sleep(0)  # the server hears of it before this ends
        finally:
            await self._rendered.aclose()


def _described(*names: str) -> dict[int | str, dict[str, Any]]:
    """The answer, event by event, as OpenAPI has it."""
    event = {
        "type": "object",
        "properties": {
            "event": {"type": "string", "enum": [*names, "problem"]},
            "id": {"type": "string", "description": "for Last-Event-ID"},
            "data": {"type": "string", "contentMediaType": "application/json"},
        },
        "required": ["data"],
    }
    return {
        200: {
            "description": "Server-sent events",
            "content": {"text/event-stream": {"schema": event}},
        }
    }


def events(watching: Events) -> APIRouter:
    """What can be watched."""
    router = APIRouter(prefix="/v1", tags=["events"], responses=problems.RESPONSES)

    @router.get(
        "/events", response_class=StreamingResponse, responses=_described("began", "reset", *Kind)
    )
    async def watch_events(
        kind: Annotated[list[Kind], Query(description="only of these; none: of all")] = [],  # noqa: B006
        last_event_id: LastEventId = "",
    ) -> EventStream:
        """What changes in the fleet, from now on or from after Last-Event-ID.

        Begins with `event: began`, or with `event: reset` where events after that id are not kept
        any more: list again, then go on with what comes. Data is the migration, the operation
        (without its VMs) or the node (without its VMs) as it was then. A watcher that is too slow
        is told so by `event: problem`, and the stream ends.
        """
        return EventStream(watching.fleet(kind, last_event_id, ping_s=PING_S))

    @router.get(
        "/migrations/{migration_id}/events",
        response_class=StreamingResponse,
        responses=_described(Kind.MIGRATION),
    )
    async def watch_migration(migration_id: str, last_event_id: LastEventId = "") -> EventStream:
        """The migration at each change, as `event: migration`, until it is terminal.

        Begins with its present state, unless that is the version in Last-Event-ID.
        """
        await watching.require(Kind.MIGRATION, migration_id)  # unknown: a problem, not a stream
        return EventStream(_one(watching, Kind.MIGRATION, migration_id, last_event_id))

    @router.get(
        "/operations/{operation_id}/events",
        response_class=StreamingResponse,
        responses=_described(Kind.OPERATION),
    )
    async def watch_operation(operation_id: str, last_event_id: LastEventId = "") -> EventStream:
        """The operation at each change, as `event: operation`, until it has ended.

        Begins with its present state, unless that is the version in Last-Event-ID.
        """
        await watching.require(Kind.OPERATION, operation_id)
        return EventStream(_one(watching, Kind.OPERATION, operation_id, last_event_id))

    return router


def _one(watching: Events, kind: Kind, key: str, last_event_id: str) -> AsyncIterator[Told]:
    # Whatever is no number was never an id of ours: it says nothing.
    known = last_event_id.isascii() and last_event_id.isdecimal()
    seen = int(last_event_id) if known else 0
    return watching.one(kind, key, seen=seen, ping_s=PING_S)
