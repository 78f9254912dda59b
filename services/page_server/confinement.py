# SPDX-License-Identifier: Apache-2.0
"""What a page server can open once it serves: its records, guest memory, and Python. ADR 10.

Landlock says so to the kernel, for this process and whoever takes it over. Where there is none,
each RAM file is opened beneath its directory (openat2), which binds our own code only.
"""

from __future__ import annotations

import ctypes
import logging
import os
import struct
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import godwit

import services
from services.common.errors import FailedPreconditionError
from services.common.privileges import landlock
from services.page_server.ram_file import check_ram, open_ram
from services.pagecore.api import PageCore, SandboxMode

log = logging.getLogger(__name__)

OpenRam = Callable[[str, int], int]
"""Path and inode to a descriptor, as ram_file.open_ram."""

_OPENAT2 = 437
_RESOLVE = 0x02 | 0x04 | 0x08
"""RESOLVE_NO_MAGICLINKS, _NO_SYMLINKS, _BENEATH: linux/openat2.h."""

_SYSTEM = (
    # The interpreter's libraries, and what resolving a name or a user takes.
    *("/usr", "/lib", "/lib64", "/proc", "/sys/devices/system", "/sys/fs/cgroup", "/sys/kernel/mm"),
    *("/etc/ld.so.cache", "/etc/localtime", "/etc/nsswitch.conf", "/etc/hosts", "/etc/host.conf"),
    *("/etc/resolv.conf", "/etc/gai.conf", "/etc/services", "/etc/passwd", "/etc/group"),
    *("/etc/ssl/openssl.cnf", "/etc/ssl/certs"),
    *("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"),
)

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Confinement:
    """What one page server is left with."""

    images_dir: Path
    ram_dirs: tuple[Path, ...]
    mode: SandboxMode
    further: tuple[Path, ...] = ()
    """Further files and directories that it reads while it serves."""

    def enter(self, core: PageCore) -> OpenRam:
        """Confine this process, whose only thread calls; how it opens RAM files from now on.

        A kernel that lacks something is no reason not to serve: it is said in the log.
        """
        kernel_opens = self._landlock()
        why_not = core.filter_process(self.mode)
        if why_not:
            log.warning("system calls are not filtered: %s", why_not)
        elif self.mode is not SandboxMode.OFF:
            log.info("system calls are filtered (%s)", self.mode.name.lower())
        return open_ram if kernel_opens or self.mode is not SandboxMode.ENFORCE else self._beneath

    def _landlock(self) -> bool:
        if self.mode is not SandboxMode.ENFORCE:
            return False
        hooks = os.environ.get("GODWIT_HOOKS_DIR")
        if hooks and (Path(hooks) / "page_server.landlock.skip").exists():
            return False
        read = [*map(Path, _SYSTEM), *_python(), self.images_dir, *self.ram_dirs, *self.further]
        try:
            version = landlock.confine(read=read, change=[Path(hooks)] if hooks else [])
        except OSError as error:
            log.warning("landlock refuses: %s", error)
            version = 0
        if version:
            log.info(
                "files: records beneath %s and memory beneath %s, by landlock %d",
                self.images_dir,
                ", ".join(map(str, self.ram_dirs)),
                version,
            )
        else:
            log.warning("no landlock here: only this process's own code keeps to its directories")
        return version > 0

    def _beneath(self, path: str, inode: int) -> int:
        """Open a RAM file in one of our directories, without a link on the way.

        Raises:
            FailedPreconditionError: RAM_FILE_REFUSED.
        """
        return check_ram(_open_beneath(self.ram_dirs, Path(path)), path, inode)


def _open_beneath(directories: Sequence[Path], path: Path) -> int:
    for directory in directories:
        if not path.is_relative_to(directory):
            continue
        parent = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            name = os.fsencode(path.relative_to(directory))
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
            how = struct.pack("=QQQ", flags, 0, _RESOLVE)
            fd = int(_libc.syscall(_OPENAT2, parent, name, how, ctypes.c_size_t(len(how))))
        finally:
            os.close(parent)
        if fd >= 0:
            return fd
        reason = os.strerror(ctypes.get_errno())
        raise FailedPreconditionError("RAM_FILE_REFUSED", f"{path}: {reason}")
    raise FailedPreconditionError(
        "RAM_FILE_REFUSED", f"{path} is in no --ram-dir", hint="give the agent's --ram-dir"
    )


def _python() -> list[Path]:
    """Where modules are imported from: our packages, and sys.path but for the working directory."""
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    packages = [directory for package in (services, godwit) for directory in package.__path__]
    native = os.environ.get("GODWIT_NATIVE_MODULE")
    # `python -m` puts the directory first that it was started in: it may be /.
    further = [entry for entry in sys.path[1:] if Path(entry).is_absolute() and entry != "/"]
    return [
        *(Path(sysconfig.get_path(name)) for name in names),
        *map(Path, packages),
        *map(Path, further),
        Path(sys.base_prefix) / "lib",
        *([Path(native)] if native else []),
    ]
