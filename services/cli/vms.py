# SPDX-License-Identifier: Apache-2.0
"""`godwit vms`: list, show, start, stop."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from services.cli import quantities
from services.cli.output import columns, fields, print_answer
from services.cli.session import OutputOption, UrlOption, session

if TYPE_CHECKING:
    from godwit.calls import Answer
    from godwit.models import Vm

    from services.cli.output import OutputFormat

app = typer.Typer(invoke_without_command=True, help="List the VMs, or show, start or stop one.")

VmArgument = Annotated[str, typer.Argument(metavar="VM", help="Id of the VM.")]


@app.callback()
def vms(ctx: typer.Context, output: OutputOption = None, orchestrator: UrlOption = None) -> None:
    """List the VMs of the fleet, or show, start or stop one."""
    if ctx.invoked_subcommand is not None:
        _remember(ctx, output, orchestrator)
        return
    from godwit import calls

    with session(ctx, output, orchestrator) as now:
        answer = now.client.send_all(calls.list_vms())
    print_answer(
        now.output,
        answer=answer.json,
        table=columns(
            ["VM", "NODE", "STATE", "MEMORY", "RESIDENT", "EPOCH", "MIGRATION"],
            [_row(vm) for vm in answer.value],
            empty="no VMs: start one with `godwit vms start SPEC.json --node NODE`",
        ),
        names=[vm.vm_id for vm in answer.value],
    )


@app.command()
def show(
    ctx: typer.Context,
    vm: VmArgument,
    output: OutputOption = None,
    orchestrator: UrlOption = None,
) -> None:
    """Show one VM."""
    from godwit import calls

    with session(ctx, output, orchestrator) as now:
        _print_one(now.output, now.client.send(calls.get_vm(vm)))


@app.command()
def start(
    ctx: typer.Context,
    spec: Annotated[
        str, typer.Argument(metavar="SPEC.json", help="The VM's spec (docs/vm-spec.md); - = stdin.")
    ],
    node: Annotated[str, typer.Option("--node", metavar="NODE", help="Where to start it.")],
    output: OutputOption = None,
    orchestrator: UrlOption = None,
) -> None:
    """Start a VM on a node."""
    from godwit import calls

    read = _read_spec(spec)
    with session(ctx, output, orchestrator) as now:
        _print_one(now.output, now.client.send(calls.start_vm(node, read)))


@app.command()
def stop(
    ctx: typer.Context,
    vm: VmArgument,
    output: OutputOption = None,
    orchestrator: UrlOption = None,
) -> None:
    """End a VM and free its memory. The guest is not asked: it is switched off."""
    from godwit import calls

    with session(ctx, output, orchestrator) as now:
        answer = now.client.send(calls.stop_vm(vm))
    print_answer(now.output, answer=answer.json, table=f"{vm} is stopped", names=[vm])


def _remember(ctx: typer.Context, output: OutputFormat | None, url: str | None) -> None:
    from services.cli.session import Options

    ctx.ensure_object(Options).override(output, url)


def _read_spec(name: str) -> dict[str, Any]:
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
        spec = json.loads(text)
    except OSError as error:
        raise typer.BadParameter(f"{name}: {error.strerror}", param_hint="SPEC.json") from error
    except ValueError as error:
        raise typer.BadParameter(f"{name} is not JSON: {error}", param_hint="SPEC.json") from error
    if not isinstance(spec, dict):
        raise typer.BadParameter(f"{name} is not a JSON object", param_hint="SPEC.json")
    return spec


def _print_one(form: OutputFormat, answer: Answer[Vm]) -> None:
    vm = answer.value
    table = fields(
        [
            ("vm", vm.vm_id),
            ("node", vm.node),
            ("state", vm.vmm_state),
            ("memory", quantities.memory(vm.memory_bytes)),
            ("resident", quantities.percent(vm.resident_share)),
            ("epoch", str(vm.epoch)),
            ("migration", vm.migration_id),
            ("spec hash", vm.spec_hash),
        ]
    )
    print_answer(form, answer=answer.json, table=table, names=[vm.vm_id])


def _row(vm: Vm) -> list[str]:
    return [
        vm.vm_id,
        vm.node,
        vm.vmm_state,
        quantities.memory(vm.memory_bytes),
        quantities.percent(vm.resident_share),
        str(vm.epoch),
        vm.migration_id,
    ]
