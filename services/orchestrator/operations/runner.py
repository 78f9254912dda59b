# SPDX-License-Identifier: Apache-2.0
"""Makes operations go on: looks at what is true, takes the step that follows, writes it down."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import replace

from services.common.errors import GodwitError, NotFoundError
from services.orchestrator.events.model import Kind as EventKind
from services.orchestrator.evidence import holds_nothing
from services.orchestrator.fleet import Fleet
from services.orchestrator.looker import Looker
from services.orchestrator.migration import Decision, Phase
from services.orchestrator.move import Context
from services.orchestrator.nodes import Nodes
from services.orchestrator.operations import windows
from services.orchestrator.operations.model import (
    OPEN,
    Item,
    ItemState,
    Kind,
    Operation,
)
from services.orchestrator.operations.step import Active, Ended, Facts, Hold, step
from services.orchestrator.queue import Queue
from services.orchestrator.scheduling.limits import LimitSet
from services.orchestrator.scheduling.placement import HINTS
from services.orchestrator.store.rows import MigrationRow
from services.orchestrator.store.schedule import Snapshot

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""At the latest so often: windows open, deadlines pass, and nodes become clear untold."""
GATHER_S = 0.02
AHEAD = 2
"""Moves asked for beyond those that can be under way, so that the queue has one to choose."""


class OperationRunner:
    """All operations that have not ended. `async with running()` is its life."""

    def __init__(self, context: Context, fleet: Fleet, nodes: Nodes, queue: Queue) -> None:
        self._context = context
        self._fleet = fleet
        self._nodes = nodes
        self._queue = queue
        self._looker = Looker(
            self.look, look_s=LOOK_S, gather_s=GATHER_S, log=log, what="operations"
        )
        context.changes.on_publish.append(lambda _subject: self.wake())

    def wake(self) -> None:
        """Something changed."""
        self._looker.wake()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Go on with every operation for the length of the block; leave them to the next start."""
        async with self._looker.running():
            yield

    async def look(self) -> None:
        """One step of each."""
        for operation in await self._context.store.operations.unfinished():
            if self._context.doubt.why:
                return
            try:
                await self._step(operation.operation_id)
            except GodwitError as error:
                log.warning("operation %s waits: %s", operation.operation_id, error)

    async def _step(self, operation_id: str) -> None:
        store = self._context.store.operations
        operation, items = await store.get(operation_id)
        snapshot = await self._context.store.schedule.snapshot()
        facts = await self._facts(operation, items, snapshot)
        taken = step(operation, items, facts)
        if self._is_last_look(operation, taken.operation):
            # Nothing is left to move: is nothing of it left either?
            retained = await self._retained(operation.node)
            taken = step(operation, items, replace(facts, retained=retained))
        for migration_id in taken.cancel:
            with contextlib.suppress(GodwitError):  # past its decision: it ends by itself
                await self._fleet.cancel_migration(migration_id)
        begun = {item.vm_id: await self._begin(operation, item) for item in taken.begin}
        after = tuple(begun.get(item.vm_id, item) for item in taken.items)
        known = {item.vm_id: item for item in items}
        changed = [item for item in after if known.get(item.vm_id) != item]
        if changed or taken.operation != operation:
            written = await store.write(
                operation, taken.operation, changed, now_ns=self._context.now_ns()
            )
            if written and taken.operation.ended:
                log.info("operation %s: %s", operation_id, taken.operation.state)
            self._context.changes.publish(operation_id, EventKind.OPERATION)
            if operation.node and taken.operation.ended:
                self._context.changes.publish(operation.node, EventKind.NODE)

    @staticmethod
    def _is_last_look(before: Operation, after: Operation) -> bool:
        return before.kind is Kind.DRAIN and after.ended and bool(before.node)

    async def _begin(self, operation: Operation, item: Item) -> Item:
        """Ask for the VM's migration; what cannot be asked for now is tried again at each look."""
        try:
            migration = await self._fleet.create_migration(
                item.vm_id,
                item.target,
                priority=operation.options.priority,
                operation_id=operation.operation_id,
            )
        except NotFoundError as error:
            return replace(item, reason=error.reason, message=error.message, hint=error.hint)
        except GodwitError as error:
            return replace(item, reason=error.reason, message=error.message, hint=error.hint)
        return replace(
            item,
            state=ItemState.MOVING,
            migration_id=migration.migration_id,
            attempts=item.attempts + 1,
            reason="",
            message="",
            hint="",
        )

    # --- facts ---

    async def _facts(
        self, operation: Operation, items: tuple[Item, ...], snapshot: Snapshot
    ) -> Facts:
        active = {
            row.vm_id: _active(row, snapshot)
            for row in (
                *(row for row, _keys in snapshot.running),
                *(waiting.migration for waiting in snapshot.waiting),
            )
        }
        under_way = {each.migration_id for each in active.values()}
        ended = {}
        for item in items:
            if item.state in OPEN and item.migration_id and item.migration_id not in under_way:
                row = await self._context.store.migrations.get(item.migration_id)
                if row is not None and row.terminal:
                    ended[item.migration_id] = _ended(row)
        options = operation.options
        now_ns = self._context.now_ns()
        age_s = (now_ns - operation.created_at_ns) / 1e9
        return Facts(
            at={vm_id: node for vm_id, node, _memory in snapshot.homes},
            active=active,
            ended=ended,
            holds=self._holds(under_way),
            window_open=windows.is_open(options.windows, now_ns / 1e9),
            expired=bool(options.deadline_s) and age_s > options.deadline_s,
            parallel=options.parallel_max or parallel(operation, snapshot.limits),
        )

    def _holds(self, migration_ids: set[str]) -> dict[str, Hold]:
        found = {}
        for migration_id in migration_ids:
            if wait := self._queue.wait_of(migration_id):
                found[migration_id] = Hold(
                    reason=wait.reason,
                    message=wait.message,
                    hint=wait.hint,
                    stuck=wait.reason in HINTS or wait.reason in ("NO_TARGET", "NO_OTHER_NODE"),
                )
        return found

    async def _retained(self, node: str) -> str:
        """What the node still has of any guest, by its agent's own word, now."""
        try:
            status = await self._nodes.require(node)
        except GodwitError as error:
            return f"{node} cannot say what it retains: {error.message}"
        left = [each for each in status.vms.values() if not holds_nothing(each)]
        if not left:
            return ""
        total = sum(each.retained_bytes for each in left)
        names = ", ".join(sorted(each.vm_id for each in left)[:5])
        return f"{node} retains {total} bytes of {names}"


def parallel(operation: Operation, limits: LimitSet) -> int:
    """As many as the limits let go, and some to choose from."""
    match operation.kind:
        case Kind.DRAIN:
            most = limits.of(f"node-out:{operation.node}")
        case Kind.UNDRAIN:
            most = limits.of(f"node-in:{operation.node}")
        case _:
            most = limits.of("cluster")
    return most + AHEAD


def _active(row: MigrationRow, snapshot: Snapshot) -> Active:
    return Active(
        migration_id=row.migration_id,
        source=row.source_node,
        target=row.destination_node,
        operation_id=snapshot.operations.get(row.migration_id, ""),
        decided=row.decision is Decision.COMMITTED,
    )


def _ended(row: MigrationRow) -> Ended:
    return Ended(
        succeeded=row.phase is Phase.SUCCEEDED,
        reason=row.reason or row.phase.upper(),
        message=row.message,
        hint=row.hint,
    )
