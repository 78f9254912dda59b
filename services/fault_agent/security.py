# SPDX-License-Identifier: Apache-2.0
"""TLS of a node: its certificates, and the keys that its guests depend on."""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING

from services.pagecore.api import TlsIdentity

if TYPE_CHECKING:
    from services.common.tls import Certificates

log = logging.getLogger(__name__)


class Security:
    """What an agent with `--tls-dir` has."""

    def __init__(self, certificates: Certificates, identity: TlsIdentity) -> None:
        """`identity`: the page core's, of the same files. It is read again with them."""
        self.certificates = certificates
        self.identity = identity
        self._pins: dict[str, bytes] = {}
        """By VM: the key of the page server that its memory comes from."""
        certificates.on_change(identity.reload)

    def pin(self, vm_id: str, key: bytes) -> None:
        """Believe the page server of an arriving VM by this key, in place of the one before."""
        if self._pins.get(vm_id) == key:
            return
        try:
            self.identity.pin(key)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            # It is as good as its certificate then.
            log.error("the page server of %s cannot be pinned: too many are", vm_id)
            return
        self.unpin(vm_id)
        self._pins[vm_id] = key

    def unpin(self, vm_id: str) -> None:
        """The VM has its memory, or needs it no more. Idempotent."""
        key = self._pins.pop(vm_id, None)
        if key is not None:
            self.identity.unpin(key)
