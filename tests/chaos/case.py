# SPDX-License-Identifier: Apache-2.0
"""One case: a migration, a fault in it, and what became of the guest without anybody's help."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import random
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from godwit.client import AsyncClient
from godwit.errors import GodwitApiError, GodwitClientError
from godwit.models import Migration, MigrationPhase

from services.common.errors import GodwitError
from services.demo.cluster import Cluster, NodeParts
from services.demo.part import Part
from tests.chaos.ground import Ground
from tests.chaos.guests import Guest
from tests.chaos.keeper import Down, Keeper

_T = TypeVar("_T")

POLL_S = 0.02
END_S_MAX = 120.0
STUCK_S = 3.0
"""NEEDS_ATTENTION for so long is where a migration has come to rest."""
SWEEP_S_MAX = 60.0
CLEARED_S_MAX = 60.0


class Outcome(enum.StrEnum):
    """What became of the guest."""

    MOVED = "moved"
    STAYED = "stayed"
    ENDED = "ended"
    """It has shut itself down, and the migration says so."""
    GONE = "gone"
    """Its VMM died, and the failure table says that this is the end of it."""
    ATTENTION = "attention"
    """The migration waits for a person, with the source's memory kept: the table says so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of fault.

    Attributes:
        name: of it, in the result.
        strike: does it, at its moment; runs beside the migration, and is cancelled at its end.
        right: outcomes that are right.
        arm: prepares it before the move is asked for.
        needs: what of the world it takes: "links", "mounts", "clock"; "microvm": of the guest.
        hides_consoles: what is written beside a journal may be lost.
        slow: limits of bulk, MiB/s, so that the post-copy lasts for a while; one is drawn.
    """

    name: str
    strike: Callable[[Case], Coroutine[Any, Any, None]]
    right: frozenset[Outcome]
    arm: Callable[[Case], None] | None = None
    slow: tuple[int, ...] = (0,)
    needs: frozenset[str] = frozenset()
    hides_consoles: bool = False


@dataclass(slots=True, kw_only=True)
class World:
    """What all cases share."""

    cluster: Cluster
    client: AsyncClient
    keeper: Keeper
    guests: list[Guest]
    ground: Ground


@dataclass(slots=True, kw_only=True)
class Result:
    """Of one case. Times in ms; None: there was nothing to measure.

    Attributes:
        recovery_ms: from the peer's return until the migration goes on, or is over.
        restart_ms: from the fork of the new agent until a guest that was held beats again.
        start_ms: the same, from the start of one whose parent was killed as well.
        held_ms: the longest silence of a vCPU in this case, the hand-over's own pause included.
        others_held_ms: the same, of the guests that were not being moved.
    """

    number: int
    seed: int
    kind: str
    detail: str
    guest: str
    struck: bool
    outcome: str
    phases: str
    corrupt: int
    doubled: int
    lost: bool
    recovered: bool
    recovery_ms: float | None
    restart_ms: float | None
    start_ms: float | None
    held_ms: float
    others_held_ms: float
    took_s: float
    trouble: list[str]


@dataclass(slots=True, kw_only=True)
class Case:
    """A case under way.

    Attributes:
        detail: what the fault was, more exactly: a point, a time.
        struck_ns, back_ns: CLOCK_MONOTONIC when the fault struck, and when it was over.
        brief: what lasts for a while lasts a third of it.
        seen: (time, what was seen) of each change of the migration.
    """

    number: int
    seed: int
    kind: Kind
    random: random.Random
    world: World
    guest: Guest
    brief: bool = False
    detail: str = ""
    began_ns: int = 0
    struck_ns: int = 0
    back_ns: int = 0
    ended_ns: int = 0
    migration: Migration | None = None
    seen: list[tuple[int, object]] = field(default_factory=list)
    trouble: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.source_name, self.destination_name = self.guest.node, self.guest.other()

    source_name: str = ""
    destination_name: str = ""

    @property
    def source(self) -> NodeParts:
        """Where the guest is."""
        return self.world.cluster.nodes[self.source_name]

    @property
    def destination(self) -> NodeParts:
        """Where it goes."""
        return self.world.cluster.nodes[self.destination_name]

    @property
    def orchestrator(self) -> Part:
        """It."""
        return self.world.cluster.orchestrator

    def struck(self) -> None:
        """The fault strikes now."""
        self.struck_ns = time.monotonic_ns()

    def back(self) -> None:
        """What it struck is back now."""
        self.back_ns = time.monotonic_ns()

    async def run(self) -> Result:
        """Move the guest, strike, wait, judge."""
        self._clear_hooks()
        for guest in self.world.guests:
            guest.log.open_window()
            guest.log.may_lack = self.kind.hides_consoles and guest.is_heard_on_disk
        self.began_ns = time.monotonic_ns()
        downs_before = len(self.world.keeper.downs)
        self.world.keeper.delay_s = self.random.choice((0.0, 0.1, 0.5))
        if self.kind.arm:
            self.kind.arm(self)
        outcome: Outcome | None = None
        striking = asyncio.create_task(self.kind.strike(self))
        try:
            async with asyncio.timeout(END_S_MAX):
                await self._ask()
                outcome = await self._until_ended()
        except TimeoutError:
            self.trouble.append(f"not over after {END_S_MAX:g} s")
        self.ended_ns = time.monotonic_ns()
        await self._end(striking)
        downs = self.world.keeper.downs[downs_before:]
        if downs and not self.struck_ns:
            self.struck_ns = downs[0].died_ns
        if outcome is not None:
            outcome = await self._settle(outcome)
        return await self._judge(outcome, downs)

    # --- the migration ---

    async def _ask(self) -> None:
        """Ask for the move; a client whose request was lost looks whether it was heard."""
        client, guest = self.world.client, self.guest
        bulk = self.random.choice(self.kind.slow) << 20
        before = {each.migration_id for each in await self._known()}
        while self.migration is None:
            try:
                self.migration = await client.migrate(
                    guest.vm_id, self.destination_name, bulk_bytes_per_s_max=bulk
                )
            except GodwitApiError as error:
                if error.reason != "MIGRATION_ACTIVE" and error.status < 500:
                    raise
            except GodwitClientError:
                pass
            if self.migration is None:
                for each in await self._known():
                    if each.migration_id not in before:
                        self.migration = each
                await asyncio.sleep(POLL_S)

    async def _known(self) -> list[Migration]:
        return await self._try(self.world.client.migrations(self.guest.vm_id)) or []

    async def _until_ended(self) -> Outcome:
        assert self.migration is not None
        resting_since = 0
        while True:
            migration = await self._try(self.world.client.migration(self.migration.migration_id))
            now = time.monotonic_ns()
            if migration is not None:
                self._note(now, migration)
                if migration.is_terminal:
                    return self._outcome(migration)
                if migration.phase != MigrationPhase.NEEDS_ATTENTION:
                    resting_since = 0
                elif not resting_since:
                    resting_since = now
                elif now - resting_since > (STUCK_S / 3 if self.brief else STUCK_S) * 1e9:
                    return Outcome.ATTENTION
            await asyncio.sleep(POLL_S)

    def _note(self, now: int, migration: Migration) -> None:
        counters = migration.counters
        pages = counters.demand_page_count + counters.bulk_page_count if counters else 0
        news = (migration.phase, migration.progress, pages)
        if not self.seen or self.seen[-1][1] != news:
            self.seen.append((now, news))
        self.migration = migration

    def _outcome(self, migration: Migration) -> Outcome:
        if migration.phase == MigrationPhase.SUCCEEDED:
            return Outcome.ENDED if migration.reason == "GUEST_ENDED" else Outcome.MOVED
        return Outcome.STAYED if self.guest.process(self.source_name) else Outcome.GONE

    async def _try(self, call: Awaitable[_T]) -> _T | None:
        """None: the orchestrator does not answer, as it may not."""
        try:
            async with asyncio.timeout(5):
                return await call
        except (GodwitClientError, TimeoutError):
            return None

    # --- afterwards ---

    async def _end(self, striking: asyncio.Task[None]) -> None:
        if not striking.done() and self.struck_ns and not self.back_ns:
            # It takes its fault back by itself, which an end of the migration does not need.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(END_S_MAX):
                    await asyncio.wait({striking})
        striking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            try:
                await striking
            except (GodwitError, OSError) as error:
                self.trouble.append(f"the fault could not strike: {error}")
        self._clear_hooks()
        self.world.ground.set_clocks_right(self.world.cluster)
        try:
            async with asyncio.timeout(END_S_MAX):
                await self.world.keeper.wait_up()
        except TimeoutError:
            self.trouble.append("a part does not come up again")

    async def _settle(self, outcome: Outcome) -> Outcome:
        """Wait until the guest is where it should be, whole, and nothing of it elsewhere."""
        guest = self.guest
        if outcome is Outcome.MOVED:
            guest.node = self.destination_name
        if outcome in (Outcome.ENDED, Outcome.GONE, Outcome.ATTENTION):
            return outcome
        try:
            async with asyncio.timeout(SWEEP_S_MAX):
                await guest.wait_beat(self.ended_ns)
        except TimeoutError:
            return Outcome.GONE
        try:
            async with asyncio.timeout(CLEARED_S_MAX):
                while not guest.is_cleared(guest.other()):  # noqa: ASYNC110 - a journal
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            self.trouble.append(f"{guest.other()} still holds: {guest.record(guest.other())}")
        return outcome

    async def _verified(self, guest: Guest) -> int:
        """Errors that a guest finds in its memory."""
        try:
            async with asyncio.timeout(SWEEP_S_MAX):
                sweep = await guest.sweep()
        except (GodwitError, TimeoutError) as error:
            self.trouble.append(f"{guest.vm_id} on {guest.node}: no sweep: {error!r}")
            return 0
        if sweep.pages != guest.page_count:
            self.trouble.append(
                f"{guest.vm_id}: {sweep.pages} pages of {guest.page_count} verified"
            )
        return sweep.errors

    async def _judge(self, outcome: Outcome | None, downs: list[Down]) -> Result:
        corrupt = doubled = missing = 0
        for guest in self.world.guests:
            alive = guest is not self.guest or outcome in (Outcome.MOVED, Outcome.STAYED)
            if alive and (guest.is_swept_beside or guest is self.guest):
                corrupt += await self._verified(guest)
            guest.log.poll()
            doubled += guest.log.window.doubled
            missing += guest.log.window.missing
            self.trouble += guest.log.trouble
        right = outcome is not None and outcome in self.kind.right
        if not right:
            self.trouble.append(f"outcome {outcome}, right would be {sorted(self.kind.right)}")
        if missing:
            self.trouble.append(f"{missing} beats are missing")
        others = [guest for guest in self.world.guests if guest is not self.guest]
        return Result(
            number=self.number,
            seed=self.seed,
            kind=self.kind.name,
            detail=self.detail,
            guest=self.guest.vm_id,
            struck=bool(self.struck_ns),
            outcome=str(outcome),
            phases=self._phases(),
            corrupt=corrupt,
            doubled=doubled,
            lost=outcome is Outcome.GONE and Outcome.GONE not in self.kind.right,
            recovered=right and not self.trouble,
            recovery_ms=self._recovery_ms(downs),
            restart_ms=self._restart_ms(downs, forked=True),
            start_ms=self._restart_ms(downs, forked=False),
            held_ms=self.guest.log.window.held_ns / 1e6,
            others_held_ms=max((g.log.window.held_ns / 1e6 for g in others), default=0.0),
            took_s=(time.monotonic_ns() - self.began_ns) / 1e9,
            trouble=self.trouble,
        )

    def _phases(self) -> str:
        if self.migration is None:
            return ""
        return " ".join(
            [step.phase for step in self.migration.transitions]
            + [self.migration.reason, self.migration.message]
        ).strip()

    def _recovery_ms(self, downs: list[Down]) -> float | None:
        back = self.back_ns or max((down.spawned_ns for down in downs), default=0)
        if not self.struck_ns or not back or back >= self.ended_ns:
            return None
        after = [t_ns for t_ns, _ in self.seen if t_ns > back]
        return (min([*after, self.ended_ns]) - back) / 1e6

    def _restart_ms(self, downs: list[Down], *, forked: bool) -> float | None:
        if not self.guest.tells_restarts:
            return None
        spans = [
            span
            for down in downs
            if down.part == f"{self.destination_name}.agent" and down.spawned_ns
            if down.forked is forked
            if (span := self.guest.log.went_on_after(down.spawned_ns)) is not None
        ]
        return max(spans) / 1e6 if spans else None

    def _clear_hooks(self) -> None:
        """File by file: a service may be touching one in this very directory."""
        for part in self.world.cluster.parts:
            for path in part.hooks.directory.iterdir():
                path.unlink(missing_ok=True)
