# SPDX-License-Identifier: Apache-2.0
"""CRIU's lazy-pages: why it is not measured here.

It moves processes, not VMs. Its lazy dump keeps the memory in pipes, as many pages as there are,
and enlarges them beyond the system's limit for that (fs.pipe-max-size): CAP_SYS_RESOURCE.
"""

from __future__ import annotations

import shutil
from pathlib import Path

NAME = "CRIU lazy-pages"
_CAP_SYS_RESOURCE = 24


def why_skipped() -> str:
    """In a sentence."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:") and not int(line.split()[1], 16) >> _CAP_SYS_RESOURCE & 1:
            return "skipped: its lazy dump needs CAP_SYS_RESOURCE, which root has not here"
    if shutil.which("criu") is None:
        return "skipped: there is no criu"
    return "skipped: it moves processes, and this guest is a VM"
