# SPDX-License-Identifier: Apache-2.0
"""`godwit demo`: the whole of Godwit on this machine, once to b and back."""

from __future__ import annotations

import asyncio
import enum
import json
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from services.cli import quantities
from services.cli.exit_status import ExitStatus

if TYPE_CHECKING:
    from godwit.models import Migration

    from services.cli.watching import MigrationView
    from services.demo.options import Options

_T = TypeVar("_T")


class Vmm(enum.StrEnum):
    """Which VMM the guest runs in."""

    AUTO = "auto"
    QEMU = "qemu"
    MICROVM = "microvm"
    BOTH = "both"


class Accel(enum.StrEnum):
    """What runs a microvm."""

    AUTO = "auto"
    KVM = "kvm"
    THREAD = "thread"


class FaultBackend(enum.StrEnum):
    """docs/exit-channel.md."""

    AUTO = "auto"
    KVM_USERFAULT = "kvm-userfault"
    EXIT_EMULATION = "exit-emulation"
    EXIT_SIGSEGV = "exit-sigsegv"
    UFFD = "uffd"


def demo(
    memory: Annotated[
        str, typer.Option("--memory", metavar="SIZE", help="Memory of the guest.")
    ] = "512M",
    workload_mib: Annotated[
        int,
        typer.Option("--workload-mib", min=1, help="Memory that the guest fills and checks, MiB."),
    ] = 256,
    dirty_rate: Annotated[
        int,
        typer.Option("--dirty-rate", min=0, help="Pages that it rewrites a second; 0 = no limit."),
    ] = 2000,
    vcpus: Annotated[int, typer.Option("--vcpus", min=1, max=8, help="CPUs of the guest.")] = 1,
    vmm: Annotated[
        Vmm,
        typer.Option("--vmm", help="auto: QEMU where it can run, else a microvm of ours."),
    ] = Vmm.AUTO,
    accel: Annotated[
        Accel, typer.Option("--accel", help="Of a microvm. auto: KVM where it can be used.")
    ] = Accel.AUTO,
    fault_backend: Annotated[
        FaultBackend,
        typer.Option("--fault-backend", help="How a microvm notices absent memory."),
    ] = FaultBackend.AUTO,
    fleet: Annotated[
        bool,
        typer.Option(
            "--fleet", help="Many microvms on several nodes: node a is drained and filled again."
        ),
    ] = False,
    nodes: Annotated[
        int, typer.Option("--nodes", min=2, max=26, help="Of the fleet.", show_default=True)
    ] = 4,
    vms: Annotated[
        int, typer.Option("--vms", min=1, max=200, help="Of the fleet; half of them on node a.")
    ] = 12,
    as_json: Annotated[
        bool, typer.Option("--json", help="The last line on stdout is the report as JSON.")
    ] = False,
    directory: Annotated[
        Path | None,
        typer.Option(
            "--dir",
            metavar="DIR",
            help="Where state and logs go; must not exist.",
            show_default="a new one in /var/tmp",
        ),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep that directory at the end.")] = False,
    tls: Annotated[
        bool, typer.Option("--tls", help="With certificates: every connection is TLS 1.3.")
    ] = False,
    sabotage: Annotated[
        str | None, typer.Option("--sabotage", hidden=True, help="For tests; docs/testing.md.")
    ] = None,
) -> None:
    """Migrate a real guest to another node and back, and check every page of it.

    Starts an orchestrator and two nodes as processes of this machine, boots a small Linux in QEMU
    on node a, moves it to b and back by post-copy, and lets the guest itself check its memory, its
    disk, its network and its heartbeats. Or does it with a microvm, which needs neither QEMU nor,
    with threads for a processor, KVM or root. Exit status 0 only if all of it is proved unharmed.

    With --fleet: an orchestrator, several nodes and many small microvms; node a is drained within
    limits and filled again, and every guest verifies its memory each time.
    """
    if fleet:
        raise typer.Exit(_run_fleet(nodes, vms, accel.value, directory, keep, as_json=as_json))
    options = _options(memory, workload_mib, dirty_rate, vcpus, directory, keep, sabotage)
    options = replace(options, accel=accel.value, fault_backend=fault_backend.value, tls=tls)
    if vmm is Vmm.BOTH and directory is not None:
        raise typer.BadParameter("not with --vmm both", param_hint="--dir")
    runs = ("qemu", "microvm") if vmm is Vmm.BOTH else (vmm.value,)
    raise typer.Exit(_run([replace(options, vmm=run) for run in runs], as_json=as_json))


class _Narrator:
    """Progress on stderr: stdout is for the report."""

    def __init__(self) -> None:
        self._view: MigrationView | None = None

    def step(self, text: str) -> None:
        """Something begins or is done."""
        self.close()
        print(f"• {text}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Something that weakens what the demo shows."""
        self.close()
        print(f"! {text}", file=sys.stderr, flush=True)

    def migration(self, migration: Migration) -> None:
        """A migration has changed: one live line, or plain lines where there is no terminal."""
        if self._view is None:
            from services.cli.watching import MigrationView

            self._view = MigrationView()
            self._view.__enter__()
        self._view.show(migration)

    def close(self) -> None:
        """The live line, if there is one, stays as it is."""
        if self._view is not None:
            self._view.__exit__()
            self._view = None


def _options(
    memory: str,
    workload_mib: int,
    dirty_rate: int,
    vcpus: int,
    directory: Path | None,
    keep: bool,
    sabotage: str | None,
) -> Options:
    from services.demo.options import Options
    from services.demo.sabotage import Harm

    try:
        memory_bytes = quantities.parse_memory(memory)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--memory") from error
    try:
        harm = Harm(sabotage) if sabotage is not None else None
    except ValueError as error:
        raise typer.BadParameter(
            f"{sabotage!r} is none of {', '.join(Harm)}", param_hint="--sabotage"
        ) from error
    return Options(
        memory_bytes=memory_bytes,
        workload_mib=workload_mib,
        dirty_rate=dirty_rate,
        vcpus=vcpus,
        directory=directory,
        keep=keep,
        harm=harm,
    )


def _run_fleet(
    nodes: int, vms: int, accel: str, directory: Path | None, keep: bool, *, as_json: bool
) -> ExitStatus:
    from services.demo.fleet_run import FleetOptions

    small = FleetOptions().options
    options = replace(small, accel=accel, directory=directory, keep=keep)
    fleet = FleetOptions(nodes=nodes, vms=vms, options=options)

    async def work(narrator: _Narrator) -> list[dict[str, object]]:
        from services.demo.run import run_fleet_demo

        return [await run_fleet_demo(fleet, narrator)]

    return _judged(work, "print_fleet_report", as_json=as_json)


def _run(runs: Sequence[Options], *, as_json: bool) -> ExitStatus:
    return _judged(lambda narrator: _each(runs, narrator), "print_report", as_json=as_json)


def _judged(
    work: Callable[[_Narrator], Coroutine[Any, Any, list[dict[str, object]]]],
    printer: str,
    *,
    as_json: bool,
) -> ExitStatus:
    """Do it, print the reports; `printer` is a function of services.demo.report."""
    from rich.console import Console

    from services.demo import report as printers

    narrator = _Narrator()
    reports = []
    try:
        for report in asyncio.run(_interruptible(work(narrator))):
            narrator.close()
            getattr(printers, printer)(report, Console(stderr=as_json))
            reports.append(report)
    except asyncio.CancelledError:
        print("godwit: interrupted; everything is cleaned up", file=sys.stderr)
        return ExitStatus.INTERRUPTED
    finally:
        narrator.close()
    ok = all(report["verdict"] == "ok" for report in reports)
    if as_json:
        both = {"reports": reports, "verdict": "ok" if ok else "failed"}
        print(json.dumps(both if len(reports) > 1 else reports[0]), flush=True)
    return ExitStatus.OK if ok else ExitStatus.MIGRATION_FAILED


async def _each(runs: Sequence[Options], narrator: _Narrator) -> list[dict[str, object]]:
    from services.demo.run import run_demo

    return [await run_demo(options, narrator) for options in runs]


async def _interruptible(work: Coroutine[Any, Any, _T]) -> _T:
    """Ctrl-C and SIGTERM cancel `work`, once: its cleaning up is not interrupted."""
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    interrupted = False

    def interrupt() -> None:
        nonlocal interrupted
        print("" if interrupted else "\ngodwit: cleaning up", file=sys.stderr, flush=True)
        if not interrupted:
            interrupted = True
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt)
    try:
        return await work
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
