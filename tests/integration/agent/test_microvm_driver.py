# SPDX-License-Identifier: Apache-2.0
"""The driver against a real godwit-microvm, with threads for a processor: everywhere the same."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from services.common.vm_spec import VmSpec
from services.demo.microvm_guest import make_spec
from services.fault_agent import processes
from services.fault_agent.drivers import microvm
from services.fault_agent.drivers.api import (
    Armed,
    ArmTarget,
    Launch,
    LoadFailedError,
    Vmm,
    VmmRefusedError,
    VmmStartError,
    VmmState,
    VmmUnreachableError,
)
from services.fault_agent.drivers.memory_map import memory_regions
from services.fault_agent.drivers.microvm import LAST_STATS, MicrovmDriver, MicrovmVmm
from services.fault_agent.handoff import HandoffRefusedError
from services.fault_agent.processes import Process
from services.fault_agent.residents import has_data, make_ram_file
from services.pagecore.api import InstallMethod
from services.pagecore.fake import FakePageCore
from tests.harness.microvm import need_microvm

MIB = 1 << 20
WAIT_S = 60.0
SPEC = make_spec(
    "m",
    accel="thread",
    memory_bytes=64 * MIB,
    workload_bytes=4 * MIB,
    vcpus=2,
    fault_backend="exit-sigsegv",
)
CORE = FakePageCore()


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A microvm and what it was started with."""

    vmm: Vmm
    launch: Launch

    def target(self, ram_fd: int) -> ArmTarget:
        return ArmTarget(
            spec=self.launch.spec,
            process=self.vmm.process,
            directory=self.launch.directory,
            ram_fd=ram_fd,
            remote_fd=-1,
        )


Start = Callable[..., Awaitable[Started]]


@pytest.fixture
def driver() -> MicrovmDriver:
    need_microvm()
    return MicrovmDriver()


@pytest.fixture
async def start(driver: MicrovmDriver, tmp_path: Path, ram_parent: Path) -> AsyncIterator[Start]:
    """Starts microvms, in directories of their own; kills them at the end."""
    spawned: list[Process] = []
    held: list[Vmm] = []

    async def run(name: str = "a", spec: VmSpec = SPEC, *, incoming: bool = False) -> Started:
        directory, ram = tmp_path / name, ram_parent / f"{name}.ram"
        directory.mkdir()
        make_ram_file(ram, spec.memory_bytes)

        async def on_spawned(process: Process) -> None:
            spawned.append(process)

        launch = Launch(
            spec=spec,
            node="n",
            epoch=1,
            directory=directory,
            ram_path=ram,
            on_spawned=on_spawned,
        )
        vmm = await (driver.start_incoming(launch) if incoming else driver.start(launch))
        held.append(vmm)
        return Started(vmm=vmm, launch=launch)

    yield run
    for vmm in held:
        vmm.close()
    for process in spawned:
        await processes.kill(process)


@contextlib.asynccontextmanager
async def armed(driver: MicrovmDriver, started: Started) -> AsyncIterator[Armed]:
    ram_fd = os.open(started.launch.ram_path, os.O_RDWR | os.O_CLOEXEC)
    try:
        taken = await driver.arm(CORE, started.target(ram_fd))
        try:
            yield taken
        finally:
            taken.close()
    finally:
        os.close(ram_fd)


async def state_of(vmm: Vmm) -> bytes:
    return b"".join([chunk async for chunk in vmm.save()])


async def chunks(*data: bytes) -> AsyncIterator[bytes]:
    for chunk in data:
        yield chunk


async def test_a_guest_is_made_and_waits(start: Start, driver: MicrovmDriver) -> None:
    started = await start()
    vmm = started.vmm
    assert await vmm.state() is VmmState.PAUSED
    await vmm.resume()
    assert await vmm.state() is VmmState.RUNNING
    await vmm.resume()  # told twice
    await vmm.pause()
    await vmm.pause()
    assert await vmm.state() is VmmState.PAUSED
    await vmm.announce()
    assert driver.find_orphan(started.launch.directory, str(started.launch.ram_path)) == vmm.process
    assert driver.find_orphan(started.launch.directory, "/dev/shm/other.ram") is None
    await processes.kill(vmm.process)
    assert await vmm.state() is VmmState.DEAD


@pytest.mark.requires("kvm")
async def test_a_machine_that_has_failed_has_not_ended(start: Start) -> None:
    """Its guest is held. An ended one's memory would be released, and with it what went wrong."""
    started = await start(spec=SPEC.model_copy(update={"accel": "kvm"}))
    await started.vmm.resume()
    os.truncate(started.launch.ram_path, 0)  # its memory is gone, and nobody can bring it back
    async with asyncio.timeout(WAIT_S):
        while await started.vmm.state() is VmmState.RUNNING:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.01)
    assert await started.vmm.state() is VmmState.UNRESPONSIVE
    assert processes.is_alive(started.vmm.process)
    with pytest.raises(VmmRefusedError):
        await started.vmm.resume()


async def test_the_memory_map_is_the_one_we_think(start: Start) -> None:
    vmm = (await start()).vmm
    assert isinstance(vmm, MicrovmVmm)
    slots = (await vmm.hello())["slots"]
    for slot in slots:
        (region,) = (
            region
            for region in memory_regions(SPEC)
            if region.gpa <= slot["gpa"] < region.gpa + region.size_bytes
        )
        assert slot["offset"] - region.file_offset == slot["gpa"] - region.gpa


async def test_a_state_may_be_had_twice_and_counters_are_kept(start: Start) -> None:
    started = await start()
    vmm = started.vmm
    await vmm.resume()
    with pytest.raises(VmmRefusedError, match="save"):
        await state_of(vmm)
    await vmm.pause()
    first = await state_of(vmm)
    assert not await vmm.has_saved()
    assert await state_of(vmm) == first
    await asyncio.sleep(0)  # the counters are written behind the state
    last = json.loads((started.launch.directory / LAST_STATS).read_text())
    assert (last["pid"], last["state"], len(last["vcpus"])) == (vmm.process.pid, "paused", 2)


async def test_a_shell_hands_its_faults_off_and_loads(start: Start, driver: MicrovmDriver) -> None:
    source = (await start("a")).vmm
    await source.resume()
    await source.pause()
    state = await state_of(source)
    shell = await start("b", incoming=True)
    assert await shell.vmm.state() is VmmState.INCOMING
    assert not has_data(shell.launch.ram_path)
    async with armed(driver, shell) as taken:
        faults = taken.faults
        assert (faults.backend, faults.install_method) == ("exit-sigsegv", InstallMethod.WRITE)
        assert (faults.uffds, faults.exit_channel_fd >= 0) == ((), True)
        assert sum(region.len_bytes for region in faults.regions) == SPEC.memory_bytes
        await shell.vmm.load(chunks(state[:100], state[100:]))
    assert await shell.vmm.state() is VmmState.PAUSED
    assert not has_data(shell.launch.ram_path), "not a byte of memory was touched"


@pytest.mark.parametrize("cut", [0, 1, 100])
async def test_a_state_that_is_not_whole_is_not_loaded(
    start: Start, driver: MicrovmDriver, cut: int
) -> None:
    source = (await start("a")).vmm
    state = await state_of(source)
    shell = await start("b", incoming=True)
    async with armed(driver, shell):
        with pytest.raises(LoadFailedError):
            await shell.vmm.load(chunks(*([state[:cut]] if cut else [])))
    assert await shell.vmm.state() is VmmState.INCOMING


async def test_another_agent_takes_hold_and_takes_the_hand_off(
    start: Start, driver: MicrovmDriver
) -> None:
    """The VMM connects again, wherever somebody listens under the name that it knows."""
    shell = await start("b", incoming=True)
    async with armed(driver, shell) as taken:
        first = taken.faults
    shell.vmm.close()
    successor = MicrovmDriver()
    again = await successor.adopt(shell.vmm.process, shell.launch.directory)
    assert await again.state() is VmmState.INCOMING
    again.close()
    ram_fd = os.open(shell.launch.ram_path, os.O_RDWR | os.O_CLOEXEC)
    try:
        retaken = await successor.take(CORE, shell.target(ram_fd))
        assert retaken is not None
        assert retaken.faults.regions == first.regions
        retaken.close()
    finally:
        os.close(ram_fd)


async def test_a_hand_off_of_other_memory_is_refused(
    start: Start, driver: MicrovmDriver, tmp_path: Path
) -> None:
    shell = await start("b", incoming=True)
    other = tmp_path / "other.ram"
    make_ram_file(other, SPEC.memory_bytes)
    ram_fd = os.open(other, os.O_RDWR | os.O_CLOEXEC)
    try:
        with pytest.raises(HandoffRefusedError, match="not the guest's RAM file"):
            await driver.arm(CORE, shell.target(ram_fd))
    finally:
        os.close(ram_fd)


async def test_a_vmm_that_is_mute_about_its_faults(
    start: Start, driver: MicrovmDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(microvm, "HANDOFF_TIMEOUT_S", 0.2)
    started = await start("a")  # a guest of its own: it has nothing to hand off
    ram_fd = os.open(started.launch.ram_path, os.O_RDWR | os.O_CLOEXEC)
    try:
        with pytest.raises(microvm.ArmTimeoutError):
            await driver.arm(CORE, started.target(ram_fd))
    finally:
        os.close(ram_fd)


async def test_what_cannot_start_says_why(start: Start) -> None:
    spec = SPEC.model_copy(
        update={
            "accel": "kvm",
            "microvm": SPEC.microvm
            and SPEC.microvm.model_copy(update={"fault_backend": "exit-sigsegv"}),
        }
    )
    with pytest.raises(VmmStartError, match="godwit-microvm"):
        await start(spec=spec, incoming=True)


async def test_one_that_is_gone_is_not_adopted(start: Start, driver: MicrovmDriver) -> None:
    started = await start()
    await processes.kill(started.vmm.process)
    with pytest.raises(VmmUnreachableError):
        await driver.adopt(started.vmm.process, started.launch.directory)


async def test_preflight_of_a_node_without_it() -> None:
    driver = MicrovmDriver("no-such-program")
    assert await driver.version() == ""
    failed = [check.check for check in await driver.start_checks(SPEC) if not check.passed]
    assert failed == ["vmm-present"]
    assert all(check.passed for check in await MicrovmDriver().start_checks(SPEC))
    assert all(check.passed for check in driver.arrival_checks(SPEC, []))
    on_kvm = make_spec("m", accel="kvm", memory_bytes=64 * MIB, workload_bytes=MIB)
    assert not all(check.passed for check in driver.arrival_checks(on_kvm, []))
