# SPDX-License-Identifier: Apache-2.0
"""Every row of the failure table names tests that are there and are run."""

from __future__ import annotations

import re

import pytest

from tests.harness.proofs import ROOT, check_row, is_run, read_rows

TABLE = ROOT / "docs" / "failures.md"
HEADER = "| failure | when | Godwit | operator sees | held | proved by |"
CELL_COUNT = HEADER.count("|") - 1


ROWS = read_rows(TABLE, HEADER)


def test_there_is_a_table() -> None:
    assert len(ROWS) > 40, "a pattern that matches nothing proves nothing"
    assert len({title for title, _ in ROWS}) >= 6


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}: {row[1][0][:40]}")
def test_each_row_is_whole_and_proved(row: tuple[str, list[str]]) -> None:
    _, cells = row
    check_row(cells, CELL_COUNT)


def test_a_row_without_a_test_is_noticed() -> None:
    """The check itself can fail."""
    text = "static void f(void)\n{\n}\n"
    assert not is_run("f", text, ".c"), "defined and never run"
    assert is_run("f", text + "RUN_FORKED(f);", ".c")
    assert not is_run("test_f", "def test_f2() -> None:", ".py")


def test_system_calls_that_are_not_called_are_not() -> None:
    """docs/design/system-calls.md is printed by a native test; what it cannot look at is this."""
    text = (ROOT / "docs" / "design" / "system-calls.md").read_text()
    uncalled = re.findall(r"^\| (\w+) \|[^|]*\| not called \|$", text, re.MULTILINE)
    assert uncalled
    for path in (ROOT / "native" / "src").glob("*.c"):
        if not path.name.startswith("sys"):
            for name in uncalled:
                assert f"gw_sys_{name}(" not in path.read_text(), f"{path.name} calls {name}"
