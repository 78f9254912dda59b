# SPDX-License-Identifier: Apache-2.0
"""How an older store becomes a newer one: Alembic revisions, run when a store is opened.

`env.py` is Alembic's entry; `versions/` has one file a version, each with what turns the version
before into it. All that are due run in one transaction, which also writes the new version: a store
is of one version or of the other.
"""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

from services.orchestrator.store import schema

_HERE = Path(__file__).parent


def revision(version: int) -> str:
    """Alembic's name of a version of the schema."""
    return f"{version:04}"


def stamp(connection: sa.Connection, version: int) -> None:
    """Write which version the tables are of."""
    schema.alembic_version.create(connection, checkfirst=True)
    connection.execute(sa.delete(schema.alembic_version))
    connection.execute(sa.insert(schema.alembic_version).values(version_num=revision(version)))


def run(connection: sa.Connection, version: int) -> None:
    """Upgrade from `version` to the newest, in the transaction that `connection` is in."""
    # Half a second of imports, which a start that upgrades nothing does not pay.
    from alembic import command
    from alembic.config import Config

    if not sa.inspect(connection).has_table(schema.alembic_version.name):
        stamp(connection, version)  # up to version 3 it was in `meta` alone
    config = Config()
    config.set_main_option("script_location", str(_HERE).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, revision(schema.SCHEMA_VERSION))
