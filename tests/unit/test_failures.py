# SPDX-License-Identifier: Apache-2.0
"""Every row of the failure table names tests that are there and are run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
TABLE = ROOT / "docs" / "failures.md"
HEADER = "| failure | when | Godwit | operator sees | held | proved by |"
CELL_COUNT = HEADER.count("|") - 1


def _rows() -> list[tuple[str, list[str]]]:
    """Section and cells of each row."""
    found = []
    for section in TABLE.read_text().split("\n## ")[1:]:
        title, _, body = section.partition("\n")
        if HEADER not in body:
            continue
        lines = body.split(HEADER, 1)[1].splitlines()[2:]
        for line in lines:
            if not line.startswith("|"):
                break
            found.append((title, [cell.strip() for cell in line.strip("|").split("|")]))
    return found


def _is_run(name: str, text: str, suffix: str) -> bool:
    """A Python test is one by its name; one in C is called by its main, mostly by a RUN macro."""
    if suffix == ".py":
        return re.search(rf"^\s*(async )?def {name}\(", text, re.MULTILINE) is not None
    return (
        re.search(rf"^static void {name}\(", text, re.MULTILINE) is not None
        and re.search(rf"\bRUN\w*\({name}\)", text) is not None
    )


ROWS = _rows()


def test_there_is_a_table() -> None:
    assert len(ROWS) > 40, "a pattern that matches nothing proves nothing"
    assert len({title for title, _ in ROWS}) >= 6


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}: {row[1][0][:40]}")
def test_each_row_is_whole_and_proved(row: tuple[str, list[str]]) -> None:
    _, cells = row
    assert len(cells) == CELL_COUNT, "a cell is missing, or has a | in it"
    assert all(cells), "an empty cell; nothing is a dash"
    path: Path | None = None
    names_of_path = 0
    for name in re.findall(r"`([^`]+)`", cells[-1]):
        if "/" in name:
            assert path is None or names_of_path, f"{path} is named without a test"
            path, names_of_path = ROOT / name, 0
            assert path.is_file(), f"{name} is not there"
        else:
            assert path is not None, f"{name}: in which file?"
            assert _is_run(name, path.read_text(), path.suffix), f"{name} is not run in {path}"
            names_of_path += 1
    assert names_of_path, "no test is named"


def test_a_row_without_a_test_is_noticed() -> None:
    """The check itself can fail."""
    text = "static void f(void)\n{\n}\n"
    assert not _is_run("f", text, ".c"), "defined and never run"
    assert _is_run("f", text + "RUN_FORKED(f);", ".c")
    assert not _is_run("test_f", "def test_f2() -> None:", ".py")


def test_system_calls_that_are_not_called_are_not() -> None:
    """docs/design/system-calls.md is printed by a native test; what it cannot look at is this."""
    text = (ROOT / "docs" / "design" / "system-calls.md").read_text()
    uncalled = re.findall(r"^\| (\w+) \|[^|]*\| not called \|$", text, re.MULTILINE)
    assert uncalled
    for path in (ROOT / "native" / "src").glob("*.c"):
        if not path.name.startswith("sys"):
            for name in uncalled:
                assert f"gw_sys_{name}(" not in path.read_text(), f"{path.name} calls {name}"
