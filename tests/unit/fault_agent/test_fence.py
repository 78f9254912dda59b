# SPDX-License-Identifier: Apache-2.0
"""Promise (I1, I11): an agent obeys the highest epoch it has seen, one migration, one decision."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import GodwitError, InvalidArgumentError
from services.fault_agent.fence import _ALLOWED, _FOLLOWS, Command, Fence, admit
from services.fault_agent.journal import MIGRATING, Decision, Record, Role

RETURNED = Decision.RETURNED
NONE, COMMITTED, ABORTED = Decision.NONE, Decision.COMMITTED, Decision.ABORTED


def record(role: Role = Role.DEPARTING, **fields: object) -> Record:
    values: dict[str, object] = {"epoch_seen": 7, "migration_id": "m7", **fields}
    return replace(Record(vm_id="web-1", boot_id="b", role=role), **values)  # type: ignore[arg-type]


def fence(epoch: int = 7, migration_id: str = "m7", decision: Decision = NONE) -> Fence:
    return Fence(vm_id="web-1", epoch=epoch, migration_id=migration_id, decision=decision)


@pytest.mark.parametrize(
    ("before", "given_fence", "command", "reason"),
    [
        (record(), fence(epoch=6), Command.PAUSE, "STALE_EPOCH"),
        (record(), fence(epoch=6, decision=COMMITTED), Command.SEAL, "STALE_EPOCH"),
        (record(), fence(), Command.SEAL, "DECISION_MISSING"),
        (record(), fence(), Command.RELEASE, "DECISION_MISSING"),
        (record(Role.ARRIVING), fence(), Command.ACTIVATE, "DECISION_MISSING"),
        (record(Role.ARRIVING), fence(), Command.ABORT_DESTINATION, "DECISION_MISSING"),
        (record(), fence(decision=ABORTED), Command.SEAL, "DECISION_CONFLICT"),
        (record(), fence(decision=COMMITTED), Command.PAUSE, "DECISION_CONFLICT"),
        (record(), fence(epoch=8, decision=COMMITTED), Command.RESUME, "DECISION_CONFLICT"),
        # The decision is told once and never changes.
        (record(decision=ABORTED), fence(decision=COMMITTED), Command.SEAL, "DECISION_CONFLICT"),
        (
            record(Role.SEALED, decision=COMMITTED),
            fence(epoch=8, decision=ABORTED),
            Command.RESUME,
            "DECISION_CONFLICT",
        ),
        # Given back: under an epoch of its own, once, and never undone.
        (
            record(Role.SEALED, decision=COMMITTED, epoch_departing=7),
            fence(decision=RETURNED),
            Command.RESUME,
            "DECISION_CONFLICT",
        ),
        (
            record(Role.SEALED, decision=RETURNED, epoch_departing=7),
            fence(epoch=8, decision=COMMITTED),
            Command.RECALL_SOURCE,
            "DECISION_CONFLICT",
        ),
        (
            record(decision=ABORTED, epoch_departing=7),
            fence(epoch=8, decision=RETURNED),
            Command.RESUME,
            "DECISION_CONFLICT",
        ),
        (
            record(Role.ARRIVING, epoch_prepared=6, epoch_seen=8, decision=COMMITTED),
            fence(decision=COMMITTED),
            Command.ACTIVATE,
            "STALE_EPOCH",
        ),
        # What was sent before the decision and comes after it.
        (record(decision=ABORTED), fence(), Command.TRANSFER, "DECISION_CONFLICT"),
        (
            record(Role.UNKNOWN, decision=ABORTED),
            fence(),
            Command.PREPARE_ARRIVAL,
            "DECISION_CONFLICT",
        ),
        # Another migration.
        (record(), fence(epoch=8, migration_id="m8"), Command.PREPARE_DEPARTURE, "WRONG_STATE"),
        (record(Role.ARRIVED), fence(epoch=8, migration_id=""), Command.STOP, "WRONG_STATE"),
        (record(Role.RESIDENT), fence(migration_id="m8"), Command.PREPARE_DEPARTURE, "WRONG_STATE"),
        (record(Role.RESIDENT), fence(epoch=8, migration_id="m8"), Command.PAUSE, "WRONG_STATE"),
    ],
)
def test_refused(before: Record, given_fence: Fence, command: Command, reason: str) -> None:
    with pytest.raises(GodwitError) as refusal:
        admit(before, given_fence, command)
    assert refusal.value.reason == reason


@pytest.mark.parametrize(
    ("before", "given_fence", "command", "after"),
    [
        (record(), fence(), Command.PAUSE, record()),
        (record(), fence(decision=COMMITTED), Command.SEAL, record(decision=COMMITTED)),
        (
            record(),
            fence(epoch=8, decision=ABORTED),
            Command.RESUME,
            record(epoch_seen=8, decision=ABORTED),
        ),
        # A new migration forgets the old one's decision.
        (
            record(Role.RESIDENT, decision=ABORTED),
            fence(epoch=8, migration_id="m8"),
            Command.PREPARE_DEPARTURE,
            record(Role.RESIDENT, epoch_seen=8, migration_id="m8"),
        ),
        # An Abort that comes before its Prepare.
        (
            Record(vm_id="web-1", boot_id="b"),
            fence(decision=ABORTED),
            Command.ABORT_DESTINATION,
            record(Role.UNKNOWN, decision=ABORTED),
        ),
        # Stopped under the epoch that the last migration gave it.
        (
            record(Role.RESIDENT, decision=COMMITTED),
            fence(migration_id=""),
            Command.STOP,
            record(Role.RESIDENT, decision=COMMITTED),
        ),
    ],
)
def test_admitted(before: Record, given_fence: Fence, command: Command, after: Record) -> None:
    assert admit(before, given_fence, command) == after
    # Given again it is admitted again, and changes nothing more.
    assert admit(after, given_fence, command) == after


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"vm_id": ""}, "vm_id"),
        ({"vm_id": "../etc"}, "vm_id"),
        ({"vm_id": "A"}, "vm_id"),
        ({"epoch": 0}, "epoch"),
        ({"epoch": 2**63}, "epoch"),
        ({"migration_id": ""}, "migration_id"),
        ({"migration_id": "m" * 129}, "migration_id"),
    ],
)
def test_malformed(change: dict[str, object], field: str) -> None:
    wrong = replace(fence(), **change)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match=field) as refusal:
        admit(record(), wrong, Command.PAUSE)
    assert refusal.value.reason == "FIELD_INVALID"


REASONS = {
    "FIELD_INVALID",
    "STALE_EPOCH",
    "DECISION_MISSING",
    "DECISION_CONFLICT",
    "WRONG_STATE",
}

_FENCES = st.builds(
    fence,
    epoch=st.integers(1, 12),
    migration_id=st.sampled_from(["", "m7", "m8"]),
    decision=st.sampled_from(Decision),
)
_RECORDS = st.builds(
    record,
    role=st.sampled_from(Role),
    epoch_seen=st.integers(0, 12),
    migration_id=st.sampled_from(["", "m7", "m8"]),
    decision=st.sampled_from(Decision),
)


@given(before=_RECORDS, given_fence=_FENCES, command=st.sampled_from(Command))
def test_over_the_whole_product(before: Record, given_fence: Fence, command: Command) -> None:
    """Nothing admitted lowers an epoch, leaves a migration under way, or turns a decision round."""
    reason, after = "", None
    try:
        after = admit(before, given_fence, command)
    except GodwitError as error:
        reason = error.reason
    if after is None:
        assert reason in REASONS
        return
    assert after.epoch_seen == given_fence.epoch >= before.epoch_seen
    assert given_fence.decision in _ALLOWED[command]
    if before.role in MIGRATING:
        assert after.migration_id == before.migration_id
    if after.migration_id == before.migration_id and before.decision is not NONE:
        turned = (before.decision, after.decision)
        assert after.decision is before.decision or turned in _FOLLOWS
        if turned[0] is not turned[1]:
            assert given_fence.epoch > max(before.epoch_departing, before.epoch_prepared)
    # The fence touches its own fields and no others.
    fields = {"epoch_seen": 0, "migration_id": "", "decision": NONE}
    assert replace(after, **fields) == replace(before, **fields)  # type: ignore[arg-type]
