# SPDX-License-Identifier: Apache-2.0
"""Carries one migration from the phase in which it finds it to its end.

The loop is short: perform the action of the phase, hand the event to the table, write the phase
that the table names, go on with its actions. What was not written did not happen: a process that
ends anywhere in it is replaced by one that starts from the row and from evidence.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from services.common import telemetry
from services.common.errors import GodwitError, InternalError
from services.common.hooks import HookFailure, reach
from services.orchestrator import forward, giveback, handover, undo
from services.orchestrator.follow import Follower
from services.orchestrator.migration import (
    AWAITING,
    TERMINAL,
    UNDECIDED,
    AbortRead,
    Action,
    ActivateAndSeal,
    Activated,
    Admit,
    Admitted,
    CancelRequested,
    CheckBothSides,
    CommitRead,
    CommitRefused,
    Decide,
    Decision,
    Event,
    FollowProgress,
    GiveBack,
    GuestEnded,
    Kind,
    Noted,
    PauseAndTransfer,
    Phase,
    PrepareBothSides,
    RaiseAlarm,
    ReleaseBothSides,
    ReserveEpoch,
    RestoreSource,
    ReturnRead,
    StartSwitchover,
    StepFailed,
    SwitchoverDue,
    TimedOut,
    UndoBothSides,
    entry,
    handle,
    progress,
)
from services.orchestrator.move import Context, HappenedError, Move
from services.orchestrator.scheduling.policy import Settings
from services.orchestrator.store import PhaseLostError, StoreError, identity
from services.orchestrator.store.rows import EventRow, MigrationRow
from services.orchestrator.timeline import describe, of_transition

log = logging.getLogger(__name__)

GUEST_STANDS_STILL = frozenset(
    {
        Phase.SWITCHOVER,
        Phase.ROLLING_BACK,
        Phase.CANCELLING,
        Phase.ABORTED,
        Phase.COMMITTED,
        Phase.GIVING_BACK,
        Phase.GIVEN_BACK,
    }
)
"""Phases in which the guest may be paused: a draining process gives them a moment."""

_CANCELLED = {
    "reason": "CANCELLED",
    "message": "cancelled on request",
    "hint": "the guest runs at its source",
}


class Mover:
    """One migration and the tasks that move it."""

    def __init__(self, context: Context, row: MigrationRow, *, rejoined: bool) -> None:
        """`rejoined`: the row was found, not just admitted; evidence is asked for first."""
        self.move = Move(context, row)
        self._context = context
        self._rejoined = rejoined
        self._entered = row
        self._cancel = row.cancel_requested
        self._scope: asyncio.Timeout | None = None
        self._group: asyncio.TaskGroup | None = None
        self._sealing: asyncio.Task[None] | None = None
        self._alarmed: Phase | None = None
        self._settings = Settings()
        """What the policies said; read before the guest is paused."""
        self._follower: Follower | None = None
        self._following: asyncio.Task[None] | None = None

    @property
    def row(self) -> MigrationRow:
        """As last written or read."""
        return self.move.row

    @property
    def phase(self) -> Phase:
        """The phase in hand. The row is ahead of it between a decision and its being acted on."""
        return self._entered.phase

    def cancel(self) -> None:
        """The store has accepted a cancel: stop what is being done before the decision."""
        self._cancel = True
        if self._scope and not self._scope.expired():
            self._scope.reschedule(asyncio.get_running_loop().time())

    async def run(self) -> None:
        """Go on until the migration is terminal."""
        needs_attention = self._context.metrics.needs_attention
        async with asyncio.TaskGroup() as group:
            self._group = group
            if self.phase is Phase.NEEDS_ATTENTION:
                needs_attention.inc()
            try:
                await self._drive()
            finally:
                if self.phase is Phase.NEEDS_ATTENTION:
                    needs_attention.dec()
                self._group = None
                for task in (self._sealing, self._following):
                    if task:
                        task.cancel()

    async def _drive(self) -> None:
        if self._rejoined and _has_time(self.row.phase):
            await self.move.timeline.tell(
                EventRow(
                    kind="REJOINED",
                    message=f"an orchestrator took the migration up in {self.row.phase}",
                    action="both nodes are asked what they can prove; it goes on from there",
                )
            )
        if self._rejoined and self.row.phase in UNDECIDED:
            await self._thawed()
            await self._read_settings()
        actions = deque(entry(self.phase))
        while self.phase not in TERMINAL:
            if not actions:
                actions.extend(entry(self.phase))
            event = await self._perform(actions.popleft())
            if event:
                next_actions = await self._apply(event)
                if next_actions:
                    actions = deque(next_actions)

    async def _thawed(self) -> None:
        """Return unless the store is in doubt; then never: nothing is decided any more (I2)."""
        alarm_at = asyncio.get_running_loop().time() + self._context.limits.alarm_s
        for delay_s in self._context.backoff():
            if not self._context.doubt.why:
                await self.move.ask()
            if not (why := self._context.doubt.why):
                return
            await self.move.wait_for("STORE_IN_DOUBT", why, identity.HINT)
            if asyncio.get_running_loop().time() >= alarm_at:
                await self._perform(RaiseAlarm())
                alarm_at += self._context.limits.alarm_s
            await asyncio.sleep(delay_s)

    # --- events ---

    async def _apply(self, event: Event) -> tuple[Action, ...]:
        """Let the table say what `event` does, write it, return what is to be done."""
        phase = self.phase
        read = isinstance(event, CommitRead | AbortRead | ReturnRead)
        if self.row.phase is not phase and not read:
            # A note of ours has brought the row of another orchestrator, and evidence was judged by
            # it: what that says is no event of the phase in hand.
            raise PhaseLostError(
                "PHASE_LOST", f"migration {self.row.migration_id} is {self.row.phase} already"
            )
        step = handle(phase, event)
        name = type(event).__name__
        if step.kind is Kind.VIOLATION:
            self.move.violated(step.invariant, f"{name} in phase {phase}")
            await asyncio.sleep(self._context.limits.retry_s_max)
            return ()
        if step.kind is Kind.STALE:
            log.debug("migration %s: %s is stale in %s", self.row.migration_id, name, phase)
            return ()
        if step.phase is not phase:
            await self._enter(step.phase, event)
        return step.actions

    async def _enter(self, phase: Phase, event: Event) -> None:
        before = self._entered
        await reach(f"orchestrator.{before.phase}.done")
        if isinstance(event, CommitRead | AbortRead | ReturnRead):
            pass  # written by the decision itself, and read back: self.row has it
        else:
            entered = await self._context.store.migrations.enter(
                before,
                phase,
                now_ns=self._context.now_ns(),
                note=event if isinstance(event, Noted) else None,
                event=self.move.timeline.stamp(of_transition(phase, event, self._evidence())),
                **await self._fields(phase, event),
            )
            self.move.take(entered)
        self._entered = self.row
        self._observe(before)
        self._context.changes.publish(before.migration_id)
        log.info(
            "migration %s of %s: %s (%s)",
            before.migration_id,
            before.vm_id,
            phase,
            type(event).__name__,
        )
        if phase not in AWAITING:
            self._stop_following()
        if _has_time(phase):
            await self.move.timeline.goes_on()
            await self.move.timeline.flush()
        await reach(f"orchestrator.{phase}.entered")

    def _evidence(self) -> list[str]:
        """What both nodes said last."""
        return [describe(node, said) for node, said in self.move.last_evidence.items()]

    async def _fields(self, phase: Phase, event: Event) -> dict[str, Any]:
        """What else is true with the phase."""
        row = self.row
        fields: dict[str, Any] = {}
        if phase is Phase.LOST:
            fields["source_owed"] = True
        elif phase not in (*UNDECIDED, Phase.FAILED, Phase.CANCELLED, Phase.RETURNED):
            bitmap = self._context.bitmaps.get(row.vm_id, row.epoch)
            share = bitmap.resident_share if bitmap else 0.0
            fields["progress"] = progress(phase, share, row.progress)
            if not isinstance(event, Noted):
                fields |= {"reason": "", "message": "", "hint": ""}
        elif phase in UNDECIDED:
            fields["progress"] = progress(phase, 0.0, row.progress)
        if isinstance(event, CancelRequested | CommitRefused):
            fields["undo_is_cancel"] = True
        if isinstance(event, GuestEnded):
            fields["guest_ended"] = True
        if isinstance(event, Activated):
            fields["pause_ns"] = await self._pause_ns()
            self._context.metrics.pause_seconds.observe(fields["pause_ns"] / 1e9)
        if phase is Phase.SUCCEEDED and row.guest_ended:
            fields |= {"reason": "GUEST_ENDED", "message": "the guest has shut itself down"}
        return fields

    async def _pause_ns(self) -> int:
        """An upper bound: more than the pause by the way of two messages.

        From sending Pause until now, the acknowledgement of Activate, less what the agents know the
        guest to have run in between.

        A process that did not send the Pause takes the wall clock since SWITCHOVER.
        """
        if self.move.pause_sent_ns is not None:
            return max(time.monotonic_ns() - self.move.pause_sent_ns - self.move.ran_ns, 0)
        migration_id = self.row.migration_id
        history = await self._context.store.migrations.transitions([migration_id])
        began = [each.at_ns for each in history[migration_id] if each.phase is Phase.SWITCHOVER]
        return max(self._context.now_ns() - began[-1], 0) if began else 0

    def _observe(self, before: MigrationRow) -> None:
        metrics, row = self._context.metrics, self.row
        took_ns = max(row.phase_at_ns - before.phase_at_ns, 0)
        metrics.phase_seconds.labels(before.phase).observe(took_ns / 1e9)
        if row.phase is Phase.NEEDS_ATTENTION:
            metrics.needs_attention.inc()
        if before.phase is Phase.NEEDS_ATTENTION:
            metrics.needs_attention.dec()
        if row.phase in TERMINAL:
            metrics.migrations.labels(row.phase, row.reason).inc()

    # --- actions ---

    async def _perform(self, action: Action) -> Event | None:
        rejoined = self._rejoined
        if not isinstance(action, RaiseAlarm):
            self._rejoined = False
        limits = self._context.limits
        decides = self.phase in UNDECIDED or isinstance(action, GiveBack)
        may_go_on = not decides or isinstance(action, RaiseAlarm)
        if self._context.doubt.why and not may_go_on:
            await self._thawed()
        with telemetry.span(
            f"migration.{self.row.phase}",
            traceparent=self.row.traceparent,
            **{"godwit.migration.id": self.row.migration_id, "godwit.vm.id": self.row.vm_id},
        ):
            match action:
                case Admit():
                    return await self._undecided(
                        lambda: self._admitted(found=rejoined), limits.queue_s
                    )
                case CheckBothSides():
                    return await self._undecided(
                        lambda: forward.check_both_sides(self.move), limits.validating_s
                    )
                case ReserveEpoch():
                    return await self._undecided(
                        lambda: forward.reserve(self.move), limits.validating_s
                    )
                case PrepareBothSides():
                    return await self._undecided(
                        lambda: forward.prepare_both_sides(self.move), await self._preparing_s()
                    )
                case StartSwitchover():
                    return await self._undecided(
                        lambda: self._start_switchover(rejoined), limits.preparing_s
                    )
                case PauseAndTransfer():
                    return await self._undecided(
                        lambda: forward.pause_and_transfer(self.move, rejoined=rejoined),
                        self._switchover_s(),
                    )
                case Decide():
                    return await self._decide(action.decision)
                case ActivateAndSeal():
                    self._start_sealing()
                    return await handover.activate(self.move, self._alarm, rejoined=rejoined)
                case FollowProgress():
                    self.move.activation_tried.set()
                    self._start_sealing()
                    return await self._follow().next_event()
                case ReleaseBothSides():
                    self.move.activation_tried.set()
                    self._start_sealing()
                    return await handover.release(self.move, self._alarm, self._sealed)
                case GiveBack():
                    await self._stop_sealing()
                    return await giveback.give_back(self.move, self._alarm)
                case RestoreSource():
                    return await giveback.restore(self.move, self._alarm)
                case UndoBothSides():
                    return await undo.undo(self.move, self._alarm)
                case RaiseAlarm():
                    self._context.metrics.alarms.labels(self.row.phase).inc()
                    await self._tell_alarm()
                    log.error(
                        "migration %s has been %s for too long: %s %s",
                        self.row.migration_id,
                        self.row.phase,
                        self.row.wait_reason or self.row.reason,
                        self.row.wait_message or self.row.message,
                    )
                    return None
        raise AssertionError(action)

    async def _tell_alarm(self) -> None:
        """Once for each phase: it goes on for as long as it takes."""
        if self.row.phase is self._alarmed:
            return
        self._alarmed = self.row.phase
        why = self.row.wait_message or self.row.message
        await self.move.timeline.tell(
            EventRow(
                kind="ALARM",
                message=f"{self.row.phase} takes longer than it should"
                + (f": {why}" if why else ""),
                action="tried again for as long as it takes; nothing is given up by a timer",
                hint=self.row.wait_hint or self.row.hint,
            )
        )

    async def _undecided(self, step: Callable[[], Awaitable[Event]], budget_s: float) -> Event:
        """A step before the decision: it ends in time, on a cancel, or with what went wrong."""
        if self._cancel:
            return CancelRequested(**_CANCELLED)
        try:
            async with asyncio.timeout(budget_s) as self._scope:
                return await step()
        except TimeoutError:
            if self._cancel:
                return CancelRequested(**_CANCELLED)
            return TimedOut(
                reason=self.row.wait_reason or "TIMED_OUT",
                message=f"{self.row.phase} took longer than {budget_s:g} s"
                + (f": {self.row.wait_message}" if self.row.wait_message else ""),
                hint=self.row.wait_hint,
            )
        except HappenedError as happened:
            return happened.event
        except GodwitError as error:
            return StepFailed(reason=error.reason, message=error.message, hint=error.hint)
        except HookFailure as error:
            return StepFailed(reason="HOOK_FAILURE", message=str(error))
        finally:
            self._scope = None

    async def _preparing_s(self) -> float:
        """The budget of PREPARING, with what a policy adds for each GiB."""
        gib = 0.0
        await self._read_settings()
        with contextlib.suppress(StoreError):
            if self._settings.prepare_s_per_gib:
                vm = await self._context.store.fleet.vm(self.row.vm_id)
                gib = vm.memory_bytes / (1 << 30) if vm else 0.0
        return self._context.limits.preparing_s + gib * (self._settings.prepare_s_per_gib or 0.0)

    async def _read_settings(self) -> None:
        """What the policies said; what cannot be read now says nothing."""
        with contextlib.suppress(StoreError):
            self._settings = await self._context.queue.settings(self.row.migration_id)

    def _switchover_s(self) -> float:
        """The budget of SWITCHOVER, and no more than a policy allows. No question to the store."""
        most_ms = self._settings.pause_ms_max
        budget_s = self._context.limits.switchover_s
        return min(budget_s, most_ms / 1e3) if most_ms else budget_s

    async def _admitted(self, *, found: bool) -> Event:
        if row := await self._context.queue.admitted(self.row.migration_id, found=found):
            self.move.take(row)
        return Admitted()

    async def _start_switchover(self, rejoined: bool) -> Event:
        if rejoined and (event := await self.move.settled(patience_s=self.move.limits.patience_s)):
            return event
        return SwitchoverDue()

    async def _decide(self, decision: Decision) -> Event:
        """Write the decision if nobody has, and report what the store says then (I2)."""
        store, limits = self._context.store.migrations, self._context.limits
        if self._context.doubt.why:
            await self._thawed()
        await reach("orchestrator.decision.before")
        alarm_at = asyncio.get_running_loop().time() + limits.alarm_s
        for delay_s in self._context.backoff():
            failed = ""
            try:
                self.move.take(
                    await store.decide(self.row, decision, now_ns=self._context.now_ns())
                )
            except (StoreError, InternalError) as error:
                # Written or not: only reading tells.
                failed = str(error)
                log.exception("migration %s: decision not written", self.row.migration_id)
            if not failed or await self._reloaded():
                await reach("orchestrator.decision.after")
                if self.row.decision is Decision.COMMITTED:
                    return CommitRead()
                if self.row.decision is Decision.ABORTED:
                    return AbortRead()
                if decision is Decision.COMMITTED:
                    if self.row.cancel_requested:
                        return CommitRefused(**_CANCELLED)
                    return StepFailed(
                        reason="DECISION_NOT_WRITTEN",
                        message=failed or f"the store took no decision in {self.row.phase}",
                        hint="see the health of the store's disk",
                    )
            # A paused source stays paused until ABORTED is durable (I8).
            if asyncio.get_running_loop().time() >= alarm_at:
                await self._perform(RaiseAlarm())
                alarm_at += limits.alarm_s
            await asyncio.sleep(delay_s)
        raise AssertionError

    async def _reloaded(self) -> bool:
        try:
            await self.move.reload()
        except StoreError:
            log.exception("migration %s: decision not readable", self.row.migration_id)
            return False
        return True

    async def _alarm(self) -> None:
        """A step takes too long. Past the decision this changes nothing but the alarm's counter."""
        event = TimedOut(
            reason="TIMED_OUT", message=f"{self.row.phase} takes longer than it should"
        )
        for action in await self._apply(event):
            await self._perform(action)

    # --- tasks beside the loop ---

    def _start_sealing(self) -> None:
        """Seal, beside whatever the phase does; once a process: it is idempotent."""
        if self._sealing is None and self._group:
            self._sealing = self._group.create_task(handover.seal(self.move, self._alarm))

    async def _stop_sealing(self) -> None:
        """One that is on its way is refused by the source, from the recall on."""
        sealing, self._sealing = self._sealing, None
        if sealing:
            sealing.cancel()
            await asyncio.wait({sealing})

    async def _sealed(self) -> None:
        if self._sealing:
            await asyncio.wait({self._sealing})

    def _follow(self) -> Follower:
        if self._follower is None and self._group:
            self._follower = Follower(self.move)
            self._following = self._group.create_task(self._follower.run())
        assert self._follower is not None
        return self._follower

    def _stop_following(self) -> None:
        if self._following:
            self._following.cancel()
        self._follower = self._following = None


def _has_time(phase: Phase) -> bool:
    """False while a guest stands still: that a wait is over is told behind it."""
    return phase not in GUEST_STANDS_STILL
