# SPDX-License-Identifier: Apache-2.0
"""The transition table, over the full product of phases and events (handover.md)."""

from __future__ import annotations

import pytest
from godwit.fleet.v1 import types_pb2
from hypothesis import given
from hypothesis import strategies as st

from services.orchestrator import migration
from services.orchestrator.migration import (
    AWAITING,
    ENTRY,
    EVENTS,
    FORWARD,
    PAST_ABORT,
    PAST_COMMIT,
    PAST_RETURN,
    STALE,
    TABLE,
    TERMINAL,
    UNDECIDED,
    UNDOING,
    VIOLATIONS,
    AbortRead,
    Action,
    CancelRequested,
    CommitRead,
    Decide,
    Decision,
    Event,
    Kind,
    Noted,
    Phase,
    StepFailed,
    TimedOut,
    UndoBothSides,
    entry,
    handle,
    progress,
)

COMMITTED_PHASES = {*PAST_COMMIT, *PAST_RETURN, Phase.SUCCEEDED, Phase.LOST}
ABORTED_PHASES = set(PAST_ABORT)


def make(event: type[Event]) -> Event:
    if issubclass(event, Noted):
        return event(reason="TEST", message="a test")
    return event()


def decided(phase: Phase) -> Decision | None:
    """What must have been decided for a migration to be in `phase`."""
    if phase in COMMITTED_PHASES:
        return Decision.COMMITTED
    return Decision.ABORTED if phase in ABORTED_PHASES else None


def test_phases_are_those_of_the_contract() -> None:
    """Every wire phase has one here, under the same name, and no other."""
    wire = {
        name.removeprefix("MIGRATION_PHASE_").lower()
        for name, _number in types_pb2.MigrationPhase.items()
    }
    assert wire - {"unspecified"} == {str(phase) for phase in Phase}


def test_every_event_class_is_in_the_product() -> None:
    """A new event cannot be forgotten: all concrete classes are listed."""

    def concrete(cls: type[Event]) -> set[type[Event]]:
        return {cls}.union(*(concrete(each) for each in cls.__subclasses__()))

    # slots=True makes a class anew; the first one stays behind as a subclass nobody uses.
    known = {each for each in concrete(Event) if getattr(migration, each.__name__) is each}
    assert known - {Event, Noted} == set(EVENTS)


@pytest.mark.parametrize("phase", sorted(Phase))
def test_each_pair_is_classified_once(phase: Phase) -> None:
    """Each pair moves, is stale, or is a violation; exactly one of them."""
    for event in EVENTS:
        pair = (phase, event)
        assert (pair in TABLE) + (pair in STALE) + (pair in VIOLATIONS) == 1, pair
        step = handle(phase, make(event))
        if pair in TABLE:
            assert step.kind is Kind.MOVES, pair
        else:
            assert step.phase is phase, pair
            assert step.actions == (), pair
            assert bool(step.invariant) is (step.kind is Kind.VIOLATION), pair


@pytest.mark.parametrize("phase", sorted(Phase))
def test_invariants_hold_for_each_pair(phase: Phase) -> None:
    """I2, I3, I7, I8 as properties of every single step."""
    for event in EVENTS:
        pair = (phase, event)
        after = handle(phase, make(event)).phase
        if phase in TERMINAL:
            assert after is phase, f"I7: a terminal phase was left: {pair}"
        if decided(phase):
            assert decided(after) is decided(phase), f"I2: a decision changed: {pair}"
        elif decided(after):
            assert event in (CommitRead, AbortRead), f"I2: decided without reading: {pair}"
        if phase in PAST_COMMIT and event in (TimedOut, StepFailed, CancelRequested):
            assert after is phase, f"I8: left a committed phase without evidence: {pair}"
        if after in (Phase.FAILED, Phase.CANCELLED) and after is not phase:
            assert phase is Phase.ABORTED, f"ended without undoing: {pair}"
        if after is Phase.SUCCEEDED and after is not phase:
            assert phase is Phase.FINALIZING, f"I3: succeeded without releasing: {pair}"


def test_a_guest_is_given_back_on_proof_alone() -> None:
    """I5: into GIVING_BACK by NeverRan, out of it to the source only by what the store says."""
    into = {pair for pair, to in TABLE.items() if to.phase is Phase.GIVING_BACK != pair[0]}
    assert into == {(phase, migration.NeverRan) for phase in migration.UNRUN}
    given = {pair for pair, to in TABLE.items() if to.phase is Phase.GIVEN_BACK != pair[0]}
    assert given == {(Phase.GIVING_BACK, migration.ReturnRead)}
    home = {pair for pair, to in TABLE.items() if to.phase is Phase.RETURNED}
    assert home == {(Phase.GIVEN_BACK, migration.Restored)}
    restores = [phase for phase in Phase if migration.RestoreSource() in entry(phase)]
    assert restores == [Phase.GIVEN_BACK]
    for phase in PAST_RETURN:
        for event in EVENTS:
            after = handle(phase, make(event)).phase
            assert after in (*PAST_RETURN, Phase.LOST), (phase, event)


def test_committed_is_only_tried_in_switchover() -> None:
    """The only action that can write COMMITTED follows StateLoaded in SWITCHOVER."""
    tries = {
        pair
        for pair, transition in TABLE.items()
        for action in transition.actions
        if action == Decide(decision=Decision.COMMITTED)
    }
    assert tries == {(Phase.SWITCHOVER, migration.StateLoaded)}
    assert all(Decide(decision=Decision.COMMITTED) not in actions for actions in ENTRY.values())


def test_the_source_is_resumed_only_after_aborted() -> None:
    """I6: UndoBothSides, which may resume the guest, is ABORTED's alone."""
    assert [phase for phase in Phase if UndoBothSides() in entry(phase)] == [Phase.ABORTED]


@pytest.mark.parametrize("phase", sorted(UNDECIDED))
def test_failure_and_cancel_lead_out_of_each_undecided_phase(phase: Phase) -> None:
    """Nothing before the decision can trap a guest."""
    if phase in FORWARD:
        assert handle(phase, make(StepFailed)).phase is Phase.ROLLING_BACK
        assert handle(phase, make(CancelRequested)).phase is Phase.CANCELLING
    else:
        assert phase in UNDOING
        assert handle(phase, AbortRead()).phase is Phase.ABORTED


def test_terminal_phases_do_nothing_and_all_others_do_something() -> None:
    """A migration found in any phase that is not terminal goes on."""
    assert {phase for phase in Phase if not entry(phase)} == set(TERMINAL)


@given(st.sampled_from(sorted(Phase)), st.lists(st.sampled_from(EVENTS), max_size=60))
def test_walks_keep_the_decision_and_terminality(start: Phase, events: list[type[Event]]) -> None:
    """Any events in any order, repeated and reordered: I2, I7."""
    phase, decision = start, decided(start)
    for event in events:
        step = handle(phase, make(event))
        if phase in TERMINAL:
            assert step.phase is phase
        if decision:
            assert decided(step.phase) is decision
        phase, decision = step.phase, decided(step.phase)


@given(
    st.lists(st.tuples(st.sampled_from(sorted(Phase)), st.floats(0, 1)), max_size=30),
    st.floats(0, 1),
)
def test_progress_never_falls(path: list[tuple[Phase, float]], before: float) -> None:
    """I12, whatever the phases and the shares."""
    for phase, share in path:
        after = progress(phase, share, before)
        assert before <= after <= 1.0
        before = after


def test_progress_is_whole_only_at_the_end() -> None:
    """1.0 means SUCCEEDED."""
    assert progress(Phase.SUCCEEDED, 1.0, 0.0) == 1.0
    assert all(progress(phase, 1.0, 0.0) < 1.0 for phase in Phase if phase is not Phase.SUCCEEDED)


def test_awaiting_phases_end_by_completion_or_guest_end() -> None:
    """Recovery never needs a person: the memory's arrival ends even NEEDS_ATTENTION."""
    for phase in AWAITING:
        assert handle(phase, migration.MemoryComplete()).phase is Phase.FINALIZING
        assert handle(phase, make(migration.GuestEnded)).phase is Phase.FINALIZING


def test_actions_compare_by_value() -> None:
    """Tests and the runner tell actions apart by class and fields."""
    assert Decide(decision=Decision.ABORTED) != Decide(decision=Decision.COMMITTED)
    actions: list[Action] = [migration.Admit(), migration.ReserveEpoch()]
    assert actions[0] != actions[1]
