# SPDX-License-Identifier: Apache-2.0
"""Plays many scenarios. Two files share them, so that two workers can (`--dist loadfile`)."""

from __future__ import annotations

import os

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings

from tests.sim.cluster import play
from tests.sim.scenarios import SCENARIOS, Scenario

EXAMPLES = int(os.environ.get("GODWIT_SIM_EXAMPLES", "2000"))
SHARDS = 2


def search(shard: int) -> None:
    """Play this share of EXAMPLES; the same ones every time."""

    @hypothesis.seed(shard)
    @settings(
        max_examples=EXAMPLES // SHARDS,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # to make a failure small takes minutes: `make soak` does
        suppress_health_check=list(HealthCheck),
    )
    @given(SCENARIOS)
    def whatever_happens(scenario: Scenario) -> None:
        play(scenario.seed, scenario)

    whatever_happens()
