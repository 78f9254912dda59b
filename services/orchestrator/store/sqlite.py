# SPDX-License-Identifier: Apache-2.0
"""The store as one file: SQLite, embedded.

`synchronous=FULL` under WAL: a transaction that has committed survives the loss of power, which is
what makes the decision a decision (I2). All writes of the process go through one connection in one
thread, so that they queue here, in order, and never as SQLITE_BUSY in the middle of a transaction;
another process is kept out by BEGIN IMMEDIATE. Reads have their own connections and never wait.
A commit is one fdatasync. Left to itself SQLite would add a checkpoint, with two fsyncs more, to
whatever commit comes after a thousand pages, a decision too: here it runs beside the writes.

A transaction is a function that runs in that thread from its beginning to its end: one hop to a
thread and back. Rejected: SQLAlchemy's asyncio layer over aiosqlite. A task that was cancelled
between two of its statements left the transaction open and the store locked; and its hop for each
statement cost several milliseconds more than the fsync, while a guest stands still.
Source: https://www.sqlite.org/wal.html, https://www.sqlite.org/pragma.html#pragma_synchronous.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa

from services.orchestrator.store import leadership
from services.orchestrator.store.database import BUSY_S_MAX, Database, typed_errors

log = logging.getLogger(__name__)

_T = TypeVar("_T")

CHECKPOINT_WRITES = 200
"""A transaction writes some four pages."""
READERS_MAX = 4


def _engine(path: Path, *, writer: bool) -> sa.Engine:
    engine = sa.create_engine(
        f"sqlite:///{path}",
        poolclass=sa.pool.QueuePool,
        pool_size=1 if writer else READERS_MAX,
        max_overflow=0,
        connect_args={"timeout": BUSY_S_MAX, "check_same_thread": False},
    )

    @sa.event.listens_for(engine, "connect")
    def _connected(connection: Any, _record: object) -> None:
        # sqlite3 must not begin transactions by itself: it would begin deferred ones.
        connection.isolation_level = None
        cursor = connection.cursor()
        pragmas = ["foreign_keys=ON", "synchronous=FULL"]
        pragmas[:0] = ["journal_mode=WAL", "wal_autocheckpoint=0"] if writer else []
        pragmas += [] if writer else ["query_only=ON"]
        for pragma in pragmas:
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writer else "BEGIN")

    return engine


class SqliteDatabase(Database):
    """The file."""

    dialect = "sqlite"

    def __init__(self, path: Path) -> None:
        self._writer = _engine(path, writer=True)
        self._reader = _engine(path, writer=False)
        self._writing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store-write")
        self._reading = ThreadPoolExecutor(READERS_MAX, thread_name_prefix="store-read")
        self._writes_since_checkpoint = 0

    async def prepare(self, work: Callable[[sa.Connection], _T]) -> _T:
        return await self._run(self._writing, self._writer, work)

    async def claim(self, work: Callable[[sa.Connection], _T]) -> _T:
        return await self._run(self._writing, self._writer, work)

    async def write(self, work: Callable[[sa.Connection], _T]) -> _T:
        done = await self._run(self._writing, self._writer, self._fenced(work))
        self._writes_since_checkpoint += 1
        if self._writes_since_checkpoint >= CHECKPOINT_WRITES:
            self._writes_since_checkpoint = 0
            # Nobody waits for it: what it does not get done, the next one does.
            self._reading.submit(self._checkpoint)
        return done

    def _checkpoint(self) -> None:
        """Move what is in the WAL to the database file. PASSIVE: waits for nobody, holds up nobody.

        On a connection that only reads: SQLite lets those checkpoint too.
        """
        try:
            with contextlib.closing(self._reader.raw_connection()) as connection:
                connection.cursor().execute("PRAGMA wal_checkpoint(PASSIVE)").close()
        except (sa.exc.SQLAlchemyError, sqlite3.Error) as error:
            log.warning("checkpoint: %s", error)

    async def read(self, work: Callable[[sa.Connection], _T]) -> _T:
        return await self._run(self._reading, self._reader, work)

    async def write_then_read(
        self, write: Callable[[sa.Connection], None], read: Callable[[sa.Connection], _T]
    ) -> _T:
        def run() -> _T:
            with typed_errors():
                with self._writer.begin() as connection:
                    leadership.lock(connection, self.term)
                    write(connection)
                with self._writer.begin() as connection:
                    return read(connection)

        return await asyncio.get_running_loop().run_in_executor(self._writing, run)

    def _fenced(self, work: Callable[[sa.Connection], _T]) -> Callable[[sa.Connection], _T]:
        def locked(connection: sa.Connection) -> _T:
            leadership.lock(connection, self.term)
            return work(connection)

        return locked

    async def _run(
        self, thread: ThreadPoolExecutor, engine: sa.Engine, work: Callable[[sa.Connection], _T]
    ) -> _T:
        def run() -> _T:
            with typed_errors(), engine.begin() as connection:
                return work(connection)

        return await asyncio.get_running_loop().run_in_executor(thread, run)

    async def close(self) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._reading, self._reader.dispose)
        await loop.run_in_executor(self._writing, self._writer.dispose)
        for threads in (self._reading, self._writing):
            threads.shutdown()
