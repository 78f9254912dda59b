# SPDX-License-Identifier: Apache-2.0
"""Orchestrators that stand by for each other, and indexes for a long history. SQLite only."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

_TERMS_ONLY_GROW = """CREATE TRIGGER IF NOT EXISTS terms_only_grow BEFORE UPDATE ON leadership
       WHEN NEW.term < OLD.term
       BEGIN SELECT RAISE(ABORT, 'I13: a term that is over does not come back'); END"""
_LEADERSHIP_STAYS = """CREATE TRIGGER IF NOT EXISTS leadership_stays BEFORE DELETE ON leadership
       BEGIN SELECT RAISE(ABORT, 'I13: without its row nobody is fenced'); END"""


def upgrade() -> None:
    """Nobody has led yet."""
    made = op.create_table(
        "leadership",
        sa.Column("one", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("term", sa.BigInteger, nullable=False),
        sa.Column("holder", sa.Text, nullable=False),
        sa.Column("rest", sa.Text, nullable=False),
        sa.Column("grpc", sa.Text, nullable=False),
        sa.Column("expires_at_ns", sa.BigInteger, nullable=False),
        sa.CheckConstraint("one = 1", name="leadership_is_one"),
    )
    row = {"one": 1, "term": 0, "holder": "", "rest": "", "grpc": "", "expires_at_ns": 0}
    op.bulk_insert(made, [row])
    op.create_index(
        "migrations_unfinished",
        "migrations",
        ["migration_id"],
        sqlite_where=sa.text("terminal = 0"),
    )
    op.create_index(
        "migrations_owing",
        "migrations",
        ["migration_id"],
        sqlite_where=sa.text("destination_owed = 1 OR source_owed = 1"),
    )
    op.create_index("idempotency_by_age", "idempotency", ["created_at_ns"])
    op.execute(_TERMS_ONLY_GROW)
    op.execute(_LEADERSHIP_STAYS)
