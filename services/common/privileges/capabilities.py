# SPDX-License-Identifier: Apache-2.0
"""Capabilities: a process keeps those that it names and gives the others up, for good.

They are the thread's, not the process's: this comes first in main(), before there is a second
thread. What is given up is given up in the bounding set too and with no_new_privs, so that no
program that is started from here has it either: a VMM has at most what its agent kept.

Source: capabilities(7), capset(2), prctl(2), linux/capability.h.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import logging
import os
import struct
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from services.common.errors import InvalidArgumentError

log = logging.getLogger(__name__)

_VERSION_3 = 0x20080522
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_LOWER = 3
_LAST = Path("/proc/sys/kernel/cap_last_cap")
_STATUS = Path("/proc/thread-self/status")


class Capability(enum.IntEnum):
    """Those that a Godwit process may be told to keep. The others have no use here."""

    DAC_OVERRIDE = 1
    NET_BIND_SERVICE = 10
    NET_ADMIN = 12
    IPC_LOCK = 14
    SYS_PTRACE = 19
    SYS_ADMIN = 21
    SYS_NICE = 23
    SYS_RESOURCE = 24


_KNOWN = {int(item): item for item in Capability}

WHY = {
    Capability.DAC_OVERRIDE: "disks, devices and state that belong to another user",
    Capability.NET_BIND_SERVICE: "listens below port 1024",
    Capability.NET_ADMIN: "tap devices of virtual machines",
    Capability.IPC_LOCK: "guest memory that is locked",
    Capability.SYS_PTRACE: "a userfaultfd inside a VMM, and what the VMM's process says of itself",
    Capability.SYS_ADMIN: "tap devices in a network namespace of their own",
    Capability.SYS_NICE: "a VMM that chooses its scheduling",
    Capability.SYS_RESOURCE: "limits above the hard ones",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What the calling thread may do; numbers of linux/capability.h."""

    permitted: frozenset[int]
    bounding: frozenset[int]
    no_new_privs: bool

    def __str__(self) -> str:
        kept = ", ".join(
            f"CAP_{_KNOWN[number].name} ({WHY[_KNOWN[number]]})"
            if number in _KNOWN
            else f"capability {number}"
            for number in sorted(self.permitted)
        )
        new = "no new privileges" if self.no_new_privs else "new privileges can be gained"
        return f"user {os.geteuid()}, keeps {kept or 'no capability'}; {new}"


def parse_capability(text: str) -> Capability:
    """CAP_SYS_ADMIN or sys_admin, as a command line says it.

    Raises:
        InvalidArgumentError: no process of ours has a use for it.
    """
    name = text.upper().removeprefix("CAP_")
    if name not in Capability.__members__:
        known = ", ".join(item.name.lower() for item in Capability)
        raise InvalidArgumentError("FIELD_INVALID", f"capability {text!r} is none of {known}")
    return Capability[name]


def held(status: Path = _STATUS) -> Held:
    """What the calling thread has now, by the kernel's word."""
    fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
    return Held(
        permitted=_numbers(int(fields["CapPrm"], 16)),
        bounding=_numbers(int(fields["CapBnd"], 16)),
        no_new_privs=fields["NoNewPrivs"].strip() == "1",
    )


def keep_only(kept: Collection[Capability]) -> None:
    """Give up every capability but `kept`, of those that there are. Once for all threads to come.

    Raises:
        OSError: the kernel will not, which no kernel has reason for.
    """
    before = held()
    numbers = frozenset(int(item) for item in kept)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1, 0)
    for number in before.permitted - numbers:
        # Lowered by itself where it is no longer permitted; older kernels want it said.
        _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_LOWER, number, tolerate=errno.EINVAL)
    for number in range(int(_LAST.read_text()) + 1):
        if number not in numbers and number in before.bounding:
            # EPERM: without CAP_SETPCAP, as an ordinary user, it stays and is of no use: new
            # privileges cannot be gained any more.
            _prctl(_PR_CAPBSET_DROP, number, 0, tolerate=errno.EPERM)
    if before.permitted <= numbers:
        return  # a supervisor has seen to it, and may have forbidden the call as well
    mask = _mask(before.permitted & numbers)
    inheritable = mask & _mask(_numbers(_inheritable()))
    words = [part >> shift & 0xFFFFFFFF for shift in (0, 32) for part in (mask, mask, inheritable)]
    header = struct.pack("=Ii", _VERSION_3, 0)
    if _libc.capset(header, struct.pack("=6I", *words)):
        raise _error("capset")


def log_held() -> None:
    """Say once, in the log, what is kept and for what."""
    log.info("privileges: %s", held())


_libc = ctypes.CDLL(None, use_errno=True)


def _error(call: str) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, f"{os.strerror(code)} [{call}]")


def _prctl(option: int, first: int, second: int, *, tolerate: int = 0) -> None:
    arguments = (ctypes.c_ulong(value) for value in (first, second, 0, 0))
    if _libc.prctl(option, *arguments) and ctypes.get_errno() != tolerate:
        raise _error(f"prctl {option}")


def _inheritable() -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith("CapInh:"):
            return int(line.split()[1], 16)
    return 0


def _numbers(mask: int) -> frozenset[int]:
    return frozenset(number for number in range(64) if mask >> number & 1)


def _mask(numbers: Collection[int]) -> int:
    return sum(1 << number for number in numbers)
