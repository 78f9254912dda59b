# SPDX-License-Identifier: Apache-2.0
"""The guest image: what goes in, in which order, and what is said when it cannot be built."""

from __future__ import annotations

import errno
import gzip
import lzma
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.demo import guest_image, initramfs, kernel
from services.demo.errors import KernelUnavailableError, ModuleMissingError, ToolMissingError


def unpack(archive: bytes) -> dict[str, tuple[int, bytes]]:
    """Path → (mode, data), read by the rules of the format alone."""
    data = gzip.decompress(archive)
    found: dict[str, tuple[int, bytes]] = {}
    position = 0
    while True:
        assert position % 4 == 0
        assert data[position : position + 6] == b"070701"
        fields = [int(data[position + 6 + 8 * i : position + 14 + 8 * i], 16) for i in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = data[position + 110 : position + 110 + name_size - 1].decode()
        start = (position + 110 + name_size + 3) & ~3
        if name == "TRAILER!!!":
            return found
        found[name] = (mode, data[start : start + size])
        position = (start + size + 3) & ~3


@given(st.lists(st.tuples(st.text("abc/", min_size=1, max_size=9), st.binary(max_size=20))))
def test_archive_holds_what_was_put_in(files: list[tuple[str, bytes]]) -> None:
    entries = [initramfs.regular(path, data, executable=True) for path, data in files]

    archive = initramfs.archive(entries)

    assert unpack(archive) == {path: (stat.S_IFREG | 0o755, data) for path, data in files}
    assert initramfs.archive(entries) == archive


def test_archive_has_other_kinds_of_files() -> None:
    entries = [
        initramfs.directory("dev"),
        initramfs.character_device("dev/console", 5, 1),
        initramfs.symlink("sbin", "bin"),
    ]

    found = unpack(initramfs.archive(entries))

    assert stat.S_ISDIR(found["dev"][0])
    assert stat.S_ISCHR(found["dev/console"][0])
    assert stat.S_ISLNK(found["sbin"][0])
    assert found["sbin"][1] == b"bin"


@given(st.lists(st.lists(st.integers(0, 30), max_size=4), min_size=1, max_size=12), st.data())
def test_load_order_has_needed_modules_first(graph: list[list[int]], data: st.DataObject) -> None:
    depends = {str(i): [str(n % i) for n in needs] if i else [] for i, needs in enumerate(graph)}
    wanted = data.draw(st.lists(st.sampled_from(sorted(depends))))

    order = kernel.load_order(wanted, depends.__getitem__)

    assert len(order) == len(set(order))
    assert set(wanted) <= set(order)
    for name in order:
        assert all(order.index(needed) < order.index(name) for needed in depends[name])


def module(depends: str) -> bytes:
    return b"\x7fELF\0license=GPL\0depends=" + depends.encode() + b"\0retpoline=Y\0"


def test_modules_are_found_packed_built_in_and_by_either_spelling(tmp_path: Path) -> None:
    (tmp_path / "kernel").mkdir()
    (tmp_path / "kernel/virtio-rng.ko").write_bytes(module("virtio,rng-core"))
    (tmp_path / "kernel/virtio.ko.xz").write_bytes(lzma.compress(module("")))
    (tmp_path / "modules.builtin").write_text("kernel/drivers/char/hw_random/rng-core.ko\n")

    found = kernel.ModuleTree(tmp_path).in_load_order(["virtio_rng"])

    assert found == [("virtio.ko", module("")), ("virtio_rng.ko", module("virtio,rng-core"))]
    with pytest.raises(ModuleMissingError, match="no_such"):
        kernel.ModuleTree(tmp_path).in_load_order(["no_such"])


def test_without_package_lists_it_says_what_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apt = tmp_path / "bin/apt-cache"
    apt.parent.mkdir()
    apt.write_text("#!/bin/sh\necho 'E: No packages found' >&2\nexit 100\n")
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", str(apt.parent))

    with pytest.raises(KernelUnavailableError, match=r"No packages found \(apt-get update\)"):
        kernel.fetch(tmp_path / "cache")
    apt.unlink()
    with pytest.raises(ToolMissingError, match="apt-cache is not installed"):
        kernel.fetch(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_command_line_has_the_workload_s_options() -> None:
    plain = guest_image.Workload(mib=64, dirty_rate=0, heartbeat_ms=5).command_line().split()
    full = guest_image.Workload(disk="vda", address="192.0.2.2/24", peer="192.0.2.1")

    assert {"mib=64", "rate=0", "hb_ms=5", "console=ttyS0,115200", "panic=-1"} < set(plain)
    assert not any(word.startswith(("disk=", "net=")) for word in plain)
    assert full.command_line().split()[-2:] == ["disk=vda", "net=192.0.2.2/24,192.0.2.1"]
    assert full.page_count == 65536


def test_disk_is_new_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_text("old")

    try:
        guest_image.make_disk(path, mib=1)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        pytest.skip(f"no O_DIRECT on the file system of {tmp_path}: use --basetemp")

    assert path.read_bytes() == bytes(1 << 20)
    assert path.stat().st_blocks * 512 >= 1 << 20
