# SPDX-License-Identifier: Apache-2.0
"""Whether a larger guest costs more a GiB: 256 MiB to 6 GiB dense, 16 GiB that is nearly all holes.

The whole memory in bulk, one connection; seconds a GiB of guest memory.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tests.bench.bars import Bar
from tests.bench.estimate import estimate, median
from tests.bench.page_path import Kind, page_path
from tests.bench.section import Result, Rows, Scale, figure

name = "sizes"
title = "Size"

DENSE_MIB = (256, 1024, 3072, 6144)
SPARSE_MIB = 16 << 10
_SPARE_MIB = 1024


def run(scale: Scale) -> Result:
    """Measure; one size after the other: there is no room for all at once."""
    count = scale.choose(5, 3)
    sizes: dict[str, list[dict[str, Any]]] = {}
    fitting = [mib for mib in DENSE_MIB if 2 * mib + _SPARE_MIB <= _available_mib()]
    if left_out := set(DENSE_MIB) - set(fitting):
        print(f"{name}: no memory for {sorted(left_out)} MiB twice", file=sys.stderr)
    with page_path() as ours:
        ours.ask("warm", 2 * max(fitting))
        for mib in fitting:
            ours.serve(Kind.RAW, mib)
            sizes[f"{mib} MiB, dense"] = [ours.ask("bulk", 1) for _ in range(count)]
        ours.serve(Kind.HOLE, SPARSE_MIB)
        sizes[f"{SPARSE_MIB} MiB, holes"] = [ours.ask("bulk", 1) for _ in range(count)]
    return {"sizes": sizes}


def _available_mib() -> int:
    text = Path("/proc/meminfo").read_text()
    return int(text.split("MemAvailable:", 1)[1].split()[0]) >> 10


def _s_per_gib(run: dict[str, Any]) -> float:
    return float(run["elapsed_ns"] / 1e9 / (run["bytes"] / (1 << 30)))


def bars(result: Result) -> list[Bar]:
    """None; the table tells."""
    return []


def rows(result: Result) -> Rows:
    """Tell."""
    table = [["guest", "n", "s", "s a GiB", "agent's memory KiB"]]
    for label, runs in result["sizes"].items():
        count = len(runs)
        columns = [
            ([run["elapsed_ns"] / 1e9 for run in runs], 2),
            ([_s_per_gib(run) for run in runs], 3),
            ([run["memory_kib"] for run in runs], 0),
        ]
        cells = [figure(estimate(count, median(values)), digits) for values, digits in columns]
        table.append([label, str(count), *cells])
    return table
