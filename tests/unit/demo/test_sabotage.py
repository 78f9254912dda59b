# SPDX-License-Identifier: Apache-2.0
"""The harm is done to the guest's own pages and to one of them only."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.common.errors import InternalError
from services.demo.sabotage import PAGE_BYTES, flip_byte

MIB = 1 << 20


def page(number: int, generation: int) -> bytes:
    head = b"GW_PAGE1" + number.to_bytes(8, "little") + generation.to_bytes(8, "little")
    return head.ljust(PAGE_BYTES, b"\x55")


def test_flips_one_byte_of_a_page_without_a_copy(tmp_path: Path) -> None:
    """The guest's kernel may have left an old copy of a page that it moved: nobody reads that."""
    memory = bytearray(4 * MIB)
    memory[MIB : MIB + 2 * PAGE_BYTES] = page(1, 1) + page(2, 7)
    memory[3 * MIB : 3 * MIB + PAGE_BYTES] = page(1, 2)
    path = tmp_path / "ram"
    path.write_bytes(memory)
    number = flip_byte(path)
    assert number == MIB // PAGE_BYTES + 1
    after = path.read_bytes()
    changed = [i for i, (old, new) in enumerate(zip(memory, after, strict=True)) if old != new]
    assert changed == [MIB + 2 * PAGE_BYTES - 1]


def test_without_a_workload_it_says_so(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    path.write_bytes(bytes(MIB))
    with pytest.raises(InternalError, match="no page of the workload"):
        flip_byte(path)
