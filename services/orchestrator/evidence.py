# SPDX-License-Identifier: Apache-2.0
"""What both nodes' evidence means for a migration: the table that decides on doubt.

A reply that was lost, or a phase found by a new orchestrator, says nothing about what the agents
did. Both are asked `Describe`; `judge` is a pure function of the stored row and of what they could
prove. An agent that cannot be asked is None: it proves nothing, so nothing irreversible follows
from it (I8, fail closed).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from godwit.agent.v1 import fault_agent_service_pb2 as agent_pb2
from godwit.common.v1 import common_pb2

from services.orchestrator.migration import (
    AWAITING,
    Activated,
    Decision,
    Event,
    GuestEnded,
    MemoryComplete,
    NeverRan,
    Phase,
    StateLoaded,
    StepFailed,
    Stuck,
)
from services.orchestrator.store.rows import MigrationRow

Evidence = agent_pb2.Evidence

_NOT_HERE = frozenset(
    {agent_pb2.VM_ROLE_UNKNOWN, agent_pb2.VM_ROLE_GONE, agent_pb2.VM_ROLE_UNSPECIFIED}
)
_RUNS = frozenset({agent_pb2.VMM_STATE_RUNNING})
_OVER = frozenset({agent_pb2.VMM_STATE_DEAD, agent_pb2.VMM_STATE_GUEST_ENDED})


_TOLD_FIRST = {
    common_pb2.DECISION_COMMITTED: (),
    common_pb2.DECISION_ABORTED: (),
    common_pb2.DECISION_RETURNED: (common_pb2.DECISION_COMMITTED,),
    common_pb2.DECISION_LOST: (common_pb2.DECISION_COMMITTED, common_pb2.DECISION_RETURNED),
}
"""What a node may have been told before it, of the same migration."""


class Verdict(Enum):
    """What to do next."""

    PERFORM = "perform"
    """Do what the phase does: its commands are idempotent, and nothing forbids them."""
    WAIT = "wait"
    """Ask again: somebody who is needed does not answer, or does not know."""
    FREEZE = "freeze"
    """An agent knows more than the store (I2): no decision until a person has looked."""
    EVENT = "event"
    """It has happened already: `Judgement.event`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What the evidence says."""

    verdict: Verdict
    event: Event | None = None
    """What happened, where `verdict` is EVENT."""
    reason: str = ""
    """What is waited for, where `verdict` is WAIT or FREEZE."""
    message: str = ""
    invariants: tuple[str, ...] = ()
    """Invariants that the evidence shows to be broken."""


def holds_nothing(evidence: Evidence) -> bool:
    """True if the node proves that it has nothing of the VM: no record that counts, no process."""
    return evidence.role in _NOT_HERE and evidence.vmm_state == agent_pb2.VMM_STATE_DEAD


def is_activated(row: MigrationRow, destination: Evidence) -> bool:
    """True if the guest runs, or ran, at the destination under this migration's epoch."""
    return (
        row.epoch > 0
        and destination.epoch_activating == row.epoch
        and destination.vmm_state in (*_RUNS, agent_pb2.VMM_STATE_GUEST_ENDED)
    )


def is_complete(row: MigrationRow, destination: Evidence) -> bool:
    """True if MEMORY_COMPLETE(epoch) is durable: the source's memory is not needed any more."""
    return row.epoch > 0 and (
        destination.epoch_memory_complete == row.epoch
        # The arrival's bookkeeping was ended already: that takes completion.
        or (destination.role == agent_pb2.VM_ROLE_RESIDENT and destination.epoch_owned == row.epoch)
    )


def is_loaded(row: MigrationRow, destination: Evidence) -> bool:
    """True if the destination has the device state, and its VMM stands ready to run it."""
    return (
        row.epoch > 0
        and destination.epoch_loaded == row.epoch
        and destination.role == agent_pb2.VM_ROLE_ARRIVING
        and destination.vmm_state in (agent_pb2.VMM_STATE_PAUSED, agent_pb2.VMM_STATE_INCOMING)
    )


def is_sealed(row: MigrationRow, source: Evidence) -> bool:
    """True if the source has written SEALED(epoch), or a later one."""
    return row.epoch > 0 and source.epoch_sealed >= row.epoch


def wire_decision(row: MigrationRow) -> common_pb2.Decision.ValueType:
    """What the store says of the migration, as agents are told it."""
    if row.decision is Decision.ABORTED:
        return common_pb2.DECISION_ABORTED
    if row.decision is None:
        return common_pb2.DECISION_UNSPECIFIED
    if row.phase is Phase.LOST:
        return common_pb2.DECISION_LOST
    return common_pb2.DECISION_RETURNED if row.given_back else common_pb2.DECISION_COMMITTED


def never_ran(row: MigrationRow, destination: Evidence) -> bool:
    """True if the destination proves that `cont` was never attempted, and that its VMM is dead.

    LOADED(epoch) must be there: it was durable before COMMITTED could be written, so a journal
    without it is not the one that would have ACTIVATING (I5). After another boot the VMM is dead.
    """
    return (
        row.epoch > 0
        and destination.epoch_loaded == row.epoch
        and destination.epoch_activating != row.epoch
        and destination.vmm_state == agent_pb2.VMM_STATE_DEAD
    )


def source_memory_is_gone(row: MigrationRow, source: Evidence) -> bool:
    """True if it is proved that the source's memory cannot be fetched any more: not a time-out.

    Another boot id: tmpfs and processes did not survive. GONE or UNKNOWN without retained memory:
    the journal says that it was freed, or that there never was any.
    """
    if row.source_boot_id and source.boot_id and source.boot_id != row.source_boot_id:
        return True
    return source.role in _NOT_HERE and source.retained_bytes == 0


def judge(
    row: MigrationRow,
    source: Evidence | None,
    destination: Evidence | None,
    *,
    last_epoch: int,
) -> Judgement:
    """Judge a migration in `row.phase`.

    `last_epoch` is the highest that the store has issued for the VM.
    """
    for evidence in (source, destination):
        if evidence and evidence.epoch_seen > last_epoch:
            return Judgement(
                verdict=Verdict.FREEZE,
                reason="STORE_BEHIND",
                message=f"node {evidence.node} has seen epoch {evidence.epoch_seen}, "
                f"the store has issued {last_epoch}",
            )
        if evidence and (told := _told_otherwise(row, evidence)):
            return Judgement(
                verdict=Verdict.FREEZE,
                reason="STORE_BEHIND",
                message=f"node {evidence.node} was told {told} for migration {row.migration_id}, "
                f"the store says {row.decision or 'undecided'}",
            )
    if row.phase is Phase.READY and destination and _shell_is_gone(row, destination):
        # Found out before the guest is paused for nothing.
        return _failed("DESTINATION_GONE", f"the shell on {row.destination_node} is gone")
    if row.phase is Phase.SWITCHOVER:
        return _switchover(row, source, destination)
    if row.phase is Phase.COMMITTED:
        return _committed(row, source, destination)
    if row.phase in AWAITING:
        return _awaiting(row, source, destination)
    if row.phase is Phase.FINALIZING:
        return _finalizing(row, destination)
    if row.phase in (Phase.GIVING_BACK, Phase.GIVEN_BACK):
        return _returning(row, destination)
    if row.phase is Phase.ABORTED:
        invariants = ("I1",) if destination and _ran(row, destination) else ()
        return Judgement(verdict=Verdict.PERFORM, invariants=invariants)
    # Before SWITCHOVER the guest has not been touched; undoing starts with the decision. Neither
    # needs evidence to go on.
    return Judgement(verdict=Verdict.PERFORM)


def _told_otherwise(row: MigrationRow, evidence: Evidence) -> str:
    """The decision that the node was told for this migration, if the store does not have it."""
    told, known = evidence.decision, wire_decision(row)
    if not told or evidence.migration_id != row.migration_id or told == known:
        return ""
    if told in _TOLD_FIRST.get(known, ()):
        return ""
    return common_pb2.Decision.Name(told)


def _failed(reason: str, message: str, *invariants: str) -> Judgement:
    return Judgement(
        verdict=Verdict.EVENT,
        event=StepFailed(reason=reason, message=message),
        invariants=invariants,
    )


def _wait(reason: str, message: str, *invariants: str) -> Judgement:
    return Judgement(verdict=Verdict.WAIT, reason=reason, message=message, invariants=invariants)


def _switchover(
    row: MigrationRow, source: Evidence | None, destination: Evidence | None
) -> Judgement:
    invariants = ("I1",) if destination and _ran(row, destination) else ()
    if source and source.vmm_state == agent_pb2.VMM_STATE_DEAD:
        return _failed("SOURCE_VMM_DEAD", f"the VMM on {row.source_node} is gone", *invariants)
    if source and source.vmm_state == agent_pb2.VMM_STATE_GUEST_ENDED:
        return _failed("GUEST_ENDED", "the guest has shut itself down", *invariants)
    if destination and _shell_is_gone(row, destination):
        return _failed(
            "DESTINATION_GONE", f"the shell on {row.destination_node} is gone", *invariants
        )
    if source is None:
        return _wait("SOURCE_UNREACHABLE", f"{row.source_node} does not answer", *invariants)
    if destination is None:
        return _wait(
            "DESTINATION_UNREACHABLE", f"{row.destination_node} does not answer", *invariants
        )
    loaded = is_loaded(row, destination)
    if source.vmm_state in _RUNS:
        if destination.epoch_loaded == row.epoch:
            # What was loaded is older than what the guest has done since. Never commit that.
            return _failed(
                "STATE_STALE", "the source runs although its state was loaded", "I1", *invariants
            )
        return Judgement(verdict=Verdict.PERFORM, invariants=invariants)
    if source.vmm_state != agent_pb2.VMM_STATE_PAUSED:
        return _wait(
            "SOURCE_UNRESPONSIVE", f"the VMM on {row.source_node} does not say", *invariants
        )
    if loaded:
        return Judgement(verdict=Verdict.EVENT, event=StateLoaded(), invariants=invariants)
    return Judgement(verdict=Verdict.PERFORM, invariants=invariants)


def _committed(
    row: MigrationRow, source: Evidence | None, destination: Evidence | None
) -> Judgement:
    # The source may not run after the decision: it was paused before it.
    invariants = ("I5",) if source and source.vmm_state in _RUNS else ()
    if destination is None:
        return _wait(
            "DESTINATION_UNREACHABLE", f"{row.destination_node} does not answer", *invariants
        )
    if is_activated(row, destination):
        return Judgement(verdict=Verdict.EVENT, event=Activated(), invariants=invariants)
    if destination.vmm_state == agent_pb2.VMM_STATE_DEAD:
        return _destination_dead(row, source, destination, invariants)
    return Judgement(verdict=Verdict.PERFORM, invariants=invariants)


def _destination_dead(
    row: MigrationRow,
    source: Evidence | None,
    destination: Evidence,
    invariants: tuple[str, ...],
) -> Judgement:
    """What becomes of a guest whose destination's VMM is dead, and who can have it."""
    if destination.epoch_activating == row.epoch:
        return _stuck_destination(row, invariants)
    if not never_ran(row, destination):
        return _stuck(
            "DESTINATION_JOURNAL_LOST",
            f"the journal on {row.destination_node} has no LOADED for epoch {row.epoch} any more: "
            "nothing proves that the guest never ran there",
            "restore that node's journal; or prove by hand that the guest never ran there, fence "
            "the node, and use break-glass",
            invariants,
        )
    if source is None:
        return _wait("SOURCE_UNREACHABLE", f"{row.source_node} does not answer", *invariants)
    if not source.returnable:
        return _stuck(
            "GUEST_GONE",
            f"the guest never ran on {row.destination_node}, and {row.source_node} cannot let it "
            "run on: it has no paused VMM of it, and not both its memory and its device state",
            "start it again from its disk once the migration is abandoned",
            invariants,
        )
    return Judgement(
        verdict=Verdict.EVENT,
        event=NeverRan(
            reason="DESTINATION_GONE_BEFORE_ACTIVATION",
            message=f"the VMM on {row.destination_node} is gone and was never let run; "
            f"{row.source_node} keeps the whole guest and gets it back",
        ),
        invariants=invariants,
    )


def _returning(row: MigrationRow, destination: Evidence | None) -> Judgement:
    """Nothing but the destination's own word that it did run the guest can stop a return."""
    ran = destination is not None and destination.epoch_activating == row.epoch
    if not ran or row.by_force:
        invariants = ("I5",) if ran else ()
        return Judgement(verdict=Verdict.PERFORM, invariants=invariants)
    if row.given_back:
        return Judgement(verdict=Verdict.PERFORM, invariants=("I5",))
    return _stuck_destination(row, ())


def _stuck(reason: str, message: str, hint: str, invariants: tuple[str, ...]) -> Judgement:
    return Judgement(
        verdict=Verdict.EVENT,
        event=Stuck(reason=reason, message=message, hint=hint),
        invariants=invariants,
    )


def _stuck_destination(row: MigrationRow, invariants: tuple[str, ...]) -> Judgement:
    return Judgement(
        verdict=Verdict.EVENT,
        event=Stuck(
            reason="DESTINATION_VMM_DEAD",
            message=f"the VMM on {row.destination_node} is gone after it was let run; "
            f"{row.source_node} keeps the memory as it was at the pause",
            hint="the guest's state since the move is lost; start it again from its disk, then "
            "release the source's memory",
        ),
        invariants=invariants,
    )


def _awaiting(
    row: MigrationRow, source: Evidence | None, destination: Evidence | None
) -> Judgement:
    invariants = ("I5",) if source and source.vmm_state in _RUNS else ()
    complete = destination is not None and is_complete(row, destination)
    if destination and complete:
        return Judgement(verdict=Verdict.EVENT, event=MemoryComplete(), invariants=invariants)
    if destination and destination.vmm_state == agent_pb2.VMM_STATE_GUEST_ENDED:
        return Judgement(
            verdict=Verdict.EVENT,
            event=GuestEnded(reason="GUEST_ENDED", message="the guest has shut itself down"),
            invariants=invariants,
        )
    if destination and (
        destination.vmm_state == agent_pb2.VMM_STATE_DEAD or destination.role in _NOT_HERE
    ):
        if row.phase is Phase.NEEDS_ATTENTION and destination.epoch_activating != row.epoch:
            return _destination_dead(row, source, destination, invariants)
        return _stuck_destination(row, invariants)
    if source and source_memory_is_gone(row, source):
        return Judgement(
            verdict=Verdict.EVENT,
            event=Stuck(
                reason="SOURCE_MEMORY_GONE",
                message=f"{row.source_node} does not have the guest's memory any more; "
                "pages that are absent cannot be fetched, the guest waits on them",
                hint="the userfault bitmap says which pages are missing",
            ),
            invariants=invariants,
        )
    if destination is None:
        return _wait(
            "DESTINATION_UNREACHABLE", f"{row.destination_node} does not answer", *invariants
        )
    return Judgement(verdict=Verdict.PERFORM, invariants=invariants)


def _finalizing(row: MigrationRow, destination: Evidence | None) -> Judgement:
    if row.guest_ended:
        return Judgement(verdict=Verdict.PERFORM)
    if destination is None:
        return _wait("DESTINATION_UNREACHABLE", f"{row.destination_node} does not answer")
    if is_complete(row, destination):
        return Judgement(verdict=Verdict.PERFORM)
    # The phase was entered on this very proof. A journal that forgot it cannot free the source.
    return Judgement(
        verdict=Verdict.EVENT,
        event=Stuck(
            reason="COMPLETION_FORGOTTEN",
            message=f"{row.destination_node} has no MEMORY_COMPLETE for epoch {row.epoch} any more",
            hint="the source keeps the memory; compare both journals",
        ),
        invariants=("I3",),
    )


def _shell_is_gone(row: MigrationRow, destination: Evidence) -> bool:
    return (
        destination.role in _NOT_HERE
        or destination.vmm_state in _OVER
        or destination.epoch_prepared != row.epoch
    )


def _ran(row: MigrationRow, destination: Evidence) -> bool:
    """True if the destination shows this migration's guest running, or about to."""
    return destination.epoch_activating == row.epoch > 0 or (
        destination.vmm_state in _RUNS and destination.epoch_prepared == row.epoch > 0
    )
