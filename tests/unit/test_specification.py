# SPDX-License-Identifier: Apache-2.0
"""Every promise of SPECIFICATION.md names a test that is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
_ROW = re.compile(r"^\| (S\d+) \|[^|]*\|([^|]*)\|$", re.MULTILINE)


def test_every_promise_names_tests_that_exist() -> None:
    rows = _ROW.findall((ROOT / "SPECIFICATION.md").read_text())
    assert len(rows) > 20, "a pattern that matches nothing proves nothing"
    numbers = [number for number, _ in rows]
    assert len(set(numbers)) == len(numbers)
    for number, enforced_by in rows:
        names = re.findall(r"`([^`]+)`", enforced_by)
        assert names, f"{number} names no test"
        text = ""
        for name in names:
            if "/" in name:
                path = ROOT / name
                assert path.is_file(), f"{number}: {name} is not there"
                text = path.read_text()
            else:
                assert re.search(rf"\b{name}\b", text), f"{number}: {name} is not in its file"
