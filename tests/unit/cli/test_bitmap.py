# SPDX-License-Identifier: Apache-2.0
"""The residency map: every page is counted once, and full and empty are never rounded to."""

from __future__ import annotations

from godwit.models import UserfaultBitmap
from hypothesis import given
from hypothesis import strategies as st

from services.cli.bitmap import absent_by_cell, draw
from tests.harness.fake_api import FakeApi
from tests.unit.cli.conftest import Godwit

RUNS = st.lists(st.tuples(st.integers(0, 300), st.integers(1, 50)), max_size=10)


@given(page_count=st.integers(1, 400), cell_pages=st.integers(1, 90), runs=RUNS)
def test_cells_count_each_page_once(
    page_count: int, cell_pages: int, runs: list[tuple[int, int]]
) -> None:
    absent: set[int] = set()
    disjoint = []
    for first, count in runs:
        pages = set(range(first, first + count))
        if not pages & absent:
            absent |= pages
            disjoint.append((first, count))
    cells = absent_by_cell(disjoint, page_count, cell_pages)
    for index, counted in enumerate(cells):
        inside = range(index * cell_pages, min((index + 1) * cell_pages, page_count))
        assert counted == len(absent & set(inside))


def test_one_absent_page_is_never_drawn_as_resident() -> None:
    of = UserfaultBitmap(
        vm_id="web",
        page_count=1 << 20,
        absent_count=1,
        resident_share=1 - 2**-20,
        absent_runs=((5, 1),),
    )
    drawn = draw(of).splitlines()
    assert drawn[0].split()[2][0] == "▓"
    assert drawn[0].count("█") == 63
    assert "(99.9 %), 1 absent in 1 runs" in drawn[-1]


def test_command(godwit: Godwit, api: FakeApi) -> None:
    answer = {
        "vm_id": "web",
        "epoch": 2,
        "page_count": 128,
        "absent_count": 64,
        "resident_share": 0.5,
        "resident_percent": 50.0,
        "page_size_bytes": 4096,
        "absent_runs": [[64, 64]],
    }
    api.answers["GET", "/v1/vms/web/userfault-bitmap"] = (200, answer)
    lines = godwit("bitmap", "web").out.splitlines()
    assert lines[0].endswith("█" * 64)
    assert lines[1].endswith("·" * 64)
    assert lines[-1] == "web (epoch 2): 64 of 128 pages resident (50.0 %), 64 absent in 1 runs"
