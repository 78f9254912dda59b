# SPDX-License-Identifier: Apache-2.0
"""The state machine of a migration, sans-IO: one table (phase, event) → (next phase, actions).

The runner performs actions, which end in events, which `handle` turns into the next phase and its
actions. Every pair of the product is in exactly one of three places: TABLE moves, STALE is a late
or repeated message that changes nothing (I11), VIOLATIONS are pairs that cannot come true unless an
invariant (docs/design/handover.md) broke; they change nothing either and are counted.

Two rules carry the rest: what was decided is only ever *read* here (CommitRead, AbortRead: the
store wrote it by compare-and-swap), and past COMMITTED no event that a timer can cause leaves the
phase (I8).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum


class Phase(StrEnum):
    """godwit.fleet.v1.MigrationPhase, spelled as REST and the store spell it."""

    PENDING = "pending"
    VALIDATING = "validating"
    RESERVING = "reserving"
    PREPARING = "preparing"
    READY = "ready"
    PRECOPY = "precopy"
    SWITCHOVER = "switchover"
    COMMITTED = "committed"
    POSTCOPY = "postcopy"
    POSTCOPY_PAUSED = "postcopy_paused"
    RECOVERING = "recovering"
    FINALIZING = "finalizing"
    SUCCEEDED = "succeeded"
    CANCELLING = "cancelling"
    ROLLING_BACK = "rolling_back"
    ABORTED = "aborted"
    CANCELLED = "cancelled"
    FAILED = "failed"
    NEEDS_ATTENTION = "needs_attention"
    LOST = "lost"
    GIVING_BACK = "giving_back"
    GIVEN_BACK = "given_back"
    RETURNED = "returned"


class Decision(StrEnum):
    """The one durable write of a switchover."""

    COMMITTED = "committed"
    ABORTED = "aborted"


FORWARD = (
    Phase.PENDING,
    Phase.VALIDATING,
    Phase.RESERVING,
    Phase.PREPARING,
    Phase.READY,
    Phase.PRECOPY,
    Phase.SWITCHOVER,
)
"""Before the decision, in order. A failure or a cancel leads out of each."""

UNDOING = (Phase.ROLLING_BACK, Phase.CANCELLING)
"""Before the decision too: ABORTED is about to be written."""

ARRIVING = (Phase.POSTCOPY, Phase.POSTCOPY_PAUSED, Phase.RECOVERING)
"""The guest runs at the destination, its memory is split."""

AWAITING = (*ARRIVING, Phase.NEEDS_ATTENTION)
"""The memory's completion, or the guest's own end, is what ends these."""

UNRUN = (Phase.COMMITTED, Phase.NEEDS_ATTENTION)
"""Where evidence can say that the guest was never let run at the destination (I5)."""

PAST_COMMIT = (
    Phase.COMMITTED,
    *ARRIVING,
    Phase.NEEDS_ATTENTION,
    Phase.GIVING_BACK,
    Phase.FINALIZING,
)
"""The destination owns the guest and the migration is not over."""

PAST_RETURN = (Phase.GIVEN_BACK, Phase.RETURNED)
"""The second compare-and-swap was written: the source owns the guest again."""

_COMMITTED_EVER = (*PAST_COMMIT, *PAST_RETURN, Phase.SUCCEEDED, Phase.LOST)

PAST_ABORT = (Phase.ABORTED, Phase.FAILED, Phase.CANCELLED)
TERMINAL = frozenset({Phase.SUCCEEDED, Phase.CANCELLED, Phase.FAILED, Phase.LOST, Phase.RETURNED})
UNDECIDED = frozenset({*FORWARD, *UNDOING})


# --- events: what a step, an agent, an operator or the clock has said


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Noted(Event):
    """Something that happened and that an operator will want explained."""

    reason: str
    """Stable code, SCREAMING_SNAKE_CASE."""
    message: str
    """The same in words, with the values."""
    hint: str = ""
    """What can be done. May be empty."""


class Admitted(Event):
    """The queue let it go. Home: PENDING."""


class ChecksPassed(Event):
    """Both agents' preflights passed. Home: VALIDATING."""


class Reserved(Event):
    """The store has issued the destination's epoch. Home: RESERVING."""


class Prepared(Event):
    """Image exported, shell armed. Home: PREPARING."""


class SwitchoverDue(Event):
    """The guest shall be paused now. Home: READY, PRECOPY."""


class StateLoaded(Event):
    """The source is paused and the destination has fsynced LOADED(epoch). Home: SWITCHOVER."""


class CommitRead(Event):
    """Read back from the store: COMMITTED."""


class AbortRead(Event):
    """Read back from the store: ABORTED."""


class CommitRefused(Noted):
    """The store took no COMMITTED because a cancel was accepted first; nothing is decided yet."""


class StepFailed(Noted):
    """A step before the decision was refused, or evidence says that it cannot succeed."""


class CancelRequested(Noted):
    """Somebody asked for a cancel and the store accepted it."""


class TimedOut(Noted):
    """The phase took longer than it should."""


class Undone(Event):
    """Destination cleared, guest runs at the source; began as a failure. Home: ABORTED."""


class CancelUndone(Event):
    """The same, began as a cancel. Home: ABORTED."""


class Activated(Event):
    """The destination lets the guest run. Home: COMMITTED."""


class LinkLost(Noted):
    """The destination's agent cannot reach the page server."""


class LinkRestored(Event):
    """It can again; no page has come yet."""


class PagesArrive(Event):
    """Pages come (again)."""


class MemoryComplete(Event):
    """MEMORY_COMPLETE(epoch) is durable at the destination."""


class GuestEnded(Noted):
    """The guest has shut itself down at the destination."""


class Stuck(Noted):
    """Evidence, never a timer, says that the move cannot go on by itself."""


class Released(Event):
    """The source has freed the memory. Home: FINALIZING."""


class NeverRan(Noted):
    """Proof: no ACTIVATING at the destination, its VMM dead, and the source has the whole guest."""


class ReturnRead(Event):
    """Read back from the store: the second compare-and-swap was written. Home: GIVING_BACK."""


class Restored(Event):
    """The guest runs at its source again. Home: GIVEN_BACK."""


class LossDeclared(Noted):
    """An operator's word, or proof, that the guest is gone."""


# --- actions: what the runner has to do now


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """Something to be done."""


class Admit(Action):
    """Wait for a place → Admitted."""


class CheckBothSides(Action):
    """Preflight → ChecksPassed."""


class ReserveEpoch(Action):
    """Take E' from the store → Reserved."""


class PrepareBothSides(Action):
    """Prepare, source first → Prepared."""


class StartSwitchover(Action):
    """→ SwitchoverDue."""


class PauseAndTransfer(Action):
    """Pause, TransferDeviceState → StateLoaded. The guest stands still until ActivateAndSeal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decide(Action):
    """Compare-and-swap the decision and read it back → CommitRead, AbortRead or CommitRefused."""

    decision: Decision
    """What to try to write."""


class ActivateAndSeal(Action):
    """Activate and Seal at once, each until acknowledged → Activated. Seal may outlast it."""


class FollowProgress(Action):
    """Watch the memory arrive → the next event of the arrival."""


class ReleaseBothSides(Action):
    """Release the source on the destination's durable word, then the destination → Released."""


class GiveBack(Action):
    """Fence the destination, recall the source, swap the owner in the store → ReturnRead, Stuck."""


class RestoreSource(Action):
    """Let the guest run at its source under its fresh epoch → Restored or LossDeclared."""


class UndoBothSides(Action):
    """Clear the destination, then let the guest run at the source → Undone or CancelUndone."""


class RaiseAlarm(Action):
    """Tell operators; changes nothing."""


ENTRY: dict[Phase, tuple[Action, ...]] = {
    Phase.PENDING: (Admit(),),
    Phase.VALIDATING: (CheckBothSides(),),
    Phase.RESERVING: (ReserveEpoch(),),
    Phase.PREPARING: (PrepareBothSides(),),
    Phase.READY: (StartSwitchover(),),
    Phase.PRECOPY: (StartSwitchover(),),
    Phase.SWITCHOVER: (PauseAndTransfer(),),
    Phase.ROLLING_BACK: (Decide(decision=Decision.ABORTED),),
    Phase.CANCELLING: (Decide(decision=Decision.ABORTED),),
    Phase.ABORTED: (UndoBothSides(),),
    Phase.COMMITTED: (ActivateAndSeal(),),
    Phase.POSTCOPY: (FollowProgress(),),
    Phase.POSTCOPY_PAUSED: (FollowProgress(),),
    Phase.RECOVERING: (FollowProgress(),),
    Phase.NEEDS_ATTENTION: (FollowProgress(),),
    Phase.FINALIZING: (ReleaseBothSides(),),
    Phase.GIVING_BACK: (GiveBack(),),
    Phase.GIVEN_BACK: (RestoreSource(),),
    **dict.fromkeys(sorted(TERMINAL), ()),
}
"""What a phase does when it is entered, and again when an orchestrator finds a migration in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """What a pair leads to."""

    phase: Phase
    """The phase after it; may be the same."""
    actions: tuple[Action, ...]
    """To be done in order; empty: go on with what is being done."""


def _to(phase: Phase) -> Transition:
    return Transition(phase=phase, actions=ENTRY[phase])


def _stay(phase: Phase, *actions: Action) -> Transition:
    return Transition(phase=phase, actions=actions)


Pair = tuple[Phase, type[Event]]

_ALARMED = (Phase.PENDING, *UNDOING, Phase.ABORTED, *PAST_COMMIT, Phase.GIVEN_BACK)

TABLE: dict[Pair, Transition] = {
    (Phase.PENDING, Admitted): _to(Phase.VALIDATING),
    (Phase.VALIDATING, ChecksPassed): _to(Phase.RESERVING),
    (Phase.RESERVING, Reserved): _to(Phase.PREPARING),
    (Phase.PREPARING, Prepared): _to(Phase.READY),
    (Phase.READY, SwitchoverDue): _to(Phase.SWITCHOVER),
    (Phase.PRECOPY, SwitchoverDue): _to(Phase.SWITCHOVER),
    (Phase.SWITCHOVER, StateLoaded): _stay(Phase.SWITCHOVER, Decide(decision=Decision.COMMITTED)),
    # The decision, as read back. An undoing that finds COMMITTED goes forward: the write was
    # ours and its answer was lost.
    (Phase.SWITCHOVER, CommitRead): _to(Phase.COMMITTED),
    (Phase.SWITCHOVER, CommitRefused): _to(Phase.CANCELLING),
    **{(phase, CommitRead): _to(Phase.COMMITTED) for phase in UNDOING},
    **{(phase, AbortRead): _to(Phase.ABORTED) for phase in (*FORWARD, *UNDOING)},
    # Out of every phase before it.
    **{(phase, StepFailed): _to(Phase.ROLLING_BACK) for phase in FORWARD},
    **{(phase, CancelRequested): _to(Phase.CANCELLING) for phase in FORWARD},
    **{(phase, TimedOut): _to(Phase.ROLLING_BACK) for phase in FORWARD[1:]},
    **{(phase, TimedOut): _stay(phase, RaiseAlarm()) for phase in _ALARMED},
    (Phase.ABORTED, Undone): _to(Phase.FAILED),
    (Phase.ABORTED, CancelUndone): _to(Phase.CANCELLED),
    # Past it.
    (Phase.COMMITTED, Activated): _to(Phase.POSTCOPY),
    (Phase.POSTCOPY, LinkLost): _to(Phase.POSTCOPY_PAUSED),
    (Phase.RECOVERING, LinkLost): _to(Phase.POSTCOPY_PAUSED),
    (Phase.POSTCOPY_PAUSED, LinkRestored): _to(Phase.RECOVERING),
    (Phase.POSTCOPY_PAUSED, PagesArrive): _to(Phase.POSTCOPY),
    (Phase.RECOVERING, PagesArrive): _to(Phase.POSTCOPY),
    (Phase.NEEDS_ATTENTION, PagesArrive): _to(Phase.POSTCOPY),
    **{
        (phase, MemoryComplete): _to(Phase.FINALIZING)
        for phase in (*ARRIVING, Phase.NEEDS_ATTENTION)
    },
    **{(phase, GuestEnded): _to(Phase.FINALIZING) for phase in AWAITING},
    **{
        (phase, Stuck): _to(Phase.NEEDS_ATTENTION)
        for phase in (Phase.COMMITTED, *ARRIVING, Phase.GIVING_BACK, Phase.FINALIZING)
    },
    (Phase.FINALIZING, Released): _to(Phase.SUCCEEDED),
    (Phase.NEEDS_ATTENTION, LossDeclared): _to(Phase.LOST),
    # Taken back, on proof (I5).
    **{(phase, NeverRan): _to(Phase.GIVING_BACK) for phase in UNRUN},
    (Phase.GIVING_BACK, ReturnRead): _to(Phase.GIVEN_BACK),
    (Phase.GIVEN_BACK, Restored): _to(Phase.RETURNED),
    (Phase.GIVEN_BACK, LossDeclared): _to(Phase.LOST),
}


def _pairs(event: type[Event], *phases: Phase) -> set[Pair]:
    return {(phase, event) for phase in phases}


_HOME: dict[type[Event], Phase] = {
    Admitted: Phase.PENDING,
    ChecksPassed: Phase.VALIDATING,
    Reserved: Phase.RESERVING,
    Prepared: Phase.PREPARING,
    SwitchoverDue: Phase.READY,
    StateLoaded: Phase.SWITCHOVER,
}

_ALL = tuple(Phase)
_OVER = tuple(sorted(TERMINAL))

VIOLATIONS: dict[Pair, str] = {
    # An answer to a question that was not asked yet.
    **{
        (phase, event): "ORDER"
        for event, home in _HOME.items()
        for phase in FORWARD[: FORWARD.index(home)]
    },
    **dict.fromkeys(_pairs(CommitRefused, *FORWARD[:-1]), "ORDER"),
    **dict.fromkeys(_pairs(Undone, *FORWARD, *UNDOING), "ORDER"),
    **dict.fromkeys(_pairs(CancelUndone, *FORWARD, *UNDOING), "ORDER"),
    **dict.fromkeys(_pairs(Stuck, *FORWARD, *UNDOING, Phase.ABORTED), "ORDER"),
    **dict.fromkeys(_pairs(NeverRan, *FORWARD, *UNDOING, *PAST_ABORT), "ORDER"),
    **dict.fromkeys(_pairs(ReturnRead, *FORWARD, *UNDOING, Phase.COMMITTED), "ORDER"),
    # The guest ran at a destination that does not own it.
    **dict.fromkeys(_pairs(Activated, *FORWARD, *UNDOING, *PAST_ABORT), "I1"),
    # It ran at a destination that was proved not to have run it, and fenced.
    **dict.fromkeys(_pairs(Activated, Phase.GIVING_BACK, *PAST_RETURN), "I5"),
    # The destination has forgotten that it ran.
    **dict.fromkeys(_pairs(NeverRan, *ARRIVING, Phase.FINALIZING, Phase.SUCCEEDED), "I5"),
    # Two decisions.
    **dict.fromkeys(_pairs(CommitRead, *FORWARD[:-1], *PAST_ABORT), "I2"),
    **dict.fromkeys(_pairs(AbortRead, *_COMMITTED_EVER), "I2"),
    **dict.fromkeys(_pairs(CommitRefused, *_COMMITTED_EVER), "I2"),
    # Given back without a proof that this phase stands for.
    **dict.fromkeys(
        _pairs(
            ReturnRead,
            *ARRIVING,
            Phase.NEEDS_ATTENTION,
            Phase.FINALIZING,
            Phase.SUCCEEDED,
            *PAST_ABORT,
        ),
        "I5",
    ),
    # Memory freed that somebody may need.
    **dict.fromkeys(
        _pairs(
            Released,
            *(phase for phase in _ALL if phase not in (Phase.FINALIZING, Phase.SUCCEEDED)),
        ),
        "I3",
    ),
    # The source let the guest run although the destination owns it.
    **dict.fromkeys(_pairs(Undone, *_COMMITTED_EVER), "I5"),
    **dict.fromkeys(_pairs(CancelUndone, *_COMMITTED_EVER), "I5"),
    **dict.fromkeys(
        _pairs(Restored, *(p for p in _ALL if p not in (*PAST_RETURN, Phase.LOST))), "I5"
    ),
    # Nothing fails a migration past the commit.
    **dict.fromkeys(_pairs(StepFailed, *_COMMITTED_EVER), "I8"),
}
"""Pairs that cannot come true unless the named invariant broke ("ORDER": a bug of the runner)."""

STALE: frozenset[Pair] = frozenset(
    {
        *(
            (phase, event)
            for event, home in _HOME.items()
            for phase in _ALL
            if phase not in FORWARD[: FORWARD.index(home) + 1]
            and not (event is SwitchoverDue and phase is Phase.PRECOPY)
        ),
        *_pairs(CommitRead, *_COMMITTED_EVER),
        *_pairs(AbortRead, *PAST_ABORT),
        *_pairs(CommitRefused, *UNDOING, *PAST_ABORT),
        *_pairs(StepFailed, *UNDOING, *PAST_ABORT),
        # The service refuses a late cancel (PAST_COMMIT); one that slipped by changes nothing.
        *_pairs(CancelRequested, *UNDOING, Phase.ABORTED, *PAST_COMMIT, Phase.GIVEN_BACK, *_OVER),
        *_pairs(TimedOut, *_OVER),
        *_pairs(Undone, Phase.FAILED, Phase.CANCELLED),
        *_pairs(CancelUndone, Phase.FAILED, Phase.CANCELLED),
        *_pairs(
            Activated,
            *ARRIVING,
            Phase.NEEDS_ATTENTION,
            Phase.FINALIZING,
            Phase.SUCCEEDED,
            Phase.LOST,
        ),
        # An arrival is told of from PREPARING on, even after an abort; it matters in ARRIVING.
        *_pairs(LinkLost, *(p for p in _ALL if p not in (Phase.POSTCOPY, Phase.RECOVERING))),
        *_pairs(LinkRestored, *(p for p in _ALL if p is not Phase.POSTCOPY_PAUSED)),
        *(
            pair
            for pair in _pairs(PagesArrive, *_ALL)
            if pair[0] not in (Phase.POSTCOPY_PAUSED, Phase.RECOVERING, Phase.NEEDS_ATTENTION)
        ),
        *(
            pair
            for event in (MemoryComplete, GuestEnded)
            for pair in _pairs(event, *_ALL)
            if pair[0] not in AWAITING
        ),
        *_pairs(Stuck, Phase.NEEDS_ATTENTION, Phase.GIVEN_BACK, *_OVER),
        *_pairs(Released, Phase.SUCCEEDED),
        *_pairs(NeverRan, Phase.GIVING_BACK, *PAST_RETURN, Phase.LOST),
        *_pairs(ReturnRead, *PAST_RETURN, Phase.LOST),
        *_pairs(Restored, Phase.RETURNED, Phase.LOST),
        *_pairs(
            LossDeclared,
            *(p for p in _ALL if p not in (Phase.NEEDS_ATTENTION, Phase.GIVEN_BACK)),
        ),
    }
)
"""Pairs that a repeated or late message makes; they change nothing."""

EVENTS: tuple[type[Event], ...] = (
    *_HOME,
    CommitRead,
    AbortRead,
    CommitRefused,
    StepFailed,
    CancelRequested,
    TimedOut,
    Undone,
    CancelUndone,
    Activated,
    LinkLost,
    LinkRestored,
    PagesArrive,
    MemoryComplete,
    GuestEnded,
    Stuck,
    Released,
    NeverRan,
    ReturnRead,
    Restored,
    LossDeclared,
)


class Kind(Enum):
    """How a pair was classified."""

    MOVES = "moves"
    STALE = "stale"
    VIOLATION = "violation"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What an event led to."""

    kind: Kind
    phase: Phase
    """The phase after the event."""
    actions: tuple[Action, ...] = ()
    """To be done now. Empty where nothing changed: go on with what is being done."""
    invariant: str = ""
    """Which invariant broke, where `kind` is VIOLATION."""


def handle(phase: Phase, event: Event) -> Step:
    """What `event` does to a migration in `phase`. Total over the product of phases and EVENTS."""
    pair = (phase, type(event))
    if transition := TABLE.get(pair):
        return Step(kind=Kind.MOVES, phase=transition.phase, actions=transition.actions)
    if invariant := VIOLATIONS.get(pair):
        return Step(kind=Kind.VIOLATION, phase=phase, invariant=invariant)
    if pair in STALE:
        return Step(kind=Kind.STALE, phase=phase)
    raise KeyError(pair)


def entry(phase: Phase) -> tuple[Action, ...]:
    """What to do on finding a migration in `phase`, after asking both agents."""
    return ENTRY[phase]


_PROGRESS: dict[Phase, float] = {
    Phase.VALIDATING: 0.01,
    Phase.RESERVING: 0.02,
    Phase.PREPARING: 0.03,
    Phase.READY: 0.06,
    Phase.SWITCHOVER: 0.08,
    Phase.COMMITTED: 0.09,
    Phase.POSTCOPY: 0.10,
    Phase.FINALIZING: 0.97,
    Phase.SUCCEEDED: 1.0,
}


def progress(phase: Phase, resident_share: float, before: float) -> float:
    """Share of the whole, 0..1; never less than `before` (I12)."""
    floor = _PROGRESS.get(phase, 0.0)
    if phase in ARRIVING:
        start, end = _PROGRESS[Phase.POSTCOPY], _PROGRESS[Phase.FINALIZING]
        floor = start + (end - start) * min(max(resident_share, 0.0), 1.0)
    return max(before, floor)
