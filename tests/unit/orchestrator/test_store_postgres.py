# SPDX-License-Identifier: Apache-2.0
"""What is PostgreSQL's own: how it is durable, how its failures are told apart, how it is put back.

On a real server, which some of these tests stop: they have one of their own.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from services.cli import store as cli
from services.common.errors import FailedPreconditionError, InvalidArgumentError
from services.common.listen import Address
from services.orchestrator.main import Settings, working
from services.orchestrator.migration import Decision, Phase
from services.orchestrator.store import (
    StoreBusyError,
    StoreError,
    StoreReadOnlyError,
    leadership,
    open_store,
    postgres,
    schema,
)
from tests.harness.fake_fleet import VM, eventually, fake_fleet
from tests.harness.postgres import Server, directory, serving
from tests.harness.stores import admit, execute, fleet_store, switchover

pytestmark = pytest.mark.requires("postgres")


@pytest.fixture
def own_server() -> Iterator[Server]:
    with serving() as server:
        yield server


async def test_is_durable_by_its_settings(new_database: Callable[[], str]) -> None:
    """I2, whatever the server's configuration and the role's say; reads are of one snapshot."""
    url = new_database()

    def ask(*names: str) -> Callable[[sa.Connection], list[object]]:
        return lambda connection: [
            connection.exec_driver_sql(f"SHOW {name}").scalar_one() for name in names
        ]

    async with open_store(url) as store:
        await execute(store, "ALTER ROLE godwit SET synchronous_commit = off")
    try:
        async with open_store(url) as store:
            settings = ("synchronous_commit", "transaction_isolation", "transaction_read_only")
            written = await store.database.write(ask(*settings))
            assert written == ["on", "read committed", "off"]
            assert await store.database.read(ask(*settings[1:])) == ["repeatable read", "on"]
    finally:
        async with open_store(url) as store:
            await execute(store, "ALTER ROLE godwit RESET synchronous_commit")


async def test_who_reads_cannot_write(new_database: Callable[[], str]) -> None:
    async with fleet_store(new_database()) as store:
        with pytest.raises(StoreReadOnlyError, match="STORE_READ_ONLY"):
            await store.database.read(lambda c: c.execute(sa.delete(schema.vms)))
        assert await store.fleet.vm(VM) is not None


async def test_a_row_that_another_process_keeps_is_typed(
    new_database: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody with a shell who holds the lock is told apart from a server that is away."""
    url = new_database()
    monkeypatch.setattr(postgres, "BUSY_S_MAX", 1)
    async with fleet_store(url) as store, open_store(url) as other:
        held, over = asyncio.Event(), asyncio.Event()

        async def hold() -> None:
            engine = other.database._writer  # type: ignore[attr-defined]
            async with engine.begin() as connection:
                await connection.run_sync(lambda sync: leadership.lock(sync, None))
                held.set()
                await over.wait()

        task = asyncio.create_task(hold())
        await held.wait()
        with pytest.raises(StoreBusyError, match="STORE_BUSY"):
            await store.fleet.put_node("c", "127.0.0.1:1", now_ns=1)
        assert len(await store.fleet.nodes()) == 2, "readers do not care"
        over.set()
        await task
        await store.fleet.put_node("c", "127.0.0.1:1", now_ns=1)


async def test_a_server_that_dies_loses_nothing_that_was_answered(own_server: Server) -> None:
    """Typed while it is away, found again when it is back; what was committed is there."""
    url = own_server.url(own_server.create())
    async with fleet_store(url) as store:
        row = await switchover(store)
        decided = await store.migrations.decide(row, Decision.COMMITTED, now_ns=3)
        own_server.stop()  # at once: nothing is flushed on the way
        for call in (
            store.migrations.get("m1"),
            store.migrations.record("m1", reason="x"),
            store.migrations.decide(row, Decision.ABORTED, now_ns=4),
        ):
            with pytest.raises(StoreError) as failed:
                await call
            assert failed.value.reason in ("STORE_UNREACHABLE", "STORE_FAILED"), failed.value
        own_server.start()
        assert await store.migrations.get("m1") == decided
        entered = await store.migrations.enter(decided, Phase.POSTCOPY, now_ns=5)
        assert entered.phase is Phase.POSTCOPY


async def test_a_server_that_is_not_there_is_typed(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="STORE_UNREACHABLE"):
        async with open_store(f"postgresql://godwit:secret@/godwit?host={tmp_path}") as _store:
            pass


async def test_a_caller_that_is_cancelled_leaves_the_transaction_whole(
    new_database: Callable[[], str],
) -> None:
    """It runs to its end, so that the next one finds the connection and the row free."""
    async with fleet_store(new_database()) as store:
        await admit(store)
        for turn in range(10):
            task = asyncio.create_task(store.migrations.record("m1", reason=f"r{turn}"))
            for _yield in range(turn):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        row = await store.migrations.record("m1", message="last")
        assert row.message == "last"
        assert row.version <= 12


async def test_an_upgrade_waits_for_the_older_release(
    new_database: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables are not changed under an orchestrator that leads."""
    url = new_database()
    async with open_store(url) as old:
        await old.database.claim(
            lambda connection: leadership.claim(
                connection, holder="old", rest="r:1", grpc="", lease_ns=3600 * 10**9, alone=False
            )
        )
        monkeypatch.setattr(schema, "SCHEMA_VERSION", schema.SCHEMA_VERSION + 1)
        with pytest.raises(FailedPreconditionError, match="STORE_LED") as refused:
            async with open_store(url):
                pass
        assert refused.value.metadata["leader"] == "old"


async def test_a_database_that_was_put_back_is_rebuilt_from_the_agents(
    own_server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """PostgreSQL's tools keep the incarnation: the nodes tell, and `godwit store rebuild` mends."""
    database = own_server.create()
    url = own_server.url(database)
    async with fake_fleet(tmp_path, server=url) as fleet:
        assert (await fleet.ended(await fleet.migrate("b")))["phase"] == "succeeded"
        with pytest.raises(FailedPreconditionError, match="STORE_IN_USE"):
            await cli._rebuild(url, [], [])
        await fleet.stop()
        copy = own_server.url(own_server.create(database))
        await fleet.start()
        assert (await fleet.ended(await fleet.migrate("c")))["phase"] == "succeeded"
        await fleet.stop()

        fleet.server = copy
        await fleet.start()
        await eventually(lambda: fleet.core.context.doubt.why, wait_s=60)
        with pytest.raises(FailedPreconditionError, match="STORE_IN_DOUBT"):
            await fleet.migrate("a")
        await fleet.stop()
        report = await cli._rebuild(copy, [], [])
        assert (report.vm_count, report.nodes) == (1, ("a", "b", "c"))
        await fleet.start()
        assert (await fleet.vm())["node"] == "c"
        assert (await fleet.ended(await fleet.migrate("a")))["phase"] == "succeeded"
        assert fleet.world.owners(VM) == ["a"]
        assert fleet.world.broken == []
        for command in (cli.backup, cli.restore):
            with pytest.raises(FailedPreconditionError, match="STORE_ON_SERVER"):
                command(tmp_path / "copy", store=url)


# --- synchronous standbys ---


@pytest.fixture
def replicated(own_server: Server) -> Iterator[tuple[Server, Server]]:
    """A primary and its standby, which every commit waits for."""
    with directory() as where:
        standby = own_server.replica(where)
        try:
            own_server.sql("ALTER SYSTEM SET synchronous_standby_names = '*'")
            own_server.sql("SELECT pg_reload_conf()")
            yield own_server, standby
        finally:
            standby.stop()


def _demanding(server: Server, database: str) -> str:
    return f"{server.url(database)}&synchronous_standbys=1"


async def test_without_its_synchronous_standby_nobody_leads(own_server: Server) -> None:
    """And it says why; with one attached it leads, and ceases when the policy is taken away."""
    url = _demanding(own_server, own_server.create())
    listen = Address(host="127.0.0.1", port=0)
    settings = Settings(store=url, rest=listen, grpc=listen, lease_s=1.0)
    async with working(settings) as core:
        role = core.context.role
        assert not role.leads
        assert "synchronous_standby_names is empty" in role.hindrance
        with directory() as where:
            standby = await asyncio.to_thread(own_server.replica, where)
            try:
                own_server.sql("ALTER SYSTEM SET synchronous_standby_names = '*'")
                own_server.sql("SELECT pg_reload_conf()")
                await eventually(lambda: role.leads, wait_s=60)
                own_server.sql("ALTER SYSTEM SET synchronous_standby_names = ''")
                own_server.sql("SELECT pg_reload_conf()")
                await eventually(lambda: not role.leads, wait_s=60)
                await eventually(lambda: role.hindrance, wait_s=60)
            finally:
                await asyncio.to_thread(standby.stop)


async def test_a_decision_is_on_the_standby_when_it_is_answered(
    replicated: tuple[Server, Server],
) -> None:
    """I2: the primary is lost with its disk, its synchronous standby is promoted."""
    primary, standby = replicated
    database = primary.create()
    async with fleet_store(_demanding(primary, database)) as store:
        row = await switchover(store)
        decided = await store.migrations.decide(row, Decision.COMMITTED, now_ns=3)
        primary.stop()
    standby.sql("SELECT pg_promote()")
    async with open_store(standby.url(database)) as store:
        assert await store.migrations.get("m1") == decided
        again = await store.migrations.decide(row, Decision.ABORTED, now_ns=4)
        assert again.decision is Decision.COMMITTED


async def test_a_decision_that_only_the_primary_has_is_not_answered(
    replicated: tuple[Server, Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor read back: whoever asks again waits for the standby too. Then it is what it was."""
    primary, standby = replicated
    async with fleet_store(_demanding(primary, primary.create())) as store:
        row = await switchover(store)
        monkeypatch.setattr(postgres, "ANSWER_S_MAX", 1)
        standby.signal(signal.SIGSTOP)
        try:
            for decision in (Decision.COMMITTED, Decision.ABORTED):
                with pytest.raises(StoreError):
                    await store.migrations.decide(row, decision, now_ns=3)
        finally:
            standby.signal(signal.SIGCONT)
        monkeypatch.setattr(postgres, "ANSWER_S_MAX", 60)

        async def decided() -> object:
            try:
                return await store.migrations.decide(row, Decision.ABORTED, now_ns=4)
            except StoreError:
                return None

        found = await eventually(decided, wait_s=100)
        assert found.decision is Decision.COMMITTED


@pytest.mark.parametrize("text", ["x", "-1", "1000"])
def test_a_policy_is_a_number(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="STORE_INVALID"):
        postgres.PostgresDatabase(sa.make_url(f"postgresql://u@h/d?synchronous_standbys={text}"))
