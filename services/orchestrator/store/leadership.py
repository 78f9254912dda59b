# SPDX-License-Identifier: Apache-2.0
"""Who may write: the term that every transaction checks, and the row that keeps them apart.

One row. Each transaction that writes locks it before anything else and finds its own term there, or
fails: whoever was deposed cannot write, however late it wakes up and whatever it believes (I13).
A takeover raises the term in such a transaction too, so that it waits for the one under way.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import sqlalchemy as sa

from services.orchestrator.store import schema
from services.orchestrator.store.database import StoreError

UNFENCED: int | None = None
"""Tools, while no orchestrator runs, and tests: apart from the others, whatever the term."""
STANDBY = -1
"""No term is this one: every write is refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leader:
    """Who leads, as the row says."""

    term: int
    """Raised by each takeover; 0: nobody has led yet."""
    holder: str
    """The process; empty: the last one has gone of its own accord."""
    rest: str
    """HOST:PORT where it is called; empty: not known."""
    grpc: str
    expires_at_ns: int
    """By the clock of whoever keeps the store: PostgreSQL's server. 0: it has ended."""

    def refusal(self) -> NotLeaderError:
        """What somebody else says to a change."""
        return NotLeaderError(self)


NOBODY = Leader(term=0, holder="", rest="", grpc="", expires_at_ns=0)


class NotLeaderError(StoreError):
    """Another orchestrator leads, or none does: nothing was written."""

    def __init__(self, leader: Leader) -> None:
        self.leader = leader
        hint = f"ask the leader at {leader.rest}" if leader.rest else "try again in a moment"
        super().__init__(
            "NOT_LEADER",
            f"this orchestrator does not lead: {leader.holder or 'nobody'} does,"
            f" in term {leader.term}",
            hint=hint,
            metadata={
                "leader": leader.holder,
                "rest": leader.rest,
                "grpc": leader.grpc,
                "term": str(leader.term),
            },
        )


def read(connection: sa.Connection) -> Leader:
    """Who leads."""
    return _read(connection, "")


def _read(connection: sa.Connection, how: str) -> Leader:
    columns = "term, holder, rest, grpc, expires_at_ns"
    found = connection.exec_driver_sql(f"SELECT {columns} FROM leadership{how}").one()  # noqa: S608
    return Leader(**found._asdict())


def lock(connection: sa.Connection, term: int | None) -> Leader:
    """The first statement of every transaction that writes.

    Raises:
        NotLeaderError: `term` is over.
    """
    # On SQLite, BEGIN IMMEDIATE has locked the file.
    leader = _read(connection, "" if connection.dialect.name == "sqlite" else " FOR UPDATE")
    if term is not UNFENCED and leader.term != term:
        raise leader.refusal()
    return leader


def now_ns(connection: sa.Connection) -> int:
    """The clock that leases are measured by: one for all candidates."""
    if connection.dialect.name == "sqlite":
        return time.time_ns()
    clock = "SELECT (extract(epoch FROM clock_timestamp()) * 1000000000)::bigint"
    return int(connection.exec_driver_sql(clock).scalar_one())


def claim(
    connection: sa.Connection, *, holder: str, rest: str, grpc: str, lease_ns: int, alone: bool
) -> Leader:
    """Lead from now on, under a term of one's own, if nobody else does; who leads then.

    `alone`: it is known otherwise that nobody does, whatever the row says.
    """
    was = lock(connection, UNFENCED)
    now = now_ns(connection)
    if not alone and was.expires_at_ns > now:
        return was
    leader = Leader(
        term=was.term + 1, holder=holder, rest=rest, grpc=grpc, expires_at_ns=now + lease_ns
    )
    _put(connection, leader)
    return leader


def renew(connection: sa.Connection, leader: Leader, *, lease_ns: int) -> None:
    """Go on leading. Part of a transaction of its term."""
    expires_at_ns = now_ns(connection) + lease_ns
    _put(connection, leader, expires_at_ns=expires_at_ns)


def release(connection: sa.Connection, leader: Leader) -> None:
    """Lead no more: the next one need not wait. Part of a transaction of its term."""
    _put(connection, NOBODY, term=leader.term)


def _put(connection: sa.Connection, leader: Leader, **instead: int) -> None:
    values = {
        "term": leader.term,
        "holder": leader.holder,
        "rest": leader.rest,
        "grpc": leader.grpc,
        "expires_at_ns": leader.expires_at_ns,
    }
    connection.execute(sa.update(schema.leadership).values({**values, **instead}))


def make(connection: sa.Connection) -> None:
    """The row, in a new store: nobody has led yet."""
    connection.execute(
        sa.insert(schema.leadership).values(
            one=1, term=0, holder="", rest="", grpc="", expires_at_ns=0
        )
    )
