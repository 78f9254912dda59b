# SPDX-License-Identifier: Apache-2.0
"""Promise: one spec, one machine, on every node, for a start and for an arrival."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.common.vm_spec import VmSpec
from services.fault_agent.drivers.command_line import Wiring, command_line, escape
from services.fault_agent.drivers.memory_map import memory_regions

MIB, GIB = 1 << 20, 1 << 30

SPEC = VmSpec.model_validate(
    {
        "vm_id": "web-1",
        "memory_bytes": 512 * MIB,
        "vcpus": 2,
        "kernel": "/boot/vmlinuz",
        "initrd": "/boot/initrd",
        "cmdline": "console=ttyS0 quiet",
        "disks": [
            {"path": "/srv/a,b.raw"},
            {"path": "/srv/c.qcow2", "format": "qcow2", "read_only": True},
        ],
        "nics": [
            {"mac": "52:54:00:00:00:01", "tap": {"bridge": "br0"}},
            {"mac": "52:54:00:00:00:02"},
        ],
        "balloon": True,
        "extra_devices": ["i6300esb"],
    }
)

GOLDEN = """
/usr/bin/qemu -name guest=web-1,debug-threads=on
-nodefaults -no-user-config -display none -vga none -no-reboot -no-shutdown -S -pidfile vmm.pid
-machine pc-i440fx-7.2,memory-backend=ram0,usb=off -accel tcg,thread=multi -cpu max -smp 2 -m 512M
-object
memory-backend-file,id=ram0,size=536870912,mem-path=/dev/shm/web-1.7.ram,share=on,prealloc=off
-global PIIX4_PM.disable_s3=1 -global PIIX4_PM.disable_s4=1 -global apic-common.vapic=off
-kernel /boot/vmlinuz -initrd /boot/initrd -append console=ttyS0_quiet
-chardev pipe,id=console0,path=console -serial chardev:console0
-chardev socket,id=monitor0,path=qmp.sock,server=on,wait=off -mon chardev=monitor0,mode=control
-chardev socket,id=monitor1,path=inspect.sock,server=on,wait=off -mon chardev=monitor1,mode=control
-blockdev DISK0 -device virtio-blk-pci,id=disk0,drive=node0
-blockdev DISK1 -device virtio-blk-pci,id=disk1,drive=node1
-netdev tap,id=net0,fd=9,vhost=off
-device virtio-net-pci,id=nic0,mac=52:54:00:00:00:01,romfile=,netdev=net0
-device virtio-net-pci,id=nic1,mac=52:54:00:00:00:02,romfile=
-object rng-random,id=rng0,filename=/dev/urandom -device virtio-rng-pci,id=random0,rng=rng0
-device virtio-balloon-pci,id=balloon0 -device i6300esb
"""


def build(spec: VmSpec, *, incoming: bool = False) -> list[str]:
    wiring = Wiring(
        binary="/usr/bin/qemu",
        ram_path=Path(f"/dev/shm/{spec.vm_id}.7.ram"),
        tap_fds=[9 if nic.tap else None for nic in spec.nics],
        incoming=incoming,
    )
    return command_line(spec, wiring)


def test_golden() -> None:
    words = build(SPEC)
    disks = [json.loads(words[i + 1]) for i, word in enumerate(words) if word == "-blockdev"]
    shown = [
        "DISK0" if "a,b" in word else "DISK1" if "c.qcow2" in word else word.replace(" ", "_")
        for word in words
    ]
    assert shown == GOLDEN.split()
    assert disks[0] == {
        "driver": "raw",
        "node-name": "node0",
        "read-only": False,
        "cache": {"direct": True, "no-flush": False},
        "file": {
            "driver": "file",
            "filename": "/srv/a,b.raw",
            "cache": {"direct": True, "no-flush": False},
            "locking": "on",
        },
    }
    assert (disks[1]["driver"], disks[1]["read-only"]) == ("qcow2", True)


def test_an_arrival_is_the_same_machine_and_waits() -> None:
    assert build(SPEC, incoming=True) == [*build(SPEC), "-incoming", "defer"]


def test_nothing_of_a_spec_starts_its_guest_by_itself() -> None:
    assert "-S" in build(SPEC)
    assert "-S" in build(SPEC, incoming=True)


def test_q35_and_kvm() -> None:
    words = build(SPEC.model_copy(update={"machine": "q35", "accel": "kvm", "cpu": "host"}))
    assert "pc-q35-7.2,memory-backend=ram0,usb=off" in words
    assert words[words.index("-accel") + 1] == "kvm"
    assert "ICH9-LPC.disable_s3=1" in words


def test_a_bare_spec() -> None:
    spec = VmSpec(vm_id="x", memory_bytes=64 * MIB, kernel="/k", rng=False)
    words = build(spec)
    for absent in ("-initrd", "-append", "-blockdev", "-netdev", "-device"):
        assert absent not in words


def test_commas_are_doubled() -> None:
    assert escape("/a,b") == "/a,,b"


@pytest.mark.parametrize(
    ("machine", "memory", "expected"),
    [
        ("pc", 512 * MIB, [(0, 512 * MIB, 0)]),
        ("pc", 3 * GIB + 510 * MIB, [(0, 3 * GIB + 510 * MIB, 0)]),
        ("pc", 3 * GIB + 512 * MIB, [(0, 3 * GIB, 0), (4 * GIB, 512 * MIB, 3 * GIB)]),
        ("pc", 8 * GIB, [(0, 3 * GIB, 0), (4 * GIB, 5 * GIB, 3 * GIB)]),
        ("q35", 2 * GIB + 766 * MIB, [(0, 2 * GIB + 766 * MIB, 0)]),
        ("q35", 2 * GIB + 768 * MIB, [(0, 2 * GIB, 0), (4 * GIB, 768 * MIB, 2 * GIB)]),
    ],
)
def test_memory_regions(machine: str, memory: int, expected: list[tuple[int, int, int]]) -> None:
    """tests/integration/agent/test_qemu_driver.py asks QEMU itself."""
    spec = SPEC.model_copy(update={"machine": machine, "memory_bytes": memory})
    regions = memory_regions(spec)
    assert [(r.gpa, r.size_bytes, r.file_offset) for r in regions] == expected
    assert {r.page_size_bytes for r in regions} == {4096}
