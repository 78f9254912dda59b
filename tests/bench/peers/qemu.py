# SPDX-License-Identifier: Apache-2.0
"""QEMU's own post-copy, from one QEMU to another over TCP on loopback.

Post-copy only: under TCG its pre-copy corrupts guests. It is switched PRECOPY_S after the start:
once a first pass is done it believes that it converges, and what is measured is stop and copy.
Its memory is anonymous, the kind that its own post-copy is quickest with.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.common.vm_spec import VmSpec
from services.demo.console import Console, ConsoleFollower
from services.fault_agent.drivers.command_line import Wiring, command_line
from services.fault_agent.drivers.qmp import QmpClient
from tests.bench.peers.guest import Move
from tests.bench.processes import REPO

PRECOPY_S = 0.03
START_S = 60.0
MOVE_S_MAX = 200.0
NEWEST_SUITE = "sid"
UNPACK_S = 180.0
_UNLIMITED = 10 << 30
_STAYS = ("postcopy-blocktime", "postcopy-latency", "postcopy-latency-dist")


@dataclass(frozen=True, slots=True, kw_only=True)
class Qemu:
    """One that can be started."""

    version: str
    """As "7.2"."""
    command: tuple[str, ...]
    arguments: tuple[str, ...] = ()
    """Where its ROMs are."""


def _version(command: Sequence[str]) -> str:
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    return ".".join(done.stdout.split()[3].split(".")[:2])


def system_qemu() -> Qemu | None:
    """The system's; None: there is none."""
    binary = shutil.which("qemu-system-x86_64")
    return Qemu(version=_version([binary]), command=(binary,)) if binary else None


def newest_qemu() -> tuple[Qemu | None, str]:
    """The newest that Debian packages, unpacked under build/; or why it cannot be had."""
    directory = REPO / "build/peers/qemu-newest"
    try:
        done = subprocess.run(
            [REPO / "tools/unpack_debian.sh", NEWEST_SUITE, directory, "qemu-system-x86"],
            capture_output=True,
            text=True,
            check=False,
            timeout=UNPACK_S,
        )
    except subprocess.TimeoutExpired:
        return None, f"it was not there after {UNPACK_S:.0f} s"
    if done.returncode != 0:
        return None, done.stderr.strip()
    command = (str(directory / "run"), "qemu-system-x86_64")
    share = directory / "root/usr/share"
    roms = ("-L", str(share / "qemu"), "-L", str(share / "seabios"))
    return Qemu(version=_version(command), command=command, arguments=roms), ""


@dataclass(slots=True, kw_only=True)
class _Running:
    process: asyncio.subprocess.Process
    qmp: QmpClient
    console: Console


class QemuGuest:
    """A guest that goes from QEMU to QEMU."""

    def __init__(
        self, qemu: Qemu, spec: VmSpec, directory: Path, follower: ConsoleFollower
    ) -> None:
        self._qemu = qemu
        self._spec = spec
        self._directory = directory
        self._follower = follower
        self._now: _Running | None = None
        self.consoles: list[Console] = []

    async def start(self) -> None:
        """Boot it; it is not up yet."""
        self._now = await self._launch(incoming=False)
        self.consoles.append(self._now.console)
        await self._now.qmp.execute("cont")

    def vmm_pid(self) -> int:
        """Of the QEMU that it runs in."""
        assert self._now is not None
        return self._now.process.pid

    async def move(self, cap: int, *, preempt: bool) -> Move:
        """To a new QEMU.

        Raises:
            RuntimeError: the migration failed.
            TimeoutError: it does not end.
        """
        source = self._now
        assert source is not None
        destination = await self._launch(incoming=True)
        try:
            move = await _migrate(source.qmp, destination.qmp, cap, preempt=preempt)
        except BaseException:
            await _end(destination)
            raise
        self._now = destination
        self.consoles.append(destination.console)
        await _end(source)
        return move

    async def close(self) -> None:
        """End it."""
        if self._now is not None:
            await _end(self._now)

    async def _launch(self, *, incoming: bool) -> _Running:
        number = len(self.consoles)
        directory = self._directory / str(number)
        directory.mkdir(parents=True)
        console = self._follower.add(directory / "console.log", node=str(number), epoch=number)
        process = await asyncio.create_subprocess_exec(
            *self._command(incoming=incoming),
            cwd=directory,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=(directory / "out").open("wb"),
            stderr=asyncio.subprocess.STDOUT,
        )
        qmp = await QmpClient.connect(
            directory / "qmp.sock", timeout_s=START_S, alive=lambda: process.returncode is None
        )
        return _Running(process=process, qmp=qmp, console=console)

    def _command(self, *, incoming: bool) -> list[str]:
        wiring = Wiring(
            binary=self._qemu.command[0], ram_path=Path("ram"), tap_fds=[], incoming=incoming
        )
        line = command_line(self._spec, wiring)
        changed = []
        for word in line[1:]:
            if word.startswith("memory-backend-file,"):
                changed.append(f"memory-backend-ram,id=ram0,size={self._spec.memory_bytes}")
            elif word.startswith("pipe,id=console0"):
                changed.append("file,id=console0,path=console.log")
            elif word != "-S" or not incoming:  # it starts by itself: nobody journals here
                changed.append(word)
        return [*self._qemu.command, *changed, *self._qemu.arguments]


async def _end(running: _Running) -> None:
    running.qmp.close()
    with contextlib.suppress(ProcessLookupError):
        running.process.kill()
    await running.process.wait()


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


async def _migrate(source: QmpClient, destination: QmpClient, cap: int, *, preempt: bool) -> Move:
    wanted = {"events": True, "postcopy-ram": True, "postcopy-preempt": preempt}
    capabilities = [{"capability": name, "state": state} for name, state in wanted.items()]
    blocktime = {"capability": "postcopy-blocktime", "state": True}
    await source.execute("migrate-set-capabilities", {"capabilities": capabilities})
    await destination.execute(
        "migrate-set-capabilities", {"capabilities": [*capabilities, blocktime]}
    )
    limits = {"max-bandwidth": cap or _UNLIMITED, "max-postcopy-bandwidth": cap}
    await source.execute("migrate-set-parameters", limits)
    uri = {"uri": f"tcp:127.0.0.1:{_free_port()}"}
    with source.events("MIGRATION") as events:
        await destination.execute("migrate-incoming", uri)
        begin_s = time.monotonic()
        await source.execute("migrate", uri)
        async with asyncio.timeout(MOVE_S_MAX):
            await _until(events, "active")
            await asyncio.sleep(PRECOPY_S)
            switch_s = time.monotonic()
            await source.execute("migrate-start-postcopy")
            await _until(events, "completed")
        end_s = time.monotonic()
    said: dict[str, Any] = await destination.execute("query-migrate")
    return Move(
        memory_s=end_s - switch_s,
        total_s=end_s - begin_s,
        said={name: said[name] for name in _STAYS if name in said},
    )


async def _until(events: Any, status: str) -> None:
    while (said := (await events.next())["status"]) != status:
        if said in ("failed", "cancelled", "postcopy-paused"):
            raise RuntimeError(f"QEMU's migration is {said}")
