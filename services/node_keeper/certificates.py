# SPDX-License-Identifier: Apache-2.0
"""Copies the certificates of one node out of a directory that has those of all.

A DaemonSet can mount one Secret for all its pods, and each of them needs its own: NODE.crt,
NODE.key and ca.crt there become tls.crt, tls.key and ca.crt here, as `--tls-dir` wants them.
Processes look at their files once a second: one that was renewed is in use a moment later.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cryptography import x509

from services.common import certificates as files
from services.common.errors import FailedPreconditionError


@dataclass(frozen=True, slots=True, kw_only=True)
class Copies:
    """Which certificates, from where to where."""

    source: Path
    node: str
    target: Path

    def copy(self) -> bool:
        """Copy what differs; True: something did. Blocks.

        Raises:
            FailedPreconditionError: CERTIFICATE_UNREADABLE: this node has none there, or its key
                belongs to another.
        """
        names = (
            (files.AUTHORITY, files.AUTHORITY, False),
            (f"{self.node}.key", files.KEY, True),
            # The certificate last: who reads in between finds a pair that does not match, and
            # keeps what it had.
            (f"{self.node}.crt", files.CERTIFICATE, False),
        )
        try:
            wanted = {target: (self.source / name).read_bytes() for name, target, _ in names}
            x509.load_pem_x509_certificates(wanted[files.AUTHORITY])
        except (OSError, ValueError) as error:
            raise FailedPreconditionError(
                "CERTIFICATE_UNREADABLE",
                f"no certificate for node {self.node}: {error}",
                hint="tls.mode selfSigned: the CronJob makes it at its next run; certManager: add"
                " the node to tls.certManager.nodes",
            ) from error
        files.read_pair(self.source / f"{self.node}.crt", self.source / f"{self.node}.key")
        changed = False
        for _, target, secret in names:
            path = self.target / target
            if not path.exists() or path.read_bytes() != wanted[target]:
                files.replace(path, wanted[target], secret=secret)
                changed = True
        return changed
