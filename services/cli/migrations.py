# SPDX-License-Identifier: Apache-2.0
"""`godwit migrate` and `godwit migrations`: begin, list, show, cancel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from services.cli import quantities, story
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
    from godwit.calls import Answer
    from godwit.models import Migration

app = typer.Typer(invoke_without_command=True, help="List the migrations, show or cancel one.")

FREEZE_AFTER_S_DEFAULT = 2.0

MigrationArgument = Annotated[str, typer.Argument(metavar="MIGRATION", help="Id of the migration.")]


def migrate(
    ctx: typer.Context,
    vm: Annotated[str, typer.Argument(metavar="VM", help="Id of the VM.")],
    to: Annotated[
        str, typer.Option("--to", metavar="NODE", help="Where it goes.", show_default="the best")
    ] = "",
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Show the progress and wait for the end.")
    ] = False,
    bandwidth: Annotated[
        str | None,
        typer.Option(
            "--bandwidth",
            metavar="BYTES/S",
            help="Limit of the background pages, e.g. 125M; pages that the guest waits for are"
            " never limited.",
            show_default=False,
        ),
    ] = None,
    on_link_loss: Annotated[
        str,
        typer.Option(
            "--on-link-loss",
            metavar="wait|freeze[:SECONDS]",
            help="What becomes of a guest whose pages cannot be fetched: each vCPU waits on what it"
            " touches, or all are frozen once the guest has been held that long (2 s).",
        ),
    ] = "wait",
    priority: Annotated[
        str,
        typer.Option(
            "--priority",
            metavar="CLASS",
            help="background, maintenance, user or system.",
            show_default="what the policies say, or user",
        ),
    ] = "",
    output: OutputOption = None,
    orchestrator: UrlOption = None,
) -> None:
    """Move a VM to another node while it runs. Without --to the best one is chosen."""
    from godwit import calls

    limit, freeze_after_ms = _rate(bandwidth), _freeze_after_ms(on_link_loss)
    with session(ctx, output, orchestrator) as now:
        answer = now.client.send(calls.create_migration(vm, to, limit, freeze_after_ms, priority))
        if watch:
            _watch(now, answer.value.migration_id)
            return
    begun = answer.value
    print_answer(
        now.output,
        answer=answer.json,
        table=f"{begun.migration_id}: {begun.vm_id} from {begun.source_node} to "
        f"{begun.destination_node or 'the best node'}\n"
        f"follow it with `godwit migrations show {begun.migration_id} --watch`",
        names=[begun.migration_id],
    )


@app.callback()
def migrations(
    ctx: typer.Context,
    vm: Annotated[
        str, typer.Option("--vm", metavar="VM", help="Only this VM's.", show_default=False)
    ] = "",
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="Only those that have not ended.")
    ] = False,
    limit: LimitOption = LIMIT_DEFAULT,
    output: OutputOption = None,
    orchestrator: UrlOption = None,
) -> None:
    """List the migrations, newest first, or show or cancel one."""
    if ctx.invoked_subcommand is not None:
        ctx.ensure_object(Options).override(output, orchestrator)
        return
    from godwit import calls

    with session(ctx, output, orchestrator) as now:
        call = calls.list_migrations(vm, unfinished=unfinished)
        answer = now.client.send_all(call, count=limit)
    print_answer(
        now.output,
        answer=answer.json,
        table=columns(
            ["MIGRATION", "VM", "FROM", "TO", "PHASE", "PROGRESS", "PAUSE", "TOTAL", "REASON"],
            [_row(migration) for migration in answer.value],
            empty="no migrations",
        )
        + more(answer.json),
        names=[migration.migration_id for migration in answer.value],
    )


@app.command()
def show(
    ctx: typer.Context,
    migration: MigrationArgument,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Show the progress and wait for the end.")
    ] = False,
    output: OutputOption = None,
    orchestrator: UrlOption = None,
) -> None:
    """Tell what happened to one migration, and what can be done."""
    from godwit import calls

    with session(ctx, output, orchestrator) as now:
        if watch:
            _watch(now, migration)
            return
        answer = now.client.send(calls.get_migration(migration))
    print_one(now.output, answer)


@app.command()
def cancel(
    ctx: typer.Context,
    migration: MigrationArgument,
    output: OutputOption = None,
    orchestrator: UrlOption = None,
) -> None:
    """Cancel a migration; refused once the destination owns the VM."""
    from godwit import calls

    with session(ctx, output, orchestrator) as now:
        answer = now.client.send(calls.cancel_migration(migration))
    print_one(now.output, answer)


def _rate(text: str | None) -> int:
    if text is None:
        return 0
    try:
        return quantities.parse_rate(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--bandwidth") from error


def _freeze_after_ms(text: str) -> int:
    """0: wait."""
    policy, _, seconds = text.partition(":")
    try:
        after_ms = round(float(seconds or FREEZE_AFTER_S_DEFAULT) * 1000)
    except (ValueError, OverflowError):
        after_ms = 0
    if policy == "wait" and not seconds:
        return 0
    if policy != "freeze" or after_ms < 1:
        raise typer.BadParameter(
            f"must be wait, freeze or freeze:SECONDS, got {text!r}", param_hint="--on-link-loss"
        )
    return after_ms


def _watch(now: Session, migration_id: str) -> None:
    """Follow it to its end, or until a person is needed; exits with MIGRATION_FAILED then."""
    import json

    from godwit.models import MigrationPhase

    from services.cli.watching import MigrationView, ending

    last: Migration | None = None
    json_lines = now.output is OutputFormat.JSON
    try:
        with MigrationView(shown=not json_lines) as view:
            for last, data in now.client.watch_answers(migration_id):
                view.show(last)
                if json_lines:
                    print(json.dumps(data, ensure_ascii=False), flush=True)
                if last.phase == MigrationPhase.NEEDS_ATTENTION:
                    break  # it does not go on by itself: a watcher would wait for ever
    except KeyboardInterrupt:
        typer.echo(
            f"\nno longer watching; the migration goes on. `godwit migrations cancel "
            f"{migration_id}` cancels it, up to the switch-over",
            err=True,
        )
        raise typer.Exit(ExitStatus.INTERRUPTED) from None
    if last is None or last.phase != MigrationPhase.SUCCEEDED:
        if last is not None:
            typer.echo(ending(last), err=True)
        raise typer.Exit(ExitStatus.MIGRATION_FAILED)
    if now.output is OutputFormat.NAME:
        print(last.migration_id)
    elif not json_lines:
        print(ending(last))


def print_one(form: OutputFormat, answer: Answer[Migration]) -> None:
    """One migration, with its history."""
    one = answer.value
    counters = one.counters
    shown = [
        ("migration", one.migration_id),
        ("vm", one.vm_id),
        ("from", one.source_node),
        ("to", one.destination_node),
        ("phase", one.phase),
        ("decision", one.decision),
        ("reason", one.reason),
        ("message", one.message),
        ("hint", one.hint),
        ("epoch", str(one.epoch or "")),
        ("given back under", str(one.return_epoch or "")),
        ("progress", quantities.percent(one.progress)),
        ("pause", quantities.duration(one.pause_ns)),
        ("total", quantities.duration(one.total_ns)),
    ]
    if counters is not None:
        latency = counters.fault_latency
        pages = (
            f"{counters.demand_page_count} on demand, {counters.bulk_page_count} in the background,"
            f" {counters.zero_page_count} zero, {counters.absent_count} to come"
        )
        faults = (
            f"{counters.fault_count}, p50 {quantities.duration(latency.p50_ns)}, "
            f"p99 {quantities.duration(latency.p99_ns)}"
        )
        shown += [("pages", pages), ("faults", faults), ("held", story.held(counters))]
    if one.on_link_loss.freeze_after_ms:
        after = quantities.duration(one.on_link_loss.freeze_after_ms * 1_000_000)
        shown.append(("on link loss", f"freeze after {after}"))
    table = "\n".join([fields(shown), *story.lines(one)])
    print_answer(form, answer=answer.json, table=table, names=[one.migration_id])


def _row(one: Migration) -> list[str]:
    return [
        one.migration_id,
        one.vm_id,
        one.source_node,
        one.destination_node,
        one.phase,
        quantities.percent(one.progress),
        quantities.duration(one.pause_ns),
        quantities.duration(one.total_ns),
        one.reason,
    ]
