# SPDX-License-Identifier: Apache-2.0
"""Promise: an operation's next step follows from what is true, whoever did what before."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.errors import InvalidArgumentError
from services.orchestrator.operations import windows
from services.orchestrator.operations.model import (
    Item,
    ItemState,
    Kind,
    Operation,
    Options,
    State,
)
from services.orchestrator.operations.step import Active, Ended, Facts, Hold, Step, step
from services.orchestrator.scheduling.model import NodeView, VmView
from services.orchestrator.scheduling.rebalance import rebalance

GIB = 1 << 30
DRAIN = Operation(operation_id="op", kind=Kind.DRAIN, node="a")


def item(vm_id: str = "1", **more: Any) -> Item:
    given: dict[str, Any] = {"vm_id": vm_id, "sequence": 1, "source": "a"} | more
    return Item(**given)


def moving(vm_id: str = "1", **more: Any) -> Item:
    return item(vm_id, state=ItemState.MOVING, migration_id=f"m{vm_id}", attempts=1, **more)


def active(vm_id: str = "1", *, decided: bool = False, operation_id: str = "op") -> Active:
    return Active(
        migration_id=f"m{vm_id}",
        source="a",
        target="b",
        operation_id=operation_id,
        decided=decided,
    )


def facts(**more: Any) -> Facts:
    given: dict[str, Any] = {"at": {}, "active": {}, "ended": {}, "parallel": 9} | more
    return Facts(**given)


def only(taken: Step) -> Item:
    (found,) = taken.items
    return found


def test_vms_that_came_meanwhile_are_taken_up() -> None:
    taken = step(DRAIN, (), facts(at={"1": "a", "2": "b"}))
    assert [each.vm_id for each in taken.begin] == ["1"]
    back = item(state=ItemState.MOVED, target="b", attempts=2)
    assert [each.vm_id for each in step(DRAIN, (back,), facts(at={"1": "a"})).begin] == ["1"]


def test_a_migration_of_its_own_that_was_not_written_down_is_found() -> None:
    taken = step(DRAIN, (item(),), facts(at={"1": "a"}, active={"1": active()}))
    assert (only(taken).state, only(taken).attempts) == (ItemState.MOVING, 1)
    assert taken.begin == ()


def test_somebody_elses_migration_that_leaves_the_node_will_do() -> None:
    theirs = active(operation_id="")
    taken = step(DRAIN, (item(),), facts(at={"1": "a"}, active={"1": theirs}))
    assert (only(taken).state, only(taken).attempts) == (ItemState.MOVING, 0)
    cancelling = replace(DRAIN, state=State.CANCELLING)
    stopped = step(cancelling, taken.items, facts(at={"1": "a"}, active={"1": theirs}))
    assert stopped.cancel == (), "it is not ours to cancel"


@pytest.mark.parametrize(("attempts", "state"), [(3, ItemState.WAITING), (4, ItemState.FAILED)])
def test_a_failure_is_tried_again_until_the_retries_are_used_up(
    attempts: int, state: ItemState
) -> None:
    ended = {"m1": Ended(succeeded=False, reason="NO", message="no", hint="so")}
    before = replace(moving(), attempts=attempts)
    taken = step(DRAIN, (before,), facts(at={"1": "a"}, ended=ended))
    assert (only(taken).state, only(taken).reason) == (state, "NO")
    assert bool(taken.begin) is (state is ItemState.WAITING)
    assert taken.operation.ended is (state is ItemState.FAILED)


def test_cancel_stops_what_is_not_decided_and_lets_the_rest_end() -> None:
    cancelling = replace(DRAIN, state=State.CANCELLING)
    present = facts(
        at=dict.fromkeys("123", "a"),
        active={"1": active("1"), "2": active("2", decided=True)},
    )
    taken = step(cancelling, (moving("1"), moving("2"), item("3")), present)
    assert taken.cancel == ("m1",)
    assert [each.state for each in taken.items] == [
        ItemState.MOVING,
        ItemState.MOVING,
        ItemState.STAYED,
    ]
    assert taken.operation.state is State.CANCELLING
    over = facts(at={"1": "a", "2": "b", "3": "a"}, ended={"m2": Ended(succeeded=True)})
    last = step(taken.operation, taken.items, over)
    assert last.operation.state is State.CANCELLED
    assert [each.state for each in last.items] == [
        ItemState.STAYED,
        ItemState.MOVED,
        ItemState.STAYED,
    ]


def test_a_drain_is_done_only_when_nothing_is_retained_or_passes_through() -> None:
    gone = item(state=ItemState.MOVED, target="b")
    still = step(DRAIN, (gone,), facts(at={"1": "b"}, retained="a retains 7 bytes of 1"))
    assert (still.operation.state, still.operation.reason) == (State.RUNNING, "IMAGES_RETAINED")
    coming = Active(migration_id="m9", source="c", target="a", operation_id="", decided=False)
    passing = step(DRAIN, (gone,), facts(at={"1": "b", "9": "c"}, active={"9": coming}))
    assert passing.operation.reason == "NODE_NOT_CLEAR"
    done = step(DRAIN, (gone,), facts(at={"1": "b"}))
    assert done.operation.state is State.SUCCEEDED


def test_one_that_no_token_helps_holds_up_nobody() -> None:
    hold = Hold(reason="MEMORY_SHORT", message="full", hint="add a node", stuck=True)
    present = facts(at={"1": "a", "2": "a"}, active={"1": active()}, holds={"m1": hold}, parallel=1)
    taken = step(DRAIN, (moving(), item("2", sequence=2)), present)
    assert [each.vm_id for each in taken.begin] == ["2"]
    assert taken.items[0].reason == "MEMORY_SHORT"
    alone = step(DRAIN, (moving(),), replace(present, at={"1": "a"}))
    assert (alone.operation.reason, alone.operation.hint) == ("MEMORY_SHORT", "add a node")


def test_an_undrain_leaves_alone_what_is_elsewhere_by_now() -> None:
    undrain = Operation(operation_id="op", kind=Kind.UNDRAIN, node="a")
    waits = item(source="b", target="a")
    taken = step(undrain, (waits,), facts(at={"1": "c"}))
    assert only(taken).state is ItemState.STAYED
    assert taken.operation.state is State.SUCCEEDED
    assert only(step(undrain, (waits,), facts(at={"1": "a"}))).state is ItemState.MOVED
    assert only(step(undrain, (waits,), facts())).state is ItemState.GONE


@settings(max_examples=80, deadline=None)
@given(
    count=st.integers(0, 12),
    parallel=st.integers(1, 4),
    retries=st.integers(0, 2),
    seed=st.integers(0, 1 << 16),
)
def test_every_course_ends_and_says_the_truth(
    count: int, parallel: int, retries: int, seed: int
) -> None:
    """Moves that fail, steps whose writing is lost, cancels and deadlines at any moment."""
    chance = random.Random(seed)
    operation = replace(DRAIN, options=Options(retries=retries))
    at = {f"v{number}": "a" for number in range(count)}
    items = tuple(item(vm_id, sequence=number) for number, vm_id in enumerate(at))
    running: dict[str, Active] = {}
    ended: dict[str, Ended] = {}
    issued, expired = 0, False
    for _ in range(1000):
        expired = expired or chance.random() < 0.01
        if chance.random() < 0.01 and operation.state is State.RUNNING:
            operation = replace(operation, state=State.CANCELLING)
        present = facts(at=at, active=running, ended=ended, parallel=parallel, expired=expired)
        taken = step(operation, items, present)
        assert not (set(taken.cancel) & {each.migration_id for each in taken.begin})
        begun = {}
        for each in taken.begin:
            issued += 1
            migration_id = f"m{issued}"
            running[each.vm_id] = Active(
                migration_id=migration_id,
                source="a",
                target="b",
                operation_id="op",
                decided=False,
            )
            begun[each.vm_id] = replace(
                each,
                state=ItemState.MOVING,
                migration_id=migration_id,
                attempts=each.attempts + 1,
            )
        assert len(running) <= parallel
        for vm_id, stopped in list(running.items()):
            if stopped.migration_id in taken.cancel:
                del running[vm_id]
                ended[stopped.migration_id] = Ended(succeeded=False, reason="CANCELLED")
        if chance.random() < 0.8:  # else the process died before it wrote
            items = tuple(begun.get(each.vm_id, each) for each in taken.items)
            operation = taken.operation
        if operation.ended:
            break
        if running and chance.random() < 0.5:
            vm_id = chance.choice(sorted(running))
            over = running.pop(vm_id)
            good = chance.random() < 0.6
            ended[over.migration_id] = Ended(succeeded=good, reason="" if good else "NO")
            at[vm_id] = "b" if good else "a"
    assert operation.ended
    assert not running
    states = {each.vm_id: each.state for each in items}
    assert all((states[vm_id] is ItemState.MOVED) == (node == "b") for vm_id, node in at.items()), (
        states,
        at,
    )
    if operation.state is State.SUCCEEDED:
        assert "a" not in at.values()


@pytest.mark.parametrize(
    ("window", "minute", "is_open"),
    [
        ("08:00-10:00", 8 * 60, True),
        ("08:00-10:00", 10 * 60, False),
        ("22:00-04:00", 23 * 60, True),
        ("22:00-04:00", 3 * 60 + 59, True),
        ("22:00-04:00", 12 * 60, False),
        ("00:00-24:00", 0, True),
    ],
)
def test_windows_are_of_the_day_and_may_pass_midnight(
    window: str, minute: int, is_open: bool
) -> None:
    assert windows.is_open([window], 86_400.0 * 20_000 + minute * 60) is is_open


@pytest.mark.parametrize("text", ["", "8:00-9:00", "24:00-01:00", "08:00-08:00", "10:00-24:30"])
def test_what_is_no_window_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError):
        windows.read(text)


def test_always_open_without_windows() -> None:
    assert windows.is_open([], 0.0)


# --- rebalance ---


def nodes(*free: int) -> list[NodeView]:
    return [
        NodeView(name=name, memory_available_bytes=each * GIB, memory_total_bytes=64 * GIB)
        for name, each in zip("abc", free, strict=False)
    ]


def vms(*memories: int, moved_s: float | None = None) -> list[VmView]:
    return [
        VmView(vm_id=f"v{index}", node="a", memory_bytes=each * GIB, moved_s=moved_s)
        for index, each in enumerate(memories)
    ]


def test_a_rebalance_evens_the_load_with_few_moves() -> None:
    found = rebalance(nodes(16, 64, 64), vms(16, 16, 8, 8), spread_max=0.1, now_s=0, cooldown_s=600)
    assert [(vm.vm_id, target) for vm, target in found] == [("v1", "b"), ("v0", "c")]


def test_what_is_even_or_has_just_moved_stays() -> None:
    assert rebalance(nodes(32, 34), vms(8), spread_max=0.1, now_s=0, cooldown_s=600) == []
    warm = vms(16, moved_s=100.0)
    assert rebalance(nodes(16, 64), warm, spread_max=0.1, now_s=200, cooldown_s=600) == []
    assert len(rebalance(nodes(16, 64), warm, spread_max=0.1, now_s=700, cooldown_s=600)) == 1
