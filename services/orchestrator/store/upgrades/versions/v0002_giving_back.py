# SPDX-License-Identifier: Apache-2.0
"""A guest can be given back to its source (I5). SQLite only: there was no PostgreSQL store yet."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_GIVEN_BACK_IS_FINAL = """CREATE TRIGGER IF NOT EXISTS given_back_is_final
       BEFORE UPDATE ON migrations
       WHEN (OLD.given_back AND NOT NEW.given_back) OR (NEW.given_back
       AND (NEW.return_epoch <= NEW.epoch OR NEW.decision IS NOT 'committed'))
       BEGIN SELECT RAISE(ABORT, 'I5: what was given back stays so, under a fresh epoch'); END"""
_PHASES_OF_A_RETURN = """CREATE TRIGGER IF NOT EXISTS phases_of_a_return
       BEFORE UPDATE OF phase ON migrations
       WHEN (NEW.phase IN ('given_back', 'returned') AND NOT NEW.given_back)
       OR (NEW.phase = 'giving_back' AND NEW.decision IS NOT 'committed')
       OR (NEW.given_back AND NEW.phase NOT IN ('given_back', 'returned', 'lost'))
       BEGIN SELECT RAISE(ABORT, 'I5: the source owns what was given back, and only that'); END"""
_EVENTS = """CREATE TABLE IF NOT EXISTS events (
       migration_id TEXT NOT NULL REFERENCES migrations (migration_id),
       sequence BIGINT NOT NULL,
       at_ns BIGINT NOT NULL,
       kind TEXT NOT NULL,
       node TEXT NOT NULL,
       message TEXT NOT NULL,
       action TEXT NOT NULL,
       hint TEXT NOT NULL,
       duration_ns BIGINT NOT NULL,
       held_ns BIGINT NOT NULL,
       evidence TEXT NOT NULL,
       PRIMARY KEY (migration_id, sequence))"""


def upgrade() -> None:
    """Nothing was given back yet."""
    for name, column_type, default in (
        ("return_epoch", sa.BigInteger, "0"),
        ("given_back", sa.Boolean, sa.false()),
        ("by_force", sa.Boolean, sa.false()),
        ("source_owed", sa.Boolean, sa.false()),
    ):
        column = sa.Column(name, column_type, nullable=False, server_default=default)
        op.add_column("migrations", column)
    op.execute(_EVENTS)
    op.execute(_GIVEN_BACK_IS_FINAL)
    op.execute(_PHASES_OF_A_RETURN)
