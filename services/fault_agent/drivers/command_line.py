# SPDX-License-Identifier: Apache-2.0
"""A VmSpec as a QEMU command line. Both nodes build theirs here: equal specs, equal machines.

Devices get their PCI addresses in the order of the arguments; the arrival's command line is the
start's plus `-incoming defer`. Nothing depends on QEMU's configuration or defaults that differ
between builds: the machine type is versioned, everything else is named.

Source: qemu-system-x86_64(1); docs/vm-spec.md.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from services.common.vm_spec import Disk, VmSpec

MACHINE_TYPES = {"pc": "pc-i440fx-7.2", "q35": "pc-q35-7.2"}
"""The versioned machine behind each name: the oldest QEMU that Godwit supports has both."""

MONITOR_SOCKET = "qmp.sock"
"""The agent's. QEMU serves one client at a time."""
INSPECTION_SOCKET = "inspect.sock"
"""A second monitor, for people and tests."""
CONSOLE_PIPE = "console"
"""Of the guest's serial line: `console.in` is a FIFO that takes its input, `console.out` a link to
the log that has its output. Rejected: a socket with a log file; a client that connects and does not
read holds up the guest's output, and the log then has characters twice."""
PID_FILE = "vmm.pid"


def console_log(epoch: int) -> str:
    """Everything that the guest wrote to its serial line under `epoch`."""
    return f"console-{epoch}.log"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wiring:
    """What of a command line is the node's own."""

    binary: str
    ram_path: Path
    tap_fds: Sequence[int | None]
    """One a NIC, in order; None where the spec has no tap."""
    incoming: bool


def escape(value: str) -> str:
    """A value inside a QEMU option list: a comma is doubled."""
    return value.replace(",", ",,")


def command_line(spec: VmSpec, wiring: Wiring) -> list[str]:
    """The whole command line."""
    return [
        wiring.binary,
        "-name",
        f"guest={spec.vm_id},debug-threads=on",
        *_machine(spec, wiring),
        *_firmware(spec),
        *_channels(),
        *_disks(spec.disks),
        *_nics(spec, wiring.tap_fds),
        *_others(spec),
        *(["-incoming", "defer"] if wiring.incoming else []),
    ]


def _machine(spec: VmSpec, wiring: Wiring) -> list[str]:
    sleep = "PIIX4_PM" if spec.machine == "pc" else "ICH9-LPC"
    memory = (
        f"memory-backend-file,id=ram0,size={spec.memory_bytes},"
        f"mem-path={escape(str(wiring.ram_path))},share=on,prealloc=off"
    )
    return [
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-vga",
        "none",
        # A guest that ends is shown as ended; its VMM stays until it is told to go.
        "-no-reboot",
        "-no-shutdown",
        # It runs when the agent has journaled that it will, never by itself.
        "-S",
        "-pidfile",
        PID_FILE,
        "-machine",
        f"{MACHINE_TYPES[spec.machine]},memory-backend=ram0,usb=off",
        "-accel",
        "tcg,thread=multi" if spec.accel == "tcg" else "kvm",
        "-cpu",
        spec.cpu,
        "-smp",
        str(spec.vcpus),
        "-m",
        f"{spec.memory_bytes >> 20}M",
        "-object",
        memory,
        # A guest asleep is neither running nor paused.
        "-global",
        f"{sleep}.disable_s3=1",
        "-global",
        f"{sleep}.disable_s4=1",
        # Its option ROM is guest memory that a load touches: pages fetched inside the pause.
        "-global",
        "apic-common.vapic=off",
    ]


def _firmware(spec: VmSpec) -> list[str]:
    arguments = ["-kernel", spec.kernel]
    if spec.initrd:
        arguments += ["-initrd", spec.initrd]
    if spec.cmdline:
        arguments += ["-append", spec.cmdline]
    return arguments


def _channels() -> list[str]:
    return [
        "-chardev",
        f"pipe,id=console0,path={CONSOLE_PIPE}",
        "-serial",
        "chardev:console0",
        "-chardev",
        f"socket,id=monitor0,path={MONITOR_SOCKET},server=on,wait=off",
        "-mon",
        "chardev=monitor0,mode=control",
        "-chardev",
        f"socket,id=monitor1,path={INSPECTION_SOCKET},server=on,wait=off",
        "-mon",
        "chardev=monitor1,mode=control",
    ]


def _disks(disks: Sequence[Disk]) -> list[str]:
    arguments: list[str] = []
    for index, disk in enumerate(disks):
        arguments += ["-blockdev", _blockdev(index, disk)]
        arguments += ["-device", f"virtio-blk-pci,id=disk{index},drive=node{index}"]
    return arguments


def _blockdev(index: int, disk: Disk) -> str:
    cache = {"direct": disk.cache == "none", "no-flush": False}
    file: dict[str, object] = {
        "driver": "host_device" if _is_block_device(disk.path) else "file",
        "filename": disk.path,
        "cache": cache,
        # Two VMMs on one disk are refused by the disk itself, not only by us.
        "locking": "on",
    }
    node: dict[str, object] = {
        "driver": disk.format,
        "node-name": f"node{index}",
        "read-only": disk.read_only,
        "cache": cache,
        "file": file,
    }
    return json.dumps(node)


def _is_block_device(path: str) -> bool:
    try:
        return stat.S_ISBLK(Path(path).stat().st_mode)
    except OSError:
        return False


def _nics(spec: VmSpec, tap_fds: Sequence[int | None]) -> list[str]:
    arguments: list[str] = []
    for index, (nic, tap_fd) in enumerate(zip(spec.nics, tap_fds, strict=True)):
        device = f"virtio-net-pci,id=nic{index},mac={nic.mac},romfile="
        if tap_fd is not None:
            arguments += ["-netdev", f"tap,id=net{index},fd={tap_fd},vhost=off"]
            device += f",netdev=net{index}"
        arguments += ["-device", device]
    return arguments


def _others(spec: VmSpec) -> list[str]:
    arguments: list[str] = []
    if spec.rng:
        arguments += ["-object", "rng-random,id=rng0,filename=/dev/urandom"]
        arguments += ["-device", "virtio-rng-pci,id=random0,rng=rng0"]
    if spec.balloon:
        arguments += ["-device", "virtio-balloon-pci,id=balloon0"]
    for device in spec.extra_devices:
        arguments += ["-device", device]
    return arguments
