# SPDX-License-Identifier: Apache-2.0
"""Promise: `godwit demo --fleet` drains a node and fills it again, within limits."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from godwit.models import Migration, PhaseTransition

from services.cli.exit_status import ExitStatus
from services.demo.fleet_run import exceeded, homes, most_at_once
from tests.integration.test_demo_microvm import left_behind, run_demo

pytestmark = pytest.mark.timeout(300)


async def test_a_small_fleet_is_drained_and_filled_again(tmp_path: Path) -> None:
    directory = tmp_path / "demo"
    small = ("--fleet", "--nodes", "3", "--vms", "4", "--accel", "thread")
    status, report, err = await run_demo(directory, *small)
    assert report["reasons"] == [], err
    assert (report["verdict"], status) == ("ok", ExitStatus.OK)
    assert [leg["kind"] for leg in report["operations"]] == ["drain", "undrain"]
    for leg in report["operations"]:
        assert (leg["state"], leg["moved"]) == ("succeeded", 2)
        assert leg["most_at_once"]["cluster"] >= 1
        assert leg["pause_ms_max"] > 0
    assert (report["moves"], report["corrupt_pages"], report["doubled_beats"]) == (4, 0, 0)
    assert report["pages_verified"] == 4 * 4 * 256
    assert left_behind(directory) == []
    assert not directory.exists(), "nothing is kept of a good run"


def test_half_of_the_guests_are_on_the_node_that_is_drained() -> None:
    assert Counter(homes("abcd", 12)) == {"a": 6, "b": 2, "c": 2, "d": 2}


def test_what_was_under_way_together_is_counted_from_the_moves_themselves() -> None:
    start = datetime(2026, 1, 1, tzinfo=UTC)

    def migration(source: str, target: str, began_s: int, ended_s: int) -> Migration:
        began = PhaseTransition(phase="validating", at=start + timedelta(seconds=began_s))
        return Migration(
            source_node=source,
            destination_node=target,
            transitions=(began,),
            ended_at=start + timedelta(seconds=ended_s),
        )

    moves = [migration("a", "b", 0, 2), migration("a", "c", 1, 3), migration("a", "b", 2, 4)]
    most = most_at_once(moves)
    assert most == {"cluster": 2, "node-out:a": 2, "node-in:b": 1, "node-in:c": 1}
    assert exceeded(most, {"cluster": 2, "node-out": 2, "node-in": 1}) == []
    assert exceeded(most, {"cluster": 2, "node-out": 1, "node-in": 1}) == [
        "limit node-out:a exceeded: 2/1"
    ]
