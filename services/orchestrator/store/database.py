# SPDX-License-Identifier: Apache-2.0
"""One durable place, one writer at a time, and failures that can be told apart.

Work is a function of a connection: a transaction that runs from its beginning to its end whatever
happens to whoever asked for it. It is the same function on SQLite (`sqlite.py`: in a thread) and on
PostgreSQL (`postgres.py`: SQLAlchemy's asyncio layer, `run_sync`), and on both no two transactions
that write ever overlap. So what a transaction has read is still true when it writes, and a
compare-and-swap is an ordinary SELECT and UPDATE: nobody who adds a table has to think of isolation
levels, of locks or of serialization failures. docs/adr/0009-postgresql.md argues it.
"""

from __future__ import annotations

import abc
import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from typing import ClassVar, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from services.common.errors import UnavailableError

_T = TypeVar("_T")

BUSY_S_MAX = 5
"""How long a transaction waits for another process that writes."""


class StoreError(UnavailableError):
    """The store could not do it. Whether it did is found out by reading; never assumed."""


class StoreFullError(StoreError):
    """No space left."""


class StoreReadOnlyError(StoreError):
    """The file or its file system cannot be written; the server is a standby."""


class StoreBusyError(StoreError):
    """Another process holds the write lock."""


_Said = tuple[type[StoreError], str, str]

_FULL: _Said = (StoreFullError, "STORE_FULL", "free space on the store's file system")
_BUSY: _Said = (
    StoreBusyError,
    "STORE_BUSY",
    "is another orchestrator, or a shell, using the same store?",
)
_AWAY: _Said = (
    StoreError,
    "STORE_UNREACHABLE",
    "is PostgreSQL running, and may this user connect to it?",
)

_BY_CODE: dict[int, _Said] = {
    sqlite3.SQLITE_FULL: _FULL,
    sqlite3.SQLITE_READONLY: (
        StoreReadOnlyError,
        "STORE_READ_ONLY",
        "make the store's directory writable; a file system that had errors is remounted read-only",
    ),
    sqlite3.SQLITE_BUSY: _BUSY,
    sqlite3.SQLITE_LOCKED: _BUSY,
}

_BY_STATE: dict[str, _Said] = {
    "53100": _FULL,
    "25006": (
        StoreReadOnlyError,
        "STORE_READ_ONLY",
        "the server is a standby, or was made read-only: connect to the primary",
    ),
    "55P03": _BUSY,
    "57014": _BUSY,
    "40001": _BUSY,
    "40P01": _BUSY,
    "53300": _AWAY,
    "57P01": _AWAY,
    "57P02": _AWAY,
    "57P03": _AWAY,
}
"""By SQLSTATE. Source: PostgreSQL, Appendix A, Error Codes."""

_FAILED: _Said = (StoreError, "STORE_FAILED", "see the orchestrator's log and the disk's health")


def _said(error: sa.exc.SQLAlchemyError) -> _Said:
    original = getattr(error, "orig", None)
    state = str(getattr(original, "sqlstate", None) or "")
    if state.startswith("08") or isinstance(error, sa.exc.TimeoutError):
        return _AWAY
    if isinstance(error, sa.exc.DBAPIError) and error.connection_invalidated:
        return _AWAY
    code = getattr(original, "sqlite_errorcode", 0) & 0xFF
    return _BY_STATE.get(state) or _BY_CODE.get(code) or _FAILED


@contextlib.contextmanager
def typed_errors() -> Iterator[None]:
    """Raise what the database says as a StoreError. Integrity errors pass: they are answers."""
    try:
        yield
    except sa.exc.IntegrityError:
        raise
    except sa.exc.SQLAlchemyError as error:
        cls, reason, hint = _said(error)
        original = getattr(error, "orig", None)
        raise cls(reason, f"the store failed: {original or error}", hint=hint) from error


def insert(connection: sa.Connection, table: sa.Table) -> postgresql.Insert | sqlite.Insert:
    """An INSERT that may say ON CONFLICT, in the connection's own dialect."""
    if connection.dialect.name == "sqlite":
        return sqlite.insert(table)
    return postgresql.insert(table)


class Database(abc.ABC):
    """The file, or the server. Work must not keep the connection that it is given."""

    dialect: ClassVar[str]
    term: int | None = None
    """Under which this process writes; see leadership.py."""

    @abc.abstractmethod
    async def prepare(self, work: Callable[[sa.Connection], _T]) -> _T:
        """Run `work`, which may make the tables, in a transaction; no other `prepare` overlaps it.

        Raises:
            StoreError: the store cannot be reached or opened.
        """

    @abc.abstractmethod
    async def claim(self, work: Callable[[sa.Connection], _T]) -> _T:
        """As `write`, whatever the term: for whoever would lead."""

    @abc.abstractmethod
    async def write(self, work: Callable[[sa.Connection], _T]) -> _T:
        """Run `work` in a transaction; durable when this returns, rolled back if `work` raises.

        No other transaction writes meanwhile, in whatever process. Cancelled, or failed with a
        StoreError, it may have been committed or not: read.

        Raises:
            NotLeaderError: `term` is over; nothing was written.
        """

    @abc.abstractmethod
    async def read(self, work: Callable[[sa.Connection], _T]) -> _T:
        """Run `work` on a snapshot of what is committed."""

    @abc.abstractmethod
    async def write_then_read(
        self, write: Callable[[sa.Connection], None], read: Callable[[sa.Connection], _T]
    ) -> _T:
        """Run `write` in a transaction, then `read` in another one, in one go.

        What is returned was read after the commit: it is durable, whoever wrote it.
        """

    def hindrance(self, connection: sa.Connection) -> str:  # noqa: ARG002 - not of a file
        """Why a decision written here might be forgotten, so that nobody should lead; or ""."""
        return ""

    @abc.abstractmethod
    async def close(self) -> None:
        """Finish what was begun, then close every connection."""
