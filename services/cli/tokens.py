# SPDX-License-Identifier: Apache-2.0
"""`godwit tokens`: bearer tokens for `godwit orchestrator --tokens-file`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    help="Make bearer tokens. The orchestrator's file has their hashes only.",
)


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Whose it is; stands in the audit log.")],
    role: Annotated[str, typer.Argument(help="viewer, operator or admin; node for an agent.")],
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            "--tokens-file",
            envvar="GODWIT_TOKENS_FILE",
            metavar="PATH",
            help="The orchestrator's tokens file: the line is added. Without it, it is printed.",
        ),
    ] = None,
) -> None:
    """Make a token and show it, once. To revoke it take its line out of the file.

    A running orchestrator notices either within a second.
    """
    from services.common.auth.tokens import new_token

    token, line = new_token(name, role)
    if file is None:
        typer.echo(f"add this line to the tokens file:\n{line}\nthe token:", err=True)
    else:
        _append(file, str(line))
        typer.echo(f"{file}: {line.name}, {line.caller}; the token:", err=True)
    print(token)


def _append(path: Path, line: str) -> None:
    from services.common.errors import FailedPreconditionError

    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(fd, "r+b", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(end - 1, 0))
            ends_a_line = file.read(1) in (b"", b"\n")
            file.write(("" if ends_a_line else "\n").encode() + line.encode() + b"\n")
            os.fsync(fd)
    except OSError as error:
        raise FailedPreconditionError("FILE_UNWRITABLE", f"{path}: {error.strerror}") from error
