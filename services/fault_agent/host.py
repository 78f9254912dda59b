# SPDX-License-Identifier: Apache-2.0
"""Facts about the machine that preflight and Hello tell."""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

_KVM_CREATE_VM = 0xAE01
_F_OFD_GETLK = 36
_SECTOR_BYTES = 4096

QEMU_LOCK_BYTES = (100, 300)
"""Where QEMU holds its locks in an image file: one byte a permission, from 100 and from 200."""

_SHMEM_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """The file system behind a path."""

    fs_type: str
    options: frozenset[str]
    """Of the mount and of the file system."""


def _meminfo(name: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def memory_total_bytes() -> int:
    """Of the machine."""
    return _meminfo("MemTotal")


def memory_available_bytes(ram_dir: Path) -> int:
    """What a new guest could take: of the machine's memory and of the tmpfs that holds it."""
    file_system = os.statvfs(ram_dir)
    return min(_meminfo("MemAvailable"), file_system.f_bavail * file_system.f_frsize)


def find_mount(path: Path, mountinfo: str | None = None) -> Mount:
    """The mount that `path` is on. Source: proc_pid_mountinfo(5)."""
    device = path.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    text = Path("/proc/self/mountinfo").read_text() if mountinfo is None else mountinfo
    for line in text.splitlines():
        fields = line.split(" ")
        if fields[2] != wanted:
            continue
        dash = fields.index("-")
        options = frozenset((*fields[5].split(","), *fields[dash + 3].split(",")))
        return Mount(fs_type=fields[dash + 1], options=options)
    return Mount(fs_type="", options=frozenset())


def huge_pages_of(mount: Mount) -> str:
    """The huge= option of a tmpfs: "never" unless it says otherwise."""
    for option in mount.options:
        if option.startswith("huge="):
            return option.removeprefix("huge=")
    return "never"


def shmem_forced() -> bool:
    """True if the kernel is told to use huge pages on every tmpfs, whatever its mount says."""
    try:
        return "[force]" in _SHMEM_ENABLED.read_text()
    except OSError:
        return False


def why_no_kvm() -> str:
    """Why a KVM guest cannot be made here; empty if it can."""
    try:
        device = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return f"/dev/kvm: {error.strerror}"
    try:
        os.close(fcntl.ioctl(device, _KVM_CREATE_VM, 0))
    except OSError as error:
        return f"KVM_CREATE_VM: {error.strerror}"
    finally:
        os.close(device)
    return ""


def why_no_direct_io(path: str) -> str:
    """Why a disk cannot be read past the page cache; empty if it can. Blocks."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        return error.strerror or str(error)
    try:
        # A page of our own: O_DIRECT wants aligned memory.
        with mmap.mmap(-1, _SECTOR_BYTES) as buffer:
            os.preadv(fd, [buffer], 0)
    except OSError as error:
        return error.strerror or str(error)
    finally:
        os.close(fd)
    return ""


def is_locked_by_vmm(path: str) -> bool:
    """True if a QEMU holds its lock on this file: on the file itself, whatever node it runs on."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        first, end = QEMU_LOCK_BYTES
        # struct flock: would a write lock on the whole range be granted?
        query = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, first, end - first, 0)
        answer = fcntl.fcntl(fd, _F_OFD_GETLK, query)
        return bool(struct.unpack("hhqqi4x", answer)[0] != fcntl.F_UNLCK)
    finally:
        os.close(fd)


def is_regular_file(path: str) -> bool:
    """Links followed."""
    return stat.S_ISREG(Path(path).stat().st_mode)


def maps_shared(pid: int, inode: int) -> bool:
    """True if process `pid` maps the file `inode` shared and writable."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        fields = line.split(None, 5)
        if fields[1].startswith("rw") and fields[1][3] == "s" and int(fields[4]) == inode:
            return True
    return False
