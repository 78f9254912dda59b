# SPDX-License-Identifier: Apache-2.0
"""Stores for tests, on SQLite and on PostgreSQL alike, and what is put into them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from services.common.vm_spec import VmSpec
from services.orchestrator.migration import Phase
from services.orchestrator.store import Store, open_store
from services.orchestrator.store.rows import MigrationRow, VmRow

SPEC = VmSpec(vm_id="vm-1", memory_bytes=64 << 20, kernel="/boot/vmlinuz")

Place = str | Path
"""What `--store` names."""


@contextlib.asynccontextmanager
async def fleet_store(place: Place) -> AsyncIterator[Store]:
    """A store with nodes a and b and vm-1 on a."""
    async with open_store(place) as opened:
        for node in "ab":
            await opened.fleet.put_node(node, f"127.0.0.1:{1000 + ord(node)}", now_ns=1)
        await start(opened, SPEC)
        yield opened


async def start(store: Store, spec: VmSpec, node: str = "a") -> VmRow:
    """A VM that runs."""
    vm = await store.fleet.begin_start(spec, node, now_ns=1)
    started = await store.fleet.finish_start(vm.vm_id, vm.epoch)
    assert started is not None
    return started


async def execute(store: Store, statement: str) -> None:
    """Run SQL as a person with a shell would, on the connection that writes."""

    def work(connection: sa.Connection) -> None:
        connection.exec_driver_sql(statement)

    await store.database.write(work)


async def admit(store: Store, migration_id: str = "m1", **fields: Any) -> MigrationRow:
    """A migration of vm-1 to b."""
    vm = await store.fleet.vm("vm-1")
    assert vm is not None
    row = MigrationRow.new(
        migration_id=migration_id,
        vm=vm,
        destination_node="b",
        bulk_bytes_per_s_max=0,
        traceparent="",
        now_ns=1,
    )
    row = replace(row, **fields)
    await store.migrations.create(row, None)
    return row


async def switchover(store: Store, migration_id: str = "m1") -> MigrationRow:
    """A migration that only waits for its decision."""
    row = await store.migrations.reserve_epoch(await admit(store, migration_id))
    return await store.migrations.enter(row, Phase.SWITCHOVER, now_ns=2)
