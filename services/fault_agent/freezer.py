# SPDX-License-Identifier: Apache-2.0
"""Stops every thread of a VMM at once, and lets them go on. docs/adr/0008-freeze.md.

By the freezer of a cgroup of its own where a cgroup v2 hierarchy can be written, else by SIGSTOP.
Whether a VMM is frozen is the kernel's knowledge alone: no record says it, so that none can be
wrong after a death of ours. A frozen process can be killed either way, and its memory be filled.
Blocks for microseconds: a few small files of kernel file systems.

Source: Documentation/admin-guide/cgroup-v2.rst (cgroup.freeze), proc_pid_cgroup(5), signal(7).
"""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import signal
from pathlib import Path

from services.fault_agent import processes
from services.fault_agent.processes import Process

log = logging.getLogger(__name__)

PREFIX = "godwit-vmm-"


class How(enum.StrEnum):
    """What stops a VMM."""

    CGROUP = "cgroup"
    SIGNAL = "signal"


def find_cgroup2(mountinfo: str | None = None) -> Path | None:
    """Where the cgroup v2 hierarchy is mounted, alone or beside v1; None: nowhere."""
    text = Path("/proc/self/mountinfo").read_text() if mountinfo is None else mountinfo
    for line in text.splitlines():
        fields = line.split(" ")
        if fields[fields.index("-") + 1] == "cgroup2":
            return Path(fields[4].encode().decode("unicode_escape"))
    return None


def _cgroup_of(root: Path, pid: int | str) -> Path | None:
    """The v2 cgroup of a process; None if it is gone, or outside of what we see."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            number, _, path = line.split(":", 2)
            if number == "0" and not path.startswith("/.."):
                return root / path.lstrip("/")
    return None


class Freezer:
    """Freezes and thaws VMMs of this machine."""

    def __init__(self, root: Path | None) -> None:
        """`root`: of the cgroup v2 hierarchy; None: there is none, SIGSTOP it is."""
        self._root = root
        self._told = False

    def freeze(self, process: Process) -> How | None:
        """Stop it, unless it stands still already; None: it is gone.

        A thread that is inside the kernel, waiting for a page, stops when it comes out.

        Raises:
            OSError: neither way worked: it runs.
        """
        if self.is_frozen(process):
            return How.SIGNAL if self._is_stopped(process) else How.CGROUP
        try:
            cgroup = self._own_cgroup(process)
            if cgroup is not None:
                (cgroup / "cgroup.freeze").write_text("1")
                return How.CGROUP
        except OSError as error:
            if not processes.is_alive(process):
                return None
            self._tell(str(error))
        return How.SIGNAL if _send(process, signal.SIGSTOP) else None

    def thaw(self, process: Process) -> None:
        """Let it go on, whoever stopped it and by whatever. Nothing for one that is gone.

        Raises:
            OSError: it stands still; try again.
        """
        if not processes.is_alive(process):
            return
        if (cgroup := self._frozen_by(process)) is not None:
            (cgroup / "cgroup.freeze").write_text("0")
        if self._is_stopped(process):
            _send(process, signal.SIGCONT)

    def is_frozen(self, process: Process) -> bool:
        """True if it stands still, or is about to, and can be thawed."""
        if not processes.is_alive(process):
            return False
        return self._frozen_by(process) is not None or self._is_stopped(process)

    def sweep(self) -> None:
        """Remove cgroups whose VMM is gone."""
        parent = _cgroup_of(self._root, "self") if self._root else None
        if parent is None:
            return
        with contextlib.suppress(OSError):
            for cgroup in parent.glob(f"{PREFIX}*"):
                with contextlib.suppress(OSError):  # EBUSY: somebody is in it
                    cgroup.rmdir()

    def _own_cgroup(self, process: Process) -> Path | None:
        """The VMM's cgroup, made and entered if need be. Below its present one: limits stay."""
        if self._root is None:
            self._tell("no cgroup v2 hierarchy is mounted")
            return None
        present = _cgroup_of(self._root, process.pid)
        if present is None:
            self._tell(f"the cgroup of process {process.pid} is not visible here")
            return None
        if present.name.startswith(PREFIX):
            return present
        own = present / f"{PREFIX}{process.pid}-{process.start_ticks}"
        own.mkdir(exist_ok=True)
        (own / "cgroup.procs").write_text(str(process.pid))
        return own

    def _frozen_by(self, process: Process) -> Path | None:
        cgroup = _cgroup_of(self._root, process.pid) if self._root else None
        if cgroup is None or not cgroup.name.startswith(PREFIX):
            return None  # only one that we made: a frozen container is not ours to thaw
        with contextlib.suppress(OSError):
            if (cgroup / "cgroup.freeze").read_text().strip() == "1":
                return cgroup
        return None

    def _is_stopped(self, process: Process) -> bool:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                if line.startswith("State:"):
                    return line.split()[1] == "T"
        return False

    def _tell(self, why: str) -> None:
        if not self._told:
            self._told = True
            log.warning("VMMs are frozen by SIGSTOP, not by a cgroup: %s", why)


def _send(process: Process, number: signal.Signals) -> bool:
    """False: it is gone."""
    pidfd = processes.open_pidfd(process)
    if pidfd is None:
        return False
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(pidfd)
    return True
