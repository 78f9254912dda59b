# SPDX-License-Identifier: Apache-2.0
"""One page: how long a guest waits for it, what that stands on, and what bulk does to it.

Floor: a 4 KiB raw TCP round trip, and a fault answered on the spot, between two processes each.
Ours: a guest's thread touches absent pages one after the other, far apart, without a pause; its own
clock says how long each touch took. Beside bulk only pages that are absent at the touch count.
"""

from __future__ import annotations

from typing import Any

from tests.bench.bars import Bar
from tests.bench.estimate import (
    Estimate,
    Rounds,
    Statistic,
    estimate,
    median,
    quantile,
    ratio,
    total,
)
from tests.bench.grpcio_client import grpcio_fetch
from tests.bench.page_path import Kind, page_path
from tests.bench.section import Result, Rows, Scale, figure, in_turns, judged

name = "lanes"
title = "A page on demand"

MEMORY_MIB = 256
CAP = 10 << 20
_COUNT = 300
_GRPCIO_COUNT = 100
_PACED_US = 1000
_PACED_COUNT = 60

LABELS = {
    "tcp": "raw TCP, 4 KiB and back",
    "uffd": "userfaultfd, answered on the spot",
    "wire": "our wire, nothing installed",
    "grpcio": "grpcio, the same Fetch",
    "idle": "fault, bulk off",
    "bulk": "fault, bulk without limit",
    "capped": "fault, bulk at 10 MiB/s",
    "paced": "a fault a millisecond, bulk off",
    "paced_bulk": "a fault a millisecond, bulk without limit",
}


def run(scale: Scale) -> Result:
    """Measure."""
    with page_path() as ours:
        ours.ask("warm", 1024)
        memory = ours.serve(Kind.RAW, MEMORY_MIB)
        bulk_mbs: dict[str, list[float]] = {}

        def demand(key: str, bulk: int | None, think_us: int = 0) -> list[float]:
            count = _PACED_COUNT if think_us else _COUNT
            found: dict[str, Any] = ours.demand(bulk=bulk, count=count, think_us=think_us)
            rate = found["bulk_bytes"] / found["elapsed_ns"] * 1000
            bulk_mbs.setdefault(key, []).append(rate)
            return [ns / 1000 for ns in found["ns"]]

        with grpcio_fetch(memory, MEMORY_MIB) as grpcio:
            taken = in_turns(
                name,
                scale.choose(60, 30),
                [
                    ("tcp", lambda: ours.samples("tcp", _COUNT)),
                    ("uffd", lambda: ours.samples("uffd", _COUNT)),
                    ("wire", lambda: ours.samples("wire", _COUNT)),
                    ("grpcio", lambda: grpcio.pages(_GRPCIO_COUNT)),
                    ("idle", lambda: demand("idle", None)),
                    ("bulk", lambda: demand("bulk", 0)),
                    ("capped", lambda: demand("capped", CAP)),
                    ("paced", lambda: demand("paced", None, _PACED_US)),
                    ("paced_bulk", lambda: demand("paced_bulk", 0, _PACED_US)),
                ],
            )
    return {"us": taken, "bulk_mbs": bulk_mbs}


_BARS = (
    Bar(name="demand, idle: p50 / (raw TCP + local uffd)", limit=1.3),
    Bar(name="demand, idle: p99 / (raw TCP + local uffd), p99 of each", limit=2),
    Bar(name="demand, bulk without limit: p50 / idle", limit=2),
    Bar(name="demand, bulk at 10 MiB/s: p50 / idle", limit=1.2),
)


def bars(result: Result) -> list[Bar]:
    """Judge."""
    return judged(_BARS, lambda: _values(result), result)


def _values(result: Result) -> list[Estimate]:
    us: dict[str, Rounds] = result["us"]
    count = len(us["idle"])

    def of(key: str, q: float) -> Statistic:
        return quantile(us[key], q)

    def floor(q: float) -> Statistic:
        return total(of("tcp", q), of("uffd", q))

    ratios = (
        ratio(of("idle", 0.5), floor(0.5)),
        ratio(of("idle", 0.99), floor(0.99)),
        ratio(of("bulk", 0.5), of("idle", 0.5)),
        ratio(of("capped", 0.5), of("idle", 0.5)),
    )
    return [estimate(count, one) for one in ratios]


def rows(result: Result) -> Rows:
    """Tell."""
    table = [["what", "n", "p50 µs", "p99 µs", "p99.9 µs", "bulk meanwhile MB/s"]]
    for key, rounds in result["us"].items():
        count = len(rounds)
        rate = result["bulk_mbs"].get(key)
        table.append(
            [
                LABELS[key],
                f"{sum(len(samples) for samples in rounds):,} in {count}",
                *(figure(estimate(count, quantile(rounds, q))) for q in (0.5, 0.99, 0.999)),
                figure(estimate(count, median(rate)), 0) if rate and max(rate) > 0 else "",
            ]
        )
    return table
