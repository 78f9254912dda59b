# SPDX-License-Identifier: Apache-2.0
"""What a guest costs its agent, and 8 GiB of zero pages.

The agent's memory is the peak of the engine's resident set above what it was before the guest came,
in `bench_page_path`. Zero pages: the source is holes. The wire is counted in the network namespace
that the program has for itself: IP octets of both directions, acknowledgements and headers too.
"""

from __future__ import annotations

from typing import Any

from tests.bench.bars import Bar
from tests.bench.estimate import Estimate, estimate, median
from tests.bench.page_path import Kind, page_path
from tests.bench.section import Result, Rows, Scale, figure, judged

name = "memory"
title = "The agent's memory, and zero pages"

ZERO_GIB = 8
_PAGES_PER_GIB = 1 << 18
_DENSE_GIB = (1, 2)
_KIB_PER_MIB = 1024.0


def run(scale: Scale) -> Result:
    """Measure."""
    count = scale.choose(7, 3)
    with page_path() as zero, page_path() as dense:
        zero.serve(Kind.HOLE, ZERO_GIB << 10)
        zeros = [zero.ask("bulk", 1) for _ in range(count)]
        dense.ask("warm", 4096)
        by_size: dict[str, list[dict[str, Any]]] = {}
        for gib in _DENSE_GIB[:1] if scale.quick else _DENSE_GIB:
            dense.serve(Kind.RAW, gib << 10)
            by_size[str(gib)] = [dense.ask("bulk", 1) for _ in range(count)]
    return {"own_network": zero.own_network, "zeros": zeros, "dense": by_size}


def _excess_mib(run: dict[str, Any]) -> float:
    """Above 2 bytes a page."""
    return float(run["memory_kib"] / _KIB_PER_MIB - run["bytes"] / 4096 * 2 / (1 << 20))


def _growth(run: dict[str, Any]) -> float:
    """Blocks that either side allocated, as a share of the guest's size. Percent."""
    before, after = run["source_blocks"]
    return float((after - before + run["guest_blocks"]) * 512 / run["bytes"] * 100)


_BARS = (
    Bar(name="8 GiB of zero pages: resident", limit=0.5, unit="s"),
    Bar(name="8 GiB of zero pages: on the wire", limit=1, unit="MiB"),
    Bar(name="8 GiB of zero pages: blocks allocated", limit=1, unit="%"),
    Bar(name="agent memory above idle and 2 bytes a page, the worst run", limit=32, unit="MiB"),
)


def bars(result: Result) -> list[Bar]:
    """Judge."""
    return judged(_BARS, lambda: _values(result), result)


def _values(result: Result) -> list[Estimate]:
    zeros = result["zeros"]
    runs = [*zeros, *(run for runs in result["dense"].values() for run in runs)]

    def of(values: list[float]) -> Estimate:
        return estimate(len(values), median(values))

    return [
        of([run["elapsed_ns"] / 1e9 for run in zeros]),
        of([run["wire_bytes"] / (1 << 20) for run in zeros]),
        of([_growth(run) for run in zeros]),
        of([max(_excess_mib(run) for run in runs)]),
    ]


def rows(result: Result) -> Rows:
    """Tell."""
    table = [["guest", "n", "resident s", "on the wire MiB", "agent's memory KiB"]]
    named = [(f"{ZERO_GIB} GiB of holes", result["zeros"])]
    named += [(f"{gib} GiB, dense", runs) for gib, runs in result["dense"].items()]
    for label, runs in named:
        count = len(runs)
        table.append(
            [
                label,
                str(count),
                figure(estimate(count, median([run["elapsed_ns"] / 1e9 for run in runs])), 3),
                figure(estimate(count, median([run["wire_bytes"] / (1 << 20) for run in runs])), 2),
                figure(estimate(count, median([run["memory_kib"] for run in runs])), 0),
            ]
        )
    return table
