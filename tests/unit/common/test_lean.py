# SPDX-License-Identifier: Apache-2.0
"""A process that a guest waits for imports what it needs, and no more."""

from __future__ import annotations

import subprocess
import sys

import pytest

from services.common.lean import without


def test_what_is_left_out_is_there_afterwards() -> None:
    """The block does not find it, others do; what was imported before stays."""
    sys.modules.pop("colorsys", None)
    with without("colorsys"), pytest.raises(ImportError):
        import colorsys
    import colorsys

    with without("colorsys"):
        import colorsys
    assert colorsys.rgb_to_hsv(0, 0, 0) == (0, 0, 0)


def test_an_agent_starts_without_what_only_people_need() -> None:
    """Rich costs a quarter of a second at each start: kill -9 to the guest's next page is one."""
    code = "import sys, services.fault_agent.main; print([n for n in sys.modules if n == 'rich'])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"
