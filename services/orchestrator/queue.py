# SPDX-License-Identifier: Apache-2.0
"""The live queue: looks at the store and the nodes, lets the schedule choose, writes what it chose.

Level-triggered: each look begins from what the store says, so that a new leader goes on where the
last one stopped, and a token whose migration is over is free whoever noticed.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from services.common.vm_spec import VmSpec
from services.orchestrator.bitmaps import Bitmaps
from services.orchestrator.changes import Changes
from services.orchestrator.looker import Looker
from services.orchestrator.metrics import Metrics
from services.orchestrator.migration import PAST_COMMIT, Phase
from services.orchestrator.nodes import NodeStatus
from services.orchestrator.scheduling.breaker import Caution, Outcome, Trouble, trouble
from services.orchestrator.scheduling.limits import Kind, arrival_keys, departure_keys
from services.orchestrator.scheduling.model import (
    NodeView,
    Placing,
    Priority,
    Request,
    Rules,
    VmView,
)
from services.orchestrator.scheduling.policy import Settings
from services.orchestrator.scheduling.schedule import Schedule, Wait
from services.orchestrator.store import Store, StoreError
from services.orchestrator.store.rows import MigrationRow, NodeRow
from services.orchestrator.store.schedule import (
    AdmissionRow,
    Grant,
    Snapshot,
    VmSettings,
    Waiting,
)

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""At the latest so often: back-offs end, and breakers close, without anybody telling."""
RECHECK_S = 10.0
"""A migration that waits looks for itself so often."""
COUNT_NS = 15_000_000_000
"""So often metrics are brought up to date while nothing waits."""
GATHER_S = 0.005
"""What changes at the same moment is looked at together."""
ROOM_UNKNOWN = 1 << 62
"""Bytes that a node offers whose agent does not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """The fleet as of one moment, ready to be scheduled."""

    schedule: Schedule
    vms: dict[str, VmView]
    trouble: Trouble
    snapshot: Snapshot


async def _at_once() -> None:
    """Of nodes of which nobody has to be asked."""


def _seconds(ns: int) -> float:
    return ns / 1e9


class Queue:
    """Who is admitted when. `status_of` has to be told before it runs."""

    def __init__(
        self,
        store: Store,
        bitmaps: Bitmaps,
        changes: Changes,
        metrics: Metrics,
        now_ns: Callable[[], int],
        *,
        rules: Rules | None = None,
        caution: Caution | None = None,
    ) -> None:
        self._store = store
        self._bitmaps = bitmaps
        self._changes = changes
        self._metrics = metrics
        self._now_ns = now_ns
        self._rules = rules or Rules()
        self.caution = caution or Caution()
        self._looker = Looker(
            self.look, look_s=LOOK_S, gather_s=GATHER_S, log=log, what="the queue"
        )
        self._admitted: dict[str, asyncio.Event] = {}
        self._granted: dict[str, MigrationRow] = {}
        """As they were admitted; until their movers have heard."""
        self._waits: dict[str, Wait] = {}
        self._counted_ns = 0
        self.status_of: Callable[[str], NodeStatus] = lambda _name: NodeStatus()
        changes.on_publish.append(lambda _subject: self.wake())
        self.view: Callable[[], Awaitable[None]] = _at_once
        """Returns once `status_of` is of this time."""

    # --- for movers ---

    async def admitted(self, migration_id: str, *, found: bool) -> MigrationRow | None:
        """Wait until a migration may go; None where it never had to wait in a queue.

        `found`: it is not of this process: it may have been admitted already, or never queued.
        """
        event = self._admitted.setdefault(migration_id, asyncio.Event())
        try:
            while True:
                if granted := self._granted.pop(migration_id, None):
                    return granted
                if not found:
                    self.wake()
                    try:
                        async with asyncio.timeout(RECHECK_S):
                            await event.wait()
                    except TimeoutError:
                        found = True  # an admission whose writing failed may have been written
                    event.clear()
                    continue
                try:
                    admission, row = await self._store.schedule.granted(migration_id)
                except StoreError as error:
                    # It waits anyway, and holds nothing.
                    log.warning("migration %s: admission not readable: %s", migration_id, error)
                    await asyncio.sleep(LOOK_S)
                    continue
                if admission is None:
                    return None
                if admission.admitted_at_ns:
                    return row
                found = False
        finally:
            self._admitted.pop(migration_id, None)
            self._waits.pop(migration_id, None)

    async def settings(self, migration_id: str) -> Settings:
        """What the policies said of it when it was asked for."""
        admission = await self._store.schedule.admission(migration_id)
        return admission.settings if admission else Settings()

    def wait_of(self, migration_id: str) -> Wait | None:
        """What holds a migration, as of the last look."""
        return self._waits.get(migration_id)

    # --- looking ---

    def wake(self) -> None:
        """Something changed: look."""
        self._looker.wake()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Look, again and again, for the length of the block: of this process' leading."""
        self._granted.clear()
        try:
            async with self._looker.running():
                yield
        finally:
            self._waits.clear()
            self._metrics.forget_schedule()

    async def look(self) -> list[MigrationRow]:
        """Admit what can go now; those that went."""
        snapshot = await self._store.schedule.snapshot_if_any_waits()
        if snapshot is None:
            self._waits.clear()
            await self._count_idle()
            return []
        await self.view()
        fleet = self._fleet(snapshot)
        now_ns = self._now_ns()
        chosen = fleet.schedule.admit(_seconds(now_ns))
        under_way = {row.migration_id for row, _keys in snapshot.running}
        self._granted = {key: row for key, row in self._granted.items() if key in under_way}
        went: list[MigrationRow] = []
        class_of = {each.request.request_id: each.request.priority for each in chosen}
        if chosen:
            grants = [
                Grant(
                    migration_id=each.request.request_id,
                    target=each.target,
                    because=each.because,
                    keys=each.keys,
                )
                for each in chosen
            ]
            went = await self._store.schedule.admit(grants, now_ns=now_ns)
        for row in went:
            log.info("migration %s may go to %s", row.migration_id, row.destination_node)
            priority = class_of[row.migration_id].name.lower()
            self._metrics.admissions.labels(priority).inc()
            self._metrics.queue_wait_seconds.observe(_seconds(max(now_ns - row.created_at_ns, 0)))
            self._granted[row.migration_id] = row
            self._changes.publish(row.migration_id)
            if event := self._admitted.get(row.migration_id):
                event.set()
        self._waits = {
            wait.request.request_id: wait for wait in fleet.schedule.waiting(_seconds(now_ns))
        }
        self._count(fleet, now_ns)
        return went

    async def _count_idle(self) -> None:
        """Now and then: what is under way goes on, back-offs end and breakers close."""
        now_ns = self._now_ns()
        if abs(now_ns - self._counted_ns) >= COUNT_NS:
            self._count(await self.fleet(), now_ns)

    def _count(self, fleet: Fleet, now_ns: int) -> None:
        """For metrics: what the schedule knows as of this look."""
        self._counted_ns = now_ns
        metrics, schedule = self._metrics, fleet.schedule
        depth = Counter(wait.request.priority for wait in self._waits.values())
        for priority in Priority:
            metrics.queue_depth.labels(priority.name.lower()).set(depth[priority])
        metrics.queue_held.clear()
        for reason, count in Counter(wait.reason for wait in self._waits.values()).items():
            metrics.queue_held.labels(reason).set(count)
        metrics.frozen.set(bool(fleet.snapshot.frozen))
        metrics.backing_off.set(len(fleet.trouble.not_before_s))
        metrics.breaker_open.clear()
        metrics.reserved_bytes.clear()
        for name in fleet.trouble.broken_until_s:
            metrics.breaker_open.labels(name).set(1)
        for name, node in schedule.nodes.items():
            if node.booked_bytes > 0:
                metrics.reserved_bytes.labels(name).set(node.booked_bytes)
        used: Counter[Kind] = Counter()
        for keys in schedule.ledger.holders().values():
            used.update(Kind(key.partition(":")[0]) for key in keys)
        for kind in Kind:
            metrics.tokens.labels(kind, "held").set(used[kind])
            metrics.tokens.labels(kind, "limit").set(schedule.limits.of(kind))

    async def waiting(self) -> tuple[list[tuple[Wait, Waiting]], Snapshot]:
        """Everything that waits, in order, as of now."""
        fleet = await self.fleet()
        by_id = {each.migration.migration_id: each for each in fleet.snapshot.waiting}
        waits = fleet.schedule.waiting(_seconds(self._now_ns()))
        return [(each, by_id[each.request.request_id]) for each in waits], fleet.snapshot

    async def fleet(self) -> Fleet:
        """Everything that the schedule has to know, as of now."""
        await self.view()
        return self._fleet(await self._store.schedule.snapshot())

    def _fleet(self, snapshot: Snapshot) -> Fleet:
        now_s = _seconds(self._now_ns())
        found = trouble(_outcomes(snapshot.recent), now_s, self.caution)
        schedule = Schedule(snapshot.limits, self._rules, bool(snapshot.frozen))
        for node in snapshot.fleet:
            schedule.add_node(self._node(node, snapshot, found))
        for name, until_s in found.broken_until_s.items():
            if name in schedule.nodes:
                schedule.open_breaker(name, until_s)
        vms = {home[0]: _vm(home, snapshot) for home in snapshot.homes}
        for vm in vms.values():
            if vm.node in schedule.nodes:
                schedule.nodes[vm.node].house(vm)
        for migration, keys in snapshot.running:
            self._start(schedule, migration, keys, vms)
        for each in snapshot.waiting:
            waits = vms.get(each.migration.vm_id)
            if waits is not None:
                schedule.put(_request(each, waits, found, snapshot))
        return Fleet(schedule=schedule, vms=vms, trouble=found, snapshot=snapshot)

    def _node(self, row: NodeRow, snapshot: Snapshot, found: Trouble) -> NodeView:
        status, said = self.status_of(row.name), snapshot.nodes.get(row.name)
        can = status.capabilities
        available = can.memory_available_bytes if can else 0
        return NodeView(
            name=row.name,
            memory_available_bytes=available or ROOM_UNKNOWN,
            memory_total_bytes=(can.memory_total_bytes if can else 0) or ROOM_UNKNOWN,
            reachable=status.reachable,
            drivers=frozenset(can.drivers) if can else None,
            link=said.link if said else "",
            labels=said.labels if said else {},
            taints=said.taints if said else frozenset(),
            draining=bool(said and said.closed_by),
            failures=found.failures.get(row.name, 0),
        )

    def _start(
        self,
        schedule: Schedule,
        row: MigrationRow,
        keys: tuple[str, ...],
        vms: dict[str, VmView],
    ) -> None:
        """What is under way holds its tokens, and the room that it has not filled yet."""
        vm = vms.get(row.vm_id)
        if vm is None:
            return
        if not keys:  # written before there was a queue
            here = schedule.nodes.get(row.source_node)
            there = schedule.nodes.get(row.destination_node)
            links = (here.link if here else "", there.link if there else "")
            keys = departure_keys(row.source_node, vm.placing.group)
            keys += arrival_keys(row.destination_node, *links)
        arrived = 0.0
        if row.phase in PAST_COMMIT:
            bitmap = self._bitmaps.get(row.vm_id, row.epoch)
            arrived = bitmap.resident_share if bitmap else 0.0
        left = VmView(
            vm_id=vm.vm_id,
            node=row.source_node,
            memory_bytes=int(vm.memory_bytes * (1 - arrived)),
            # Past the decision it is counted where it is.
            placing=vm.placing if vm.node == row.source_node else Placing(),
        )
        request = Request(request_id=row.migration_id, vm=left, created_s=0.0)
        schedule.start(request, row.destination_node, keys, "")


@functools.lru_cache(maxsize=4096)
def _driver(spec_json: str) -> str:
    return VmSpec.parse(spec_json).driver


_PLAIN = VmSettings()


def _vm(home: tuple[str, str, int], snapshot: Snapshot) -> VmView:
    vm_id, node, memory_bytes = home
    said = snapshot.vms.get(vm_id, _PLAIN)
    spec = snapshot.specs.get(vm_id)
    return VmView(
        vm_id=vm_id,
        node=node,
        memory_bytes=memory_bytes,
        driver=_driver(spec) if spec else "",
        placing=said.placing,
        labels=said.labels,
    )


def _outcomes(recent: list[MigrationRow]) -> list[Outcome]:
    """A cancel says nothing about nodes; what was never placed, neither."""
    return [
        Outcome(
            vm_id=row.vm_id,
            source=row.source_node,
            target=row.destination_node,
            ended_s=_seconds(row.ended_at_ns),
            ok=row.phase is Phase.SUCCEEDED,
        )
        for row in recent
        if row.phase is not Phase.CANCELLED and row.destination_node
    ]


def _request(each: Waiting, vm: VmView, found: Trouble, snapshot: Snapshot) -> Request:
    row, admission = each.migration, each.admission
    asked = admission or AdmissionRow(
        migration_id=row.migration_id,
        priority=Priority.USER,
        target=row.destination_node,
        operation_id="",
        settings=Settings(),
        policies=(),
    )
    paused = asked.operation_id in snapshot.paused
    # Somebody who names a node knows better, and need not wait; who has failed there does.
    again = asked.attempt > 1
    waits = asked.operation_id or not asked.target or again
    return Request(
        request_id=row.migration_id,
        vm=vm,
        created_s=_seconds(row.created_at_ns),
        priority=asked.priority,
        target=asked.target,
        avoid=found.avoid.get(vm.vm_id, frozenset()),
        not_before_s=found.not_before_s.get(vm.vm_id, 0.0) if waits else 0.0,
        unfinished=again,
        paused=f"operation {asked.operation_id} is paused" if paused else "",
    )
