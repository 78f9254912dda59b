# SPDX-License-Identifier: Apache-2.0
"""Debian's cloud kernel for the guest: got from apt without root, and its modules in load order.

Source: apt-get(8) download, dpkg-deb(1) -x; the kernel's modinfo strings (include/linux/module.h).
"""

from __future__ import annotations

import lzma
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from services.demo.errors import (
    CommandFailedError,
    KernelUnavailableError,
    ModuleMissingError,
    ToolMissingError,
)

META_PACKAGE = "linux-image-cloud-amd64"
"""Always depends on the current kernel package of the distribution."""

_IMAGE_PACKAGE = re.compile(r"^\s*Depends: (linux-image-\S+)$", re.MULTILINE)
_MODULE_FILE = re.compile(r"(?P<name>.+)\.ko(?P<packing>\.xz)?")
_DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """An unpacked kernel package.

    Attributes:
        release: as `uname -r` says in the guest, e.g. "6.1.0-56-cloud-amd64".
        image: the bootable image (vmlinuz).
        modules: its directory of modules, .../lib/modules/RELEASE.
    """

    release: str
    image: Path
    modules: Path


def fetch(cache: Path) -> Kernel:
    """The kernel in `cache`; downloads and unpacks the current one if there is none.

    A kernel once fetched is kept: the guest changes only when the cache is removed.

    Raises:
        KernelUnavailableError: apt has no lists, no such package or no connection.
        ToolMissingError: not a Debian.
        CommandFailedError: the package cannot be unpacked.
    """
    root = cache / "kernel"
    if not root.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        # Unpacked beside and renamed: an interrupted run leaves no half kernel.
        with tempfile.TemporaryDirectory(dir=cache, prefix="kernel-") as scratch:
            package = _current_package()
            _download(package, Path(scratch))
            unpacked = Path(scratch) / "root"
            deb = next(Path(scratch).glob("*.deb"))
            _run(["dpkg-deb", "-x", str(deb), str(unpacked)], package="dpkg")
            unpacked.rename(root)
    image = next((root / "boot").glob("vmlinuz-*"), None)
    if image is None:
        raise KernelUnavailableError(META_PACKAGE, f"no vmlinuz in {root / 'boot'}")
    release = image.name.removeprefix("vmlinuz-")
    modules = root / "lib/modules" / release
    if not modules.is_dir():  # packages of a merged /usr
        modules = root / "usr/lib/modules" / release
    return Kernel(release=release, image=image, modules=modules)


def load_order(wanted: Iterable[str], depends: Callable[[str], list[str]]) -> list[str]:
    """Every wanted module after all it needs, each once.

    Args:
        wanted: module names.
        depends: names of the modules that one needs directly.
    """
    order: list[str] = []
    visited: set[str] = set()

    def visit(name: str) -> None:
        if name in visited:
            return
        visited.add(name)
        for needed in depends(name):
            visit(needed)
        order.append(name)

    for name in wanted:
        visit(name)
    return order


class ModuleTree:
    """The modules of one kernel, by name; "-" and "_" are the same, as for modprobe.

    modules.dep would tell the dependencies too, but depmod writes it when the package is
    installed: the package itself has none. So each module is asked (its "depends=" string).
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, Path] = {}
        for path in directory.rglob("*.ko*"):
            if match := _MODULE_FILE.fullmatch(path.name):
                self._files[_canonical(match["name"])] = path
        builtin = directory / "modules.builtin"
        lines = builtin.read_text().split() if builtin.exists() else []
        self._builtin = {_canonical(Path(line).name.removesuffix(".ko")) for line in lines}

    def in_load_order(self, wanted: Iterable[str]) -> list[tuple[str, bytes]]:
        """(file name, uncompressed module) of the wanted modules and all they need.

        Raises:
            ModuleMissingError: neither a file nor built into the kernel.
        """
        order = load_order((_canonical(name) for name in wanted), self._depends)
        return [(f"{name}.ko", self._read(name)) for name in order if name not in self._builtin]

    def _read(self, name: str) -> bytes:
        path = self._files.get(name)
        if path is None:
            raise ModuleMissingError(name, self._directory)
        data = path.read_bytes()
        return lzma.decompress(data) if path.suffix == ".xz" else data

    def _depends(self, name: str) -> list[str]:
        if name in self._builtin:
            return []
        match = _DEPENDS.search(self._read(name))
        names = match[1].decode() if match else ""
        return [_canonical(needed) for needed in names.split(",") if needed]


def _canonical(name: str) -> str:
    return name.replace("-", "_")


def _current_package() -> str:
    output = _run(["apt-cache", "depends", META_PACKAGE], package="apt")
    match = _IMAGE_PACKAGE.search(output)
    if match is None:
        raise KernelUnavailableError(META_PACKAGE, "apt does not know it")
    return match[1]


def _download(package: str, directory: Path) -> None:
    try:
        _run(["apt-get", "download", package], package="apt", directory=directory)
    except CommandFailedError as error:
        raise KernelUnavailableError(package, error.output.strip()) from error


def _run(command: list[str], *, package: str, directory: Path | None = None) -> str:
    if shutil.which(command[0]) is None:
        raise ToolMissingError(command[0], package)
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        if command[0] == "apt-cache":
            raise KernelUnavailableError(META_PACKAGE, done.stderr.strip())
        raise CommandFailedError(command, done.returncode, done.stderr)
    return done.stdout
