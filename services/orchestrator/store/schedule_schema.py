# SPDX-License-Identifier: Apache-2.0
"""The tables of scheduling: who waits, who holds which token, limits, policies, operations."""

from __future__ import annotations

import sqlalchemy as sa

from services.orchestrator.store.schema import metadata

admissions = sa.Table(
    "admissions",
    metadata,
    sa.Column("migration_id", sa.Text, sa.ForeignKey("migrations.migration_id"), primary_key=True),
    sa.Column("priority", sa.BigInteger, nullable=False),
    sa.Column("target", sa.Text, nullable=False),
    sa.Column("operation_id", sa.Text, nullable=False),
    sa.Column("settings", sa.Text, nullable=False),
    sa.Column("policies", sa.Text, nullable=False),
    sa.Column("admitted_at_ns", sa.BigInteger, nullable=False),
    sa.Column("because", sa.Text, nullable=False),
    sa.Column("attempt", sa.BigInteger, nullable=False, server_default="1"),
    sa.Column("retry_of", sa.Text, nullable=False, server_default=""),
    sa.Column("retries_left", sa.BigInteger, nullable=False, server_default="0"),
    # A failure is tried again once, whoever finds it.
    sa.Index(
        "admissions_one_retry",
        "retry_of",
        unique=True,
        sqlite_where=sa.text("retry_of <> ''"),
        postgresql_where=sa.text("retry_of <> ''"),
    ),
    sa.Index(
        "admissions_with_retries",
        "migration_id",
        sqlite_where=sa.text("retries_left > 0"),
        postgresql_where=sa.text("retries_left > 0"),
    ),
)
"""Of a migration that went through the queue. target: the node asked for, "": any. settings: what
the policies said when it was asked for, as JSON. admitted_at_ns: 0 while it waits. attempt: from 1.
retry_of: the one that failed and of which it is the next try. retries_left: how many follow if it
fails; 0 too once it is settled that none does."""

tokens = sa.Table(
    "tokens",
    metadata,
    sa.Column("migration_id", sa.Text, sa.ForeignKey("migrations.migration_id"), primary_key=True),
    sa.Column("key", sa.Text, primary_key=True),
)
"""Held by a migration for as long as it is not terminal, and only so long: a terminal phase is what
gives them back, whoever wrote it (I9)."""

limits = sa.Table(
    "limits",
    metadata,
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("value", sa.BigInteger, nullable=False),
)

switches = sa.Table(
    "switches",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)
"""`frozen`: why admissions are frozen; no row, or "", while they are not."""

policies = sa.Table(
    "policies",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("match_labels", sa.Text, nullable=False),
    sa.Column("settings", sa.Text, nullable=False),
)

node_settings = sa.Table(
    "node_settings",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("labels", sa.Text, nullable=False),
    sa.Column("taints", sa.Text, nullable=False),
    sa.Column("link", sa.Text, nullable=False),
    sa.Column("closed_by", sa.Text, nullable=False),
)
"""closed_by: the drain that keeps it empty; "": moves may come."""

vm_settings = sa.Table(
    "vm_settings",
    metadata,
    sa.Column("vm_id", sa.Text, primary_key=True),
    sa.Column("labels", sa.Text, nullable=False),
    sa.Column("placing", sa.Text, nullable=False),
)

operations = sa.Table(
    "operations",
    metadata,
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

operation_vms = sa.Table(
    "operation_vms",
    metadata,
    sa.Column("operation_id", sa.Text, sa.ForeignKey("operations.operation_id"), primary_key=True),
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
"""target: before the move the node asked for, "": any; after it the node where the VM went."""

TABLES = (
    admissions,
    tokens,
    limits,
    switches,
    policies,
    node_settings,
    vm_settings,
    operations,
    operation_vms,
)
