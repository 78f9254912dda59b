# SPDX-License-Identifier: Apache-2.0
"""Certificates of a cluster on one host, by an authority of its own."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from pathlib import Path

from services.common.certificates import (
    AUTHORITY,
    CERTIFICATE,
    KEY,
    Kind,
    Pair,
    Subject,
    issue,
    make_authority,
    replace,
)

DAYS = 30
ORCHESTRATOR = "orchestrator"
OPERATOR = "operator"
"""Whoever drives the cluster."""


@dataclass(slots=True, kw_only=True)
class ClusterTls:
    """The authority, and a directory a member for `--tls-dir`."""

    directory: Path
    authority: Pair

    def member(self, name: str) -> Path:
        """The directory of a node, of ORCHESTRATOR, of OPERATOR."""
        return self.directory / name

    def subject(self, name: str) -> Subject:
        """Who that is."""
        if name == ORCHESTRATOR:
            return Subject(kind=Kind.ORCHESTRATOR, name="")
        if name == OPERATOR:
            return Subject(kind=Kind.ADMIN, name=OPERATOR)
        return Subject(kind=Kind.NODE, name=name)

    def trust(self, name: str, *authorities: Pair) -> None:
        """Have a member believe these, and no other."""
        bundle = b"".join(each.certificate_pem for each in authorities)
        replace(self.member(name) / AUTHORITY, bundle, secret=False)

    def renew(
        self,
        name: str,
        *,
        now: dt.datetime | None = None,
        days: int = DAYS,
        key: Pair | None = None,
    ) -> Pair:
        """Give a member a new certificate by the present authority.

        `key`: of a pair that it had, to go on with; else it gets a new one.
        """
        pair = issue(
            self.authority,
            self.subject(name),
            addresses=("127.0.0.1", "localhost") if name == ORCHESTRATOR else (),
            days=days,
            now=now or dt.datetime.now(dt.UTC),
            key=key.key if key else None,
        )
        self.member(name).mkdir(exist_ok=True, mode=0o700)
        replace(self.member(name) / KEY, pair.key_pem, secret=True)
        replace(self.member(name) / CERTIFICATE, pair.certificate_pem, secret=False)
        return pair


def make_cluster_tls(directory: Path, node_names: tuple[str, ...]) -> ClusterTls:
    """A new authority, and certificates for an orchestrator, its nodes and who drives them."""
    directory.mkdir(mode=0o700)
    made = ClusterTls(
        directory=directory, authority=make_authority(days=DAYS, now=dt.datetime.now(dt.UTC))
    )
    for name in (ORCHESTRATOR, OPERATOR, *node_names):
        made.renew(name)
        made.trust(name, made.authority)
    return made
