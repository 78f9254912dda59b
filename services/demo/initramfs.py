# SPDX-License-Identifier: Apache-2.0
"""Write an initramfs: a gzipped cpio archive, the same bytes for the same content.

Neither cpio(1) nor root is needed, and device nodes can be in it.
Source: the kernel's Documentation/driver-api/early-userspace/buffer-format.rst ("newc").
"""

from __future__ import annotations

import gzip
import stat
from dataclasses import dataclass

_TRAILER = "TRAILER!!!"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One file of the archive.

    Attributes:
        path: relative to the guest's root, without a leading slash.
        mode: type and permission bits, as in struct stat.
        data: content, of a symbolic link its target; empty for directories and nodes.
        device: (major, minor) of a device node.
    """

    path: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def directory(path: str) -> Entry:
    """A directory; parents must come before it."""
    return Entry(path=path, mode=stat.S_IFDIR | 0o755)


def regular(path: str, data: bytes, *, executable: bool = False) -> Entry:
    """A regular file."""
    return Entry(path=path, mode=stat.S_IFREG | (0o755 if executable else 0o644), data=data)


def symlink(path: str, target: str) -> Entry:
    """A symbolic link."""
    return Entry(path=path, mode=stat.S_IFLNK | 0o777, data=target.encode())


def character_device(path: str, major: int, minor: int) -> Entry:
    """A character device node."""
    return Entry(path=path, mode=stat.S_IFCHR | 0o600, device=(major, minor))


def archive(entries: list[Entry]) -> bytes:
    """The gzipped archive; owner root, time 0, inode numbers by position."""
    parts = [_member(number, entry) for number, entry in enumerate(entries, start=1)]
    parts.append(_member(0, Entry(path=_TRAILER, mode=0)))
    return gzip.compress(b"".join(parts), compresslevel=6, mtime=0)


def _member(inode: int, entry: Entry) -> bytes:
    name = entry.path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (
        inode,
        entry.mode,
        0,  # uid
        0,  # gid
        links,
        0,  # mtime
        len(entry.data),
        0,  # device the file is on
        0,
        entry.device[0],
        entry.device[1],
        len(name),
        0,  # checksum, unused by newc
    )
    header = b"070701" + b"".join(b"%08X" % field for field in fields)
    return _padded(header + name) + _padded(entry.data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
