# SPDX-License-Identifier: Apache-2.0
"""The store: one decision, one active migration, epochs that only grow.

Every test runs on SQLite and on a real PostgreSQL.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.common.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InternalError,
    NotFoundError,
)
from services.orchestrator.migration import Decision, Phase, StepFailed
from services.orchestrator.store import PhaseLostError, Store, open_store, records
from services.orchestrator.store.rows import (
    BitmapRow,
    EventRow,
    IdempotencyRow,
    MigrationRow,
    VmRow,
    VmState,
)
from tests.harness.stores import SPEC, Place, admit, execute, fleet_store, start, switchover

YEAR_NS = 365 * 86400 * 10**9


@pytest.fixture
async def store(place: Place) -> AsyncIterator[Store]:
    async with fleet_store(place) as opened:
        yield opened


async def test_survives_being_opened_again(place: Place) -> None:
    """Everything, and the incarnation, is in the file."""
    async with fleet_store(place) as store:
        row = await switchover(store)
        await store.migrations.decide(row, Decision.COMMITTED, now_ns=3)
        incarnation = store.incarnation
    async with open_store(place) as again:
        assert again.incarnation == incarnation
        found = await again.migrations.get("m1")
        assert found is not None
        assert (found.phase, found.decision) == (Phase.COMMITTED, Decision.COMMITTED)
        assert [each.migration_id for each in await again.migrations.unfinished()] == ["m1"]


async def test_newer_schema_is_refused(place: Place) -> None:
    """A store that a later release wrote is left alone."""
    async with open_store(place) as store:
        await execute(store, "UPDATE meta SET value = '99' WHERE key = 'schema_version'")
    with pytest.raises(FailedPreconditionError, match="STORE_TOO_NEW"):
        async with open_store(place):
            pass


# --- the decision ---


async def test_commit_changes_the_owner_in_the_same_write(store: Store) -> None:
    row = await switchover(store)
    decided = await store.migrations.decide(row, Decision.COMMITTED, now_ns=3)
    vm = await store.fleet.vm("vm-1")
    assert vm is not None
    assert (decided.phase, decided.decision) == (Phase.COMMITTED, Decision.COMMITTED)
    assert (vm.node, vm.epoch) == ("b", row.epoch)
    history = (await store.migrations.transitions(["m1"]))["m1"]
    assert [each.phase for each in history] == [Phase.PENDING, Phase.SWITCHOVER, Phase.COMMITTED]


async def test_abort_issues_a_fresh_epoch_for_the_source(store: Store) -> None:
    row = await switchover(store)
    decided = await store.migrations.decide(row, Decision.ABORTED, now_ns=3)
    vm = await store.fleet.vm("vm-1")
    assert vm is not None
    assert decided.phase is Phase.ABORTED
    assert decided.resume_epoch > row.epoch > row.source_epoch
    assert (vm.node, vm.epoch) == ("a", decided.resume_epoch)
    assert decided.destination_owed


async def test_abort_before_any_agent_heard_costs_no_epoch(store: Store) -> None:
    row = await admit(store)
    before = await store.fleet.last_epoch("vm-1")
    decided = await store.migrations.decide(row, Decision.ABORTED, now_ns=3)
    assert (decided.decision, decided.resume_epoch) == (Decision.ABORTED, 0)
    assert not decided.destination_owed
    assert await store.fleet.last_epoch("vm-1") == before


@pytest.mark.parametrize("first", list(Decision))
@pytest.mark.parametrize("second", list(Decision))
async def test_second_decision_changes_nothing(
    store: Store, first: Decision, second: Decision
) -> None:
    row = await switchover(store)
    once = await store.migrations.decide(row, first, now_ns=3)
    twice = await store.migrations.decide(row, second, now_ns=4)
    assert twice == once
    assert twice.decision is first


@pytest.mark.parametrize(
    "phase", [Phase.PENDING, Phase.PREPARING, Phase.READY, Phase.ROLLING_BACK, Phase.CANCELLING]
)
async def test_commit_is_written_over_switchover_alone(store: Store, phase: Phase) -> None:
    row = await switchover(store)
    if phase is not Phase.PENDING:
        row = await store.migrations.enter(row, phase, now_ns=2)
    else:
        row = await store.migrations.enter(row, Phase.PENDING, now_ns=2)
    decided = await store.migrations.decide(row, Decision.COMMITTED, now_ns=3)
    assert (decided.phase, decided.decision) == (phase, None)


async def test_accepted_cancel_forbids_the_commit(store: Store) -> None:
    """Whoever wins the race, an accepted cancel is never followed by COMMITTED."""
    row = await switchover(store)
    await store.migrations.request_cancel("m1")
    decided = await store.migrations.decide(row, Decision.COMMITTED, now_ns=3)
    assert decided.decision is None
    assert decided.cancel_requested


async def test_cancel_past_commit_is_refused(store: Store) -> None:
    row = await switchover(store)
    await store.migrations.decide(row, Decision.COMMITTED, now_ns=3)
    with pytest.raises(FailedPreconditionError, match="PAST_COMMIT"):
        await store.migrations.request_cancel("m1")
    with pytest.raises(NotFoundError, match="MIGRATION_UNKNOWN"):
        await store.migrations.request_cancel("m2")


async def test_race_of_two_stores_has_one_winner(place: Place) -> None:
    """I2: two processes' worth of connections, COMMITTED against ABORTED, many times."""
    async with fleet_store(place) as one, open_store(place) as two:
        winners = set()
        for turn in range(12):
            vm = await one.fleet.vm("vm-1")
            assert vm is not None
            destination = "b" if vm.node == "a" else "a"
            row = await admit(one, f"m{turn:02}", destination_node=destination)
            row = await one.migrations.reserve_epoch(row)
            row = await one.migrations.enter(row, Phase.SWITCHOVER, now_ns=2)
            pair = [(one, Decision.COMMITTED), (two, Decision.ABORTED)]
            if turn % 2:
                pair.reverse()
            said = await asyncio.gather(
                *(each.migrations.decide(row, decision, now_ns=3) for each, decision in pair)
            )
            assert said[0].decision is said[1].decision
            assert said[0].decision is not None
            winners.add(said[0].decision)
            final = {Decision.COMMITTED: Phase.SUCCEEDED, Decision.ABORTED: Phase.FAILED}
            await two.migrations.enter(said[1], final[said[0].decision], now_ns=4)
            vm = await two.fleet.vm("vm-1")
            assert vm is not None
            owner = destination if said[0].decision is Decision.COMMITTED else row.source_node
            assert vm.node == owner
    assert winners  # which of them wins is the scheduler's business


async def test_decision_fails_whole_if_the_owner_changed(store: Store) -> None:
    """I1: nothing is half written."""
    row = await switchover(store)
    await execute(store, "UPDATE vms SET node = 'b'")
    with pytest.raises(InternalError, match="OWNER_CHANGED"):
        await store.migrations.decide(row, Decision.COMMITTED, now_ns=3)
    found = await store.migrations.get("m1")
    assert found is not None
    assert (found.phase, found.decision) == (Phase.SWITCHOVER, None)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE migrations SET decision = 'aborted'",
        "UPDATE migrations SET decision = NULL",
        "UPDATE migrations SET phase = 'failed'",
        "UPDATE epochs SET last_epoch = last_epoch - 1",
        "UPDATE epochs SET last_epoch = last_epoch",
        "DELETE FROM epochs",
    ],
)
async def test_file_itself_refuses(store: Store, statement: str) -> None:
    """Decisions and epochs are kept against a person with a shell too."""
    row = await switchover(store)
    await store.migrations.decide(row, Decision.COMMITTED, now_ns=3)
    with pytest.raises(sa.exc.IntegrityError):
        await execute(store, statement)


async def test_terminal_phase_is_never_left(store: Store) -> None:
    """I7, in the file."""
    row = await switchover(store)
    row = await store.migrations.decide(row, Decision.ABORTED, now_ns=3)
    row = await store.migrations.enter(row, Phase.FAILED, now_ns=4)
    assert row.terminal
    with pytest.raises(sa.exc.IntegrityError):
        await store.migrations.enter(row, Phase.ABORTED, now_ns=5)


# --- admission and phases ---


async def test_one_active_migration_a_vm(store: Store) -> None:
    await admit(store)
    with pytest.raises(AlreadyExistsError, match="MIGRATION_ACTIVE") as refused:
        await admit(store, "m2")
    assert refused.value.metadata["migration_id"] == "m1"
    assert await store.migrations.get("m2") is None


async def test_unique_index_stands_behind_the_check(store: Store) -> None:
    """I7: also against a writer that does not look first."""
    await admit(store)
    with pytest.raises(sa.exc.IntegrityError):
        await execute(
            store,
            "INSERT INTO migrations SELECT 'm2', vm_id, source_node, destination_node, "
            + ", ".join(column.name for column in list(sa.inspect(_migrations()).columns)[4:])
            + " FROM migrations",
        )


def _migrations() -> sa.Table:
    from services.orchestrator.store import schema

    return schema.migrations


async def test_race_of_two_admissions_has_one_winner(place: Place) -> None:
    async with fleet_store(place) as one, open_store(place) as two:
        said = await asyncio.gather(admit(one, "m1"), admit(two, "m2"), return_exceptions=True)
        assert sorted(isinstance(each, AlreadyExistsError) for each in said) == [False, True]


async def test_whoever_asks_together_is_admitted_or_refused_by_himself(store: Store) -> None:
    """One transaction writes them; one that cannot be is no trouble of the others."""
    for number in range(2, 6):
        await start(store, SPEC.model_copy(update={"vm_id": f"vm-{number}"}))
    answers = [
        IdempotencyRow(key=key, request_hash="h", response=key.encode(), created_at_ns=1)
        for key in ("k1", "k2", "k1")  # a key twice: what the database refuses, not our check
    ]

    async def ask(vm_id: str, migration_id: str, answer: IdempotencyRow | None = None) -> None:
        vm = await store.fleet.vm(vm_id) or replace(await _vm_1(store), vm_id=vm_id)
        row = MigrationRow.new(
            migration_id=migration_id,
            vm=vm,
            destination_node="b",
            bulk_bytes_per_s_max=0,
            traceparent="",
            now_ns=1,
        )
        await asyncio.sleep(0)  # all are ready to ask before the first one does
        await store.migrations.create(row, answer)

    said = await asyncio.gather(
        ask("vm-1", "m1", answers[0]),
        ask("vm-2", "m2", answers[1]),
        ask("vm-2", "m3"),
        ask("vm-3", "m4", answers[2]),
        ask("vm-9", "m5"),
        ask("vm-4", "m6"),
        return_exceptions=True,
    )
    kinds = [type(each).__name__ for each in said]
    written = {row.migration_id for row in await store.migrations.unfinished()}
    assert {"m6"} <= written
    assert len(written & {"m2", "m3"}) == len(written & {"m1", "m4"}) == 1
    assert sorted(kinds) == [
        "AlreadyExistsError",
        "IntegrityError",
        "NoneType",
        "NoneType",
        "NoneType",
        "NotFoundError",
    ]
    kept = await store.idempotency.get("k1")
    assert kept is not None
    assert kept.response == b"k1"


async def _vm_1(store: Store) -> VmRow:
    vm = await store.fleet.vm("vm-1")
    assert vm is not None
    return vm


async def test_vm_that_moved_meanwhile_is_not_admitted(store: Store) -> None:
    with pytest.raises(FailedPreconditionError, match="VM_MOVED"):
        await admit(store, source_epoch=99)
    with pytest.raises(NotFoundError, match="VM_UNKNOWN"):
        await admit(store, vm_id="vm-2")


async def test_phase_is_entered_from_the_phase_in_hand(store: Store) -> None:
    """A deposed orchestrator's write fails."""
    row = await admit(store)
    await store.migrations.enter(row, Phase.VALIDATING, now_ns=2)
    with pytest.raises(PhaseLostError):
        await store.migrations.enter(row, Phase.VALIDATING, now_ns=3)


async def test_phase_clears_what_was_waited_for(store: Store) -> None:
    row = await admit(store)
    row = await store.migrations.record("m1", wait_reason="X", wait_message="x", wait_hint="y")
    note = StepFailed(reason="R", message="m", hint="h")
    row = await store.migrations.enter(row, Phase.ROLLING_BACK, now_ns=2, note=note)
    assert (row.wait_reason, row.wait_message, row.wait_hint) == ("", "", "")
    assert (row.reason, row.message, row.hint) == ("R", "m", "h")
    assert row.version == 3


async def test_pages_of_the_list(store: Store) -> None:
    for turn in range(5):
        row = await admit(store, f"m{turn}")
        row = await store.migrations.decide(row, Decision.ABORTED, now_ns=2)
        await store.migrations.enter(row, Phase.FAILED, now_ns=3)
    first = await store.migrations.page("", before="", count=3)
    rest = await store.migrations.page("vm-1", before=first[-1].migration_id, count=3)
    assert [each.migration_id for each in first + rest] == ["m4", "m3", "m2", "m1", "m0"]
    assert await store.migrations.page("vm-2", before="", count=3) == []


# --- epochs and VMs ---


async def test_epochs_are_never_reused(store: Store) -> None:
    """Not after an abort, and not when the VM's id comes back after a stop."""
    seen = []
    for turn in range(3):
        row = await switchover(store, f"m{turn}")
        decided = await store.migrations.decide(row, Decision.ABORTED, now_ns=3)
        seen += [row.source_epoch, row.epoch, decided.resume_epoch][1 if turn else 0 :]
        await store.migrations.enter(decided, Phase.FAILED, now_ns=4)
    stopping = await store.fleet.begin_stop("vm-1")
    await store.fleet.forget("vm-1", stopping.epoch, VmState.STOPPING)
    assert await store.fleet.vm("vm-1") is None
    again = await start(store, SPEC)
    seen += [stopping.epoch, again.epoch]
    assert seen == sorted(set(seen))


async def test_reserving_twice_is_one_epoch(store: Store) -> None:
    row = await admit(store)
    once = await store.migrations.reserve_epoch(row)
    assert (await store.migrations.reserve_epoch(row)).epoch == once.epoch


async def test_epochs_of_two_stores_never_meet(place: Place) -> None:
    """Concurrent issuers of one file."""
    async with open_store(place) as one, open_store(place) as two:
        await one.fleet.put_node("a", "127.0.0.1:1", now_ns=1)
        vms = [SPEC.model_copy(update={"vm_id": f"v{turn}"}) for turn in range(3)]
        for vm in vms:
            await start(one, vm)

        async def issue(store: Store, vm_id: str) -> int:
            stopping = await store.fleet.begin_stop(vm_id)
            await store.fleet.forget(vm_id, stopping.epoch, VmState.STOPPING)
            spec = SPEC.model_copy(update={"vm_id": vm_id})
            return (await start(store, spec)).epoch

        for vm in vms:
            said = [await issue(each, vm.vm_id) for each in (one, two, one, two)]
            assert said == sorted(set(said))


async def test_start_goes_on_where_it_stopped(store: Store) -> None:
    spec = SPEC.model_copy(update={"vm_id": "vm-2"})
    vm = await store.fleet.begin_start(spec, "a", now_ns=1)
    assert await store.fleet.begin_start(spec, "a", now_ns=2) == vm
    with pytest.raises(AlreadyExistsError, match="VM_EXISTS"):
        await store.fleet.begin_start(spec, "b", now_ns=2)
    await store.fleet.finish_start("vm-2", vm.epoch)
    with pytest.raises(AlreadyExistsError, match="VM_EXISTS"):
        await store.fleet.begin_start(spec, "a", now_ns=2)


async def test_vm_in_a_migration_is_not_stopped(store: Store) -> None:
    await admit(store)
    with pytest.raises(AlreadyExistsError, match="MIGRATION_ACTIVE"):
        await store.fleet.begin_stop("vm-1")
    vm = await store.fleet.vm("vm-1")
    assert vm is not None
    assert vm.state is VmState.RUNNING


async def test_vm_that_is_stopping_is_not_moved(store: Store) -> None:
    await store.fleet.begin_stop("vm-1")
    with pytest.raises(FailedPreconditionError, match="VM_NOT_RUNNING"):
        await admit(store)


# --- records ---


async def test_the_last_answers_are_kept_whatever_the_clock_does(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that was answered a moment ago is known, though the clock has jumped for a year."""
    monkeypatch.setattr(records, "ANSWERS_MAX", 3)
    monkeypatch.setattr(records, "FORGET_EVERY", 1)
    row = IdempotencyRow(key="0", request_hash="h", response=b"r", created_at_ns=10 * YEAR_NS)
    await store.idempotency.put(row)
    await store.idempotency.put(replace(row, response=b"other"))
    assert await store.idempotency.get("0") == row
    for number, year in enumerate((9, 11, 1), start=1):
        last = replace(row, key=str(number), created_at_ns=year * YEAR_NS)
        await store.idempotency.put(last)
        kept = await store.idempotency.get(last.key)
        assert kept is not None
        assert kept.response == b"r"
    assert await store.idempotency.get("0") is None
    assert await store.idempotency.get("1") is not None


async def test_events_are_bounded_and_say_what_is_left_out(store: Store) -> None:
    """The first ones tell how it began, the last ones how it is; a gap in the numbers is a gap."""
    await admit(store)
    for number in range(1, 301):
        version = (await store.migrations.get("m1") or pytest.fail("gone")).version
        event = EventRow(kind="K", message=str(number), evidence=("a: x", "b: y"), at_ns=5)
        row = await store.migrations.add_event("m1", event)
        assert row.version > version, "watchers look again"
    kept = await store.migrations.events("m1")
    assert [event.sequence for event in kept] == [*range(1, 21), *range(221, 301)]
    assert all(event.message == str(event.sequence) for event in kept)
    assert kept[0] == EventRow(
        kind="K", message="1", evidence=("a: x", "b: y"), at_ns=5, sequence=1
    )


async def test_bitmap_of_an_older_epoch_does_not_overwrite(store: Store) -> None:
    row = BitmapRow(
        vm_id="vm-1", epoch=5, page_size_bytes=4096, page_count=8, absent_count=2, packed=b"x"
    )
    await store.bitmaps.put(row)
    await store.bitmaps.put(replace(row, epoch=4, absent_count=8))
    assert await store.bitmaps.all() == [row]


# --- failures ---


async def test_cancelled_write_is_whole_or_not_there(store: Store, place: Place) -> None:
    """A task that is cancelled in a transaction leaves no lock, and no half of it."""
    await admit(store)
    for turn in range(30):
        task = asyncio.create_task(
            store.migrations.record("m1", reason=f"r{turn}", message=f"m{turn}")
        )
        for _yield in range(turn % 4):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        found = await store.migrations.get("m1")
        assert found is not None
        assert found.reason[1:] == found.message[1:]
    await store.migrations.record("m1", reason="last")
    async with open_store(place) as other:
        await execute(other, "UPDATE nodes SET agent_address = 'x'")


async def test_rehearsal_leaves_nothing_behind(place: Place) -> None:
    """Opening a store takes no decision in it."""
    async with open_store(place) as store:
        assert await store.fleet.nodes() == []
        assert await store.migrations.unfinished() == []
        assert await store.fleet.last_epoch("-") == 0


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    moves=st.lists(
        st.tuples(st.sampled_from(list(Decision)), st.booleans(), st.booleans()),
        min_size=1,
        max_size=6,
    )
)
def test_any_history_has_one_owner_and_growing_epochs(
    moves: list[tuple[Decision, bool, bool]], new_place: Callable[[], Place]
) -> None:
    """Decisions tried in any order, repeated, with cancels between: owner and epoch agree."""

    async def run(place: Place) -> None:
        async with fleet_store(place) as store:
            last = 0
            for turn, (wanted, again, cancelled) in enumerate(moves):
                vm = await store.fleet.vm("vm-1")
                assert vm is not None
                to = "b" if vm.node == "a" else "a"
                row = await admit(store, f"m{turn}", destination_node=to)
                row = await store.migrations.reserve_epoch(row)
                row = await store.migrations.enter(row, Phase.SWITCHOVER, now_ns=2)
                if cancelled:
                    await store.migrations.request_cancel(row.migration_id)
                decided = await store.migrations.decide(row, wanted, now_ns=3)
                if again or not decided.decision:
                    decided = await store.migrations.decide(row, Decision.ABORTED, now_ns=3)
                owner = await store.fleet.vm("vm-1")
                assert owner is not None
                committed = decided.decision is Decision.COMMITTED
                assert not (committed and cancelled)
                assert owner.node == (to if committed else vm.node)
                assert owner.epoch == (decided.epoch if committed else decided.resume_epoch)
                assert owner.epoch > last
                last = owner.epoch
                final = Phase.SUCCEEDED if committed else Phase.FAILED
                await store.migrations.enter(decided, final, now_ns=4)

    asyncio.run(run(new_place()))
