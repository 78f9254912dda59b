# SPDX-License-Identifier: Apache-2.0
"""Unmodified QEMU as a VMM.

QEMU is never asked to hand a guest over: it saves into a pipe of ours without a return path, and
ends in `postmigrate`, from where it cannot start by itself; the other one loads under
`late-block-activate`, `-S` and without announcements, and stays paused (DESIGN section 4).
The device state leaves the memory out (`x-ignore-shared`, named shared file).

Source: QEMU qapi/migration.json, docs/devel/migration.rst; checked on 7.2.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import shutil
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from pathlib import Path
from typing import TypeVar

from services.common.vm_spec import VmSpec
from services.fault_agent import host, processes
from services.fault_agent.checks import Check, uffd_check, verdict
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
from services.fault_agent.drivers.command_line import (
    CONSOLE_PIPE,
    INSPECTION_SOCKET,
    MACHINE_TYPES,
    MONITOR_SOCKET,
    PID_FILE,
    Wiring,
    command_line,
    console_log,
)
from services.fault_agent.drivers.injection import Injected
from services.fault_agent.drivers.pipes import PipeReader, PipeWriter
from services.fault_agent.drivers.qmp import EventQueue, QmpClient, QmpError
from services.fault_agent.drivers.tap import open_tap
from services.fault_agent.processes import Process
from services.pagecore.api import PageCore

log = logging.getLogger(__name__)

START_TIMEOUT_S = 20.0
DYING_S = 1.0
ADOPT_TIMEOUT_S = 2.0
SAVE_TIMEOUT_S = 30.0
QUERY_TIMEOUT_S = 20.0
SETTLE_TIMEOUT_S = 10.0
SETTLE_POLL_S = 0.01
FINALIZE_TIMEOUT_S = 5.0
FINALIZE_POLL_S = 0.002
NON_SHARED_BYTES_MAX = 64 << 20
"""Memory that may travel in the device state: ROMs and such. More means that RAM does."""
PIPE_BYTES = 1 << 20
_BANDWIDTH_BYTES_PER_S = 16 << 30
VMM_LOG = "vmm.log"
"""What QEMU says on stdout and stderr, of every run."""
_MADE_BY_QEMU = (MONITOR_SOCKET, INSPECTION_SOCKET, PID_FILE)
_STATE_FD = "godwit-state"
_LOAD_S_MAX = 86400.0
_NOT_FINALIZED = "Migration is not finalized yet"
"""Why QEMU refuses `cont` in `finish-migrate`. It leaves that a moment after the save has ended."""
_T = TypeVar("_T")
_ANNOUNCE = {"initial": 50, "max": 550, "rounds": 5, "step": 100}

_SETTLED = frozenset({"none", "completed", "failed", "cancelled"})
_STATES = {
    "running": VmmState.RUNNING,
    "inmigrate": VmmState.INCOMING,
    "shutdown": VmmState.GUEST_ENDED,
    "guest-panicked": VmmState.GUEST_ENDED,
}
"""QEMU's run states; every other one is a pause of some kind."""


class QemuDriver:
    """Starts QEMUs."""

    def __init__(self, binary: str = "qemu-system-x86_64") -> None:
        self._binary = binary
        self._version: str | None = None
        self._machines: frozenset[str] | None = None

    @property
    def name(self) -> str:
        """As in VmSpec.driver."""
        return "qemu"

    async def version(self) -> str:
        """The first line of `--version`; empty if there is no QEMU."""
        if self._version is None:
            first, _, _ = (await self._ask("--version")).partition("\n")
            self._version = first.removeprefix("QEMU emulator version ").strip()
        return self._version

    async def lacks_machine(self, spec: VmSpec) -> str:
        """The versioned machine type that this QEMU does not have; empty if it has it."""
        if self._machines is None:
            lines = (await self._ask("-machine", "help")).splitlines()
            self._machines = frozenset(line.split(" ", 1)[0] for line in lines)
        wanted = MACHINE_TYPES[spec.machine]
        return "" if wanted in self._machines else wanted

    async def start(self, launch: Launch) -> Vmm:
        """A QEMU in `prelaunch`.

        Raises:
            VmmStartError: it ended.
            VmmUnreachableError: it did not get there in time.
            TapError: a tap of the spec cannot be made.
        """
        vmm = await self._launch(launch, incoming=False)
        for index, nic in enumerate(launch.spec.nics):
            if nic.tap is None:
                await vmm.monitor.execute("set_link", {"name": f"nic{index}", "up": False})
        return vmm

    async def start_incoming(self, launch: Launch) -> Vmm:
        """A QEMU in `inmigrate`, deferred: no byte of guest memory is touched before the load.

        Raises:
            VmmStartError: it ended.
            VmmUnreachableError: it did not get there in time.
            TapError: a tap of the spec cannot be made.
        """
        vmm = await self._launch(launch, incoming=True)
        state = await vmm.state()
        if state is not VmmState.INCOMING:
            raise VmmRefusedError(f"started to receive, it is {state.value}")
        return vmm

    async def adopt(self, process: Process, directory: Path) -> Vmm:
        """Take hold of a QEMU by its monitor, once its process is the one that is meant."""
        if not processes.is_alive(process):
            raise VmmUnreachableError(f"process {process.pid} is gone")
        monitor = await QmpClient.connect(
            directory / MONITOR_SOCKET,
            timeout_s=ADOPT_TIMEOUT_S,
            alive=lambda: processes.is_alive(process),
        )
        vmm = QemuVmm(process, monitor)
        # The former agent may have died before it did this. During a migration QEMU refuses it,
        # and then it was done.
        with contextlib.suppress(QmpError):
            await vmm.configure()
        return vmm

    async def arm(self, core: PageCore, target: ArmTarget) -> Armed:
        """By injection."""
        return await Injected.arm(core, target)

    async def take(self, core: PageCore, target: ArmTarget) -> Armed | None:
        """By the number that the userfaultfd has in it."""
        return await Injected.take(core, target)

    async def start_checks(self, spec: VmSpec) -> Sequence[Check]:
        """There is a QEMU, it has the machine, and the accelerator can be used."""
        version = await self.version()
        present = verdict(
            "vmm-present",
            "" if version else f"{spec.driver} was not found",
            fine=version,
            hint="apt-get install --no-install-recommends qemu-system-x86",
        )
        accelerator = verdict(
            "accelerator",
            await asyncio.to_thread(host.why_no_kvm) if spec.accel == "kvm" else "",
            fine=f"{spec.accel} can be used",
            hint='load kvm_intel or kvm_amd and allow /dev/kvm, or set "accel": "tcg"',
        )
        if not version:
            return [present, accelerator]
        lacks = await self.lacks_machine(spec)
        machine = verdict(
            "machine-type",
            f"it has no machine {lacks}" if lacks else "",
            fine=f"it has machine {spec.machine}",
            hint="install QEMU 7.2 or later, for x86-64",
        )
        return [present, machine, accelerator]

    def arrival_checks(self, spec: VmSpec, uffd_features: Sequence[str]) -> Sequence[Check]:
        """A userfaultfd that sees faults of kernel code too."""
        return [uffd_check(uffd_features, balloon=spec.balloon)]

    def find_orphan(self, directory: Path, ram_path: str) -> Process | None:
        """By its pid file. That may be old, and the pid another's by now: the memory tells."""
        try:
            pid = int((directory / PID_FILE).read_text())
            if ram_path.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes():
                return None
        except (OSError, ValueError):
            return None
        return processes.identify(pid)

    async def _launch(self, launch: Launch, *, incoming: bool) -> QemuVmm:
        binary = shutil.which(self._binary)
        if binary is None:
            raise VmmUnreachableError(f"{self._binary} is not on PATH")
        _make_files(launch)
        taps = _open_taps(launch)
        try:
            wiring = Wiring(
                binary=binary,
                ram_path=launch.ram_path,
                tap_fds=taps,
                incoming=incoming,
            )
            process = processes.spawn(
                command_line(launch.spec, wiring),
                directory=launch.directory,
                log=launch.directory / VMM_LOG,
                pass_fds=[tap for tap in taps if tap is not None],
            )
        except OSError as error:
            raise VmmUnreachableError(f"{binary}: {error.strerror or error}") from error
        finally:
            for tap in taps:
                if tap is not None:
                    os.close(tap)
        await launch.on_spawned(process)
        try:
            return await self._connect(launch, process)
        except VmmUnreachableError as error:
            # Its sockets are closed a moment before it is dead.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DYING_S):
                    await processes.wait_dead(process)
            if processes.is_alive(process):
                raise
            raise VmmStartError(_last_words(launch.directory / VMM_LOG)) from error

    async def _connect(self, launch: Launch, process: Process) -> QemuVmm:
        monitor = await QmpClient.connect(
            launch.directory / MONITOR_SOCKET,
            timeout_s=START_TIMEOUT_S,
            alive=lambda: processes.is_alive(process),
        )
        vmm = QemuVmm(process, monitor)
        try:
            await vmm.configure()
        except BaseException:
            vmm.close()
            raise
        return vmm

    async def _ask(self, *arguments: str) -> str:
        try:
            child = await asyncio.create_subprocess_exec(
                self._binary,
                *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
            )
        except OSError:
            return ""
        async with asyncio.timeout(QUERY_TIMEOUT_S):
            output, _ = await child.communicate()
        return output.decode(errors="replace") if child.returncode == 0 else ""


class QemuVmm:
    """One QEMU process and our connection to its monitor."""

    def __init__(self, process: Process, monitor: QmpClient) -> None:
        self._process = process
        self.monitor = monitor

    @property
    def process(self) -> Process:
        """Who it is."""
        return self._process

    async def configure(self) -> None:
        """Set what a hand-over needs, long before its pause."""
        wanted = ("x-ignore-shared", "events", "late-block-activate")
        await self.monitor.execute(
            "migrate-set-capabilities",
            {"capabilities": [{"capability": name, "state": True} for name in wanted]},
        )
        await self.monitor.execute(
            "migrate-set-parameters",
            {"max-bandwidth": _BANDWIDTH_BYTES_PER_S, "announce-rounds": 1},
        )

    async def _announce_nothing(self) -> None:
        """A paused destination would announce the guest's addresses as soon as it has loaded.

        Said when its devices are loaded, not before: loaded with 0 rounds, virtio-net frees its
        announcement timer, and QEMU (7.2 at least) dereferences it when the guest resets the
        device, which every guest does that shuts down. test_a_guest_that_powers_off_ends_the_watch.
        """
        # No deadline, as for the load itself.
        await self.monitor.execute(
            "migrate-set-parameters", {"announce-rounds": 0}, timeout_s=_LOAD_S_MAX
        )

    async def state(self, *, timeout_s: float = 1.0) -> VmmState:
        """Look, now."""
        if not processes.is_alive(self._process):
            return VmmState.DEAD
        try:
            return await self._ask_state(timeout_s)
        except VmmUnreachableError:
            alive = processes.is_alive(self._process)
            return VmmState.UNRESPONSIVE if alive else VmmState.DEAD

    async def pause(self) -> None:
        """`stop`, confirmed.

        Raises:
            VmmUnreachableError: no answer; it may be paused or not.
            VmmRefusedError: it is in another state afterwards.
        """
        await self.monitor.execute("stop")
        state = await self._ask_state()
        if state is not VmmState.PAUSED:
            raise VmmRefusedError(f"stopped, it is {state.value}")

    async def resume(self) -> None:
        """`cont`, confirmed. Takes the locks of the disks first; also after a save.

        Raises:
            VmmUnreachableError: no answer; it may run or not.
            VmmRefusedError: it does not run: a disk is locked elsewhere, say.
        """
        await self._settle()
        await self._cont()
        state = await self._ask_state()
        if state is VmmState.PAUSED:
            raise VmmRefusedError("told to go on, it is paused")

    async def announce(self) -> None:
        """Gratuitous ARP and the like, some rounds of it, by QEMU in the background."""
        await self.monitor.execute("announce-self", dict(_ANNOUNCE))

    async def has_saved(self) -> bool:
        """It is in `postmigrate`."""
        return await self._run_state() == "postmigrate"

    async def save(self) -> AsyncGenerator[bytes, None]:
        """The device state, as QEMU writes it into our pipe.

        Raises:
            VmmRefusedError: it failed, or memory is in it.
            VmmUnreachableError: it is gone or mute.
        """
        run_state = await self._run_state()
        if run_state != "paused" and run_state != "prelaunch":
            raise VmmRefusedError(f"it is {run_state}: a paused guest is saved, and only once")
        with self.monitor.events("MIGRATION") as events, PipeReader(PIPE_BYTES) as pipe:
            await self._pass_fd(pipe.other_end)
            pipe.close_other_end()
            await self.monitor.execute("migrate", {"uri": f"fd:{_STATE_FD}"})
            while chunk := await _in_time(pipe.read()):
                yield chunk
            status = await _in_time(_migration_ends(events))
        await self._check_saved(status)

    async def load(self, chunks: AsyncIterator[bytes]) -> None:
        """Feed a device state to QEMU; it is paused when this returns."""
        with self.monitor.events("MIGRATION") as events, PipeWriter(PIPE_BYTES) as pipe:
            await self._pass_fd(pipe.other_end)
            pipe.close_other_end()
            await self.monitor.execute("migrate-incoming", {"uri": f"fd:{_STATE_FD}"})
            # It may have said that it failed before it closed its end: the events tell why.
            len_bytes, last = 0, b""
            with contextlib.suppress(BrokenPipeError):
                async for chunk in chunks:
                    len_bytes += len(chunk)
                    await pipe.write(last)
                    await pipe.write(chunk[:-1])
                    last = chunk[-1:]
                # All but a byte of what describes the state: the devices are loaded.
                await pipe.drained()
                try:
                    await self._announce_nothing()
                except VmmUnreachableError as error:
                    raise LoadFailedError(f"it ended during the load: {error.message}") from error
                await pipe.write(last)
            pipe.close()
            if not len_bytes:
                # QEMU waits for the first byte, and an end is none.
                raise LoadFailedError("its device state is empty")
            try:
                # No deadline: it may wait for pages of a source that is out of reach for now, and
                # whoever does not want to wait kills it.
                status = await _migration_ends(events)
            except VmmUnreachableError as error:
                raise LoadFailedError(f"it ended during the load: {error.message}") from error
        if status != "completed":
            raise LoadFailedError(f"its load is {status}")
        state = await self._ask_state()
        if state is not VmmState.PAUSED:
            raise LoadFailedError(f"loaded, it is {state.value}")

    def close(self) -> None:
        """Let go of the monitor."""
        self.monitor.close()

    async def _settle(self) -> None:
        """End a save that was given up: a guest must not run while its state is written."""
        deadline = time.monotonic() + SETTLE_TIMEOUT_S
        while time.monotonic() < deadline:
            status = (await self.monitor.execute("query-migrate")).get("status", "none")
            if status in _SETTLED:
                return
            await self.monitor.execute("migrate_cancel")
            await asyncio.sleep(SETTLE_POLL_S)
        raise VmmUnreachableError("a save that was given up does not end")

    async def _cont(self) -> None:
        deadline = time.monotonic() + FINALIZE_TIMEOUT_S
        while True:
            try:
                await self.monitor.execute("cont")
                return
            except QmpError as error:
                if error.description != _NOT_FINALIZED or time.monotonic() >= deadline:
                    raise
            await asyncio.sleep(FINALIZE_POLL_S)

    async def _finalized_state(self) -> str:
        """The run state after a save: its end is told a moment before `finish-migrate` is left."""
        deadline = time.monotonic() + FINALIZE_TIMEOUT_S
        while (run_state := await self._run_state()) == "finish-migrate":
            if time.monotonic() >= deadline:
                break
            await asyncio.sleep(FINALIZE_POLL_S)
        return run_state

    async def _pass_fd(self, fd: int) -> None:
        await self.monitor.execute("getfd", {"fdname": _STATE_FD}, fds=[fd])

    async def _ask_state(self, timeout_s: float = 10.0) -> VmmState:
        return _STATES.get(await self._run_state(timeout_s), VmmState.PAUSED)

    async def _run_state(self, timeout_s: float = 10.0) -> str:
        return str((await self.monitor.execute("query-status", timeout_s=timeout_s))["status"])

    async def _check_saved(self, status: str) -> None:
        answer = await self.monitor.execute("query-migrate")
        if status != "completed":
            why = answer.get("error-desc", "no reason given")
            raise VmmRefusedError(f"its save is {status}: {why}")
        memory_bytes = int(answer["ram"]["total"])
        if memory_bytes > NON_SHARED_BYTES_MAX:
            raise VmmRefusedError(
                f"{memory_bytes} bytes of memory are in its device state: RAM is not a shared file"
            )
        run_state = await self._finalized_state()
        if run_state != "postmigrate":
            raise VmmRefusedError(f"saved, its run state is {run_state}")


async def _in_time(awaitable: Awaitable[_T]) -> _T:
    try:
        async with asyncio.timeout(SAVE_TIMEOUT_S):
            return await awaitable
    except TimeoutError:
        raise VmmUnreachableError(f"its save stands still for {SAVE_TIMEOUT_S:g} s") from None


async def _migration_ends(events: EventQueue) -> str:
    while True:
        status = str((await events.next()).get("status"))
        if status in {"completed", "failed", "cancelled"}:
            return status


def _last_words(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def _make_files(launch: Launch) -> None:
    """What a QEMU finds in its directory; what a former one left there goes."""
    directory = launch.directory
    source, sink = (directory / f"{CONSOLE_PIPE}{end}" for end in (".in", ".out"))
    for path in (source, sink, *(directory / name for name in _MADE_BY_QEMU)):
        path.unlink(missing_ok=True)
    os.mkfifo(source, 0o600)
    log_file = directory / console_log(launch.epoch)
    log_file.touch(0o600)
    sink.symlink_to(log_file.name)


def _open_taps(launch: Launch) -> list[int | None]:
    taps: list[int | None] = []
    try:
        for index, nic in enumerate(launch.spec.nics):
            if nic.tap is None:
                taps.append(None)
                continue
            tap = open_tap(nic.tap.netns, nic.tap.bridge, tap_name(launch, index))
            # QEMU inherits it under its own number.
            os.set_inheritable(tap, True)
            taps.append(tap)
    except BaseException:
        for opened in taps:
            if opened is not None:
                os.close(opened)
        raise
    return taps


def tap_name(launch: Launch, index: int) -> str:
    """A name for a tap that no other VM, run or node on this host uses."""
    text = f"{launch.node}/{launch.spec.vm_id}/{launch.epoch}/{index}"
    return f"gw{hashlib.sha256(text.encode()).hexdigest()[:12]}"
