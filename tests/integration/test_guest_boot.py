# SPDX-License-Identifier: Apache-2.0
"""The demo's guest under stock QEMU: it boots, works with every device, and finds a wrong page."""

from __future__ import annotations

import asyncio
import mmap
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from services.demo import guest_image
from services.demo.console import (
    Boot,
    Console,
    ConsoleFollower,
    DiskReport,
    Heartbeat,
    NetReport,
    Other,
    PageError,
    Panic,
    Sweep,
    parse,
)
from services.demo.errors import KernelUnavailableError, ToolMissingError
from services.demo.network import demo_network
from services.fault_agent.drivers.tap import open_tap
from tests.harness.require import required_names

pytestmark = [pytest.mark.requires("qemu"), pytest.mark.slow, pytest.mark.timeout(180)]

MEMORY_BYTES = 256 << 20
BOOT_TIMEOUT_S = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class Guest:
    """A guest that runs; `memory` is its RAM as a file."""

    follower: ConsoleFollower
    console: Console
    memory: Path
    stdin: asyncio.StreamWriter


@pytest.fixture(scope="module")
def image() -> guest_image.GuestImage:
    """Without the kernel's package a skip, unless this machine must have what a guest needs."""
    try:
        return guest_image.build()
    except (KernelUnavailableError, ToolMissingError) as error:
        if "qemu" in required_names(os.environ):
            raise
        pytest.skip(str(error))


@pytest.fixture
def memory() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="godwit-test-", dir="/dev/shm"))
    yield directory / "ram"
    shutil.rmtree(directory)


@asynccontextmanager
async def booted(
    image: guest_image.GuestImage,
    workload: guest_image.Workload,
    memory: Path,
    devices: tuple[str, ...] = (),
    *,
    vcpus: int = 1,
    pass_fds: tuple[int, ...] = (),
) -> AsyncIterator[Guest]:
    """Its console goes to a file by our own hands, so that commands can go in by stdin."""
    console_path = memory.with_name("console")
    with console_path.open("wb") as console_file:
        process = await asyncio.create_subprocess_exec(
            *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot"),
            *("-display", "none", "-vga", "none", "-serial", "stdio"),
            *("-accel", "tcg,thread=multi", "-cpu", "max", "-smp", str(vcpus)),
            *("-machine", "pc,memory-backend=ram0", "-m", f"{MEMORY_BYTES >> 20}M"),
            "-object",
            f"memory-backend-file,id=ram0,size={MEMORY_BYTES},mem-path={memory},share=on",
            *devices,
            *("-kernel", str(image.kernel), "-initrd", str(image.initrd)),
            *("-append", workload.command_line()),
            stdin=asyncio.subprocess.PIPE,
            stdout=console_file,
            pass_fds=pass_fds,
        )
    assert process.stdin is not None
    try:
        async with ConsoleFollower() as follower:
            yield Guest(
                follower=follower,
                console=follower.add(console_path, node="a", epoch=1),
                memory=memory,
                stdin=process.stdin,
            )
    finally:
        process.kill()
        await process.wait()


def healthy(console: Console) -> None:
    """Every line is whole and known, beats rise by one, nothing is wrong."""
    records = [parse(line.text) for line in console.lines]
    assert [r for r in records if isinstance(r, (Other, Panic, PageError))] == []
    numbers = [r.number for r in records if isinstance(r, Heartbeat)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert all(r.errors == 0 for r in records if isinstance(r, (Heartbeat, Sweep)))
    assert sum(isinstance(r, Boot) for r in records) == 1


@pytest.mark.requires("tap", "netns", "root")
@pytest.mark.parametrize("vcpus", [1, 2])
async def test_guest_works_with_all_devices_at_full_rate(
    image: guest_image.GuestImage, memory: Path, tmp_path: Path, vcpus: int
) -> None:
    """Workers that never sleep must starve neither heartbeats nor disk nor network."""
    disk = tmp_path / "disk.raw"
    guest_image.make_disk(disk, mib=16)
    with demo_network() as network:
        workload = guest_image.Workload(
            mib=64, dirty_rate=0, disk="vda", address=network.guest_address,
            peer=network.bridge_address,
        )  # fmt: skip
        tap = open_tap(network.netns, network.bridge, "tap0")
        devices = (
            *("-drive", f"file={disk},if=none,id=d0,format=raw,cache=none"),
            *("-device", "virtio-blk-pci,drive=d0"),
            *("-netdev", f"tap,id=n0,fd={tap}", "-device", "virtio-net-pci,netdev=n0,romfile="),
            *("-device", "virtio-rng-pci", "-device", "virtio-balloon-pci"),
        )
        try:
            async with (
                asyncio.timeout(BOOT_TIMEOUT_S),
                booted(image, workload, memory, devices, vcpus=vcpus, pass_fds=(tap,)) as guest,
            ):
                wait = guest.follower.wait_for
                boot = await wait(guest.console, lambda r: isinstance(r, Boot))
                await wait(guest.console, lambda r: isinstance(r, DiskReport) and r.rounds > 20)
                await wait(guest.console, lambda r: isinstance(r, NetReport) and r.answered > 5)
                await wait(guest.console, lambda r: isinstance(r, Heartbeat) and r.number > 100)
                end = await wait(guest.console, lambda r: isinstance(r, Sweep) and r.state == "end")
        finally:
            os.close(tap)

    healthy(guest.console)
    started = parse(guest.console.lines[boot].text)
    assert isinstance(started, Boot)
    assert (started.pages, started.workers) == (workload.page_count, vcpus)
    swept = parse(guest.console.lines[end].text)
    assert isinstance(swept, Sweep)
    assert swept.verified == workload.page_count
    disks = [parse(line.text) for line in guest.console.lines]
    assert all(r.bad == r.errors == 0 for r in disks if isinstance(r, DiskReport))


async def test_guest_finds_each_page_that_is_not_its_own(
    image: guest_image.GuestImage, memory: Path
) -> None:
    """Zero and torn pages put into its RAM file are found by one sweep on command, each once."""
    workload = guest_image.Workload(mib=64, dirty_rate=1, sweep_ms=600_000)
    async with asyncio.timeout(BOOT_TIMEOUT_S), booted(image, workload, memory) as guest:
        wait = guest.follower.wait_for
        begun = await wait(guest.console, lambda r: isinstance(r, Heartbeat))
        zero, torn = spoil(memory, workload.page_count // 2, workload.page_count // 2 + 100)

        guest.stdin.write(b"sweep\n")
        position = await wait(
            guest.console, lambda r: isinstance(r, Sweep) and r.state == "end", start=begun
        )
        sweep = parse(guest.console.lines[position].text)
        await wait(guest.console, lambda r: isinstance(r, Heartbeat) and r.errors == 2)

    records = [parse(line.text) for line in guest.console.lines]
    found = {(r.page, r.kind) for r in records if isinstance(r, PageError)}
    assert found == {(zero, "zero"), (torn, "torn")}
    assert isinstance(sweep, Sweep)
    assert (sweep.verified, sweep.errors) == (workload.page_count, 2)


def spoil(memory: Path, *pages: int) -> tuple[int, ...]:
    """Wipe the first of the workload's pages and flip a bit of the second, where they lie."""
    with memory.open("r+b") as file, mmap.mmap(file.fileno(), 0) as ram:
        for page, wipe in zip(pages, (True, False), strict=True):
            # Magic and page number; generation 1, as the dirty rate leaves nearly all.
            header = b"GW_PAGE1" + page.to_bytes(8, "little") + (1).to_bytes(8, "little")
            offset = ram.find(header)
            while offset % 4096:
                assert offset >= 0, f"page {page} is not in the guest's memory"
                offset = ram.find(header, offset + 1)
            if wipe:
                ram[offset : offset + 4096] = bytes(4096)
            else:
                ram[offset + 4000] ^= 1
    return pages
