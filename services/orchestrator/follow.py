# SPDX-License-Identifier: Apache-2.0
"""Follows an arrival: bitmap and counters into the store, what they mean into events.

Two tasks: one reads the destination's stream, and asks both agents whenever it breaks; the other
asks, while the link is lost, whether the source still has the memory. Both only report; the table
decides what a report does in the phase in which it arrives.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from godwit.agent.v1 import fault_agent_service_pb2 as agent_pb2
from godwit.common.v1 import common_pb2

from services.common.errors import GodwitError
from services.orchestrator.migration import (
    AWAITING,
    Event,
    LinkLost,
    LinkRestored,
    MemoryComplete,
    PagesArrive,
    Phase,
    Stuck,
    progress,
)
from services.orchestrator.move import Move
from services.orchestrator.progress_guard import ProgressGuard
from services.orchestrator.residency import Point
from services.orchestrator.store import PhaseLostError
from services.orchestrator.store.rows import EventRow
from services.orchestrator.timeline import of_hold

FLOOD_PAUSE_S = 5.0
"""Until an agent that floods is listened to again. Its guest's pages come meanwhile."""
CUT = ("AGENT_FLOODS", "DELTA_LOST")
_OVER = (agent_pb2.ARRIVAL_PHASE_COMPLETE, agent_pb2.ARRIVAL_PHASE_ENDED)
_PAUSED = (agent_pb2.ARRIVAL_PHASE_LINK_LOST, agent_pb2.ARRIVAL_PHASE_NO_MEMORY)

_FROZEN = EventRow(
    kind="GUEST_FROZEN",
    message="the guest has been held for as long as the policy on a lost link allows: its whole "
    "VMM is frozen",
    action="thawed as soon as the faults that wait are served",
)
_THAWED = EventRow(kind="GUEST_THAWED", message="the guest's VMM goes on")


def _now_s() -> float:
    return asyncio.get_running_loop().time()


def _lost(node: str, message: agent_pb2.WatchProgressResponse) -> LinkLost:
    """Why no page can be had, from what the destination's agent says."""
    if message.phase == agent_pb2.ARRIVAL_PHASE_NO_MEMORY:
        return LinkLost(
            reason="NO_MEMORY",
            message=f"{node} has no room for the guest's pages: {message.reason}",
            hint=f"free memory on {node}: its --ram-dir is full, or its memory limit is reached",
        )
    cause = message.counters.hold_now.cause
    if message.reason.startswith("REFUSED"):
        return LinkLost(
            reason="PAGE_SERVER_REFUSES",
            message=message.reason,
            hint="look at the source's agent and page server: does it still serve the image?",
        )
    if cause == common_pb2.HOLD_CAUSE_PAGE_SERVER:
        return LinkLost(
            reason="PAGE_SERVER_AWAY",
            message=message.reason or "nobody listens at the page server's address",
            hint="start the page server of the source again; it needs no state but its images",
        )
    return LinkLost(
        reason="LINK_LOST",
        message=message.reason or "the page server cannot be reached",
        hint="check the network between the nodes, and the page server of the source",
    )


class Follower:
    """Reports the events of one arrival for as long as it is followed."""

    def __init__(self, move: Move) -> None:
        self._move = move
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._phase = agent_pb2.ARRIVAL_PHASE_UNSPECIFIED
        self._absent_count: int | None = None
        self._written_at = 0.0
        self._stuck_reason = ""
        self._guard = ProgressGuard(move.row.destination_node, _now_s())
        counters = common_pb2.ArrivalCounters.FromString(move.row.counters)
        self._hold_number = max((hold.number for hold in counters.holds), default=0)
        self._frozen = False

    async def next_event(self) -> Event:
        """The next thing that happened."""
        return await self._events.get()

    async def run(self) -> None:
        """Follow until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._read())
            group.create_task(self._watch_source())

    def _report(self, event: Event) -> None:
        if isinstance(event, Stuck):
            if event.reason == self._stuck_reason:
                return
            self._stuck_reason = event.reason
        self._events.put_nowait(event)

    async def _read(self) -> None:
        backoff, said = self._move.context.backoff(), False
        while True:
            await self._require_awaiting()
            judgement = await self._move.ask()
            if isinstance(judgement.event, MemoryComplete) and not said:
                # It was quicker than we are: its counters are told by a stream alone.
                with contextlib.suppress(GodwitError):
                    await self._stream()
            if judgement.event:
                self._report(judgement.event)
            elif judgement.reason:
                await self._move.wait_for(judgement.reason, judgement.message)
            try:
                if await self._stream():
                    said = True
                    backoff = self._move.context.backoff()
            except GodwitError as error:
                await self._move.wait_for(error.reason, error.message, error.hint)
                if error.reason in CUT:
                    self._move.context.metrics.progress_cut.labels(error.reason).inc()
                if error.reason == "AGENT_FLOODS":
                    await asyncio.sleep(FLOOD_PAUSE_S)
            await asyncio.sleep(next(backoff))

    async def _require_awaiting(self) -> None:
        """End a following that nobody waits for: a process that has died since moved it on.

        The one in hand is cancelled as soon as its own mover has entered the next phase.

        Raises:
            PhaseLostError: begin again from the store.
        """
        move = self._move
        if move.row.phase not in AWAITING:
            await asyncio.sleep(move.limits.retry_s_max)
            raise PhaseLostError(
                "PHASE_LOST", f"migration {move.row.migration_id} is {move.row.phase} already"
            )

    async def _stream(self) -> bool:
        """Read one stream to its end. True if it said anything."""
        move = self._move
        self._absent_count = None
        request = agent_pb2.WatchProgressRequest(
            vm_id=move.row.vm_id, epoch=move.row.epoch, interval_ms=move.limits.progress_ms
        )
        said = False
        self._guard.begin()
        async with contextlib.aclosing(move.destination.watch(request)) as messages:
            async for message in messages:
                self._guard.check(message, _now_s())
                await self._take(message)
                said = True
                if message.phase in _OVER:
                    break
        return said

    async def _take(self, message: agent_pb2.WatchProgressResponse) -> None:
        move = self._move
        row = move.row
        bitmap = await move.context.bitmaps.apply(
            row.vm_id, row.epoch, row.page_size_bytes, message.bitmap_delta
        )
        point = Point(move.context.now_ns(), bitmap.absent_count)
        move.context.residency.add(row.vm_id, row.epoch, bitmap.page_count, point)
        await self._tell(message)
        await move.tell_of_certificates()
        changed = message.phase != self._phase
        now = asyncio.get_running_loop().time()
        if changed or now - self._written_at >= move.limits.progress_write_s:
            self._written_at = now
            wait_over: dict[str, Any] = {"wait_reason": "", "wait_message": "", "wait_hint": ""}
            if message.HasField("counters"):  # an agent that has just come back has none yet
                wait_over["counters"] = message.counters.SerializeToString()
            await move.record(
                progress=progress(row.phase, bitmap.resident_share, row.progress), **wait_over
            )
        before, self._phase = self._phase, message.phase
        if message.phase in _OVER:
            await move.context.bitmaps.write(row.vm_id)
            return
        if message.phase in _PAUSED:
            if changed:
                self._report(_lost(row.destination_node, message))
            return
        if before in _PAUSED:
            self._report(LinkRestored())
        if (
            row.phase in AWAITING
            and row.phase is not Phase.POSTCOPY
            and self._absent_count is not None
            and bitmap.absent_count < self._absent_count
        ):
            self._report(PagesArrive())
            self._stuck_reason = ""
        self._absent_count = bitmap.absent_count

    async def _tell(self, message: agent_pb2.WatchProgressResponse) -> None:
        """What the stream says of outages and of the policy on them."""
        timeline, node = self._move.timeline, self._move.row.destination_node
        await timeline.goes_on()
        for hold in message.counters.holds:
            if hold.number > self._hold_number:
                self._hold_number = hold.number
                await timeline.tell(of_hold(node, hold))
        if message.frozen != self._frozen:
            self._frozen = message.frozen
            await timeline.tell(_FROZEN if message.frozen else _THAWED)

    async def _watch_source(self) -> None:
        while True:
            await asyncio.sleep(self._move.limits.source_check_s)
            if self._phase in _PAUSED:
                judgement = await self._move.ask()
                if judgement.event:
                    self._report(judgement.event)
