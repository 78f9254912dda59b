# SPDX-License-Identifier: Apache-2.0
"""Landlock: a thread that may open only what lies beneath the paths it names.

It holds for the calling thread and those that it starts later: confine a process while it has one.
A right is tied to the directory that is there now, not to its name: what is mounted over it later
is outside. The /proc/PID of other processes shows a confined one no more than a stranger may see.

Source: Documentation/userspace-api/landlock.rst, landlock_restrict_self(2), linux/landlock.h.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Collection
from pathlib import Path

_CREATE, _ADD_RULE, _RESTRICT = 444, 445, 446
_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1

_WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 1, 1 << 2, 1 << 3
_FILE_RIGHTS_BY_ABI = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
"""What each version of the interface can withhold more: execute to make-symlink; refer; truncate;
ioctl on devices."""
_OF_FILES = _WRITE_FILE | _READ_FILE | 1 << 14 | 1 << 15
_READ = _READ_FILE | _READ_DIR
_EXECUTE = 1

_libc = ctypes.CDLL(None, use_errno=True)


def abi() -> int:
    """The version of the interface that this kernel offers; 0: none, or switched off."""
    version = int(_libc.syscall(_CREATE, None, ctypes.c_size_t(0), _CREATE_RULESET_VERSION))
    return max(version, 0)


def confine(*, read: Collection[Path], change: Collection[Path] = ()) -> int:
    """From now on this thread opens nothing but what lies beneath these paths; the abi, 0: it may.

    What is open stays open. Paths that are not there are left out.

    Args:
        read: to be read, not executed.
        change: to be read, written, made and removed; not executed.

    Raises:
        OSError: the kernel has landlock, and refused.
    """
    version = abi()
    if version == 0:
        return 0
    handled = sum(bits for since, bits in _FILE_RIGHTS_BY_ABI.items() if since <= version)
    ruleset = _call(_CREATE, struct.pack("=Q", handled), ctypes.c_size_t(8), 0)
    try:
        for paths, rights in ((read, _READ), (change, handled & ~_EXECUTE)):
            for path in paths:
                _allow(ruleset, path, rights & handled)
        _call(_RESTRICT, ruleset, 0)
    finally:
        os.close(ruleset)
    return version


def _allow(ruleset: int, path: Path, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            rights &= _OF_FILES
        _call(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, struct.pack("=Qi", rights, fd), 0)
    finally:
        os.close(fd)


def _call(number: int, *arguments: object) -> int:
    result = int(_libc.syscall(number, *arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{os.strerror(code)} [landlock {number}]")
    return result
