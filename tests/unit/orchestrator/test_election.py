# SPDX-License-Identifier: Apache-2.0
"""One orchestrator leads; a deposed one cannot write, on either database (I13)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import sqlalchemy as sa

from services.common.errors import GodwitError, InvalidArgumentError
from services.common.listen import Address
from services.orchestrator.election import Election, Role, StoreChangedError
from services.orchestrator.main import Core, Settings, parse, working
from services.orchestrator.migration import Decision, Phase, StepFailed
from services.orchestrator.store import NotLeaderError, Store, leadership, open_store
from services.orchestrator.store.leadership import Leader
from services.orchestrator.store.rows import BitmapRow, EventRow, IdempotencyRow, VmState
from tests.harness.fake_agent import spec_json
from tests.harness.fake_fleet import DEADLINES, VM, eventually
from tests.harness.stores import SPEC, Place, admit, execute, fleet_store, switchover

LEASE_NS = 3600 * 10**9


async def claim(store: Store, holder: str, *, alone: bool = False) -> Leader:
    """Lead if it can be had; who leads."""
    leader = await store.database.claim(
        lambda connection: leadership.claim(
            connection, holder=holder, rest="r:1", grpc="g:1", lease_ns=LEASE_NS, alone=alone
        )
    )
    if leader.holder == holder:
        store.database.term = leader.term
    return leader


@contextlib.asynccontextmanager
async def deposed(place: Place) -> AsyncIterator[tuple[Store, Store]]:
    """A store with a migration in SWITCHOVER, as who led sees it, and as who leads now does."""
    async with fleet_store(place) as old, open_store(place) as new:
        await claim(old, "old")
        await switchover(old)
        # As after the end of its lease.
        assert (await claim(new, "new", alone=True)).term == 2
        yield old, new


Write = Callable[[Store], Awaitable[object]]
_NODE = "127.0.0.1:1"
_EVENT = EventRow(kind="K", message="m")
_BITMAP = BitmapRow(
    vm_id="vm-1", epoch=1, page_size_bytes=4096, page_count=8, absent_count=2, packed=b"x"
)
_ANSWER = IdempotencyRow(key="k", request_hash="h", response=b"r", created_at_ns=1)


async def _row(store: Store) -> object:
    row = await store.migrations.get("m1")
    assert row is not None
    return row


def _of_row(work: Callable[[Store, object], Awaitable[object]]) -> Write:
    async def write(store: Store) -> object:
        return await work(store, await _row(store))

    return write


_LOST = StepFailed(reason="R", message="m")
WRITES: dict[str, Write] = {
    "commit": _of_row(lambda s, row: s.migrations.decide(row, Decision.COMMITTED, now_ns=9)),  # type: ignore[arg-type]
    "abort": _of_row(lambda s, row: s.migrations.decide(row, Decision.ABORTED, now_ns=9)),  # type: ignore[arg-type]
    "enter": _of_row(lambda s, row: s.migrations.enter(row, Phase.ROLLING_BACK, now_ns=9)),  # type: ignore[arg-type]
    "give_back": _of_row(lambda s, row: s.migrations.give_back(row, now_ns=9)),  # type: ignore[arg-type]
    "give_up": _of_row(lambda s, row: s.migrations.give_up(row, _LOST, now_ns=9)),  # type: ignore[arg-type]
    "return_epoch": _of_row(lambda s, row: s.migrations.reserve_return_epoch(row)),  # type: ignore[arg-type]
    "record": lambda s: s.migrations.record("m1", reason="x"),
    "event": lambda s: s.migrations.add_event("m1", _EVENT),
    "cancel": lambda s: s.migrations.request_cancel("m1"),
    "admit": lambda s: admit(s, "m2"),
    "node": lambda s: s.fleet.put_node("c", _NODE, now_ns=1),
    "start": lambda s: s.fleet.begin_start(SPEC.model_copy(update={"vm_id": "v2"}), "a", now_ns=1),
    "started": lambda s: s.fleet.finish_start("vm-1", 1),
    "stop": lambda s: s.fleet.begin_stop("vm-1"),
    "forget": lambda s: s.fleet.forget("vm-1", 1, VmState.RUNNING),
    "bitmap": lambda s: s.bitmaps.put(_BITMAP),
    "answer": lambda s: s.idempotency.put(_ANSWER),
    "doubt": lambda s: s.identity.doubt("because"),
    "renew_store": lambda s: s.identity.renew("because"),
}


async def test_a_deposed_leader_writes_nothing(place: Place) -> None:
    """Each write that there is fails, with who leads; reads go on."""
    async with deposed(place) as (old, new):
        before = await _everything(new)
        for name, write in WRITES.items():
            with pytest.raises(NotLeaderError) as refused:
                await write(old)
            assert refused.value.leader.holder == "new", name
            assert refused.value.metadata["rest"] == "r:1"
            assert refused.value.reason == "NOT_LEADER"
        assert await _everything(new) == before
        assert await old.migrations.get("m1") == await new.migrations.get("m1")
        decided = await new.migrations.decide(
            await _row(new),  # type: ignore[arg-type]
            Decision.COMMITTED,
            now_ns=9,
        )
        assert decided.decision is Decision.COMMITTED


async def _everything(store: Store) -> dict[str, list[object]]:
    """Every row of every table."""
    from services.orchestrator.store import schema

    def work(connection: sa.Connection) -> dict[str, list[object]]:
        return {
            name: sorted((tuple(row) for row in connection.execute(sa.select(table))), key=str)
            for name, table in schema.metadata.tables.items()
        }

    return await store.database.read(work)


async def test_a_takeover_waits_for_the_transaction_under_way(place: Place) -> None:
    """What began under a term is durable, or not there, when the next term begins."""
    async with deposed(place) as (_old, store), open_store(place) as third:
        writes = [store.fleet.put_node(f"n{n}", _NODE, now_ns=1) for n in range(20)]
        *written, leader = await asyncio.gather(
            *writes, claim(third, "third", alone=True), return_exceptions=True
        )
        assert isinstance(leader, Leader)
        assert leader.term == 3
        names = {row.name for row in await third.fleet.nodes()}
        for number, outcome in enumerate(written):
            assert (f"n{number}" in names) is not isinstance(outcome, NotLeaderError)


async def test_a_race_of_candidates_has_one_winner(place: Place) -> None:
    """And everybody is told the same."""
    async with contextlib.AsyncExitStack() as stack:
        stores = [await stack.enter_async_context(open_store(place)) for _n in range(4)]
        for turn in range(1, 4):
            said = await asyncio.gather(*(claim(store, f"c{n}") for n, store in enumerate(stores)))
            assert len({(each.holder, each.term) for each in said}) == 1
            assert said[0].term == turn
            winner = stores[int(said[0].holder[1:])]
            await winner.database.write(
                lambda connection, leader=said[0]: leadership.release(connection, leader)  # type: ignore[misc]
            )


@pytest.mark.parametrize(
    "statement", ["UPDATE leadership SET term = term - 1", "DELETE FROM leadership"]
)
async def test_a_term_does_not_come_back(place: Place, statement: str) -> None:
    async with deposed(place) as (_old, new):
        with pytest.raises(sa.exc.IntegrityError):
            await execute(new, statement)


# --- processes ---


def _settings(place: Place, **more: float) -> Settings:
    listen = Address(host="127.0.0.1", port=0)
    return Settings(store=place, rest=listen, grpc=listen, deadlines=DEADLINES, **more)  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def _orchestrator(place: Place, **more: float) -> AsyncIterator[Core]:
    async with working(_settings(place, **more)) as core:
        yield core


async def test_one_that_stands_by_answers_and_refuses(place: Place) -> None:
    """Nothing is changed by it; when the leader goes it leads at once, in the next term."""
    async with contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(_orchestrator(place, lease_s=60.0))
        assert first.context.role.leads
        async with _orchestrator(place, lease_s=60.0) as second:
            assert not second.context.role.leads
            await first.fleet.register_node("a", _NODE)
            assert [node.name for node in (await second.fleet.list_nodes())[0]] == ["a"]
            for refused in (
                lambda: second.fleet.register_node("b", _NODE),
                lambda: second.fleet.start_vm("a", spec_json(VM)),
                lambda: second.fleet.stop_vm(VM),
                lambda: second.fleet.create_migration(VM, "b"),
                lambda: second.fleet.cancel_migration("m"),
                lambda: second.fleet.recover_migration("m"),
                lambda: second.fleet.abandon_migration("m", epoch=1, confirm=True),
                lambda: second.fleet.break_glass(
                    "m", epoch=1, fenced_vm_id=VM, operator="me", because="so"
                ),
                lambda: second.context.store.fleet.put_node("b", _NODE, now_ns=1),
            ):
                with pytest.raises(NotLeaderError):
                    await refused()
            await stack.aclose()
            await eventually(lambda: second.context.role.leads, wait_s=60)
            assert second.context.role.leader.term == 2
            assert (await second.fleet.register_node("b", _NODE))[1]


async def test_a_store_that_was_rebuilt_is_opened_again(place: Place) -> None:
    """Who stood by meanwhile talks to agents that obey another store: it starts again."""
    async with open_store(place) as tool, open_store(place) as store:
        election = Election(
            store, Role("me"), file=place if isinstance(place, Path) else None, lease_s=60
        )
        await tool.identity.renew("a rebuild")
        with pytest.raises(StoreChangedError):
            await election.run(contextlib.nullcontext, lambda: None)


@pytest.mark.requires("postgres")
async def test_who_cannot_renew_ceases(
    new_database: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its own clock, before anybody has told it; and leads again when it can."""
    place = new_database()
    async with _orchestrator(place, lease_s=1.0) as core:
        role, database = core.context.role, core.context.store.database
        real = type(database).write

        async def cut(*_args: object) -> object:
            await asyncio.Event().wait()
            raise AssertionError

        monkeypatch.setattr(type(database), "write", cut)
        await eventually(lambda: not role.leads, wait_s=60)
        with pytest.raises(NotLeaderError):
            await core.fleet.register_node("a", _NODE)
        monkeypatch.setattr(type(database), "write", real)
        await eventually(lambda: role.leads, wait_s=60)
        assert role.leader.term >= 2
        await core.fleet.register_node("a", _NODE)


@pytest.mark.requires("postgres")
async def test_a_leader_stopped_in_a_transaction_does_not_keep_the_row(
    new_database: Callable[[], str],
) -> None:
    """The server ends a session that is silent in a transaction; it would block every takeover."""
    place = new_database()
    async with open_store(place) as store, open_store(place) as other:
        began, over = asyncio.Event(), asyncio.Event()

        async def stopped() -> None:
            engine = store.database._writer  # type: ignore[attr-defined]
            async with engine.begin() as connection:
                await connection.run_sync(lambda sync: leadership.lock(sync, None))
                began.set()
                await over.wait()

        task = asyncio.create_task(stopped())
        await began.wait()

        async def taken() -> bool:
            with contextlib.suppress(GodwitError):
                return (await claim(other, "other")).term == 1
            return False

        await eventually(taken, wait_s=100)
        over.set()
        with pytest.raises((sa.exc.SQLAlchemyError, OSError)):
            await task


@pytest.mark.parametrize("text", ["0.5", "x", "1000", "nan"])
def test_a_lease_is_seconds(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="LEASE_INVALID"):
        parse(["--lease", text])


def test_the_store_is_a_path_or_a_server() -> None:
    assert parse(["--store", "x.db"]).store == Path("x.db")
    assert parse(["--store", "postgresql://u@h/d"]).store == "postgresql://u@h/d"
    with pytest.raises(InvalidArgumentError, match="STORE_INVALID"):
        parse(["--store", "mysql://u@h/d"])
