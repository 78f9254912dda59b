# SPDX-License-Identifier: Apache-2.0
"""`godwit nodes`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from services.cli import quantities
from services.cli.output import columns, print_answer
from services.cli.session import OutputOption, UrlOption, session

if TYPE_CHECKING:
    from godwit.models import Node


def nodes(ctx: typer.Context, output: OutputOption = None, orchestrator: UrlOption = None) -> None:
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
