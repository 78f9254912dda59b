# SPDX-License-Identifier: Apache-2.0
"""Migrations that failed are tried again, as their policies say."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """What was asked for before is not tried again: nobody was told that it would be."""
    for name, column_type, default in (
        ("attempt", sa.BigInteger, "1"),
        ("retry_of", sa.Text, ""),
        ("retries_left", sa.BigInteger, "0"),
    ):
        column = sa.Column(name, column_type, nullable=False, server_default=default)
        op.add_column("admissions", column)
    for index, column_name, unique, where in (
        ("admissions_one_retry", "retry_of", True, "retry_of <> ''"),
        ("admissions_with_retries", "migration_id", False, "retries_left > 0"),
    ):
        op.create_index(
            index,
            "admissions",
            [column_name],
            unique=unique,
            sqlite_where=sa.text(where),
            postgresql_where=sa.text(where),
        )
