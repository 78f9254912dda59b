# SPDX-License-Identifier: Apache-2.0
"""A queue, limits, policies, placement, and operations over many VMs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """What is under way was never in a queue: it holds what it would have been given."""
    op.create_table(
        "admissions",
        sa.Column(
            "migration_id", sa.Text, sa.ForeignKey("migrations.migration_id"), primary_key=True
        ),
        sa.Column("priority", sa.BigInteger, nullable=False),
        sa.Column("target", sa.Text, nullable=False),
        sa.Column("operation_id", sa.Text, nullable=False),
        sa.Column("settings", sa.Text, nullable=False),
        sa.Column("policies", sa.Text, nullable=False),
        sa.Column("admitted_at_ns", sa.BigInteger, nullable=False),
        sa.Column("because", sa.Text, nullable=False),
    )
    op.create_table(
        "tokens",
        sa.Column(
            "migration_id", sa.Text, sa.ForeignKey("migrations.migration_id"), primary_key=True
        ),
        sa.Column("key", sa.Text, primary_key=True),
    )
    op.create_table(
        "limits",
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("value", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "switches",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("value", sa.Text, nullable=False),
    )
    op.create_table(
        "policies",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("match_labels", sa.Text, nullable=False),
        sa.Column("settings", sa.Text, nullable=False),
    )
    op.create_table(
        "node_settings",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("labels", sa.Text, nullable=False),
        sa.Column("taints", sa.Text, nullable=False),
        sa.Column("link", sa.Text, nullable=False),
        sa.Column("closed_by", sa.Text, nullable=False),
    )
    op.create_table(
        "vm_settings",
        sa.Column("vm_id", sa.Text, primary_key=True),
        sa.Column("labels", sa.Text, nullable=False),
        sa.Column("placing", sa.Text, nullable=False),
    )
    op.create_table(
        "operations",
        sa.Column("operation_id", sa.Text, primary_key=True),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("node", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("ended", sa.Boolean, nullable=False),
        sa.Column("paused", sa.Boolean, nullable=False),
        sa.Column("options", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("hint", sa.Text, nullable=False),
        sa.Column("created_at_ns", sa.BigInteger, nullable=False),
        sa.Column("ended_at_ns", sa.BigInteger, nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "operation_vms",
        sa.Column(
            "operation_id", sa.Text, sa.ForeignKey("operations.operation_id"), primary_key=True
        ),
        sa.Column("vm_id", sa.Text, primary_key=True),
        sa.Column("sequence", sa.BigInteger, nullable=False),
        sa.Column("source", sa.Text, nullable=False),
        sa.Column("target", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("migration_id", sa.Text, nullable=False),
        sa.Column("attempts", sa.BigInteger, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("hint", sa.Text, nullable=False),
    )
