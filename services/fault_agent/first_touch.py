# SPDX-License-Identifier: Apache-2.0
"""The order in which a guest touched its memory after it arrived here, for the next time it does.

`<state_dir>/vms/<vm>/first-touch`: two lines and then the runs, pairs of little-endian 64 bits
{first page, pages}:

    godwit-order 1
    PAGE_COUNT RUN_COUNT

Advice: an order that is missing, damaged or stale costs speed, and nobody's memory. So it is never
synced, and what is wrong with it is only logged. The beginning counts: what a guest needs to run
at all. What it touches later is anywhere, and single pages are a slow way to move memory.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from struct import Struct

from services.pagecore.api import Arrival, PageRun

log = logging.getLogger(__name__)

FILE = "first-touch"
RUNS_MAX = 1024
_MAGIC = "godwit-order 1"
_RUN = Struct("<QQ")
_HEAD_LEN_MAX = 64


def keep(directory: Path, arrival: Arrival) -> None:
    """Keep the order of an arrival that is through. Blocks; never raises OSError."""
    path = directory / FILE
    try:
        runs = arrival.order()[:RUNS_MAX]
        head = f"{_MAGIC}\n{arrival.status().page_count} {len(runs)}\n"
        scratch = path.with_suffix(".new")
        scratch.write_bytes(head.encode() + b"".join(_RUN.pack(*run) for run in runs))
        scratch.rename(path)
    except OSError as error:
        log.warning("%s is not kept: %s", path, error)


def read(directory: Path, page_count: int) -> list[PageRun]:
    """What was kept about a guest of `page_count` pages; empty: nothing that could be used."""
    path = directory / FILE
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size > _HEAD_LEN_MAX + RUNS_MAX * _RUN.size:
                raise ValueError("too long")
            return _parse(file.read(), page_count)
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        log.warning("%s is of no use: %s", path, error)
        return []


def _parse(data: bytes, page_count: int) -> list[PageRun]:
    magic, counts, body = data.split(b"\n", 2)
    pages, count = (int(number) for number in counts.split())
    if magic != _MAGIC.encode() or len(body) != count * _RUN.size:
        raise ValueError("it is damaged")
    if pages != page_count:
        raise ValueError(f"it is of a guest of {pages} pages")
    runs = [(first, length) for first, length in _RUN.iter_unpack(body)]
    if any(length < 1 or first + length > pages for first, length in runs):
        raise ValueError("a run goes beyond the guest")
    return runs
