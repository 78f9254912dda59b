# SPDX-License-Identifier: Apache-2.0
"""A store of an older release keeps every owner, epoch and decision in a newer one."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from services.orchestrator.migration import (
    FORWARD,
    PAST_ABORT,
    PAST_COMMIT,
    TERMINAL,
    UNDOING,
    Decision,
    NeverRan,
    Phase,
)
from services.orchestrator.store import (
    Store,
    open_store,
    opening,
    schedule_schema,
    schema,
    upgrades,
)
from services.orchestrator.store.backup import check
from services.orchestrator.store.rows import MigrationRow
from tests.harness.stores import Place

OLD = Path(__file__).with_name("store_v1.sql")

V1_PHASES = tuple(
    phase
    for phase in (*FORWARD, *UNDOING, *PAST_ABORT, *PAST_COMMIT, Phase.SUCCEEDED, Phase.LOST)
    if phase is not Phase.GIVING_BACK
)
"""All that version 1 had."""
WITHOUT_EPOCH = (Phase.PENDING, Phase.VALIDATING, Phase.RESERVING)


def _decision(phase: Phase) -> str | None:
    if phase in PAST_ABORT:
        return "aborted"
    return None if phase in (*FORWARD, *UNDOING) else "committed"


def _migration(number: int, phase: Phase) -> dict[str, Any]:
    """A row as version 1 wrote it, each with values of its own."""
    terminal = phase in TERMINAL
    return {
        "migration_id": f"m-{phase}",
        "vm_id": f"vm-{phase}",
        "source_node": "a",
        "destination_node": "b",
        "bulk_bytes_per_s_max": number,
        "traceparent": f"00-{number:032x}-{number:016x}-01",
        "phase": phase.value,
        "terminal": terminal,
        "decision": _decision(phase),
        "source_epoch": 10 * number,
        "epoch": 0 if phase in WITHOUT_EPOCH else 10 * number + 1,
        "resume_epoch": 10 * number + 2 if phase in PAST_ABORT else 0,
        "source_boot_id": f"boot-{number}",
        "page_size_bytes": 4096,
        "cancel_requested": phase is Phase.CANCELLING,
        "undo_is_cancel": phase in (Phase.CANCELLING, Phase.CANCELLED),
        "guest_ended": False,
        "destination_owed": phase is Phase.FAILED,
        "reason": f"REASON_{number}",
        "message": f"message {number}",
        "hint": f"hint {number}",
        "wait_reason": f"WAIT_{number}",
        "wait_message": "",
        "wait_hint": "",
        "created_at_ns": 1000 + number,
        "phase_at_ns": 2000 + number,
        "ended_at_ns": 3000 + number if terminal else 0,
        "pause_ns": number,
        "progress": number / 100,
        "counters": bytes([number]),
        "version": number,
    }


MIGRATIONS = {phase: _migration(number, phase) for number, phase in enumerate(V1_PHASES, start=1)}


def _owner(migration: dict[str, Any]) -> tuple[str, int]:
    """Who owns the guest of a migration, and under which epoch."""
    if migration["decision"] == "committed":
        return "b", migration["epoch"]
    return "a", migration["resume_epoch"] or migration["source_epoch"]


def _insert(connection: sqlite3.Connection, table: str, row: dict[str, Any]) -> None:
    names, marks = ", ".join(row), ", ".join("?" * len(row))
    connection.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", tuple(row.values()))


@pytest.fixture
def old_store(tmp_path: Path) -> Path:
    """A store of version 1 with a guest, and its migration, in each phase."""
    path = tmp_path / "godwit.db"
    with _opened(path) as connection:
        connection.executescript(OLD.read_text())
        for key, value in (("incarnation", "STORE-1"), ("schema_version", "1")):
            _insert(connection, "meta", {"key": key, "value": value})
        for name in "ab":
            node = {"name": name, "agent_address": f"10.0.0.1:{ord(name)}", "registered_at_ns": 1}
            _insert(connection, "nodes", node)
        for migration in MIGRATIONS.values():
            node_name, epoch = _owner(migration)
            last = max(migration[name] for name in ("source_epoch", "epoch", "resume_epoch"))
            _insert(connection, "epochs", {"vm_id": migration["vm_id"], "last_epoch": last})
            vm = {
                "vm_id": migration["vm_id"],
                "node": node_name,
                "epoch": epoch,
                "state": "running",
                "spec_json": "{}",
                "spec_hash": "hash",
                "memory_bytes": 1 << 20,
                "created_at_ns": 5,
            }
            _insert(connection, "vms", vm)
            _insert(connection, "migrations", migration)
            for sequence, phase in enumerate(("pending", migration["phase"])):
                entered = {"sequence": sequence, "phase": phase, "at_ns": sequence, "message": "x"}
                _insert(
                    connection, "transitions", {"migration_id": migration["migration_id"]} | entered
                )
        bitmap = {"page_size_bytes": 4096, "page_count": 8, "absent_count": 3, "packed": b"\x07"}
        _insert(connection, "bitmaps", {"vm_id": "vm-postcopy", "epoch": 1} | bitmap)
        answer = {"request_hash": "hash", "response": b"answer", "created_at_ns": 6}
        _insert(connection, "idempotency", {"key": "key"} | answer)
    return path


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.row_factory = sqlite3.Row
        with connection:
            yield connection


def _rows(path: Path, table: str) -> list[dict[str, Any]]:
    with _opened(path) as connection:
        order = "1" if table == "alembic_version" else "1, 2"
        query = f"SELECT * FROM {table} ORDER BY {order}"
        return [dict(row) for row in connection.execute(query)]


def _all(path: Path) -> dict[str, list[dict[str, Any]]]:
    with _opened(path) as connection:
        found = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    names = {name for (name,) in found}
    return {table: _rows(path, table) for table in schema.metadata.tables if table in names}


async def test_nothing_that_was_there_changes(old_store: Path) -> None:
    """Row by row, column by column, in every table; what is new says that nothing went back."""
    before = _all(old_store)
    async with open_store(old_store) as store:
        assert store.incarnation == "STORE-1"
        assert store.identity.in_doubt == ""
        await assert_as_written(store)
    after = _all(old_store)
    assert {row["key"]: row["value"] for row in after.pop("meta")} == {
        "incarnation": "STORE-1",
        "schema_version": str(schema.SCHEMA_VERSION),
    }
    del before["meta"]
    assert after.pop("events") == []
    assert after.pop("alembic_version") == [
        {"version_num": upgrades.revision(schema.SCHEMA_VERSION)}
    ]
    nobody = {"one": 1, "term": 0, "holder": "", "rest": "", "grpc": "", "expires_at_ns": 0}
    assert after.pop("leadership") == [nobody]
    for table in schedule_schema.TABLES:
        assert after.pop(table.name) == [], "nothing was ever in a queue"
    new = {"return_epoch": 0, "given_back": 0, "by_force": 0, "source_owed": 0}
    new |= {"freeze_after_ms": 0}
    before["migrations"] = [row | new for row in before["migrations"]]
    assert after == before
    check(old_store)
    # And again: it is upgraded once.
    async with open_store(old_store) as store:
        await assert_as_written(store)


async def assert_as_written(store: Store) -> None:
    """Owner, epochs and decision of every guest, as the release itself reads them."""
    for phase, migration in MIGRATIONS.items():
        row = await store.migrations.get(migration["migration_id"])
        vm = await store.fleet.vm(migration["vm_id"])
        assert row is not None
        assert vm is not None
        expected = {name: getattr(row, name) for name in migration}
        assert expected == migration, phase
        new = (row.return_epoch, row.given_back, row.by_force, row.source_owed)
        assert new == (0, False, False, False)
        assert (vm.node, vm.epoch) == _owner(migration)
        assert await store.fleet.last_epoch(row.vm_id) >= max(row.epoch, row.resume_epoch)
    unfinished = {row.phase for row in await store.migrations.unfinished()}
    assert unfinished == set(V1_PHASES) - TERMINAL
    assert [row.phase for row in await store.migrations.owing()] == [Phase.FAILED]


async def test_it_has_the_columns_triggers_and_indexes_of_a_new_one(
    old_store: Path, tmp_path: Path
) -> None:
    """A rule that only new stores keep is none."""
    new_store = tmp_path / "new.db"
    for path in (old_store, new_store):
        async with open_store(path):
            pass
    assert _shape(old_store) == _shape(new_store)


def _shape(path: Path) -> dict[str, object]:
    with _opened(path) as connection:
        shape: dict[str, object] = {
            table: sorted(
                (each["name"], each["type"], each["notnull"], (each["dflt_value"] or "").strip("'"))
                for each in connection.execute(f"PRAGMA table_info({table})")
            )
            for table in schema.metadata.tables
        }
        kinds = connection.execute(
            "SELECT name, sql FROM sqlite_master WHERE type != 'table' AND sql IS NOT NULL"
        )
        shape["others"] = {each["name"]: " ".join(each["sql"].split()) for each in kinds}
    return shape


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE migrations SET decision = 'aborted' WHERE migration_id = 'm-committed'",
        "UPDATE migrations SET phase = 'postcopy' WHERE migration_id = 'm-succeeded'",
        "UPDATE epochs SET last_epoch = last_epoch - 1 WHERE vm_id = 'vm-committed'",
        "DELETE FROM epochs WHERE vm_id = 'vm-committed'",
        # New with version 2.
        "UPDATE migrations SET phase = 'returned' WHERE migration_id = 'm-committed'",
        "UPDATE migrations SET phase = 'giving_back' WHERE migration_id = 'm-switchover'",
        "UPDATE migrations SET given_back = 1 WHERE migration_id = 'm-committed'",
        "UPDATE migrations SET given_back = 1, return_epoch = 9999 WHERE migration_id = 'm-ready'",
    ],
)
async def test_its_rules_hold_for_old_rows(old_store: Path, change: str) -> None:
    """Whatever writes, the tables refuse."""
    async with open_store(old_store):
        pass
    before = _all(old_store)
    with (
        pytest.raises(sqlite3.IntegrityError, match=r"I[1257]: "),
        _opened(old_store) as connection,
    ):
        connection.execute(change)
    assert _all(old_store) == before


@pytest.mark.parametrize("phase", [Phase.COMMITTED, Phase.NEEDS_ATTENTION])
async def test_an_old_migration_can_be_given_back(old_store: Path, phase: Phase) -> None:
    """What version 1 committed and nobody ran goes back under a fresh epoch."""
    async with open_store(old_store) as store:
        row = await _get(store, phase)
        note = NeverRan(reason="TEST", message="it never ran")
        row = await store.migrations.enter(row, Phase.GIVING_BACK, now_ns=7, note=note)
        row = await store.migrations.reserve_return_epoch(row)
        returned = await store.migrations.give_back(row, now_ns=8)
        assert (returned.given_back, returned.decision) == (True, Decision.COMMITTED)
        vm = await store.fleet.vm(row.vm_id)
        assert vm is not None
        assert (vm.node, vm.epoch) == ("a", row.return_epoch)
        assert row.return_epoch > row.epoch


async def _get(store: Store, phase: Phase) -> MigrationRow:
    row = await store.migrations.get(f"m-{phase}")
    assert row is not None
    return row


class _PulledError(Exception):
    """The plug was."""


def _changes(path: Path, plug: int | None) -> int:
    """Upgrade, but for `plug` statements; how many there were."""
    count = 0

    def seen(_connection: object, _cursor: object, statement: str, *_more: object) -> None:
        nonlocal count
        if not statement.lstrip().upper().startswith(("SELECT", "PRAGMA")):
            if count == plug:
                raise _PulledError
            count += 1

    engine = sa.create_engine(f"sqlite:///{path}")
    sa.event.listen(engine, "connect", lambda raw, _record: setattr(raw, "isolation_level", None))
    sa.event.listen(engine, "begin", lambda each: each.exec_driver_sql("BEGIN IMMEDIATE"))
    sa.event.listen(engine, "before_cursor_execute", seen)
    try:
        with contextlib.suppress(_PulledError), engine.begin() as connection:
            opening.prepare(connection)
    finally:
        engine.dispose()
    return count


async def test_an_upgrade_that_fails_half_way_changes_nothing(
    old_store: Path, tmp_path: Path
) -> None:
    """All of it or none: the older release, or the next try, finds the store as it was."""
    before = _all(old_store), _shape(old_store)
    shutil.copy(old_store, tmp_path / "copy.db")
    statements = _changes(tmp_path / "copy.db", None)
    assert statements > 15
    for plug in range(1, statements):
        assert _changes(old_store, plug) == plug
        assert (_all(old_store), _shape(old_store)) == before
    async with open_store(old_store) as store:
        await assert_as_written(store)


@pytest.mark.parametrize("version", [1, 2, 3])
async def test_every_version_becomes_the_newest(
    old_store: Path, tmp_path: Path, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store of version 2 or 3, as those releases left it: without Alembic's table."""
    if version > 1:
        with monkeypatch.context() as patch:
            patch.setattr(schema, "SCHEMA_VERSION", version)
            _changes(old_store, None)
        with _opened(old_store) as connection:
            connection.execute("DROP TABLE alembic_version")
    new_store = tmp_path / "new.db"
    for path in (old_store, new_store):
        async with open_store(path):
            pass
    assert _shape(old_store) == _shape(new_store)
    async with open_store(old_store) as store:
        await assert_as_written(store)


def test_revisions_end_at_the_newest_version() -> None:
    """One line of them, and the number in schema.py is its end."""
    from alembic.script import ScriptDirectory

    script = ScriptDirectory(str(Path(upgrades.__file__).parent))
    assert script.get_heads() == [upgrades.revision(schema.SCHEMA_VERSION)]
    known = [each.revision for each in script.walk_revisions()]
    assert sorted(known) == [upgrades.revision(n + 1) for n in range(schema.SCHEMA_VERSION)]


async def test_the_tables_are_what_schema_says(new_place: Callable[[], Place]) -> None:
    """On both dialects, as Alembic sees them."""
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    def compare(connection: sa.Connection) -> list[Any]:
        return list(compare_metadata(MigrationContext.configure(connection), schema.metadata))

    async with open_store(new_place()) as store:
        assert await store.database.read(compare) == []
