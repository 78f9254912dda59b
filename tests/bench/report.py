# SPDX-License-Identifier: Apache-2.0
"""The report: the machine in neutral words, the bars, a table for each section."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path

from tests.bench import bars
from tests.bench.bars import Bar
from tests.bench.section import Result, Rows, Section, why_failed


def machine() -> str:
    """Cores, processor, memory, kernel: nothing that says whose it is."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    flags = Path("/proc/cpuinfo").read_text()
    virtual = ", a virtual machine" if " hypervisor" in flags else ""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    kernel = ".".join(platform.release().split("-")[0].split(".")[:2])
    return (
        f"{os.cpu_count()} cores of {model}{virtual}, {pages / (1 << 30):.0f} GiB, Linux {kernel}"
    )


def markdown(rows: Rows) -> list[str]:
    """A table."""
    head, *body = rows
    align = ["---", *("--:" for _ in head[1:])]
    return [f"| {' | '.join(cells)} |" for cells in [head, align, *body]]


def table_of(section: Section, result: Result) -> list[str]:
    """Its table, or why there is none."""
    if why := why_failed(result):
        return [f"Not measured: {why}."]
    try:
        return markdown(section.rows(result))
    except (KeyError, ValueError, TypeError, IndexError, ZeroDivisionError) as error:
        return [f"The result is not whole: {error!r}."]


def section_text(section: Section, result: Result) -> list[str]:
    """Title, what was measured, the table."""
    about = (section.__doc__ or "").split("\n", 1)
    lines = [f"## {section.title}", "", *(" ".join(about).split("\n")), ""]
    return [
        "\n".join(lines).replace("\n\n\n", "\n\n").rstrip(),
        "",
        *table_of(section, result),
    ]


def text(
    results: Sequence[tuple[Section, Result]], all_bars: Sequence[Bar], plots: Sequence[str]
) -> str:
    """The whole report."""
    lines = [
        "# The page path in numbers",
        "",
        "`make bench` writes this. All variants of a section are measured in turns within one run:",
        "read ratios, the absolutes belong to the machine. In brackets: 95 % intervals, rounds",
        "resampled.",
        "",
        f"Machine: {machine()}.",
        "",
        "## Bars",
        "",
        *bars.table(all_bars),
    ]
    for plot in plots:
        lines += ["", f"![{Path(plot).stem}]({plot})"]
    for section, result in results:
        lines += ["", *section_text(section, result)]
    return "\n".join(lines).rstrip() + "\n"


def write(
    results: Sequence[tuple[Section, Result]], all_bars: Sequence[Bar], directory: Path
) -> None:
    """page-path.md and its plots."""
    from tests.bench import plots  # slow to import, and not needed to judge

    drawn = plots.draw(
        {section.name: result for section, result in results if not why_failed(result)}, directory
    )
    (directory / "page-path.md").write_text(text(results, all_bars, drawn))
