# SPDX-License-Identifier: Apache-2.0
"""The evidence table, row by row: what both sides can prove, and what follows."""

from __future__ import annotations

from typing import Any

import pytest
from godwit.agent.v1 import fault_agent_service_pb2 as pb
from godwit.common.v1 import common_pb2
from hypothesis import given
from hypothesis import strategies as st

from services.orchestrator.evidence import (
    Evidence,
    Judgement,
    Verdict,
    is_complete,
    judge,
    source_memory_is_gone,
)
from services.orchestrator.migration import (
    AWAITING,
    PAST_COMMIT,
    TERMINAL,
    UNDECIDED,
    UNRUN,
    Activated,
    Event,
    GuestEnded,
    Kind,
    MemoryComplete,
    NeverRan,
    Noted,
    Phase,
    StateLoaded,
    StepFailed,
    Stuck,
    handle,
)
from tests.harness.rows import EPOCH, RETURN_EPOCH, SOURCE_BOOT, SOURCE_EPOCH, migration_row

RUNNING, PAUSED, DEAD = pb.VMM_STATE_RUNNING, pb.VMM_STATE_PAUSED, pb.VMM_STATE_DEAD
INCOMING, ENDED = pb.VMM_STATE_INCOMING, pb.VMM_STATE_GUEST_ENDED
UNRESPONSIVE = pb.VMM_STATE_UNRESPONSIVE


def source(
    vmm: pb.VmmState.ValueType = RUNNING,
    role: pb.VmRole.ValueType = pb.VM_ROLE_DEPARTING,
    **fields: Any,
) -> Evidence:
    """Node a, which the guest leaves."""
    values: dict[str, Any] = {
        "epoch_seen": EPOCH,
        "epoch_owned": SOURCE_EPOCH,
        "boot_id": SOURCE_BOOT,
    }
    values |= fields
    return Evidence(vm_id="vm-1", node="a", role=role, vmm_state=vmm, **values)


def destination(
    vmm: pb.VmmState.ValueType = PAUSED,
    role: pb.VmRole.ValueType = pb.VM_ROLE_ARRIVING,
    **fields: Any,
) -> Evidence:
    """Node b, where it arrives."""
    values: dict[str, Any] = {
        "epoch_seen": EPOCH,
        "epoch_prepared": EPOCH,
        "boot_id": "boot-b",
    }
    values |= fields
    return Evidence(vm_id="vm-1", node="b", role=role, vmm_state=vmm, **values)


def loaded(vmm: pb.VmmState.ValueType = PAUSED, **fields: Any) -> Evidence:
    """The destination with the device state in it."""
    return destination(vmm, **({"epoch_loaded": EPOCH} | fields))


def arrived(vmm: pb.VmmState.ValueType = RUNNING, **fields: Any) -> Evidence:
    """The destination once it was activated."""
    values = {"epoch_activating": EPOCH, "epoch_owned": EPOCH, "epoch_loaded": EPOCH} | fields
    return destination(vmm, pb.VM_ROLE_ARRIVED, **values)


def sealed(**fields: Any) -> Evidence:
    """The source once it was sealed."""
    return source(
        DEAD, pb.VM_ROLE_SEALED, **({"epoch_sealed": EPOCH, "retained_bytes": 4096} | fields)
    )


def whole() -> Evidence:
    """The source, paused, with all of its guest."""
    return source(PAUSED, returnable=True)


def gone() -> Evidence:
    """The destination once it was recalled."""
    return loaded(DEAD, role=pb.VM_ROLE_GONE, epoch_seen=RETURN_EPOCH)


def look(
    phase: Phase, at_source: Evidence | None, at_destination: Evidence | None, **fields: Any
) -> Judgement:
    row = migration_row(phase, **fields)
    return judge(row, at_source, at_destination, last_epoch=RETURN_EPOCH)


Case = tuple[str, Phase, Evidence | None, Evidence | None, Verdict | type[Event], str]
SWITCHOVER, COMMITTED, POSTCOPY = Phase.SWITCHOVER, Phase.COMMITTED, Phase.POSTCOPY

CASES: list[Case] = [
    # The table of ORCHESTRATION 5.2 as DESIGN 4 amends it: name, phase, source, destination,
    # verdict or event, invariant that is seen to be broken.
    ("before the pause", SWITCHOVER, source(), destination(INCOMING), Verdict.PERFORM, ""),
    ("paused, not loaded", SWITCHOVER, source(PAUSED), destination(), Verdict.PERFORM, ""),
    ("paused, loaded", SWITCHOVER, source(PAUSED), loaded(), StateLoaded, ""),
    ("paused, loaded incoming", SWITCHOVER, source(PAUSED), loaded(INCOMING), StateLoaded, ""),
    ("source unreachable", SWITCHOVER, None, loaded(), Verdict.WAIT, ""),
    ("destination unreachable", SWITCHOVER, source(PAUSED), None, Verdict.WAIT, ""),
    ("both unreachable", SWITCHOVER, None, None, Verdict.WAIT, ""),
    ("source silent", SWITCHOVER, source(UNRESPONSIVE), loaded(), Verdict.WAIT, ""),
    ("destination silent", SWITCHOVER, source(PAUSED), loaded(UNRESPONSIVE), Verdict.PERFORM, ""),
    ("source VMM dead", SWITCHOVER, source(DEAD), loaded(), StepFailed, ""),
    ("guest ended at source", SWITCHOVER, source(ENDED), destination(), StepFailed, ""),
    ("shell dead", SWITCHOVER, source(PAUSED), destination(DEAD), StepFailed, ""),
    ("shell dead, source gone", SWITCHOVER, None, destination(DEAD), StepFailed, ""),
    (
        "journal of the destination lost",
        SWITCHOVER,
        source(PAUSED),
        destination(DEAD, pb.VM_ROLE_UNKNOWN, epoch_prepared=0),
        StepFailed,
        "",
    ),
    (
        "shell of another epoch",
        SWITCHOVER,
        source(PAUSED),
        destination(epoch_prepared=EPOCH - 1),
        StepFailed,
        "",
    ),
    ("loaded, but the source runs", SWITCHOVER, source(RUNNING), loaded(), StepFailed, "I1"),
    (
        "destination runs undecided",
        SWITCHOVER,
        source(PAUSED),
        loaded(RUNNING, epoch_activating=EPOCH),
        Verdict.PERFORM,
        "I1",
    ),
    ("shell gone before the pause", Phase.READY, source(), destination(DEAD), StepFailed, ""),
    ("ready", Phase.READY, source(), destination(INCOMING), Verdict.PERFORM, ""),
    ("ready, silent", Phase.READY, None, None, Verdict.PERFORM, ""),
    ("committed, not activated", COMMITTED, source(PAUSED), loaded(), Verdict.PERFORM, ""),
    ("committed, sealed", COMMITTED, sealed(), loaded(), Verdict.PERFORM, ""),
    ("committed, runs", COMMITTED, source(PAUSED), arrived(), Activated, ""),
    ("committed, runs, source silent", COMMITTED, None, arrived(), Activated, ""),
    ("committed, ran and ended", COMMITTED, sealed(), arrived(ENDED), Activated, ""),
    ("committed, destination unreachable", COMMITTED, sealed(), None, Verdict.WAIT, ""),
    ("committed, source runs", COMMITTED, source(RUNNING), loaded(), Verdict.PERFORM, "I5"),
    ("committed, unrun, source whole", COMMITTED, whole(), loaded(DEAD), NeverRan, ""),
    (
        "committed, unrun, kept whole",
        COMMITTED,
        sealed(returnable=True),
        loaded(DEAD),
        NeverRan,
        "",
    ),
    ("committed, unrun, seal was last", COMMITTED, sealed(), loaded(DEAD), Stuck, ""),
    ("committed, unrun, source silent", COMMITTED, None, loaded(DEAD), Verdict.WAIT, ""),
    (
        "committed, destination rebooted unrun",
        COMMITTED,
        whole(),
        loaded(DEAD, boot_id="boot-b2"),
        NeverRan,
        "",
    ),
    (
        "committed, the journal of the destination lost",
        COMMITTED,
        whole(),
        destination(DEAD, pb.VM_ROLE_UNKNOWN, epoch_prepared=0),
        Stuck,
        "",
    ),
    ("attention, unrun after all", Phase.NEEDS_ATTENTION, whole(), loaded(DEAD), NeverRan, ""),
    ("attention, it ran", Phase.NEEDS_ATTENTION, whole(), arrived(DEAD), Stuck, ""),
    ("giving back", Phase.GIVING_BACK, whole(), gone(), Verdict.PERFORM, ""),
    ("giving back, silence", Phase.GIVING_BACK, None, None, Verdict.PERFORM, ""),
    ("giving back, it ran after all", Phase.GIVING_BACK, whole(), arrived(DEAD), Stuck, ""),
    ("given back", Phase.GIVEN_BACK, whole(), gone(), Verdict.PERFORM, ""),
    ("given back, it had run", Phase.GIVEN_BACK, whole(), arrived(DEAD), Verdict.PERFORM, "I5"),
    ("committed, VMM dead activated", COMMITTED, sealed(), arrived(DEAD), Stuck, ""),
    ("arriving", POSTCOPY, sealed(), arrived(), Verdict.PERFORM, ""),
    ("arriving, source silent", POSTCOPY, None, arrived(), Verdict.PERFORM, ""),
    ("arriving, destination silent", POSTCOPY, sealed(), None, Verdict.WAIT, ""),
    ("arriving, both silent", POSTCOPY, None, None, Verdict.WAIT, ""),
    (
        "complete",
        POSTCOPY,
        sealed(),
        arrived(epoch_memory_complete=EPOCH),
        MemoryComplete,
        "",
    ),
    (
        "complete, then the VMM died",
        POSTCOPY,
        sealed(),
        arrived(DEAD, epoch_memory_complete=EPOCH),
        MemoryComplete,
        "",
    ),
    ("guest ended", POSTCOPY, sealed(), arrived(ENDED), GuestEnded, ""),
    ("VMM dead, memory missing", POSTCOPY, sealed(), arrived(DEAD), Stuck, ""),
    (
        "source rebooted",
        Phase.POSTCOPY_PAUSED,
        sealed(boot_id="boot-a2"),
        arrived(),
        Stuck,
        "",
    ),
    (
        "source released",
        POSTCOPY,
        source(DEAD, pb.VM_ROLE_GONE),
        arrived(),
        Stuck,
        "",
    ),
    (
        "source rebooted, but all pages are here",
        Phase.NEEDS_ATTENTION,
        sealed(boot_id="boot-a2"),
        arrived(epoch_memory_complete=EPOCH),
        MemoryComplete,
        "",
    ),
    ("source runs in post-copy", POSTCOPY, source(RUNNING), arrived(), Verdict.PERFORM, "I5"),
    (
        "finalizing",
        Phase.FINALIZING,
        sealed(),
        arrived(epoch_memory_complete=EPOCH),
        Verdict.PERFORM,
        "",
    ),
    (
        "finalizing, released already",
        Phase.FINALIZING,
        source(DEAD, pb.VM_ROLE_GONE),
        destination(RUNNING, pb.VM_ROLE_RESIDENT, epoch_owned=EPOCH),
        Verdict.PERFORM,
        "",
    ),
    ("finalizing, destination silent", Phase.FINALIZING, sealed(), None, Verdict.WAIT, ""),
    ("finalizing, word forgotten", Phase.FINALIZING, sealed(), arrived(), Stuck, "I3"),
    ("aborted", Phase.ABORTED, source(PAUSED), destination(), Verdict.PERFORM, ""),
    ("aborted, destination runs", Phase.ABORTED, source(PAUSED), arrived(), Verdict.PERFORM, "I1"),
]


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_row_of_the_table(case: Case) -> None:
    _name, phase, at_source, at_destination, expected, invariant = case
    found = look(phase, at_source, at_destination)
    if isinstance(expected, Verdict):
        assert (found.verdict, found.event) == (expected, None), found
    else:
        assert found.verdict is Verdict.EVENT
        assert type(found.event) is expected, found
    assert found.invariants == ((invariant,) if invariant else ())


@pytest.mark.parametrize("phase", sorted(set(Phase) - TERMINAL))
def test_agent_that_knows_more_freezes_every_phase(phase: Phase) -> None:
    """I2: a store that is behind its agents decides nothing."""
    found = look(phase, source(epoch_seen=RETURN_EPOCH + 1), None)
    assert found.verdict is Verdict.FREEZE


@pytest.mark.parametrize("phase", sorted(set(Phase) - TERMINAL))
@pytest.mark.parametrize("told", ["COMMITTED", "ABORTED", "RETURNED", "LOST"])
def test_agent_that_was_told_another_decision_freezes(phase: Phase, told: str) -> None:
    """I2: the epochs agree, and yet the store is older than what it has said."""
    number = common_pb2.Decision.Value(f"DECISION_{told}")
    found = look(phase, source(migration_id=migration_row().migration_id, decision=number), None)
    row = migration_row(phase)
    same = row.decision == told.lower() or (row.given_back and told == "RETURNED")
    assert (found.verdict is Verdict.FREEZE) is not same
    other = look(phase, source(migration_id="m0", decision=number), None)
    assert other.verdict is not Verdict.FREEZE


def test_guest_that_ended_needs_no_memory_complete() -> None:
    found = look(Phase.FINALIZING, sealed(), arrived(ENDED), guest_ended=True)
    assert found.verdict is Verdict.PERFORM


def test_older_epochs_marks_prove_nothing() -> None:
    """A node that hosted the VM before shows marks of its old epochs."""
    row = migration_row(Phase.POSTCOPY)
    assert not is_complete(row, arrived(epoch_memory_complete=EPOCH - 2))
    assert not is_complete(migration_row(epoch=0), arrived(epoch_memory_complete=0))


def test_silence_is_no_proof_that_memory_is_gone() -> None:
    """I8."""
    row = migration_row(Phase.POSTCOPY)
    assert not source_memory_is_gone(row, sealed(boot_id=""))
    assert not source_memory_is_gone(row, source(PAUSED))
    assert source_memory_is_gone(row, sealed(boot_id="another"))


VMM = st.sampled_from([DEAD, RUNNING, PAUSED, INCOMING, UNRESPONSIVE, ENDED])
ROLE = st.sampled_from([role for role in pb.VmRole.values() if role])
MARK = st.sampled_from([0, EPOCH - 2, EPOCH])


@st.composite
def any_evidence(draw: st.DrawFn, node: str) -> Evidence | None:
    """Anything that a node could say, or nothing."""
    if draw(st.booleans()) and draw(st.booleans()):
        return None
    names = ("prepared", "loaded", "activating", "memory_complete", "sealed", "owned")
    marks: dict[str, Any] = {f"epoch_{name}": draw(MARK) for name in names}
    return Evidence(
        vm_id="vm-1",
        node=node,
        boot_id=draw(st.sampled_from([SOURCE_BOOT, "other"])),
        role=pb.VmRole.ValueType(draw(ROLE)),
        vmm_state=pb.VmmState.ValueType(draw(VMM)),
        epoch_seen=draw(MARK),
        retained_bytes=draw(st.sampled_from([0, 4096])),
        returnable=draw(st.booleans()),
        **marks,
    )


@given(st.sampled_from(sorted(set(Phase) - TERMINAL)), any_evidence("a"), any_evidence("b"))
def test_judgement_never_breaks_the_table(
    phase: Phase, at_source: Evidence | None, at_destination: Evidence | None
) -> None:
    """Whatever agents say: no event that the table calls a violation."""
    found = look(phase, at_source, at_destination)
    assert (found.event is not None) is (found.verdict is Verdict.EVENT)
    if found.event is None:
        assert found.verdict is Verdict.PERFORM or found.reason
        return
    assert handle(phase, found.event).kind is not Kind.VIOLATION
    if phase in PAST_COMMIT:
        assert not isinstance(found.event, StepFailed), "I8"
    if phase in UNDECIDED:
        assert isinstance(found.event, StateLoaded | StepFailed)
    if isinstance(found.event, Noted):
        assert found.event.reason
        assert found.event.message


@given(any_evidence("a"), any_evidence("b"))
def test_commit_needs_both_proofs(
    at_source: Evidence | None, at_destination: Evidence | None
) -> None:
    """StateLoaded, which leads to COMMITTED, takes a paused source and a loaded destination."""
    found = look(SWITCHOVER, at_source, at_destination)
    if isinstance(found.event, StateLoaded):
        assert at_source is not None
        assert at_destination is not None
        assert at_source.vmm_state == PAUSED
        assert at_destination.epoch_loaded == EPOCH
        assert at_destination.vmm_state in (PAUSED, INCOMING)


@given(st.sampled_from(sorted(Phase)), any_evidence("a"), any_evidence("b"))
def test_a_return_needs_both_proofs(
    phase: Phase, at_source: Evidence | None, at_destination: Evidence | None
) -> None:
    """I5: NeverRan takes LOADED, no ACTIVATING and no VMM there, and a whole guest here."""
    if phase in TERMINAL:
        return
    found = look(phase, at_source, at_destination)
    if isinstance(found.event, NeverRan):
        assert phase in UNRUN
        assert at_source is not None
        assert at_source.returnable
        assert at_destination is not None
        assert at_destination.epoch_loaded == EPOCH
        assert at_destination.epoch_activating != EPOCH
        assert at_destination.vmm_state == DEAD


@given(st.sampled_from(AWAITING), any_evidence("b"))
def test_unreachable_source_alone_never_needs_attention(
    phase: Phase, at_destination: Evidence | None
) -> None:
    """I8: with no word from the source only the destination's own evidence can say Stuck."""
    found = look(phase, None, at_destination)
    if isinstance(found.event, Stuck):
        assert at_destination is not None
