# SPDX-License-Identifier: Apache-2.0
"""What the agent needs of a VMM. Nothing here decides anything: a VMM obeys."""

from __future__ import annotations

import enum
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from services.common.errors import FailedPreconditionError, UnavailableError
from services.common.vm_spec import VmSpec
from services.fault_agent.checks import Check
from services.fault_agent.processes import Process
from services.pagecore.api import ArrivalRegion, InstallMethod, PageCore


class VmmState(enum.StrEnum):
    """What a look at a VMM says; godwit.agent.v1.VmmState."""

    DEAD = "dead"
    RUNNING = "running"
    PAUSED = "paused"
    INCOMING = "incoming"
    UNRESPONSIVE = "unresponsive"
    GUEST_ENDED = "guest_ended"


class VmmUnreachableError(UnavailableError):
    """The VMM's process does not answer, or has gone. Says nothing about what it has done."""

    def __init__(self, message: str) -> None:
        super().__init__(
            "VMM_UNREACHABLE", message, hint="vmm.log in the VM's directory may say why"
        )


class VmmStartError(FailedPreconditionError):
    """A VMM ended while it was being started."""

    def __init__(self, last_words: str) -> None:
        super().__init__(
            "VMM_START_FAILED",
            f"the VMM ended at once: {last_words or 'it said nothing'}",
            hint="vmm.log in the VM's directory has all of it",
        )


class VmmRefusedError(FailedPreconditionError):
    """The VMM answered with an error, or did something else than it was told."""

    def __init__(self, message: str) -> None:
        super().__init__("VMM_REFUSED", message)


class LoadFailedError(FailedPreconditionError):
    """A VMM did not take a device state. It is of no further use."""

    def __init__(self, message: str) -> None:
        super().__init__(
            "LOAD_FAILED", message, hint="vmm.log in the VM's directory may say why; prepare again"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What a VMM is started with."""

    spec: VmSpec
    node: str
    """Part of the names of what is made on the host, so that nodes can share one."""
    epoch: int
    directory: Path
    """Its working directory: sockets, console-<epoch>.log, vmm.log."""
    ram_path: Path
    """The guest's memory: exists, has its full length."""
    on_spawned: Callable[[Process], Awaitable[None]]
    """Called as soon as there is a process and before anything else: the journal must know it."""
    memory_present: bool = False
    """Of an incoming one: every page is there already, nobody will answer faults."""


class Vmm(Protocol):
    """A VMM process. Letting go of it (`close`) leaves it running."""

    @property
    def process(self) -> Process:
        """Who it is."""
        ...

    async def state(self, *, timeout_s: float = 1.0) -> VmmState:
        """Look, now. Never raises for a VMM that is gone or mute."""
        ...

    async def pause(self) -> None:
        """Stop the vCPUs and be sure of it."""
        ...

    async def resume(self) -> None:
        """Let the vCPUs run, from any paused state, and be sure of it."""
        ...

    async def announce(self) -> None:
        """Tell the network where the guest's addresses are now."""
        ...

    async def has_saved(self) -> bool:
        """True after a `save` that came to its end and cannot be had again before `resume`."""
        ...

    def save(self) -> AsyncGenerator[bytes, None]:
        """The device state of the paused guest, memory left out. Afterwards it stays paused.

        The iterator ends normally only if the VMM says that the state is complete.
        """
        ...

    async def load(self, chunks: AsyncIterator[bytes]) -> None:
        """Take a device state; paused when it returns. An exception of `chunks` makes it useless.

        May wait for pages that the load touches, for as long as they take to come.

        Raises:
            LoadFailedError: it did not take it.
        """
        ...

    def close(self) -> None:
        """Let go of it. Idempotent."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmTarget:
    """The VMM whose absent memory is to come under our control."""

    spec: VmSpec
    process: Process
    directory: Path
    """Its own, as in Launch."""
    ram_fd: int
    """The RAM file, open. Borrowed."""
    remote_fd: int
    """As `Faults.remote_fd` was when it was armed; -1 before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """How a VMM's faults come to us; the fields are those of ArrivalConfig."""

    backend: str
    """As docs/exit-channel.md names it; "uffd" where the VMM knows nothing of Godwit."""
    backend_reason: str
    """Why not a better one; may be empty."""
    regions: tuple[ArrivalRegion, ...]
    uffds: tuple[int, ...]
    exit_channel_fd: int = -1
    exit_doorbell_fd: int = -1
    install_method: InstallMethod = InstallMethod.COPY
    remote_fd: int = -1
    """What must be journaled to take it up again after our death; -1: nothing."""


class Armed(Protocol):
    """A VMM whose absent memory is under our control. `close` leaves its guest blocked."""

    @property
    def faults(self) -> Faults:
        """Descriptors of ours, good until `close_fds`."""
        ...

    def close_fds(self) -> None:
        """The engine has duplicates by now. Idempotent."""
        ...

    async def let_go(self) -> None:
        """Every page is in place, durably: the VMM ends its own part. Idempotent; bounded.

        Raises:
            VmmUnreachableError: it lives and does not answer: call again.
        """
        ...

    def close(self) -> None:
        """End our side. Idempotent."""
        ...


class Driver(Protocol):
    """Starts VMMs of one kind."""

    @property
    def name(self) -> str:
        """As in VmSpec.driver."""
        ...

    async def version(self) -> str:
        """What the VMM calls itself; empty if there is none."""
        ...

    async def start(self, launch: Launch) -> Vmm:
        """A VMM whose guest is ready to run and does not run."""
        ...

    async def start_incoming(self, launch: Launch) -> Vmm:
        """A VMM that waits for a device state and has not touched the guest's memory."""
        ...

    async def adopt(self, process: Process, directory: Path) -> Vmm:
        """Take hold of a VMM that a former agent started.

        Raises:
            VmmUnreachableError: it is gone, or does not answer yet: the process may live.
        """
        ...

    async def arm(self, core: PageCore, target: ArmTarget) -> Armed:
        """Take control of the absent memory of a VMM that `start_incoming` has started.

        Raises:
            OSError, GodwitError: what failed; the VMM is of no use then.
        """
        ...

    async def take(self, core: PageCore, target: ArmTarget) -> Armed | None:
        """The same again after our death; None: the VMM needs nobody any more.

        Raises:
            OSError, GodwitError: try again.
        """
        ...

    async def start_checks(self, spec: VmSpec) -> Sequence[Check]:
        """Whether a VMM of this kind can run the spec here."""
        ...

    def arrival_checks(self, spec: VmSpec, uffd_features: Sequence[str]) -> Sequence[Check]:
        """Whether it can wait for its memory here, with these features of userfaultfd."""
        ...

    def find_orphan(self, directory: Path, ram_path: str) -> Process | None:
        """The VMM of this directory and memory, by what it was started with. Blocks."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRegion:
    """A range of guest-physical memory and where it lies in the RAM file."""

    gpa: int
    size_bytes: int
    file_offset: int
    page_size_bytes: int


def covers(regions: Sequence[tuple[int, int]], size_bytes: int) -> bool:
    """True if (offset, length) pairs, ascending, make up [0, size_bytes) without a gap."""
    end = 0
    for offset, length in regions:
        if offset != end or length <= 0:
            return False
        end += length
    return end == size_bytes
