# SPDX-License-Identifier: Apache-2.0
"""`godwit store`: copies of the store, and making a forgetful one whole. No server is asked."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.session import Options

if TYPE_CHECKING:
    from services.orchestrator.rebuild import Report

app = typer.Typer(
    no_args_is_help=True,
    help="Back up, restore and rebuild the orchestrator's store. A PostgreSQL store is backed up"
    " and restored by PostgreSQL's own tools (pg_basebackup, point-in-time recovery); rebuild it"
    " after every restore.",
)

StoreOption = Annotated[
    str,
    typer.Option(
        "--store",
        envvar="GODWIT_STORE",
        help="The orchestrator's SQLite file, or its postgresql:// URL (rebuild only).",
        metavar="PATH|URL",
    ),
]
DEFAULT = "godwit.db"


def _file(store: str) -> Path:
    from services.common.errors import FailedPreconditionError
    from services.orchestrator.store.opening import server_of

    if server_of(store):
        raise FailedPreconditionError(
            "STORE_ON_SERVER",
            "a store on PostgreSQL is backed up and restored by PostgreSQL's own tools",
            hint="pg_dump, pg_basebackup; after a restore, `godwit store rebuild --from-agents`",
        )
    return Path(store)


@app.command()
def backup(
    to: Annotated[Path, typer.Argument(help="Where to write the copy; it must not exist.")],
    store: StoreOption = DEFAULT,
) -> None:
    """Copy the store as it is at one moment, also while the orchestrator runs."""
    from services.orchestrator.store import backup as copies

    len_bytes = copies.backup(_file(store), to)
    print(f"{to}: {len_bytes} bytes, a whole store")


@app.command()
def restore(
    copy: Annotated[Path, typer.Argument(help="A copy that `godwit store backup` made.")],
    store: StoreOption = DEFAULT,
) -> None:
    """Put a copy in the store's place, and mark it: nothing is decided before a rebuild.

    The orchestrator must be stopped. What was there is kept beside it.
    """
    from services.orchestrator.store import backup as copies

    incarnation = copies.restore(_file(store), copy)
    print(f"{store}: restored from {copy} as store {incarnation}; the former one is kept beside it")
    print(
        "it is in doubt: run `godwit store rebuild --from-agents` now, then start the orchestrator"
    )


@app.command()
def rebuild(
    ctx: typer.Context,
    store: StoreOption = DEFAULT,
    from_agents: Annotated[
        bool, typer.Option("--from-agents", help="Merge the journals of all nodes' agents.")
    ] = False,
    node: Annotated[
        list[str] | None,
        typer.Option(
            "--node", metavar="NAME=HOST:PORT", help="A node that the store does not know. Repeat."
        ),
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(
            "--without",
            metavar="NAME",
            help="Do not ask this node. When it comes back the store is in doubt again. Repeat.",
        ),
    ] = None,
) -> None:
    """Learn from the agents' journals what the store has forgotten, and end the doubt.

    The orchestrator must be stopped; VMs run on and pages are served. Nothing starts or stops a
    guest.
    """
    if not from_agents:
        raise typer.BadParameter(
            "there is no other way yet; it asks every node", param_hint="--from-agents"
        )
    import asyncio

    tls_dir = ctx.ensure_object(Options).certificates()
    report = asyncio.run(_rebuild(store, node or [], without or [], tls_dir))
    for note in report.notes:
        print(note)
    asked = ", ".join(report.nodes) or "no node"
    print(
        f"{_shown(store)}: rebuilt as store {report.incarnation} from {asked}:"
        f" {report.vm_count} VMs, {len(report.notes)} changes"
    )


def _shown(store: str) -> str:
    from services.orchestrator.store.opening import server_of

    server = server_of(store)
    return server.render_as_string(hide_password=True) if server else store


async def _rebuild(
    store: str, nodes: list[str], without: list[str], tls_dir: Path | None = None
) -> Report:
    import time

    from services.common.peer_tls import open_certificates
    from services.orchestrator.agents import AgentPool
    from services.orchestrator.election import alone
    from services.orchestrator.main import read_node
    from services.orchestrator.rebuild import rebuild as merge_all
    from services.orchestrator.store import backup as copies
    from services.orchestrator.store import open_store
    from services.orchestrator.store.opening import read_store

    where = read_store(store)
    async with contextlib.AsyncExitStack() as stack:
        if isinstance(where, Path):
            stack.enter_context(copies.in_use(where, alone=True))
        opened = await stack.enter_async_context(open_store(where))
        if not isinstance(where, Path):
            await stack.enter_async_context(alone(opened))
        for text in nodes:
            name, address = read_node(text)
            await opened.fleet.put_node(name, address, now_ns=time.time_ns())
        certificates = open_certificates(tls_dir)
        return await merge_all(
            opened,
            lambda incarnation: AgentPool(incarnation, certificates=certificates),
            without=without,
            now_ns=time.time_ns(),
        )
