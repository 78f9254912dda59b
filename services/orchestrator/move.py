# SPDX-License-Identifier: Apache-2.0
"""One migration in hand: its row, its two agents, and how doubt about them is settled."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from godwit.common.v1 import common_pb2

from services.common.errors import GodwitError
from services.common.grpc_client import NotExecutedError, outcome_unknown
from services.orchestrator.agents import AgentClient, AgentPool
from services.orchestrator.bitmaps import Bitmaps
from services.orchestrator.changes import Changes
from services.orchestrator.doubt import Doubt
from services.orchestrator.election import Role
from services.orchestrator.evidence import Evidence, Judgement, Verdict, judge, wire_decision
from services.orchestrator.fetch_tokens import FetchTokens
from services.orchestrator.homes import Homes, NoHomes
from services.orchestrator.metrics import Metrics
from services.orchestrator.migration import Event, StepFailed
from services.orchestrator.residency import Residency
from services.orchestrator.scheduling.policy import Settings
from services.orchestrator.store import PhaseLostError, Store, StoreError
from services.orchestrator.store.rows import MigrationRow
from services.orchestrator.timeline import Timeline, of_certificates, of_incarnation

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_U = TypeVar("_U")


class Admissions(Protocol):
    """Who says when a migration may go."""

    async def admitted(self, migration_id: str, *, found: bool) -> MigrationRow | None:
        """Wait until it may; None where there is no queue that it waits in."""

    async def settings(self, migration_id: str) -> Settings:
        """What the policies said of it."""


class NoQueue:
    """Everything goes at once."""

    async def admitted(
        self,
        migration_id: str,  # noqa: ARG002
        *,
        found: bool,  # noqa: ARG002
    ) -> MigrationRow | None:
        """See Admissions."""
        return None

    async def settings(self, migration_id: str) -> Settings:  # noqa: ARG002
        """See Admissions."""
        return Settings()


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How long things may take. Seconds. Past the decision they raise alarms and nothing else."""

    queue_s: float = 900.0
    """In the queue: then an alarm, and no more than that."""
    validating_s: float = 30.0
    preparing_s: float = 120.0
    patience_s: float = 10.0
    """How long a step before the pause goes on trying an agent that cannot be reached."""
    switchover_s: float = 15.0
    """From Pause until LOADED; then the source gets its guest back."""
    doubt_s: float = 2.0
    """While the guest is paused: how long to wait for an agent that does not answer."""
    destination_proof_s: float = 5.0
    """After ABORTED: how long the source waits for the proof that the shell is dead. Without an
    answer it goes on: the store says ABORTED, so no Activate was or will ever be sent, and the
    shell was loaded paused. The proof stays owed and is collected later."""
    seal_delay_s: float = 0.2
    """How long Seal waits for the first answer to Activate."""
    alarm_s: float = 30.0
    retry_s_min: float = 0.05
    retry_s_max: float = 1.0
    """A guest may stand still meanwhile: what a cut held up goes on so soon after the return."""
    progress_ms: int = 250
    progress_write_s: float = 0.5
    source_check_s: float = 2.0
    """How often a lost link makes us ask whether the source still has the memory."""
    beat_s: float = 1.0
    """How often each node is asked whether it is there."""
    poll_s: float = 3.0
    """How often each node is asked what runs there."""
    settle_s: float = 5.0
    """How often starts and stops without an answer, and owed proofs, are tried again."""
    drain_s: float = 5.0
    """At SIGTERM: how long a guest that stands still may take to run on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What all migrations share."""

    store: Store
    doubt: Doubt
    agents: AgentPool
    bitmaps: Bitmaps
    metrics: Metrics
    changes: Changes = field(default_factory=Changes)
    residency: Residency = field(default_factory=Residency)
    queue: Admissions = field(default_factory=NoQueue)
    homes: Homes = field(default_factory=NoHomes)
    limits: Limits = field(default_factory=Limits)
    role: Role = field(default_factory=Role)
    fetch_tokens: FetchTokens = field(default_factory=FetchTokens)
    now_ns: Callable[[], int] = time.time_ns
    """Wall clock."""
    random: random.Random = field(default_factory=random.Random)

    def backoff(self) -> Iterator[float]:
        """Seconds to wait before each further attempt: doubling, jittered, for ever."""
        delay_s = self.limits.retry_s_min
        while True:
            yield delay_s * self.random.uniform(0.75, 1.25)
            delay_s = min(delay_s * 2, self.limits.retry_s_max)


async def both(first: Awaitable[_T], second: Awaitable[_U]) -> tuple[_T, _U]:
    """Wait for both, whatever the other does; then raise what the first one that failed raised."""
    one, two = await asyncio.gather(first, second, return_exceptions=True)
    if isinstance(one, BaseException):
        raise one
    if isinstance(two, BaseException):
        raise two
    return one, two


class HappenedError(Exception):
    """Evidence shows that a step is over already, or cannot succeed; `event` says which."""

    def __init__(self, event: Event) -> None:
        super().__init__(type(event).__name__)
        self.event = event


class Move:
    """A migration in hand."""

    def __init__(self, context: Context, row: MigrationRow) -> None:
        self.context = context
        self.row = row
        self.pause_sent_ns: int | None = None
        """Monotonic. None: not by this process."""
        self.ran_ns = 0
        """How long, since then, the guest ran before it was stopped and after it went on."""
        self.destination_key = b""
        """By which its page lanes may be pinned; empty: not heard, or no TLS."""
        self.activation_tried = asyncio.Event()
        """The destination has answered, or not, or it is past that: the source may be sealed."""
        self._counted: set[str] = set()
        self.last_evidence: dict[str, Evidence | None] = {}
        """By node, from the last time both were asked; None: it did not answer."""
        self._incarnations: dict[str, str] = {}
        self._certificates_told: set[tuple[str, str]] = set()
        """(node, kind) of what was said of certificates, by this process."""
        self.timeline = Timeline(context.store, row.migration_id, context.now_ns, self._told)

    @property
    def limits(self) -> Limits:
        """Shorthand."""
        return self.context.limits

    @property
    def source(self) -> AgentClient:
        """The source's agent."""
        return self.context.agents.get(self.row.source_node)

    @property
    def destination(self) -> AgentClient:
        """The destination's agent."""
        return self.context.agents.get(self.row.destination_node)

    def fence(self, *, epoch: int | None = None) -> common_pb2.Fence:
        """By which right a command is given: the decision is what was read back last."""
        return common_pb2.Fence(
            vm_id=self.row.vm_id,
            epoch=self.row.epoch if epoch is None else epoch,
            migration_id=self.row.migration_id,
            decision=wire_decision(self.row),
        )

    async def ask(self) -> Judgement:
        """Ask both agents for evidence and judge it.

        Raises:
            PhaseLostError: it was decided by somebody else.
        """
        agents, row = self.context.agents, self.row
        source, destination = await both(
            agents.describe(row.source_node, row.vm_id),
            agents.describe(row.destination_node, row.vm_id),
        )
        self.last_evidence = {row.source_node: source, row.destination_node: destination}
        for evidence in (source, destination):
            if evidence is not None:
                await self._hear_incarnation(evidence)
        await self.tell_of_certificates()
        last_epoch = await self.context.store.fleet.last_epoch(row.vm_id)
        judgement = judge(row, source, destination, last_epoch=last_epoch)
        if judgement.verdict is Verdict.FREEZE or judgement.invariants:
            # Another orchestrator may have decided meanwhile: then only this process is behind.
            await self.reload()
            if wire_decision(self.row) != wire_decision(row):
                raise PhaseLostError(
                    "PHASE_LOST", f"migration {row.migration_id} is {self.row.phase} already"
                )
        if judgement.verdict is Verdict.FREEZE:
            self.context.doubt.found(judgement.message)
        for invariant in judgement.invariants:
            self.violated(invariant, judgement.message or f"evidence in phase {row.phase}")
        return judgement

    async def _hear_incarnation(self, evidence: Evidence) -> None:
        before = self._incarnations.get(evidence.node)
        self._incarnations[evidence.node] = evidence.incarnation
        if before not in (None, evidence.incarnation):
            await self.timeline.tell(of_incarnation(self.row, evidence))

    async def tell_of_certificates(self) -> None:
        """Say once what is to be said of those that this move needs. It decides nothing."""
        agents = self.context.agents
        if not agents.speaks_tls:
            return
        now_s = self.context.now_ns() / 1e9
        events = of_certificates("", agents.own_certificate_left_s(), is_by_pin=False)
        for client in (self.source, self.destination):
            ends_s = client.certificate_ends_unix_s
            left_s = ends_s - now_s if ends_s else None
            events += of_certificates(client.node, left_s, is_by_pin=client.is_by_pin)
        for event in events:
            if (event.node, event.kind) not in self._certificates_told:
                self._certificates_told.add((event.node, event.kind))
                await self.timeline.tell(event)

    def _told(self, row: MigrationRow) -> None:
        self.take(row)
        self.context.changes.publish(row.migration_id)

    def violated(self, invariant: str, what: str) -> None:
        """Count a broken invariant, once for each migration and process."""
        if invariant not in self._counted:
            self._counted.add(invariant)
            self.context.metrics.invariant_violations.labels(invariant).inc()
            log.error(
                "invariant %s broken by migration %s: %s", invariant, self.row.migration_id, what
            )

    async def attempt(
        self, call: Callable[[], Awaitable[_T]], *, patience_s: float, settle: bool = False
    ) -> _T:
        """Give a command before the decision until it is answered.

        An answer that refuses is final. No answer is no "no" (I8): both agents are asked, and
        unless they say that the step is over the command is given again: at least once, and for
        `patience_s` after the first failure. With `settle` also a retryable refusal is final: the
        guest stands still.

        Raises:
            HappenedError: evidence has overtaken the command.
            GodwitError: it was refused, or patience ended.
        """
        loop = asyncio.get_running_loop()
        until = 0.0
        for delay_s in self.context.backoff():
            try:
                return await call()
            except GodwitError as error:
                unanswered = outcome_unknown(error) or isinstance(error, NotExecutedError)
                if not unanswered and (settle or not error.retryable):
                    raise
                judgement = await self.ask()
                if judgement.event:
                    raise HappenedError(judgement.event) from error
                if until and loop.time() >= until:
                    raise
                until = until or loop.time() + patience_s
                await self.wait_for(error.reason, error.message, error.hint)
            await asyncio.sleep(delay_s)
        raise AssertionError  # the back-off never ends

    async def settled(self, *, patience_s: float) -> Event | None:
        """On finding a migration half done: what evidence says, None: perform the phase."""
        until = asyncio.get_running_loop().time() + patience_s
        for delay_s in self.context.backoff():
            judgement = await self.ask()
            if judgement.verdict in (Verdict.EVENT, Verdict.PERFORM):
                return judgement.event
            await self.wait_for(judgement.reason, judgement.message)
            if asyncio.get_running_loop().time() >= until:
                return StepFailed(reason=judgement.reason, message=judgement.message)
            await asyncio.sleep(delay_s)
        raise AssertionError

    async def wait_for(self, reason: str, message: str, hint: str = "", node: str = "") -> None:
        """Say what the present step waits for."""
        if (self.row.wait_reason, self.row.wait_message) != (reason, message):
            log.warning("migration %s waits: %s: %s", self.row.migration_id, reason, message)
            try:
                await self.record(wait_reason=reason, wait_message=message, wait_hint=hint)
            except StoreError as error:  # a note never stops a move
                log.warning("migration %s: not noted: %s", self.row.migration_id, error)
        await self.timeline.waits(reason, message, hint, node or self._node_of(reason))

    def _node_of(self, reason: str) -> str:
        """The node that a wait of the evidence table is about."""
        if reason.startswith("DESTINATION"):
            return self.row.destination_node
        return self.row.source_node if reason.startswith("SOURCE") else ""

    async def record(self, **fields: Any) -> None:
        """Write fields that do not change the phase."""
        self.take(await self.context.store.migrations.record(self.row.migration_id, **fields))
        self.context.changes.publish(self.row.migration_id)

    def take(self, row: MigrationRow) -> None:
        """Go on with `row` unless a newer one is in hand: several tasks write notes."""
        if row.version >= self.row.version:
            self.row = row

    async def reload(self) -> None:
        """Read the row again."""
        row = await self.context.store.migrations.get(self.row.migration_id)
        assert row is not None  # migrations are never deleted
        self.take(row)
