# SPDX-License-Identifier: Apache-2.0
"""Tries a migration that failed again, as often as its policy says, each time as a new one (I7).

Level-triggered: what is over and has retries left is looked for, by whoever leads. The next attempt
and that its forerunner has had one are one transaction, so that there is never more than one. It
waits in the queue until the back-off of its VM is over, before everything that is new.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import replace

import sqlalchemy as sa
from ulid import ULID

from services.common import telemetry
from services.common.errors import AlreadyExistsError, FailedPreconditionError, NotFoundError
from services.orchestrator.looker import Looker
from services.orchestrator.migration import Phase
from services.orchestrator.move import Context
from services.orchestrator.queue import Queue
from services.orchestrator.runner import Runner
from services.orchestrator.scheduling.retry import is_retryable
from services.orchestrator.store.identity import StoreInDoubtError
from services.orchestrator.store.rows import EventRow, MigrationRow, VmState
from services.orchestrator.store.schedule import AdmissionRow, new_admission, no_retry_of

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""How often; a back-off is by far longer."""


class Retrier:
    """`async with running()` is its life."""

    def __init__(self, context: Context, runner: Runner, queue: Queue) -> None:
        self._context = context
        self._runner = runner
        self._queue = queue
        self._looker = Looker(self.look, look_s=LOOK_S, gather_s=0.0, log=log, what="retries")

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Look, again and again, for the length of the block."""
        async with self._looker.running():
            yield

    async def look(self) -> None:
        """Try again what is to be tried again; settle the others."""
        if self._context.doubt.why:
            return
        for migration_id in await self._context.store.schedule.ended_with_retries():
            row = await self._context.store.migrations.get(migration_id)
            admission = await self._context.store.schedule.admission(migration_id)
            if row is None or admission is None:
                continue
            if not await self._try_again(row, admission):
                await self._context.store.schedule.settle_retry(migration_id)

    async def _try_again(self, row: MigrationRow, admission: AdmissionRow) -> bool:
        """False: it is not tried again, now or ever."""
        if row.phase not in (Phase.FAILED, Phase.RETURNED) or not is_retryable(row.reason):
            return False
        vm = await self._context.store.fleet.vm(row.vm_id)
        if vm is None or vm.state is not VmState.RUNNING or vm.node != row.source_node:
            return False
        migration_id = str(ULID())
        trace = telemetry.new_traceparent(
            **{"godwit.migration.id": migration_id, "godwit.vm.id": row.vm_id}
        )
        again = MigrationRow.new(
            migration_id=migration_id,
            vm=vm,
            destination_node=admission.target,
            bulk_bytes_per_s_max=row.bulk_bytes_per_s_max,
            freeze_after_ms=row.freeze_after_ms,
            traceparent=trace,
            now_ns=self._context.now_ns(),
        )
        asked = replace(
            admission,
            migration_id=migration_id,
            admitted_at_ns=0,
            because="",
            attempt=admission.attempt + 1,
            retry_of=row.migration_id,
            retries_left=admission.retries_left - 1,
        )
        try:
            await self._context.store.migrations.create(
                again, None, new_admission(asked), no_retry_of(row.migration_id)
            )
        except StoreInDoubtError:
            raise
        except (AlreadyExistsError, NotFoundError, FailedPreconditionError) as error:
            log.info("migration %s is not tried again: %s", row.migration_id, error)
            return False
        except sa.exc.IntegrityError:
            return False  # it was, by another
        log.info("migration %s is tried again as %s", row.migration_id, migration_id)
        await self._tell(row, again, asked)
        self._runner.admit(again)
        self._queue.wake()
        return True

    async def _tell(self, row: MigrationRow, again: MigrationRow, asked: AdmissionRow) -> None:
        of = asked.attempt + asked.retries_left
        event = EventRow(
            kind="RETRIED",
            message=f"tried again as migration {again.migration_id}, attempt {asked.attempt}"
            f" of {of}",
            action="it waits until the back-off of its VM is over",
            hint="cancel that one, if it shall not be tried again",
            at_ns=self._context.now_ns(),
        )
        await self._context.store.migrations.add_event(row.migration_id, event)
        self._context.changes.publish(row.migration_id)
        self._context.metrics.retries.labels(row.reason).inc()
