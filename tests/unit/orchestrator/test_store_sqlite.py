# SPDX-License-Identifier: Apache-2.0
"""What is SQLite's own: how it is durable, and how its failures are told apart."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from services.orchestrator.migration import Decision
from services.orchestrator.store import (
    Store,
    StoreBusyError,
    StoreError,
    StoreFullError,
    StoreReadOnlyError,
    open_store,
    sqlite,
)
from tests.harness.stores import admit, execute, fleet_store, switchover


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    async with fleet_store(tmp_path / "s.db") as opened:
        yield opened


async def test_is_durable_by_its_settings(tmp_path: Path) -> None:
    """I2: WAL, and every commit is synced, on the connections that write."""

    def ask(connection: sa.Connection) -> list[object]:
        pragmas = ("journal_mode", "synchronous", "foreign_keys")
        return [connection.exec_driver_sql(f"PRAGMA {name}").scalar_one() for name in pragmas]

    async with open_store(tmp_path / "s.db") as store:
        assert await store.database.write(ask) == ["wal", 2, 1]
        assert await store.database.write_then_read(lambda _c: None, ask) == ["wal", 2, 1]


async def test_no_commit_pays_for_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs beside the writes; what was written is in the file without the WAL then."""
    monkeypatch.setattr(sqlite, "CHECKPOINT_WRITES", 5)
    ran = threading.Event()

    class Watched(sqlite.SqliteDatabase):
        def _checkpoint(self) -> None:
            super()._checkpoint()
            ran.set()

    monkeypatch.setattr(sqlite, "SqliteDatabase", Watched)
    async with open_store(tmp_path / "s.db") as store:

        def ask(connection: sa.Connection) -> object:
            return connection.exec_driver_sql("PRAGMA wal_autocheckpoint").scalar_one()

        assert await store.database.write(ask) == 0
        before = (tmp_path / "s.db").read_bytes()
        for number in range(5):
            await store.fleet.put_node(f"n{number}", "127.0.0.1:1", now_ns=1)
        assert await asyncio.to_thread(ran.wait, 60)
        assert (tmp_path / "s.db").read_bytes() != before


async def test_full_disk_is_typed_and_loses_nothing(store: Store) -> None:
    row = await switchover(store)
    await execute(store, "PRAGMA max_page_count = 1")
    with pytest.raises(StoreFullError, match="STORE_FULL") as full:
        await store.migrations.record("m1", counters=b"x" * 2_000_000)
    assert full.value.hint
    assert full.value.retryable
    # Reading goes on, and what fits into the pages that are there.
    assert (await store.migrations.get("m1")) is not None
    decided = await store.migrations.decide(row, Decision.ABORTED, now_ns=3)
    assert decided.decision is Decision.ABORTED


async def test_decision_on_a_full_disk_is_undecided(store: Store) -> None:
    row = await switchover(store)

    def fill(connection: sa.Connection) -> None:
        connection.exec_driver_sql("PRAGMA max_page_count = 1")
        connection.exec_driver_sql("UPDATE migrations SET counters = zeroblob(1000000)")

    with pytest.raises(StoreFullError):
        await store.database.write(fill)
    found = await store.migrations.get("m1")
    assert found is not None
    assert found.decision is None
    assert row.version == found.version


async def test_read_only_store_is_typed(store: Store) -> None:
    await admit(store)
    await execute(store, "PRAGMA query_only = ON")
    with pytest.raises(StoreReadOnlyError, match="STORE_READ_ONLY"):
        await store.migrations.record("m1", reason="x")


async def test_locked_store_is_typed(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process that holds the lock is told apart from a broken disk."""
    await execute(store, "PRAGMA busy_timeout = 1")
    with contextlib.closing(sqlite3.connect(tmp_path / "s.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreBusyError, match="STORE_BUSY"):
            await store.fleet.put_node("c", "127.0.0.1:1", now_ns=1)
        # Readers do not care.
        assert len(await store.fleet.nodes()) == 2
        other.execute("ROLLBACK")
    await store.fleet.put_node("c", "127.0.0.1:1", now_ns=1)


async def test_file_that_is_no_store_is_typed(tmp_path: Path) -> None:
    (tmp_path / "s.db").write_bytes(b"not a database" * 1000)
    with pytest.raises(StoreError, match="STORE_FAILED"):
        async with open_store(tmp_path / "s.db"):
            pass
