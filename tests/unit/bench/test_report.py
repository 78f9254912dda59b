# SPDX-License-Identifier: Apache-2.0
"""From the results of all sections to the page in docs: every bar, every table, the plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.bench import counts, estimate, lanes, report, streams
from tests.bench.__main__ import main
from tests.bench.sections import SECTIONS

BULK = {
    "bytes": 8 << 30,
    "elapsed_ns": 4e8,
    "wire_bytes": 600_000,
    "source_blocks": [0, 0],
    "guest_blocks": 0,
    "memory_kib": 4096,
}


BARS = (
    *("demand, idle: p50", "demand, idle: p99", "demand, bulk w", "demand, bulk at"),
    *("bulk, not installed", "bulk, installed / raw", "bulk, installed / grpcio"),
    *("guest gap, without", "guest gap, capped at 125", "guest gap, capped at 10"),
    *("speed in the first second", "memory there", "8 GiB", "agent memory", "agent process"),
)
"""Each that there must be, by its beginning."""


def _moves(share: float) -> dict[str, Any]:
    move = {
        "gap_ms": 90.0,
        "later_gap_ms": 20.0,
        "first_second_share": share,
        "memory_s": 2.0,
        "total_s": 2.4,
        "said": {"agent_kib": 4000},
    }
    slow = {**move, "gap_ms": 500.0, "first_second_share": 0.02, "memory_s": 2.5}
    names = ("system QEMU, preempt", "newest QEMU, preempt")
    return {
        "versions": {"old": "7.2", "new": "11.1"},
        "missing": {},
        "moves": {"ours": [move] * 7, **{name: [slow] * 7 for name in names}},
    }


RESULTS: dict[str, dict[str, Any]] = {
    "lanes": {
        "us": {
            key: [[at, at * 1.1]] * 30
            for key, at in zip(lanes.LABELS, (20, 10, 25, 300, 35, 50, 40, 50, 60), strict=True)
        },
        "bulk_mbs": {"bulk": [500.0] * 30, "idle": [0.0] * 30},
    },
    "streams": {
        "mbs": {
            key: [at] * 7
            for key, at in zip(
                streams.LABELS,
                (2000, 900, 2000, 1600, 200, 1100, 1200, 800, 3000, 1500),
                strict=True,
            )
        }
    },
    "threads": {"runs": {"1": [{"us": [50.0], "pages_per_s": 2e4}] * 3}},
    "memory": {"own_network": True, "zeros": [BULK] * 3, "dense": {"1": [BULK] * 3}},
    "sizes": {"sizes": {"256 MiB, dense": [BULK] * 3}},
    "tls": {
        "us": {"plain": [[100.0] * 9] * 3, "tls": [[110.0] * 9] * 3},
        "mbs": {"plain": [900.0] * 3, "tls": [700.0] * 3},
    },
    "counts": {
        "counts": {label: [at] for label, at in json.loads(counts.REFERENCE.read_text()).items()}
    },
    "peers": _moves(0.2),
    "peers-125": _moves(0.2),
    "peers-10": _moves(0.2),
}


@pytest.mark.parametrize("sabotaged", [None, "streams", "peers-10"])
def test_the_page_of_a_whole_run(
    tmp_path: Path, sabotaged: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "RESAMPLE_COUNT", 10)  # it is not the intervals that are judged
    out, docs = tmp_path / "out", tmp_path / "docs"
    out.mkdir()
    docs.mkdir()
    for name in SECTIONS:
        result = _moves(0.2) | {"moves": {"ours": []}} if name == sabotaged else RESULTS[name]
        if name == sabotaged == "streams":
            result = {"mbs": RESULTS[name]["mbs"] | {"raw_2": [900.0] * 7}}
        (out / f"{name}.json").write_text(json.dumps({"result": result}))
    status = main(["--collect", "--docs"], out=out, docs=docs)
    rows = json.loads((out / "bars.json").read_text())
    assert status == (0 if sabotaged is None else 1)
    assert all(row["ok"] for row in rows) == (sabotaged is None)
    text = (docs / "page-path.md").read_text()
    assert all(row["name"] in text for row in rows)
    assert all(f"## {section.title}" in text for section in SECTIONS.values())
    for plot in ("latency.svg", "gap.svg", "first-second.svg"):
        assert f"({plot})" in text
        assert (docs / plot).read_text().startswith("<?xml")
    assert all(any(row["name"].startswith(start) for row in rows) for start in BARS)


def test_docs_are_of_all_sections_or_none(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["lanes", "--docs"], out=tmp_path, docs=tmp_path)


def test_the_machine_is_named_without_its_name() -> None:
    assert "cores of" in report.machine()
    assert Path("/proc/sys/kernel/hostname").read_text().strip() not in report.machine()
