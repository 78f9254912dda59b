# SPDX-License-Identifier: Apache-2.0
"""Gives a guest back to its source after COMMITTED: never on a time-out, always in this order (I5).

1. A fresh epoch E'' is issued.
2. The destination is recalled under E'': it proves that `cont` was never attempted and that its VMM
   is dead, and durably refuses Activate(E') from then on, however late it comes.
3. The source is recalled under E'': no Seal(E') is admitted there any more, and it says whether it
   can let the guest run: VMM paused, or memory and device state kept.
4. The store swaps the owner: the second compare-and-swap.
5. The source lets the guest run under E''.

Until 4 nothing is changed that COMMITTED needs, if the destination did run the guest: the recall is
refused there (2), and the source has not been touched. A node that does not answer is waited for.
By force, on an operator's word that the destination is fenced, 2 is left out and owed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from godwit.agent.v1 import fault_agent_service_pb2 as agent_pb2

from services.common.errors import FailedPreconditionError, GodwitError, InternalError
from services.common.hooks import reach
from services.orchestrator.agents import AgentPool
from services.orchestrator.evidence import Evidence, holds_nothing, never_ran, wire_decision
from services.orchestrator.migration import (
    Event,
    LossDeclared,
    Phase,
    Restored,
    ReturnRead,
    Stuck,
)
from services.orchestrator.move import Move
from services.orchestrator.store import PhaseLostError, StoreError
from services.orchestrator.store.rows import MigrationRow

log = logging.getLogger(__name__)

Alarm = Callable[[], Awaitable[None]]


async def give_back(move: Move, alarm: Alarm) -> Event:
    """Steps 1 to 4. Returns ReturnRead, or Stuck where the proof is refused or nothing is left."""
    move.take(await move.context.store.migrations.reserve_return_epoch(move.row))
    if not move.row.by_force:
        if event := await _until(move, alarm, lambda: _recall_destination(move)):
            return event
        await reach("orchestrator.giveback.destination_fenced")
    if event := await _until(move, alarm, lambda: _recall_source(move)):
        return event
    await reach("orchestrator.giveback.before")
    await _until(move, alarm, lambda: _swap(move))
    await reach("orchestrator.giveback.after")
    return ReturnRead()


async def restore(move: Move, alarm: Alarm) -> Event:
    """Step 5. Returns Restored, or LossDeclared where the source proves that it is gone there."""
    ended: Event | None = None

    async def attempt() -> Event | None:
        nonlocal ended
        evidence = await move.source.describe(move.row.vm_id)
        ended = _ended(move.row, evidence)
        if ended is None:
            await reach("orchestrator.resume.before")
            fence = move.fence(epoch=move.row.return_epoch)
            evidence = await move.source.resume(agent_pb2.ResumeRequest(fence=fence))
            await reach("orchestrator.resume.after")
            ended = _ended(move.row, evidence)
        if ended is None:
            raise _again("SOURCE_NOT_RUNNING", _says(move.row.source_node, evidence))
        return ended

    await _until(move, alarm, attempt)
    assert ended is not None
    return ended


async def fence_destination(agents: AgentPool, row: MigrationRow) -> bool:
    """Tell a destination that was given back by force. True once its VMM is proved dead.

    Raises:
        GodwitError: it does not answer, or refuses.
    """
    request = agent_pb2.RecallRequest(side=agent_pb2.SIDE_DESTINATION)
    _write_fence(request.fence, row)
    try:
        evidence = await agents.get(row.destination_node).recall(request)
    except FailedPreconditionError as error:
        return error.reason == "STALE_EPOCH"
    return evidence.vmm_state == agent_pb2.VMM_STATE_DEAD


async def free_lost(agents: AgentPool, row: MigrationRow, side: agent_pb2.Side.ValueType) -> bool:
    """Have a node free what it has of a guest that was given up. True once it has.

    Raises:
        GodwitError: it does not answer, or refuses.
    """
    node = row.source_node if side == agent_pb2.SIDE_SOURCE else row.destination_node
    request = agent_pb2.ReleaseRequest(side=side)
    _write_fence(request.fence, row)
    try:
        evidence = await agents.get(node).release(request)
    except FailedPreconditionError as error:
        return error.reason == "STALE_EPOCH"
    except GodwitError:
        evidence = await agents.get(node).describe(row.vm_id)
    return holds_nothing(evidence) and not evidence.retained_bytes


def _write_fence(fence: object, row: MigrationRow) -> None:
    fence.vm_id, fence.epoch = row.vm_id, row.return_epoch  # type: ignore[attr-defined]
    fence.migration_id = row.migration_id  # type: ignore[attr-defined]
    fence.decision = wire_decision(row)  # type: ignore[attr-defined]


async def _recall_destination(move: Move) -> Event | None:
    row = move.row
    request = agent_pb2.RecallRequest(
        fence=move.fence(epoch=row.return_epoch), side=agent_pb2.SIDE_DESTINATION
    )
    evidence = await move.destination.recall(request)
    if never_ran(row, evidence) and evidence.epoch_seen >= row.return_epoch:
        return None
    if evidence.epoch_loaded != row.epoch:
        return Stuck(
            reason="DESTINATION_JOURNAL_LOST",
            message=f"{row.destination_node} has no LOADED for epoch {row.epoch} any more: nothing "
            "proves that the guest never ran there",
            hint="restore that node's journal, or see docs/runbooks/needs-attention.md",
        )
    raise _again("DESTINATION_ALIVE", _says(row.destination_node, evidence))


async def _recall_source(move: Move) -> Event | None:
    row = move.row
    request = agent_pb2.RecallRequest(
        fence=move.fence(epoch=row.return_epoch), side=agent_pb2.SIDE_SOURCE
    )
    try:
        evidence = await move.source.recall(request)
    except GodwitError:
        known = await move.context.agents.describe(row.source_node, row.vm_id)
        if known is None or not holds_nothing(known):
            raise
        evidence = known
    if evidence.returnable:
        return None
    if evidence.vmm_state == agent_pb2.VMM_STATE_UNRESPONSIVE:
        raise _again("SOURCE_UNRESPONSIVE", _says(row.source_node, evidence))
    return Stuck(
        reason="GUEST_GONE",
        message=f"the guest never ran on {row.destination_node}, and {row.source_node} cannot let "
        f"it run on: {_says(row.source_node, evidence)}",
        hint="start it again from its disk once the migration is abandoned",
    )


async def _swap(move: Move) -> Event | None:
    store = move.context.store.migrations
    try:
        move.take(await store.give_back(move.row, now_ns=move.context.now_ns()))
    except (StoreError, InternalError):
        # Written or not: only reading tells.
        log.exception("migration %s: give-back not written", move.row.migration_id)
        await move.reload()
    if not move.row.given_back:
        raise _again("RETURN_NOT_WRITTEN", f"the store took no return in {move.row.phase}")
    return None


def _ended(row: MigrationRow, evidence: Evidence) -> Event | None:
    """What the source's word means for a guest that is its own again; None: let it run."""
    resident = evidence.role == agent_pb2.VM_ROLE_RESIDENT
    runs = evidence.vmm_state in (agent_pb2.VMM_STATE_RUNNING, agent_pb2.VMM_STATE_GUEST_ENDED)
    if resident and runs and evidence.epoch_owned >= row.return_epoch:
        return Restored()
    rebooted = bool(row.source_boot_id) and evidence.boot_id != row.source_boot_id
    dead = evidence.vmm_state == agent_pb2.VMM_STATE_DEAD
    if rebooted or (dead and not evidence.returnable):
        return LossDeclared(
            reason="GUEST_GONE",
            message=f"the guest is gone with its VMM: {_says(row.source_node, evidence)}",
            hint=f"stop VM {row.vm_id}, and start it again from its disk",
        )
    return None


def _says(node: str, evidence: Evidence) -> str:
    role = agent_pb2.VmRole.Name(evidence.role).removeprefix("VM_ROLE_").lower()
    state = agent_pb2.VmmState.Name(evidence.vmm_state).removeprefix("VMM_STATE_").lower()
    return f"on {node} it is {role}, its VMM {state}"


def _again(reason: str, message: str) -> FailedPreconditionError:
    return FailedPreconditionError(reason, message)


async def _until(
    move: Move, alarm: Alarm, attempt: Callable[[], Awaitable[Event | None]]
) -> Event | None:
    """Try until it is answered; what the evidence says meanwhile goes first.

    Raises:
        PhaseLostError: somebody else has moved the migration on.
    """
    loop = asyncio.get_running_loop()
    phase = move.row.phase
    alarm_at = loop.time() + move.limits.alarm_s
    for delay_s in move.context.backoff():
        try:
            return await attempt()
        except PhaseLostError:
            raise
        except GodwitError as error:
            await move.wait_for(error.reason, error.message, error.hint)
        await move.reload()
        if move.row.phase is not phase:
            raise PhaseLostError(
                "PHASE_LOST", f"migration {move.row.migration_id} is {move.row.phase} already"
            )
        if phase is Phase.GIVING_BACK and (event := (await move.ask()).event):
            return event
        if loop.time() >= alarm_at:
            await alarm()
            alarm_at = loop.time() + move.limits.alarm_s
        await asyncio.sleep(delay_s)
    raise AssertionError
