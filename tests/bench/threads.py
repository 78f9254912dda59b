# SPDX-License-Identifier: Apache-2.0
"""Several vCPUs that fault at once: 1 to 8 threads of one guest, bulk off."""

from __future__ import annotations

from typing import Any

from tests.bench.bars import Bar
from tests.bench.estimate import estimate, median, quantile
from tests.bench.page_path import Kind, page_path
from tests.bench.section import Result, Rows, Scale, figure, in_turns

name = "threads"
title = "Faulting threads"

THREADS = (1, 2, 4, 8)
_MEMORY_MIB = 256
_COUNT = 1600
"""All threads together."""


def run(scale: Scale) -> Result:
    """Measure."""
    with page_path() as ours:
        ours.ask("warm", 512)
        ours.serve(Kind.RAW, _MEMORY_MIB)

        def demand(threads: int) -> dict[str, Any]:
            found = ours.demand(bulk=None, threads=threads, count=_COUNT // threads)
            samples = [ns / 1000 for ns in found["ns"]]
            return {"us": samples, "pages_per_s": len(samples) / found["elapsed_ns"] * 1e9}

        def variant(threads: int) -> tuple[str, Any]:
            return str(threads), lambda: demand(threads)

        taken = in_turns(name, scale.choose(20, 7), [variant(threads) for threads in THREADS])
    return {"runs": taken}


def bars(result: Result) -> list[Bar]:
    """None."""
    return []


def rows(result: Result) -> Rows:
    """Tell."""
    table = [["threads", "n", "pages/s", "p50 µs", "p99 µs"]]
    for threads, runs in result["runs"].items():
        count = len(runs)
        us = [run["us"] for run in runs]
        table.append(
            [
                threads,
                str(count),
                figure(estimate(count, median([run["pages_per_s"] for run in runs])), 0),
                *(figure(estimate(count, quantile(us, q))) for q in (0.5, 0.99)),
            ]
        )
    return table
