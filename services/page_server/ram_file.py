# SPDX-License-Identifier: Apache-2.0
"""Opens the memory behind an image, and nothing else.

This process may read any file of the node, and what it opens it sends over the network.
"""

from __future__ import annotations

import ctypes
import os
import re
import stat
from errno import EACCES

from services.common.errors import FailedPreconditionError

TMPFS_MAGIC = 0x01021994
HUGETLBFS_MAGIC = 0x958458F6
"""linux/magic.h. A memfd is on one of them."""

_PROC_FD = re.compile(r"/proc/\d+/fd/\d+")
_STATFS_WORDS = 32
"""More than struct statfs has on any 64-bit machine; its first word is f_type."""

_libc = ctypes.CDLL(None, use_errno=True)


def filesystem_type(fd: int) -> int:
    """f_type of the file system that holds `fd`. Source: fstatfs(2)."""
    words = (ctypes.c_long * _STATFS_WORDS)()
    if _libc.fstatfs(fd, words):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(words[0])


def _refuse(message: str, hint: str = "") -> FailedPreconditionError:
    return FailedPreconditionError("RAM_FILE_REFUSED", message, hint=hint)


def open_ram(path: str, inode: int) -> int:
    """Open the RAM file at `path`, read-only; the caller closes it.

    A symbolic link is not followed, except the one that /proc/PID/fd/N is; that it still leads to
    the same memory, and not to what another process has under that number now, the inode proves.

    Raises:
        FailedPreconditionError: RAM_FILE_REFUSED: it cannot be opened or is not that memory.
    """
    no_follow = 0 if _PROC_FD.fullmatch(path) else os.O_NOFOLLOW
    try:
        # O_NONBLOCK: opening a FIFO that somebody has put there must not hang a reload.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | no_follow)
    except OSError as error:
        outside = "is it beneath the page server's --ram-dir?" if error.errno == EACCES else ""
        raise _refuse(f"{path}: {error.strerror}", outside) from error
    return check_ram(fd, path, inode)


def check_ram(fd: int, path: str, inode: int) -> int:
    """`fd` if it is the memory that a record says; it is closed else.

    Raises:
        FailedPreconditionError: RAM_FILE_REFUSED.
    """
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise _refuse(f"{path} is not a regular file")
        if filesystem_type(fd) not in (TMPFS_MAGIC, HUGETLBFS_MAGIC):
            raise _refuse(f"{path} is not memory", "guest memory is on tmpfs, hugetlbfs or a memfd")
        if found.st_ino != inode:
            raise _refuse(f"{path} is inode {found.st_ino} now, the record says {inode}")
    except BaseException:
        os.close(fd)
        raise
    return fd
