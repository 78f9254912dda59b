# SPDX-License-Identifier: Apache-2.0
"""Alembic runs this. The connection is in a transaction already; see __init__.py."""

from __future__ import annotations

from alembic import context

from services.orchestrator.store import schema

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=schema.metadata,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
