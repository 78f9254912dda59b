# SPDX-License-Identifier: Apache-2.0
"""The tables, and how an older store becomes a newer one.

Kept to what SQLite and PostgreSQL share, except the triggers: those repeat in SQLite what the code
never does, so that a bug, or a person with a shell, cannot change a decision or revive an epoch.
"""

from __future__ import annotations

import sqlalchemy as sa

SCHEMA_VERSION = 3

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
)

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

_TRIGGERS = (
    _GIVEN_BACK_IS_FINAL,
    _PHASES_OF_A_RETURN,
    """CREATE TRIGGER IF NOT EXISTS decision_is_final BEFORE UPDATE OF decision ON migrations
       WHEN OLD.decision IS NOT NULL AND NEW.decision IS NOT OLD.decision
       BEGIN SELECT RAISE(ABORT, 'I2: a decision is never changed'); END""",
    """CREATE TRIGGER IF NOT EXISTS terminal_is_final BEFORE UPDATE OF phase ON migrations
       WHEN OLD.terminal AND NEW.phase IS NOT OLD.phase
       BEGIN SELECT RAISE(ABORT, 'I7: a terminal phase is never left'); END""",
    """CREATE TRIGGER IF NOT EXISTS epochs_only_grow BEFORE UPDATE ON epochs
       WHEN NEW.last_epoch <= OLD.last_epoch
       BEGIN SELECT RAISE(ABORT, 'I1: an epoch is never reused'); END""",
    """CREATE TRIGGER IF NOT EXISTS epochs_stay BEFORE DELETE ON epochs
       BEGIN SELECT RAISE(ABORT, 'I1: an epoch is never forgotten'); END""",
)
for _trigger in _TRIGGERS:
    _ddl = sa.DDL(_trigger)  # type: ignore[no-untyped-call]
    sa.event.listen(metadata, "after_create", _ddl.execute_if(dialect="sqlite"))

UPGRADES: dict[int, tuple[str, ...]] = {
    1: (
        "ALTER TABLE migrations ADD COLUMN return_epoch BIGINT NOT NULL DEFAULT 0",
        "ALTER TABLE migrations ADD COLUMN given_back BOOLEAN NOT NULL DEFAULT 0",
        "ALTER TABLE migrations ADD COLUMN by_force BOOLEAN NOT NULL DEFAULT 0",
        "ALTER TABLE migrations ADD COLUMN source_owed BOOLEAN NOT NULL DEFAULT 0",
        _GIVEN_BACK_IS_FINAL,
        _PHASES_OF_A_RETURN,
    ),
    2: ("ALTER TABLE migrations ADD COLUMN freeze_after_ms BIGINT NOT NULL DEFAULT 0",),
}
"""Statements that turn the schema of version N into N + 1, by N. One transaction for all of them;
tables that are new are made before."""
