# SPDX-License-Identifier: Apache-2.0
"""Which store this is, and whether it may have forgotten something (I2).

`incarnation` is drawn when a store is made, restored or rebuilt: agents obey one incarnation.
`in_doubt` says why the store is not to be believed. While it is there no epoch is issued, nothing
is decided and nothing admitted: `refuse_in_doubt` is part of those very transactions, so that no
caller can forget it. Only a rebuild removes it.
"""

from __future__ import annotations

import sqlalchemy as sa
from ulid import ULID

from services.common.errors import FailedPreconditionError
from services.orchestrator.store import schema
from services.orchestrator.store.database import Database

_meta = schema.meta

INCARNATION = "incarnation"
IN_DOUBT = "in_doubt"
SCHEMA_VERSION = "schema_version"

HINT = "stop the orchestrator and run `godwit store rebuild --from-agents`; docs/design/store.md"


class StoreInDoubtError(FailedPreconditionError):
    """The store may be older than what it has caused: nothing new is begun or decided."""

    def __init__(self, why: str) -> None:
        super().__init__(
            "STORE_IN_DOUBT",
            f"the store may have forgotten something: {why}",
            hint=HINT,
        )


_WHY = sa.select(_meta.c.value).where(_meta.c.key == IN_DOUBT)
"""Made once: it is part of a decision, while a guest stands still."""


def new_incarnation() -> str:
    """One that no store has had."""
    return str(ULID())


def read(connection: sa.Connection) -> dict[str, str]:
    """All that the store says of itself; empty in a new one."""
    return {row.key: row.value for row in connection.execute(sa.select(_meta))}


def put(connection: sa.Connection, key: str, value: str) -> None:
    """Write one thing; empty: remove it."""
    connection.execute(sa.delete(_meta).where(_meta.c.key == key))
    if value:
        connection.execute(sa.insert(_meta).values(key=key, value=value))


def refuse_in_doubt(connection: sa.Connection) -> None:
    """Part of every transaction that issues an epoch, decides or admits.

    Raises:
        StoreInDoubtError: always, until the store is rebuilt.
    """
    found = connection.execute(_WHY)
    if why := found.scalar_one_or_none():
        raise StoreInDoubtError(str(why))


class Identity:
    """What a store says of itself."""

    def __init__(self, database: Database, known: dict[str, str]) -> None:
        self._database = database
        self.incarnation = known[INCARNATION]
        self.in_doubt = known.get(IN_DOUBT, "")
        """Why the store is not to be believed; empty: it is."""

    async def doubt(self, why: str) -> None:
        """From now on the store is not to be believed, durably. The first reason stays."""

        def work(connection: sa.Connection) -> str:
            known = read(connection).get(IN_DOUBT, "")
            if not known:
                put(connection, IN_DOUBT, why)
            return known or why

        self.in_doubt = await self._database.write(work)

    async def renew(self, why: str) -> None:
        """Another incarnation, in doubt: the beginning of a rebuild."""
        incarnation = new_incarnation()

        def work(connection: sa.Connection) -> None:
            put(connection, INCARNATION, incarnation)
            put(connection, IN_DOUBT, why)

        await self._database.write(work)
        self.incarnation, self.in_doubt = incarnation, why
