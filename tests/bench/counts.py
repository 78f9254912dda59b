# SPDX-License-Identifier: Apache-2.0
"""Instructions a page, counted by callgrind: what a change costs, without the machine's weather.

User space only, of the agent and of the page server; each figure is the difference between a long
and a short run, so that start and end cancel out. The reference is committed beside this file; a
change that is meant to cost moves it in the same commit (`make bench ARGS="counts --reference"`).
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.bench.bars import Bar
from tests.bench.estimate import estimate, median
from tests.bench.page_path import Kind, PagePath, page_path
from tests.bench.section import Result, Rows, Scale

name = "counts"
title = "Instructions a page"

REFERENCE = Path(__file__).with_name("counts.json")
TOLERANCE = 1.05
"""Threads meet in other orders each time: runs differ by some 1 %."""
_MEMORY_MIB = 16
_PAGE_COUNT = _MEMORY_MIB * 256


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """A command, `short` and `long` times: so many pages more, so many instructions more."""

    short: int
    long: int
    pages: int
    """Each time."""
    ask: Callable[[PagePath], object]


_CASES = {
    "demand": _Case(
        short=1, long=4, pages=1500, ask=lambda ours: ours.demand(bulk=None, count=1500)
    ),
    "bulk": _Case(short=1, long=5, pages=_PAGE_COUNT, ask=lambda ours: ours.ask("bulk", 1)),
}


def _counted(case: _Case, times: int) -> dict[str, int]:
    """Instructions of the agent and the page server in one run."""
    with tempfile.TemporaryDirectory(prefix="gw-counts-") as directory:
        prefix = ["valgrind", "-q", "--tool=callgrind"]
        prefix.append(f"--callgrind-out-file={directory}/%p")
        with page_path(prefix) as ours:
            server = ours.serve(Kind.RAW, _MEMORY_MIB).parts[2]
            for _ in range(times):
                case.ask(ours)
        found = {}
        for path in Path(directory).iterdir():
            total = re.search(r"^(?:summary|totals): (\d+)", path.read_text(), re.MULTILINE)
            if total:
                found["server" if path.name == server else "agent"] = int(total[1])
    return found


def run(scale: Scale) -> Result:
    """Count."""
    if shutil.which("valgrind") is None:
        return {"why_not": "there is no valgrind: apt-get install valgrind"}
    counts: dict[str, list[float]] = {}
    for _ in range(scale.choose(3, 1)):
        for label, case in _CASES.items():
            short, long = _counted(case, case.short), _counted(case, case.long)
            for process, instructions in long.items():
                pages = (case.long - case.short) * case.pages
                a_page = (instructions - short[process]) / pages
                counts.setdefault(f"{label}, {process}", []).append(a_page)
    return {"counts": counts}


def write_reference(result: Result) -> None:
    """What was counted is what it shall cost."""
    values = {label: round(_middle(found)) for label, found in result["counts"].items()}
    REFERENCE.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n")


def _middle(values: list[float]) -> float:
    return estimate(len(values), median(values)).value


def bars(result: Result) -> list[Bar]:
    """Judge: each at most the reference and a little."""
    found = []
    for label, reference in json.loads(REFERENCE.read_text()).items():
        what = f"instructions a page: {label}"
        values = result.get("counts", {}).get(label)
        if values:
            value = estimate(len(values), median([at / reference for at in values]))
            found.append(Bar(name=f"{what} / reference", limit=TOLERANCE, value=value))
        else:
            why = result.get("why_not", "not counted")
            found.append(Bar(name=f"{what} / reference", limit=TOLERANCE, why_not=why))
    return found


def rows(result: Result) -> Rows:
    """Tell."""
    reference = json.loads(REFERENCE.read_text()) if REFERENCE.exists() else {}
    table = [["where", "n", "instructions a page", "reference"]]
    for label, values in result.get("counts", {}).items():
        middle = f"{_middle(values):,.0f}"
        table.append([label, str(len(values)), middle, f"{reference.get(label, 0):,.0f}"])
    return table
