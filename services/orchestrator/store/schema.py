# SPDX-License-Identifier: Apache-2.0
"""The tables of the newest version. A new store is made from them, on either dialect.

Whoever changes them adds a revision to `upgrades/versions`, which turns a store of the version
before into this one, and raises SCHEMA_VERSION; a test compares what comes out with what is here.
The triggers are in `rules.py`.
"""

from __future__ import annotations

import sqlalchemy as sa

SCHEMA_VERSION = 6
"""The newest revision in `upgrades/versions`. A store of a later one is refused (STORE_TOO_NEW)."""

metadata = sa.MetaData()

meta = sa.Table(
    "meta",
    metadata,
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)
"""`incarnation`: drawn when the store was made (I2). `schema_version`."""

nodes = sa.Table(
    "nodes",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("agent_address", sa.Text, nullable=False),
    sa.Column("registered_at_ns", sa.BigInteger, nullable=False),
)

epochs = sa.Table(
    "epochs",
    metadata,
    sa.Column("vm_id", sa.Text, primary_key=True),
    sa.Column("last_epoch", sa.BigInteger, nullable=False),
)
"""Outlives the VM: an id that is used again goes on counting."""

vms = sa.Table(
    "vms",
    metadata,
    sa.Column("vm_id", sa.Text, primary_key=True),
    sa.Column("node", sa.Text, sa.ForeignKey("nodes.name"), nullable=False),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("spec_json", sa.Text, nullable=False),
    sa.Column("spec_hash", sa.Text, nullable=False),
    sa.Column("memory_bytes", sa.BigInteger, nullable=False),
    sa.Column("created_at_ns", sa.BigInteger, nullable=False),
    sa.CheckConstraint("state IN ('starting', 'running', 'stopping')", name="vms_state"),
)
"""node and epoch: who owns the guest (I1). Written by a start, and by a decision."""

migrations = sa.Table(
    "migrations",
    metadata,
    sa.Column("migration_id", sa.Text, primary_key=True),
    sa.Column("vm_id", sa.Text, nullable=False),
    sa.Column("source_node", sa.Text, nullable=False),
    sa.Column("destination_node", sa.Text, nullable=False),
    sa.Column("bulk_bytes_per_s_max", sa.BigInteger, nullable=False),
    sa.Column("freeze_after_ms", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("traceparent", sa.Text, nullable=False),
    sa.Column("phase", sa.Text, nullable=False),
    sa.Column("terminal", sa.Boolean, nullable=False),
    sa.Column("decision", sa.Text),
    sa.Column("source_epoch", sa.BigInteger, nullable=False),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("resume_epoch", sa.BigInteger, nullable=False),
    sa.Column("source_boot_id", sa.Text, nullable=False),
    sa.Column("page_size_bytes", sa.BigInteger, nullable=False),
    sa.Column("cancel_requested", sa.Boolean, nullable=False),
    sa.Column("undo_is_cancel", sa.Boolean, nullable=False),
    sa.Column("guest_ended", sa.Boolean, nullable=False),
    sa.Column("destination_owed", sa.Boolean, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("hint", sa.Text, nullable=False),
    sa.Column("wait_reason", sa.Text, nullable=False),
    sa.Column("wait_message", sa.Text, nullable=False),
    sa.Column("wait_hint", sa.Text, nullable=False),
    sa.Column("created_at_ns", sa.BigInteger, nullable=False),
    sa.Column("phase_at_ns", sa.BigInteger, nullable=False),
    sa.Column("ended_at_ns", sa.BigInteger, nullable=False),
    sa.Column("pause_ns", sa.BigInteger, nullable=False),
    sa.Column("progress", sa.Float, nullable=False),
    sa.Column("counters", sa.LargeBinary, nullable=False),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("return_epoch", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("given_back", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("by_force", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("source_owed", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.CheckConstraint("decision IN ('committed', 'aborted')", name="migrations_decision"),
    sa.CheckConstraint(
        "(phase NOT IN ('failed', 'cancelled', 'aborted') OR decision = 'aborted') AND "
        "(phase NOT IN ('committed', 'postcopy', 'postcopy_paused', 'recovering', 'finalizing', "
        "'succeeded', 'needs_attention', 'lost') OR decision = 'committed')",
        name="migrations_phase_needs_decision",
    ),
    sa.Index(
        "migrations_one_active",
        "vm_id",
        unique=True,
        sqlite_where=sa.text("terminal = 0"),
        postgresql_where=sa.text("NOT terminal"),
    ),
    sa.Index("migrations_by_vm", "vm_id", "migration_id"),
    # What is looked for every few seconds must not be looked for in years of history.
    sa.Index(
        "migrations_unfinished",
        "migration_id",
        sqlite_where=sa.text("terminal = 0"),
        postgresql_where=sa.text("NOT terminal"),
    ),
    sa.Index(
        "migrations_owing",
        "migration_id",
        sqlite_where=sa.text("destination_owed = 1 OR source_owed = 1"),
        postgresql_where=sa.text("destination_owed OR source_owed"),
    ),
)

transitions = sa.Table(
    "transitions",
    metadata,
    sa.Column("migration_id", sa.Text, sa.ForeignKey("migrations.migration_id"), primary_key=True),
    sa.Column("sequence", sa.BigInteger, primary_key=True),
    sa.Column("phase", sa.Text, nullable=False),
    sa.Column("at_ns", sa.BigInteger, nullable=False),
    sa.Column("message", sa.Text, nullable=False),
)

events = sa.Table(
    "events",
    metadata,
    sa.Column("migration_id", sa.Text, sa.ForeignKey("migrations.migration_id"), primary_key=True),
    sa.Column("sequence", sa.BigInteger, primary_key=True),
    sa.Column("at_ns", sa.BigInteger, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("node", sa.Text, nullable=False),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("action", sa.Text, nullable=False),
    sa.Column("hint", sa.Text, nullable=False),
    sa.Column("duration_ns", sa.BigInteger, nullable=False),
    sa.Column("held_ns", sa.BigInteger, nullable=False),
    sa.Column("evidence", sa.Text, nullable=False),
)
"""What happened to a migration, in words. Bounded: see migrations.add_event."""

bitmaps = sa.Table(
    "bitmaps",
    metadata,
    sa.Column("vm_id", sa.Text, primary_key=True),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("page_size_bytes", sa.BigInteger, nullable=False),
    sa.Column("page_count", sa.BigInteger, nullable=False),
    sa.Column("absent_count", sa.BigInteger, nullable=False),
    sa.Column("packed", sa.LargeBinary, nullable=False),
)

idempotency = sa.Table(
    "idempotency",
    metadata,
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("request_hash", sa.Text, nullable=False),
    sa.Column("response", sa.LargeBinary, nullable=False),
    sa.Column("created_at_ns", sa.BigInteger, nullable=False),
    # The oldest are let go of at each admission.
    sa.Index("idempotency_by_age", "created_at_ns"),
)

leadership = sa.Table(
    "leadership",
    metadata,
    sa.Column("one", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("term", sa.BigInteger, nullable=False),
    sa.Column("holder", sa.Text, nullable=False),
    sa.Column("rest", sa.Text, nullable=False),
    sa.Column("grpc", sa.Text, nullable=False),
    sa.Column("expires_at_ns", sa.BigInteger, nullable=False),
    sa.CheckConstraint("one = 1", name="leadership_is_one"),
)
"""Who leads, in which term, until when by the server's clock, and where it is called. One row: see
leadership.py."""

alembic_version = sa.Table(
    "alembic_version",
    metadata,
    sa.Column("version_num", sa.String(32), nullable=False),
    sa.PrimaryKeyConstraint("version_num", name="alembic_version_pkc"),
)
"""As Alembic would make it."""
