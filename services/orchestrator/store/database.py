# SPDX-License-Identifier: Apache-2.0
"""One durable file, one writer, and failures that can be told apart.

`synchronous=FULL` under WAL: a transaction that has committed survives the loss of power, which is
what makes the decision a decision (I2). All writes of the process go through one connection, so
that they queue here, in order, and never as SQLITE_BUSY in the middle of a transaction; another
process is kept out by BEGIN IMMEDIATE. Reads have their own connections and never wait.

The decision has a connection and a thread of its own: a guest stands still while it is written, and
a transaction that hops to a thread and back for each statement costs several milliseconds more than
its fsync does.
Source: https://www.sqlite.org/wal.html, https://www.sqlite.org/pragma.html#pragma_synchronous.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool

from services.common.errors import UnavailableError

_T = TypeVar("_T")

BUSY_S_MAX = 5
READERS_MAX = 4


class StoreError(UnavailableError):
    """The store could not do it. Whether it did is found out by reading; never assumed."""


class StoreFullError(StoreError):
    """No space left."""


class StoreReadOnlyError(StoreError):
    """The file or its file system cannot be written."""


class StoreBusyError(StoreError):
    """Another process holds the write lock."""


_BY_CODE: dict[int, tuple[type[StoreError], str, str]] = {
    sqlite3.SQLITE_FULL: (StoreFullError, "STORE_FULL", "free space on the store's file system"),
    sqlite3.SQLITE_READONLY: (
        StoreReadOnlyError,
        "STORE_READ_ONLY",
        "make the store's directory writable; a file system that had errors is remounted read-only",
    ),
    sqlite3.SQLITE_BUSY: (
        StoreBusyError,
        "STORE_BUSY",
        "is another orchestrator, or a shell, using the same store?",
    ),
    sqlite3.SQLITE_LOCKED: (StoreBusyError, "STORE_BUSY", "try again"),
}


@contextlib.contextmanager
def typed_errors() -> Iterator[None]:
    """Raise what the database says as a StoreError. Integrity errors pass: they are answers."""
    try:
        yield
    except sa.exc.IntegrityError:
        raise
    except sa.exc.SQLAlchemyError as error:
        original = getattr(error, "orig", None)
        code = getattr(original, "sqlite_errorcode", 0) & 0xFF
        cls, reason, hint = _BY_CODE.get(
            code, (StoreError, "STORE_FAILED", "see the orchestrator's log and the disk's health")
        )
        raise cls(reason, f"the store failed: {original or error}", hint=hint) from error


def _engine(path: Path, *, writer: bool) -> AsyncEngine:
    engine = create_async_engine(
        f"sqlite+aiosqlite:///{path}",
        poolclass=AsyncAdaptedQueuePool,
        pool_size=1 if writer else READERS_MAX,
        max_overflow=0,
        connect_args={"timeout": BUSY_S_MAX},
    )
    _configure(engine.sync_engine, writer=writer)
    return engine


def _configure(engine: sa.Engine, *, writer: bool) -> None:
    @sa.event.listens_for(engine, "connect")
    def _connected(connection: Any, _record: object) -> None:
        # sqlite3 must not begin transactions by itself: it would begin deferred ones.
        connection.isolation_level = None
        cursor = connection.cursor()
        pragmas = ["foreign_keys=ON", "synchronous=FULL"]
        pragmas[:0] = ["journal_mode=WAL"] if writer else []
        pragmas += [] if writer else ["query_only=ON"]
        for pragma in pragmas:
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writer else "BEGIN")


class Database:
    """The engines. `async with database.write() as c` is a transaction, durable at its end."""

    def __init__(self, path: Path) -> None:
        self._writer = _engine(path, writer=True)
        self._reader = _engine(path, writer=False)
        self._decider = sa.create_engine(
            f"sqlite:///{path}",
            poolclass=sa.pool.StaticPool,
            connect_args={"timeout": BUSY_S_MAX, "check_same_thread": False},
        )
        _configure(self._decider, writer=True)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decision")
        self._writing = asyncio.Lock()
        """Queues the two writing connections, in order; SQLite's own lock would be polled for."""

    @contextlib.asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """A transaction; leaving the block commits and syncs, an exception rolls back."""
        with typed_errors():
            async with self._writing, self._writer.begin() as connection:
                yield connection

    @contextlib.asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """A snapshot of what is committed."""
        with typed_errors():
            async with self._reader.connect() as connection:
                yield connection

    async def decide(
        self, write: Callable[[sa.Connection], None], read: Callable[[sa.Connection], _T]
    ) -> _T:
        """Run `write` in a transaction, then `read` in another one, in one go.

        What is returned was read after the commit, so it is durable. Cancelled or failed, the write
        may have happened or not: read again.
        """

        def run() -> _T:
            with typed_errors():
                with self._decider.begin() as connection:
                    write(connection)
                with self._decider.begin() as connection:
                    return read(connection)

        async with self._writing:
            return await asyncio.get_running_loop().run_in_executor(self._thread, run)

    async def close(self) -> None:
        """Close every connection."""
        await self._reader.dispose()
        await self._writer.dispose()
        await asyncio.get_running_loop().run_in_executor(self._thread, self._decider.dispose)
        self._thread.shutdown()
