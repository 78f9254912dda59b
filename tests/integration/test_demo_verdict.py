# SPDX-License-Identifier: Apache-2.0
"""Promise: the verdict turns red for the right reason. A check that never failed proves nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from services.cli.exit_status import ExitStatus
from services.demo.sabotage import Harm
from tests.integration.test_demo import left_behind, run_demo

pytestmark = [
    pytest.mark.requires("uffd", "qemu", "root"),
    pytest.mark.slow,
    pytest.mark.timeout(300),
]


async def harmed(harm: Harm, directory: Path) -> dict[str, Any]:
    """The report of a small demo with this harm; it must be red and leave nothing running."""
    arguments = ("--memory", "192M", "--workload-mib", "64", "--json", "--sabotage", harm)
    status, out, err = await run_demo(directory, *arguments)
    assert out, err
    report: dict[str, Any] = json.loads(out[-1])
    assert report["verdict"] == "failed", err
    assert status == ExitStatus.MIGRATION_FAILED
    assert report["reasons"]
    assert left_behind(directory) == []
    return report


async def test_one_corrupt_page_is_seen(tmp_path: Path) -> None:
    report = await harmed(Harm.CORRUPT_PAGE, tmp_path / "demo")
    assert report["corrupt_pages"] == 1
    assert "torn" in " ".join(report["reasons"])
    assert report["doubled_beats"] == 0


async def test_a_dropped_userfaultfd_is_seen(tmp_path: Path) -> None:
    """Absent pages read as zeros: the workload says so, or the kernel dies, perhaps mutely."""
    report = await harmed(Harm.DROP_UFFD, tmp_path / "demo")
    text = " ".join(report["reasons"])
    signs = ("corrupt pages", "panic", "BUG", "Oops", "says nothing any more")
    assert any(sign in text for sign in signs), text


async def test_two_running_guests_are_seen(tmp_path: Path) -> None:
    """Nothing else is wrong with this run: the memory arrived whole and is verified."""
    report = await harmed(Harm.DOUBLE_RUN, tmp_path / "demo")
    assert report["doubled_beats"] > 0
    assert "heartbeats at the source" in " ".join(report["reasons"])
    assert report["corrupt_pages"] == 0
    assert report["pages_verified"] == 64 * 256
