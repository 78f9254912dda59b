# SPDX-License-Identifier: Apache-2.0
"""`godwit nodes`, `godwit idle`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli import quantities
from services.cli.exit_status import ExitStatus
from services.cli.output import columns, print_answer
from services.cli.session import OutputOption, UrlOption, session

if TYPE_CHECKING:
    from godwit.models import Node


def nodes(
    ctx: typer.Context,
    output: OutputOption = None,
    orchestrator: UrlOption = None,
    all_reachable: Annotated[
        bool, typer.Option("--all-reachable", help="Exit 5 unless there is one and each answers.")
    ] = False,
) -> None:
    """List the nodes of the fleet."""
    from godwit import calls

    with session(ctx, output, orchestrator) as now:
        answer = now.client.send_all(calls.list_nodes())
    print_answer(
        now.output,
        answer=answer.json,
        table=columns(
            ["NODE", "REACHABLE", "AGENT", "VMS", "FREE MEMORY", "VMM", "MESSAGE"],
            [_row(node) for node in answer.value],
            empty="no nodes: start one with `godwit fault-agent`",
        ),
        names=[node.name for node in answer.value],
    )
    if all_reachable and not (answer.value and all(node.reachable for node in answer.value)):
        raise typer.Exit(ExitStatus.UNREACHABLE)


def idle(ctx: typer.Context, orchestrator: UrlOption = None) -> None:
    """Say whether anything depends on this fleet: exit 0 if nothing does, 3 if something does.

    A guest on any node, and a migration that has not ended, whose source keeps memory. What stands
    before an uninstall.
    """
    from godwit import calls

    with session(ctx, None, orchestrator) as now:
        guests = [vm.vm_id for vm in now.client.send_all(calls.list_vms()).value]
        unfinished = now.client.send_all(calls.list_migrations(unfinished=True)).value
    moves = [each.migration_id for each in unfinished]
    if not guests and not moves:
        print("nothing depends on this fleet")
        return
    for text, names in (("guests", guests), ("migrations that have not ended", moves)):
        if names:
            print(f"{len(names)} {text}: {', '.join(names[:20])}", file=sys.stderr)
    print(
        "  end or move them first; `helm uninstall --no-hooks` does not ask, and the guests that"
        " are left are lost",
        file=sys.stderr,
    )
    raise typer.Exit(ExitStatus.REFUSED)


def _row(node: Node) -> list[str]:
    can = node.capabilities
    versions = (can.vmm_versions if can else None) or {}
    return [
        node.name,
        "yes" if node.reachable else "no",
        node.agent_address,
        str(len(node.vm_ids)),
        quantities.memory(can.memory_available_bytes) if can else "",
        ", ".join(f"{driver} {version}" for driver, version in versions.items()),
        node.message,
    ]
