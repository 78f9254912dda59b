# SPDX-License-Identifier: Apache-2.0
"""A private certificate authority, for fleets that have none of their own.

Who somebody is stands in the certificate's DNS names, where every TLS library checks it:

| who | name |
|---|---|
| a node: its fault agent and its page server | `<node>.node.godwit` |
| an orchestrator | `orchestrator.godwit` |
| a person or a program that calls the API | `<name>.viewer.godwit`, `.operator.`, `.admin.` |

Addresses under which a server is called by others than us may stand beside it. A directory of files
has the names of a Kubernetes TLS secret, `tls.crt`, `tls.key`, `ca.crt`, so that cert-manager's
secrets can be mounted as they are. Keys are P-256. Source: RFC 5280, RFC 6125.
"""

from __future__ import annotations

import datetime as dt
import enum
import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from services.common.errors import FailedPreconditionError, InvalidArgumentError

CERTIFICATE = "tls.crt"
KEY = "tls.key"
AUTHORITY = "ca.crt"
AUTHORITY_KEY = "ca.key"

DOMAIN = "godwit"
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_SKEW = dt.timedelta(hours=1)
"""How far a peer's clock may be behind that of who signs."""


class Kind(enum.StrEnum):
    """What a certificate's owner is."""

    NODE = "node"
    ORCHESTRATOR = "orchestrator"
    VIEWER = "viewer"
    OPERATOR = "operator"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """Whom a certificate is for."""

    kind: Kind
    name: str
    """The node's, the person's. Empty for an orchestrator: one speaks for all."""

    def __post_init__(self) -> None:
        wants_name = self.kind is not Kind.ORCHESTRATOR
        if wants_name and not _LABEL.fullmatch(self.name):
            raise InvalidArgumentError(
                "FIELD_INVALID",
                f"the name of a {self.kind} must be a DNS label, got {self.name!r}",
                hint="lower-case letters, digits and hyphens, at most 63",
            )
        if not wants_name and self.name:
            raise InvalidArgumentError("FIELD_INVALID", "an orchestrator's certificate has no name")

    @property
    def dns_name(self) -> str:
        """As the certificate has it."""
        if self.kind is Kind.ORCHESTRATOR:
            return f"{self.kind}.{DOMAIN}"
        return f"{self.name}.{self.kind}.{DOMAIN}"

    @classmethod
    def of(cls, dns_name: str) -> Subject | None:
        """Who has this name; None: nobody of ours."""
        labels = dns_name.split(".")
        if labels[-1] != DOMAIN or len(labels) not in (2, 3) or labels[-2] not in set(Kind):
            return None
        try:
            return cls(kind=Kind(labels[-2]), name="".join(labels[:-2]))
        except InvalidArgumentError:
            return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def certificate_pem(self) -> bytes:
        """What peers may see."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        """What they may not."""
        return self.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )


def make_authority(*, days: int, now: dt.datetime) -> Pair:
    """A new authority; it can sign certificates and nothing else."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "godwit authority")])
    builder = _builder(name, name, key, days=days, now=now)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    return Pair(
        certificate=builder.add_extension(usage, critical=True).sign(key, hashes.SHA256()), key=key
    )


def issue(
    authority: Pair,
    subject: Subject,
    *,
    addresses: Sequence[str] = (),
    days: int,
    now: dt.datetime,
    key: ec.EllipticCurvePrivateKey | None = None,
) -> Pair:
    """A certificate for both ends of a connection; with a key of its own unless it has one.

    Raises:
        InvalidArgumentError: FIELD_INVALID: an address is neither a host name nor numeric.
    """
    key = key or ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject.dns_name[:64])])
    names = [x509.DNSName(subject.dns_name), *(_general_name(each) for each in addresses)]
    builder = _builder(name, authority.certificate.subject, key, days=days, now=now)
    builder = (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(
            x509.ExtendedKeyUsage(
                [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
            ),
            critical=False,
        )
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()),
            critical=False,
        )
    )
    return Pair(certificate=builder.sign(authority.key, hashes.SHA256()), key=key)


def _builder(
    name: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    *,
    days: int,
    now: dt.datetime,
) -> x509.CertificateBuilder:
    if days < 1:
        raise InvalidArgumentError("FIELD_INVALID", f"days must be 1 or more, got {days}")
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + dt.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _general_name(address: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(address))
    except ValueError:
        pass
    labels = address.lower().split(".")
    if address.lower().endswith(f".{DOMAIN}") or not all(map(_LABEL.fullmatch, labels)):
        raise InvalidArgumentError(
            "FIELD_INVALID",
            f"{address!r} is no host name, or one that stands for somebody",
            hint=f"a host name or a numeric address; names below .{DOMAIN} are identities",
        )
    return x509.DNSName(address.lower())


# --- files


def subjects(certificate: x509.Certificate) -> list[Subject]:
    """Who its owner is. More than one is a mistake, and the reader's to refuse."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    found = map(Subject.of, names.get_values_for_type(x509.DNSName))
    return [subject for subject in found if subject]


def read_pair(certificate_path: Path, key_path: Path) -> Pair:
    """Read what `write_new` wrote.

    Raises:
        FailedPreconditionError: CERTIFICATE_UNREADABLE.
    """
    try:
        certificate, key = certificate_path.read_bytes(), key_path.read_bytes()
    except OSError as error:
        raise FailedPreconditionError(
            "CERTIFICATE_UNREADABLE", f"{certificate_path}, {key_path}: {error}"
        ) from error
    return parse_pair(certificate, key, named=f"{certificate_path}, {key_path}")


def parse_pair(certificate_pem: bytes, key_pem: bytes, *, named: str = "the pair") -> Pair:
    """A certificate and its key. `named`: what an error calls them.

    Raises:
        FailedPreconditionError: CERTIFICATE_UNREADABLE: they are none, or not each other's.
    """
    try:
        certificate = x509.load_pem_x509_certificate(certificate_pem)
        key = serialization.load_pem_private_key(key_pem, password=None)
    except (ValueError, TypeError) as error:
        raise FailedPreconditionError("CERTIFICATE_UNREADABLE", f"{named}: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or (
        key.public_key().public_numbers() != _numbers(certificate)
    ):
        raise FailedPreconditionError(
            "CERTIFICATE_UNREADABLE", f"{named}: the key is not the P-256 key of the certificate"
        )
    return Pair(certificate=certificate, key=key)


def _numbers(certificate: x509.Certificate) -> ec.EllipticCurvePublicNumbers | None:
    key = certificate.public_key()
    return key.public_numbers() if isinstance(key, ec.EllipticCurvePublicKey) else None


def refuse_existing(path: Path) -> None:
    """Refuse to write over a file.

    Raises:
        FailedPreconditionError: FILE_EXISTS.
    """
    if path.exists():
        raise FailedPreconditionError(
            "FILE_EXISTS", f"{path} is there already", hint="choose another directory, or remove it"
        )


def write_new(path: Path, data: bytes, *, secret: bool) -> None:
    """Write a file that must not exist; a secret is its owner's alone from its first byte on.

    Raises:
        FailedPreconditionError: FILE_EXISTS, FILE_UNWRITABLE.
    """
    refuse_existing(path)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o644)
    except OSError as error:
        raise FailedPreconditionError("FILE_UNWRITABLE", f"{path}: {error.strerror}") from error
    with os.fdopen(fd, "wb") as file:
        file.write(data)


def replace(path: Path, data: bytes, *, secret: bool) -> None:
    """Write a file in one step: a process that reads it again sees all of it or the old one.

    Raises:
        FailedPreconditionError: FILE_UNWRITABLE.
    """
    scratch = path.with_name(f".{path.name}.new")
    scratch.unlink(missing_ok=True)
    write_new(scratch, data, secret=secret)
    scratch.rename(path)
