# SPDX-License-Identifier: Apache-2.0
"""The model test: whatever is killed, cut, lost, late, doubled or forgotten, I1-I14 hold.

An orchestrator, sometimes two, and two agents as they are, on simulated machines and a fake clock.
The invariants are asserted at every act and every write. At the end, once all faults are over,
nothing is under way any more, and one guest is left, whole, where the store says it is, with
nothing beside it.

`make soak SECONDS=N` plays for as long as one likes. A failure prints its scenario, which is all of
it: `python -m tests.sim.replay "Scenario(...)"` plays it again, with the log; REPLAYED keeps it.
"""

from __future__ import annotations

import pytest

from tests.sim.cluster import play
from tests.sim.scenarios import Op, Scenario
from tests.sim.search import search

# By far more than it takes: a slow machine is no failure of the model.
pytestmark = pytest.mark.timeout(900)

REPLAYED = [
    # A second orchestrator decided; the first took the agents' word for a store that forgot.
    Scenario(
        99,
        "calm",
        2000,
        (Op("crash", "b", 7, 50), Op("twin", "", 8, 50), Op("kill", "a", 9, 2000)),
    ),
    # A deposed orchestrator wrote the progress that it had seen last (I12).
    Scenario(449, "calm", 2000, (Op("twin", "", 7, 2000),)),
    # A process that has died since moved it on: its follower waited for ever.
    Scenario(
        4181,
        "late",
        20,
        (
            Op("kill", "a", 0, 28),
            Op("page_server", "b", 7, 2594),
            Op("cancel", "", 0, 89),
            Op("twin", "", 4, 138),
            Op("move", "", 0, 31),
        ),
    ),
    # The store had one move under way and the nodes a later one: the rebuild could not be written.
    Scenario(
        139287742,
        "calm",
        200,
        (
            Op("backup", "", 0, 49),
            Op("move", "", 0, 40),
            Op("crash", "a", 0, 306),
            Op("restore", "", 1, 19),
            Op("abandon", "", 8, 0),
            Op("abandon", "", 11, 1387),
            Op("recover", "", 0, 50),
            Op("end_at_commit", "a", 58, 1381),
        ),
    ),
    Scenario(0, "calm", 20, (Op("backup", "", 0, 40), Op("restore", "", 1, 0))),
    # The shell dies before ACTIVATING, before or after the seal; the host of it loses its power.
    Scenario(1, "calm", 20, (Op("end_at_commit", "b", 0, 10),)),
    Scenario(1, "calm", 20, (Op("end_at_commit", "b", 4, 10),)),
    Scenario(2, "calm", 20, (Op("reboot_at_commit", "b", 1, 10), Op("kill", "o", 0, 500))),
    Scenario(3, "lossy", 20, (Op("cut", "ob", 6, 300), Op("end_paused", "b", 0, 3000))),
    # A departure that ended with its boot, never sealed: its record stayed for ever.
    Scenario(
        176122,
        "wild",
        2000,
        (
            Op("end_paused", "a", 0, 347),
            Op("kill", "b", 0, 347),
            Op("backup", "", 0, 2068),
            Op("reboot", "a", 0, 21),
            Op("backup", "", 0, 1),
        ),
    ),
    # A second orchestrator had moved it on; the first counted a broken I1 by its own old row.
    Scenario(
        8383,
        "lossy",
        200,
        (
            Op("backup", "", 0, 18),
            Op("end_shell", "a", 0, 20),
            Op("twin", "", 20, 1119),
            Op("move", "", 0, 730),
        ),
    ),
]
"""What once failed, and then what would be a pity to lose."""


@pytest.mark.parametrize("scenario", REPLAYED, ids=range(len(REPLAYED)))
def test_replay(scenario: Scenario) -> None:
    """Equal scenarios play alike: the same acts at the same virtual times."""
    first, second = (play(scenario.seed, scenario) for _ in range(2))
    assert first.truth.runs == second.truth.runs
    assert first.loop.now == second.loop.now


def test_an_abandon_is_admitted_and_final() -> None:
    """The VMM dies in post-copy: few scenarios that are drawn come to it, some seeds of this do."""
    ops = (
        Op("backup", "", 0, 84),
        Op("end_vmm", "b", 0, 10),
        Op("recover", "", 0, 10),
        Op("abandon", "", 12, 0),
    )
    courses = (play(seed, Scenario(seed, "calm", 20, ops)) for seed in range(200))
    assert any(course.truth.abandoned for course in courses)


@pytest.mark.parametrize("who", "ab")
def test_a_node_may_reboot_at_any_moment_around_the_end(who: str) -> None:
    """Nothing stays on it: the record of a source that rebooted just before its Release did.

    A drain of that node would have waited for ever. Found at 200 to 265 ms after the commit; over
    so many moments it is met whatever shifts the virtual time.
    """
    for after_ms in range(120, 320, 4):
        for down_ms in (20, 2000):
            op = Op("reboot_at_commit", who, after_ms)
            play(after_ms, Scenario(after_ms, "calm", down_ms, (op,)))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_whatever_happens_there_is_one_guest() -> None:
    """See the module; the other half is in test_model_more.py, for another worker."""
    search(shard=0)
