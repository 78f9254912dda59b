# SPDX-License-Identifier: Apache-2.0
"""Two nodes, a guest image, a spec."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from services.common.vm_spec import VmSpec
from services.demo.guest_image import GuestImage, Workload, build
from tests.integration.agent.nodes import CopyingPageCore, Host, running_host

MIB = 1 << 20
_counter = itertools.count()


@pytest.fixture(scope="session")
def guest_image() -> GuestImage:
    """The demo's guest."""
    return build()


@pytest.fixture
def make_spec(guest_image: GuestImage) -> Callable[..., VmSpec]:
    """A small VM that runs the demo's workload."""

    def make(vm_id: str = "guest", **fields: object) -> VmSpec:
        workload = Workload(mib=32, dirty_rate=2000, heartbeat_ms=10, sweep_ms=1000)
        values: dict[str, object] = {
            "vm_id": vm_id,
            "memory_bytes": 192 * MIB,
            "kernel": str(guest_image.kernel),
            "initrd": str(guest_image.initrd),
            "cmdline": workload.command_line(),
            "nics": ({"mac": "52:54:00:12:34:56"},),
            **fields,
        }
        return VmSpec.model_validate(values)

    return make


@pytest.fixture
def ram_parent() -> Iterator[Path]:
    """A directory of our own on tmpfs."""
    path = Path(f"/dev/shm/godwit-test-{os.getpid()}-{next(_counter)}")
    path.mkdir()
    yield path
    shutil.rmtree(path)


@pytest.fixture
async def host_a(tmp_path: Path, ram_parent: Path) -> AsyncIterator[Host]:
    """Node a, without an agent."""
    async with running_host("a", tmp_path, ram_parent) as host:
        yield host


@pytest.fixture
async def host_b(tmp_path: Path, ram_parent: Path) -> AsyncIterator[Host]:
    """Node b, without an agent."""
    async with running_host("b", tmp_path, ram_parent) as host:
        yield host


@pytest.fixture
def core(host_a: Host, host_b: Host) -> CopyingPageCore:
    """Moves memory by copying it."""
    return CopyingPageCore([host_a.images_dir, host_b.images_dir])
