# SPDX-License-Identifier: Apache-2.0
"""How answers are printed: a table for people, or the API's JSON, YAML, or names, for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from enum import StrEnum
from typing import Any, TextIO


class OutputFormat(StrEnum):
    """Forms of `-o`."""

    TABLE = "table"
    JSON = "json"
    YAML = "yaml"
    NAME = "name"
    WIDE = "wide"
    """The table, with more columns where there are more."""


def print_answer(
    form: OutputFormat,
    *,
    answer: Any,
    table: str,
    names: Sequence[str],
    stream: TextIO | None = None,
) -> None:
    """Print an answer of the API.

    Args:
        form: which of the others is printed.
        answer: the JSON, printed as it came: no field is lost because we do not know it.
        table: for people; without line end.
        names: one a line, fit for other commands' arguments.
        stream: stdout unless told.
    """
    out = stream or sys.stdout
    if form is OutputFormat.JSON:
        print(json.dumps(answer, indent=2, ensure_ascii=False), file=out)
    elif form is OutputFormat.YAML:
        import yaml

        yaml.safe_dump(answer, out, sort_keys=False, allow_unicode=True)
    elif form is OutputFormat.NAME:
        for name in names:
            print(name, file=out)
    else:
        print(table, file=out)


def columns(header: Sequence[str], rows: Sequence[Sequence[str]], *, empty: str) -> str:
    """Rows under a header, as wide as what they hold: nothing is cut, whatever the terminal.

    Args:
        header: names of the columns.
        rows: one cell per column; "" is shown as "-".
        empty: what to say where there are no rows.
    """
    if not rows:
        return empty
    cells = [[*header], *([cell or "-" for cell in row] for row in rows)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )


def more(answer: Any) -> str:
    """What to add under a list that goes on."""
    goes_on = isinstance(answer, dict) and answer.get("next_page_token")
    return "\nthere are more: --limit 0 shows all" if goes_on else ""


def fields(pairs: Sequence[tuple[str, str]]) -> str:
    """One `name: value` a line; pairs without a value are left out."""
    shown = [(name, value) for name, value in pairs if value]
    width = max((len(name) for name, _ in shown), default=0)
    return "\n".join(f"{name + ':':<{width + 1}} {value}" for name, value in shown)
