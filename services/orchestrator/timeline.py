# SPDX-License-Identifier: Apache-2.0
"""What happens to a migration, in words, for whoever asks afterwards.

An event is told once, durable where the store can be written and kept in memory until it can where
not: a timeline never stops a move. Nothing is decided by an event, nor by the time in it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace

from godwit.agent.v1 import fault_agent_service_pb2 as agent_pb2
from godwit.common.v1 import common_pb2

from services.orchestrator.migration import (
    ARRIVING,
    CancelRequested,
    CommitRefused,
    GuestEnded,
    Noted,
    Phase,
)
from services.orchestrator.store import Store, StoreError
from services.orchestrator.store.rows import EventRow, MigrationRow

log = logging.getLogger(__name__)

PENDING_MAX = 50
"""Events that wait for the store; the oldest ones are kept."""

_ACTIONS: dict[Phase, str] = {
    Phase.POSTCOPY_PAUSED: "the guest waits on what it touches; the destination keeps trying, "
    "at most a second apart",
    Phase.ROLLING_BACK: "the destination is cleared, the guest runs on at its source",
    Phase.CANCELLING: "the destination is cleared, the guest runs on at its source",
    Phase.NEEDS_ATTENTION: "nothing is freed and nothing is started; it goes on by itself if the "
    "evidence changes",
    Phase.FINALIZING: "the source's memory is released",
}

_CAUSES: dict[int, str] = {
    common_pb2.HOLD_CAUSE_LINK_LOST: "the link was lost",
    common_pb2.HOLD_CAUSE_PAGE_SERVER: "the page server was away",
    common_pb2.HOLD_CAUSE_AGENT_RESTART: "the destination's agent was away",
    common_pb2.HOLD_CAUSE_NO_MEMORY: "the destination had no memory for a page",
}


def seconds(nanoseconds: int) -> str:
    """A time for people."""
    if nanoseconds < 1_000_000_000:
        return f"{nanoseconds / 1e6:.0f} ms"
    return f"{nanoseconds / 1e9:.1f} s"


def of_transition(phase: Phase, event: object, evidence: Iterable[str]) -> EventRow | None:
    """What entering `phase` by `event` is worth telling; None: the history says it all."""
    if not isinstance(event, Noted):
        return None
    action = _ACTIONS.get(phase, "")
    if isinstance(event, CancelRequested | CommitRefused):
        action = _ACTIONS[Phase.CANCELLING]
    if isinstance(event, GuestEnded):
        action = "it needs no memory any more: the move is over, and the source's memory released"
    return EventRow(
        kind=event.reason,
        message=event.message,
        action=action,
        hint=event.hint,
        evidence=tuple(evidence) if phase is Phase.NEEDS_ATTENTION else (),
    )


def of_hold(node: str, hold: common_pb2.Hold) -> EventRow:
    """An outage is over."""
    held = (
        f"the guest was held for {seconds(hold.held_ns)}"
        if hold.held_ns
        else "the guest touched nothing that was absent"
    )
    bound = "at most " if hold.cause == common_pb2.HOLD_CAUSE_AGENT_RESTART and hold.held_ns else ""
    return EventRow(
        kind="RECOVERED",
        node=node,
        message=f"pages come again: {_CAUSES.get(hold.cause, 'no page could be had')} for "
        f"{seconds(hold.outage_ns)}; {held.replace('held for ', f'held for {bound}')}",
        duration_ns=hold.outage_ns,
        held_ns=hold.held_ns,
    )


def of_incarnation(row: MigrationRow, evidence: agent_pb2.Evidence) -> EventRow:
    """A node's agent is another process than the one that was heard before."""
    arriving = evidence.node == row.destination_node and row.phase in ARRIVING
    return EventRow(
        kind="AGENT_RESTARTED",
        node=evidence.node,
        message=f"the agent of {evidence.node} was restarted"
        + (", and takes the arrival up again" if arriving else ""),
        action="the faults that waited are served first" if arriving else "",
    )


WARN_S = 7 * 86400
"""From so long before its end a certificate is spoken of, as services.common.tls does."""


def of_certificates(node: str, left_s: float | None, *, is_by_pin: bool) -> list[EventRow]:
    """What to say of a peer's certificate. `node`: empty for our own; `left_s`: None: unknown."""
    whose = f"the certificate of {node or 'the orchestrator'}"
    hint = "renew it: files that are replaced are taken within a second, without a restart"
    events = []
    if left_s is not None and left_s <= 0:
        events.append(
            EventRow(
                kind="CERTIFICATE_ENDED",
                node=node,
                message=f"{whose} has ended",
                action="who has met goes on, by connections that live and by pinned keys",
                hint=hint,
            )
        )
    elif left_s is not None and left_s <= WARN_S:
        events.append(
            EventRow(
                kind="CERTIFICATE_ENDS_SOON",
                node=node,
                message=f"{whose} ends in {left_s / 3600:.0f} h",
                hint=hint,
            )
        )
    if is_by_pin:
        events.append(
            EventRow(
                kind="PEER_BY_PIN",
                node=node,
                message=f"{node} is known by its pinned key alone: a certificate, its or the"
                " orchestrator's, or a clock does not let them speak otherwise",
                action="commands go on",
                hint="renew certificates, and look at both clocks",
            )
        )
    return events


def describe(node: str, evidence: agent_pb2.Evidence | None) -> str:
    """What a node can prove, in a line."""
    if evidence is None:
        return f"{node}: does not answer"
    marks = ", ".join(
        f"{name} {epoch}"
        for name, epoch in (
            ("PREPARED", evidence.epoch_prepared),
            ("LOADED", evidence.epoch_loaded),
            ("ACTIVATING", evidence.epoch_activating),
            ("MEMORY_COMPLETE", evidence.epoch_memory_complete),
            ("SEALED", evidence.epoch_sealed),
        )
        if epoch
    )
    role = agent_pb2.VmRole.Name(evidence.role).removeprefix("VM_ROLE_").lower()
    state = agent_pb2.VmmState.Name(evidence.vmm_state).removeprefix("VMM_STATE_").lower()
    parts = [
        f"{node}: {role}, its VMM is {state}" + (" (frozen)" if evidence.frozen else ""),
        f"marks {marks}" if marks else "no marks",
    ]
    if evidence.retained_bytes:
        parts.append(f"keeps {evidence.retained_bytes >> 20} MiB of the guest's memory")
    if evidence.HasField("counters"):
        parts.append(f"{evidence.counters.absent_count} pages are absent")
    return "; ".join(parts)


class Timeline:
    """The events of one migration in hand."""

    def __init__(
        self,
        store: Store,
        migration_id: str,
        now_ns: Callable[[], int],
        told: Callable[[MigrationRow], None],
    ) -> None:
        self._store = store
        self._migration_id = migration_id
        self._now_ns = now_ns
        self._told = told
        self._pending: deque[EventRow] = deque()
        self._flushing = asyncio.Lock()
        """The mover and its follower tell; what is pending is written in order, once."""
        self._wait: tuple[str, str] | None = None
        self._waits_since = 0.0

    def stamp(self, event: EventRow | None) -> EventRow | None:
        """With the time at which it is noticed."""
        return replace(event, at_ns=self._now_ns()) if event else None

    async def tell(self, event: EventRow) -> None:
        """Write an event, now or as soon as the store can be written."""
        if len(self._pending) < PENDING_MAX:
            self._pending.append(replace(event, at_ns=self._now_ns()))
        await self.flush()

    async def flush(self) -> None:
        """Write what is still to be written."""
        async with self._flushing:
            while self._pending:
                event = self._pending[0]
                try:
                    row = await self._store.migrations.add_event(self._migration_id, event)
                except StoreError as error:
                    log.warning("migration %s: event not written: %s", self._migration_id, error)
                    return
                self._pending.popleft()
                self._told(row)

    async def waits(self, reason: str, message: str, hint: str, node: str) -> None:
        """A step cannot go on. Told once for each reason, however often it is said."""
        if self._wait is not None and self._wait[0] == reason:
            return
        if self._wait is None:
            self._waits_since = asyncio.get_running_loop().time()
        self._wait = (reason, node)
        await self.tell(
            EventRow(kind=reason, node=node, message=message, action="tried again", hint=hint)
        )

    async def goes_on(self) -> None:
        """What was waited for has come."""
        if self._wait is None:
            return
        (reason, node), self._wait = self._wait, None
        waited_ns = int((asyncio.get_running_loop().time() - self._waits_since) * 1e9)
        await self.tell(
            EventRow(
                kind="GOES_ON",
                node=node,
                message=f"{reason} is over after {seconds(waited_ns)}",
                duration_ns=waited_ns,
            )
        )
