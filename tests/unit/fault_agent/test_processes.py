# SPDX-License-Identifier: Apache-2.0
"""Promise: a pid that was used again is never taken for the VMM, and dead means dead."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path

from services.fault_agent import processes


def spawn(tmp_path: Path, *command: str) -> processes.Process:
    return processes.spawn(command, directory=tmp_path, log=tmp_path / "log", pass_fds=())


async def test_a_process_is_known_by_its_start(tmp_path: Path) -> None:
    process = spawn(tmp_path, "sleep", "60")
    assert processes.identify(process.pid) == process
    assert processes.is_alive(process)
    other = replace(process, start_ticks=process.start_ticks - 1)
    assert not processes.is_alive(other)
    await processes.kill(other)
    assert processes.is_alive(process), "another process with that pid is left alone"
    await processes.kill(process)
    assert not processes.is_alive(process)
    assert processes.identify(process.pid) is None, "reaped"
    await processes.kill(process)


async def test_a_dead_child_that_nobody_reaped_is_dead(tmp_path: Path) -> None:
    process = spawn(tmp_path, "true")
    pidfd = processes.open_pidfd(process)
    await processes.wait_dead(process)
    assert not processes.is_alive(process)
    if pidfd is not None:
        os.close(pidfd)


async def test_a_name_with_parentheses(tmp_path: Path) -> None:
    program = tmp_path / "a) R (b"
    program.symlink_to("/bin/sleep")
    process = spawn(tmp_path, str(program), "60")
    assert processes.identify(process.pid) == process
    await processes.kill(process)


async def test_it_has_a_session_of_its_own_and_its_words_are_kept(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "go")
    process = spawn(tmp_path, "sh", "-c", "read go <go; echo out; echo err >&2")
    assert os.getsid(process.pid) == process.pid
    await asyncio.to_thread((tmp_path / "go").write_text, "go\n")
    await processes.wait_dead(process)
    assert sorted((tmp_path / "log").read_text().split()) == ["err", "out"]
