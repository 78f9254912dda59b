# SPDX-License-Identifier: Apache-2.0
"""The demo with a microvm: no kernel, no image, no network; it runs where QEMU does not."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from godwit.errors import GodwitClientError
from godwit.models import Migration

from services.common.errors import (
    FailedPreconditionError,
    GodwitError,
    InvalidArgumentError,
)
from services.common.vm_spec import VmSpec
from services.demo.cluster import running_cluster
from services.demo.microvm_guest import MicrovmGuest, make_spec
from services.demo.microvm_verdict import MicrovmSetup, judge_microvm
from services.demo.moves import report_of, why_not_succeeded
from services.demo.options import Narrator, Options
from services.demo.verdict import MigrationReport
from services.fault_agent import host
from services.fault_agent.drivers.microvm import PROGRAM, find_program

VM_ID = "demo"
_MIB = 1 << 20
_SPARE_MIB = 8
"""What the guest needs beside its workload: tables, code, stacks."""


@dataclass(slots=True)
class _Course:
    reports: list[MigrationReport] = field(default_factory=list)
    trouble: list[str] = field(default_factory=list)


async def run_microvm(options: Options, narrator: Narrator, directory: Path) -> dict[str, object]:
    """Start one on a, move it to b and back; the report of microvm_verdict.

    Raises:
        GodwitError: what keeps it from being set up.
        GodwitClientError: the orchestrator refused to start the guest.
    """
    spec = await microvm_spec(options, narrator)
    narrator.step("cluster: an orchestrator and the nodes a and b, each part a process")
    async with (
        running_cluster(directory / "cluster", tls=options.tls) as cluster,
        cluster.client() as client,
    ):
        narrator.step(f"guest: starts on node a, fills and checks {options.workload_mib} MiB")
        guest = await MicrovmGuest.start(spec, "a", cluster=cluster, client=client)
        course = _Course()
        await _travel(guest, narrator, course)
    assert spec.microvm is not None
    setup = MicrovmSetup(
        vmm=f"{PROGRAM} {metadata.version('godwit')}",
        guest=f"workload {spec.microvm.workload}, {options.vcpus} vCPU, "
        f"{options.workload_mib} MiB at {options.dirty_rate or 'unlimited'} touches/s a vCPU, "
        f"{'KVM' if spec.accel == 'kvm' else 'threads'}",
        memory_bytes=spec.memory_bytes,
        page_count=guest.page_count,
        vcpus=spec.vcpus,
        fault_backend=spec.microvm.fault_backend,
    )
    report = judge_microvm(setup, guest.stays, course.reports)
    if course.trouble:
        reasons = report["reasons"]
        assert isinstance(reasons, list)
        report["reasons"] = [*course.trouble, *reasons]
        report["verdict"] = "failed"
    return report


async def _travel(guest: MicrovmGuest, narrator: Narrator, course: _Course) -> None:
    """Each leg of the journey; it ends at the first that fails."""

    async def on_step(migration: Migration) -> bool:
        narrator.migration(migration)
        return False

    try:
        await guest.look()
        for source, destination in (("a", "b"), ("b", "a")):
            narrator.step(f"move: {source} to {destination}")
            migration = await guest.move(destination, on_step=on_step)
            if trouble := why_not_succeeded(migration):
                course.trouble.append(trouble)
                return
            course.reports.append(report_of(migration))
            narrator.step(f"proof: {destination} verifies every page")
            await guest.look()
    except (GodwitClientError, GodwitError) as error:
        course.trouble.append(f"on {guest.node}: {error}")


async def microvm_spec(options: Options, narrator: Narrator) -> VmSpec:
    """The spec of the guest that the options ask for.

    Raises:
        FailedPreconditionError: TOOL_MISSING.
        InvalidArgumentError: it does not fit.
    """
    if find_program(PROGRAM) is None:
        raise FailedPreconditionError("TOOL_MISSING", f"{PROGRAM} is not built", hint="make native")
    if options.memory_bytes < (options.workload_mib + _SPARE_MIB) * _MIB:
        raise InvalidArgumentError(
            "FIELD_INVALID",
            f"a workload of {options.workload_mib} MiB does not fit into a guest of "
            f"{options.memory_bytes // _MIB} MiB",
            hint=f"the guest needs {_SPARE_MIB} MiB beside it",
        )
    accel = options.accel
    if accel == "auto":
        why = await asyncio.to_thread(why_no_kvm)
        accel = "thread" if why or options.fault_backend == "exit-sigsegv" else "kvm"
        if why:
            narrator.note(f"threads instead of KVM: {why}")
    return make_spec(
        VM_ID,
        accel=accel,
        memory_bytes=options.memory_bytes,
        workload_bytes=options.workload_mib * _MIB,
        vcpus=options.vcpus,
        ops_per_second=options.dirty_rate,
        fault_backend=options.fault_backend,
    )


def uffd_is_allowed() -> bool:
    """Whether one can be had that sees faults of kernel code, as KVM's are."""
    from services.pagecore.native import NativePageCore

    return bool(NativePageCore().uffd_features())


def why_no_kvm() -> str:
    """Why a microvm on KVM cannot be moved here; empty if it can."""
    if why := host.why_no_kvm():
        return why
    return "" if uffd_is_allowed() else "userfaultfd: not allowed for KVM's faults"
