# SPDX-License-Identifier: Apache-2.0
"""Who may write: the term that every transaction checks, and the row that keeps them apart.

One row. Each transaction that writes locks it before anything else and finds its own term there, or
fails: whoever was deposed cannot write, however late it wakes up and whatever it believes (I13).
A takeover raises the term in such a transaction too, so that it waits for the one under way.
"""

from __future__ import annotations

import sqlalchemy as sa

from services.orchestrator.store import schema
from services.orchestrator.store.database import StoreError

UNFENCED: int | None = None
"""Tools, while no orchestrator runs, and tests: apart from the others, whatever the term."""
STANDBY = -1
"""No term is this one: every write is refused."""

_t = schema.leadership.c

_LOCK = {
    "postgresql": "SELECT term, holder, rest, grpc FROM leadership FOR UPDATE",
    # BEGIN IMMEDIATE has locked the file.
    "sqlite": "SELECT term, holder, rest, grpc FROM leadership",
}


class NotLeaderError(StoreError):
    """Another orchestrator leads, or none does: nothing was written."""

    def __init__(self, holder: str, rest: str, grpc: str, *, term: int) -> None:
        super().__init__(
            "NOT_LEADER",
            f"this orchestrator does not lead: {holder or 'nobody'} does, in term {term}",
            hint=f"ask the leader at {rest}" if rest else "try again in a moment",
            metadata={"leader": holder, "rest": rest, "grpc": grpc, "term": str(term)},
        )


def lock(connection: sa.Connection, term: int | None) -> None:
    """The first statement of every transaction that writes.

    Raises:
        NotLeaderError: `term` is over.
    """
    found = connection.exec_driver_sql(_LOCK[connection.dialect.name]).one()
    if term is not UNFENCED and found.term != term:
        raise NotLeaderError(found.holder, found.rest, found.grpc, term=found.term)


def make(connection: sa.Connection) -> None:
    """The row, in a new store: nobody has led yet."""
    connection.execute(
        sa.insert(schema.leadership).values(
            one=1, term=0, holder="", rest="", grpc="", expires_at_ns=0
        )
    )
