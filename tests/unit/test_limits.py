# SPDX-License-Identifier: Apache-2.0
"""Every row of docs/limits.md is what the code says, and names tests that are run."""

from __future__ import annotations

import importlib
import re

import pytest

from tests.harness.proofs import ROOT, check_row, read_rows

HEADER = "| what | limit | constant | beyond it | proved by |"
ROWS = read_rows(ROOT / "docs" / "limits.md", HEADER)
UNITS = {"KiB": 1 << 10, "MiB": 1 << 20}


def _in_python(name: str) -> float:
    module, _, constant = name.rpartition(".")
    return float(getattr(importlib.import_module(module), constant))


def _in_c(name: str) -> float:
    for path in sorted((ROOT / "native" / "include").rglob("*.h")):
        found = re.search(rf"#define {name}\s+(\(?[0-9][^/\n]*)", path.read_text())
        if found:
            text = re.sub(r"(?<=[0-9])[uUlL]+", "", found[1])
            number, *shift = text.strip(" ()").split("<<")
            return float(int(number) << int(shift[0]) if shift else int(number))
    raise AssertionError(f"{name} is not there")


def test_there_is_a_table() -> None:
    assert len(ROWS) > 30, "a pattern that matches nothing proves nothing"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[1][0][:50])
def test_each_row_is_true_and_proved(row: tuple[str, list[str]]) -> None:
    _, cells = row
    check_row(cells, HEADER.count("|") - 1)
    _, limit, constant, *_ = cells
    if not constant.startswith("`"):
        return
    name = constant.strip("`")
    number, unit, *_ = [*limit.split(), ""]
    told = float(number) * UNITS.get(unit, 1)
    assert told == (_in_c(name) if name.startswith("GW_") else _in_python(name))
