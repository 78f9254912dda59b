# SPDX-License-Identifier: Apache-2.0
"""The facts about QEMU that the hand-over is built on, asked of the QEMU that is installed."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path

import pytest

from services.common.vm_spec import VmSpec
from services.fault_agent import processes
from services.fault_agent.drivers.api import (
    Launch,
    LoadFailedError,
    Vmm,
    VmmRefusedError,
    VmmStartError,
    VmmState,
    VmmUnreachableError,
)
from services.fault_agent.drivers.command_line import (
    CONSOLE_PIPE,
    INSPECTION_SOCKET,
    console_log,
)
from services.fault_agent.drivers.memory_map import memory_regions
from services.fault_agent.drivers.qemu import QemuDriver
from services.fault_agent.drivers.qmp import QmpClient
from services.fault_agent.processes import Process
from services.fault_agent.residents import make_ram_file
from tests.harness.console import Console
from tests.integration.agent.nodes import copy_data

pytestmark = pytest.mark.requires("qemu")

MakeSpec = Callable[..., VmSpec]
GIB = 1 << 30


class Vmms:
    """Starts QEMUs without an agent; ends them all."""

    def __init__(self, directory: Path, ram_dir: Path) -> None:
        self.driver = QemuDriver()
        self._directory = directory
        self._ram_dir = ram_dir
        self._processes: list[Process] = []
        self._held: list[Vmm] = []

    def launch(self, name: str, spec: VmSpec) -> Launch:
        """A directory and a RAM file of its own."""
        directory = self._directory / name
        directory.mkdir()
        path = self._ram_dir / name
        make_ram_file(path, spec.memory_bytes)

        async def on_spawned(process: Process) -> None:
            self._processes.append(process)

        return Launch(
            spec=spec,
            node="test",
            epoch=1,
            directory=directory,
            ram_path=path,
            on_spawned=on_spawned,
        )

    async def start(self, launch: Launch) -> Vmm:
        """Stopped."""
        self._held.append(await self.driver.start(launch))
        return self._held[-1]

    async def start_incoming(self, launch: Launch) -> Vmm:
        """Waiting for a state."""
        self._held.append(await self.driver.start_incoming(launch))
        return self._held[-1]

    async def close(self) -> None:
        """End them all."""
        for vmm in self._held:
            vmm.close()
        for process in self._processes:
            await processes.kill(process)


@pytest.fixture
async def vmms(tmp_path: Path, ram_parent: Path) -> AsyncIterator[Vmms]:
    """None yet."""
    started = Vmms(tmp_path, ram_parent)
    yield started
    await started.close()


async def save(vmm: Vmm) -> bytes:
    """The whole device state."""
    async with aclosing(vmm.save()) as chunks:
        return b"".join([chunk async for chunk in chunks])


async def pieces(*data: bytes) -> AsyncGenerator[bytes, None]:
    """As if it came from the source."""
    for piece in data:
        yield piece


async def inspect(launch: Launch) -> QmpClient:
    """The second monitor."""
    return await QmpClient.connect(
        launch.directory / INSPECTION_SOCKET, timeout_s=5, alive=lambda: True
    )


async def test_the_state_travels_and_the_guest_goes_on(vmms: Vmms, make_spec: MakeSpec) -> None:
    spec = make_spec()
    here, there = vmms.launch("here", spec), vmms.launch("there", spec)
    source = await vmms.start(here)
    assert await source.state() is VmmState.PAUSED
    await source.resume()
    console = Console(here.directory / console_log(1))
    await console.wait_beat(10)

    shell = await vmms.start_incoming(there)
    assert there.ram_path.stat().st_blocks == 0, "a deferred shell touches no memory"
    await source.pause()
    assert not await source.has_saved()
    state = await save(source)
    assert 100_000 < len(state) < 10_000_000
    assert await source.has_saved()
    last = console.last_beat()

    fd = os.open(there.ram_path, os.O_RDWR)
    copy_data(here.ram_path, fd)
    os.close(fd)
    await shell.load(pieces(state[:1000], state[1000:]))
    assert await shell.state() is VmmState.PAUSED
    assert await source.state() is VmmState.PAUSED

    await shell.resume()
    await shell.announce()
    arrived = Console(there.directory / console_log(1))
    await arrived.wait_beat(last + 30)
    assert arrived.follows(console)
    assert [*console.errors(), *arrived.errors()] == []


async def test_a_source_goes_on_after_every_save(vmms: Vmms, make_spec: MakeSpec) -> None:
    """Given up half way; whole, and then not again; and the console takes what is typed."""
    launch = vmms.launch("here", make_spec())
    source = await vmms.start(launch)
    await source.resume()
    console = Console(launch.directory / console_log(1))
    await console.wait_beat(10)

    await source.pause()
    async with aclosing(source.save()) as chunks:
        await anext(chunks)
    last = console.last_beat()
    await source.resume()
    await console.wait_beat(last + 10)

    await source.pause()
    await save(source)
    with pytest.raises(VmmRefusedError, match="only once"):
        await save(source)
    last = console.last_beat()
    await source.resume()
    await console.wait_beat(last + 10)

    # Nobody reads the console's output but the log, so nobody can hold the guest up.
    fd = os.open(launch.directory / f"{CONSOLE_PIPE}.in", os.O_WRONLY | os.O_NONBLOCK)
    os.write(fd, b"sweep\n")
    os.close(fd)
    while " cut " not in console.text():  # noqa: ASYNC110 - a file has no event
        await asyncio.sleep(0.02)
    assert console.errors() == []


@pytest.mark.parametrize("share", [0.01, 0.1, 0.4])
async def test_a_state_cut_short_ends_its_shell(
    vmms: Vmms, make_spec: MakeSpec, share: float
) -> None:
    """Where the cut is in the devices' part. QEMU does not miss the description behind it.

    So length and hash are ours to check: tests/unit/fault_agent/test_device_state.py.
    """
    spec = make_spec()
    source = await vmms.start(vmms.launch("here", spec))
    state = await save(source)
    shell = await vmms.start_incoming(vmms.launch("there", spec))
    with pytest.raises(LoadFailedError):
        await shell.load(pieces(state[: int(len(state) * share)]))
    await processes.wait_dead(shell.process)


async def test_an_empty_state_is_refused(vmms: Vmms, make_spec: MakeSpec) -> None:
    """QEMU itself would wait for its first byte for ever."""
    shell = await vmms.start_incoming(vmms.launch("there", make_spec()))
    with pytest.raises(LoadFailedError, match="empty"):
        await shell.load(pieces())


async def test_a_shell_waits_for_bytes_that_are_held_back(vmms: Vmms, make_spec: MakeSpec) -> None:
    spec = make_spec()
    source = await vmms.start(vmms.launch("here", spec))
    state = await save(source)
    shell = await vmms.start_incoming(vmms.launch("there", spec))
    seen: list[VmmState] = []

    async def broken() -> AsyncGenerator[bytes, None]:
        yield state[:-1]
        seen.append(await shell.state())
        raise EOFError("the last byte was wrong")

    with pytest.raises(EOFError):
        await shell.load(broken())
    assert seen == [VmmState.INCOMING]


@pytest.mark.parametrize(
    ("machine", "memory"),
    [("pc", GIB), ("pc", 4 * GIB), ("q35", 2 * GIB + GIB // 2), ("q35", 3 * GIB)],
)
async def test_the_regions_are_those_that_qemu_makes(
    vmms: Vmms, make_spec: MakeSpec, machine: str, memory: int
) -> None:
    """`memory_regions` is our model of its memory map; this is the map."""
    spec = make_spec(machine=machine, memory_bytes=memory)
    launch = vmms.launch("here", spec)
    await vmms.start(launch)
    monitor = await inspect(launch)
    text = await monitor.execute("human-monitor-command", {"command-line": "info mtree -f"})
    monitor.close()
    view = text.split("FlatView")[1:]
    ram = next(part for part in view if '"memory"' in part or 'AS "memory"' in part)
    found = [
        (int(first, 16), int(last, 16) + 1, int(offset or "0", 16))
        for first, last, offset in re.findall(
            r"^\s*([0-9a-f]{16})-([0-9a-f]{16}) \([^)]*, (?:ram|rom)\): ram0(?: @([0-9a-f]+))?",
            ram,
            re.MULTILINE,
        )
    ]
    assert found
    for first, end, offset in found:
        holder = next(r for r in memory_regions(spec) if r.gpa <= first < r.gpa + r.size_bytes)
        assert end <= holder.gpa + holder.size_bytes
        assert offset - holder.file_offset == first - holder.gpa
    assert max(end for _, end, _ in found) == max(
        region.gpa + region.size_bytes for region in memory_regions(spec)
    )


async def test_a_guest_that_ends_is_shown_as_ended(vmms: Vmms, make_spec: MakeSpec) -> None:
    launch = vmms.launch("here", make_spec())
    vmm = await vmms.start(launch)
    await vmm.resume()
    monitor = await inspect(launch)
    with monitor.events("SHUTDOWN") as ended:
        await monitor.execute("system_reset")  # a panicked guest does this
        await ended.next()
    monitor.close()
    while await vmm.state() is VmmState.RUNNING:  # noqa: ASYNC110 - the event comes first
        await asyncio.sleep(0.01)
    assert await vmm.state() is VmmState.GUEST_ENDED
    with pytest.raises(VmmRefusedError):
        await vmm.resume()


async def test_a_monitor_can_be_taken_over_and_a_dead_one_not(
    vmms: Vmms, make_spec: MakeSpec
) -> None:
    launch = vmms.launch("here", make_spec())
    vmm = await vmms.start(launch)
    vmm.close()
    again = await vmms.driver.adopt(vmm.process, launch.directory)
    assert await again.state() is VmmState.PAUSED
    again.close()
    await processes.kill(vmm.process)
    with pytest.raises(VmmUnreachableError):
        await vmms.driver.adopt(vmm.process, launch.directory)
    assert await again.state() is VmmState.DEAD


async def test_a_qemu_that_does_not_start_says_so(vmms: Vmms, make_spec: MakeSpec) -> None:
    launch = vmms.launch("here", make_spec(kernel="/nonexistent/vmlinuz"))
    with pytest.raises(VmmStartError, match="nonexistent"):
        await vmms.start(launch)


async def test_versions_and_machines(make_spec: MakeSpec) -> None:
    driver = QemuDriver()
    assert re.match(r"\d+\.\d+\.\d+", await driver.version())
    assert await driver.lacks_machine(make_spec()) == ""
    nothing = QemuDriver("qemu-of-another-world")
    assert await nothing.version() == ""
    assert await nothing.lacks_machine(make_spec()) != ""
