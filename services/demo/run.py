# SPDX-License-Identifier: Apache-2.0
"""The demo: a guest goes to b and back to a, and is judged by what it says itself."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from godwit.client import AsyncClient
from godwit.errors import GodwitClientError
from godwit.models import Migration, MigrationPhase

from services.common.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
)
from services.demo import guest_image
from services.demo.cluster import running_cluster
from services.demo.console import ConsoleFollower
from services.demo.errors import NetworkUnavailableError, ToolMissingError
from services.demo.fleet_run import FleetOptions, run_fleet
from services.demo.guest_image import GuestImage, Workload
from services.demo.live_guest import LiveGuest, make_spec
from services.demo.microvm_run import run_microvm, uffd_is_allowed
from services.demo.moves import report_of, why_not_succeeded
from services.demo.network import Network, demo_network
from services.demo.options import MIB, Narrator, Options
from services.demo.sabotage import Sabotage
from services.demo.verdict import MigrationReport, Setup, judge

VM_ID = "demo"
_QEMU = "qemu-system-x86_64"
_SPARE_MIB = 96
"""What the guest needs beside its workload: kernel, initramfs, buffers."""
_DISK = "disk.raw"


@dataclass(slots=True)
class _Course:
    """How the demo went so far; `trouble` is what no console can tell."""

    reports: list[MigrationReport] = field(default_factory=list)
    trouble: list[str] = field(default_factory=list)


async def run_demo(options: Options, narrator: Narrator) -> dict[str, object]:
    """Do it all; the report of services.demo.verdict or microvm_verdict.

    What goes wrong with the guest is in the report. Cancel it to clean up and end.

    Raises:
        GodwitError: what keeps it from being set up.
        GodwitClientError: the orchestrator refused to start the guest.
    """
    _check(options)
    if options.vmm == "qemu":
        _check_fits(options)
    image = await _image(options, narrator)
    if image is not None:
        _check_fits(options)
    async with _placed(options, narrator) as place:
        if image is None:
            report = await run_microvm(options, narrator, place.path)
        else:
            report = await _run_qemu(options, narrator, image, place.path)
        place.keep |= report["verdict"] != "ok"
        return report


async def run_fleet_demo(fleet: FleetOptions, narrator: Narrator) -> dict[str, object]:
    """The same with a whole fleet; the report of services.demo.fleet_run."""
    async with _placed(fleet.options, narrator) as place:
        report = await run_fleet(fleet, narrator, place.path)
        place.keep |= report["verdict"] != "ok"
        return report


async def _image(options: Options, narrator: Narrator) -> GuestImage | None:
    """What QEMU boots; None: a microvm, which boots nothing."""
    if options.vmm == "microvm":
        return None
    try:
        if shutil.which(_QEMU) is None:
            raise ToolMissingError(_QEMU, "qemu-system-x86")
        if options.vmm == "auto" and not uffd_is_allowed():
            raise FailedPreconditionError("UFFD_FORBIDDEN", "userfaultfd is not allowed here")
        narrator.step("guest image: Debian's cloud kernel, busybox, the workload")
        return await asyncio.to_thread(guest_image.build, cache_directory())
    except (FailedPreconditionError, OSError) as error:
        if options.vmm == "qemu" or options.harm is not None:
            raise
        narrator.note(f"a microvm instead of QEMU: {error}")
        return None


async def _run_qemu(
    options: Options, narrator: Narrator, image: GuestImage, directory: Path
) -> dict[str, object]:
    async with AsyncExitStack() as stack:
        network = _enter_network(stack, narrator)
        has_disk = options.harm is None or not options.harm.spares_disk
        disk = await asyncio.to_thread(_make_disk, directory) if has_disk else None
        narrator.step("cluster: an orchestrator and the nodes a and b, each part a process")
        cluster = await stack.enter_async_context(
            running_cluster(directory / "cluster", hooked=options.harm is not None, tls=options.tls)
        )
        client = await stack.enter_async_context(cluster.client())
        follower = await stack.enter_async_context(ConsoleFollower())
        workload = Workload(
            mib=options.workload_mib,
            dirty_rate=options.dirty_rate,
            disk="vda" if disk else None,
            address=network.guest_address if network else None,
            peer=network.bridge_address if network else None,
        )
        setup = Setup(
            vmm=await _vmm_version(client),
            guest=f"Linux {image.release}, {options.vcpus} vCPU, workload of "
            f"{options.workload_mib} MiB at {options.dirty_rate or 'unlimited'} pages/s, TCG",
            memory_bytes=options.memory_bytes,
            page_count=workload.page_count,
            disk=disk is not None,
            net=network is not None,
        )
        spec = make_spec(
            VM_ID,
            image=image,
            workload=workload,
            memory_bytes=options.memory_bytes,
            vcpus=options.vcpus,
            disk=disk,
            network=network,
        )
        narrator.step(f"guest: boots on node a, fills and checks {options.workload_mib} MiB")
        guest = await LiveGuest.start(
            spec, "a", setup=setup, cluster=cluster, client=client, follower=follower
        )
        course = _Course()
        await guest.wait_filled()
        await _travel(guest, options, narrator, course)
        return _report(guest, course)


async def _travel(guest: LiveGuest, options: Options, narrator: Narrator, course: _Course) -> None:
    """Each leg of the journey; it ends at the first that fails."""
    if missing := await guest.prove():
        course.trouble += [f"before the first move: {what}" for what in missing]
        return
    sabotage = Sabotage(options.harm, guest) if options.harm else None
    legs = [("a", "b")] if sabotage else [("a", "b"), ("b", "a")]
    for source, destination in legs:
        narrator.step(f"move: {source} to {destination}")
        migration = await _move(guest, source, destination, narrator, sabotage, course)
        if migration is None:
            return
        if guest.console.node == destination:
            course.reports.append(report_of(migration))
        if migration.phase != MigrationPhase.SUCCEEDED:
            course.trouble.append(why_not_succeeded(migration))
        if migration.phase != MigrationPhase.SUCCEEDED and sabotage is None:
            return
        narrator.step(f"proof: {destination} verifies every page, disk, network")
        await guest.prove()
        if guest.is_silent:
            course.trouble.append(f"the guest says nothing any more on {destination}")


async def _move(
    guest: LiveGuest,
    source: str,
    destination: str,
    narrator: Narrator,
    sabotage: Sabotage | None,
    course: _Course,
) -> Migration | None:
    """The last that was seen of it; None: it could not even be followed, `course` says why."""

    async def on_step(migration: Migration) -> bool:
        narrator.migration(migration)
        return sabotage is not None and await sabotage.on_step(migration)

    if sabotage:
        sabotage.before_move(source)
    try:
        migration = await guest.move(
            destination,
            on_step=on_step,
            bulk_bytes_per_s_max=sabotage.bulk_bytes_per_s_max if sabotage else 0,
        )
    except (GodwitClientError, DeadlineExceededError) as error:
        course.trouble.append(f"migration {source} to {destination}: {error}")
        return None
    if sabotage:
        await sabotage.after_move(destination)
    return migration


def _report(guest: LiveGuest, course: _Course) -> dict[str, object]:
    report = judge(guest.setup, guest.consoles, course.reports)
    if course.trouble:
        reasons = report["reasons"]
        assert isinstance(reasons, list)
        report["reasons"] = [*course.trouble, *reasons]
        report["verdict"] = "failed"
    return {**report, "fault_backend": "uffd", "fault_backend_reason": "QEMU makes no exits"}


def cache_directory() -> Path:
    """Where the guest image is kept: in the checkout that we run from, else the user's cache."""
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "pyproject.toml").exists():
        return checkout / "build" / "guest"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "godwit" / "guest"


def _check(options: Options) -> None:
    if options.memory_bytes % (2 * MIB):
        raise InvalidArgumentError(
            "FIELD_INVALID", f"memory {options.memory_bytes} is not a multiple of 2 MiB"
        )
    if options.vmm == "microvm" and options.harm is not None:
        raise InvalidArgumentError("FIELD_INVALID", "only a guest of QEMU can be harmed")


def _check_fits(options: Options) -> None:
    if options.memory_bytes < (options.workload_mib + _SPARE_MIB) * MIB:
        raise InvalidArgumentError(
            "FIELD_INVALID",
            f"a workload of {options.workload_mib} MiB does not fit into a guest of "
            f"{options.memory_bytes // MIB} MiB",
            hint=f"the guest needs {_SPARE_MIB} MiB beside it",
        )


def _enter_network(stack: AsyncExitStack, narrator: Narrator) -> Network | None:
    try:
        return stack.enter_context(demo_network())
    except NetworkUnavailableError as error:
        narrator.note(f"without a network card: {error}")
        return None


@dataclass(slots=True)
class _Place:
    """The directory of this run, and whether it stays."""

    path: Path
    keep: bool


@asynccontextmanager
async def _placed(options: Options, narrator: Narrator) -> AsyncIterator[_Place]:
    """Make the directory; at the end remove it, unless it is wanted or tells why it went wrong."""
    if options.directory is None:
        # Not the directory for temporary files: that may be tmpfs, and a journal wants a disk.
        path = Path(tempfile.mkdtemp(prefix="godwit-demo-", dir="/var/tmp"))
    else:
        path = options.directory.resolve()
        try:
            path.mkdir(parents=True)
        except OSError as error:
            raise InvalidArgumentError(
                "DIRECTORY_UNUSABLE",
                f"{path}: {error.strerror}",
                hint="name a directory that does not exist yet",
            ) from error
    place = _Place(path, options.keep)
    try:
        yield place
    except Exception:
        place.keep = True
        raise
    finally:
        (path / _DISK).unlink(missing_ok=True)
        if place.keep:
            narrator.note(f"state and logs are in {path}")
        else:
            await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)


def _make_disk(directory: Path) -> Path:
    path = directory / _DISK
    try:
        guest_image.make_disk(path)
    except OSError as error:
        raise FailedPreconditionError(
            "DISK_UNAVAILABLE",
            f"{path}: {error.strerror}",
            hint="name a directory on a file system with O_DIRECT and 64 MiB free: --dir",
        ) from error
    return path


async def _vmm_version(client: AsyncClient) -> str:
    for node in await client.nodes():
        versions = (node.capabilities.vmm_versions if node.capabilities else None) or {}
        if "qemu" in versions:
            return f"QEMU {versions['qemu']}"
    return "QEMU"
