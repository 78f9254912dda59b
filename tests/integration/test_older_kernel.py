# SPDX-License-Identifier: Apache-2.0
"""A guest moves on a kernel that has no more than Linux 6.1 has (docs/compatibility.md)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness.cluster import describe, migrate, other_node, small_guest

pytestmark = [
    pytest.mark.requires("uffd", "qemu", "root"),
    pytest.mark.slow,
    pytest.mark.timeout(300),
]

NEWER_THAN_6_1 = "poison,wp-async,move"


async def test_a_guest_moves_without_newer_features(tmp_path: Path) -> None:
    masked = {"GODWIT_MASK_UFFD_FEATURES": NEWER_THAN_6_1}
    async with small_guest(tmp_path, environment=masked) as guest:
        capabilities = (await guest.client.nodes())[0].capabilities
        assert capabilities is not None
        assert capabilities.uffd_features
        assert not set(NEWER_THAN_6_1.split(",")) & set(capabilities.uffd_features)
        last = await migrate(guest, await other_node(guest))
        assert await guest.prove() == [], describe(guest, last)
