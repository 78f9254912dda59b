# SPDX-License-Identifier: Apache-2.0
"""gRPC of watching: godwit.fleet.v1.EventService."""
# The generated servicer gives the names and the arguments.
# ruff: noqa: ARG002, N802

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import asdict
from typing import Any

import grpc.aio
from godwit.fleet.v1 import event_service_pb2 as pb
from godwit.fleet.v1 import event_service_pb2_grpc as pb_grpc

from services.orchestrator.events.model import Began, Change, Kind, Reset, Told
from services.orchestrator.events.service import Events
from services.orchestrator.fleet import field_invalid

_Context = grpc.aio.ServicerContext[Any, Any]
_KINDS = {
    pb.EVENT_KIND_MIGRATION: Kind.MIGRATION,
    pb.EVENT_KIND_OPERATION: Kind.OPERATION,
    pb.EVENT_KIND_NODE: Kind.NODE,
}


class EventServicer(pb_grpc.EventServiceServicer):
    """See the proto."""

    def __init__(self, events: Events) -> None:
        self._events = events

    async def WatchEvents(
        self, request: pb.WatchEventsRequest, context: _Context
    ) -> AsyncIterator[pb.WatchEventsResponse]:
        for each in request.kinds:
            if each not in _KINDS:
                raise field_invalid("kinds", "must be of the enum", each)
        kinds = [_KINDS[each] for each in request.kinds]
        async with aclosing(self._events.fleet(kinds, request.after)) as stream:  # type: ignore[type-var]
            async for told in stream:
                yield _response(told)


def _response(told: Told) -> pb.WatchEventsResponse:
    what = told.what
    if isinstance(what, Change):
        kind, _key = what.subject
        return pb.WatchEventsResponse(event_id=told.position, **{kind.value: what.message})  # type: ignore[arg-type]
    if isinstance(what, Reset):
        reset = pb.EventsReset(**asdict(what))
        return pb.WatchEventsResponse(event_id=told.position, reset=reset)
    assert isinstance(what, Began), "silence is only told to who asks for pings"
    return pb.WatchEventsResponse(event_id=told.position, began=pb.EventsBegan())
