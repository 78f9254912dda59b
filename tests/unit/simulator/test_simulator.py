# SPDX-License-Identifier: Apache-2.0
"""Promise: over whole fleets no limit is exceeded, nobody starves, drains take little too long.

Said by a checker that shares no code with what it judges.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from services.cli.main import app
from services.common.errors import InvalidArgumentError
from services.simulator.checker import OVERTAKEN_S, Checker
from services.simulator.events import (
    Asked,
    Ended,
    Event,
    Frozen,
    GaveUp,
    LimitsSet,
    NodeClosed,
    NodeSeen,
    VmSeen,
    Went,
)
from services.simulator.run import simulate
from services.simulator.scenario import Scenario, load

ROOT = Path(__file__).resolve().parent.parent.parent.parent
SCENARIOS = ROOT / "services" / "simulator" / "scenarios"
MAKESPAN_RATIO_MAX = 1.3


def scenario(*happenings: dict[str, Any], **more: Any) -> Scenario:
    return Scenario.model_validate({"name": "test", "happenings": happenings, **more})


@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize("order", ["smallest-first", "largest-first"])
def test_a_drain_of_200_vms_on_20_nodes_keeps_to_its_bars(seed: int, order: str) -> None:
    read = load(SCENARIOS / "drain-nodes.yaml")
    drains = tuple(each.model_copy(update={"order": order}) for each in read.happenings)
    report = simulate(read.model_copy(update={"seed": seed, "happenings": drains}))
    assert report.findings.violations == []
    assert report.findings.starved == []
    (course,) = report.courses
    assert (course.asked, course.moved) == (200, 200)
    assert course.makespan_ratio <= MAKESPAN_RATIO_MAX


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", ["link-failure", "storm"])
def test_trouble_exceeds_no_limit_and_starves_nobody(name: str, seed: int) -> None:
    report = simulate(load(SCENARIOS / f"{name}.yaml").model_copy(update={"seed": seed}))
    assert report.findings.violations == []
    assert report.findings.starved == []
    assert all(course.moved == course.asked > 0 for course in report.courses)


def test_a_rollout_empties_every_node_once() -> None:
    fleet = {"racks": 2, "nodes_per_rack": 5, "vms_per_node": 4}
    rollout = {"kind": "rollout", "nodes_at_once": 2, "reboot_s": 30}
    report = simulate(scenario(rollout, fleet=fleet, fail_share=0.05))
    assert report.ok, report.findings
    assert report.courses[0].moved >= 40
    assert report.courses[0].moved == report.courses[0].asked


def test_the_same_seed_gives_the_same_course() -> None:
    read = load(SCENARIOS / "storm.yaml")
    assert simulate(read).virtual_s == simulate(read).virtual_s


def test_a_fleet_without_room_says_what_cannot_go_and_starves_nobody() -> None:
    fleet = {"nodes_per_rack": 2, "vms_per_node": 8, "node": {"memory_gib": 36}}
    drain = {"kind": "drain", "nodes": ["r0-n0"]}
    report = simulate(scenario(drain, fleet=fleet | {"vm_memory_gib": [4]}))
    assert report.ok, report.findings
    assert report.courses[0].moved == 1, "there is room for one"


def test_every_scenario_that_comes_along_can_be_read() -> None:
    names = {load(path).name for path in SCENARIOS.glob("*.yaml")}
    assert names == {path.stem for path in SCENARIOS.glob("*.yaml")}


def test_a_scenario_that_is_wrong_names_the_field(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text("name: x\nhappenings: [{kind: drain, rakcs: [1]}]\n")
    with pytest.raises(InvalidArgumentError, match="rakcs"):
        load(path)


def test_the_command_ends_with_one_line_of_json() -> None:
    result = CliRunner().invoke(app, ["simulate", "drain-nodes"])
    assert result.exit_code == 0, result.output
    last = json.loads(result.output.splitlines()[-1])
    for key in ("plan_seconds", "admissions_per_s", "makespan_ratio", "peak_memory_mib"):
        assert last[key] > 0, key
    assert (last["limit_violations"], last["starved"]) == (0, 0)


# --- the checker can fail ---

GIB = 1 << 30


def log(*events: Event) -> list[Event]:
    return [
        LimitsSet(at_s=0, values={"node-out": 1}),
        *(NodeSeen(at_s=0, node=name, link="", memory_bytes=4 * GIB) for name in "abc"),
        *(
            VmSeen(at_s=0, vm_id=f"v{index}", node="a", memory_bytes=GIB, group="")
            for index in range(3)
        ),
        *(Asked(at_s=0, move_id=f"m{index}", vm_id=f"v{index}", happening=0) for index in range(3)),
        *events,
    ]


def went(move: str, target: str = "b", at_s: float = 0) -> Went:
    return Went(at_s=at_s, move_id=move, target=target)


def ended(move: str, at_s: float = 1, *, moved: bool = True) -> Ended:
    return Ended(at_s=at_s, move_id=move, moved=moved)


@pytest.mark.parametrize(
    ("events", "what"),
    [
        ([went("m0"), went("m1", "c")], "node-out:a 2/1"),
        ([went("m0", "a")], "goes where it is"),
        ([NodeClosed(at_s=0, node="b", closed=True), went("m0")], "being emptied"),
        ([Frozen(at_s=0, frozen=True), went("m0")], "frozen"),
        (
            [
                LimitsSet(at_s=0, values={"node-out": 9, "node-in": 9, "cluster": 1}),
                went("m0"),
                went("m1", "c"),
            ],
            "cluster 2/1",
        ),
    ],
)
def test_the_checker_sees_what_is_wrong(events: list[Event], what: str) -> None:
    found = Checker().read(log(*events))
    assert any(what in each for each in found.violations), found.violations


def test_the_checker_sees_memory_that_is_not_there() -> None:
    big = VmSeen(at_s=0, vm_id="big", node="c", memory_bytes=4 * GIB, group="")
    asked = Asked(at_s=0, move_id="big", vm_id="big", happening=0)
    found = Checker().read(log(went("m0"), ended("m0"), big, asked, went("big", "b", 2)))
    assert any("too few" in each for each in found.violations)


def test_the_checker_sees_starvation() -> None:
    found = Checker().read(log(GaveUp(at_s=9, move_id="m1", reason="NODE_OUTBOUND_LIMIT")))
    assert len(found.starved) == 1
    found = Checker().read(log(GaveUp(at_s=9, move_id="m1", reason="MEMORY_SHORT")))
    assert found.starved == []
    late = OVERTAKEN_S + 100.0
    later = [
        VmSeen(at_s=late, vm_id="new", node="a", memory_bytes=GIB, group=""),
        Asked(at_s=late, move_id="new", vm_id="new", happening=0),
    ]
    overtaken = [went("new", "c", late), ended("new", late + 1), went("m0", "b", late + 2)]
    assert len(Checker().read(log(*later, *overtaken)).starved) == 1


def test_the_checker_passes_what_is_right() -> None:
    events = [went("m0"), ended("m0", moved=False), went("m1", "b", 1), ended("m1", 2)]
    found = Checker().read(log(*events))
    assert (found.violations, found.starved) == ([], [])
    assert (found.moves, found.admissions, found.failures) == (3, 2, 1)
