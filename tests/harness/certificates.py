# SPDX-License-Identifier: Apache-2.0
"""Certificates of a small fleet, as `godwit certs` makes them, good ones and others."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from pathlib import Path

from services.common import certificates
from services.common.certificates import Kind, Pair, Subject


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What one end of a connection has."""

    directory: Path
    """With tls.crt, tls.key and ca.crt, as `--tls-dir` takes it."""

    @property
    def certificate(self) -> Path:
        """Its own."""
        return self.directory / certificates.CERTIFICATE

    @property
    def key(self) -> Path:
        """Of that certificate."""
        return self.directory / certificates.KEY

    @property
    def authority(self) -> Path:
        """Whom it believes."""
        return self.directory / certificates.AUTHORITY


class FleetCertificates:
    """An authority, one that nobody believes, and what they sign."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._now = dt.datetime.now(dt.UTC)
        self.authority = certificates.make_authority(days=10, now=self._now)
        self.stranger = certificates.make_authority(days=10, now=self._now)

    def issue(
        self, kind: Kind, name: str = "", *, by_stranger: bool = False, expired: bool = False
    ) -> Shown:
        """A certificate in a directory of its own; its owner believes the true authority."""
        subject = Subject(kind=kind, name=name)
        authority = self.stranger if by_stranger else self.authority
        began = self._now - dt.timedelta(days=9) if expired else self._now
        pair = certificates.issue(authority, subject, days=1, now=began)
        marks = f"{'-stranger' if by_stranger else ''}{'-expired' if expired else ''}"
        return self._write(f"{subject.dns_name}{marks}", pair)

    def _write(self, name: str, pair: Pair) -> Shown:
        shown = Shown(directory=self._directory / name)
        shown.directory.mkdir(parents=True)
        shown.authority.write_bytes(self.authority.certificate_pem)
        shown.key.write_bytes(pair.key_pem)
        shown.certificate.write_bytes(pair.certificate_pem)
        return shown
