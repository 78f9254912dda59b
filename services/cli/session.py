# SPDX-License-Identifier: Apache-2.0
"""What every command that asks the orchestrator shares: the options, the client."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.output import OutputFormat

if TYPE_CHECKING:
    from godwit.bearer import Token
    from godwit.client import Client  # not at run time: --help must not wait for an HTTP stack

DEFAULT_URL = "http://127.0.0.1:8080"
DEFAULT_TLS_URL = "https://127.0.0.1:8080"
ENV_URL = "GODWIT_ORCHESTRATOR"
TLS_DIR_ENV = "GODWIT_TLS_DIR"
"""As services.common.listen says, which imports more than --help may wait for."""
ENV_TOKEN = "GODWIT_TOKEN"  # noqa: S105 - a name
ENV_TOKEN_FILE = "GODWIT_TOKEN_FILE"  # noqa: S105

OutputOption = Annotated[
    OutputFormat | None,
    typer.Option("--output", "-o", help="How to print the answer.", show_default=False),
]
UrlOption = Annotated[
    str | None,
    typer.Option(
        "--orchestrator",
        metavar="URL[,URL...]",
        help="Where the orchestrator's REST API is; of several the one that leads is looked for."
        f" [env: {ENV_URL}; default: {DEFAULT_URL}]",
        show_default=False,
    ),
]
TokenOption = Annotated[
    str | None,
    typer.Option(
        "--token",
        metavar="TOKEN",
        help="Bearer token. Others on this machine can read it there: prefer --token-file."
        f" [env: {ENV_TOKEN}]",
        show_default=False,
    ),
]
TokenFileOption = Annotated[
    Path | None,
    typer.Option(
        "--token-file",
        metavar="PATH",
        help=f"File with a bearer token, read again with each request. [env: {ENV_TOKEN_FILE}]",
        show_default=False,
    ),
]


TlsDirOption = Annotated[
    Path | None,
    typer.Option(
        "--tls-dir",
        metavar="DIR",
        help="Certificates for the orchestrator: ca.crt, and tls.crt and tls.key to be known by."
        f" [env: {TLS_DIR_ENV}]",
        show_default=False,
    ),
]


LimitOption = Annotated[
    int, typer.Option("--limit", min=0, help="How many at most, the newest; 0: all.")
]
LIMIT_DEFAULT = 100


@dataclass(slots=True)
class Options:
    """Options of the command, each None until given; the innermost one counts."""

    output: OutputFormat | None = None
    url: str | None = None
    tls_dir: Path | None = None
    token: str | None = None
    token_file: Path | None = None

    def override(self, output: OutputFormat | None, url: str | None) -> None:
        """Take over what a subcommand was given."""
        self.output = output or self.output
        self.url = url or self.url

    def certificates(self) -> Path | None:
        """The directory with them; None: plaintext, or a certificate that everybody believes."""
        given = os.environ.get(TLS_DIR_ENV)
        return self.tls_dir or (Path(given) if given else None)

    def bearer(self) -> Token:
        """The token to bring; what was given on the command line counts before the environment."""
        from godwit.bearer import token_of_file

        if self.token:
            return self.token
        if self.token_file:
            return token_of_file(self.token_file)
        if token := os.environ.get(ENV_TOKEN):
            return token
        path = os.environ.get(ENV_TOKEN_FILE)
        return token_of_file(Path(path)) if path else ""


@dataclass(frozen=True, slots=True)
class Session:
    """A client, and the form of output."""

    client: Client
    output: OutputFormat


@contextmanager
def session(ctx: typer.Context, output: OutputFormat | None, url: str | None) -> Iterator[Session]:
    """A client for the orchestrator that the options name."""
    from godwit.client import Client

    options = ctx.ensure_object(Options)
    options.override(output, url)
    tls_dir = options.certificates()
    chosen = options.url or os.environ.get(ENV_URL) or (DEFAULT_TLS_URL if tls_dir else DEFAULT_URL)
    for each in chosen.split(","):
        if not each.strip().startswith(("http://", "https://")):
            raise typer.BadParameter(
                f"{each!r} is not a URL; write for example {DEFAULT_URL}",
                param_hint=f"--orchestrator or {ENV_URL}",
            )
    with Client(chosen, tls_dir=tls_dir, token=options.bearer()) as client:
        yield Session(client, options.output or OutputFormat.TABLE)
