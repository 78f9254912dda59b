# SPDX-License-Identifier: Apache-2.0
"""The single place that admits commands (I1, I11).

`admit` is sans-IO: it refuses, or returns the record with what the fence adds to it (highest epoch,
migration, decision). The caller makes that durable together with its own first mark, before the
first act; a command that is refused later still leaves its epoch behind.

The same command given again is admitted again: what it then does is the handler's business, who
goes on where it stopped.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, replace

from services.common.errors import FailedPreconditionError, InvalidArgumentError
from services.common.vm_spec import VM_ID_PATTERN
from services.fault_agent.journal import Decision, Record

EPOCH_MAX = 2**63 - 1
MIGRATION_ID_LEN_MAX = 128


class Command(enum.Enum):
    """What changes a VM."""

    START = "StartVm"
    STOP = "StopVm"
    PREPARE_DEPARTURE = "Prepare(departure)"
    PREPARE_ARRIVAL = "Prepare(arrival)"
    PAUSE = "Pause"
    RESUME = "Resume"
    TRANSFER = "TransferDeviceState"
    LOAD = "LoadDeviceState"
    ACTIVATE = "Activate"
    SEAL = "Seal"
    ABORT_SOURCE = "Abort(source)"
    ABORT_DESTINATION = "Abort(destination)"
    RECALL_SOURCE = "Recall(source)"
    RECALL_DESTINATION = "Recall(destination)"
    RELEASE = "Release"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fence:
    """By which right a command is given; godwit.common.v1.Fence."""

    vm_id: str
    epoch: int
    migration_id: str = ""
    decision: Decision = Decision.NONE
    store_incarnation: str = ""
    """Of the store that gives it; see obeyed_store.py."""


_NONE = frozenset({Decision.NONE})
_COMMITTED = frozenset({Decision.COMMITTED})

_ALLOWED: dict[Command, frozenset[Decision]] = {
    Command.START: _NONE,
    Command.STOP: _NONE,
    Command.PREPARE_DEPARTURE: _NONE,
    # COMMITTED: the arrival is to fetch from another page server from now on.
    Command.PREPARE_ARRIVAL: frozenset({Decision.NONE, Decision.COMMITTED}),
    Command.PAUSE: _NONE,
    Command.RESUME: frozenset({Decision.NONE, Decision.ABORTED, Decision.RETURNED}),
    Command.TRANSFER: _NONE,
    Command.LOAD: _NONE,
    Command.ACTIVATE: _COMMITTED,
    Command.SEAL: _COMMITTED,
    Command.ABORT_SOURCE: frozenset({Decision.NONE, Decision.ABORTED}),
    Command.ABORT_DESTINATION: frozenset({Decision.ABORTED}),
    Command.RECALL_SOURCE: _COMMITTED,
    Command.RECALL_DESTINATION: frozenset({Decision.COMMITTED, Decision.RETURNED}),
    Command.RELEASE: frozenset({Decision.COMMITTED, Decision.LOST}),
}

_FOLLOWS = frozenset(
    {
        (Decision.COMMITTED, Decision.RETURNED),
        (Decision.COMMITTED, Decision.LOST),
        (Decision.RETURNED, Decision.LOST),
    }
)
"""What may be told after what of one migration, and then only under an epoch of its own."""


_BEGINS = frozenset(
    {
        Command.PREPARE_DEPARTURE,
        Command.PREPARE_ARRIVAL,
        # An Abort that overtakes its Prepare must be remembered, or the Prepare would be obeyed.
        Command.ABORT_SOURCE,
        Command.ABORT_DESTINATION,
        # The same of a Recall and what it forbids.
        Command.RECALL_DESTINATION,
        # Of a migration that this node had not heard of: the decision is not about the last one.
        Command.RESUME,
    }
)
"""Commands that may be the first that a node hears of a migration."""

_OUTSIDE = frozenset({Command.START, Command.STOP})


def check_fields(fence: Fence, command: Command) -> None:
    """Refuse a fence that no store writes.

    Raises:
        InvalidArgumentError: FIELD_INVALID, naming the field.
    """
    if not re.fullmatch(VM_ID_PATTERN, fence.vm_id):
        raise _field("vm_id", f"must match {VM_ID_PATTERN}", fence.vm_id)
    if not 1 <= fence.epoch <= EPOCH_MAX:
        raise _field("epoch", f"must be 1..{EPOCH_MAX}", fence.epoch)
    if len(fence.migration_id) > MIGRATION_ID_LEN_MAX:
        raise _field("migration_id", f"has at most {MIGRATION_ID_LEN_MAX} characters", "...")
    if command in _OUTSIDE and fence.migration_id:
        raise _field("migration_id", f"must be empty for {command.value}", fence.migration_id)
    if command not in _OUTSIDE and command is not Command.RESUME and not fence.migration_id:
        raise _field("migration_id", f"must be set for {command.value}", "")
    if fence.decision is not Decision.NONE and not fence.migration_id:
        raise _field("migration_id", f"must say what was {fence.decision.value}", "")


def _field(name: str, must: str, value: object) -> InvalidArgumentError:
    return InvalidArgumentError("FIELD_INVALID", f"fence.{name} {must}, got {value!r}")


def admit(record: Record, fence: Fence, command: Command) -> Record:
    """The record with the fence in it.

    Raises:
        InvalidArgumentError: FIELD_INVALID.
        FailedPreconditionError: STALE_EPOCH, DECISION_MISSING, DECISION_CONFLICT, WRONG_STATE.
    """
    check_fields(fence, command)
    if fence.epoch < record.epoch_seen:
        raise FailedPreconditionError(
            "STALE_EPOCH",
            f"{command.value} of {fence.vm_id} has epoch {fence.epoch},"
            f" {record.epoch_seen} was seen",
            hint="somebody newer commands this VM; read the store again",
            metadata={"epoch": str(fence.epoch), "epoch_seen": str(record.epoch_seen)},
        )
    _check_decision(record, fence, command)
    _check_migration(record, fence, command)
    begins = command in _BEGINS and fence.migration_id not in ("", record.migration_id)
    decision = Decision.NONE if begins else record.decision
    return replace(
        record,
        epoch_seen=fence.epoch,
        migration_id=fence.migration_id if begins else record.migration_id,
        decision=decision if fence.decision is Decision.NONE else fence.decision,
    )


def _check_decision(record: Record, fence: Fence, command: Command) -> None:
    allowed = _ALLOWED[command]
    if fence.decision not in allowed:
        missing = fence.decision is Decision.NONE
        raise FailedPreconditionError(
            "DECISION_MISSING" if missing else "DECISION_CONFLICT",
            f"{command.value} needs {' or '.join(sorted(allowed))}, got {fence.decision.value}",
        )
    same = bool(fence.migration_id) and fence.migration_id == record.migration_id
    if (
        same
        and record.decision is not Decision.NONE
        and fence.decision is not record.decision
        and not _follows(record, fence)
    ):
        raise FailedPreconditionError(
            "DECISION_CONFLICT",
            f"migration {fence.migration_id} is {record.decision.value} here,"
            f" {command.value} says {fence.decision.value}",
            hint="a command from before the decision, or a store that has forgotten it",
            metadata={"decision": record.decision.value},
        )


def _follows(record: Record, fence: Fence) -> bool:
    fresh = fence.epoch > max(record.epoch_departing, record.epoch_prepared)
    return fresh and (record.decision, fence.decision) in _FOLLOWS


def _check_migration(record: Record, fence: Fence, command: Command) -> None:
    if fence.migration_id == record.migration_id:
        return
    if record.migrating:
        raise wrong_state(
            record,
            command,
            f"migration {record.migration_id} is under way, not {fence.migration_id or 'none'}",
        )
    if fence.migration_id and record.migration_id and fence.epoch == record.epoch_seen:
        raise wrong_state(
            record, command, f"epoch {fence.epoch} belongs to migration {record.migration_id}"
        )
    if fence.migration_id and command not in _BEGINS:
        raise wrong_state(record, command, f"migration {fence.migration_id} is not known here")


def wrong_state(record: Record, command: Command, why: str) -> FailedPreconditionError:
    """The refusal of a command that the journal forbids."""
    return FailedPreconditionError(
        "WRONG_STATE",
        f"{command.value} of {record.vm_id} ({record.role.value}): {why}",
        hint="Describe shows what this node can prove",
        metadata={"role": record.role.value},
    )
