# SPDX-License-Identifier: Apache-2.0
"""What every command that asks the orchestrator shares: the options, the client."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.output import OutputFormat

if TYPE_CHECKING:
    from godwit.client import Client  # not at run time: --help must not wait for an HTTP stack

DEFAULT_URL = "http://127.0.0.1:8080"
ENV_URL = "GODWIT_ORCHESTRATOR"

OutputOption = Annotated[
    OutputFormat | None,
    typer.Option("--output", "-o", help="How to print the answer.", show_default=False),
]
UrlOption = Annotated[
    str | None,
    typer.Option(
        "--orchestrator",
        metavar="URL",
        help=f"Where the orchestrator's REST API is. [env: {ENV_URL}; default: {DEFAULT_URL}]",
        show_default=False,
    ),
]


@dataclass(slots=True)
class Options:
    """Options of the command, each None until given; the innermost one counts."""

    output: OutputFormat | None = None
    url: str | None = None

    def override(self, output: OutputFormat | None, url: str | None) -> None:
        """Take over what a subcommand was given."""
        self.output = output or self.output
        self.url = url or self.url


@dataclass(frozen=True, slots=True)
class Session:
    """A client, and the form of output."""

    client: Client
    output: OutputFormat


@contextmanager
def session(ctx: typer.Context, output: OutputFormat | None, url: str | None) -> Iterator[Session]:
    """A client for the orchestrator that the options name."""
    import os

    from godwit.client import Client

    options = ctx.ensure_object(Options)
    options.override(output, url)
    chosen = options.url or os.environ.get(ENV_URL) or DEFAULT_URL
    if not chosen.startswith(("http://", "https://")):
        raise typer.BadParameter(
            f"{chosen!r} is not a URL; write for example {DEFAULT_URL}",
            param_hint=f"--orchestrator or {ENV_URL}",
        )
    with Client(chosen) as client:
        yield Session(client, options.output or OutputFormat.TABLE)
