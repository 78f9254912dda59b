# SPDX-License-Identifier: Apache-2.0
"""What a cluster leaves on the host when nobody could clean up, and how the next one finds it.

Guest memory lies on tmpfs: forgotten, it is lost to everybody until the next boot. So its directory
says whose it is (`owner.json`: processes, state directory) and is locked (flock) as long as the
owner lives; a directory of ours without a lock is a dead run's. The VMMs are found through the
journals, by pid and start time: never by name.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from services.common.errors import GodwitError
from services.fault_agent import journal, processes

PREFIX = "godwit-"
_OWNER = "owner.json"


@dataclass(slots=True, kw_only=True)
class Claim:
    """A directory on a tmpfs that is ours while we live.

    Attributes:
        path: the directory.
        state_dir: where the cluster's nodes keep their journals, one directory a node.
        parts: the processes that were started, until they are known to be gone.
    """

    path: Path
    state_dir: Path
    parts: list[processes.Process] = field(default_factory=list)

    def add(self, process: processes.Process) -> None:
        """A process was started."""
        self.parts.append(process)
        self.write()

    def write(self) -> None:
        """Tell whoever comes after us."""
        scratch = self.path / f".{_OWNER}"
        text = json.dumps(
            {"state_dir": str(self.state_dir), "parts": [asdict(part) for part in self.parts]}
        )
        scratch.write_text(text)
        scratch.rename(self.path / _OWNER)


@asynccontextmanager
async def claimed(parent: Path, state_dir: Path) -> AsyncIterator[Claim]:
    """Make a directory below the tmpfs `parent`; at the end kill what it lists and remove it."""
    path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{state_dir.name}-", dir=parent))
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    claim = Claim(path=path, state_dir=state_dir)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        claim.write()
        yield claim
    finally:
        await _end(claim)
        os.close(lock)


async def remove_stale(parent: Path) -> list[Path]:
    """End what dead runs have left below `parent`; the directories that were removed."""
    removed = []
    for path in sorted(parent.glob(f"{PREFIX}*")):  # noqa: ASYNC240 - tmpfs
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            continue  # not a directory, or somebody else was quicker
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            claim = _read(path)
            if claim is not None:
                await _end(claim)
                removed.append(path)
        except BlockingIOError:
            continue  # in use
        finally:
            os.close(lock)
    return removed


def journaled_vmms(state_dir: Path) -> list[processes.Process]:
    """Every VMM that a journal below `state_dir`/NODE names, alive or not."""
    found = []
    for path in sorted(state_dir.glob(f"*/vms/*/{journal.FILE}")):
        with contextlib.suppress(GodwitError, OSError):
            record = journal.read(path)
            # After another boot its number may be anybody's.
            if record.process is not None and record.boot_id == processes.boot_id():
                found.append(record.process)
    return found


async def _end(claim: Claim) -> None:
    """The parts first: an agent that lives could start a VMM behind our back."""
    await _kill(claim.parts)
    await _kill(journaled_vmms(claim.state_dir))
    await asyncio.to_thread(shutil.rmtree, claim.path, ignore_errors=True)


async def _kill(listed: Iterable[processes.Process]) -> None:
    for process in listed:
        await processes.kill(process)


def _read(path: Path) -> Claim | None:
    """None: not a claim of ours, whatever its name says."""
    try:
        owner = json.loads((path / _OWNER).read_text())
        return Claim(
            path=path,
            state_dir=Path(owner["state_dir"]),
            parts=[processes.Process(**part) for part in owner["parts"]],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
