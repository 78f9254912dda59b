# SPDX-License-Identifier: Apache-2.0
"""The certificates of a process, read again when their files change, and what TLS is made of them.

A directory has `tls.crt`, `tls.key` and `ca.crt` (services.common.certificates). They are looked at
once a second: a secret that Kubernetes mounts, or `godwit certs issue`, replaces them under us.
What cannot be used is left alone and said again and again; the last good ones go on.

A connection that lives does not mind that a certificate has ended: it was looked at when the
connection was made (DESIGN 3.4). New ones need one that is valid, but for keys that the page core
pins. So nothing here ever closes a connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import logging
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from services.common import certificates as names
from services.common import continuation
from services.common.errors import FailedPreconditionError

log = logging.getLogger(__name__)

CHECK_S = 1.0
COMPLAIN_S = 60.0
"""How often what is wrong with the files is said again."""
WARN_DAYS = 7
"""From so many days before its end a certificate is spoken of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What the files said when they were read."""

    chain_pem: bytes
    key_pem: bytes
    authority_pem: bytes
    """Whom we believe."""
    subject: names.Subject
    key_sha256: bytes
    """Of the SubjectPublicKeyInfo: by which a peer pins us."""
    continuation_der: bytes
    """See services.common.continuation; empty: the key is of no kind that can have one."""
    ends: dict[str, dt.datetime]
    """When each certificate ends, by file: the earliest of several."""


def _read(directory: Path) -> Loaded:
    paths = [directory / name for name in (names.CERTIFICATE, names.KEY, names.AUTHORITY)]
    try:
        chain, key, authority = (path.read_bytes() for path in paths)
        own = x509.load_pem_x509_certificates(chain)
        authorities = x509.load_pem_x509_certificates(authority)
        # As OpenSSL will: the key is the certificate's, the authority's file has one.
        _server_context(directory, require_client=True)
        subjects = names.subjects(own[0])
    except (OSError, ValueError) as error:
        raise FailedPreconditionError("CERTIFICATE_UNREADABLE", f"{directory}: {error}") from error
    if len(subjects) != 1:
        raise FailedPreconditionError(
            "CERTIFICATE_NAMELESS",
            f"{paths[0]} must name one node, orchestrator or person, it names {len(subjects)}",
            hint="`godwit certs issue` makes one",
        )
    return Loaded(
        chain_pem=chain,
        key_pem=key,
        authority_pem=authority,
        subject=subjects[0],
        key_sha256=continuation.key_sha256(own[0]),
        continuation_der=continuation.make(key, subjects[0].dns_name),
        ends={
            names.CERTIFICATE: min(each.not_valid_after_utc for each in own),
            names.AUTHORITY: min(each.not_valid_after_utc for each in authorities),
        },
    )


def _pem(der: bytes) -> bytes:
    return x509.load_der_x509_certificate(der).public_bytes(serialization.Encoding.PEM)


def _server_context(directory: Path, *, require_client: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(directory / names.CERTIFICATE, directory / names.KEY)
    context.load_verify_locations(directory / names.AUTHORITY)
    context.verify_mode = ssl.CERT_REQUIRED if require_client else ssl.CERT_OPTIONAL
    return context


class Certificates:
    """The certificates of this process. `kept` looks at their files."""

    def __init__(self, directory: Path) -> None:
        """Read them.

        Raises:
            FailedPreconditionError: CERTIFICATE_UNREADABLE, CERTIFICATE_NAMELESS.
        """
        self.directory = directory
        self._seen = self._stat()
        self.loaded = _read(directory)
        self.version = 1
        """Grows with each change."""
        self._complained_at = float("-inf")
        self._listeners: list[Callable[[], None]] = []
        self._warned: dict[str, tuple[int, str]] = {}
        self.pinned_callers: Callable[[], Sequence[bytes]] = tuple
        """Continuation certificates, PEM, by which gRPC's callers are known too. For any thread."""

    def _stat(self) -> tuple[tuple[int, int, int], ...]:
        found = []
        for name in (names.CERTIFICATE, names.KEY, names.AUTHORITY):
            try:
                status = (self.directory / name).stat()
            except OSError:
                found.append((0, 0, 0))
            else:
                found.append((status.st_mtime_ns, status.st_ino, status.st_size))
        return tuple(found)

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` after each change. It may raise OSError: it is called again then."""
        self._listeners.append(listener)

    def require(self, kind: names.Kind, name: str = "") -> None:
        """Check that they are whom this process is for.

        Raises:
            FailedPreconditionError: CERTIFICATE_OF_ANOTHER.
        """
        subject = self.loaded.subject
        if subject.kind is not kind or (name and subject.name != name):
            wanted = f"{kind} {name}".rstrip()
            raise FailedPreconditionError(
                "CERTIFICATE_OF_ANOTHER",
                f"{self.directory} has the certificate of {subject.dns_name}, not of {wanted}",
                hint="each node has a certificate of its own: `godwit certs issue node NAME`",
            )

    @contextlib.asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Look at the files for the length of the block.

        A task of its own and no group's: what fails in the block leaves it as it is.
        """
        task = asyncio.create_task(self._keep(), name="certificates")
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(CHECK_S)
            try:
                self.look()
            except Exception:  # a bug in here must not end what a guest depends on
                log.exception("certificates in %s cannot be looked at", self.directory)

    def look(self) -> bool:
        """Read them again if they have changed. True: they have, and the new ones are in force."""
        self._speak_of_ends()
        seen = self._stat()
        if seen == self._seen:
            return False
        try:
            loaded = _read(self.directory)
            if loaded.subject != self.loaded.subject:
                raise FailedPreconditionError(
                    "CERTIFICATE_OF_ANOTHER", f"it is {loaded.subject.dns_name}'s now"
                )
            for listener in self._listeners:
                listener()
        except (FailedPreconditionError, OSError) as error:
            # Half of a change, as a rule: a certificate is there and its key not yet.
            now = asyncio.get_running_loop().time()
            if now >= self._complained_at + COMPLAIN_S:
                self._complained_at = now
                log.warning("certificates in %s are not taken: %s", self.directory, error)
            return False
        self.loaded, self._seen = loaded, seen
        self.version += 1
        self._complained_at = float("-inf")
        log.info("certificates of %s are read again", loaded.subject.dns_name)
        return True

    def own_pin(self) -> bytes:
        """Our own continuation certificate, PEM: by it a node's processes know each other."""
        der = self.loaded.continuation_der
        return _pem(der) if der else b""

    def seconds_left(self, now: float | None = None) -> dict[str, float]:
        """How long each is valid, by file; negative: it has ended."""
        now = dt.datetime.now(dt.UTC).timestamp() if now is None else now
        return {name: end.timestamp() - now for name, end in self.loaded.ends.items()}

    def _speak_of_ends(self) -> None:
        for name, left_s in self.seconds_left().items():
            state = "" if left_s > WARN_DAYS * 86400 else "soon" if left_s > 0 else "ended"
            if self._warned.get(name) == (self.version, state):
                continue
            self._warned[name] = self.version, state
            if state == "soon":
                log.warning("%s in %s ends in %.0f h", name, self.directory, left_s / 3600)
            elif state:
                log.error(
                    "%s in %s HAS ENDED: new peers refuse it; guests that are arriving go on by"
                    " pinned keys, renew it", name, self.directory,
                )  # fmt: skip

    # --- for gRPC

    def server_credentials(self) -> grpc.ServerCredentials:
        """For servers: callers must show a certificate. Those of each moment count."""
        told: tuple[int, tuple[bytes, ...]] = (self.version, ())

        # Asked for each connection.
        def fetch() -> Any:
            nonlocal told
            now = self.version, tuple(self.pinned_callers())
            if told == now:
                return None
            told = now
            return self._configuration(now[1])

        return grpc.dynamic_ssl_server_credentials(
            self._configuration(()), fetch, require_client_authentication=True
        )

    def _configuration(self, pinned: Sequence[bytes]) -> Any:
        loaded = self.loaded
        pairs = [(loaded.key_pem, loaded.chain_pem)]
        if loaded.continuation_der:
            # Shown to who asks for its second name.
            pairs.append((loaded.key_pem, _pem(loaded.continuation_der)))
        return grpc.ssl_server_certificate_configuration(
            pairs, root_certificates=b"".join((loaded.authority_pem, *pinned))
        )

    def channel_credentials(self, pin: bytes = b"") -> grpc.ChannelCredentials:
        """For clients, as they are now. `pin`: of the one peer that is known by its key."""
        loaded = self.loaded
        if pin:
            return grpc.ssl_channel_credentials(
                root_certificates=pin,
                private_key=loaded.key_pem,
                certificate_chain=_pem(loaded.continuation_der),
            )
        return grpc.ssl_channel_credentials(
            root_certificates=loaded.authority_pem,
            private_key=loaded.key_pem,
            certificate_chain=loaded.chain_pem,
        )

    # --- for HTTP

    def server_context(self) -> ssl.SSLContext:
        """For a server whose callers may show a certificate. Those of each moment count."""
        made = self.version, _server_context(self.directory, require_client=False)

        def choose(tls: ssl.SSLObject | ssl.SSLSocket, _name: str | None, _old: Any) -> None:
            nonlocal made
            if made[0] != self.version:
                made = self.version, _server_context(self.directory, require_client=False)
            tls.context = made[1]

        outer = made[1]
        outer.sni_callback = choose
        return outer
