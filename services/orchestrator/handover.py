# SPDX-License-Identifier: Apache-2.0
"""The steps past COMMITTED: each given until acknowledged; time-outs only alarm (I8)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from godwit.agent.v1 import fault_agent_service_pb2 as agent_pb2

from services.common.errors import GodwitError
from services.common.hooks import reach
from services.orchestrator.evidence import (
    Evidence,
    Verdict,
    holds_nothing,
    is_sealed,
    source_memory_is_gone,
)
from services.orchestrator.migration import Activated, Event, Released
from services.orchestrator.move import Move

Alarm = Callable[[], Awaitable[None]]
"""Called when a step takes longer than `Limits.alarm_s`, again and again."""


async def activate(move: Move, alarm: Alarm, *, rejoined: bool) -> Event:
    """Let the guest run at the destination.

    Returns Activated, or Stuck where evidence says that it never will.
    """
    loop = asyncio.get_running_loop()
    alarm_at = loop.time() + move.limits.alarm_s
    request = agent_pb2.ActivateRequest(fence=move.fence())
    await reach("orchestrator.activate.before")
    ask_first = rejoined
    for delay_s in move.context.backoff():
        if not ask_first:
            try:
                answer = await move.destination.activate(request, traceparent=move.row.traceparent)
                move.ran_ns += answer.after_run_ns
            except GodwitError as error:
                move.activation_tried.set()
                await move.wait_for(error.reason, error.message, error.hint)
            else:
                move.activation_tried.set()
                await reach("orchestrator.activate.after")
                return Activated()
        judgement = await move.ask()
        if judgement.event:
            return judgement.event
        if ask_first:
            ask_first = False
            continue
        alarm_at = await _alarm_if_due(move, alarm, alarm_at)
        await asyncio.sleep(delay_s)
    raise AssertionError


async def seal(move: Move, alarm: Alarm) -> None:
    """Make sure that the guest never runs at the source again.

    After the first answer to Activate, or without one after `Limits.seal_delay_s`: to take down a
    VMM and its mappings costs a host tens of milliseconds of processor time, and the guest still
    stands. Nothing depends on the order: the decision is durable, so the source is never resumed.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(move.limits.seal_delay_s):
            await move.activation_tried.wait()
    alarm_at = asyncio.get_running_loop().time() + move.limits.alarm_s
    if await reach("orchestrator.seal.before"):
        return
    request = agent_pb2.SealRequest(fence=move.fence())
    for delay_s in move.context.backoff():
        try:
            await move.source.seal(request, traceparent=move.row.traceparent)
        except GodwitError as error:
            await move.wait_for(error.reason, error.message, error.hint)
            evidence = await move.context.agents.describe(move.row.source_node, move.row.vm_id)
            # After another boot nothing of it runs, and no agent starts a VM by itself.
            if evidence and (
                is_sealed(move.row, evidence) or source_memory_is_gone(move.row, evidence)
            ):
                return
            # Recalled: it runs the guest only once the store has given it back.
            if evidence and 0 < move.row.return_epoch <= evidence.epoch_seen:
                return
        else:
            await reach("orchestrator.seal.after")
            return
        alarm_at = await _alarm_if_due(move, alarm, alarm_at)
        await asyncio.sleep(delay_s)


async def release(move: Move, alarm: Alarm, sealed: Callable[[], Awaitable[None]]) -> Event:
    """Free the source's memory, on the destination's durable word; then end the arrival.

    `sealed` returns once the source has acknowledged its seal.
    Returns Released, or Stuck where the destination's journal lost its word.
    """
    loop = asyncio.get_running_loop()
    alarm_at = loop.time() + move.limits.alarm_s
    for delay_s in move.context.backoff():
        judgement = await move.ask()
        if judgement.event:
            return judgement.event
        if judgement.verdict is Verdict.PERFORM:
            break
        await move.wait_for(judgement.reason, judgement.message)
        alarm_at = await _alarm_if_due(move, alarm, alarm_at)
        await asyncio.sleep(delay_s)
    await sealed()
    await reach("orchestrator.release.before")
    for side, node in (
        (agent_pb2.SIDE_SOURCE, move.row.source_node),
        (agent_pb2.SIDE_DESTINATION, move.row.destination_node),
    ):
        await _release_side(move, alarm, side, node)
        await reach(f"orchestrator.release.{agent_pb2.Side.Name(side).lower()}")
    return Released()


async def _release_side(
    move: Move, alarm: Alarm, side: agent_pb2.Side.ValueType, node: str
) -> None:
    """Release one side.

    A guest that has ended needs no memory: its source is released with the same word, because the
    agents free nothing without it. So is a source that has lost its memory with its boot: a record
    that stayed would say for ever that this node retains something, and no drain of it would end.
    """
    alarm_at = asyncio.get_running_loop().time() + move.limits.alarm_s
    is_source = side == agent_pb2.SIDE_SOURCE
    request = agent_pb2.ReleaseRequest(fence=move.fence(), side=side, memory_complete=is_source)
    for delay_s in move.context.backoff():
        try:
            await move.context.agents.get(node).release(request)
        except GodwitError as error:
            await move.wait_for(error.reason, error.message, error.hint)
            evidence = await move.context.agents.describe(node, move.row.vm_id)
            if evidence and _is_released(evidence, is_source=is_source):
                return
        else:
            return
        alarm_at = await _alarm_if_due(move, alarm, alarm_at)
        await asyncio.sleep(delay_s)


def _is_released(evidence: Evidence, *, is_source: bool) -> bool:
    """True if a node whose answer to Release is missing has nothing left to release."""
    if holds_nothing(evidence) and not evidence.retained_bytes:
        return True
    return not is_source and evidence.role == agent_pb2.VM_ROLE_RESIDENT


async def _alarm_if_due(move: Move, alarm: Alarm, alarm_at: float) -> float:
    """When the next alarm is due."""
    now = asyncio.get_running_loop().time()
    if now < alarm_at:
        return alarm_at
    await alarm()
    return now + move.limits.alarm_s
