# SPDX-License-Identifier: Apache-2.0
"""TLS of a node: its certificates, and the keys that its guests depend on."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from services.common.errors import GodwitError
from services.common.peer_tls import ORCHESTRATOR_NAME
from services.pagecore.api import TlsIdentity

if TYPE_CHECKING:
    from services.common.tls import Certificates

log = logging.getLogger(__name__)

CALLERS_FILE = "orchestrators.pem"
CALLER_COUNT_MAX = 8
"""Orchestrators that are known by their keys: the last ones that said Hello."""
_END = b"-----END CERTIFICATE-----\n"


class Security:
    """What an agent with `--tls-dir` has."""

    def __init__(
        self, certificates: Certificates, identity: TlsIdentity, state_dir: Path | None = None
    ) -> None:
        """`identity`: the page core's, of the same files. It is read again with them.

        `state_dir`: where orchestrators that are pinned are kept; None: nowhere.
        """
        self.certificates = certificates
        self.identity = identity
        self._pins: dict[str, bytes] = {}
        """By VM: the key of the page server that its memory comes from."""
        self._file = state_dir / CALLERS_FILE if state_dir else None
        self._callers = self._read_callers()
        """Continuation certificates of orchestrators, PEM, the oldest first."""
        self.guests_need: Callable[[], bool] = lambda: False
        """Whether a migration is under way here: without one dates count. Any thread asks."""
        certificates.on_change(identity.reload)
        certificates.pinned_callers = self._pinned_callers

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

    def ends_unix_s(self) -> int:
        """When our own certificate ends."""
        from services.common.certificates import CERTIFICATE

        return int(self.certificates.loaded.ends[CERTIFICATE].timestamp())

    # --- orchestrators

    def _pinned_callers(self) -> tuple[bytes, ...]:
        return self._callers if self.guests_need() else ()

    def take_caller(self, der: bytes, proved: Mapping[str, Iterable[bytes]]) -> None:
        """An orchestrator has sent its continuation certificate. `proved`: of its connection.

        Believed only if a certificate of the orchestrator's name made the connection, perhaps with
        the key before this one, and only while a migration is under way here. One that cannot be
        taken is left, and logged.
        """
        from services.common import continuation

        names = {bytes(name) for name in proved.get("x509_subject_alternative_name", ())}
        if ORCHESTRATOR_NAME.encode() not in names or (
            continuation.pinned_name(ORCHESTRATOR_NAME).encode() in names
        ):
            return  # it is pinned: that is how it came here
        try:
            pem = continuation.check(der, dns_name=ORCHESTRATOR_NAME)
        except GodwitError as error:
            log.warning("an orchestrator cannot be pinned: %s", error)
            return
        if pem in self._callers:
            return
        self._callers = (*self._callers, pem)[-CALLER_COUNT_MAX:]
        if self._file is not None:
            try:
                scratch = self._file.with_suffix(".new")
                scratch.write_bytes(b"".join(self._callers))
                scratch.rename(self._file)
            except OSError as error:
                # Known for as long as this process lives.
                log.warning("%s cannot be written: %s", self._file, error)

    def _read_callers(self) -> tuple[bytes, ...]:
        try:
            data = self._file.read_bytes() if self._file else b""
        except OSError:
            return ()
        parts = [part + _END for part in data.split(_END) if part.strip()]
        # What gRPC cannot read it would refuse everybody for.
        return tuple(part for part in parts if _is_good(part))


def _is_good(pem: bytes) -> bool:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    from services.common import continuation

    try:
        der = x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)
        continuation.check(der, dns_name=ORCHESTRATOR_NAME)
    except (ValueError, GodwitError) as error:
        log.warning("a pinned orchestrator in %s is dropped: %s", CALLERS_FILE, error)
        return False
    return True
