# SPDX-License-Identifier: Apache-2.0
"""`godwit bitmap`: where the holes in a VM's memory are."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli import quantities
from services.cli.output import print_answer
from services.cli.session import OutputOption, UrlOption, session

if TYPE_CHECKING:
    from godwit.models import UserfaultBitmap

_COLUMNS = 64
_ROWS_MAX = 16
_SHADES = "█▓▒░·"
"""From all resident to none."""


def bitmap(
    ctx: typer.Context,
    vm: Annotated[str, typer.Argument(metavar="VM", help="Id of the VM.")],
    output: OutputOption = None,
    orchestrator: UrlOption = None,
) -> None:
    """Draw which pages of a VM are where it runs, and which are still to come."""
    from godwit import calls

    with session(ctx, output, orchestrator) as now:
        answer = now.client.send_all(calls.get_userfault_bitmap(vm))
    print_answer(now.output, answer=answer.json, table=draw(answer.value), names=[vm])


def draw(of: UserfaultBitmap) -> str:
    """The map, a legend, the counts."""
    resident = of.page_count - of.absent_count
    counts = (
        f"{of.vm_id} (epoch {of.epoch}): {resident} of {of.page_count} pages resident "
        f"({quantities.percent(of.resident_share)}), {of.absent_count} absent in "
        f"{len(of.absent_runs)} runs"
    )
    if of.page_count == 0:
        return f"{of.vm_id}: no bitmap yet"
    cell_pages = max(1, math.ceil(of.page_count / (_COLUMNS * _ROWS_MAX)))
    shades = [
        _shade(absent, min(cell_pages, of.page_count - index * cell_pages))
        for index, absent in enumerate(absent_by_cell(of.absent_runs, of.page_count, cell_pages))
    ]
    rows = []
    for start in range(0, len(shades), _COLUMNS):
        offset = quantities.memory(start * cell_pages * of.page_size_bytes)
        rows.append(f"{offset:>10} {''.join(shades[start : start + _COLUMNS])}")
    legend = (
        f"{'':10} one cell = {cell_pages} pages "
        f"({quantities.memory(cell_pages * of.page_size_bytes)}); "
        f"{_SHADES[0]} all resident, {_SHADES[1:4]} partly, {_SHADES[4]} none"
    )
    return "\n".join([*rows, legend, counts])


def absent_by_cell(runs: Iterable[tuple[int, int]], page_count: int, cell_pages: int) -> list[int]:
    """How many pages are absent in each cell of `cell_pages`; the last cell may be shorter.

    What lies past the end is left out: a bitmap that lies must not break the terminal.
    """
    cells = [0] * math.ceil(page_count / cell_pages)
    for first, count in runs:
        page, end = max(first, 0), min(first + count, page_count)
        while page < end:
            cell = page // cell_pages
            taken = min(end, (cell + 1) * cell_pages) - page
            cells[cell] += taken
            page += taken
    return cells


def _shade(absent: int, pages: int) -> str:
    """Full and empty are exact; the three between are thirds."""
    if absent <= 0:
        return _SHADES[0]
    if absent >= pages:
        return _SHADES[-1]
    return _SHADES[1 + min(2, absent * 3 // pages)]
