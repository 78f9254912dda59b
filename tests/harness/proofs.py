# SPDX-License-Identifier: Apache-2.0
"""Tables of the documents whose rows name the tests that prove them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def read_rows(document: Path, header: str) -> list[tuple[str, list[str]]]:
    """Section and cells of each row below `header`, which may stand in several sections."""
    found = []
    for section in document.read_text().split("\n## ")[1:]:
        title, _, body = section.partition("\n")
        if header not in body:
            continue
        for line in body.split(header, 1)[1].splitlines()[2:]:
            if not line.startswith("|"):
                break
            found.append((title, [cell.strip() for cell in line.strip("|").split("|")]))
    return found


def is_run(name: str, text: str, suffix: str) -> bool:
    """A Python test is one by its name; one in C is called by its main, mostly by a RUN macro."""
    if suffix == ".py":
        return re.search(rf"^\s*(async )?def {name}\(", text, re.MULTILINE) is not None
    return (
        re.search(rf"^static void {name}\(", text, re.MULTILINE) is not None
        and re.search(rf"\bRUN\w*\({name}\)", text) is not None
    )


def check_row(cells: list[str], cell_count: int) -> None:
    """Assert that a row is whole, and that each test its last cell names is run."""
    assert len(cells) == cell_count, "a cell is missing, or has a | in it"
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
            assert is_run(name, path.read_text(), path.suffix), f"{name} is not run in {path}"
            names_of_path += 1
    assert names_of_path, "no test is named"
