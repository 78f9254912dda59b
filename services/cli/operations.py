# SPDX-License-Identifier: Apache-2.0
"""`godwit drain`, `undrain`, `rebalance`, `batch`, `plan` and `operations`."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from services.cli import quantities
from services.cli.exit_status import ExitStatus
from services.cli.output import OutputFormat, columns, fields, more, print_answer
from services.cli.session import (
    LIMIT_DEFAULT,
    LimitOption,
    Options,
    OutputOption,
    Session,
    UrlOption,
    session,
)

if TYPE_CHECKING:
    from godwit.calls import Answer, Call
    from godwit.operations import Begun, Operation, Plan

app = typer.Typer(
    invoke_without_command=True, help="List the operations; show, cancel, pause or resume one."
)

_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhd]?)")
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}

OperationArgument = Annotated[str, typer.Argument(metavar="OPERATION", help="Id of the operation.")]
NodeArgument = Annotated[str, typer.Argument(metavar="NODE", help="Name of the node.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Do nothing; show the plan.")]
Watch = Annotated[
    bool, typer.Option("--watch", "-w", help="Show the progress and wait for the end.")
]
Parallel = Annotated[
    int, typer.Option("--max-parallel", min=0, help="Moves at a time; 0: as the limits allow.")
]
Deadline = Annotated[
    str,
    typer.Option(
        "--deadline",
        metavar="TIME",
        help="Then it begins nothing more and ends as failed, e.g. 90s, 30m, 4h.",
        show_default=False,
    ),
]
Windows = Annotated[
    list[str] | None,
    typer.Option(
        "--window",
        metavar="HH:MM-HH:MM",
        help="Time of day, UTC, in which it may begin moves; repeat it.",
        show_default=False,
    ),
]
PriorityOption = Annotated[
    str,
    typer.Option("--priority", metavar="CLASS", help="background, maintenance, user or system."),
]
Retries = Annotated[int, typer.Option("--retries", min=0, max=100, help="Of each VM.")]
LargestFirst = Annotated[
    bool | None,
    typer.Option(
        "--largest-first/--smallest-first",
        help="Order of its VMs; with a deadline largest first.",
        show_default=False,
    ),
]


def _options(
    *,
    dry_run: bool,
    parallel: int = 0,
    deadline: str = "",
    windows: list[str] | None = None,
    priority: str = "maintenance",
    retries: int = 3,
    largest_first: bool | None = None,
) -> dict[str, Any]:
    given: dict[str, Any] = {
        "dry_run": dry_run,
        "parallel_max": parallel,
        "deadline_s": _seconds(deadline),
        "windows": windows or [],
        "priority": priority,
        "retries": retries,
    }
    if largest_first is not None:
        given["largest_first"] = largest_first
    return given


def _seconds(text: str) -> float:
    if not text:
        return 0.0
    found = _DURATION.fullmatch(text.strip())
    if not found:
        raise typer.BadParameter(f"{text!r} is not a time like 90s, 30m or 4h")
    return float(found[1]) * _SECONDS[found[2]]


def drain(
    ctx: typer.Context,
    node: NodeArgument,
    dry_run: DryRun = False,
    watch: Watch = False,
    deadline: Deadline = "",
    max_parallel: Parallel = 0,
    window: Windows = None,
    priority: PriorityOption = "maintenance",
    retries: Retries = 3,
    largest_first: LargestFirst = None,
    output: OutputOption = None,
    orchestrator: UrlOption = None,
) -> None:
    """Empty a node: every VM moves away, and nothing is placed there any more.

    It is done when the node retains nothing of any guest. Cancel it at any point with `godwit
    operations cancel`; take it back with `godwit undrain`.
    """
    from godwit import operations as calls

    options = _options(
        dry_run=dry_run,
        parallel=max_parallel,
        deadline=deadline,
        windows=window,
        priority=priority,
        retries=retries,
        largest_first=largest_first,
    )
    with session(ctx, output, orchestrator) as now:
        _begin(now, calls.drain(node, options), watch=watch)


def undrain(
    ctx: typer.Context,
    node: NodeArgument,
    dry_run: DryRun = False,
    watch: Watch = False,
    no_return: Annotated[
        bool, typer.Option("--no-return", help="Open it, and move nothing back.")
    ] = False,
    max_parallel: Parallel = 0,
    output: OutputOption = None,
    orchestrator: UrlOption = None,
) -> None:
    """Open a node again, and move back what its last drain moved away."""
    from godwit import operations as calls

    options = _options(dry_run=dry_run, parallel=max_parallel)
    with session(ctx, output, orchestrator) as now:
        _begin(now, calls.undrain(node, options, no_return=no_return), watch=watch)


def rebalance(
    ctx: typer.Context,
    dry_run: DryRun = False,
    watch: Watch = False,
    spread: Annotated[
        float,
        typer.Option("--spread", min=0, max=1, help="Difference of nodes' load left alone."),
    ] = 0.1,
    max_parallel: Parallel = 0,
    output: OutputOption = None,
    orchestrator: UrlOption = None,
) -> None:
    """Move VMs from full nodes to empty ones. What has just moved stays."""
    from godwit import operations as calls

    options = _options(dry_run=dry_run, parallel=max_parallel, priority="background")
    with session(ctx, output, orchestrator) as now:
        _begin(now, calls.rebalance(options, spread_max=spread), watch=watch)


def batch(
    ctx: typer.Context,
    vms: Annotated[list[str], typer.Argument(metavar="VM...", help="Ids of the VMs, in order.")],
    to: Annotated[
        str, typer.Option("--to", metavar="NODE", help="Where all go.", show_default="the best")
    ] = "",
    dry_run: DryRun = False,
    watch: Watch = False,
    deadline: Deadline = "",
    max_parallel: Parallel = 0,
    window: Windows = None,
    priority: PriorityOption = "maintenance",
    output: OutputOption = None,
    orchestrator: UrlOption = None,
) -> None:
    """Move many VMs, each to where it is best unless a node is named."""
    from godwit import operations as calls

    options = _options(
        dry_run=dry_run,
        parallel=max_parallel,
        deadline=deadline,
        windows=window,
        priority=priority,
    )
    with session(ctx, output, orchestrator) as now:
        _begin(now, calls.batch(vms, to, options), watch=watch)


def plan(
    ctx: typer.Context,
    vms: Annotated[list[str], typer.Argument(metavar="VM...", help="Ids of the VMs, in order.")],
    to: Annotated[
        str, typer.Option("--to", metavar="NODE", help="Where all go.", show_default="the best")
    ] = "",
    max_parallel: Parallel = 0,
    output: OutputOption = None,
    orchestrator: UrlOption = None,
) -> None:
    """Show where VMs would go, when, and why; the same as `godwit batch --dry-run`."""
    from godwit import operations as calls

    options = _options(dry_run=True, parallel=max_parallel)
    with session(ctx, output, orchestrator) as now:
        _begin(now, calls.batch(vms, to, options), watch=False)


@app.callback()
def operations(
    ctx: typer.Context,
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="Only those that have not ended.")
    ] = False,
    limit: LimitOption = LIMIT_DEFAULT,
    output: OutputOption = None,
    orchestrator: UrlOption = None,
) -> None:
    """List the operations, newest first; show, cancel, pause or resume one."""
    if ctx.invoked_subcommand is not None:
        ctx.ensure_object(Options).override(output, orchestrator)
        return
    from godwit import operations as calls

    with session(ctx, output, orchestrator) as now:
        call = calls.list_operations(unfinished=unfinished)
        answer = now.client.send_all(call, count=limit)
    print_answer(
        now.output,
        answer=answer.json,
        table=columns(
            ["OPERATION", "KIND", "NODE", "STATE", "PROGRESS", "VMS", "REASON"],
            [_row(each) for each in answer.value],
            empty="no operations",
        )
        + more(answer.json),
        names=[each.operation_id for each in answer.value],
    )


@app.command()
def show(
    ctx: typer.Context,
    operation: OperationArgument,
    watch: Watch = False,
    output: OutputOption = None,
    orchestrator: UrlOption = None,
) -> None:
    """Show one, with what it does with each VM."""
    from godwit import operations as calls

    with session(ctx, output, orchestrator) as now:
        answer = now.client.send(calls.get_operation(operation))
        if watch:
            _watch(now, answer.value)
            return
    _print_one(now.output, answer)


@app.command()
def cancel(
    ctx: typer.Context,
    operation: OperationArgument,
    output: OutputOption = None,
    orchestrator: UrlOption = None,
) -> None:
    """Begin no further move, cancel those before their decision, let the others end."""
    _change(ctx, operation, "cancel", output, orchestrator)


@app.command()
def pause(
    ctx: typer.Context,
    operation: OperationArgument,
    output: OutputOption = None,
    orchestrator: UrlOption = None,
) -> None:
    """Admit no further move of it; those under way go on."""
    _change(ctx, operation, "pause", output, orchestrator)


@app.command()
def resume(
    ctx: typer.Context,
    operation: OperationArgument,
    output: OutputOption = None,
    orchestrator: UrlOption = None,
) -> None:
    """Go on with it."""
    _change(ctx, operation, "resume", output, orchestrator)


def _change(
    ctx: typer.Context, operation: str, verb: str, output: OutputFormat | None, url: str | None
) -> None:
    from godwit import operations as calls

    with session(ctx, output, url) as now:
        _print_one(now.output, now.client.send(calls.change_operation(operation, verb)))


# --- beginning, watching, printing ---


def _begin(now: Session, call: Call[Begun], *, watch: bool) -> None:
    from godwit.operations import Plan

    answer = now.client.send(call)
    if isinstance(answer.value, Plan):
        _print_plan(now.output, answer.value, answer.json)
        return
    if watch:
        _watch(now, answer.value)
        return
    begun = answer.value
    of_node = f" of {begun.node}" if begun.node else ""
    print_answer(
        now.output,
        answer=answer.json,
        table=f"{begun.operation_id}: {begun.kind}{of_node}, {_counted(begun)}\n"
        f"follow it with `godwit operations show {begun.operation_id} --watch`",
        names=[begun.operation_id],
    )


def _watch(now: Session, operation: Operation) -> None:
    """Lines on stderr as it goes on; what became of it on stdout; exit status 6 unless all went."""
    from godwit import operations as calls

    seen = ""
    try:
        for step, _ in now.client.watch_operation(operation.operation_id):
            line = plain_line(step)
            if line != seen:
                print(line, file=sys.stderr, flush=True)
                seen = line
    except KeyboardInterrupt:
        typer.echo(
            "\nno longer watching; the operation goes on. `godwit operations cancel "
            f"{operation.operation_id}` cancels it",
            err=True,
        )
        raise typer.Exit(ExitStatus.INTERRUPTED) from None
    answer = now.client.send(calls.get_operation(operation.operation_id))  # with its VMs
    _print_one(now.output, answer)
    ok = answer.value.state == "succeeded"
    raise typer.Exit(ExitStatus.OK if ok else ExitStatus.MIGRATION_FAILED)


def plain_line(operation: Operation) -> str:
    """One line: what, how far, what it waits for."""
    parts = [
        f"{operation.kind} {operation.node}".rstrip(),
        "paused" if operation.paused else operation.state,
        quantities.percent(operation.progress),
        _counted(operation),
    ]
    why = ": ".join(part for part in (operation.reason, operation.message) if part)
    return ", ".join(part for part in (*parts, why) if part)


def _counted(operation: Operation) -> str:
    counts = operation.counts or {}
    return " ".join(f"{counts[state]} {state}" for state in sorted(counts)) or "no VMs"


def _row(operation: Operation) -> list[str]:
    return [
        operation.operation_id,
        operation.kind,
        operation.node,
        "paused" if operation.paused else operation.state,
        quantities.percent(operation.progress),
        _counted(operation),
        operation.reason,
    ]


def _print_one(form: OutputFormat, answer: Answer[Operation]) -> None:
    one = answer.value
    head = fields(
        [
            ("operation", one.operation_id),
            ("kind", one.kind),
            ("node", one.node),
            ("state", "paused" if one.paused else one.state),
            ("progress", quantities.percent(one.progress)),
            ("left", f"about {one.eta_s:.0f} s" if one.eta_s else ""),
            ("reason", ": ".join(part for part in (one.reason, one.message) if part)),
            ("hint", one.hint),
        ]
    )
    rows = [
        [vm.vm_id, vm.state, vm.source_node, vm.destination_node, str(vm.attempts), vm.reason]
        + ([vm.migration_id, vm.message, vm.hint] if form is OutputFormat.WIDE else [])
        for vm in one.vms
    ]
    header = ["VM", "STATE", "FROM", "TO", "TRIES", "REASON"]
    header += ["MIGRATION", "MESSAGE", "HINT"] if form is OutputFormat.WIDE else []
    table = head + ("\n" + columns(header, rows, empty="") if rows else "")
    print_answer(form, answer=answer.json, table=table, names=[one.operation_id])


def _print_plan(form: OutputFormat, shown: Plan, json: Any) -> None:
    wide = form is OutputFormat.WIDE
    rows = [
        [
            str(step.wave),
            step.vm_id,
            step.source_node,
            step.destination_node,
            f"{step.starts_s:.1f} s",
            f"{step.ends_s:.1f} s",
        ]
        + ([step.because] if wide else [])
        for step in shown.steps
    ]
    header = ["WAVE", "VM", "FROM", "TO", "BEGINS", "ENDS"] + (["BECAUSE"] if wide else [])
    parts = [columns(header, rows, empty="nothing would move")]
    if shown.impossible:
        cannot = [[each.vm_id, each.check, each.reason, each.hint] for each in shown.impossible]
        parts += ["", columns(["CANNOT GO", "CHECK", "REASON", "HINT"], cannot, empty="")]
    if shown.steps:
        moves = f"{len(shown.steps)} moves in {shown.waves} waves"
        parts += ["", f"{moves}, about {shown.ends_s:.0f} s"]
    print_answer(
        form, answer=json, table="\n".join(parts), names=[step.vm_id for step in shown.steps]
    )
