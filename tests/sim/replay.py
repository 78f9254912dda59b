# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.sim.replay "Scenario(...)"`: plays what a failure has printed, with the log."""

from __future__ import annotations

import logging
import sys

from tests.sim.cluster import play
from tests.sim.scenarios import Op, Scenario


def main() -> int:
    """Play it; a broken invariant is raised."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    scenario = eval(sys.argv[1], {"Scenario": Scenario, "Op": Op})
    cluster = play(scenario.seed, scenario)
    print(cluster.truth.runs, cluster.state())
    return 0


if __name__ == "__main__":
    sys.exit(main())
