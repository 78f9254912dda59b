# SPDX-License-Identifier: Apache-2.0
"""What tests of the C core share."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(name="ram_dir")
def ram_dir_fixture() -> Iterator[Path]:
    """A directory in memory, gone afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="godwit-native-", dir="/dev/shm"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)
