# SPDX-License-Identifier: Apache-2.0
"""`make soak SECONDS=N`: the model test with ever new scenarios. The last line is JSON.

A failure ends it with status 1, after Hypothesis has made the scenario small and printed it.
"""

from __future__ import annotations

import json
import logging
import secrets
import sys
import time
from collections import Counter

import hypothesis
from hypothesis import HealthCheck, given, settings

from tests.sim.cluster import play
from tests.sim.scenarios import SCENARIOS, Scenario


def main() -> int:
    """Play until the time is over."""
    logging.disable(logging.CRITICAL)
    began, wanted_s = time.monotonic(), float(sys.argv[1])
    count: Counter[str] = Counter()

    @settings(
        max_examples=200,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(SCENARIOS)
    def search(scenario: Scenario) -> None:
        if time.monotonic() - began > wanted_s:
            return
        cluster = play(scenario.seed, scenario)
        count["examples"] += 1
        count["deaths"] += cluster.crash_count
        count["restores"] += cluster.restored
        count["runs"] += len(cluster.truth.runs)

    while time.monotonic() - began < wanted_s:
        number = secrets.randbits(64)
        print(f"seed {number}", flush=True)
        hypothesis.seed(number)(search)()
    print(json.dumps(count))
    return 0


if __name__ == "__main__":
    sys.exit(main())
