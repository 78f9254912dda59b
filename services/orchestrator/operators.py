# SPDX-License-Identifier: Apache-2.0
"""What a person can do about a migration that does not go on: recover, abandon, break the glass.

Each asks both nodes first and refuses where their evidence shows that it would double a guest or
lose one that can still be had. docs/runbooks/needs-attention.md is the other half of this file.
"""

from __future__ import annotations

import asyncio
import logging

from godwit.agent.v1 import fault_agent_service_pb2 as agent_pb2

from services.common.auth.identity import signature
from services.common.errors import FailedPreconditionError, InvalidArgumentError
from services.orchestrator.evidence import (
    Evidence,
    Judgement,
    is_complete,
    judge,
    source_memory_is_gone,
)
from services.orchestrator.migration import TERMINAL, LossDeclared, NeverRan, Noted, Phase
from services.orchestrator.move import Context, both
from services.orchestrator.runner import Runner
from services.orchestrator.store.migrations import migration_unknown
from services.orchestrator.store.rows import MigrationRow

log = logging.getLogger(__name__)

RUNBOOK = "see docs/runbooks/needs-attention.md"
OPERATOR_LEN_MAX = 100
BECAUSE_LEN_MAX = 500
_FORCIBLE = (Phase.COMMITTED, Phase.NEEDS_ATTENTION, Phase.GIVING_BACK)


def _refuse(
    row: MigrationRow, reason: str, why: str, hint: str = RUNBOOK
) -> FailedPreconditionError:
    metadata = {"migration_id": row.migration_id, "phase": row.phase}
    return FailedPreconditionError(reason, why, hint=hint, metadata=metadata)


class Operators:
    """Handles RecoverMigration, AbandonMigration and BreakGlass."""

    def __init__(self, context: Context, runner: Runner) -> None:
        self._context = context
        self._runner = runner

    async def recover(self, migration_id: str) -> list[str]:
        """Look anew, go on at once; what was found.

        Raises:
            NotFoundError: MIGRATION_UNKNOWN.
            FailedPreconditionError: ALREADY_ENDED.
        """
        row = await self._row(migration_id)
        source, destination, judgement = await self._look(row)
        await self._runner.look_again(migration_id)
        await self._wait_for_change(row)
        return _findings(row, source, destination, judgement)

    async def abandon(self, migration_id: str, *, epoch: int, confirm: bool) -> None:
        """LOST; whatever is left of the guest is freed.

        Raises:
            NotFoundError: MIGRATION_UNKNOWN.
            FailedPreconditionError: see the proto.
        """
        row = await self._row(migration_id)
        _check_epoch(row, epoch)
        if not confirm:
            raise _refuse(row, "NOT_CONFIRMED", "nothing is given up without --confirm")
        if row.phase is not Phase.NEEDS_ATTENTION:
            raise _refuse(
                row,
                "NOT_STUCK",
                f"migration {migration_id} is {row.phase}: it goes on by itself",
                "before the decision it can be cancelled; past it, let it finish",
            )
        source, destination, judgement = await self._look(row)
        _require_hopeless(row, source, destination, judgement)
        note = LossDeclared(
            reason="ABANDONED",
            message=f"given up by {signature('an operator')} under epoch {epoch} ({row.reason}): "
            + "; ".join((_says(row.source_node, source), _says(row.destination_node, destination))),
            hint=f"start VM {row.vm_id} again from its disk once it is no longer listed",
        )
        await self._context.store.migrations.give_up(row, note, now_ns=self._context.now_ns())
        log.error("migration %s: %s", migration_id, note.message)
        await self._runner.look_again(migration_id)
        self._context.changes.publish(migration_id)

    async def break_glass(
        self, migration_id: str, *, epoch: int, fenced_vm_id: str, operator: str, because: str
    ) -> None:
        """Give the guest back to its source although the destination proves nothing.

        Raises:
            NotFoundError: MIGRATION_UNKNOWN.
            InvalidArgumentError: FIELD_INVALID: who and why must be said.
            FailedPreconditionError: see the proto.
        """
        for name, value, most in (
            ("operator", operator, OPERATOR_LEN_MAX),
            ("because", because, BECAUSE_LEN_MAX),
        ):
            if not 1 <= len(value.strip()) <= most or not value.isprintable():
                raise InvalidArgumentError(
                    "FIELD_INVALID", f"{name} must have 1..{most} characters"
                )
        row = await self._row(migration_id)
        _check_epoch(row, epoch)
        if fenced_vm_id != row.vm_id:
            raise _refuse(
                row,
                "NOT_CONFIRMED",
                f"fence {row.destination_node} first, then confirm with the guest's id {row.vm_id}",
            )
        if row.phase not in _FORCIBLE:
            raise _refuse(row, "NOT_STUCK", f"migration {migration_id} is {row.phase}")
        history = await self._context.store.migrations.transitions([migration_id])
        ran = any(each.phase is Phase.POSTCOPY for each in history[migration_id])
        source, destination, _ = await self._look(row)
        _require_forcible(row, source, destination, ran=ran)
        note = NeverRan(
            reason="GLASS_BROKEN",
            message=f"{signature(operator.strip())} gave the guest back to {row.source_node}"
            f" and says that {row.destination_node} is fenced: {because.strip()}",
        )
        await self._context.store.migrations.enter(
            row, Phase.GIVING_BACK, now_ns=self._context.now_ns(), note=note, by_force=True
        )
        log.error("migration %s: %s", migration_id, note.message)
        await self._runner.look_again(migration_id)
        await self._wait_for_change(row)

    # --- looking ---

    async def _row(self, migration_id: str) -> MigrationRow:
        self._context.doubt.require_none()
        row = await self._context.store.migrations.get(migration_id)
        if row is None:
            raise migration_unknown(migration_id)
        if row.phase in TERMINAL:
            raise _refuse(row, "ALREADY_ENDED", f"migration {migration_id} is {row.phase}", "")
        return row

    async def _look(self, row: MigrationRow) -> tuple[Evidence | None, Evidence | None, Judgement]:
        agents = self._context.agents
        source, destination = await both(
            agents.describe(row.source_node, row.vm_id),
            agents.describe(row.destination_node, row.vm_id),
        )
        last_epoch = await self._context.store.fleet.last_epoch(row.vm_id)
        return source, destination, judge(row, source, destination, last_epoch=last_epoch)

    async def _wait_for_change(self, row: MigrationRow) -> None:
        """A moment, so that the answer already says what came of it."""
        until = asyncio.get_running_loop().time() + self._context.limits.doubt_s
        while asyncio.get_running_loop().time() < until:
            await asyncio.sleep(self._context.limits.retry_s_min)
            present = await self._context.store.migrations.get(row.migration_id)
            if present is None or present.phase is not row.phase:
                return


def _check_epoch(row: MigrationRow, epoch: int) -> None:
    if epoch != row.epoch:
        raise _refuse(
            row,
            "EPOCH_MISMATCH",
            f"migration {row.migration_id} has epoch {row.epoch}, not {epoch}",
            "`godwit migrations show` has the epoch; look again at what you give up",
        )


def _require_hopeless(
    row: MigrationRow,
    source: Evidence | None,
    destination: Evidence | None,
    judgement: Judgement,
) -> None:
    """Refuse to give up what runs, may run, or can still be made to run."""
    if destination is None:
        raise _refuse(
            row,
            "DESTINATION_UNREACHABLE",
            f"{row.destination_node} does not answer and may run the guest",
        )
    if is_complete(row, destination):
        raise _refuse(row, "GUEST_COMPLETE", f"{row.destination_node} has all of the guest", "")
    if isinstance(judgement.event, NeverRan):
        raise _refuse(
            row,
            "GUEST_CAN_GO_BACK",
            f"{row.source_node} can let the guest run on",
            f"godwit recover {row.migration_id}",
        )
    ran = destination.epoch_activating == row.epoch
    dead = destination.vmm_state == agent_pb2.VMM_STATE_DEAD
    if source is None and not (ran and dead):
        raise _refuse(
            row, "SOURCE_UNREACHABLE", f"{row.source_node} does not answer and may have the guest"
        )
    if not dead and source is not None and not source_memory_is_gone(row, source):
        raise _refuse(
            row,
            "DESTINATION_RUNS",
            f"the guest's VMM on {row.destination_node} lives, and {row.source_node} still has "
            "its memory",
        )


def _require_forcible(
    row: MigrationRow, source: Evidence | None, destination: Evidence | None, *, ran: bool
) -> None:
    """Refuse what would take a guest back in time, or what is not there, or needs no force."""
    if ran or (destination is not None and destination.epoch_activating == row.epoch):
        raise _refuse(
            row,
            "GUEST_RAN",
            f"the guest was let run on {row.destination_node}: what {row.source_node} has is older "
            "than what it has done since",
        )
    if destination is not None:
        alive = destination.vmm_state != agent_pb2.VMM_STATE_DEAD
        if alive or destination.epoch_loaded == row.epoch:
            raise _refuse(
                row,
                "NOT_NEEDED",
                f"{row.destination_node} answers: {_says(row.destination_node, destination)}",
                f"godwit recover {row.migration_id}",
            )
    if source is None:
        raise _refuse(row, "SOURCE_UNREACHABLE", f"{row.source_node} does not answer")
    if not source.returnable:
        raise _refuse(row, "GUEST_GONE", f"it cannot be let run: {_says(row.source_node, source)}")


def _says(node: str, evidence: Evidence | None) -> str:
    """One side's evidence in words."""
    if evidence is None:
        return f"{node} does not answer"
    role = agent_pb2.VmRole.Name(evidence.role).removeprefix("VM_ROLE_").lower()
    state = agent_pb2.VmmState.Name(evidence.vmm_state).removeprefix("VMM_STATE_").lower()
    marks = ", ".join(
        f"{name} {epoch}"
        for name, epoch in (
            ("seen", evidence.epoch_seen),
            ("owned", evidence.epoch_owned),
            ("loaded", evidence.epoch_loaded),
            ("activating", evidence.epoch_activating),
            ("memory complete", evidence.epoch_memory_complete),
            ("sealed", evidence.epoch_sealed),
        )
        if epoch
    )
    kept = f", keeps {evidence.retained_bytes} bytes of memory" if evidence.retained_bytes else ""
    whole = ", can let the guest run on" if evidence.returnable else ""
    return f"{node}: {role}, VMM {state}{kept}{whole}; epochs: {marks or 'none'}"


def _findings(
    row: MigrationRow,
    source: Evidence | None,
    destination: Evidence | None,
    judgement: Judgement,
) -> list[str]:
    found = [
        f"source {_says(row.source_node, source)}",
        f"destination {_says(row.destination_node, destination)}",
    ]
    event = judgement.event
    if isinstance(event, Noted):
        found.append(
            f"{event.reason}: {event.message}" + (f" ({event.hint})" if event.hint else "")
        )
    elif event is not None:
        found.append(f"it goes on: {type(event).__name__}")
    elif judgement.reason:
        found.append(f"missing: {judgement.reason}: {judgement.message}")
    else:
        found.append("nothing is missing: it goes on")
    return found
