# SPDX-License-Identifier: Apache-2.0
"""Promise: failures are answered by patience, policies go by the specific; a plan says all."""

from __future__ import annotations

import pytest

from services.orchestrator.scheduling.breaker import Caution, Outcome, trouble
from services.orchestrator.scheduling.limits import LimitSet
from services.orchestrator.scheduling.model import NodeView, Priority, Request, VmView
from services.orchestrator.scheduling.plan import Rate, learn_rate, plan
from services.orchestrator.scheduling.policy import Policy, Settings, effective
from services.orchestrator.scheduling.schedule import Schedule

GIB = 1 << 30
CAUTION = Caution()


def failed(at_s: float, vm_id: str = "1", target: str = "b", *, ok: bool = False) -> Outcome:
    return Outcome(vm_id=vm_id, source="a", target=target, ended_s=at_s, ok=ok)


@pytest.mark.parametrize(("failures", "delay_s"), [(1, 20), (2, 40), (3, 80), (9, 600)])
def test_back_off_doubles_up_to_its_cap(failures: int, delay_s: float) -> None:
    outcomes = [failed(100.0 + index) for index in range(failures)]
    last_s = outcomes[-1].ended_s
    found = trouble(outcomes, last_s, CAUTION)
    assert found.not_before_s == {"1": last_s + delay_s}
    assert found.avoid == {"1": frozenset({"b"})}
    assert not trouble(outcomes, last_s + delay_s, CAUTION).not_before_s


def test_a_success_ends_the_row() -> None:
    outcomes = [failed(1), failed(2), failed(3, ok=True)]
    found = trouble(reversed(outcomes), 4.0, CAUTION)
    assert (found.not_before_s, found.avoid, found.failures) == ({}, {}, {})


def test_a_clock_that_was_set_back_makes_nobody_wait() -> None:
    found = trouble([failed(1e9), failed(2e9, "2"), failed(3e9, "3")], 5.0, CAUTION)
    assert (found.not_before_s, found.broken_until_s) == ({}, {})


def test_the_breaker_opens_for_several_vms_and_doubles() -> None:
    one_vm = [failed(each) for each in (1.0, 2.0, 3.0)]
    assert trouble(one_vm, 4.0, CAUTION).broken_until_s == {}, "that is the VM's trouble"
    several = [failed(1, "1"), failed(2, "2"), failed(3, "3")]
    assert trouble(several, 4.0, CAUTION).broken_until_s == {"a": 63.0, "b": 63.0}
    assert trouble(several, 63.0, CAUTION).broken_until_s == {}, "moves are let through again"
    again = [*several, failed(70, "4", target="c")]
    found = trouble(again, 71.0, CAUTION)
    assert found.broken_until_s == {"a": 190.0}, "the first that fails opens it anew"
    assert found.failures == {"a": 4, "b": 3, "c": 1}


def test_the_more_specific_policy_counts_setting_by_setting() -> None:
    policies = [
        Policy(name="all", settings=Settings(retries=1, priority=Priority.USER)),
        Policy(
            name="db",
            match_labels={"app": "db"},
            settings=Settings(priority=Priority.SYSTEM, freeze_after_ms=0),
        ),
        Policy(
            name="db-prod",
            match_labels={"app": "db", "env": "prod"},
            settings=Settings(bulk_bytes_per_s_max=7),
        ),
    ]
    found = effective({"app": "db", "env": "prod", "x": "y"}, policies)
    assert found.policies == ("db-prod", "db", "all")
    assert found.settings == Settings(
        priority=Priority.SYSTEM, retries=1, bulk_bytes_per_s_max=7, freeze_after_ms=0
    )
    assert effective({}, policies).policies == ("all",)
    assert effective({"app": "db"}, reversed(policies)) == effective({"app": "db"}, policies)


def test_of_equally_specific_policies_the_first_by_name_counts() -> None:
    policies = [
        Policy(name=name, match_labels={name: "1"}, settings=Settings(retries=retries))
        for name, retries in (("b", 2), ("a", 1))
    ]
    assert effective({"a": "1", "b": "1"}, policies).settings.retries == 1


# --- the dry run ---


def small(limits: LimitSet, *nodes: tuple[str, int]) -> Schedule:
    made = Schedule(limits)
    for name, free in nodes:
        made.add_node(
            NodeView(
                name=name,
                memory_available_bytes=free * GIB,
                memory_total_bytes=64 * GIB,
                draining=name == "a",
            )
        )
    return made


def fill(made: Schedule, *memories: int) -> None:
    for index, memory in enumerate(memories):
        vm = VmView(vm_id=f"v{index}", node="a", memory_bytes=memory * GIB)
        made.put(Request(request_id=f"v{index}", vm=vm, created_s=0.0))


RATE = Rate(overhead_s=1, bytes_per_s=GIB)


def test_a_plan_has_waves_targets_and_times() -> None:
    made = small(LimitSet(node_out=2), ("a", 0), ("b", 50), ("c", 50))
    fill(made, 1, 1, 1, 1)
    found = plan(made, RATE)
    assert [(step.vm_id, step.wave, step.starts_s, step.ends_s) for step in found.steps] == [
        ("v0", 1, 0, 2),
        ("v1", 1, 0, 2),
        ("v2", 2, 2, 4),
        ("v3", 2, 2, 4),
    ]
    assert {step.target for step in found.steps} == {"b", "c"}
    assert all(step.because for step in found.steps)
    assert (found.ends_s, found.waves, found.impossible) == (4, 2, ())


def test_a_plan_names_each_vm_that_cannot_go_and_why() -> None:
    made = small(LimitSet(node_out=2), ("a", 0), ("b", 3))
    fill(made, 2, 9, 1)
    found = plan(made, RATE)
    assert [step.vm_id for step in found.steps] == ["v0", "v2"]
    (impossible,) = found.impossible
    assert (impossible.vm_id, impossible.check) == ("v1", "MEMORY_SHORT")
    assert impossible.hint


def test_a_plan_waits_for_what_runs_and_keeps_to_max_parallel() -> None:
    made = small(LimitSet(node_out=5, node_in=9), ("a", 0), ("b", 50))
    other = VmView(vm_id="other", node="a", memory_bytes=9 * GIB)
    made.start(Request(request_id="other", vm=other, created_s=0), "b", ("cluster",), "")
    fill(made, 1, 1, 1)
    found = plan(made, RATE, parallel_max=1)
    assert [(step.vm_id, step.starts_s) for step in found.steps] == [
        ("v0", 0),
        ("v1", 2),
        ("v2", 4),
    ]


def test_the_rate_is_learnt_from_what_was_moved() -> None:
    assert learn_rate([], RATE) == RATE
    seen = [(GIB, 2.0), (2 * GIB, 3.0), (4 * GIB, 5.0)]
    learnt = learn_rate(seen, RATE)
    assert learnt.overhead_s == 1.0
    assert learnt.duration_s(2 * GIB) == pytest.approx(3.0)
