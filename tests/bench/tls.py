# SPDX-License-Identifier: Apache-2.0
"""What mutual TLS 1.3 costs: the same move of memory with and without, in turns.

Two pairs of processes with the same memory: one with certificates, one in plaintext.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from services.demo.cluster_tls import make_cluster_tls
from tests.bench.bars import Bar
from tests.bench.estimate import Estimate, Rounds, estimate, median, quantile, ratio
from tests.bench.page_path import Kind, page_path
from tests.bench.section import Result, Rows, Scale, figure, in_turns, judged

name = "tls"
title = "With and without TLS"

MEMORY_MIB = 256
_COUNT = 300
_LANES = 2

LABELS = {"plain": "plaintext", "tls": "TLS 1.3, certificates of both ends"}


def run(scale: Scale) -> Result:
    """Measure."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        page_path() as plain,
        page_path() as tls,
    ):
        directory = Path(scratch) / "tls"
        make_cluster_tls(directory, ("a", "b"))
        plain.ask("warm", 1024)
        tls.ask("tls", directory)
        for each in (plain, tls):
            each.serve(Kind.RAW, MEMORY_MIB)

        def demand(key: str) -> list[float]:
            ours = tls if key == "tls" else plain
            return [ns / 1000 for ns in ours.demand(bulk=None, count=_COUNT)["ns"]]

        rounds = scale.choose(30, 12)
        us = in_turns(
            name, rounds, [("plain", lambda: demand("plain")), ("tls", lambda: demand("tls"))]
        )
        mbs = in_turns(
            name,
            rounds,
            [
                ("plain", lambda: plain.rate("bulk", _LANES)),
                ("tls", lambda: tls.rate("bulk", _LANES)),
            ],
        )
    return {"us": us, "mbs": mbs}


_BARS = (
    Bar(name="TLS: bulk throughput / plaintext", limit=0.5, at_most=False),
    Bar(name="TLS: demand p50 / plaintext", limit=1.3),
)


def bars(result: Result) -> list[Bar]:
    """Judge."""
    return judged(_BARS, lambda: _values(result), result)


def _values(result: Result) -> list[Estimate]:
    us: dict[str, Rounds] = result["us"]
    mbs: dict[str, list[float]] = result["mbs"]
    return [
        estimate(len(mbs["tls"]), ratio(median(mbs["tls"]), median(mbs["plain"]))),
        estimate(len(us["tls"]), ratio(quantile(us["tls"], 0.5), quantile(us["plain"], 0.5))),
    ]


def rows(result: Result) -> Rows:
    """Tell."""
    table = [["what", "n", "fault p50 µs", "fault p99 µs", "bulk MB/s"]]
    for key, label in LABELS.items():
        us, mbs = result["us"][key], result["mbs"][key]
        table.append(
            [
                label,
                f"{sum(len(samples) for samples in us):,} in {len(us)}",
                *(figure(estimate(len(us), quantile(us, q))) for q in (0.5, 0.99)),
                figure(estimate(len(mbs), median(mbs)), 0),
            ]
        )
    return table
