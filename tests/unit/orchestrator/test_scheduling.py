# SPDX-License-Identifier: Apache-2.0
"""Promise: no limit is exceeded, nobody starves, and each waiting move says what holds it."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.errors import InvalidArgumentError
from services.orchestrator.scheduling.limits import Ledger, LimitSet
from services.orchestrator.scheduling.model import (
    NodeView,
    Placing,
    Priority,
    Request,
    Rules,
    VmView,
)
from services.orchestrator.scheduling.placement import HINTS, Choice, Nowhere, choose, refusal
from services.orchestrator.scheduling.schedule import Admission, Schedule

GIB = 1 << 30
OPEN = LimitSet(cluster=100, node_out=100, node_in=100, link=100, group=100)


def node(name: str, free: int = 64, **more: Any) -> NodeView:
    return NodeView(
        name=name, memory_available_bytes=free * GIB, memory_total_bytes=64 * GIB, **more
    )


def vm(name: str, at: str = "a", memory: int = 1, **more: Any) -> VmView:
    return VmView(vm_id=name, node=at, memory_bytes=memory * GIB, **more)


def request(name: str, at: str = "a", created_s: float = 0.0, **more: Any) -> Request:
    placed = more.pop("vm", None) or vm(name, at)
    return Request(request_id=name, vm=placed, created_s=created_s, **more)


def schedule(*names: str, limits: LimitSet = OPEN, **more: Any) -> Schedule:
    made = Schedule(limits, **more)
    for name in names or ("a", "b", "c"):
        made.add_node(node(name))
    return made


def gone(made: Schedule, now_s: float = 0.0) -> list[tuple[str, str]]:
    return [(each.request.request_id, each.target) for each in made.admit(now_s)]


# --- limits ---


def test_a_limit_of_one_node_beats_the_default_and_can_be_removed() -> None:
    limits = LimitSet().with_values({"node-in": 3, "node-in:b": 1, "cluster": 7})
    assert [limits.of(key) for key in ("cluster", "node-in:a", "node-in:b")] == [7, 3, 1]
    assert limits.with_values({"node-in:b": None}).of("node-in:b") == 3
    assert LimitSet().with_values(limits.values()) == limits


@pytest.mark.parametrize(
    "values", [{"speed": 1}, {"node-in": -1}, {"node-in:": 1}, {"cluster:x": 1}, {"cluster": None}]
)
def test_what_is_no_limit_is_refused(values: dict[str, int | None]) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        LimitSet().with_values(values)
    assert refused.value.reason == "LIMIT_INVALID"


def test_all_tokens_or_none() -> None:
    ledger = Ledger(LimitSet(cluster=2, node_in=1))
    ledger.take("1", ("cluster", "node-in:b"))
    assert ledger.lacking(("cluster", "node-in:b")) == "node-in:b"
    assert ledger.used("cluster") == 1, "looking takes nothing"
    ledger.release("1")
    ledger.release("1")
    assert (ledger.used("cluster"), ledger.free("node-in:b")) == (0, 1)


# --- placement ---


@pytest.mark.parametrize(
    ("check", "asks", "offers"),
    [
        ("SAME_NODE", {"at": "b"}, {}),
        ("NODE_DRAINING", {}, {"draining": True}),
        ("NODE_UNREACHABLE", {}, {"reachable": False}),
        ("BREAKER_OPEN", {}, {"broken_until_s": 11.0}),
        ("MEMORY_SHORT", {"memory": 2}, {"free": 1}),
        ("MEMORY_SHORT", {"memory": 2}, {"free": 3, "booked_bytes": 2 * GIB}),
        ("TAINTED", {}, {"taints": frozenset({"gpu"})}),
        ("APART", {"placing": Placing(apart="db")}, {"apart": Counter({"db": 1})}),
        ("SELECTOR_MISMATCH", {"placing": Placing(selector={"zone": "x"})}, {}),
        ("DRIVER_MISSING", {"driver": "qemu"}, {"drivers": frozenset({"microvm"})}),
        ("CPU_MISMATCH", {"cpu": "EPYC"}, {"cpus": frozenset({"Skylake"})}),
        ("PAGE_SIZE_MISMATCH", {"page_size_bytes": 1 << 21}, {"page_sizes": frozenset({4096})}),
    ],
)
def test_each_hard_filter_refuses_and_says_why(
    check: str, asks: dict[str, Any], offers: dict[str, Any]
) -> None:
    found = refusal(vm("1", **asks), node("b", **offers), 10.0)
    assert found is not None
    assert found.check == check
    assert found.hint == HINTS[check]
    assert "b" in found.reason or "1" in found.reason


def test_what_is_tolerated_unknown_or_over_refuses_nothing() -> None:
    tolerant = vm("1", placing=Placing(tolerations=frozenset({"gpu"})), driver="qemu", cpu="x")
    there = node("b", taints=frozenset({"gpu"}), broken_until_s=10.0)
    assert refusal(tolerant, there, 10.0) is None


def test_the_emptier_node_is_chosen_and_it_is_said_why() -> None:
    found = choose(
        vm("1"),
        [node("b", free=8), node("c", free=32)],
        Ledger(OPEN),
        source_link="",
        now_s=0,
    )
    assert isinstance(found, Choice)
    assert (found.node, found.compared) == ("c", 2)
    assert "memory left" in found.because


def test_nowhere_counts_what_refused() -> None:
    nodes = [node("a"), node("b", free=0), node("c", free=0), node("d", draining=True)]
    found = choose(vm("1"), nodes, Ledger(OPEN), source_link="", now_s=0)
    assert isinstance(found, Nowhere)
    assert (found.check, found.hint) == ("MEMORY_SHORT", HINTS["MEMORY_SHORT"])
    assert "2 MEMORY_SHORT" in found.message
    assert "1 NODE_DRAINING" in found.message


def test_a_node_that_failed_it_is_taken_only_if_there_is_no_other() -> None:
    made = schedule("a", "b", "c")
    made.put(request("1", avoid=frozenset({"b"})))
    made.put(request("2", avoid=frozenset({"b", "c"})))
    assert gone(made)[0] == ("1", "c")
    assert not len(made)


# --- the queue ---


def test_unfinished_then_class_then_age() -> None:
    made = schedule("a", "b", limits=LimitSet(cluster=1, node_in=9))
    made.put(request("old", created_s=0))
    made.put(request("urgent", created_s=9, priority=Priority.SYSTEM))
    made.put(request("late", created_s=5))
    made.put(request("begun", created_s=9, priority=Priority.BACKGROUND, unfinished=True))
    went = []
    while found := gone(made, 10.0):
        went += [name for name, _ in found]
        made.end(found[0][0], moved=False)
    assert went == ["begun", "urgent", "old", "late"]


def test_a_low_class_that_has_waited_beats_a_high_one() -> None:
    rules = Rules(ageing_s=300)
    old = request("old", created_s=0, priority=Priority.BACKGROUND)
    assert rules.rank(old) < rules.rank(request("new", created_s=601, priority=Priority.USER))
    assert rules.rank(old) > rules.rank(request("new", created_s=599, priority=Priority.USER))


@pytest.mark.parametrize(
    ("limits", "reason", "message"),
    [
        ({"cluster": 1}, "CLUSTER_LIMIT", "cluster 1/1"),
        ({"node-out:a": 1}, "NODE_OUTBOUND_LIMIT", "node-out:a 1/1"),
        ({"node-in:b": 1}, "NODE_INBOUND_LIMIT", "node-in:b 1/1"),
        ({"link:rack": 1}, "LINK_LIMIT", "link:rack 1/1"),
        ({"group:db": 1}, "GROUP_LIMIT", "group:db 1/1"),
    ],
)
def test_what_waits_says_which_limit_holds_it_and_its_place(
    limits: dict[str, int | None], reason: str, message: str
) -> None:
    made = Schedule(OPEN.with_values(limits))
    made.add_node(node("a", link="rack"))
    made.add_node(node("b"))
    grouped = Placing(group="db")
    for name in "123":
        made.put(request(name, vm=vm(name, placing=grouped), created_s=float(name)))
    assert gone(made, 5.0) == [("1", "b")]
    waits = made.waiting(5.0)
    assert [(each.request.request_id, each.place) for each in waits] == [("2", 1), ("3", 2)]
    assert {(each.reason, each.message) for each in waits} == {(reason, message)}
    made.set_limits(OPEN)
    assert {each.reason for each in made.waiting(5.0)} == {"NEXT"}
    assert [name for name, _ in gone(made, 6.0)] == ["2", "3"], "raised live"


def test_frozen_admits_nothing_and_says_so() -> None:
    made = schedule(frozen=True)
    made.put(request("1"))
    assert gone(made) == []
    assert [each.reason for each in made.waiting(0)] == ["FROZEN"]
    made.frozen = False
    assert len(gone(made)) == 1


def test_back_off_is_waited_out_and_others_pass() -> None:
    made = schedule()
    made.put(request("1", not_before_s=20.0))
    made.put(request("2", created_s=1))
    assert [name for name, _ in gone(made, 5.0)] == ["2"]
    assert [each.reason for each in made.waiting(5.0)] == ["BACK_OFF"]
    assert [name for name, _ in gone(made, 20.0)] == ["1"]


def test_memory_is_booked_until_the_guest_is_there_or_gone() -> None:
    made = Schedule(OPEN)
    made.add_node(node("a"))
    made.add_node(node("b", free=2))
    made.put(request("1", vm=vm("1", memory=2)))
    made.put(request("2", vm=vm("2", memory=1), created_s=1))
    assert gone(made) == [("1", "b")]
    assert made.waiting(0)[0].reason == "MEMORY_SHORT"
    made.end("1", moved=False)
    assert gone(made) == [("2", "b")]
    made.end("2", moved=True)
    assert (made.nodes["b"].free_bytes, made.nodes["b"].booked_bytes) == (GIB, 0)


def test_two_that_must_be_apart_do_not_meet_in_flight() -> None:
    made = schedule("a", "b", "c")
    apart = Placing(apart="db")
    for name in "123":
        made.put(request(name, vm=vm(name, placing=apart)))
    assert sorted(target for _, target in gone(made)) == ["b", "c"]
    assert [each.reason for each in made.waiting(0)] == ["APART"]


def test_a_breaker_that_closes_lets_through_what_was_stuck() -> None:
    made = schedule("a", "b")
    made.open_breaker("b", 60.0)
    made.put(request("1"))
    assert gone(made, 0.0) == []
    assert made.waiting(0.0)[0].reason == "BREAKER_OPEN"
    assert gone(made, 60.0) == [("1", "b")]


def test_the_oldest_gets_the_next_token_of_each_limit_that_it_needs() -> None:
    """Of two limits that are never free at the same moment."""
    limits = LimitSet(cluster=99, node_out=2, node_in=1)
    made = schedule("a", "b", "c", limits=limits, rules=Rules(reserve_after_s=10))
    made.put(request("holds-b", at="c", target="b"))
    assert gone(made) == [("holds-b", "b")]
    made.put(request("patient", target="b", created_s=1))
    made.put(request("early", target="c", created_s=2))
    assert gone(made, 3.0) == [("early", "c")], "nobody has waited long"
    made.put(request("late", at="a", created_s=3))
    assert gone(made, 20.0) == [], "the last outbound token of a is kept"
    late = next(each for each in made.waiting(20.0) if each.request.request_id == "late")
    assert late.place == 2
    made.end("holds-b", moved=True)
    assert gone(made, 21.0)[0] == ("patient", "b")


MOVES = st.lists(
    st.tuples(
        st.integers(0, 5),  # source
        st.sampled_from(["", "n0", "n3", "n5"]),
        st.sampled_from(list(Priority)),
        st.sampled_from(["", "g1", "g2"]),
        st.integers(1, 4),  # GiB
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(
    moves=MOVES,
    limits=st.tuples(*[st.integers(1, 4)] * 5),
    seed=st.integers(0, 1 << 16),
)
def test_no_limit_is_exceeded_and_everything_goes(
    moves: list[tuple[int, str, Priority, str, int]], limits: tuple[int, ...], seed: int
) -> None:
    """Over any mix: counted beside the ledger; every token comes back; all go where all can."""
    cluster, out, inbound, link, group = limits
    chosen = LimitSet(cluster=cluster, node_out=out, node_in=inbound, link=link, group=group)
    made = Schedule(chosen, Rules(reserve_after_s=5))
    links = {f"n{index}": f"rack{index % 2}" for index in range(6)}
    for name, behind in links.items():
        made.add_node(
            NodeView(
                name=name,
                link=behind,
                memory_available_bytes=1000 * GIB,
                memory_total_bytes=1000 * GIB,
            )
        )
    wanted = 0
    for index, (source, target, priority, word, memory) in enumerate(moves):
        if target == f"n{source}":
            continue
        wanted += 1
        of = vm(f"v{index}", f"n{source}", memory, placing=Placing(group=word))
        made.put(request(f"v{index}", vm=of, target=target, priority=priority, created_s=index / 9))
    chance, now, went = random.Random(seed), 5.0, 0
    under_way: dict[str, Admission] = {}
    while under_way or len(made):
        admitted = made.admit(now)
        for each in admitted:
            assert each.target != each.request.vm.node
            under_way[each.request.request_id] = each
        went += len(admitted)
        counts: Counter[str] = Counter()
        for each in under_way.values():
            here = each.request.vm.node
            counts.update(["cluster", f"out {here}", f"in {each.target}"])
            if links[here] != links[each.target]:
                counts.update([links[here], links[each.target]])
            if each.request.vm.placing.group:
                counts[f"group {each.request.vm.placing.group}"] += 1
        most = {"cluster": cluster, "out": out, "in": inbound, "rack0": link, "rack1": link}
        for key, count in counts.items():
            assert count <= most.get(key.split()[0], group), key
        assert under_way, "something can always go"
        ended = chance.choice(sorted(under_way))
        del under_way[ended]
        made.end(ended, moved=chance.random() < 0.8)
        now += 1.0
    assert went == wanted
    assert all(made.ledger.used(key) == 0 for key in ("cluster", "node-out:n0", "link:rack0"))
    assert all(each.booked_bytes == 0 for each in made.nodes.values())
