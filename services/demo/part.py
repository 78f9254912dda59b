# SPDX-License-Identifier: Apache-2.0
"""One process of a cluster: start it, find out where it listens, kill it, start it again."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from services.common.errors import UnavailableError
from services.common.hooks import POLL_S
from services.fault_agent import processes

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 15.0
_LOG_TAIL_BYTES = 2000


class HookFiles:
    """The hook points of one part, from outside; services.common.hooks is the inside.

    A directory a part: a point that both agents have is held in one of them.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def hold(self, point: str) -> None:
        """Whoever reaches it waits until `release`."""
        self._order(point, "hold")

    def release(self, point: str) -> None:
        """Let go who waits there."""
        (self.directory / f"{point}.hold").unlink(missing_ok=True)

    def fail(self, point: str) -> None:
        """The next one to reach it fails there."""
        self._order(point, "fail")

    def skip(self, point: str) -> None:
        """Whoever reaches it leaves out what follows."""
        self._order(point, "skip")

    def exit(self, point: str) -> None:
        """The next one to reach it dies as by kill -9."""
        self._order(point, "exit")

    def is_reached(self, point: str) -> bool:
        """It was reached since it was last ordered anything."""
        return (self.directory / f"{point}.reached").exists()

    async def reached(self, point: str) -> None:
        """Wait until it is reached; bound it with asyncio.timeout."""
        while not self.is_reached(point):  # noqa: ASYNC110 - another process makes the file
            await asyncio.sleep(POLL_S)

    def _order(self, point: str, act: str) -> None:
        (self.directory / f"{point}.reached").unlink(missing_ok=True)
        (self.directory / f"{point}.{act}").touch()


class Part:
    """One process of the cluster. It prints `listening NAME=HOST:PORT ...` when it serves.

    Args:
        name: "orchestrator", "a.agent", "a.page-server", ...
        arguments: module and its arguments; `--NAME 127.0.0.1:0` is pinned to the port it got, so
            that a restart comes back where the others look for it.
        pinned: for each name it prints, the option that fixes it.
        hooked: its hook points are on; without, `hooks` does nothing and costs nothing.
        prefix: put before its command; must exec, so that the process is the part.
    """

    def __init__(
        self,
        name: str,
        arguments: list[str],
        *,
        pinned: Mapping[str, str],
        directory: Path,
        environment: Mapping[str, str],
        hooked: bool,
        prefix: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.arguments = arguments
        self.log = directory / "logs" / f"{name}.log"
        self.hooks = HookFiles(directory / "hooks" / name)
        self.addresses: dict[str, str] = {}
        self._pinned = pinned
        self._prefix = tuple(prefix)
        self._environment = dict(environment)
        if hooked:
            self._environment["GODWIT_HOOKS_DIR"] = str(self.hooks.directory)
        self._process: asyncio.subprocess.Process | None = None
        self.log.parent.mkdir(exist_ok=True)
        self.hooks.directory.mkdir(parents=True, exist_ok=True)

    @property
    def pid(self) -> int:
        """Its process id, while it runs."""
        if self._process is None:
            raise RuntimeError(f"{self.name} is not running")
        return self._process.pid

    @property
    def worker_pid(self) -> int:
        """The process that does the work: of a part with --respawn its child; 0: none just now."""
        pid = self.pid
        if "--respawn" not in self.arguments:
            return pid
        try:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except OSError:
            return 0
        return int(children[0]) if children else 0

    @property
    def is_running(self) -> bool:
        """False before its start and once it has ended, by whomever."""
        return self._process is not None and self._process.returncode is None

    async def start(self) -> processes.Process:
        """Start it and wait until it says where it listens.

        Raises:
            UnavailableError: PART_FAILED with the end of its log.
        """
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._prefix,
                sys.executable,
                "-m",
                *self.arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env=self._environment,
                # Ctrl-C in the terminal is for us: we end the parts, in order.
                start_new_session=True,
            )
        identity = processes.identify(self._process.pid)
        assert identity is not None, "an unreaped child has an entry in /proc"
        try:
            line = await self._first_line()
        except BaseException:
            await self.kill()
            raise
        if not line.startswith("listening "):
            await self.kill()
            tail = self.log.read_text(errors="replace")[-_LOG_TAIL_BYTES:]
            raise UnavailableError("PART_FAILED", f"{self.name} did not start: {line}{tail}")
        self.addresses = dict(word.split("=", 1) for word in line.split()[1:])
        for printed, option in self._pinned.items():
            self.arguments[self.arguments.index(option) + 1] = self.addresses[printed]
        return identity

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal; nothing happens if it has ended."""
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(number)

    async def kill(self) -> None:
        """Send SIGKILL and wait until it is gone."""
        self.signal(signal.SIGKILL)
        await self._gone()

    async def stop(self) -> None:
        """SIGTERM; SIGKILL if that takes too long."""
        self.signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self._gone()
        except TimeoutError:
            await self.kill()

    async def _first_line(self) -> str:
        assert self._process is not None
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                return (await self._process.stdout.readline()).decode(errors="replace")
        except TimeoutError:
            return f"silent for {START_TIMEOUT_S:g} s\n"

    async def _gone(self) -> None:
        if self._process is not None:
            await self._process.wait()
            self._process = None


def base_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """What every part is started with: ours, without a proxy that would catch loopback."""
    environment = {
        key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")
    }
    return {**environment, **(extra or {})}
