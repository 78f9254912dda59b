# SPDX-License-Identifier: Apache-2.0
"""`godwit top`: the fleet, live: nodes, moves, operations, queue."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from services.cli import quantities
from services.cli.output import columns
from services.cli.session import UrlOption, session

if TYPE_CHECKING:
    from godwit.client import Client
    from godwit.models import Migration, Node

_QUEUE_SHOWN = 10
LOOK_S = 5.0
"""What is not told as an event, as the limits, is seen so late."""


def top(
    ctx: typer.Context,
    once: Annotated[bool, typer.Option("--once", help="Print it once and leave.")] = False,
    interval: Annotated[
        float, typer.Option("--interval", min=0.2, help="Seconds between two looks.")
    ] = 1.0,
    orchestrator: UrlOption = None,
) -> None:
    """Watch the fleet: nodes, moves under way, operations, and what waits and why. Ctrl-C ends.

    It looks again whenever something changes, and every few seconds besides.
    """
    with session(ctx, None, orchestrator) as now:
        if once:
            print(screen(now.client))
            return
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        changed = Changed(now.client)
        with Live(console=Console(), screen=True, auto_refresh=False) as live:
            while True:
                live.update(Text(screen(now.client)), refresh=True)
                time.sleep(interval)
                changed.wait()


class Changed:
    """Hears in a thread that something changed in the fleet.

    Where that cannot be heard (too many watch, an orchestrator that does not tell) it is as if
    something had changed all the time.
    """

    def __init__(self, client: Client) -> None:
        self._event = threading.Event()
        self._deaf = False
        self._client = client
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        from godwit.errors import GodwitClientError

        with self._client.another() as client:
            try:
                for _event in client.events():
                    self._event.set()
            except GodwitClientError:
                self._deaf = True
                self._event.set()

    def wait(self) -> None:
        """Until something has changed since the last call, or for LOOK_S."""
        self._event.wait(LOOK_S)
        if not self._deaf:
            self._event.clear()


def screen(client: Client) -> str:
    """Everything, as of now."""
    from godwit import calls, operations, schedule

    nodes = client.send_all(calls.list_nodes()).value
    moves = client.send(calls.list_migrations(unfinished=True)).value
    under_way = [each for each in moves if each.phase != "pending"]
    running = client.send(operations.list_operations(unfinished=True)).value
    queue = client.send(schedule.get_queue()).value
    used = {each.key: each for each in client.send_all(schedule.get_limits()).value}
    cluster = used["cluster"]
    head = (
        f"{len(nodes)} nodes, {sum(len(node.vm_ids) for node in nodes)} VMs, "
        f"{cluster.used}/{cluster.value} moves, {len(queue.entries)} waiting"
        + (f", FROZEN: {queue.frozen}" if queue.frozen else "")
    )
    parts = [
        head,
        columns(
            ["NODE", "STATE", "VMS", "FREE", "OUT", "IN"],
            [_node(node, used) for node in nodes],
            empty="no nodes",
        ),
    ]
    if running:
        rows = [
            [each.kind, each.node, quantities.percent(each.progress), each.reason]
            for each in running
        ]
        parts.append(columns(["OPERATION", "NODE", "PROGRESS", "WAITS FOR"], rows, empty=""))
    if under_way:
        parts.append(
            columns(
                ["VM", "FROM", "TO", "PHASE", "PROGRESS", "REASON"],
                [_move(each) for each in under_way],
                empty="",
            )
        )
    if queue.entries:
        rows = [
            [str(each.place), each.vm_id, each.source_node, each.reason, each.message]
            for each in queue.entries[:_QUEUE_SHOWN]
        ]
        parts.append(columns(["PLACE", "VM", "FROM", "HELD BY", "MESSAGE"], rows, empty=""))
    return "\n\n".join(parts)


def _node(node: Node, used: dict[str, Any]) -> list[str]:
    def of(kind: str) -> str:
        own, default = used.get(f"{kind}:{node.name}"), used[kind]
        return f"{own.used}/{own.value}" if own else f"0/{default.value}"

    state = "drained" if node.closed_by else "open"
    free = node.capabilities.memory_available_bytes if node.capabilities else 0
    return [
        node.name,
        state if node.reachable else "unreachable",
        str(len(node.vm_ids)),
        quantities.memory(free) if free else "",
        of("node-out"),
        of("node-in"),
    ]


def _move(each: Migration) -> list[str]:
    return [
        each.vm_id,
        each.source_node,
        each.destination_node,
        each.phase,
        quantities.percent(each.progress),
        each.reason,
    ]
