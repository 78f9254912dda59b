# SPDX-License-Identifier: Apache-2.0
"""Where a VMM puts its guest's memory: our model of it, which tests compare with the VMMs."""

from __future__ import annotations

from services.common.vm_spec import PAGE_BYTES, VmSpec
from services.fault_agent.drivers.api import MemoryRegion

_GIB = 1 << 30
_ABOVE_4G = 4 * _GIB


def memory_regions(spec: VmSpec) -> tuple[MemoryRegion, ...]:
    """The guest-physical ranges of the spec's memory; the RAM file has them end to end."""
    below = min(spec.memory_bytes, _below_4g(spec))
    regions = [MemoryRegion(gpa=0, size_bytes=below, file_offset=0, page_size_bytes=PAGE_BYTES)]
    if below < spec.memory_bytes:
        regions.append(
            MemoryRegion(
                gpa=_ABOVE_4G,
                size_bytes=spec.memory_bytes - below,
                file_offset=below,
                page_size_bytes=PAGE_BYTES,
            )
        )
    return tuple(regions)


def _below_4g(spec: VmSpec) -> int:
    """How much is below 4 GiB; a hole for devices ends there.

    pc moves what exceeds 3 GiB above it once there are 3.5 GiB, q35 what exceeds 2 GiB once there
    are 2.75 GiB. A microvm's hole begins at 3 GiB.
    """
    if spec.driver == "microvm":
        return 3 * _GIB
    if spec.machine == "pc":
        return 3 * _GIB if spec.memory_bytes >= 0xE000_0000 else spec.memory_bytes
    return 2 * _GIB if spec.memory_bytes >= 0xB000_0000 else spec.memory_bytes
