# SPDX-License-Identifier: Apache-2.0
"""`godwit certs`: a private authority and the certificates of a fleet, for those who have none."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli import certs_cluster

if TYPE_CHECKING:
    from services.common.certificates import Pair, Subject

app = typer.Typer(
    no_args_is_help=True,
    help="Make a private certificate authority, and certificates for nodes, orchestrators and"
    " people. A fleet that has an authority of its own needs none of it.",
)

DirectoryOption = Annotated[
    Path,
    typer.Option(
        "--authority", envvar="GODWIT_AUTHORITY", help="The authority's directory.", metavar="DIR"
    ),
]
DEFAULT = Path("godwit-authority")

app.command()(certs_cluster.cluster)


@app.command()
def init(
    directory: Annotated[Path, typer.Argument(help="Where to make it.")] = DEFAULT,
    days: Annotated[int, typer.Option(help="How long it is good for.")] = 3650,
) -> None:
    """Make an authority. Its key stays in that directory: keep it off the nodes, and safe."""
    from services.common import certificates

    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    certificates.refuse_existing(directory / certificates.AUTHORITY)
    pair = certificates.make_authority(days=days, now=_now())
    certificates.write_new(directory / certificates.AUTHORITY_KEY, pair.key_pem, secret=True)
    certificates.write_new(directory / certificates.AUTHORITY, pair.certificate_pem, secret=False)
    print(f"{directory}: an authority, good until {_day(pair)}")
    print("next: godwit certs issue node NAME --to DIR, for each node; orchestrator; admin NAME")


@app.command()
def issue(
    kind: Annotated[str, typer.Argument(help="node, orchestrator, viewer, operator or admin.")],
    name: Annotated[str, typer.Argument(help="The node's, the person's.")] = "",
    to: Annotated[Path | None, typer.Option(help="Directory for tls.crt, tls.key, ca.crt.")] = None,
    address: Annotated[
        list[str] | None,
        typer.Option(help="Host name or number under which others call it. Repeatable."),
    ] = None,
    authority: DirectoryOption = DEFAULT,
    days: Annotated[int, typer.Option(help="How long it is good for.")] = 365,
    renew: Annotated[bool, typer.Option(help="Replace what is there; processes notice.")] = False,
) -> None:
    """Make a key and a certificate for one process or person."""
    from services.common import certificates

    subject = _subject(kind, name)
    to = to or Path(subject.dns_name)
    ours = certificates.read_pair(
        authority / certificates.AUTHORITY, authority / certificates.AUTHORITY_KEY
    )
    pair = certificates.issue(ours, subject, addresses=address or [], days=days, now=_now())
    to.mkdir(mode=0o700, parents=True, exist_ok=True)
    write = certificates.replace if renew else certificates.write_new
    # The certificate last: who reads them in between finds the old pair, or a key without its
    # certificate, which it refuses.
    write(to / certificates.AUTHORITY, ours.certificate_pem, secret=False)
    write(to / certificates.KEY, pair.key_pem, secret=True)
    write(to / certificates.CERTIFICATE, pair.certificate_pem, secret=False)
    print(f"{to}: {subject.dns_name}, good until {_day(pair)}")


def _subject(kind: str, name: str) -> Subject:
    from services.common.certificates import Kind, Subject
    from services.common.errors import InvalidArgumentError

    if kind not in set(Kind):
        raise InvalidArgumentError("FIELD_INVALID", f"{kind!r} is none of {', '.join(Kind)}")
    return Subject(kind=Kind(kind), name=name)


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


def _day(pair: Pair) -> str:
    return f"{pair.certificate.not_valid_after_utc:%Y-%m-%d}"
