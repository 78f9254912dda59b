# SPDX-License-Identifier: Apache-2.0
"""godwit-microvm as a VMM: it hands its faults off by itself, no ptrace is needed.

Source: native/microvm/README.md, docs/exit-channel.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TypeVar

from services.common.errors import UnavailableError
from services.common.vm_spec import VmSpec
from services.fault_agent import handoff_socket, host, processes
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
from services.fault_agent.drivers.microvm_control import ControlClient, RefusedError, Reply
from services.fault_agent.drivers.pipes import PipeReader, PipeWriter
from services.fault_agent.handoff_socket import HandedOff, Listener
from services.fault_agent.processes import Process
from services.pagecore.api import PageCore

log = logging.getLogger(__name__)

PROGRAM = "godwit-microvm"
CONTROL_SOCKET = "control.sock"
VMM_LOG = "vmm.log"
"""Its events and what it says on stderr, of every run."""
LAST_STATS = "last-stats.json"
"""Its counters at the last save: who wants to know what a guest did last asks here, not a VMM that
is about to be killed."""
MEMORY_BYTES_MAX = 254 << 30

START_TIMEOUT_S = 20.0
ADOPT_TIMEOUT_S = 2.0
SAVE_TIMEOUT_S = 30.0
HANDOFF_TIMEOUT_S = 15.0
TAKE_TIMEOUT_S = 5.0
DYING_S = 1.0
PIPE_BYTES = 1 << 20
_T = TypeVar("_T")

_STATES = {
    "incoming": VmmState.INCOMING,
    "paused": VmmState.PAUSED,
    "running": VmmState.RUNNING,
    # The guest is held, as it was, and can neither run on nor be saved. It has not ended: an ended
    # guest's memory is released, and this one's is what a person will want to look at.
    "failed": VmmState.UNRESPONSIVE,
    "ended": VmmState.GUEST_ENDED,
}


class ArmTimeoutError(UnavailableError):
    """A microvm that lives has not handed its faults off yet."""

    def __init__(self, pid: int, timeout_s: float) -> None:
        super().__init__(
            "HANDOFF_MISSING",
            f"process {pid} has not handed its faults off within {timeout_s:g} s",
            hint="vmm.log in the VM's directory may say why",
        )


def find_program(name: str) -> str | None:
    """Its path: as named, on PATH, beside our Python, or as built in the checkout we run from."""
    checkout = Path(__file__).resolve().parents[3] / "build" / "native"
    places = (os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent), str(checkout))
    return shutil.which(name, path=os.pathsep.join(places))


def command_line(
    spec: VmSpec, binary: str, ram_path: Path, *, incoming: bool, memory_present: bool = False
) -> list[str]:
    """The whole command line; sockets are named relative to the VM's directory."""
    guest = spec.microvm
    assert guest is not None, "a microvm's spec has it"
    line = [
        binary,
        *("--control", CONTROL_SOCKET),
        *("--accel", spec.accel),
        *("--memory", str(spec.memory_bytes)),
        *("--memory-file", str(ram_path)),
        *("--vcpus", str(spec.vcpus)),
        *("--workload", guest.workload),
        *(("--workload-size", str(guest.workload_bytes)) if guest.workload_bytes else ()),
        *("--ops-per-second", str(guest.ops_per_second)),
        *("--tick-us", str(guest.tick_us)),
        *("--seed", str(guest.seed)),
        *(("--beat-log", guest.beat_log) if guest.beat_log else ()),
    ]
    if not incoming:
        return [*line, "--paused"]
    if memory_present:
        return [*line, "--incoming"]
    return [
        *line,
        "--incoming",
        *("--fault-socket", handoff_socket.SOCKET),
        *("--fault-backend", guest.fault_backend),
        *("--uffd-count", str(guest.uffd_count)),
    ]


class MicrovmDriver:
    """Starts godwit-microvms."""

    def __init__(self, program: str = PROGRAM) -> None:
        self._program = program
        self._listeners: dict[Path, Listener] = {}
        """By directory; from before the VMM's start until it is armed."""

    @property
    def name(self) -> str:
        """As in VmSpec.driver."""
        return "microvm"

    async def version(self) -> str:
        """Of the distribution that it is a part of; empty if it is not here."""
        return metadata.version("godwit") if find_program(self._program) else ""

    async def start(self, launch: Launch) -> Vmm:
        """A microvm whose guest is made and does not run.

        Raises:
            VmmStartError: it ended.
            VmmUnreachableError: it did not get there in time.
        """
        # One that makes a guest takes no file that may hold another.
        os.truncate(launch.ram_path, 0)
        return await self._launch(launch, VmmState.PAUSED)

    async def start_incoming(self, launch: Launch) -> Vmm:
        """A microvm that waits for a state, and hands its faults off meanwhile.

        Raises:
            VmmStartError: it ended.
            VmmUnreachableError: it did not get there in time.
        """
        if launch.memory_present:
            return await self._launch(launch, VmmState.INCOMING)
        self._listen(launch.directory)
        try:
            return await self._launch(launch, VmmState.INCOMING)
        except BaseException:
            self._forget(launch.directory)
            raise

    async def adopt(self, process: Process, directory: Path) -> Vmm:
        """Take hold of a microvm by its control socket."""
        if not processes.is_alive(process):
            raise VmmUnreachableError(f"process {process.pid} is gone")
        return await _connect(process, directory, ADOPT_TIMEOUT_S)

    async def arm(self, core: PageCore, target: ArmTarget) -> Armed:  # noqa: ARG002
        """Take the hand-off that it was started to make."""
        return await self._accept(target, HANDOFF_TIMEOUT_S)

    async def take(self, core: PageCore, target: ArmTarget) -> Armed | None:  # noqa: ARG002
        """Listen where our predecessor did; None if it has said `released` already."""
        self._listen(target.directory)
        if await _has_released(target.process, target.directory):
            self._forget(target.directory)
            return None
        return await self._accept(target, TAKE_TIMEOUT_S)

    async def start_checks(self, spec: VmSpec) -> Sequence[Check]:
        """It is here, and the accelerator can be used."""
        version = await self.version()
        too_large = spec.memory_bytes > MEMORY_BYTES_MAX
        return [
            verdict(
                "vmm-present",
                "" if version else f"{self._program} was not found",
                fine=f"{self._program} {version}",
                hint="make native builds it; put it on PATH, or give --microvm its path",
            ),
            verdict(
                "machine-type",
                f"{spec.memory_bytes} bytes of memory" if too_large else "",
                fine="its memory fits",
                hint=f"a microvm has at most {MEMORY_BYTES_MAX} bytes of memory",
            ),
            verdict(
                "accelerator",
                await asyncio.to_thread(host.why_no_kvm) if spec.accel == "kvm" else "",
                fine=f"{spec.accel} can be used",
                hint='load kvm_intel or kvm_amd and allow /dev/kvm, or set "accel": "thread"',
            ),
        ]

    def arrival_checks(self, spec: VmSpec, uffd_features: Sequence[str]) -> Sequence[Check]:
        """Threads can always wait: by PROT_NONE where nothing else is allowed."""
        guest = spec.microvm
        assert guest is not None, "a microvm's spec has it"
        if spec.accel == "kvm":
            return [uffd_check(uffd_features, balloon=False)]
        # Whether a userfaultfd of user mode only is allowed, the VMM itself finds out.
        return [
            verdict(
                "fault-backend", "", fine=f"threads, fault backend {guest.fault_backend}", hint=""
            )
        ]

    def find_orphan(self, directory: Path, ram_path: str) -> Process | None:  # noqa: ARG002
        """The process that was told to keep its memory there."""
        wanted = b"--memory-file\0" + ram_path.encode() + b"\0"
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if wanted in path.read_bytes():
                    return processes.identify(int(path.parent.name))
        return None

    async def _launch(self, launch: Launch, wanted: VmmState) -> Vmm:
        binary = find_program(self._program)
        if binary is None:
            raise VmmUnreachableError(f"{self._program} is not on PATH")
        (launch.directory / CONTROL_SOCKET).unlink(missing_ok=True)
        incoming = wanted is VmmState.INCOMING
        try:
            process = processes.spawn(
                command_line(
                    launch.spec,
                    binary,
                    launch.ram_path,
                    incoming=incoming,
                    memory_present=launch.memory_present,
                ),
                directory=launch.directory,
                log=launch.directory / VMM_LOG,
                pass_fds=(),
            )
        except OSError as error:
            raise VmmUnreachableError(f"{binary}: {error.strerror or error}") from error
        await launch.on_spawned(process)
        try:
            vmm = await _connect(process, launch.directory, START_TIMEOUT_S)
        except VmmUnreachableError as error:
            # Its socket is closed a moment before it is dead.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DYING_S):
                    await processes.wait_dead(process)
            if processes.is_alive(process):
                raise
            raise VmmStartError(_last_words(launch.directory / VMM_LOG)) from error
        state = await vmm.state()
        if state is not wanted:
            vmm.close()
            raise VmmRefusedError(f"started to be {wanted.value}, it is {state.value}")
        return vmm

    def _listen(self, directory: Path) -> None:
        if directory not in self._listeners:
            self._listeners[directory] = Listener(directory)

    def _forget(self, directory: Path) -> None:
        listener = self._listeners.pop(directory, None)
        if listener is not None:
            listener.close()

    async def _accept(self, target: ArmTarget, timeout_s: float) -> Armed:
        process, directory = target.process, target.directory
        self._listen(directory)
        listener = self._listeners[directory]
        expected = handoff_socket.expect(process.pid, target.ram_fd, target.spec.vcpus)
        try:
            async with asyncio.timeout(timeout_s):
                connection, faults = await listener.accept(expected)
        except BaseException as error:
            self._forget(directory)
            if isinstance(error, TimeoutError):
                raise ArmTimeoutError(process.pid, timeout_s) from None
            raise
        del self._listeners[directory]
        return HandedOff(
            process=process,
            expected=expected,
            listener=listener,
            connection=connection,
            faults=faults,
            released=lambda: _has_released(process, directory),
        )


class MicrovmVmm:
    """One microvm and our connection to its control socket."""

    def __init__(self, process: Process, directory: Path, control: ControlClient) -> None:
        self._process = process
        self._directory = directory
        self._control = control

    @property
    def process(self) -> Process:
        """Who it is."""
        return self._process

    async def hello(self, *, timeout_s: float = 10.0) -> Reply:
        """What it says of itself."""
        return await self._control.ask("hello", timeout_s=timeout_s)

    async def state(self, *, timeout_s: float = 1.0) -> VmmState:
        """Look, now."""
        if not processes.is_alive(self._process):
            return VmmState.DEAD
        try:
            hello = await self.hello(timeout_s=timeout_s)
        except (VmmUnreachableError, VmmRefusedError):
            alive = processes.is_alive(self._process)
            return VmmState.UNRESPONSIVE if alive else VmmState.DEAD
        return _STATES.get(str(hello.get("state")), VmmState.UNRESPONSIVE)

    async def pause(self) -> None:
        """Stop the vCPUs; it answers when all have stopped."""
        await self._control.ask("pause")

    async def resume(self) -> None:
        """Let the vCPUs run."""
        await self._control.ask("resume")

    async def announce(self) -> None:
        """It has no network."""

    async def has_saved(self) -> bool:
        """A paused microvm may be saved again."""
        return False

    async def save(self) -> AsyncGenerator[bytes, None]:
        """The state, as it writes it into our pipe.

        Raises:
            VmmRefusedError: it is not paused, or what came is not what it says it wrote.
            VmmUnreachableError: it is gone or mute.
        """
        len_bytes = 0
        with PipeReader(PIPE_BYTES) as pipe:
            saving = self._control.send("save", fds=[pipe.other_end])
            # Answered right behind it, before the trailer is sent: nobody waits for it.
            asking = self._control.send("stats")
            pipe.close_other_end()
            while chunk := await _in_time(pipe.read()):
                len_bytes += len(chunk)
                yield chunk
            saved, stats = await _in_time(saving), await _in_time(asking)
        if saved.get("bytes") != len_bytes:
            raise VmmRefusedError(f"it wrote {saved.get('bytes')} bytes of state, {len_bytes} came")
        asyncio.get_running_loop().call_soon(self._keep, stats)

    async def load(self, chunks: AsyncIterator[bytes]) -> None:
        """Feed a state to it; it is paused when this returns."""
        with PipeWriter(PIPE_BYTES) as pipe:
            loading = self._control.send("load", fds=[pipe.other_end])
            pipe.close_other_end()
            # It may have refused before it has read all: its answer tells why.
            with contextlib.suppress(BrokenPipeError):
                async for chunk in chunks:
                    await pipe.write(chunk)
            pipe.close()
            try:
                # No deadline: it may wait for pages; whoever does not want to wait kills it. A load
                # that it grants leaves it paused: to ask once more would be part of the pause.
                await loading
            except RefusedError as error:
                raise LoadFailedError(error.message) from error
            except VmmUnreachableError as error:
                raise LoadFailedError(f"it ended during the load: {error.message}") from error

    def close(self) -> None:
        """Let go of its control socket."""
        self._control.close()

    def _keep(self, stats: Reply) -> None:
        with contextlib.suppress(OSError):
            scratch = self._directory / f".{LAST_STATS}"
            scratch.write_text(json.dumps({"pid": self._process.pid, **stats}))
            scratch.rename(self._directory / LAST_STATS)


async def _connect(process: Process, directory: Path, timeout_s: float) -> MicrovmVmm:
    control = await ControlClient.connect(
        directory / CONTROL_SOCKET,
        timeout_s=timeout_s,
        alive=lambda: processes.is_alive(process),
    )
    vmm = MicrovmVmm(process, directory, control)
    try:
        pid = (await vmm.hello(timeout_s=timeout_s)).get("pid")
        if pid != process.pid:
            raise VmmUnreachableError(f"process {pid} answers for {process.pid}")
    except BaseException:
        vmm.close()
        raise
    return vmm


async def _has_released(process: Process, directory: Path) -> bool:
    """False also if it does not answer."""
    try:
        vmm = await _connect(process, directory, ADOPT_TIMEOUT_S)
    except (VmmUnreachableError, VmmRefusedError):
        return False
    try:
        return bool((await vmm.hello()).get("faults") == "released")
    except (VmmUnreachableError, VmmRefusedError):
        return False
    finally:
        vmm.close()


async def _in_time(awaitable: Awaitable[_T]) -> _T:
    try:
        async with asyncio.timeout(SAVE_TIMEOUT_S):
            return await awaitable
    except TimeoutError:
        raise VmmUnreachableError(f"its save stands still for {SAVE_TIMEOUT_S:g} s") from None


def _last_words(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""
