# SPDX-License-Identifier: Apache-2.0
"""The other half of test_model.py."""

from __future__ import annotations

import pytest

from tests.sim.search import search


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_whatever_else_happens_there_is_one_guest() -> None:
    """See test_model.py."""
    search(shard=1)
