# SPDX-License-Identifier: Apache-2.0
"""What the cluster stands on, so that it can be pulled away: links, file systems, clocks.

Each is there if this machine lets us have it; `Ground.has` says what is.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from godwit.client import AsyncClient

from services.demo.cluster import RAM_PARENT, Cluster, running_cluster
from services.demo.part import Part
from tests.harness import link
from tests.harness.linked_cluster import linked_cluster
from tests.harness.require import missing

_CLONE_NEWNS = 0x00020000
_MS_REMOUNT = 32
_CLOCK_SOURCE = Path(__file__).with_name("clock.c")
_DISK_KIB = 64 << 10
_RAM_KIB = 3 << 20
_RESPAWN = ("--respawn",)
_NS_PER_S = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """A tmpfs of our own, whose size we change: full is what is as large as what is in it."""

    path: Path
    size_kib: int

    def mount(self) -> None:
        """Make it."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._mount(0, self.size_kib)

    def fill(self) -> None:
        """Leave no room, or hardly any: a size below what is used by now is refused."""
        for slack_kib in (0, 64, 256, 1024, 4096):
            stat = os.statvfs(self.path)
            used_kib = (stat.f_blocks - stat.f_bfree) * stat.f_frsize >> 10
            with contextlib.suppress(OSError):
                self._mount(_MS_REMOUNT, max(used_kib, 4) + slack_kib)
                return
        raise OSError(f"{self.path} grows too fast")

    def free(self) -> None:
        """Give the room back."""
        self._mount(_MS_REMOUNT, self.size_kib)

    def umount(self) -> None:
        """Take it away, whoever still uses it."""
        subprocess.run(["umount", "-l", str(self.path)], check=False)

    def _mount(self, flags: int, size_kib: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        path, options = os.fsencode(self.path), f"size={size_kib}k".encode()
        if libc.mount(b"tmpfs", path, b"tmpfs", ctypes.c_ulong(flags), options) != 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error), str(self.path))


@dataclass(slots=True, kw_only=True)
class Ground:
    """Attributes: has ("links", "mounts", "clock"), mounts ("store", "a", "b", "ram")."""

    has: frozenset[str] = frozenset()
    mounts: dict[str, Mount] = field(default_factory=dict)
    linked: link.Network | None = None

    @property
    def network(self) -> link.Network:
        """The links, for those who need "links"."""
        assert self.linked is not None
        return self.linked

    def keep(self, directory: Path) -> None:
        """Copy what is on the disks that go with this ground: journals, the store, consoles."""
        for name, mount in self.mounts.items():
            if mount.path.parent == directory:
                shutil.copytree(
                    mount.path,
                    directory / f"{name}.kept",
                    copy_function=_copy_files,
                    dirs_exist_ok=True,
                )

    def set_clock(self, part: Part, jump_s: int) -> None:
        """Let a part's wall clock be off by so much; for those who need "clock"."""
        path = _clock_of(part)
        with path.open("r+b") as file:
            file.write(struct.pack("=q", jump_s * _NS_PER_S))

    def set_clocks_right(self, cluster: Cluster) -> None:
        """Every clock is right."""
        if "clock" in self.has:
            for part in cluster.parts:
                self.set_clock(part, 0)


def own_mounts() -> bool:
    """Take this thread, and all that it starts, into a mount namespace of its own.

    First of all: threads that are there already stay where they are.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() != 0 or libc.unshare(_CLONE_NEWNS) != 0:
        return False
    done = subprocess.run(["mount", "--make-rprivate", "/"], check=False, capture_output=True)
    return done.returncode == 0


@contextmanager
def clock_library() -> Iterator[Path | None]:
    """The built clock.c; None where there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="godwit-clock-") as directory:
        library = Path(directory) / "clock.so"
        subprocess.run(
            [compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(_CLOCK_SOURCE), "-ldl"],
            check=True,
        )
        yield library


def _clock_of(part: Part) -> Path:
    return part.hooks.directory.with_name(part.hooks.directory.name + ".clock")


@asynccontextmanager
async def standing(
    directory: Path, *, mounts: bool, links: bool
) -> AsyncIterator[tuple[Cluster, AsyncClient, Ground]]:
    """A cluster on ground that can be pulled away, as far as this machine has it."""
    async with AsyncExitStack() as stack:
        has, environment, ram = set[str](), {}, RAM_PARENT
        ground = Ground()
        library = stack.enter_context(clock_library())
        if library is not None:
            has.add("clock")
            environment["LD_PRELOAD"] = str(library)
        if mounts:
            has.add("mounts")
            ram = directory.with_name(f"{directory.name}-ram")
            ground.mounts = {
                "ram": Mount(path=ram, size_kib=_RAM_KIB),
                **{
                    name: Mount(path=directory / name, size_kib=_DISK_KIB)
                    for name in ("store", "a", "b")
                },
            }
            stack.callback(_unmount, ground)
            ground.mounts["ram"].mount()

        def made(path: Path) -> None:
            (path / "hooks").mkdir()
            for name in ("orchestrator", *(f"{n}.{p}" for n in "ab" for p in _NODE_PARTS)):
                (path / "hooks" / f"{name}.clock").write_bytes(bytes(8))
            if mounts:
                for name in ("store", "a", "b"):
                    ground.mounts[name].mount()
                # SQLite follows it, and keeps its other files beside the file itself.
                (path / "orchestrator.sqlite").symlink_to("store/orchestrator.sqlite")

        if links and not any(missing(need) for need in link.NEEDS):
            has.add("links")
            linked = await stack.enter_async_context(
                linked_cluster(
                    directory,
                    environment=environment,
                    ram_parent=ram,
                    made=made,
                    agent_flags=_RESPAWN,
                )
            )
            cluster, client, ground.linked = linked.cluster, linked.client, linked.net
        else:
            cluster = await stack.enter_async_context(
                running_cluster(
                    directory,
                    environment=environment,
                    ram_parent=ram,
                    made=made,
                    hooked=True,
                    agent_flags=_RESPAWN,
                )
            )
            client = await stack.enter_async_context(AsyncClient(cluster.rest_url))
        ground.has = frozenset(has)
        yield cluster, client, ground


_NODE_PARTS = ("agent", "page-server")


def _copy_files(source: str, destination: str) -> str:
    """As shutil.copy2; sockets and pipes are left out."""
    if not Path(source).is_file():
        return destination
    return shutil.copy2(source, destination)


def _unmount(ground: Ground) -> None:
    for mount in ground.mounts.values():
        with contextlib.suppress(OSError):
            mount.umount()
