# SPDX-License-Identifier: Apache-2.0
"""Holds off a shutdown of the machine while guests' memory is kept here.

By systemd-logind's block inhibitor, which `systemd-inhibit` holds for as long as it lives: ours is
a child that waits for its standard input to end, so that a killed keeper takes it along.
`reboot --force`, a power button held down and a failing supply do not ask anybody.

Source: systemd-inhibit(1); INHIBITOR_LOCKS.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from pathlib import Path

log = logging.getLogger(__name__)

PROGRAM = "systemd-inhibit"
BUS = Path("/run/dbus/system_bus_socket")
END_S = 5.0


def why_not(program: str = PROGRAM, bus: Path = BUS) -> str:
    """Why no shutdown can be held off here; empty if it can."""
    if shutil.which(program) is None:
        return f"{program} is not on PATH"
    return "" if bus.is_socket() else f"{bus} is not there"


class Inhibitor:
    """The lock, held or not. Used by one thread."""

    def __init__(self, program: str = PROGRAM) -> None:
        self._program = program
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def held(self) -> bool:
        """Whether the child lives: logind may have refused it."""
        return self._child is not None and self._child.poll() is None

    def set(self, why: str) -> None:
        """Hold it, because of `why`; empty: let go. Taken again if it was lost."""
        if not why:
            self.release()
            return
        if self.held:
            return
        if self._child is not None:
            log.warning("the shutdown inhibitor ended with %s: taken again", self._child.returncode)
        self.release()
        self._child = subprocess.Popen(
            [
                self._program,
                "--what=shutdown",
                "--mode=block",
                "--who=godwit",
                f"--why={why}",
                "cat",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env={"PATH": os.environ.get("PATH", os.defpath)},
        )

    def release(self) -> None:
        """Let a shutdown through."""
        child, self._child = self._child, None
        if child is None:
            return
        assert child.stdin is not None
        child.stdin.close()
        try:
            child.wait(END_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
