# SPDX-License-Identifier: Apache-2.0
"""The demo's report for people; the object of verdict.py is the one for programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

_ROWS: tuple[tuple[str, Callable[[Mapping[str, Any]], str]], ...] = (
    ("pause (VMM)", lambda move: _ms(move["pause_ms"])),
    ("gap (guest heartbeats)", lambda move: _ms(move["guest_gap_ms"])),
    ("total", lambda move: f"{move['total_s']:.2f} s"),
    ("pages on demand", lambda move: f"{move['pages_demand']:,}"),
    ("pages in bulk", lambda move: f"{move['pages_bulk']:,}"),
    ("pages of zeros", lambda move: f"{move['pages_zero']:,}"),
    ("fault p50", lambda move: f"{move['fault_p50_us']:.0f} µs"),
    ("fault p99", lambda move: f"{move['fault_p99_us']:.0f} µs"),
    ("pages verified after it", lambda move: f"{move['pages_verified']:,}"),
)

_EXIT_ROWS: tuple[tuple[str, Callable[[Mapping[str, Any]], str]], ...] = (
    ("exits of each vCPU", lambda move: ", ".join(f"{n:,}" for n in move["exits"])),
    (
        "blocked in them",
        lambda move: ", ".join(f"{ns / 1e6:.0f} ms" for ns in move["blocked_ns"]),
    ),
)
"""Where the vCPUs made some."""


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """A table with a column per move, then the verdict and its reasons."""
    console.print(
        f"{report['guest']}, {report['memory_bytes'] >> 20} MiB, {report['vmm']}", soft_wrap=True
    )
    if backend := report.get("fault_backend"):
        why = report.get("fault_backend_reason")
        console.print(f"faults by {backend}" + (f": {why}" if why else ""), soft_wrap=True)
    moves = report["migrations"]
    if moves:
        table = Table(show_edge=False, pad_edge=False)
        table.add_column("")
        for move in moves:
            table.add_column(f"{move['from']} → {move['to']}", justify="right")
        for name, cell in _ROWS:
            table.add_row(name, *(cell(move) for move in moves))
        for name, cell in _EXIT_ROWS:
            if all(any(move.get("exits", ())) for move in moves):
                table.add_row(name, *(cell(move) for move in moves))
        console.print(table)
    console.print(
        f"verified {report['pages_verified']:,} pages after each move, "
        f"corrupt {report['corrupt_pages']}, doubled heartbeats {report['doubled_beats']}"
    )
    _print_verdict(report, console)


def print_fleet_report(report: Mapping[str, Any], console: Console) -> None:
    """A row per operation, then the verdict and its reasons."""
    console.print(
        f"{report['vms']} microvms on {report['nodes']} nodes, {report['vmm']}, {report['accel']}",
        soft_wrap=True,
    )
    table = Table(show_edge=False, pad_edge=False)
    for name in ("operation", "state", "moved", "took", "longest pause", "most at once (limit)"):
        table.add_column(name)
    for leg in report["operations"]:
        limits = leg["limits"]
        most = ", ".join(
            f"{key} {count} ({limits[key.partition(':')[0]]})"
            for key, count in leg["most_at_once"].items()
        )
        table.add_row(
            f"{leg['kind']} {leg['node']}",
            leg["state"],
            str(leg["moved"]),
            f"{leg['total_s']:.2f} s",
            _ms(leg["pause_ms_max"]),
            most,
        )
    console.print(table)
    console.print(
        f"{report['moves']} moves, verified {report['pages_verified']:,} pages after each, "
        f"corrupt {report['corrupt_pages']}, doubled heartbeats {report['doubled_beats']}"
    )
    _print_verdict(report, console)


def _print_verdict(report: Mapping[str, Any], console: Console) -> None:
    ok = report["verdict"] == "ok"
    console.print(Text(f"verdict: {report['verdict']}", style="bold green" if ok else "bold red"))
    for reason in report["reasons"]:
        console.print(Text(f"  {reason}", style="red"), soft_wrap=True)


def _ms(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1f} ms"
