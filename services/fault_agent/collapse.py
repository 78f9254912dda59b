# SPDX-License-Identifier: Apache-2.0
"""Huge pages for a guest that has arrived whole.

Its memory came page by page of 4 KiB; a guest whose memory is mapped by 2 MiB runs faster under
KVM. Collapsed is the page cache of the RAM file, and the VMM maps it so at its next touch. Nobody
waits for it: it begins when the memory is whole and the VMM has been let go, and a vCPU that meets
a range under way waits for that one range. Only ranges that are data all through: a hole that was
collapsed would be allocated. Best effort, never an error of the move.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from services.pagecore.api import PageCore

HUGE_BYTES = 2 << 20
_BREATH_S = 0.001
"""Between ranges: the guest has just been moved and wants the cores."""
_HOPELESS = {
    errno.EINVAL: "this kernel has no MADV_COLLAPSE (Linux 6.1), or not for this file system",
    errno.ENOSYS: "this kernel has no MADV_COLLAPSE (Linux 6.1)",
    errno.EPERM: "not allowed",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Collapsed:
    """What came of it."""

    huge_bytes: int
    """In huge pages now."""
    left_bytes: int
    """Ranges that were whole and stayed small: memory is short or scattered."""
    why_not: str = ""
    """Why it was given up, or refused."""


def why_refused(fault_backend: str) -> str:
    """Why a guest is not collapsed, ever; empty: it may be."""
    if fault_backend == "kvm-userfault":
        return "vCPU userfault exits keep its mappings at 4 KiB"
    return ""


def collapse(pagecore: PageCore, ram_path: str, *, stop: Callable[[], bool]) -> Collapsed:
    """Collapse what can be. Blocks for as long as it takes, or until `stop`.

    Raises:
        OSError: the RAM file cannot be opened.
    """
    fd = os.open(ram_path, os.O_RDWR | os.O_CLOEXEC)
    huge = left = 0
    try:
        for offset in whole_ranges(fd, os.fstat(fd).st_size):
            if stop():
                return Collapsed(huge_bytes=huge, left_bytes=left, why_not="stopped")
            try:
                pagecore.collapse(fd, offset)
            except OSError as error:
                left += HUGE_BYTES
                if error.errno in _HOPELESS and huge == 0:
                    why = _HOPELESS[error.errno]
                    return Collapsed(huge_bytes=0, left_bytes=left, why_not=why)
            else:
                huge += HUGE_BYTES
            time.sleep(_BREATH_S)
    finally:
        os.close(fd)
    return Collapsed(huge_bytes=huge, left_bytes=left)


def whole_ranges(fd: int, len_bytes: int) -> Iterator[int]:
    """Where ranges of 2 MiB begin that have no hole."""
    position = 0
    while position < len_bytes:
        try:
            data = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data behind
                return
            raise
        position = os.lseek(fd, data, os.SEEK_HOLE)
        first = -(-data // HUGE_BYTES) * HUGE_BYTES
        yield from range(first, position - HUGE_BYTES + 1, HUGE_BYTES)
