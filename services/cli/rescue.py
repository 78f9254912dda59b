# SPDX-License-Identifier: Apache-2.0
"""`godwit recover`, `abandon` and `break-glass`: for migrations that do not go on by themselves."""

from __future__ import annotations

import getpass
from typing import Annotated

import typer

from services.cli.migrations import MigrationArgument, print_one
from services.cli.output import print_answer
from services.cli.session import OutputOption, UrlOption, session
from services.cli.watching import ending

EpochOption = Annotated[
    int,
    typer.Option(
        "--epoch", metavar="N", help="The migration's epoch, as `godwit migrations show` has it."
    ),
]


def recover(
    ctx: typer.Context,
    migration: MigrationArgument,
    output: OutputOption = None,
    orchestrator: UrlOption = None,
) -> None:
    """Look at both nodes anew, do what is safe at once, and say what is missing."""
    from godwit import calls

    with session(ctx, output, orchestrator) as now:
        answer = now.client.send(calls.recover_migration(migration))
    found = answer.value
    print_answer(
        now.output,
        answer=answer.json,
        table="\n".join([ending(found.migration), *(f"  - {line}" for line in found.findings)]),
        names=[migration],
    )


def abandon(
    ctx: typer.Context,
    migration: MigrationArgument,
    epoch: EpochOption,
    confirm: Annotated[
        bool, typer.Option("--confirm", help="Yes: the guest is given up, for good.")
    ] = False,
    output: OutputOption = None,
    orchestrator: UrlOption = None,
) -> None:
    """Give the guest of a migration up: both nodes free what is left of it.

    Refused where a guest runs, may run, or can still be made to run.
    """
    from godwit import calls

    with session(ctx, output, orchestrator) as now:
        answer = now.client.send(calls.abandon_migration(migration, epoch, confirm=confirm))
    print_one(now.output, answer)


def break_glass(
    ctx: typer.Context,
    migration: MigrationArgument,
    epoch: EpochOption,
    fenced: Annotated[
        str,
        typer.Option(
            "--destination-is-fenced",
            metavar="VM",
            help="The VM's id, typed once more: its destination is powered off, or cut off from"
            " disks and network, and you have seen to it.",
        ),
    ],
    because: Annotated[str, typer.Option("--because", help="Why; it stays in the history.")],
    operator: Annotated[
        str, typer.Option("--operator", help="Who you are; it stays in the history.")
    ] = "",
    output: OutputOption = None,
    orchestrator: UrlOption = None,
) -> None:
    """Give a guest back to its source although its destination cannot be asked.

    If the destination did let it run, or still can, there will be two guests on one disk: fence it
    first. docs/runbooks/needs-attention.md. Refused where the guest is known to have run there.
    """
    from godwit import calls

    who = operator or getpass.getuser()
    with session(ctx, output, orchestrator) as now:
        call = calls.break_glass(
            migration, epoch, fenced_vm_id=fenced, operator=who, because=because
        )
        answer = now.client.send(call)
    print_one(now.output, answer)
