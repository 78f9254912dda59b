# SPDX-License-Identifier: Apache-2.0
"""The report for people shows what the report for programs says, also where it failed early."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from services.demo.report import print_report

MOVE = {
    "from": "a",
    "to": "b",
    "pause_ms": 31.25,
    "guest_gap_ms": None,
    "total_s": 1.5,
    "pages_demand": 1234,
    "pages_bulk": 99,
    "pages_zero": 7,
    "fault_p50_us": 81.0,
    "fault_p99_us": 402.0,
    "pages_verified": 65536,
}


def shown(**changes: Any) -> str:
    report = {
        "vmm": "QEMU 7.2",
        "guest": "Linux 6.1",
        "memory_bytes": 512 << 20,
        "migrations": [MOVE],
        "pages_verified": 65536,
        "corrupt_pages": 0,
        "doubled_beats": 0,
        "reasons": [],
        "verdict": "ok",
        **changes,
    }
    out = io.StringIO()
    print_report(report, Console(file=out, width=100))
    return out.getvalue()


def test_report_of_a_good_run() -> None:
    text = shown()
    for part in ("a → b", "31.2 ms", "unknown", "1,234", "81 µs", "65,536", "verdict: ok"):
        assert part in text


def test_report_of_a_run_that_never_moved() -> None:
    text = shown(migrations=[], verdict="failed", reasons=["no migration took place"])
    assert "verdict: failed\n  no migration took place" in text
