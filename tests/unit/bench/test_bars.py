# SPDX-License-Identifier: Apache-2.0
"""A missed bar is told, written and ends the run with 1; so is one that was not measured."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.bench import bars, memory
from tests.bench.__main__ import main
from tests.bench.bars import Bar
from tests.bench.estimate import Estimate
from tests.bench.section import failed
from tests.bench.sections import LIMITS_S, QUICK, SECTIONS, WHOLE_S


def value(at: float, low: float | None = None, high: float | None = None) -> Estimate:
    return Estimate(
        value=at, low=at if low is None else low, high=at if high is None else high, n=7
    )


@pytest.mark.parametrize(
    ("bar", "ok"),
    [
        (Bar(name="a", limit=2, value=value(2)), True),
        (Bar(name="a", limit=2, value=value(2.01)), False),
        (Bar(name="a", limit=2, at_most=False, value=value(2)), True),
        (Bar(name="a", limit=2, at_most=False, value=value(1.99)), False),
        # The interval does not excuse, and does not accuse.
        (Bar(name="a", limit=2, value=value(2.1, 1.0, 3.0)), False),
        (Bar(name="a", limit=2, value=value(1.9, 1.0, 3.0)), True),
        (Bar(name="a", limit=2, value=value(math.nan)), False),
        (Bar(name="a", limit=2, at_most=False, value=value(math.nan)), False),
        (Bar(name="a", limit=2, why_not="no such VMM here"), False),
    ],
)
def test_verdict_exit_and_file(bar: Bar, ok: bool, tmp_path: Path) -> None:
    good = Bar(name="good", limit=1, value=value(0.5))
    assert bar.ok == ok
    assert ("MISSED" in bar.verdict()) == (not ok)
    assert bars.exit_status([good, bar, good]) == (0 if ok else 1)
    path = tmp_path / "new" / "bars.json"
    bars.write([good, bar], path)
    written = json.loads(path.read_text())
    assert [set(row) for row in written] == [{"name", "value", "limit", "ok"}] * 2
    assert [row["ok"] for row in written] == [True, ok]
    assert any(bar.verdict() in line for line in bars.table([bar]))


def test_a_limit_within_the_interval_is_said() -> None:
    assert Bar(name="a", limit=2, value=value(1.9, 1.0, 3.0)).verdict().endswith("noise")
    assert Bar(name="a", limit=2, value=value(1.9, 1.8, 1.95)).verdict() == "ok"


def _zeros(elapsed_s: float, **changes: Any) -> dict[str, Any]:
    run = {
        "bytes": 8 << 30,
        "elapsed_ns": elapsed_s * 1e9,
        "wire_bytes": 600_000,
        "source_blocks": [0, 0],
        "guest_blocks": 0,
        "memory_kib": 4096,
    }
    return {"own_network": True, "zeros": [run | changes] * 3, "dense": {}}


@pytest.mark.parametrize(
    ("result", "missed"),
    [
        (_zeros(0.4), []),
        (_zeros(0.6), ["8 GiB of zero pages: resident"]),
        (_zeros(0.4, wire_bytes=2 << 20), ["8 GiB of zero pages: on the wire"]),
        (_zeros(0.4, guest_blocks=(8 << 30) // 512 // 50), ["8 GiB of zero pages: blocks"]),
        (_zeros(0.4, source_blocks=[0, 1 << 20]), ["8 GiB of zero pages: blocks"]),
        (_zeros(0.4, memory_kib=100 << 10), ["agent memory above idle and 2 bytes a page"]),
    ],
)
def test_the_whole_command(
    result: dict[str, Any], missed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a stored result to the exit status."""
    (tmp_path / "memory.json").write_text(json.dumps({"result": result}))
    status = main(["memory", "--collect"], out=tmp_path)
    assert status == (1 if missed else 0)
    rows = json.loads((tmp_path / "bars.json").read_text())
    assert len(rows) == len(memory.bars(result)) == 4
    not_ok = [row["name"] for row in rows if not row["ok"]]
    assert len(not_ok) == len(missed)
    assert all(name.startswith(start) for name, start in zip(not_ok, missed, strict=True))
    assert capsys.readouterr().out.count("MISSED") == len(missed)
    assert (tmp_path / "page-path.md").read_text().startswith("# The page path in numbers")


def test_a_section_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["lane"], out=tmp_path)
    assert caught.value.code == 2


def test_sections_are_named_as_they_are_called() -> None:
    assert all(section.name == name for name, section in SECTIONS.items())


def test_what_one_section_does_costs_its_own_bars(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One failed, the result of one is damaged: the others are judged, all bars are named."""
    good = json.dumps({"result": _zeros(0.4)})
    (tmp_path / "memory.json").write_text(good)
    (tmp_path / "lanes.json").write_text(json.dumps({"result": failed("it ended with -9: gone")}))
    (tmp_path / "streams.json").write_text(json.dumps({"result": {"mbs": {}}}))
    assert main(["memory", "lanes", "streams", "--collect"], out=tmp_path) == 1
    rows = json.loads((tmp_path / "bars.json").read_text())
    assert [row["ok"] for row in rows] == [True] * 4 + [False] * 7
    assert all(row["value"] is None for row in rows[4:])
    out = capsys.readouterr().out
    assert "Not measured: it ended with -9: gone." in out
    assert "MISSED (not measured: it ended with -9: gone)" in out


@pytest.mark.parametrize("name", SECTIONS)
def test_every_bar_is_named_without_a_result(name: str) -> None:
    """`make bench` says what it owes before it has anything."""
    section = SECTIONS[name]
    found = section.bars(failed("why"))
    assert all(bar.why_not == "why" and not bar.ok for bar in found if name != "peers")
    assert found or name in ("threads", "sizes")


def test_the_whole_ends_in_time() -> None:
    assert sum(LIMITS_S[name] for name in SECTIONS) < 55 * 60
    assert WHOLE_S <= 44 * 60
    assert set(LIMITS_S) == set(SECTIONS) >= set(QUICK)
