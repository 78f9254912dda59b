# SPDX-License-Identifier: Apache-2.0
"""VMM processes: proof of who they are, proof that they are dead.

A pid alone proves nothing after a restart of the agent: it may have been used again. A process is
named by pid and start time, and held by a pidfd, which never changes its mind.
Source: proc_pid_stat(5) field 22, pidfd_open(2), pidfd_send_signal(2).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_STAT_START_TIME = 19  # counted after the closing parenthesis of the name; field 22 in the manual


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A process, beyond doubt, until the next boot."""

    pid: int
    start_ticks: int
    """Start time in clock ticks since boot."""


def boot_id() -> str:
    """Of the running kernel: changes with every boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def identify(pid: int) -> Process | None:
    """The process that has `pid` now; None if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name may hold spaces and parentheses: only the last parenthesis ends it.
    fields = stat[stat.rindex(")") + 2 :].split()
    return Process(pid=pid, start_ticks=int(fields[_STAT_START_TIME]))


def open_pidfd(process: Process) -> int | None:
    """A pidfd of exactly this process; None if it is gone. The caller closes it."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return None
    # Looked at after the pidfd is held: from here on the pid cannot be given to another.
    if identify(process.pid) != process:
        os.close(pidfd)
        return None
    return pidfd


def _ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def is_alive(process: Process) -> bool:
    """False if it has exited, reaped or not."""
    pidfd = open_pidfd(process)
    if pidfd is None:
        return False
    try:
        return not _ended(pidfd)
    finally:
        os.close(pidfd)


async def wait_dead(process: Process) -> None:
    """Return once the process has exited, all its threads included; reap it if it is our child."""
    pidfd = open_pidfd(process)
    if pidfd is None:
        return
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(pidfd, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)
    reap(process)


def reap(process: Process) -> None:
    """Take the exit status of a dead child, so that its pid is free; nothing for others."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(process.pid, os.WNOHANG)


async def kill(process: Process) -> None:
    """SIGKILL, and return once it is proved dead. Nothing if it is dead already."""
    pidfd = open_pidfd(process)
    if pidfd is None:
        return
    try:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    finally:
        os.close(pidfd)
    await wait_dead(process)


def spawn(
    command: Sequence[str], *, directory: Path, log: Path, pass_fds: Sequence[int]
) -> Process:
    """Start a process that outlives us: its own session, no terminal, output appended to `log`.

    Raises:
        OSError: the program cannot be started.
    """
    with log.open("ab") as output:
        child = subprocess.Popen(
            command,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=pass_fds,
            start_new_session=True,
        )
    process = identify(child.pid)
    assert process is not None, "an unreaped child has an entry in /proc"
    # Told that it is over, Popen neither waits for the child nor complains that it still runs when
    # it is collected: the child is meant to stay. wait_dead reaps it.
    child.returncode = 0
    return process
