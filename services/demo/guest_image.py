# SPDX-License-Identifier: Apache-2.0
"""Build what the demo's guest boots from: kernel, initramfs, disk; cached by content."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from services.demo import initramfs, kernel
from services.demo.errors import CommandFailedError, ToolMissingError

SOURCES = Path(__file__).with_name("guest")
DEFAULT_CACHE = Path("build/guest")
_BUSYBOX = Path("/bin/busybox")
_C_FILES = ("workload.c", "devices.c", "pages.c")
_SCRIPT = "init.sh"
_COMPILE = ["gcc", "-std=gnu17", "-O2", "-static", "-pthread"]
_MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "virtio_rng", "virtio_balloon")
_QUICK_UNDER_TCG = (
    "clearcpuid=112,297,580",  # rep_good, erms, fsrm: TCG runs string instructions byte by byte
    "init_on_alloc=0",
    "no5lvl",
    "nosmap",
    "mitigations=off",
)
_LAYOUT = b"1"
"""Part of the stamp: raise it when this file puts the archive together in another way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestImage:
    """What a VMM needs to boot the guest.

    Attributes:
        kernel: bootable kernel image.
        initrd: gzipped initramfs.
        release: the kernel's version.
        stamp: hash of everything that went in; the file names hold it.
    """

    kernel: Path
    initrd: Path
    release: str
    stamp: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What the guest does; see guest/workload.c.

    Attributes:
        mib: memory that is filled and checked, MiB.
        dirty_rate: pages rewritten a second; 0 = as many as the vCPUs can.
        heartbeat_ms: period of the heartbeat.
        sweep_ms: time that a verification pass over all pages is spread over.
        disk: block device in the guest ("vda"), None = no disk traffic.
        address: the guest's own address with prefix length ("192.0.2.2/24").
        peer: address that it pings; both or neither of address and peer.
    """

    mib: int = 256
    dirty_rate: int = 2000
    heartbeat_ms: int = 10
    sweep_ms: int = 2000
    disk: str | None = None
    address: str | None = None
    peer: str | None = None

    @property
    def page_count(self) -> int:
        """Pages that every complete sweep verifies."""
        return self.mib * 256

    def command_line(self) -> str:
        """The kernel command line: console, quick and repeatable boot, the workload's options."""
        words = [
            *_QUICK_UNDER_TCG,
            "console=ttyS0,115200",
            "loglevel=3",  # an oops raises it by itself
            "panic=-1",
            "oops=panic",
            "nokaslr",
            "tsc=reliable",
            "no_timer_check",
            "random.trust_cpu=on",
            "net.ifnames=0",
            "ipv6.disable=1",
            f"mib={self.mib}",
            f"rate={self.dirty_rate}",
            f"hb_ms={self.heartbeat_ms}",
            f"sweep_ms={self.sweep_ms}",
        ]
        if self.disk is not None:
            words.append(f"disk={self.disk}")
        if self.address is not None and self.peer is not None:
            words.append(f"net={self.address},{self.peer}")
        return " ".join(words)


def build(cache: Path = DEFAULT_CACHE) -> GuestImage:
    """The guest image in `cache`; made if its parts have changed, else found at once.

    Blocking (seconds the first time); safe for several processes at once.

    Raises:
        ToolMissingError: gcc or busybox-static is not installed.
        KernelUnavailableError: see kernel.fetch.
        CommandFailedError: the workload does not compile.
    """
    cache = cache.resolve()
    cache.mkdir(parents=True, exist_ok=True)
    if not _BUSYBOX.exists():
        raise ToolMissingError(str(_BUSYBOX), "busybox-static")
    with _locked(cache):
        guest_kernel = kernel.fetch(cache)
        stamp = _stamp(guest_kernel.release)
        image = cache / f"vmlinuz-{guest_kernel.release}"
        initrd = cache / f"initrd-{stamp}.gz"
        if not image.exists():
            _place(image, guest_kernel.image.read_bytes())
        if not initrd.exists():
            _place(initrd, initramfs.archive(_entries(guest_kernel, _compiled(cache))))
            for old in cache.glob("initrd-*.gz"):
                if old != initrd:
                    old.unlink()
        return GuestImage(kernel=image, initrd=initrd, release=guest_kernel.release, stamp=stamp)


def make_disk(path: Path, *, mib: int = 64) -> None:
    """A raw disk of zeros at `path`, fit for cache=none on both nodes; replaces what is there.

    The blocks are allocated: a guest write never waits for the file system to find room.

    Raises:
        OSError: EINVAL where the file system has no O_DIRECT (tmpfs before Linux 6.6).
    """
    path.unlink(missing_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_DIRECT, 0o600)
    try:
        os.posix_fallocate(fd, 0, mib << 20)
    finally:
        os.close(fd)


def _stamp(release: str) -> str:
    digest = hashlib.sha256(_LAYOUT)
    digest.update(" ".join([release, *_COMPILE, *_MODULES]).encode())
    for path in [*(SOURCES / name for name in (*_C_FILES, "guest.h", _SCRIPT)), _BUSYBOX]:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _entries(guest_kernel: kernel.Kernel, workload: bytes) -> list[initramfs.Entry]:
    modules = kernel.ModuleTree(guest_kernel.modules).in_load_order(_MODULES)
    order = "".join(f"{name}\n" for name, _ in modules)
    return [
        *(initramfs.directory(name) for name in ("bin", "dev", "modules", "proc", "sys")),
        initramfs.character_device("dev/console", 5, 1),
        initramfs.regular("bin/busybox", _BUSYBOX.read_bytes(), executable=True),
        initramfs.regular("bin/workload", workload, executable=True),
        initramfs.regular("init", (SOURCES / _SCRIPT).read_bytes(), executable=True),
        initramfs.regular("modules/order", order.encode()),
        *(initramfs.regular(f"modules/{name}", data) for name, data in modules),
    ]


def _compiled(cache: Path) -> bytes:
    if shutil.which(_COMPILE[0]) is None:
        raise ToolMissingError(_COMPILE[0], "gcc libc6-dev")
    output = cache / f"workload-{os.getpid()}"
    command = [*_COMPILE, *(str(SOURCES / name) for name in _C_FILES), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CommandFailedError(command, done.returncode, done.stderr)
    try:
        return output.read_bytes()
    finally:
        output.unlink()


def _place(path: Path, data: bytes) -> None:
    """Written beside and renamed: nobody ever sees half an image."""
    scratch = path.with_name(f".{path.name}-{os.getpid()}")
    scratch.write_bytes(data)
    scratch.rename(path)


@contextmanager
def _locked(cache: Path) -> Iterator[None]:
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
