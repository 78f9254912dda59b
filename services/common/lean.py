# SPDX-License-Identifier: Apache-2.0
"""Imports that leave out what nobody needs: a guest may be waiting for this process to start."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def without(name: str) -> Iterator[None]:
    """What is imported in the block does not find the package `name`, as if it were not installed.

    Afterwards others may. Nothing happens if it has been imported already.
    """
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment] # the documented way to forbid an import
    try:
        yield
    finally:
        del sys.modules[name]
