# SPDX-License-Identifier: Apache-2.0
"""What every mover's guest is and can do; one is awake at a time, the others are stopped."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import dataclass, field
from typing import Any, Protocol

from services.common.vm_spec import VmSpec
from services.demo.console import Console, ConsoleFollower, Record, Sweep
from services.demo.guest_image import GuestImage, Workload
from services.demo.live_guest import make_spec
from tests.bench.peers.beats import Cost, cost

MEMORY_MIB = 512
WORKLOAD_MIB = 256
HEARTBEAT_MS = 5
BOOT_S_MAX = 240.0
SETTLE_S = 2.0
"""Awake before it is moved: longer than what full speed is taken from."""
LISTEN_S = 1.3
"""How long it is listened to after the switch at least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """How one went, by the mover's clock."""

    memory_s: float
    """From the order to switch until the whole memory is at the destination."""
    total_s: float
    """From the request until then; a mover that starts its own VMMs has that in it."""
    said: dict[str, Any] = field(default_factory=dict)
    """What it says about itself."""


class Guest(Protocol):
    """A running guest with a mover."""

    @property
    def consoles(self) -> list[Console]:
        """Of its runs, in order."""
        ...

    async def move(self, cap: int, *, preempt: bool) -> Move:
        """Move it; `cap`: bytes/s of what nobody waits for, or of all if that is all it can."""
        ...

    def vmm_pid(self) -> int:
        """Of the VMM that it runs in now."""
        ...

    async def close(self) -> None:
        """End it."""
        ...


def workload() -> Workload:
    """Every guest's."""
    return Workload(mib=WORKLOAD_MIB, dirty_rate=0, heartbeat_ms=HEARTBEAT_MS)


def spec(vm_id: str, image: GuestImage) -> VmSpec:
    """Every guest's."""
    return make_spec(vm_id, image=image, workload=workload(), memory_bytes=MEMORY_MIB << 20)


def is_up(record: Record) -> bool:
    """It has filled its memory."""
    return isinstance(record, Sweep) and record.state == "begin"


async def wait_up(follower: ConsoleFollower, console: Console) -> None:
    """Until it has filled its memory.

    Raises:
        TimeoutError: it does not.
    """
    async with asyncio.timeout(BOOT_S_MAX):
        await follower.wait_for(console, is_up)


def sleep(guest: Guest) -> None:
    """Stop its VMM where it is: it costs nothing and loses nothing."""
    os.kill(guest.vmm_pid(), signal.SIGSTOP)


def wake(guest: Guest) -> None:
    """Let it go on."""
    os.kill(guest.vmm_pid(), signal.SIGCONT)


async def measure(guest: Guest, cap: int, *, preempt: bool) -> tuple[Move, Cost]:
    """Wake it, let it run, move it, listen to it, put it to sleep."""
    wake(guest)
    try:
        await asyncio.sleep(SETTLE_S)
        move = await guest.move(cap, preempt=preempt)
        await asyncio.sleep(LISTEN_S)
        return move, cost(guest.consoles[-2], guest.consoles[-1])
    finally:
        sleep(guest)
