# SPDX-License-Identifier: Apache-2.0
"""`godwit queue`, `limits`, `policy` and `place`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from services.cli import quantities
from services.cli.output import OutputFormat, columns, print_answer
from services.cli.session import Options, OutputOption, UrlOption, session

if TYPE_CHECKING:
    from godwit.calls import Answer
    from godwit.schedule import Limit, Policy, QueueEntry

queue_app = typer.Typer(
    invoke_without_command=True, help="Show what waits for admission; freeze admissions, or thaw."
)
limits_app = typer.Typer(invoke_without_command=True, help="Show the limits, or change them.")
policy_app = typer.Typer(invoke_without_command=True, help="List policies; set or delete one.")
place_app = typer.Typer(
    no_args_is_help=True, help="Say where a VM may be, or what a node is for placement."
)

Labels = Annotated[
    list[str] | None,
    typer.Option("--label", metavar="KEY=VALUE", help="A label; repeat it.", show_default=False),
]


def _pairs(texts: list[str] | None, option: str) -> dict[str, str]:
    found = {}
    for text in texts or ():
        key, equals, value = text.partition("=")
        if not equals:
            raise typer.BadParameter(f"{text!r} is not KEY=VALUE", param_hint=option)
        found[key] = value
    return found


# --- queue ---


@queue_app.callback()
def queue(ctx: typer.Context, output: OutputOption = None, orchestrator: UrlOption = None) -> None:
    """Show what waits for admission, in order, each with what holds it."""
    if ctx.invoked_subcommand is not None:
        ctx.ensure_object(Options).override(output, orchestrator)
        return
    from godwit import schedule as calls

    with session(ctx, output, orchestrator) as now:
        answer = now.client.send_all(calls.get_queue())
    wide = now.output is OutputFormat.WIDE
    header = ["PLACE", "VM", "FROM", "TO", "CLASS", "WAITED", "HELD BY", "MESSAGE"]
    header += ["HINT", "OPERATION", "MIGRATION"] if wide else []
    frozen = answer.value.frozen
    table = columns(
        header, [_entry(each, wide=wide) for each in answer.value.entries], empty="nothing waits"
    )
    print_answer(
        now.output,
        answer=answer.json,
        table=(f"admissions are frozen: {frozen}\n" if frozen else "") + table,
        names=[each.migration_id for each in answer.value.entries],
    )


def _entry(each: QueueEntry, *, wide: bool) -> list[str]:
    return [
        str(each.place),
        each.vm_id,
        each.source_node,
        each.destination_node or "any",
        each.priority,
        f"{each.waited_s:.0f} s",
        each.reason,
        each.message,
        *([each.hint, each.operation_id, each.migration_id] if wide else []),
    ]


@queue_app.command()
def freeze(
    ctx: typer.Context,
    because: Annotated[str, typer.Option("--because", help="Shown to everybody who waits.")],
    output: OutputOption = None,
    orchestrator: UrlOption = None,
) -> None:
    """Emergency stop: admit nothing any more. What is under way goes on; pages are served."""
    from godwit import schedule as calls

    with session(ctx, output, orchestrator) as now:
        now.client.send(calls.freeze(because))
    print_answer(now.output, answer={"frozen": because}, table="frozen", names=[])


@queue_app.command()
def thaw(ctx: typer.Context, output: OutputOption = None, orchestrator: UrlOption = None) -> None:
    """Let admissions go on."""
    from godwit import schedule as calls

    with session(ctx, output, orchestrator) as now:
        now.client.send(calls.thaw())
    print_answer(now.output, answer={"frozen": ""}, table="admissions go on", names=[])


# --- limits ---


@limits_app.callback()
def limits(ctx: typer.Context, output: OutputOption = None, orchestrator: UrlOption = None) -> None:
    """Show the limits, and what is used of each."""
    if ctx.invoked_subcommand is not None:
        ctx.ensure_object(Options).override(output, orchestrator)
        return
    from godwit import schedule as calls

    with session(ctx, output, orchestrator) as now:
        _print_limits(now.output, now.client.send_all(calls.get_limits()))


@limits_app.command("set")
def set_limits(
    ctx: typer.Context,
    changes: Annotated[
        list[str],
        typer.Argument(
            metavar="LIMIT=N...",
            help="E.g. node-in=3 link:rack-7=4; node-in:b=default removes one of its own.",
        ),
    ],
    output: OutputOption = None,
    orchestrator: UrlOption = None,
) -> None:
    """Change limits, at once. What is under way beyond a lowered one goes on."""
    from godwit import schedule as calls

    values: dict[str, int] = {}
    remove = []
    for key, text in _pairs(changes, "LIMIT=N").items():
        if text == "default":
            remove.append(key)
        elif text.isdigit():
            values[key] = int(text)
        else:
            raise typer.BadParameter(f"{text!r} is neither a number nor default")
    with session(ctx, output, orchestrator) as now:
        now.client.send(calls.set_limits(values, remove))
        _print_limits(now.output, now.client.send_all(calls.get_limits()))


def _print_limits(form: OutputFormat, answer: Answer[list[Limit]]) -> None:
    rows = [[each.key, str(each.value), str(each.used)] for each in answer.value]
    print_answer(
        form,
        answer=answer.json,
        table=columns(["LIMIT", "MOVES", "UNDER WAY"], rows, empty=""),
        names=[each.key for each in answer.value],
    )


# --- policies ---


@policy_app.callback()
def policy(ctx: typer.Context, output: OutputOption = None, orchestrator: UrlOption = None) -> None:
    """List the policies. Of two the one with more labels counts, setting by setting."""
    if ctx.invoked_subcommand is not None:
        ctx.ensure_object(Options).override(output, orchestrator)
        return
    from godwit import schedule as calls

    with session(ctx, output, orchestrator) as now:
        answer = now.client.send_all(calls.list_policies())
    rows = [[each.name, _said(each.match_labels), _settings(each)] for each in answer.value]
    print_answer(
        now.output,
        answer=answer.json,
        table=columns(["POLICY", "VMS WITH", "SAYS"], rows, empty="no policies"),
        names=[each.name for each in answer.value],
    )


def _said(labels: Any) -> str:
    return ",".join(f"{key}={value}" for key, value in (labels or {}).items()) or "all"


_SETTINGS = (
    *("priority", "bulk_bytes_per_s_max", "freeze_after_ms"),
    *("pause_ms_max", "prepare_s_per_gib", "retries", "mode"),
)


def _settings(policy: Policy) -> str:
    said = ((name, getattr(policy, name)) for name in _SETTINGS)
    return ", ".join(f"{name} {value}" for name, value in said if value is not None)


@policy_app.command("set")
def set_policy(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME")],
    match: Annotated[
        list[str] | None,
        typer.Option(
            "--match", metavar="KEY=VALUE", help="VMs with all of these.", show_default="every VM"
        ),
    ] = None,
    priority: Annotated[str | None, typer.Option("--priority", metavar="CLASS")] = None,
    bandwidth: Annotated[
        str | None, typer.Option("--bandwidth", metavar="BYTES/S", help="Of background pages.")
    ] = None,
    freeze_after_ms: Annotated[int | None, typer.Option("--freeze-after-ms", min=0)] = None,
    pause_ms_max: Annotated[
        int | None,
        typer.Option("--pause-ms-max", min=1, help="Then the guest runs on at its source."),
    ] = None,
    prepare_s_per_gib: Annotated[float | None, typer.Option("--prepare-s-per-gib", min=0)] = None,
    retries: Annotated[
        int | None, typer.Option("--retries", min=0, help="Of a migration that failed.")
    ] = None,
    mode: Annotated[str | None, typer.Option("--mode", help="post-copy; others to come.")] = None,
    output: OutputOption = None,
    orchestrator: UrlOption = None,
) -> None:
    """Write a policy whole. Migrations that were asked for before keep what counted then."""
    from godwit import schedule as calls

    try:
        rate = quantities.parse_rate(bandwidth) if bandwidth else None
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--bandwidth") from error
    said = {
        "match_labels": _pairs(match, "--match"),
        "priority": priority,
        "bulk_bytes_per_s_max": rate,
        "freeze_after_ms": freeze_after_ms,
        "pause_ms_max": pause_ms_max,
        "prepare_s_per_gib": prepare_s_per_gib,
        "retries": retries,
        "mode": mode,
    }
    with session(ctx, output, orchestrator) as now:
        given = {key: value for key, value in said.items() if value is not None}
        answer = now.client.send(calls.put_policy(name, given))
    written = answer.value
    table = f"{written.name}: VMs with {_said(written.match_labels)}: {_settings(written)}"
    print_answer(now.output, answer=answer.json, table=table, names=[name])


@policy_app.command("delete")
def delete_policy(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME")],
    output: OutputOption = None,
    orchestrator: UrlOption = None,
) -> None:
    """Remove a policy."""
    from godwit import schedule as calls

    with session(ctx, output, orchestrator) as now:
        now.client.send(calls.delete_policy(name))
    print_answer(now.output, answer=None, table=f"{name} is removed", names=[name])


# --- placement ---


@place_app.command("node")
def place_node(
    ctx: typer.Context,
    node: Annotated[str, typer.Argument(metavar="NODE")],
    label: Labels = None,
    taint: Annotated[
        list[str] | None,
        typer.Option("--taint", help="Only VMs that tolerate it are placed there; repeat it."),
    ] = None,
    link: Annotated[
        str, typer.Option("--link", help="Shared uplink behind which it is, such as its rack's.")
    ] = "",
    output: OutputOption = None,
    orchestrator: UrlOption = None,
) -> None:
    """Say what a node is for placement. Replaces what was said."""
    from godwit import schedule as calls

    call = calls.place_node(node, labels=_pairs(label, "--label"), taints=taint or (), link=link)
    with session(ctx, output, orchestrator) as now:
        answer = now.client.send(call)
    print_answer(now.output, answer=answer.json, table=f"{node} is described", names=[node])


@place_app.command("vm")
def place_vm(
    ctx: typer.Context,
    vm: Annotated[str, typer.Argument(metavar="VM")],
    label: Labels = None,
    on: Annotated[
        list[str] | None,
        typer.Option("--on", metavar="KEY=VALUE", help="Only on nodes with this label; repeat it."),
    ] = None,
    tolerate: Annotated[
        list[str] | None, typer.Option("--tolerate", metavar="TAINT", help="Repeat it.")
    ] = None,
    apart: Annotated[str, typer.Option("--apart", help="Never two VMs of this word a node.")] = "",
    near: Annotated[str, typer.Option("--near", help="Better where VMs of this word are.")] = "",
    group: Annotated[
        str, typer.Option("--group", help="The limit `group` counts their moves together.")
    ] = "",
    output: OutputOption = None,
    orchestrator: UrlOption = None,
) -> None:
    """Say where a VM may be. Replaces what was said."""
    from godwit import schedule as calls

    placement = {
        "selector": _pairs(on, "--on"),
        "tolerations": tolerate or [],
        "apart": apart,
        "near": near,
        "group": group,
    }
    call = calls.place_vm(vm, labels=_pairs(label, "--label"), placement=placement)
    with session(ctx, output, orchestrator) as now:
        answer = now.client.send(call)
    print_answer(now.output, answer=answer.json, table=f"{vm} is described", names=[vm])
