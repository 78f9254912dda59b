# SPDX-License-Identifier: Apache-2.0
"""The page core's side of our certificates, and how long they are good."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.common.certificates import AUTHORITY, CERTIFICATE, KEY
from services.common.errors import FailedPreconditionError
from services.common.tls import Certificates
from services.pagecore.api import PageCore, TlsIdentity


def open_identity(core: PageCore, certificates: Certificates) -> TlsIdentity:
    """The page core's of the same files.

    Raises:
        FailedPreconditionError: CERTIFICATE_UNREADABLE.
    """
    where = certificates.directory
    try:
        return core.create_tls_identity(
            certificate=str(where / CERTIFICATE),
            key=str(where / KEY),
            authority=str(where / AUTHORITY),
        )
    except OSError as error:
        raise FailedPreconditionError(
            "CERTIFICATE_UNREADABLE", f"{where}: {error.strerror}"
        ) from error


class TlsCollector(Collector):
    """Of a process with `--tls-dir`."""

    def __init__(self, certificates: Certificates, identity: TlsIdentity | None = None) -> None:
        """`identity`: the page core's, where the process has one."""
        self._certificates = certificates
        self._identity = identity

    def collect(self) -> Iterator[Metric]:
        """As of now."""
        left = GaugeMetricFamily(
            "godwit_certificate_expiry_seconds",
            "Until a certificate ends; negative: it has ended, new peers refuse it",
            labels=["file"],
        )
        for file, seconds in self._certificates.seconds_left().items():
            left.add_metric([file], seconds)
        yield left
        if self._identity is not None:
            yield CounterMetricFamily(
                "godwit_tls_pinned_handshakes",
                "Handshakes that only a pinned key let through: renew the peer's certificate",
                value=self._identity.pinned_count(),
            )
