# SPDX-License-Identifier: Apache-2.0
"""What cannot work is refused before anything is done, with what was found and what to do.

Each check is a function of its facts; `Preflight` gathers the facts. Nothing here changes anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
from collections.abc import Sequence
from pathlib import Path

from godwit.agent.v1 import fault_agent_service_pb2 as pb

from services.common.errors import FailedPreconditionError
from services.common.privileges.capabilities import Capability, held
from services.common.vm_spec import Disk, VmSpec
from services.fault_agent import host
from services.fault_agent.checks import Check, verdict
from services.fault_agent.drivers.api import VmmState
from services.fault_agent.drivers.tap import NAMESPACES, TapError, enter_namespace
from services.fault_agent.images import PageServerUnreachableError
from services.fault_agent.journal import Record, Role
from services.fault_agent.node import Node
from services.fault_agent.vms import Vm

_IMMOVABLE = re.compile(
    r"^(vfio|vhost-|ivshmem|pci-assign|nvdimm|pc-dimm|virtio-mem|virtio-pmem|virtio-fs|"
    r"usb-host|scsi-generic|scsi-block)|vhost=on|chardev="
)
MEMORY_SPARE_BYTES = 64 << 20
"""Of a VMM itself, beside its guest's memory."""


def require(checks: Sequence[Check]) -> None:
    """Refuse what did not pass.

    Raises:
        FailedPreconditionError: PREFLIGHT_FAILED, with every failed check.
    """
    failed = [check for check in checks if not check.passed]
    if failed:
        raise FailedPreconditionError(
            "PREFLIGHT_FAILED",
            "; ".join(f"{check.check}: {check.reason}" for check in failed),
            hint="; ".join(check.hint for check in failed if check.hint),
            metadata={"checks": ",".join(check.check for check in failed)},
        )


def devices_check(devices: Sequence[str]) -> Check:
    """Devices whose state, or whose reach into memory, a VMM cannot hand over."""
    bad = [device for device in devices if _IMMOVABLE.search(device)]
    return verdict(
        "devices-movable",
        f"{', '.join(bad)} cannot be moved" if bad else "",
        fine="every device can be moved",
        hint="remove it: a device that reaches guest memory past the VMM would read zeros there",
    )


def disk_cache_check(disks: Sequence[Disk]) -> Check:
    """The other node must see what this one wrote."""
    bad = [f"{disk.path} has cache={disk.cache}" for disk in disks if disk.cache != "none"]
    return verdict(
        "disk-cache",
        "; ".join(bad),
        fine="every disk has cache=none",
        hint='set "cache": "none": the other node would read stale data',
    )


def ram_dir_checks(ram_dir: Path, mount: host.Mount, *, shmem_forced: bool) -> list[Check]:
    """Where guest memory is made: a fault must bring one page, not 512."""
    huge = host.huge_pages_of(mount)
    problem = "" if huge == "never" else f"it is mounted with huge={huge}"
    if shmem_forced:
        problem = "transparent_hugepage/shmem_enabled is force"
    return [
        verdict(
            "ram-dir-tmpfs",
            "" if mount.fs_type == "tmpfs" else f"{ram_dir} is on {mount.fs_type or 'nothing'}",
            fine=f"{ram_dir} is on tmpfs",
            hint="give --ram-dir a directory on a tmpfs",
        ),
        verdict(
            "ram-dir-huge-pages",
            problem,
            fine=f"{ram_dir} has huge=never",
            hint="mount it with huge=never, and write deny or never to shmem_enabled: with huge"
            " pages one installed page makes 511 others present, as zeros",
        ),
    ]


def memory_check(memory_bytes: int, available_bytes: int) -> Check:
    """Room for the guest."""
    needed = memory_bytes + MEMORY_SPARE_BYTES
    short = needed > available_bytes
    return verdict(
        "memory",
        f"needs {needed} bytes, {available_bytes} are available" if short else "",
        fine=f"{available_bytes} bytes are available",
        hint="choose another node, or make room in memory and in the tmpfs of --ram-dir",
    )


def version_check(own: str, peer: pb.Capabilities, driver: str) -> Check:
    """A device state is read only by the VMM version that wrote it; others are not tried yet."""
    theirs = peer.vmm_versions.get(driver, "")
    differ = bool(theirs) and theirs != own
    return verdict(
        "vmm-version",
        f"{own or 'none'} here, {theirs} at the source" if differ else "",
        fine=f"{own} on both nodes" if theirs else f"{own} here, the source's is not told",
        hint=f"install the same {driver} on both nodes",
    )


class Preflight:
    """The checks, with the facts of this node."""

    def __init__(self, node: Node) -> None:
        self._node = node

    async def source(self, vm: Vm) -> list[Check]:
        """Whether a VM could leave."""
        record = vm.record
        if not record.spec_json:
            return [self._resident(vm)]
        spec = vm.spec
        return [
            self._resident(vm),
            await self._running(vm),
            await self._ram_shared(vm),
            *self._ram_dir(),
            devices_check(spec.extra_devices),
            disk_cache_check(spec.disks),
            await self._page_server(),
        ]

    async def destination(self, spec: VmSpec, peer: pb.Capabilities) -> list[Check]:
        """Whether a VM could arrive."""
        node = self._node
        vm = node.vms.get(spec.vm_id)
        here = vm is not None and vm.record.role not in (Role.UNKNOWN, Role.GONE)
        driver = node.drivers.get(spec.driver)
        own = await driver.version() if driver else ""
        return [
            verdict(
                "vm-absent",
                f"{spec.vm_id} is {vm.record.role.value} here" if vm and here else "",
                fine=f"{spec.vm_id} is not here",
                hint="end its migration, or release what is kept of it",
            ),
            *await self._can_start(spec),
            version_check(own, peer, spec.driver),
            *(driver.arrival_checks(spec, node.pagecore.uffd_features()) if driver else ()),
            devices_check(spec.extra_devices),
            disk_cache_check(spec.disks),
            await self._disks_direct(spec.disks),
            await self._disks_shared(spec.disks),
        ]

    async def require_start(self, spec: VmSpec) -> None:
        """Refuse to start a VM that cannot run here.

        Raises:
            FailedPreconditionError: PREFLIGHT_FAILED.
        """
        require(await self._can_start(spec))

    async def require_arrival(self, spec: VmSpec) -> None:
        """Refuse a VM that cannot arrive here; the versions are compared by Preflight alone.

        Raises:
            FailedPreconditionError: PREFLIGHT_FAILED.
        """
        checks = await self.destination(spec, pb.Capabilities())
        # Its own record says ARRIVING by now where an arrival is taken up again.
        require([check for check in checks if check.check != "vm-absent"])

    async def _can_start(self, spec: VmSpec) -> list[Check]:
        ram_dir = self._node.config.ram_dir
        return [
            *await self._vmm(spec),
            self._files(spec),
            self._taps(spec),
            *self._ram_dir(),
            memory_check(spec.memory_bytes, host.memory_available_bytes(ram_dir)),
        ]

    def _resident(self, vm: Vm) -> Check:
        role = vm.record.role
        problem = "" if role in (Role.RESIDENT, Role.DEPARTING) else f"it is {role.value} here"
        if not problem and not vm.same_boot:
            problem = "the node was rebooted since, its memory is gone"
        return verdict(
            "vm-resident",
            problem,
            fine="it lives here",
            hint="ask the orchestrator which node owns it",
        )

    async def _running(self, vm: Vm) -> Check:
        state = await vm.look()
        return verdict(
            "vm-running",
            "" if state is VmmState.RUNNING else f"it is {state.value}",
            fine="it runs",
            hint="only a running guest is moved",
        )

    async def _ram_shared(self, vm: Vm) -> Check:
        record = vm.record
        return verdict(
            "ram-shared-file",
            await asyncio.to_thread(_why_not_shared, record),
            fine=f"its memory is {record.ram_path}",
            hint="start it through this agent: only memory in a named shared file can be moved",
        )

    def _ram_dir(self) -> list[Check]:
        ram_dir = self._node.config.ram_dir
        return ram_dir_checks(ram_dir, host.find_mount(ram_dir), shmem_forced=host.shmem_forced())

    async def _page_server(self) -> Check:
        problem = ""
        try:
            await self._node.images.reload()
        except PageServerUnreachableError as error:
            problem = error.message
        return verdict(
            "page-server",
            problem,
            fine=f"it listens at {self._node.images.page_address}",
            hint="start the page server of this node",
        )

    async def _vmm(self, spec: VmSpec) -> list[Check]:
        driver = self._node.drivers.get(spec.driver)
        known = verdict(
            "driver-known",
            "" if driver else f"{spec.driver} is not one of {sorted(self._node.drivers)}",
            fine=spec.driver,
            hint="choose a driver that this node has",
        )
        if driver is None:
            return [known]
        return [known, *await driver.start_checks(spec)]

    def _files(self, spec: VmSpec) -> Check:
        paths = [spec.kernel, spec.initrd, *(disk.path for disk in spec.disks)]
        missing = [path for path in paths if path and not Path(path).exists()]
        relative = [path for path in paths if path and not Path(path).is_absolute()]
        problem = f"{', '.join(missing)} missing" if missing else ""
        if relative:
            problem = f"{', '.join(relative)} not absolute"
        return verdict(
            "files-present",
            problem,
            fine="kernel, initrd and disks are there",
            hint="a spec's files have the same absolute path on every node",
        )

    def _taps(self, spec: VmSpec) -> Check:
        problems = []
        for nic in spec.nics:
            if nic.tap is None:
                continue
            if nic.tap.netns and not (NAMESPACES / nic.tap.netns).exists():
                problems.append(f"no network namespace {nic.tap.netns}")
            elif nic.tap.netns and Capability.SYS_ADMIN not in held().permitted:
                problems.append(f"{nic.tap.netns} needs --keep-capability sys_admin of the agent")
            elif not _bridge_exists(nic.tap.netns, nic.tap.bridge):
                problems.append(f"no bridge {nic.tap.bridge}")
        return verdict(
            "tap-bridge",
            "; ".join(problems),
            fine="every bridge is there",
            hint="make the bridge under the same name on every node, and let the agent reach it",
        )

    async def _disks_direct(self, disks: Sequence[Disk]) -> Check:
        problems = [
            f"{disk.path}: {why}"
            for disk in disks
            if (why := await asyncio.to_thread(host.why_no_direct_io, disk.path))
        ]
        return verdict(
            "disk-direct-io",
            "; ".join(problems),
            fine="every disk can be read past the page cache",
            hint="use a file system with O_DIRECT",
        )

    async def _disks_shared(self, disks: Sequence[Disk]) -> Check:
        problems = []
        for disk in disks:
            try:
                # A block device's identity is its path; a read-only disk may have any lock.
                if disk.read_only or not host.is_regular_file(disk.path):
                    continue
                if not await asyncio.to_thread(host.is_locked_by_vmm, disk.path):
                    problems.append(f"no VMM holds the lock of {disk.path}")
            except OSError as error:
                problems.append(f"{disk.path}: {error.strerror}")
        return verdict(
            "disk-shared",
            "; ".join(problems),
            fine="every disk is the one that the source uses",
            hint="put it on storage that both nodes share, with file locks that work across them",
        )


def _why_not_shared(record: Record) -> str:
    try:
        if Path(record.ram_path).stat().st_ino != record.ram_inode:
            return f"{record.ram_path} is another file than the guest's"
        if record.process is None or not host.maps_shared(record.process.pid, record.ram_inode):
            return f"its VMM does not map {record.ram_path} shared"
    except OSError as error:
        return f"{record.ram_path}: {error.strerror}"
    return ""


def _bridge_exists(netns: str, bridge: str) -> bool:
    if not netns:
        return Path(f"/sys/class/net/{bridge}/bridge").exists()
    found: list[bool] = []

    def look() -> None:
        with contextlib.suppress(TapError):
            enter_namespace(netns)
            look_here()

    def look_here() -> None:
        # Of this thread's namespace, unlike /sys/class/net, which is of the mount's.
        lines = Path("/proc/thread-self/net/dev").read_text().splitlines()
        found.append(any(line.split(":", 1)[0].strip() == bridge for line in lines))

    # setns(2) moves one thread; this one ends right after.
    thread = threading.Thread(target=look, name="look-for-bridge")
    thread.start()
    thread.join()
    return bool(found and found[0])
