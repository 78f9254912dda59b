# SPDX-License-Identifier: Apache-2.0
"""The store on a PostgreSQL server, for orchestrators that stand by for each other.

SQLAlchemy's asyncio layer over asyncpg. A transaction is a task of its own, which a caller that is
cancelled leaves alone: cancelled half way it would cost the connection, and whether it committed.
It locks the row of `leadership` first, which keeps all transactions that write apart from each
other, in this process and in others, until they are durable; so READ COMMITTED is serial here, and
a stronger level would add nothing but failures to try again. Reads see one snapshot, on connections
that cannot write.

A process that is stopped in a transaction must not keep that row for ever: the server ends a
session that says nothing for IDLE_S_MAX in a transaction. A server that does not answer is given up
after ANSWER_S_MAX; then nobody knows whether the transaction was committed: who asked must read.
`synchronous_commit` is set here and not taken from the server's configuration.

A server that loses its disk loses decisions, unless a synchronous standby has them and is the one
that is promoted. `?synchronous_standbys=N` of the URL demands that N are attached: without them
nobody leads. What was decided is then read back in a transaction that writes: its commit too waits
for the standbys, so that a decision that only the primary has, after a wait that was cancelled or a
crash in it, is acted on by nobody.
Source: https://www.postgresql.org/docs/15/explicit-locking.html#LOCKING-ROWS,
https://www.postgresql.org/docs/15/runtime-config-client.html.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from services.common.errors import InvalidArgumentError
from services.orchestrator.store import leadership
from services.orchestrator.store.database import BUSY_S_MAX, Database, StoreError, typed_errors
from services.orchestrator.store.leadership import NotLeaderError

log = logging.getLogger(__name__)

_T = TypeVar("_T")

READERS_MAX = 4
CONNECT_S_MAX = 5
ANSWER_S_MAX = 10
IDLE_S_MAX = 3
"""Shorter than any lease: the row is free when its holder may be replaced."""
STANDBYS_MAX = 100
STANDBYS = "synchronous_standbys"
"""Parameter of the URL."""
PREPARE_LOCK = 0x676F64776974
"""Key of the advisory lock of whoever makes or upgrades the tables. Nothing else uses it."""


def _engine(url: sa.URL, *, writer: bool) -> AsyncEngine:
    settings = {
        "application_name": os.environ.get("PGAPPNAME", "godwit"),
        "jit": "off",
        "synchronous_commit": "on",
        "lock_timeout": f"{BUSY_S_MAX}s",
        "idle_in_transaction_session_timeout": f"{IDLE_S_MAX}s",
        "default_transaction_read_only": "off" if writer else "on",
    }
    return create_async_engine(
        url.set(drivername="postgresql+asyncpg"),
        pool_size=1 if writer else READERS_MAX,
        max_overflow=0,
        pool_timeout=ANSWER_S_MAX,
        isolation_level="READ COMMITTED" if writer else "REPEATABLE READ",
        connect_args={"server_settings": settings, "timeout": CONNECT_S_MAX},
    )


_SYNCHRONOUS = "SELECT count(*) FROM pg_stat_replication WHERE sync_state IN ('sync', 'quorum')"


def _show(connection: sa.Connection, name: str) -> str:
    return str(connection.exec_driver_sql(f"SHOW {name}").scalar_one())


def _standbys(url: sa.URL) -> int:
    text = str(url.query.get(STANDBYS, "0"))
    if not text.isdecimal() or int(text) > STANDBYS_MAX:
        raise InvalidArgumentError("STORE_INVALID", f"{STANDBYS}={text!r} is not 0..{STANDBYS_MAX}")
    return int(text)


def _unreachable(url: sa.URL, why: str) -> StoreError:
    return StoreError(
        "STORE_UNREACHABLE",
        f"the store at {url.render_as_string(hide_password=True)}: {why}",
        hint="is PostgreSQL running, and may this user connect to it?",
    )


class PostgresDatabase(Database):
    """The server."""

    dialect = "postgresql"

    def __init__(self, url: sa.URL) -> None:
        self._standbys = _standbys(url)
        url = url.difference_update_query([STANDBYS])
        self._url = url
        self._writer = _engine(url, writer=True)
        self._reader = _engine(url, writer=False)
        self._turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def prepare(self, work: Callable[[sa.Connection], _T]) -> _T:
        def alone(connection: sa.Connection) -> _T:
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({PREPARE_LOCK})")
            return work(connection)

        return await self._whole(self._write(alone))

    async def claim(self, work: Callable[[sa.Connection], _T]) -> _T:
        return await self._whole(self._write(work))

    async def write(self, work: Callable[[sa.Connection], _T]) -> _T:
        return await self._whole(self._write(self._fenced(work)))

    async def read(self, work: Callable[[sa.Connection], _T]) -> _T:
        return await self._whole(self._transact(self._reader, work))

    async def write_then_read(
        self, write: Callable[[sa.Connection], None], read: Callable[[sa.Connection], _T]
    ) -> _T:
        async def both() -> _T:
            async with self._turn:
                await self._transact(self._writer, self._fenced(write))
                return await self._transact(self._writer, self._behind_standbys(read))

        return await self._whole(both())

    def hindrance(self, connection: sa.Connection) -> str:
        if _show(connection, "fsync") != "on":
            return "fsync is off: a decision that was answered would not survive a loss of power"
        if not self._standbys:
            return ""
        if not _show(connection, "synchronous_standby_names"):
            return "synchronous_standby_names is empty: commits wait for no standby"
        found = connection.exec_driver_sql(_SYNCHRONOUS).scalar_one()
        if found >= self._standbys:
            return ""
        return (
            f"{found} synchronous standbys are attached, {STANDBYS}={self._standbys};"
            " to see them takes the role pg_monitor"
        )

    def _behind_standbys(
        self, read: Callable[[sa.Connection], _T]
    ) -> Callable[[sa.Connection], _T]:
        if not self._standbys:
            return read

        def read_and_write(connection: sa.Connection) -> _T:
            connection.exec_driver_sql("UPDATE leadership SET one = one")
            return read(connection)

        return read_and_write

    def _fenced(self, work: Callable[[sa.Connection], _T]) -> Callable[[sa.Connection], _T]:
        def locked(connection: sa.Connection) -> _T:
            leadership.lock(connection, self.term)
            return work(connection)

        return locked

    async def _write(self, work: Callable[[sa.Connection], _T]) -> _T:
        async with self._turn:
            return await self._transact(self._writer, work)

    async def _transact(self, engine: AsyncEngine, work: Callable[[sa.Connection], _T]) -> _T:
        try:
            async with asyncio.timeout(ANSWER_S_MAX):
                with typed_errors():
                    async with engine.begin() as connection:
                        return await connection.run_sync(work)
        except NotLeaderError as error:
            log.warning("nothing was written: %s", error)
            raise
        except TimeoutError as error:
            raise _unreachable(self._url, f"no answer for {ANSWER_S_MAX} s") from error
        except OSError as error:
            raise _unreachable(self._url, error.strerror or str(error)) from error

    async def _whole(self, transaction: Coroutine[Any, Any, _T]) -> _T:
        """Run it to its end, whatever becomes of the caller."""
        task = asyncio.get_running_loop().create_task(transaction)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return await asyncio.shield(task)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # its caller may be gone: then nobody else asks

    async def close(self) -> None:
        with contextlib.suppress(StoreError):
            await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._reader.dispose()
        await self._writer.dispose()
