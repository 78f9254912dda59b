# SPDX-License-Identifier: Apache-2.0
"""The first version. Nothing came before it: a new store is made whole, from schema.py."""

from __future__ import annotations

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Nothing to do."""
