# SPDX-License-Identifier: Apache-2.0
"""Makes a store that is not there yet, upgrades an older one, refuses a newer one."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

from services.common.errors import FailedPreconditionError, InvalidArgumentError
from services.orchestrator.store import identity, leadership, rules, schema, upgrades
from services.orchestrator.store.database import Database

_POSTGRESQL = ("postgresql:", "postgres:", "postgresql+asyncpg:")


def server_of(where: str | Path) -> sa.URL | None:
    """The server that `--store` names; None: it is a file's path.

    Raises:
        InvalidArgumentError: STORE_INVALID.
    """
    text = str(where)
    if isinstance(where, Path) or not text.startswith(_POSTGRESQL):
        if "://" in text:
            raise InvalidArgumentError(
                "STORE_INVALID", f"{text!r} is neither a path nor postgresql://..."
            )
        return None
    try:
        return sa.make_url(text).set(drivername="postgresql")
    except sa.exc.ArgumentError as error:
        raise InvalidArgumentError("STORE_INVALID", str(error)) from error


def read_store(text: str) -> str | Path:
    """What `--store` says: a URL, or a path.

    Raises:
        InvalidArgumentError: STORE_INVALID.
    """
    return text if server_of(text) else Path(text)


def database_of(where: str | Path) -> Database:
    """The database there; nothing is opened yet."""
    if server := server_of(where):
        # A hundred milliseconds of imports, which an orchestrator on a file does not pay.
        from services.orchestrator.store.postgres import PostgresDatabase

        return PostgresDatabase(server)
    from services.orchestrator.store.sqlite import SqliteDatabase

    return SqliteDatabase(Path(where))


def prepare(connection: sa.Connection) -> dict[str, str]:
    """Make or upgrade the tables; what the store says of itself then.

    Raises:
        FailedPreconditionError: STORE_TOO_NEW: a newer Godwit wrote it; STORE_LED: it is to be
            upgraded, and an orchestrator of an older release leads.
    """
    if not sa.inspect(connection).has_table(schema.meta.name):
        return _make(connection)
    known = identity.read(connection)
    version = int(known[identity.SCHEMA_VERSION])
    if version > schema.SCHEMA_VERSION:
        raise FailedPreconditionError(
            "STORE_TOO_NEW",
            f"the store has schema {version}, this release knows up to {schema.SCHEMA_VERSION}",
            hint="run the release that wrote it, or a later one",
        )
    if version < schema.SCHEMA_VERSION:
        _refuse_if_led(connection)
        upgrades.run(connection, version)
        identity.put(connection, identity.SCHEMA_VERSION, str(schema.SCHEMA_VERSION))
    return known


def _refuse_if_led(connection: sa.Connection) -> None:
    if connection.dialect.name == "sqlite":
        return  # its lease is a lock of the file, which whoever opens it has looked at
    leader = leadership.lock(connection, leadership.UNFENCED)
    if leader.expires_at_ns > leadership.now_ns(connection):
        raise FailedPreconditionError(
            "STORE_LED",
            f"the store is to be upgraded, and {leader.holder} leads with an older release",
            hint="stop the orchestrators of the older release first",
            metadata={"leader": leader.holder, "rest": leader.rest},
        )


def _make(connection: sa.Connection) -> dict[str, str]:
    schema.metadata.create_all(connection)
    for statement in rules.create_all(connection.dialect.name):
        connection.exec_driver_sql(statement)
    known = {
        identity.INCARNATION: identity.new_incarnation(),
        identity.SCHEMA_VERSION: str(schema.SCHEMA_VERSION),
    }
    connection.execute(
        sa.insert(schema.meta), [{"key": key, "value": value} for key, value in known.items()]
    )
    leadership.make(connection)
    upgrades.stamp(connection, schema.SCHEMA_VERSION)
    return known
