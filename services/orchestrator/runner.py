# SPDX-License-Identifier: Apache-2.0
"""Runs every migration that has not ended, and collects what ended ones still owe."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

from godwit.agent.v1 import fault_agent_service_pb2 as agent_pb2

from services.common.errors import GodwitError, UnavailableError
from services.orchestrator.agents import AgentPool
from services.orchestrator.giveback import fence_destination, free_lost
from services.orchestrator.migration import TERMINAL, UNDECIDED, Decision
from services.orchestrator.move import Context
from services.orchestrator.mover import GUEST_STANDS_STILL, Mover
from services.orchestrator.store import StoreError
from services.orchestrator.store.rows import MigrationRow
from services.orchestrator.undo import abort_destination

log = logging.getLogger(__name__)


class Runner:
    """One task a migration. `async with runner.running()` is its life."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._movers: dict[str, Mover] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._group: asyncio.TaskGroup | None = None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Rejoin what the store says is under way; at the end leave it to the next start."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            for row in await self._context.store.migrations.unfinished():
                self._spawn(row, rejoined=True)
            reaper = group.create_task(self._reap())
            try:
                yield
            finally:
                self._group = None
                await self._let_guests_run()
                for task in (reaper, *self._tasks):
                    task.cancel()

    def admit(self, row: MigrationRow) -> None:
        """Begin to move a migration that was just written.

        In a process that is going away it stays PENDING: the next start will move it.
        """
        if self._group:
            self._spawn(row, rejoined=False)

    def require_running(self) -> None:
        """Refuse what should not begin any more.

        Raises:
            NotLeaderError: this process stands by.
            UnavailableError: SHUTTING_DOWN.
        """
        self._context.role.require()
        if self._group is None:
            raise UnavailableError(
                "SHUTTING_DOWN", "this orchestrator is going away", hint="ask the next one"
            )

    def cancel(self, migration_id: str) -> None:
        """The store has accepted a cancel."""
        if mover := self._movers.get(migration_id):
            mover.cancel()

    async def look_again(self, migration_id: str) -> None:
        """Begin again with a migration from its row and from evidence, as after a restart, now.

        Not before the decision: a guest that is about to be paused, or is, would wait for it.
        """
        if self._group:
            await asyncio.shield(self._group.create_task(self._look_again(migration_id)))

    async def _look_again(self, migration_id: str) -> None:
        row = await self._context.store.migrations.get(migration_id)
        if row is None or row.phase in UNDECIDED:
            return
        name = f"migration {migration_id}"
        for task in [each for each in self._tasks if each.get_name() == name]:
            task.cancel()
            await asyncio.wait({task})
        if self._group and row.phase not in TERMINAL:
            self._spawn(row, rejoined=True)

    def _spawn(self, row: MigrationRow, *, rejoined: bool) -> None:
        assert self._group is not None
        task = self._group.create_task(
            self._supervise(row, rejoined=rejoined), name=f"migration {row.migration_id}"
        )
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _supervise(self, row: MigrationRow, *, rejoined: bool) -> None:
        """Move one migration to its end, starting again from the store after a bug or a full disk.

        A process that gave up on one migration would leave a guest between two nodes.
        """
        active = self._context.metrics.active
        active.inc()
        try:
            for delay_s in self._context.backoff():
                mover = Mover(self._context, row, rejoined=rejoined)
                self._movers[row.migration_id] = mover
                try:
                    await mover.run()
                except Exception:
                    log.exception("migration %s stopped in %s", row.migration_id, mover.phase)
                if mover.phase in TERMINAL:
                    return
                await asyncio.sleep(delay_s)
                rejoined = True
                with contextlib.suppress(StoreError):
                    row = await self._context.store.migrations.get(row.migration_id) or row
        finally:
            self._movers.pop(row.migration_id, None)
            active.dec()

    async def _let_guests_run(self) -> None:
        """Give those whose guest stands still a moment; the rest can wait for the next start."""
        until = asyncio.get_running_loop().time() + self._context.limits.drain_s
        for delay_s in self._context.backoff():
            if (
                not self._context.role.leads
                or not self._guests_stand_still()
                or asyncio.get_running_loop().time() >= until
            ):
                return
            await asyncio.sleep(delay_s)

    def _guests_stand_still(self) -> bool:
        return any(mover.phase in GUEST_STANDS_STILL for mover in self._movers.values())

    async def _reap(self) -> None:
        """Collect the proofs that nodes still owe."""
        while True:
            with contextlib.suppress(GodwitError):
                owing = await self._context.store.migrations.owing()
                for row in () if self._context.doubt.why else owing:
                    await self._collect(row)
            await asyncio.sleep(self._context.limits.settle_s)

    async def _collect(self, row: MigrationRow) -> None:
        agents = self._context.agents
        with contextlib.suppress(GodwitError):
            if row.destination_owed and await _clear_destination(agents, row):
                await self._context.store.migrations.record(
                    row.migration_id, destination_owed=False
                )
                self._context.changes.publish(row.migration_id)
                log.info("migration %s: destination cleared at last", row.migration_id)
        with contextlib.suppress(GodwitError):
            if row.source_owed and await free_lost(agents, row, agent_pb2.SIDE_SOURCE):
                await self._context.store.migrations.record(row.migration_id, source_owed=False)
                self._context.changes.publish(row.migration_id)
                log.info("migration %s: source cleared", row.migration_id)


async def _clear_destination(agents: AgentPool, row: MigrationRow) -> bool:
    """True once nothing of the guest is left there.

    Raises:
        GodwitError: it does not answer, or refuses.
    """
    if row.decision is Decision.ABORTED:
        return await abort_destination(agents, row)
    if row.given_back:
        return await fence_destination(agents, row)
    return await free_lost(agents, row, agent_pb2.SIDE_DESTINATION)
