# SPDX-License-Identifier: Apache-2.0
"""Promise: whatever fails in a migration, one guest is left, whole, and nobody gave a command.

One case of each kind; `make chaos N=300` runs as many as one likes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.kinds import KINDS
from tests.harness.link import NEEDS
from tests.harness.require import required_names

SEED = 1
TIMEOUT_S = 900


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S + 60)
def test_each_kind_of_fault_once(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.chaos", "--each", "--brief"),
            *("--seed", str(SEED), "--dir", str(tmp_path / "chaos")),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    report = json.loads(done.stdout.splitlines()[-1])
    impossible = report["impossible_here"]
    assert {*report["faults"], *impossible} == {kind.name for kind in KINDS}, done.stderr
    assert set(report["faults"].values()) == {1}, done.stderr
    if required_names(os.environ) >= set(NEEDS):
        assert impossible == []
    assert (report["corrupt"], report["doubled"], report["lost"]) == (0, 0, 0)
    assert report["recovered"] == report["n"] == len(KINDS) - len(impossible)
