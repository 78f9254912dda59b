# SPDX-License-Identifier: Apache-2.0
"""A migration says when its guest is to be frozen on a lost link. SQLite only."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Those that are there never freeze."""
    column = sa.Column("freeze_after_ms", sa.BigInteger, nullable=False, server_default="0")
    op.add_column("migrations", column)
