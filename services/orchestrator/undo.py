# SPDX-License-Identifier: Apache-2.0
"""The steps after ABORTED: clear the destination, then let the guest run at its source."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from godwit.agent.v1 import fault_agent_service_pb2 as agent_pb2

from services.common.errors import FailedPreconditionError, GodwitError
from services.common.hooks import reach
from services.orchestrator.agents import AgentPool
from services.orchestrator.evidence import Evidence, holds_nothing, wire_decision
from services.orchestrator.migration import CancelUndone, Event, Undone
from services.orchestrator.move import Move
from services.orchestrator.store.rows import MigrationRow

Alarm = Callable[[], Awaitable[None]]


async def undo(move: Move, alarm: Alarm) -> Event:
    """Undo both sides. Returns Undone or CancelUndone."""
    if move.row.resume_epoch:  # else no agent was ever told of this migration
        await _clear_destination(move)
        await reach("orchestrator.undo.destination_done")
        await _restore_source(move, alarm)
    return CancelUndone() if move.row.undo_is_cancel else Undone()


async def abort_destination(agents: AgentPool, row: MigrationRow) -> bool:
    """Tell the destination that the move is off. True once its shell is proved dead.

    Raises:
        GodwitError: it does not answer, or refuses.
    """
    fence = agent_pb2.AbortRequest().fence
    fence.vm_id, fence.epoch, fence.migration_id = row.vm_id, row.epoch, row.migration_id
    fence.decision = wire_decision(row)
    agent = agents.get(row.destination_node)
    try:
        evidence = await agent.abort(
            agent_pb2.AbortRequest(fence=fence, side=agent_pb2.SIDE_DESTINATION)
        )
    except FailedPreconditionError as error:
        # A later epoch was seen: a later attempt at the same node has taken the place of this one.
        return error.reason == "STALE_EPOCH"
    except GodwitError:
        evidence = await agent.describe(row.vm_id)
        return holds_nothing(evidence)
    return evidence.vmm_state == agent_pb2.VMM_STATE_DEAD


async def _clear_destination(move: Move) -> None:
    """Collect the proof; not to be had in time, it stays owed (Limits.destination_proof_s)."""
    if not move.row.destination_owed:
        return
    until = asyncio.get_running_loop().time() + move.limits.destination_proof_s
    for delay_s in move.context.backoff():
        try:
            if await abort_destination(move.context.agents, move.row):
                await move.record(destination_owed=False)
                return
            await move.wait_for("DESTINATION_ALIVE", "the shell's VMM is not dead yet")
        except GodwitError as error:
            await move.wait_for(error.reason, error.message, error.hint)
        if asyncio.get_running_loop().time() >= until:
            return
        await asyncio.sleep(delay_s)


async def _restore_source(move: Move, alarm: Alarm) -> None:
    """Until the source has seen the fresh epoch and the guest runs there, or is proved gone.

    The fresh epoch is told in any case: a command of this migration that is still under way, a late
    Pause above all, is stale from then on.
    """
    loop = asyncio.get_running_loop()
    alarm_at = loop.time() + move.limits.alarm_s
    for delay_s in move.context.backoff():
        try:
            evidence = await move.source.describe(move.row.vm_id)
            if not _restored(move.row, evidence):
                await reach("orchestrator.resume.before")
                evidence = await _push(move, evidence)
            if _restored(move.row, evidence):
                return
            await move.wait_for(
                "SOURCE_NOT_RUNNING",
                f"the VMM on {move.row.source_node} is "
                f"{agent_pb2.VmmState.Name(evidence.vmm_state)}",
            )
        except GodwitError as error:
            await move.wait_for(error.reason, error.message, error.hint)
        if loop.time() >= alarm_at:
            await alarm()
            alarm_at = loop.time() + move.limits.alarm_s
        await asyncio.sleep(delay_s)


async def _push(move: Move, evidence: Evidence) -> Evidence:
    fence = move.fence(epoch=move.row.resume_epoch)
    # Dead and kept whole: its agent makes the VMM again.
    if evidence.returnable or evidence.vmm_state not in (
        agent_pb2.VMM_STATE_RUNNING,
        agent_pb2.VMM_STATE_DEAD,
        agent_pb2.VMM_STATE_GUEST_ENDED,
    ):
        evidence = await move.source.resume(agent_pb2.ResumeRequest(fence=fence))
        await reach("orchestrator.resume.after")
        if _restored(move.row, evidence):
            return evidence
    # Never paused, or resumed and the image is still offered, or nobody is left to resume.
    return await move.source.abort(agent_pb2.AbortRequest(fence=fence, side=agent_pb2.SIDE_SOURCE))


def _restored(row: MigrationRow, evidence: Evidence) -> bool:
    """True if there is nothing left to undo at the source."""
    if row.source_boot_id and evidence.boot_id != row.source_boot_id:
        return True  # the host was restarted: the guest and its memory are gone
    if evidence.role in (agent_pb2.VM_ROLE_GONE, agent_pb2.VM_ROLE_UNKNOWN):
        return evidence.vmm_state == agent_pb2.VMM_STATE_DEAD
    return (
        evidence.epoch_seen >= row.resume_epoch
        and evidence.role == agent_pb2.VM_ROLE_RESIDENT
        and evidence.vmm_state
        in (
            agent_pb2.VMM_STATE_RUNNING,
            agent_pb2.VMM_STATE_DEAD,
            agent_pb2.VMM_STATE_GUEST_ENDED,
        )
    )
