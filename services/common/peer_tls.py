# SPDX-License-Identifier: Apache-2.0
"""What is known of TLS before it is used: names, options, with whom it is spoken.

Light: an agent that speaks plaintext must not wait for cryptography when a guest waits for it.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from services.common.listen import INSECURE_FLAG, TLS_DIR_ENV, TLS_DIR_FLAG

if TYPE_CHECKING:
    from services.common.tls import Certificates

log = logging.getLogger(__name__)

ORCHESTRATOR_NAME = "orchestrator.godwit"
"""As certificates.Subject says."""


def node_name(node: str) -> str:
    """The DNS name in the certificate of a node, as certificates.Subject says."""
    return f"{node}.node.godwit"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerTls:
    """With whom TLS is spoken, and as whom."""

    certificates: Certificates
    """Ours."""
    name: str
    """DNS name that the peer's certificate must have."""
    pin: Callable[[], bytes] = bytes
    """The peer's continuation certificate (services.common.continuation), PEM; empty: none yet."""


def add_tls_option(parser: argparse.ArgumentParser) -> None:
    """`--tls-dir`, as `tls_dir`; GODWIT_TLS_DIR stands in for it."""
    given = os.environ.get(TLS_DIR_ENV)
    parser.add_argument(
        TLS_DIR_FLAG,
        type=Path,
        default=Path(given) if given else None,
        metavar="DIR",
        help=f"speak TLS, with tls.crt, tls.key, ca.crt of this directory ({TLS_DIR_ENV})",
    )


def open_certificates(directory: Path | None) -> Certificates | None:
    """Those of `--tls-dir`; None: this process speaks plaintext, and says so.

    Raises:
        FailedPreconditionError: as Certificates.
    """
    if directory is not None:
        from services.common.tls import Certificates

        return Certificates(directory)
    log.warning(
        "PLAINTEXT: without %s whoever reaches this host's loopback, and with %s its network,"
        " reads guest memory",
        TLS_DIR_FLAG,
        INSECURE_FLAG,
    )
    return None
