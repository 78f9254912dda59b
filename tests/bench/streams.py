# SPDX-License-Identifier: Apache-2.0
"""Many pages: bulk, with and without their being installed, against raw TCP and grpcio.

What is judged as installed is what an agent does by default: two connections. One is told as well.

Rates are of guest memory: zeros and what compresses may be faster than any wire. "installed" is a
whole guest, from the start of bulk to nothing absent, so its start and its end count.
"""

from __future__ import annotations

from contextlib import ExitStack

from tests.bench.bars import Bar
from tests.bench.estimate import Estimate, estimate, median, ratio
from tests.bench.grpcio_client import grpcio_fetch
from tests.bench.page_path import Kind, PagePath, page_path
from tests.bench.section import Result, Rows, Scale, figure, in_turns, judged

name = "streams"
title = "Memory in bulk"

MEMORY_MIB = 512
_GRPCIO_MIB = 64
_COPY_MIB = 256

LABELS = {
    "stream": "raw TCP, one way",
    "copy_1": "UFFDIO_COPY, 1 page a call",
    "copy_256": "UFFDIO_COPY, 256 pages a call",
    "wire": "our wire, nothing installed",
    "grpcio": "grpcio, the same Fetch, nothing installed",
    "raw": "installed, incompressible, 1 connection",
    "raw_2": "installed, incompressible, 2 connections",
    "faulting": "installed, incompressible, while a guest faults without a pause",
    "zero_heavy": "installed, 90 % zero",
    "text": "installed, compressible 3 to 1",
}


def run(scale: Scale) -> Result:
    """Measure."""
    with ExitStack() as stack:
        ours = stack.enter_context(page_path())
        ours.ask("warm", 4096)
        memory = ours.serve(Kind.RAW, MEMORY_MIB)
        grpcio = stack.enter_context(grpcio_fetch(memory, MEMORY_MIB))
        zero_heavy, text = (stack.enter_context(page_path()) for _ in range(2))
        zero_heavy.serve(Kind.ZERO_HEAVY, MEMORY_MIB)
        text.serve(Kind.TEXT, MEMORY_MIB)
        taken = in_turns(
            name,
            scale.choose(20, 7),
            [
                ("stream", lambda: ours.rate("stream", MEMORY_MIB)),
                ("copy_1", lambda: ours.rate("copy", 1, _COPY_MIB)),
                ("copy_256", lambda: ours.rate("copy", 256, _COPY_MIB)),
                ("wire", lambda: ours.rate("wire-bulk", MEMORY_MIB)),
                ("grpcio", lambda: grpcio.stream(_GRPCIO_MIB)),
                ("raw", lambda: ours.rate("bulk", 1)),
                ("raw_2", lambda: ours.rate("bulk", 2)),
                ("faulting", lambda: _while_faulting(ours)),
                ("zero_heavy", lambda: zero_heavy.rate("bulk", 1)),
                ("text", lambda: text.rate("bulk", 1)),
            ],
        )
    return {"mbs": taken}


def _while_faulting(ours: PagePath) -> float:
    """MB/s, by a guest that goes over all of its memory in far jumps: bulk must not starve."""
    elapsed_ns = ours.demand(bulk=0, count=MEMORY_MIB * 256)["elapsed_ns"]
    return float((MEMORY_MIB << 20) / elapsed_ns * 1000)


_BARS = (
    Bar(name="bulk, not installed / raw TCP stream", limit=0.75, at_most=False),
    Bar(name="bulk, installed / raw TCP stream", limit=0.5, at_most=False),
    Bar(name="bulk, installed / grpcio", limit=4, at_most=False),
)


def bars(result: Result) -> list[Bar]:
    """Judge."""
    return judged(_BARS, lambda: _values(result), result)


def _values(result: Result) -> list[Estimate]:
    count = len(result["mbs"]["raw_2"])

    def of(above: str, below: str) -> Estimate:
        return estimate(count, ratio(median(result["mbs"][above]), median(result["mbs"][below])))

    return [of("wire", "stream"), of("raw_2", "stream"), of("raw_2", "grpcio")]


def rows(result: Result) -> Rows:
    """Tell."""
    table = [["what", "n", "MB/s", "of raw TCP"]]
    below = median(result["mbs"]["stream"])
    for key, rates in result["mbs"].items():
        count = len(rates)
        table.append(
            [
                LABELS[key],
                str(count),
                figure(estimate(count, median(rates)), 0),
                figure(estimate(count, ratio(median(rates), below)), 2),
            ]
        )
    return table
