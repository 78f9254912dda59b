# SPDX-License-Identifier: Apache-2.0
"""A node's page server in miniature: a directory of records, RAM files, a page core in memory."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.page_server.images import this_boot_id

PAGE = 4096
RAM_PAGE_COUNT = 8


class Node:
    """What the fault agent beside a page server does."""

    def __init__(self, images_dir: Path, ram_dir: Path) -> None:
        self.images_dir = images_dir
        self.ram_dir = ram_dir

    def make_ram(self, name: str = "ram") -> Path:
        path = self.ram_dir / name
        path.write_bytes(bytes(RAM_PAGE_COUNT * PAGE))
        return path

    def fields(self, ram: Path, **changes: Any) -> dict[str, Any]:
        """A good record of `ram`, with `changes`."""
        size = RAM_PAGE_COUNT * PAGE
        region = {"gpa": 0, "size_bytes": size, "file_offset": 0, "page_size_bytes": PAGE}
        return {
            "image_id": "web.1",
            "vm_id": "web",
            "boot_id": this_boot_id(),
            "epoch": 7,
            "inode": ram.stat().st_ino,
            "generation": 1,
            "state": "live",
            "ram_path": str(ram),
            "regions": [region],
        } | changes

    def write(self, fields: dict[str, Any]) -> Path:
        path = self.images_dir / f"{fields['image_id']}.json"
        path.write_text(json.dumps(fields))
        return path


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    images_dir = tmp_path / "images"
    images_dir.mkdir()
    ram_dir = Path(tempfile.mkdtemp(prefix="godwit-test-", dir="/dev/shm"))
    yield Node(images_dir, ram_dir)
    shutil.rmtree(ram_dir)
