# SPDX-License-Identifier: Apache-2.0
"""Promise: what cannot work is refused before anything is done, and says what to do."""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

import pytest
from godwit.agent.v1 import fault_agent_service_pb2 as pb

from services.common.errors import FailedPreconditionError
from services.common.vm_spec import Disk
from services.fault_agent import host, preflight
from services.fault_agent.checks import Check, uffd_check
from services.fault_agent.host import Mount

MIB = 1 << 20


@pytest.mark.parametrize(
    "device",
    [
        "vfio-pci,host=00:02.0",
        "vhost-user-fs-pci,chardev=c0",
        "vhost-vsock-pci,guest-cid=3",
        "ivshmem-plain,memdev=m0",
        "virtio-net-pci,netdev=n0,vhost=on",
        "pc-dimm,memdev=m1",
        "nvdimm,memdev=m1",
        "virtio-mem-pci,memdev=m1",
    ],
)
def test_devices_that_cannot_move(device: str) -> None:
    check = preflight.devices_check(["i6300esb", device])
    assert not check.passed
    assert device in check.reason
    assert check.hint


def test_devices_that_can_move() -> None:
    assert preflight.devices_check(["i6300esb", "virtio-balloon-pci", "qemu-xhci"]).passed
    assert preflight.devices_check([]).passed


@pytest.mark.parametrize(("cache", "passed"), [("none", True), ("writeback", False)])
def test_disk_cache(cache: str, passed: bool) -> None:
    disks = [Disk(path="/a"), Disk.model_validate({"path": "/b", "cache": cache})]
    check = preflight.disk_cache_check(disks)
    assert check.passed is passed
    assert passed or "/b" in check.reason


@pytest.mark.parametrize(
    ("features", "missing"),
    [
        (["missing-shmem", "event-remove", "thread-id"], ""),
        (["missing-shmem"], "event-remove"),
        (["event-remove"], "missing-shmem"),
        ([], "event-remove, missing-shmem"),
    ],
)
def test_uffd_features(features: list[str], missing: str) -> None:
    check = uffd_check(features, balloon=False)
    assert check.passed is (missing == "")
    assert missing in check.reason


@pytest.mark.parametrize(
    ("fs_type", "options", "forced", "failed"),
    [
        ("tmpfs", {"rw", "size=1g"}, False, []),
        ("tmpfs", {"rw", "huge=never"}, False, []),
        ("tmpfs", {"rw", "huge=always"}, False, ["ram-dir-huge-pages"]),
        ("tmpfs", {"rw", "huge=within_size"}, False, ["ram-dir-huge-pages"]),
        ("tmpfs", {"rw", "huge=advise"}, False, ["ram-dir-huge-pages"]),
        ("tmpfs", {"rw"}, True, ["ram-dir-huge-pages"]),
        ("ext4", {"rw"}, False, ["ram-dir-tmpfs"]),
        ("", set(), False, ["ram-dir-tmpfs"]),
    ],
)
def test_ram_dir(fs_type: str, options: set[str], forced: bool, failed: list[str]) -> None:
    mount = Mount(fs_type=fs_type, options=frozenset(options))
    checks = preflight.ram_dir_checks(Path("/ram"), mount, shmem_forced=forced)
    assert [check.check for check in checks if not check.passed] == failed
    assert all(check.hint for check in checks if not check.passed)


def test_memory() -> None:
    assert preflight.memory_check(100 * MIB, 100 * MIB + preflight.MEMORY_SPARE_BYTES).passed
    assert not preflight.memory_check(100 * MIB, 100 * MIB).passed


@pytest.mark.parametrize(
    ("own", "theirs", "passed"),
    [("7.2.22", "7.2.22", True), ("7.2.22", "8.2.0", False), ("7.2.22", "", True)],
)
def test_versions(own: str, theirs: str, passed: bool) -> None:
    peer = pb.Capabilities(vmm_versions={"qemu": theirs} if theirs else {})
    assert preflight.version_check(own, peer, "qemu").passed is passed


def test_a_refusal_names_every_failed_check() -> None:
    checks = [
        Check(check="a", passed=True, reason="fine"),
        Check(check="b", passed=False, reason="bad", hint="mend b"),
        Check(check="c", passed=False, reason="worse", hint="mend c"),
    ]
    with pytest.raises(FailedPreconditionError) as refusal:
        preflight.require(checks)
    assert refusal.value.reason == "PREFLIGHT_FAILED"
    assert refusal.value.message == "b: bad; c: worse"
    assert refusal.value.hint == "mend b; mend c"
    assert refusal.value.metadata == {"checks": "b,c"}
    preflight.require(checks[:1])


def test_the_mount_of_a_path() -> None:
    device = Path("/").stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    line = f"36 35 {number} / / rw,noatime shared:1 - tmpfs t rw,huge=always"
    mount = host.find_mount(Path("/"), f"1 1 999:9 / /x rw - ext4 /dev/x rw\n{line}\n")
    assert mount.fs_type == "tmpfs"
    assert host.huge_pages_of(mount) == "always"
    assert host.find_mount(Path("/"), "").fs_type == ""
    assert host.find_mount(Path("/dev/shm")).fs_type == "tmpfs"


def test_whether_a_vmm_holds_a_disk(tmp_path: Path) -> None:
    """QEMU's lock bytes, held by another open file description."""
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(4096))
    assert not host.is_locked_by_vmm(str(path))
    with path.open("rb") as other:
        lock = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 201, 1, 0)
        fcntl.fcntl(other, 37, lock)  # F_OFD_SETLK
        assert host.is_locked_by_vmm(str(path))
    assert not host.is_locked_by_vmm(str(path))


def test_direct_io(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(8192))
    assert host.why_no_direct_io(str(path)) == ""
    assert host.why_no_direct_io(str(tmp_path / "none")) == "No such file or directory"
